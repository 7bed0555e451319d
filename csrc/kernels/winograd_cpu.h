// The 3x3 convolution of a residual network (stride 1, padding 1) in float32 on the CPU, by Winograd's minimal
// filtering F(2x2, 3x3) (Lavin and Gray 2016, section 4.1): 16 multiplications for four results instead of 36.
// benchmarks/bench_ops.py compares; pacd_fast/layers.py has the layer.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "portable.h"

namespace pacd {

using Lines = std::unique_ptr<float[], decltype(&std::free)>;

// Not initialised, and aligned to lines of the cache; count is a multiple of 16.
inline Lines scratch(int64_t count) {
  auto* found = static_cast<float*>(std::aligned_alloc(64, count * sizeof(float)));
  if (found == nullptr) throw std::bad_alloc();
  return {found, &std::free};
}

// What the kernels below share: channels come 16 at a time, a vector, and tiles (2x2 results) 16 at a time, a matrix.
struct WinogradSizes {
  static constexpr int lanes = 16, tiles = 16, matrix = tiles * lanes, places = 16;  // of a transformed tile, 4x4
  int64_t inputs, outputs;                                                           // multiples of 16
};

// G g G^T of every filter; an item is an input channel of 16 output channels.
struct WinogradFilters : WinogradSizes {
  const float* weight;  // [outputs, inputs, 3, 3], or the other way round and turned where it is transposed
  float* out;           // [outputs / 16, places, inputs, 16]
  bool transposed;

  PACD_INLINE void operator()(int64_t item) const {
    const int64_t block = item / inputs, c = item % inputs;
    float g[3][3][lanes], h[4][3][lanes];
    for (int l = 0; l < lanes; ++l) {
      const int64_t n = block * lanes + l;
      const float* from = weight + 9 * (transposed ? c * outputs + n : n * inputs + c);
      for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3][l] = from[transposed ? 8 - tap : tap];
    }
    for (int v = 0; v < 3; ++v) {
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        h[0][v][l] = g[0][v][l];
        h[1][v][l] = 0.5f * (g[0][v][l] + g[1][v][l] + g[2][v][l]);
        h[2][v][l] = 0.5f * (g[0][v][l] - g[1][v][l] + g[2][v][l]);
        h[3][v][l] = g[2][v][l];
      }
    }
    for (int u = 0; u < 4; ++u) {
      float* to = out + ((block * places + 4 * u) * inputs + c) * lanes;
      const int64_t step = inputs * lanes;
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        to[l] = h[u][0][l];
        to[step + l] = 0.5f * (h[u][0][l] + h[u][1][l] + h[u][2][l]);
        to[2 * step + l] = 0.5f * (h[u][0][l] - h[u][1][l] + h[u][2][l]);
        to[3 * step + l] = h[u][2][l];
      }
    }
  }
};

// An item is an image.
struct Winograd : WinogradSizes {
  const float* x;        // [images, height, width, inputs]
  const float* filters;  // of WinogradFilters
  const float* bias;     // [outputs]
  float* out;            // [images, height, width, outputs]
  int64_t height, width;

  // B^T d B of the 4x4 pixels at `from`, whose rows are `line` apart; each place to a matrix of its own.
  static PACD_INLINE void transform(const float* from, int64_t line, float* to) {
    float d[4][4][lanes];
    PACD_UNROLL for (int i = 0; i < 4; ++i) {
      const float* row = from + i * line;
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        const float a = row[l], b = row[lanes + l], c = row[2 * lanes + l], e = row[3 * lanes + l];
        d[i][0][l] = a - c;
        d[i][1][l] = b + c;
        d[i][2][l] = c - b;
        d[i][3][l] = b - e;
      }
    }
    PACD_UNROLL for (int j = 0; j < 4; ++j) {
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        const float a = d[0][j][l], b = d[1][j][l], c = d[2][j][l], e = d[3][j][l];
        to[j * matrix + l] = a - c;
        to[(4 + j) * matrix + l] = b + c;
        to[(8 + j) * matrix + l] = c - b;
        to[(12 + j) * matrix + l] = b - e;
      }
    }
  }

  // One place: [tiles, inputs] times [inputs, 16].  The sums stay in registers.
  PACD_INLINE void multiply(const float* from, const float* filter, float* to) const {
    float sums[tiles][lanes];
    PACD_UNROLL for (int t = 0; t < tiles; ++t) { PACD_LANES for (int l = 0; l < lanes; ++l) sums[t][l] = 0.0f; }
    for (int64_t part = 0; part < inputs; part += lanes, from += places * matrix) {
      for (int c = 0; c < lanes; ++c, filter += lanes) {
        PACD_UNROLL for (int t = 0; t < tiles; ++t) {
          PACD_LANES for (int l = 0; l < lanes; ++l) sums[t][l] = fma(from[t * lanes + c], filter[l], sums[t][l]);
        }
      }
    }
    PACD_UNROLL for (int t = 0; t < tiles; ++t) {
      PACD_LANES for (int l = 0; l < lanes; ++l) to[t * lanes + l] = sums[t][l];
    }
  }

  // A^T m A and the bias: the 2x2 results of a tile.
  static PACD_INLINE void results(const float* from, const float* bias, float* to) {
    float m[2][4][lanes];
    PACD_UNROLL for (int j = 0; j < 4; ++j) {
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        const float a = from[j * matrix + l], b = from[(4 + j) * matrix + l];
        const float c = from[(8 + j) * matrix + l], e = from[(12 + j) * matrix + l];
        m[0][j][l] = a + b + c;
        m[1][j][l] = b - c - e;
      }
    }
    PACD_UNROLL for (int i = 0; i < 2; ++i) {
      PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) {
        to[2 * i * lanes + l] = m[i][0][l] + m[i][1][l] + m[i][2][l] + bias[l];
        to[(2 * i + 1) * lanes + l] = m[i][1][l] - m[i][2][l] - m[i][3][l] + bias[l];
      }
    }
  }

  // The image in planes of 16 channels, zeros around it, with room for whole tiles.
  PACD_INLINE void pad(const float* image, float* to, int64_t rows, int64_t columns) const {
    for (int64_t part = 0; part < inputs; part += lanes) {
      std::fill_n(to, columns * lanes, 0.0f);
      to += columns * lanes;
      for (int64_t i = 0; i < height; ++i, to += columns * lanes) {
        const float* from = image + i * width * inputs + part;
        PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) to[l] = 0.0f;
        for (int64_t j = 0; j < width; ++j) {
          PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) to[(j + 1) * lanes + l] = from[j * inputs + l];
        }
        std::fill_n(to + (width + 1) * lanes, (columns - width - 1) * lanes, 0.0f);
      }
      std::fill_n(to, (rows - height - 1) * columns * lanes, 0.0f);
      to += (rows - height - 1) * columns * lanes;
    }
  }

  PACD_INLINE void operator()(int64_t image) const {
    const int64_t across = (width + 1) / 2, count = (height + 1) / 2 * across, parts = inputs / lanes;
    const int64_t rows = (height + 1) / 2 * 2 + 2, columns = 2 * across + 2, plane = rows * columns * lanes;
    const Lines padded = scratch(parts * plane), transformed = scratch(parts * places * matrix),
                product = scratch(places * matrix);
    pad(x + image * height * width * inputs, padded.get(), rows, columns);
    float* target = out + image * height * width * outputs;
    for (int64_t first = 0; first < count; first += tiles) {
      int64_t row[tiles], column[tiles];
      for (int t = 0; t < tiles; ++t) {  // after the last tile the last again: the same numbers to the same place
        const int64_t tile = std::min(first + t, count - 1);
        row[t] = tile / across * 2;
        column[t] = tile % across * 2;
      }
      for (int64_t p = 0; p < parts; ++p) {
        for (int t = 0; t < tiles; ++t) {
          transform(padded.get() + p * plane + (row[t] * columns + column[t]) * lanes, columns * lanes,
                    transformed.get() + p * places * matrix + t * lanes);
        }
      }
      for (int64_t n = 0; n < outputs; n += lanes) {
        for (int place = 0; place < places; ++place) {
          multiply(transformed.get() + place * matrix, filters + (n * places + place * lanes) * inputs,
                   product.get() + place * matrix);
        }
        for (int t = 0; t < tiles; ++t) {
          float found[4 * lanes];
          results(product.get() + t * lanes, bias + n, found);
          for (int i = 0; i < 2 && row[t] + i < height; ++i) {
            for (int j = 0; j < 2 && column[t] + j < width; ++j) {
              float* to = target + ((row[t] + i) * width + column[t] + j) * outputs + n;
              PACD_NO_ALIAS for (int l = 0; l < lanes; ++l) to[l] = found[(2 * i + j) * lanes + l];
            }
          }
        }
      }
    }
  }
};

}  // namespace pacd
