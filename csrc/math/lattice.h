// Which cell of a lattice holds x + sigma Z, for an exact normal number Z that is read digit by digit: a quick decision
// in float with a proved error bound, and an exact one in double for what that leaves open.
//
// The lattice is offset + step * k for whole k, and the cell of a number is the nearest k.  Z = r(U) cos V, or r(U) sin V,
// with U and V/(2 pi) real uniforms, of whose binary digits the first 32 are Philox's words, the next 32 words of another
// stream, and the rest is never read.  A cell is decided when it is the same for every value of the unread digits and
// whatever was rounded; then it is the cell of x + sigma Z, and all that is made of it is a function of x + sigma Z in
// real numbers, so that theorems about Gaussian noise hold as they stand.  A cell that is not decided is void.
//
// Below: s = sigma / step, a = (x - offset) / step = whole + part with |part| <= 1/2, and T = s Z + part, so that the
// cell is whole + J where |T - J| < 1/2.
#pragma once

#include "math/normal.h"

namespace pacd {

// Digits 33 to 64 of the words of a stream are the words of that stream + 2^15, at the same places.
inline constexpr uint32_t further_digits = 0x8000;

// --- The quick decision ---
// The float z of Box-Muller differs from Z by less than noise_error, whatever digits follow, where its radius word is in
// [first_radius_word, last_radius_word].  The proof is exhaustion (lattice_errors.h, run by python_tests/test_lattice.py):
// with E(w) the error of the float radius at the worse end of word w's interval, in which r is monotone, and angle_error
// that of float sine and cosine over all angle words likewise,
//     |z - Z| <= E(w) + r(w) angle_error + 2^-24 |z|     (2^-24: the product's rounding),
// whose largest value over all words of the range is 1.6139e-6, that of E 1.5691e-6, and angle_error 1.2797e-7.  The
// words outside, one in 4096, are where float holds U too coarsely (near 1) or 32 digits of it are too few (near 0).
inline constexpr uint32_t first_radius_word = 1u << 18, last_radius_word = 0xFFFFFFFFu - (3u << 18);
inline constexpr float noise_error = 1.62e-6f, angle_error = 1.3e-7f;

// Box-Muller, with NaN where that bound does not hold: a NaN is never decided.
struct BoundedBoxMuller {
  PACD_INLINE static NormalPair pair(uint32_t radius_word, uint32_t angle_word) {
    const bool inside = radius_word - first_radius_word <= last_radius_word - first_radius_word;
    const float r = inside ? box_muller_radius(radius_word) : bits_as<float>(0x7FC00000u);
    const SinCos angle = sincos_uniform(angle_word);
    return {r * angle.cos, r * angle.sin};
  }
};

// The lattice and the noise of one channel.  What the bounds need is asked in place_of: |a| + 7 s < 2^22.
struct Lattice {
  double step, offset, s;
  float scale, margin;               // s, and the part of the quick decision's error that does not grow with |T|
  float step_high, step_low, shift;  // for point()

  PACD_INLINE Lattice(float sigma, double step, double offset)
      : step(step),
        offset(offset),
        s(static_cast<double>(sigma) / step),
        scale(static_cast<float>(s)),
        margin(static_cast<float>((s * noise_error + 0x1p-23) * (1.0 + 0x1p-20))),
        step_high(static_cast<float>(step)),
        step_low(static_cast<float>(step - step_high)),
        shift(static_cast<float>(offset)) {}

  // What the model sees of cell k: a function of k alone, k * step + offset to a float's precision.
  PACD_INLINE float point(float k) const { return fma(k, step_high, fma(k, step_low, shift)); }
};

// To the nearest whole number, ties to even: exact for |x| <= 2^22 in float and 2^51 in double.
PACD_INLINE float round_whole(float x) { return (x + FloatFacts<float>::round) - FloatFacts<float>::round; }
PACD_INLINE double round_whole(double x) { return (x + FloatFacts<double>::round) - FloatFacts<double>::round; }

// x - offset and the quotient are rounded, whole and a - whole are not: part errs by at most |a| 2^-52.
struct Place {
  double whole, part;
};

PACD_INLINE Place place_of(const Lattice& lattice, float x) {
  const double a = (static_cast<double>(x) - lattice.offset) / lattice.step;
  const double whole = round_whole(a);
  const bool inside = __builtin_fabs(a) + 7.0 * lattice.s < 0x1p22;  // false for NaN
  return {inside ? whole : 0.0, inside ? a - whole : bits_as<double>(0x7FF8000000000000ull)};
}

// T as far as float knows it, t; and whether the cell j = round_whole(t) may be another than T's.
// In t = fma(scale, z, part), scale errs by (2^-24 + 2^-53) s, z by noise_error, part by 2^-26 (to float) + 2^-30, and the
// fma by 2^-24 |t|; |scale z| <= |t| + 1/2 + 2^-24 |t|.  Together
//     |t - T| <= s noise_error + 2^-23 (1 + 2^-20) |t| + 2^-25 + 2^-26 + 2^-29 < s noise_error + 2^-22 |t| + 2^-24.
// t - j is exact.  Rounding 1/2 - fma(|t|, 2^-22, margin) changes it by less than 2^-25 + 2^-26 where it is positive, for
// which margin has another 2^-24; where it is not, all is open.
PACD_INLINE float quick_sum(const Lattice& lattice, float part, float z) { return fma(lattice.scale, z, part); }

PACD_INLINE bool is_open(const Lattice& lattice, float t, float j) {
  return !(__builtin_fabsf(t - j) <= 0.5f - fma(__builtin_fabsf(t), 0x1p-22f, lattice.margin));
}

// --- The exact decision ---
// 64 digits of U and 61 of the angle within its eighth, in double, from operations that IEEE 754 rounds correctly: the
// same bits everywhere.  The bounds are 1.5 times or more what the roundings named with them add up to.

// -log(U), U = (digits + 1/2) 2^-64; relative error below 2^-49.
// U, or 1 - U where that is smaller, is known with a relative error of 2^-52 (conversion, + 1/2), which moves the result by
// 2^-51 of itself at most; f is exact; log_one_plus<23> errs by 2^-51 of itself (three roundings of its first term, and of
// its second, below 1 % of that, a dozen; its series ends at 2^-65) and is at most the result; and two fma's.
PACD_INLINE double minus_log(uint64_t digits) {
  const bool upper = digits >> 63;
  const double known = (static_cast<double>(upper ? ~digits : digits) + 0.5) * 0x1p-64;
  double e, f;
  if (upper) {
    const bool near_one = known <= 0.29289321881345254;  // 1 - sqrt(1/2)
    e = near_one ? 0.0 : -1.0;
    f = near_one ? -known : 1.0 - 2.0 * known;
  } else {
    const int64_t shifted = bits_as<int64_t>(known) - 0x3FE6A09E667F3BCDll;  // 1 + f in [sqrt(1/2), sqrt(2))
    e = static_cast<double>(shifted >> 52);
    f = bits_as<double>((shifted & 0x000FFFFFFFFFFFFFll) + 0x3FE6A09E667F3BCDll) - 1.0;
  }
  return -fma(e, FloatFacts<double>::log2_high, fma(e, FloatFacts<double>::log2_low, log_one_plus<23>(f)));
}

// r(U); relative error below 2^-49.
PACD_INLINE double exact_radius(uint64_t digits) { return sqrt_rn(2.0 * minus_log(digits)); }

// Cosine or sine of the angle that sincos_uniform takes from a word, with 32 further digits; absolute error below 2^-50.
// The angle in [0, pi/4] has four roundings.  Taylor's series after x^17 and x^18 is below 2^-63; what comes after x, and
// after 1 - x^2 / 2, is below 0.09, so that its roundings and the last one add up to less than 2^-52.
PACD_INLINE double exact_circle(uint32_t word, uint32_t further, bool sine) {
  const uint64_t digits = static_cast<uint64_t>(word & 0x1FFFFFFFu) << 32 | further;
  const double x = (static_cast<double>(digits) + 0.5) * (0.78539816339744830962 * 0x1p-61), x2 = x * x;
  const bool swap = word & 0x20000000u, negative = word & (sine ? 0x80000000u : 0x40000000u);
  double value;
  if (sine != swap) {
    const double sum = horner(x2, 1.0 / 355687428096000.0, -1.0 / 1307674368000.0, 1.0 / 6227020800.0,
                              -1.0 / 39916800.0, 1.0 / 362880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0);
    value = fma(x * x2, sum, x);
  } else {
    const double sum = horner(x2, -1.0 / 6402373705728000.0, 1.0 / 20922789888000.0, -1.0 / 87178291200.0,
                              1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0);
    value = fma(x2 * x2, sum, fma(-0.5, x2, 1.0));
  }
  return negative ? -value : value;
}

// The digits of one element's pair of uniforms, and which number of the pair it is.
struct Digits {
  uint64_t radius;
  uint32_t angle, angle_further;
  bool sine;
};

// T as far as 64 digits know it, t; and a bound on |t - T|.
// The unread digits move U by at most 2^-65, hence r by 2^-65 (1 + 2^-15) / (U r) where U and 1 - U are above 2^-48, and
// the angle by 2^-62.  With the errors above,
//     |r cos - Z| <= r (2^-49 + 2^-50 + 2^-53 + 2^-62) + 2^-64 / (U r) < r 2^-48 + 2^-64 / (U r),
// and t = fma(s, r cos, part) errs by s times that, by 2^-53 s r for s, 2^-52 |a| for part, and 2^-53 |t|, where
// |t| <= s r + 1/2.  `error` is more; it is 1 where U or 1 - U is below 2^-48, a chance of 2^-47.
struct ExactSum {
  double t, error;
};

PACD_INLINE ExactSum exact_sum(const Lattice& lattice, const Place& place, const Digits& digits) {
  const double r = exact_radius(digits.radius), u = (static_cast<double>(digits.radius) + 0.5) * 0x1p-64;
  const double t = fma(lattice.s, r * exact_circle(digits.angle, digits.angle_further, digits.sine), place.part);
  const double error = lattice.s * fma(r, 0x1p-47, 0x1p-63 / (u * r)) + (__builtin_fabs(place.whole) + 1.0) * 0x1p-51;
  const bool inside = digits.radius >> 16 != 0 && ~digits.radius >> 16 != 0;
  return {t, inside ? error : 1.0};
}

// A cell's end is no likelier to be near than any other place where s >= 1, so that a cell is void with a probability of
// about 2 E[error] <= 2.6 s 2^-47 + (|a| + 1) 2^-50: 5e-12 for sigma = 1 and pixels in [0, 1], in steps of 1/255.
struct ExactCell {
  float cell;  // whole + J; the likeliest where it is not decided, 0 where x is out of range
  bool decided;
};

PACD_INLINE ExactCell exact_cell(const Lattice& lattice, float x, const Digits& digits) {
  const Place place = place_of(lattice, x);
  const ExactSum sum = exact_sum(lattice, place, digits);
  const double j = round_whole(sum.t);
  // t - j is exact; the difference from 1/2 is rounded by 2^-54 at most, for which `error` has room
  const bool decided = __builtin_fabs(sum.t - j) <= 0.5 - sum.error;
  return {sum.t == sum.t ? static_cast<float>(place.whole + j) : 0.0f, decided};
}

}  // namespace pacd
