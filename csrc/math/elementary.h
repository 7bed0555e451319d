// Error-free sums and products, logarithms and exponentials: the one home of each, from fma alone, so that the bits are
// the same on every processor and on CUDA.  The errors in the comments are what python_tests asserts against mpmath.
#pragma once

#include "portable.h"

namespace pacd {

// The unevaluated sum hi + lo of two doubles; its arithmetic is in double_double.h.
struct Dd {
  double hi, lo;
  PACD_INLINE Dd(double h = 0.0, double l = 0.0) : hi(h), lo(l) {}
};

// Without error: a + b or a * b is hi + lo (Dekker 1971; Knuth, TAOCP 2).
PACD_INLINE Dd two_sum(double a, double b) {
  const double s = a + b;
  const double t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

PACD_INLINE Dd quick_two_sum(double a, double b) {  // needs |a| >= |b| or a = 0
  const double s = a + b;
  return {s, b - (s - a)};
}

PACD_INLINE Dd two_product(double a, double b) {
  const double p = a * b;
  return {p, fma(a, b, -p)};
}

// A running sum with what its roundings lost beside it: sum + value = new sum + error, and the error goes to `low`.
PACD_INLINE void add_exactly(double& sum, double& low, double value) {
  const Dd total = two_sum(sum, value);
  low += total.lo;
  sum = total.hi;
}

// A polynomial by Horner's rule, the highest coefficient first.
template <class T>
PACD_INLINE T horner(T, T sum) {
  return sum;
}

template <class T, class... Rest>
PACD_INLINE T horner(T x, T sum, T next, Rest... rest) {
  return horner(x, fma(sum, x, next), rest...);
}

// log(2) is in two pieces; the first has trailing zeros, so that a small integer times it is exact.
template <class T>
struct FloatFacts;

template <>
struct FloatFacts<float> {
  using Bits = uint32_t;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.0f;      // exp below it is taken as 0
  static constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};

template <>
struct FloatFacts<double> {
  using Bits = uint64_t;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0;
  static constexpr double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023, degree = 14;
};

// log(u) for u in [2^-33, 1]; relative error below 2e-7 (about 2 ULP).
PACD_INLINE float log_unit(float u) {
  // u = m * 2^e with m in [sqrt(1/2), sqrt(2)), so that log(m) has no cancellation with e * log(2) near u = 1.
  const int32_t shifted = bits_as<int32_t>(u) - 0x3F3504F3;
  const int32_t e = shifted >> 23;
  const float m = bits_as<float>((shifted & 0x007FFFFF) + 0x3F3504F3);
  const float f = m - 1.0f;
  // (log(1 + f) - f + f^2 / 2) / f^3, a weighted least-squares fit of degree 6.
  const float p = horner(f, 0.0892861858010292f, -0.1434648483991623f, 0.14871390163898468f, -0.16566035151481628f,
                         0.1996603012084961f, -0.250017374753952f, 0.3333383798599243f);
  const float f2 = f * f;
  const float tail = fma(p * f, f2, -0.5f * f2);
  const float k = static_cast<float>(e);
  return fma(k, FloatFacts<float>::log2_high, f + fma(k, FloatFacts<float>::log2_low, tail));
}

// Horner's rule for artanh(s) / s = 1 + s^2 / 3 + s^4 / 5 + ..., from s^i down to s^3.
template <int i>
PACD_INLINE double artanh_series(double sum, double s2) {
  sum = fma(sum, s2, 1.0 / i);
  if constexpr (i > 3) return artanh_series<i - 2>(sum, s2);
  return sum;
}

// log(1 + f) for 1 + f in [2^-1/2, 2^1/2) as 2 artanh(f / (2 + f)), by the series up to s^degree.
template <int degree>
PACD_INLINE double log_one_plus(double f) {
  const double s = f / (2.0 + f), s2 = s * s;  // s2 is at most 0.02945
  return fma(2.0 * s * s2, artanh_series<degree>(0.0, s2), 2.0 * s);
}

template <int degree>
PACD_INLINE double log_by_artanh(double m) {  // m - 1 is exact
  return log_one_plus<degree>(m - 1.0);
}

// log of a number in [2^-1/2, 2^1/2), absolute error below 2 * 2^-53.
PACD_INLINE double log_near_one(double p) { return log_by_artanh<21>(p); }

// log(x) for normal positive x; relative error below 3.5 * 2^-53.
PACD_INLINE double log_positive(double x) {
  const int64_t shifted = bits_as<int64_t>(x) - 0x3FE6A09E667F3BCDll;  // m in [sqrt(1/2), sqrt(2))
  const int64_t e = shifted >> 52;
  const double m = bits_as<double>((shifted & 0x000FFFFFFFFFFFFFll) + 0x3FE6A09E667F3BCDll);
  const double k = static_cast<double>(e);
  return fma(k, FloatFacts<double>::log2_high, fma(k, FloatFacts<double>::log2_low, log_by_artanh<23>(m)));
}

// A variable, not a function: device code may not call a host's constexpr function with a number known at run time.
template <int n>
constexpr double inverse_factorial = inverse_factorial<n - 1> / n;
template <>
constexpr double inverse_factorial<0> = 1.0;

// Horner's rule, from sum on: the terms of exp(r) from r^i down.
template <int i, class T>
PACD_INLINE T taylor(T sum, T r) {
  constexpr T coefficient = static_cast<T>(inverse_factorial<i>);
  sum = fma(sum, r, coefficient);
  if constexpr (i > 0) return taylor<i - 1>(sum, r);
  return sum;
}

// exp(x) for x <= 0; relative error below 3e-7 in float and 1e-15 in double; 0 below -87 and -708; NaN for NaN.
template <class T>
PACD_INLINE T soft_exp(T x) {
  using Facts = FloatFacts<T>;
  using Bits = typename Facts::Bits;
  const T inside = x < Facts::lowest ? Facts::lowest : x;
  const T shifted = fma(inside, T(1.44269504088896340736), Facts::round);
  const T n = shifted - Facts::round;
  const T r = fma(n, -Facts::log2_low, fma(n, -Facts::log2_high, inside));  // |r| <= log(2) / 2
  constexpr T last = static_cast<T>(inverse_factorial<Facts::degree>);
  const T sum = taylor<Facts::degree - 1>(last, r);
  // shifted's low bits are n, so that 2^n needs no conversion to an integer (undefined for NaN)
  const Bits exponent = bits_as<Bits>(shifted) - bits_as<Bits>(Facts::round) + Bits(Facts::bias);
  const T scaled = sum * bits_as<T>(static_cast<Bits>(exponent << Facts::mantissa));
  return x < Facts::lowest ? T(0) : scaled;
}

struct ExpPair {
  double e;  // exp(-x), relative error below 3.5 * 2^-53
  double g;  // 1 - exp(-x), relative error below 4 * 2^-53
};

// exp(-x) and 1 - exp(-x) for x >= 0, branch-free; x above 708 counts as 708, so that exp(-x) stays a normal number.
PACD_INLINE ExpPair exp_negative(double x) {
  constexpr double round = FloatFacts<double>::round;
  const double z = x < 708.0 ? -x : -708.0;
  const double shifted = fma(z, 0x1.71547652b82fep+0, round);
  const double k = shifted - round;
  double r = fma(-k, 0x1.62e42fefa39efp-1, z);  // exact in z where k = 0, so 1 - exp(-x) keeps its digits
  r = fma(-k, 0x1.abc9e3b39803fp-56, r);
  // (expm1(r) - r) / r^2 on |r| <= 0.3466: interpolated at Chebyshev nodes; 8.5e-19 relative in expm1.
  double p = horner(r, 0x1.1f72fdb6c6442p-29, 0x1.af4ddfbb33a59p-26, 0x1.27e4db6718a69p-22, 0x1.71de02364614ap-19,
                    0x1.a01a01a6d7b19p-16, 0x1.a01a01abe683ap-13, 0x1.6c16c16c162d6p-10, 0x1.11111111100dep-7,
                    0x1.5555555555556p-5, 0x1.5555555555557p-3, 0x1.0000000000000p-1);
  p = fma(r * r, p, r);
  const double scale = bits_as<double>((bits_as<uint64_t>(shifted) + 1023) << 52);
  return {fma(scale, p, scale), fma(-scale, p, 1.0 - scale)};
}

}  // namespace pacd
