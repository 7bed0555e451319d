// The gradient of a convolution (stride 1, no padding) with respect to images of one channel: a row kernel for the CPU,
// where torch is slow (benchmarks/bench_ops.py); pacd_fast/layers.py has the layer.
#pragma once

#include "math/half.h"

namespace pacd {

// Each pixel of grad adds its filters, weighted, to a window of out.  Four neighbours at a time, so that filters are
// loaded once for all; an item is an image.
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

}  // namespace pacd
