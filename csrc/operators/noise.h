// noisy_copies: Gaussian noise of counters, added to images.
#pragma once

#include "kernels/noise.h"
#include "operators/tensors.h"

namespace pacd {

// Of out [B * copies, ...], or with a table of rows [R, ...], for x [B, ...].
struct NoiseShape {
  int64_t rows, elements;
  bool channels_last;  // [R, C, H, W] with C innermost; else contiguous
  BatchRows each;
};

// The table of rows holds what it may: looked at where that costs no wait.
inline bool rows_in_range(const Tensor& table, int64_t images, int bits) {
  const auto* row = pointer<const int64_t>(table);
  bool inside = true;
  for (int64_t r = 0; r < table.size(0); ++r, row += 3)
    inside &= row[0] >= 0 && row[0] < images && row[1] >> bits == 0 && row[2] >> 32 == 0;
  return inside;
}

// What all noise operators ask of their arguments; no rows where there is nothing to draw.  image_ids and table, int64
// [R, 3] of (image in x, stream, sample), are contiguous; with a table, first and stream are not looked at.
template <class Exec>
NoiseShape noise_shape(const char* name, const Tensor& out, const Tensor& x, const std::optional<Tensor>& image_ids,
                       const std::optional<Tensor>& table, int64_t seed, int64_t first, int64_t stream, int bits) {
  const int64_t images = x.dim() ? x.size(0) : 0;
  const int64_t rows = out.dim() ? out.size(0) : 0;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && out.dim() == x.dim() && images > 0 &&
                      (table || rows % images == 0),
                  name, ": x must be float32 [B, ...] and out [B * copies, ...]");
  for (int64_t d = 1; d < x.dim(); ++d)
    STD_TORCH_CHECK(out.size(d) == x.size(d), name, ": out and x differ in shape");
  on_one_device(name, out, x, image_ids.value_or(x), table.value_or(x));
  if (rows == 0 || x.numel() == 0) return {};
  const int64_t elements = x.numel() / images;
  STD_TORCH_CHECK(elements < (int64_t{1} << 33), name, ": an image has more than 2^33 elements");
  const int64_t copies = table ? 1 : rows / images;
  STD_TORCH_CHECK(!table || (table->scalar_type() == ScalarType::Long && table->dim() == 2 && table->size(0) == rows &&
                             table->size(1) == 3),
                  name, ": rows must be int64 [R, 3] for out [R, ...]");
  if constexpr (Exec::readable)
    STD_TORCH_CHECK(!table || rows_in_range(*table, images, bits), name,
                    ": rows must hold (image in [0, B), stream in [0, 2^", bits, "), sample in [0, 2^32))");
  STD_TORCH_CHECK(first >= 0 && first + copies <= (int64_t{1} << 32), name, ": samples are numbered 0 to 2^32 - 1");
  STD_TORCH_CHECK(stream >= 0 && stream < (1 << bits), name, ": stream must be in [0, 2^", bits, ")");
  STD_TORCH_CHECK(!image_ids || (image_ids->scalar_type() == ScalarType::Long && image_ids->numel() == images), name,
                  ": image_ids must be int64 [B]");
  const bool plain = out.is_contiguous();
  const bool last = !plain && out.dim() == 4 && out.stride(1) == 1 && out.stride(3) == out.size(1) &&
                    out.stride(2) == out.size(1) * out.size(3) && out.stride(0) == elements;
  STD_TORCH_CHECK(plain || last, name, ": out must be contiguous or channels_last");
  return {rows, elements, last,
          {pointer<const int64_t>(image_ids), pointer<const int64_t>(table), images, copies, first,
           static_cast<uint64_t>(seed), static_cast<uint32_t>(stream)}};
}

// Room for the copies of x.
inline Tensor empty_copies(const Tensor& x, int64_t copies, ScalarType dtype, bool channels_last) {
  STD_TORCH_CHECK(x.dim() > 0 && copies > 0, "x must be [B, ...] and copies positive");
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size[0] *= copies;
  return torch::stable::empty(
      size, dtype, std::nullopt, x.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

inline constexpr const char* schema_noisy_copies_ =
    "noisy_copies_(Tensor(a!) out, Tensor x, Tensor? image_ids, float sigma, SymInt seed, SymInt first, SymInt "
    "stream, Tensor? mean, Tensor? std, Tensor? rows=None) -> ()";
template <class Exec>
void noisy_copies_(Tensor out, Tensor x, std::optional<Tensor> image_ids, double sigma, int64_t seed, int64_t first,
                   int64_t stream, std::optional<Tensor> mean, std::optional<Tensor> std, std::optional<Tensor> rows) {
  const auto ids = contiguous(image_ids), table = contiguous(rows);
  const auto [count, elements, last, each] =
      noise_shape<Exec>("noisy_copies", out, x, ids, table, seed, first, stream, 16);
  on_one_device("noisy_copies", x, mean.value_or(x), std.value_or(x));
  if (count == 0) return;
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "noisy_copies: mean and std come together");
  const int64_t channels = (mean || last) ? x.size(1) : 1;
  STD_TORCH_CHECK(!mean || (mean->numel() == channels && std->numel() == channels &&
                            mean->scalar_type() == ScalarType::Float && std->scalar_type() == ScalarType::Float),
                  "noisy_copies: mean and std must be float32 with one number per channel");
  const Tensor pixels = torch::stable::contiguous(x);
  const auto shift = contiguous(mean), spread = contiguous(std);
  with_float_type(out.scalar_type(), [&](auto type) {
    using Out = decltype(type);
    auto launch = [&](auto kernel) {
      kernel = {pointer<const float>(pixels),
                pointer<Out>(out),
                each,
                pointer<const float>(shift),
                pointer<const float>(spread),
                elements,
                channels,
                static_cast<float>(sigma),
                last};
      Exec::run_tiles(kernel, count, out);
    };
    if (mean) {
      launch(NoisyCopies<Out, true>{});
    } else {
      launch(NoisyCopies<Out, false>{});
    }
  });
}

inline constexpr const char* schema_noisy_copies =
    "noisy_copies(Tensor x, Tensor? image_ids, float sigma, SymInt copies, SymInt seed, SymInt first, SymInt "
    "stream, ScalarType dtype, bool channels_last, Tensor? mean, Tensor? std) -> Tensor";
template <class Exec>
Tensor noisy_copies(Tensor x, std::optional<Tensor> image_ids, double sigma, int64_t copies, int64_t seed,
                    int64_t first, int64_t stream, ScalarType dtype, bool channels_last, std::optional<Tensor> mean,
                    std::optional<Tensor> std) {
  Tensor out = empty_copies(x, copies, dtype, channels_last);
  noisy_copies_<Exec>(out, x, image_ids, sigma, seed, first, stream, mean, std, std::nullopt);
  return out;
}

}  // namespace pacd
