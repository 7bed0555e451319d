// Gaussian noise in float, the same bits on every processor: log, sine and cosine from fma alone, and Box-Muller.
//
// Everything here is branch-free, so that the compiler can turn a loop over it into SIMD.  The errors in the comments
// are what python_tests/test_noise.py asserts against mpmath.
#pragma once

#include "philox.h"

namespace pacd {

// log(u) for u in [2^-33, 1]; relative error below 2e-7 (about 2 ULP).
PACD_INLINE float log_unit(float u) {
  // u = m * 2^e with m in [sqrt(1/2), sqrt(2)), so that log(m) has no cancellation with e * log(2) near u = 1.
  const int32_t shifted = bits_as<int32_t>(u) - 0x3F3504F3;
  const int32_t e = shifted >> 23;
  const float m = bits_as<float>((shifted & 0x007FFFFF) + 0x3F3504F3);
  const float f = m - 1.0f;
  // (log(1 + f) - f + f^2 / 2) / f^3, a weighted least-squares fit of degree 6.
  float p = 0.0892861858010292f;
  p = fma(p, f, -0.1434648483991623f);
  p = fma(p, f, 0.14871390163898468f);
  p = fma(p, f, -0.16566035151481628f);
  p = fma(p, f, 0.1996603012084961f);
  p = fma(p, f, -0.250017374753952f);
  p = fma(p, f, 0.3333383798599243f);
  const float f2 = f * f;
  const float tail = fma(p * f, f2, -0.5f * f2);
  const float k = static_cast<float>(e);
  // log(2) in two pieces; the first has trailing zeros, so that k times it is exact.
  return fma(k, 0.693359375f, f + fma(k, -2.12194440e-4f, tail));
}

struct SinCos {
  float sin, cos;
};

// Sine and cosine of an angle that is uniform on the circle when w is uniform: 29 bits place it in an eighth of a turn,
// three bits choose the eighth by two signs and a swap.  Absolute error below 1e-7.
PACD_INLINE SinCos sincos_uniform(uint32_t w) {
  const float x = static_cast<float>(static_cast<int32_t>(w & 0x1FFFFFFFu)) * 1.462918079267160e-9f;  // pi / 4 / 2^29
  const float x2 = x * x;
  float s = fma(-1.9587841e-4f, x2, 8.3327545e-3f);
  s = fma(s, x2, -0.16666665f);
  s = fma(s * x2, x, x);
  float c = fma(2.4548040e-5f, x2, -1.3888304e-3f);
  c = fma(c, x2, 4.16666465e-2f);
  c = fma(c * x2, x2, fma(-0.5f, x2, 1.0f));
  const bool swap = w & 0x20000000u;
  return {bits_as<float>(bits_as<uint32_t>(swap ? c : s) ^ (w & 0x80000000u)),
          bits_as<float>(bits_as<uint32_t>(swap ? s : c) ^ (w << 1 & 0x80000000u))};
}

struct NormalPair {
  float first, second;
};

// Box-Muller: two standard normals from two random words; absolute error below 2e-6.
// A 32-bit uniform reaches 6.76 standard deviations; beyond lies a probability of 1.4e-11 that is never drawn.
PACD_INLINE NormalPair box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float u = fma(static_cast<float>(radius_word), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  const float r = sqrt_rn(-2.0f * log_unit(u));
  const SinCos angle = sincos_uniform(angle_word);
  return {r * angle.cos, r * angle.sin};
}

// Elements are drawn in tiles of 64: element 64 t + 16 w + lane takes word w of block 16 t + lane, so that a tile is 16
// counters side by side, whose numbers lie together in memory for each w.
inline constexpr int tile_size = 64, tile_lanes = 16;

PACD_INLINE void four_normals(Words words, float* numbers, int stride) {
  const NormalPair a = box_muller(words.w0, words.w1), b = box_muller(words.w2, words.w3);
  numbers[0 * stride] = a.first;
  numbers[1 * stride] = a.second;
  numbers[2 * stride] = b.first;
  numbers[3 * stride] = b.second;
}

}  // namespace pacd
