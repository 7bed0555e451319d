// The gradient of a convolution (stride 1, no padding) with respect to images of one channel, on the CPU, where torch is slow
// (benchmarks/bench_ops.py); pacd_fast/layers.py has the layer.
#pragma once

#include <algorithm>
#include <vector>

#include "ops.h"

namespace pacd {

// Each pixel of grad adds its filters, weighted, to a window of out.  Four neighbours at a time, so that filters are loaded
// once for all; an item is an image.
template <class T, int size>
struct NarrowGrad {
  static constexpr int taps = size * size, lanes = (taps + 15) / 16 * 16, block = 4;
  const T* grad;         // [images, height - size + 1, width - size + 1, channels]
  const float* filters;  // [channels, lanes], zeros after the taps
  float* out;            // [images, height, width], zeros
  int64_t channels, height, width;

  template <int pixels>
  PACD_INLINE void add(const T* from, float* target) const {
    float sums[pixels][lanes] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const float* filter = filters + c * lanes;
      for (int p = 0; p < pixels; ++p) {
        const float weight = to_float(from[p * channels + c]);
        PACD_LANES for (int l = 0; l < lanes; ++l) sums[p][l] = fma(weight, filter[l], sums[p][l]);
      }
    }
    for (int u = 0; u < size; ++u) {
      for (int p = 0; p < pixels; ++p) {
        for (int v = 0; v < size; ++v) target[u * width + p + v] += sums[p][u * size + v];
      }
    }
  }

  PACD_INLINE void operator()(int64_t image) const {
    const int64_t rows = height - size + 1, columns = width - size + 1;
    const T* from = grad + image * rows * columns * channels;
    for (int64_t i = 0; i < rows; ++i) {
      float* target = out + (image * height + i) * width;
      int64_t j = 0;
      for (; j + block <= columns; j += block, from += block * channels) add<block>(from, target + j);
      for (; j < columns; ++j, from += channels) add<1>(from, target + j);
    }
  }
};

inline constexpr const char* narrow_schema = "narrow_grad(Tensor grad, Tensor filters, int height, int width) -> Tensor";

// grad [N, C, H', W'], filters float32 [C, 1, k, k] with k = 3, 5 or 7: float32 [N, 1, H, W].
template <class Exec>
Tensor narrow_grad(Tensor grad, Tensor filters, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad.dim() == 4 && filters.dim() == 4 && filters.size(0) == grad.size(1) && filters.size(1) == 1 &&
                      filters.size(2) == filters.size(3) && filters.scalar_type() == ScalarType::Float,
                  "narrow_grad: expected grad [N, C, H, W] and float32 filters [C, 1, k, k]");
  const int64_t channels = grad.size(1), size = filters.size(2);
  STD_TORCH_CHECK(grad.size(2) == height - size + 1 && grad.size(3) == width - size + 1, "narrow_grad: sizes do not fit");
  const Tensor slopes = channels_last(grad);
  const Tensor given = torch::stable::contiguous(filters);
  Tensor out = torch::stable::new_zeros(grad, {grad.size(0), 1, height, width}, ScalarType::Float);
  with_float_type(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto known) {
      using Kernel = NarrowGrad<T, decltype(known)::value>;
      std::vector<float> padded(channels * Kernel::lanes);
      const auto* from = static_cast<const float*>(given.data_ptr());
      for (int64_t c = 0; c < channels; ++c) std::copy_n(from + c * Kernel::taps, Kernel::taps, padded.data() + c * Kernel::lanes);
      Exec::run_rows(Kernel{static_cast<const T*>(slopes.data_ptr()), padded.data(), static_cast<float*>(out.data_ptr()), channels,
                            height, width},
                     grad.size(0), 1, grad);
    };
    if (size == 3) return launch(std::integral_constant<int, 3>{});
    if (size == 5) return launch(std::integral_constant<int, 5>{});
    STD_TORCH_CHECK(size == 7, "narrow_grad: filters must be 3x3, 5x5 or 7x7");
    launch(std::integral_constant<int, 7>{});
  });
  return out;
}

}  // namespace pacd
