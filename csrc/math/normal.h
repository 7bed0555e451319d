// Gaussian noise in float, the same bits on every processor: sine and cosine from fma alone, and Box-Muller.
//
// Everything here is branch-free, so that the compiler can turn a loop over it into SIMD.  The errors in the comments
// are what python_tests/test_noise.py asserts against mpmath.
#pragma once

#include "math/elementary.h"
#include "math/philox.h"

namespace pacd {

struct SinCos {
  float sin, cos;
};

// Sine and cosine of an angle that is uniform on the circle when w is uniform: 29 bits place it in an eighth of a turn,
// three bits choose the eighth by two signs and a swap.  Absolute error below 1e-7.
PACD_INLINE SinCos sincos_uniform(uint32_t w) {
  const float x = static_cast<float>(static_cast<int32_t>(w & 0x1FFFFFFFu)) * 1.462918079267160e-9f;  // pi / 4 / 2^29
  const float x2 = x * x;
  const float s = fma(horner(x2, -1.9587841e-4f, 8.3327545e-3f, -0.16666665f) * x2, x, x);
  const float c = fma(horner(x2, 2.4548040e-5f, -1.3888304e-3f, 4.16666465e-2f) * x2, x2, fma(-0.5f, x2, 1.0f));
  const bool swap = w & 0x20000000u;
  return {bits_as<float>(bits_as<uint32_t>(swap ? c : s) ^ (w & 0x80000000u)),
          bits_as<float>(bits_as<uint32_t>(swap ? s : c) ^ (w << 1 & 0x80000000u))};
}

struct NormalPair {
  float first, second;
};

// Box-Muller: two standard normals from two random words; absolute error below 2e-6.
// A 32-bit uniform reaches 6.76 standard deviations; beyond lies a probability of 1.4e-11 that is never drawn.
PACD_INLINE float box_muller_radius(uint32_t word) {
  const float u = fma(static_cast<float>(word), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  return sqrt_rn(-2.0f * log_unit(u));
}

struct BoxMuller {
  PACD_INLINE static NormalPair pair(uint32_t radius_word, uint32_t angle_word) {
    const float r = box_muller_radius(radius_word);
    const SinCos angle = sincos_uniform(angle_word);
    return {r * angle.cos, r * angle.sin};
  }
};

// Elements are drawn in tiles of 64: element 64 t + 16 w + lane takes word w of block 16 t + lane, so that a tile is 16
// counters side by side, whose numbers lie together in memory for each w.
inline constexpr int tile_size = 64, tile_lanes = 16;

template <class Pairs>  // BoxMuller, or lattice.h's
PACD_INLINE void four_normals(Words words, float* numbers, int stride) {
  const NormalPair a = Pairs::pair(words.w0, words.w1), b = Pairs::pair(words.w2, words.w3);
  numbers[0 * stride] = a.first;
  numbers[1 * stride] = a.second;
  numbers[2 * stride] = b.first;
  numbers[3 * stride] = b.second;
}

}  // namespace pacd
