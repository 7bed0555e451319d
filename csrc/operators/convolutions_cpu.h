// narrow_grad and convolve3x3: convolutions of layers.py, on the CPU alone.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/narrow_cpu.h"
#include "kernels/winograd_cpu.h"
#include "operators/tensors.h"

namespace pacd {

// grad [N, C, H', W'], filters float32 [C, 1, k, k] with k = 3, 5 or 7: float32 [N, 1, H, W].
inline constexpr const char* schema_narrow_grad =
    "narrow_grad(Tensor grad, Tensor filters, int height, int width) -> Tensor";
template <class Exec>
Tensor narrow_grad(Tensor grad, Tensor filters, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad.dim() == 4 && filters.dim() == 4 && filters.size(0) == grad.size(1) && filters.size(1) == 1 &&
                      filters.size(2) == filters.size(3) && filters.scalar_type() == ScalarType::Float,
                  "narrow_grad: expected grad [N, C, H, W] and float32 filters [C, 1, k, k]");
  const int64_t channels = grad.size(1), size = filters.size(2);
  STD_TORCH_CHECK(grad.size(2) == height - size + 1 && grad.size(3) == width - size + 1,
                  "narrow_grad: sizes do not fit");
  const Tensor slopes = channels_last(grad);
  const Tensor given = torch::stable::contiguous(filters);
  Tensor out = torch::stable::new_zeros(grad, {grad.size(0), 1, height, width}, ScalarType::Float);
  with_float_type(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto known) {
      using Kernel = NarrowGrad<T, decltype(known)::value>;
      std::vector<float> padded(channels * Kernel::lanes);
      const auto* from = pointer<const float>(given);
      for (int64_t c = 0; c < channels; ++c)
        std::copy_n(from + c * Kernel::taps, Kernel::taps, padded.data() + c * Kernel::lanes);
      Exec::run_rows(Kernel{pointer<const T>(slopes), padded.data(), pointer<float>(out), channels, height, width},
                     grad.size(0), 1, grad);
    };
    if (size == 3) return launch(std::integral_constant<int, 3>{});
    if (size == 5) return launch(std::integral_constant<int, 5>{});
    STD_TORCH_CHECK(size == 7, "narrow_grad: filters must be 3x3, 5x5 or 7x7");
    launch(std::integral_constant<int, 7>{});
  });
  return out;
}

// x float32 [N, C, H, W], weight float32 [K, C, 3, 3], bias float32 [K], C and K multiples of 16: float32 [N, K, H, W]
// in channels_last.  Transposed, x is [N, K, H, W] and the result [N, C, H, W]: the gradient with respect to images.
inline constexpr const char* schema_convolve3x3 =
    "convolve3x3(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor";
template <class Exec>
Tensor convolve3x3(Tensor given, Tensor weight, std::optional<Tensor> bias, bool transposed) {
  const auto single = [](const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; };
  STD_TORCH_CHECK(given.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      single(given) && single(weight),
                  "convolve3x3: expected float32 x [N, C, H, W] and weight [K, C, 3, 3]");
  const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
  STD_TORCH_CHECK(given.size(1) == inputs && inputs % 16 == 0 && outputs % 16 == 0 && inputs > 0 && outputs > 0,
                  "convolve3x3: channels must fit the weight, and be multiples of 16");
  STD_TORCH_CHECK(!bias || (single(*bias) && bias->dim() == 1 && bias->size(0) == outputs),
                  "convolve3x3: bias must be float32, one number a channel");
  const Tensor x = channels_last(given);
  const Tensor filters = torch::stable::contiguous(weight);
  const std::optional<Tensor> added = contiguous(bias);
  Tensor out = empty_channels_last(x, {x.size(0), outputs, x.size(2), x.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const WinogradSizes sizes{inputs, outputs};
  const Lines transformed = scratch(WinogradSizes::places * inputs * outputs), shift = scratch(outputs);
  Exec::run_rows(WinogradFilters{sizes, pointer<const float>(filters), transformed.get(), transposed},
                 outputs / WinogradSizes::lanes * inputs, 256, x);
  if (added) {
    std::copy_n(pointer<const float>(added), outputs, shift.get());
  } else {
    std::fill_n(shift.get(), outputs, 0.0f);
  }
  Exec::run_rows(Winograd{sizes, pointer<const float>(x), transformed.get(), shift.get(), pointer<float>(out),
                          x.size(2), x.size(3)},
                 x.size(0), 1, x);
  return out;
}

}  // namespace pacd
