// lattice_copies: Gaussian noise of counters, rounded exactly to a lattice.
#pragma once

#include "kernels/lattice.h"
#include "operators/noise.h"

namespace pacd {

inline constexpr const char* schema_lattice_copies_ =
    "lattice_copies_(Tensor(a!) out, Tensor x, Tensor? image_ids, float sigma, Tensor step, Tensor offset, SymInt "
    "seed, SymInt first, SymInt stream, Tensor? rows=None) -> Tensor";
// step and offset: float64, one number or one per channel.  Returns which rows are void, a bool for each.
template <class Exec>
Tensor lattice_copies_(Tensor out, Tensor x, std::optional<Tensor> image_ids, double sigma, Tensor step, Tensor offset,
                       int64_t seed, int64_t first, int64_t stream, std::optional<Tensor> rows) {
  const auto ids = contiguous(image_ids), table = contiguous(rows);
  const auto shape = noise_shape<Exec>("lattice_copies", out, x, ids, table, seed, first, stream, 15);
  on_one_device("lattice_copies", x, step, offset);
  Tensor voids = torch::stable::new_zeros(out, {out.size(0)}, ScalarType::Bool);
  if (shape.rows == 0) return voids;
  const int64_t count = step.numel(), pixels = x.numel();
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Double && offset.scalar_type() == ScalarType::Double &&
                      offset.numel() == count && (count == 1 || (x.dim() > 1 && count == x.size(1))),
                  "lattice_copies: step and offset must be float64, one number or one per channel");
  const int64_t plane = shape.elements / count;
  const Tensor images = torch::stable::contiguous(x), steps = torch::stable::contiguous(step),
               offsets = torch::stable::contiguous(offset);
  const Tensor memory = torch::stable::new_empty(step, {count * static_cast<int64_t>(sizeof(Lattice))}, ScalarType::Byte);
  const Tensor whole = torch::stable::new_empty(images, {pixels}), part = torch::stable::new_empty(images, {pixels});
  auto* lattices = pointer<Lattice>(memory);
  Exec::run_rows(MakeLattices{pointer<const double>(steps), pointer<const double>(offsets), lattices,
                              static_cast<float>(sigma)},
                 count, 1024, out);
  Exec::run_rows(PlacePixels{pointer<const float>(images), lattices, pointer<float>(whole), pointer<float>(part), pixels,
                             plane, count},
                 (pixels + tile_size - 1) / tile_size, 256, out);
  with_float_type(out.scalar_type(), [&](auto type) {
    using Out = decltype(type);
    Exec::run_tiles(LatticeCopies<Out>{pointer<const float>(images),
                                       pointer<const float>(whole),
                                       pointer<const float>(part),
                                       lattices,
                                       pointer<Out>(out),
                                       pointer<uint8_t>(voids),
                                       shape.each,
                                       shape.elements,
                                       shape.channels_last ? x.size(1) : 1,
                                       plane,
                                       shape.channels_last},
                    shape.rows, out);
  });
  return voids;
}

inline constexpr const char* schema_lattice_copies =
    "lattice_copies(Tensor x, Tensor? image_ids, float sigma, Tensor step, Tensor offset, SymInt copies, SymInt seed, "
    "SymInt first, SymInt stream, ScalarType dtype, bool channels_last) -> (Tensor, Tensor)";
template <class Exec>
std::tuple<Tensor, Tensor> lattice_copies(Tensor x, std::optional<Tensor> image_ids, double sigma, Tensor step,
                                          Tensor offset, int64_t copies, int64_t seed, int64_t first, int64_t stream,
                                          ScalarType dtype, bool channels_last) {
  Tensor out = empty_copies(x, copies, dtype, channels_last);
  Tensor voids = lattice_copies_<Exec>(out, x, image_ids, sigma, step, offset, seed, first, stream, std::nullopt);
  return {out, voids};
}

}  // namespace pacd
