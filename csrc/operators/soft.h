// soft_smooth and soft_radius: the soft smoothed classifier, its radius, and their gradients.
#pragma once

#include "kernels/soft.h"
#include "operators/tensors.h"

namespace pacd {

inline void check_soft(const char* name, const Tensor& logits, double beta) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(2) > 1, name,
                  ": logits must be [B, k, C], k > 0, C > 1");
  STD_TORCH_CHECK(beta > 0, name, ": beta must be positive");
}

template <class T>
Copies<T> copies_of(const Tensor& logits, double beta) {
  return {pointer<const T>(logits), logits.size(1), logits.size(2), static_cast<T>(beta)};
}

inline constexpr const char* schema_soft_smooth = "soft_smooth(Tensor logits, float beta) -> Tensor";
template <class Exec>
Tensor soft_smooth(Tensor logits, double beta) {
  check_soft("soft_smooth", logits, beta);
  const Tensor x = torch::stable::contiguous(logits);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(2)});
  with_real_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_copies(SoftSmooth<T>{copies_of<T>(x, beta), pointer<T>(mean)}, x.size(0), x);
  });
  return mean;
}

inline constexpr const char* schema_soft_smooth_backward =
    "soft_smooth_backward(Tensor grad, Tensor logits, float beta) -> Tensor";
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
    Exec::run_copies(SoftSmoothBackward<T>{copies_of<T>(x, beta), pointer<const T>(slopes), pointer<T>(out)}, x.size(0),
                     x);
  });
  return out;
}

inline void check_radius(const char* name, const Tensor& logits, const Tensor& labels, double squeeze) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == logits.size(0),
                  name, ": labels must be int64 [B]");
  STD_TORCH_CHECK(squeeze >= 0 && squeeze < 0.5, name, ": squeeze must be in [0, 1/2)");
  on_one_device(name, logits, labels);
}

// The radius, and soft_smooth(logits, beta), which the way back needs.
inline constexpr const char* schema_soft_radius =
    "soft_radius(Tensor logits, Tensor labels, float beta, float sigma, float squeeze) -> (Tensor, Tensor)";
template <class Exec>
std::tuple<Tensor, Tensor> soft_radius(Tensor logits, Tensor labels, double beta, double sigma, double squeeze) {
  check_radius("soft_radius", logits, labels, squeeze);
  const Tensor mean = soft_smooth<Exec>(logits, beta), classes = torch::stable::contiguous(labels);
  if constexpr (Exec::readable) {
    const int64_t* label = pointer<const int64_t>(classes);
    bool inside = true;
    for (int64_t i = 0; i < classes.size(0); ++i) inside = inside && label[i] >= 0 && label[i] < mean.size(1);
    STD_TORCH_CHECK(inside, "labels must be in [0, ", mean.size(1), ")");
  }
  Tensor radius = torch::stable::new_empty(mean, {mean.size(0)});
  with_real_type(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Exec::run_rows(SoftRadius<T>{pointer<const T>(mean), pointer<const int64_t>(classes), pointer<T>(radius),
                                 mean.size(1), sigma, squeeze},
                   mean.size(0), 256, mean);
  });
  return {radius, mean};
}

inline constexpr const char* schema_soft_radius_backward =
    "soft_radius_backward(Tensor grad, Tensor logits, Tensor mean, Tensor labels, float beta, float sigma, float "
    "squeeze) -> Tensor";
template <class Exec>
Tensor soft_radius_backward(Tensor grad, Tensor logits, Tensor mean, Tensor labels, double beta, double sigma,
                            double squeeze) {
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
    Exec::run_rows(SoftRadiusSlopes<T>{pointer<const T>(means), pointer<const int64_t>(classes),
                                       pointer<const T>(weights), pointer<T>(slopes), slopes.size(1), sigma, squeeze},
                   slopes.size(0), 256, slopes);
  });
  return soft_smooth_backward<Exec>(slopes, logits, beta);
}

}  // namespace pacd
