// Every tensor operator once: check, allocate, Exec::run; and the one list that registers them.
//
// Exec is the CPU's (ops_cpu.cpp) or CUDA's (ops_cuda.cu).  torch is used through its stable ABI only, so that one build
// runs on torch 2.11 and later.  The Python wrappers in pacd_fast/ops.py have the documentation and the error messages;
// the checks here are the last line of defence.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "kernels.h"
#include "pooling.h"
#include "soft.h"

namespace pacd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr const char* schemas[] = {
    "noisy_copies_(Tensor(a!) out, Tensor x, Tensor? image_ids, float sigma, SymInt seed, SymInt first, SymInt stream, "
    "Tensor? mean, Tensor? std) -> ()",
    "noisy_copies(Tensor x, Tensor? image_ids, float sigma, SymInt copies, SymInt seed, SymInt first, SymInt stream, "
    "ScalarType dtype, bool channels_last, Tensor? mean, Tensor? std) -> Tensor",
    "add_votes_(Tensor(a!) counts, Tensor logits, Tensor image_index) -> Tensor",
    "clopper_pearson(Tensor k, Tensor n, Tensor alpha, bool upper) -> Tensor",
    "normal_quantile(Tensor p, bool up) -> Tensor",
    "chernoff_newton(Tensor alpha, Tensor y, float q) -> (Tensor, Tensor)",
    "chernoff_newton_pairs(Tensor alpha, Tensor y, Tensor pairs, float q, int classes) -> (Tensor, Tensor)",
    "pool_max(Tensor x) -> Tensor",
    "pool_choose(Tensor x) -> (Tensor, Tensor)",
    "pool_pick(Tensor choice, Tensor other) -> Tensor",
    "pool_spread(Tensor choice, Tensor grad, SymInt height, SymInt width) -> Tensor",
    "soft_smooth(Tensor logits, float beta) -> Tensor",
    "soft_smooth_backward(Tensor grad, Tensor logits, float beta) -> Tensor",
    "soft_radius(Tensor logits, Tensor labels, float beta, float sigma, float squeeze) -> (Tensor, Tensor)",
    "soft_radius_backward(Tensor grad, Tensor logits, Tensor mean, Tensor labels, float beta, float sigma, float squeeze) -> "
    "Tensor",
};

// Calls run(Type{}) with the kernel's type for a floating dtype.
template <class Run>
void with_float_type(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::BFloat16) return run(Bfloat16{});
  STD_TORCH_CHECK(dtype == ScalarType::Half, "expected float32, bfloat16 or float16");
  run(Half{});
}

// A kernel would read the other device's pointers.
template <class... Rest>
void on_one_device(const char* name, const Tensor& first, const Rest&... rest) {
  STD_TORCH_CHECK(((rest.get_device() == first.get_device()) && ...), name, ": all tensors must be on one device");
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <class Exec>
void noisy_copies_(Tensor out, Tensor x, std::optional<Tensor> image_ids, double sigma, int64_t seed, int64_t first,
                   int64_t stream, std::optional<Tensor> mean, std::optional<Tensor> std) {
  const int64_t images = x.dim() ? x.size(0) : 0;
  const int64_t rows = out.dim() ? out.size(0) : 0;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && out.dim() == x.dim() && images > 0 && rows % images == 0,
                  "noisy_copies: x must be float32 [B, ...] and out [B * copies, ...]");
  for (int64_t d = 1; d < x.dim(); ++d) STD_TORCH_CHECK(out.size(d) == x.size(d), "noisy_copies: out and x differ in shape");
  on_one_device("noisy_copies", out, x, image_ids.value_or(x), mean.value_or(x), std.value_or(x));
  if (rows == 0 || x.numel() == 0) return;
  const int64_t elements = x.numel() / images;
  STD_TORCH_CHECK(elements < (int64_t{1} << 33), "noisy_copies: an image has more than 2^33 elements");
  const int64_t copies = rows / images;
  STD_TORCH_CHECK(first >= 0 && first + copies <= (int64_t{1} << 32), "noisy_copies: samples are numbered 0 to 2^32 - 1");
  STD_TORCH_CHECK(stream >= 0 && stream < (1 << 16), "noisy_copies: stream must be in [0, 2^16)");
  STD_TORCH_CHECK(!image_ids || (image_ids->scalar_type() == ScalarType::Long && image_ids->numel() == images),
                  "noisy_copies: image_ids must be int64 [B]");
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "noisy_copies: mean and std come together");
  // out is contiguous, or channels_last: [B, C, H, W] with C innermost.
  const bool plain = out.is_contiguous();
  const bool last = !plain && out.dim() == 4 && out.stride(1) == 1 && out.stride(3) == out.size(1) &&
                    out.stride(2) == out.size(1) * out.size(3) && out.stride(0) == elements;
  STD_TORCH_CHECK(plain || last, "noisy_copies: out must be contiguous or channels_last");
  const int64_t channels = (mean || last) ? x.size(1) : 1;
  STD_TORCH_CHECK(!mean || (mean->numel() == channels && std->numel() == channels && mean->scalar_type() == ScalarType::Float &&
                            std->scalar_type() == ScalarType::Float),
                  "noisy_copies: mean and std must be float32 with one number per channel");
  const Tensor pixels = torch::stable::contiguous(x);
  const auto ids = contiguous(image_ids), shift = contiguous(mean), spread = contiguous(std);
  with_float_type(out.scalar_type(), [&](auto type) {
    using Out = decltype(type);
    auto launch = [&](auto kernel) {
      kernel = {static_cast<const float*>(pixels.data_ptr()), static_cast<Out*>(out.data_ptr()),
                data_or_null<int64_t>(ids),  data_or_null<float>(shift), data_or_null<float>(spread),
                copies, first, elements, channels, static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
                static_cast<float>(sigma), last};
      Exec::run_tiles(kernel, rows, out);
    };
    if (mean) {
      launch(NoisyCopies<Out, true>{});
    } else {
      launch(NoisyCopies<Out, false>{});
    }
  });
}

template <class Exec>
Tensor noisy_copies(Tensor x, std::optional<Tensor> image_ids, double sigma, int64_t copies, int64_t seed, int64_t first,
                    int64_t stream, ScalarType dtype, bool channels_last, std::optional<Tensor> mean,
                    std::optional<Tensor> std) {
  STD_TORCH_CHECK(x.dim() > 0 && copies > 0, "noisy_copies: x must be [B, ...] and copies positive");
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size[0] *= copies;
  Tensor out = torch::stable::empty(size, dtype, std::nullopt, x.device(), std::nullopt,
                                    channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                  : torch::headeronly::MemoryFormat::Contiguous);
  noisy_copies_<Exec>(out, x, image_ids, sigma, seed, first, stream, mean, std);
  return out;
}

template <class Exec>
Tensor add_votes_(Tensor counts, Tensor logits, Tensor image_index) {
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.dim() == 2 && counts.is_contiguous(),
                  "add_votes_: counts must be a contiguous int64 [N, classes]");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) == counts.size(1) && logits.size(1) > 0,
                  "add_votes_: logits must be [M, classes]");
  STD_TORCH_CHECK(image_index.scalar_type() == ScalarType::Long && image_index.dim() == 1 &&
                      image_index.size(0) == logits.size(0),
                  "add_votes_: image_index must be int64 [M]");
  on_one_device("add_votes_", counts, logits, image_index);
  Tensor nan_rows = torch::stable::new_zeros(counts, {counts.size(0)});
  const Tensor values = torch::stable::contiguous(logits), index = torch::stable::contiguous(image_index);
  with_float_type(logits.scalar_type(), [&](auto type) {
    using In = decltype(type);
    Exec::run_rows(AddVotes<In>{static_cast<const In*>(values.data_ptr()), static_cast<const int64_t*>(index.data_ptr()),
                                static_cast<int64_t*>(counts.data_ptr()), static_cast<int64_t*>(nan_rows.data_ptr()),
                                counts.size(0), counts.size(1)},
                   logits.size(0), 8192 / logits.size(1) + 1, counts);
  });
  return nan_rows;
}

template <class Exec>
Tensor clopper_pearson(Tensor k, Tensor n, Tensor alpha, bool upper) {
  STD_TORCH_CHECK(k.scalar_type() == ScalarType::Long && n.scalar_type() == ScalarType::Long &&
                      alpha.scalar_type() == ScalarType::Double && k.numel() == n.numel() && k.numel() == alpha.numel(),
                  "clopper_pearson: k and n must be int64 and alpha float64, of one size");
  on_one_device("clopper_pearson", k, n, alpha);
  Tensor bound = torch::stable::new_empty(k, k.sizes(), ScalarType::Double);
  const Tensor hits = torch::stable::contiguous(k), draws = torch::stable::contiguous(n), levels = torch::stable::contiguous(alpha);
  Exec::run_rows(ClopperPearson{static_cast<const int64_t*>(hits.data_ptr()), static_cast<const int64_t*>(draws.data_ptr()),
                                static_cast<const double*>(levels.data_ptr()), static_cast<double*>(bound.data_ptr()), upper},
                 k.numel(), 1, k);
  return bound;
}

template <class Exec>
Tensor normal_quantile(Tensor p, bool up) {
  STD_TORCH_CHECK(p.scalar_type() == ScalarType::Double, "normal_quantile: p must be float64");
  Tensor z = torch::stable::new_empty(p, p.sizes());
  const Tensor levels = torch::stable::contiguous(p);
  Exec::run_rows(NormalQuantile{static_cast<const double*>(levels.data_ptr()), static_cast<double*>(z.data_ptr()), up},
                 p.numel(), 4, p);
  return z;
}

// The first Newton step goes no further than here in units of 1 / (largest influence): beyond it every term is saturated.
inline double newton_reach(double keep, double other) { return 2.0 + std::log(keep / other); }

template <class Exec>
std::tuple<Tensor, Tensor> chernoff_newton(Tensor alpha, Tensor y, double q) {
  STD_TORCH_CHECK(alpha.scalar_type() == ScalarType::Double && alpha.dim() == 2 && y.scalar_type() == ScalarType::Long &&
                      y.dim() == 1 && y.size(0) == alpha.size(1),
                  "chernoff_newton: alpha must be float64 [m, n] and y int64 [n]");
  STD_TORCH_CHECK(q >= 1e-300 && q < 0.5, "chernoff_newton: q must be in (0, 1/2)");
  on_one_device("chernoff_newton", alpha, y);
  const Tensor rows = torch::stable::contiguous(alpha), labels = torch::stable::contiguous(y);
  const int64_t m = alpha.size(0);
  Tensor t = torch::stable::new_empty(alpha, {m}), log_tail = torch::stable::new_empty(alpha, {m});
  Exec::run_teams(ChernoffNewton{static_cast<const double*>(rows.data_ptr()), static_cast<const int64_t*>(labels.data_ptr()),
                                 static_cast<double*>(t.data_ptr()), static_cast<double*>(log_tail.data_ptr()), alpha.size(1), q,
                                 newton_reach(1.0 - q, q)},
                  m, alpha);
  return {t, log_tail};
}

template <class Exec>
std::tuple<Tensor, Tensor> chernoff_newton_pairs(Tensor alpha, Tensor y, Tensor pairs, double q, int64_t classes) {
  STD_TORCH_CHECK(alpha.scalar_type() == ScalarType::Double && alpha.dim() == 2 && y.scalar_type() == ScalarType::Long &&
                      y.dim() == 1 && y.size(0) == alpha.size(1),
                  "chernoff_newton_pairs: alpha must be float64 [m, n] and y int64 [n]");
  STD_TORCH_CHECK(pairs.scalar_type() == ScalarType::Long && pairs.dim() == 3 && pairs.size(0) == alpha.size(0) && pairs.size(2) == 2,
                  "chernoff_newton_pairs: pairs must be int64 [m, P, 2]");
  on_one_device("chernoff_newton_pairs", alpha, y, pairs);
  const double keep = 1.0 - q, other = q / static_cast<double>(classes - 1);
  STD_TORCH_CHECK(classes >= 2 && q >= 1e-300 && keep > other, "chernoff_newton_pairs: q must be in (0, (K - 1) / K)");
  const Tensor rows = torch::stable::contiguous(alpha), labels = torch::stable::contiguous(y);
  const Tensor rivals = torch::stable::contiguous(pairs);
  const int64_t m = alpha.size(0), per_row = pairs.size(1);
  Tensor t = torch::stable::new_empty(alpha, {m, per_row}), log_tail = torch::stable::new_empty(alpha, {m, per_row});
  Exec::run_teams(ChernoffPairs{static_cast<const double*>(rows.data_ptr()), static_cast<const int64_t*>(labels.data_ptr()),
                                static_cast<const int64_t*>(rivals.data_ptr()), static_cast<double*>(t.data_ptr()),
                                static_cast<double*>(log_tail.data_ptr()), alpha.size(1), per_row, keep, other,
                                other * static_cast<double>(classes - 2), 1.0 - 2.0 * other, newton_reach(keep, other)},
                  m * per_row, alpha);
  return {t, log_tail};
}

// Calls run(Type{}) for float32 and float64.
template <class Run>
void with_real_type(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, "expected float32 or float64");
  run(double{});
}

inline void check_soft(const char* name, const Tensor& logits, double beta) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(2) > 1, name, ": logits must be [B, k, C], k > 0, C > 1");
  STD_TORCH_CHECK(beta > 0, name, ": beta must be positive");
}

template <class T>
Copies<T> copies_of(const Tensor& logits, double beta) {
  return {static_cast<const T*>(logits.data_ptr()), logits.size(1), logits.size(2), static_cast<T>(beta)};
}

template <class Exec>
Tensor soft_smooth(Tensor logits, double beta) {
  check_soft("soft_smooth", logits, beta);
  const Tensor x = torch::stable::contiguous(logits);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(2)});
  with_real_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_copies(SoftSmooth<T>{copies_of<T>(x, beta), static_cast<T*>(mean.data_ptr())}, x.size(0), x);
  });
  return mean;
}

template <class Exec>
Tensor soft_smooth_backward(Tensor grad, Tensor logits, double beta) {
  check_soft("soft_smooth_backward", logits, beta);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(2) &&
                      grad.scalar_type() == logits.scalar_type(),
                  "soft_smooth_backward: grad must be [B, C] of logits' dtype");
  on_one_device("soft_smooth_backward", logits, grad);
  const Tensor x = torch::stable::contiguous(logits), slopes = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  with_real_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_copies(SoftSmoothBackward<T>{copies_of<T>(x, beta), static_cast<const T*>(slopes.data_ptr()), static_cast<T*>(out.data_ptr())},
                     x.size(0), x);
  });
  return out;
}

inline void check_radius(const char* name, const Tensor& logits, const Tensor& labels, double squeeze) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == logits.size(0), name,
                  ": labels must be int64 [B]");
  STD_TORCH_CHECK(squeeze >= 0 && squeeze < 0.5, name, ": squeeze must be in [0, 1/2)");
  on_one_device(name, logits, labels);
}

// The radius, and soft_smooth(logits, beta), which the way back needs.
template <class Exec>
std::tuple<Tensor, Tensor> soft_radius(Tensor logits, Tensor labels, double beta, double sigma, double squeeze) {
  check_radius("soft_radius", logits, labels, squeeze);
  const Tensor mean = soft_smooth<Exec>(logits, beta), classes = torch::stable::contiguous(labels);
  if constexpr (Exec::readable) {
    const int64_t* label = static_cast<const int64_t*>(classes.data_ptr());
    bool inside = true;
    for (int64_t i = 0; i < classes.size(0); ++i) inside = inside && label[i] >= 0 && label[i] < mean.size(1);
    STD_TORCH_CHECK(inside, "labels must be in [0, ", mean.size(1), ")");
  }
  Tensor radius = torch::stable::new_empty(mean, {mean.size(0)});
  with_real_type(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_rows(SoftRadius<T>{static_cast<const T*>(mean.data_ptr()), static_cast<const int64_t*>(classes.data_ptr()),
                                 static_cast<T*>(radius.data_ptr()), mean.size(1), sigma, squeeze},
                   mean.size(0), 256, mean);
  });
  return {radius, mean};
}

template <class Exec>
Tensor soft_radius_backward(Tensor grad, Tensor logits, Tensor mean, Tensor labels, double beta, double sigma, double squeeze) {
  check_radius("soft_radius_backward", logits, labels, squeeze);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == logits.size(0) && grad.scalar_type() == logits.scalar_type(),
                  "soft_radius_backward: grad must be [B] of logits' dtype");
  STD_TORCH_CHECK(mean.dim() == 2 && mean.size(0) == logits.size(0) && mean.size(1) == logits.size(2) &&
                      mean.scalar_type() == logits.scalar_type(),
                  "soft_radius_backward: mean must be [B, C] of logits' dtype");
  on_one_device("soft_radius_backward", logits, mean, grad);
  const Tensor means = torch::stable::contiguous(mean);
  Tensor slopes = torch::stable::new_empty(means, means.sizes());
  const Tensor weights = torch::stable::contiguous(grad), classes = torch::stable::contiguous(labels);
  with_real_type(slopes.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_rows(SoftRadiusSlopes<T>{static_cast<const T*>(means.data_ptr()), static_cast<const int64_t*>(classes.data_ptr()),
                                       static_cast<const T*>(weights.data_ptr()), static_cast<T*>(slopes.data_ptr()),
                                       slopes.size(1), sigma, squeeze},
                   slopes.size(0), 256, slopes);
  });
  return soft_smooth_backward<Exec>(slopes, logits, beta);
}

template <class Exec>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("noisy_copies_", TORCH_BOX(&noisy_copies_<Exec>));
  library.impl("noisy_copies", TORCH_BOX(&noisy_copies<Exec>));
  library.impl("add_votes_", TORCH_BOX(&add_votes_<Exec>));
  library.impl("clopper_pearson", TORCH_BOX(&clopper_pearson<Exec>));
  library.impl("normal_quantile", TORCH_BOX(&normal_quantile<Exec>));
  library.impl("chernoff_newton", TORCH_BOX(&chernoff_newton<Exec>));
  library.impl("chernoff_newton_pairs", TORCH_BOX(&chernoff_newton_pairs<Exec>));
  library.impl("pool_max", TORCH_BOX(&pool_max<Exec>));
  library.impl("pool_choose", TORCH_BOX(&pool_choose<Exec>));
  library.impl("pool_pick", TORCH_BOX(&pool_pick<Exec>));
  library.impl("pool_spread", TORCH_BOX(&pool_spread<Exec>));
  library.impl("soft_smooth", TORCH_BOX(&soft_smooth<Exec>));
  library.impl("soft_smooth_backward", TORCH_BOX(&soft_smooth_backward<Exec>));
  library.impl("soft_radius", TORCH_BOX(&soft_radius<Exec>));
  library.impl("soft_radius_backward", TORCH_BOX(&soft_radius_backward<Exec>));
}

}  // namespace pacd
