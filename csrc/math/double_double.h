// Double-double arithmetic: numbers of about 106 bits as unevaluated sums of two doubles, with exp and log.
//
// Used where a bound must be told from its neighbour: a tail probability that is known to 1e-16 cannot say on which
// side of alpha it lies.  Algorithms: Hida, Li, Bailey 2001 ("QD").  Each operation errs by at most 8 * 2^-106 of its
// result; exp and log are checked against mpmath to 2^-96 in the tests.
#pragma once

#include "math/elementary.h"

namespace pacd {

PACD_INLINE Dd operator-(Dd a) { return {-a.hi, -a.lo}; }

PACD_INLINE Dd operator+(Dd a, Dd b) {
  Dd s = two_sum(a.hi, b.hi);
  const Dd t = two_sum(a.lo, b.lo);
  s = quick_two_sum(s.hi, s.lo + t.hi);
  return quick_two_sum(s.hi, s.lo + t.lo);
}

PACD_INLINE Dd operator-(Dd a, Dd b) { return a + (-b); }

PACD_INLINE Dd operator*(Dd a, Dd b) {
  const Dd p = two_product(a.hi, b.hi);
  return quick_two_sum(p.hi, p.lo + fma(a.hi, b.lo, a.lo * b.hi));
}

PACD_INLINE Dd operator/(Dd a, Dd b) {
  const double q1 = a.hi / b.hi;
  Dd r = a - b * Dd(q1);
  const double q2 = r.hi / b.hi;
  r = r - b * Dd(q2);
  const double q3 = r.hi / b.hi;
  return quick_two_sum(q1, q2) + Dd(q3);
}

PACD_INLINE bool operator<(Dd a, Dd b) { return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo); }
PACD_INLINE bool operator<=(Dd a, Dd b) { return a.hi < b.hi || (a.hi == b.hi && a.lo <= b.lo); }  // not for NaN

// An exact scaling by a power of two, for results inside the normal range.
PACD_INLINE Dd scale(Dd a, int exponent) { return {::ldexp(a.hi, exponent), ::ldexp(a.lo, exponent)}; }

// exp(x) for |x| < 650 (the low part stays a normal number); relative error below 2^-96 * max(1, |x|).
PACD_HD inline Dd exp(Dd x) {
  const Dd log2(6.931471805599452862e-01, 2.319046813846299558e-17);
  const double k = ::rint(x.hi / log2.hi);
  // r = (x - k log 2) / 512 is below 7e-4, where 8 terms of the series of exp(r) - 1 leave less than 2^-106.
  const Dd r = scale(x - Dd(k) * log2, -9);
  Dd term = r, sum = r;
  for (int i = 2; i <= 9; ++i) {
    term = term * r / Dd(i);
    sum = sum + term;
  }
  // exp(2r) - 1 = 2 (exp(r) - 1) + (exp(r) - 1)^2, nine times: no digits are lost to the 1.
  for (int i = 0; i < 9; ++i) sum = scale(sum, 1) + sum * sum;
  return scale(sum + Dd(1.0), static_cast<int>(k));
}

// log(x) for x in [1e-280, 1e280]; absolute error below 2^-96 * max(1, |log x|).
PACD_HD inline Dd log(Dd x) {
  const double y = log_positive(x.hi);  // its error e only enters as e^3
  const Dd d = x * exp(Dd(-y)) - Dd(1.0);
  return Dd(y) + (d - scale(d * d, -1));
}

// log(n!) for an integer n >= 0; relative error below 2^-96.
PACD_HD inline Dd log_factorial(int64_t n) {
  if (n < 32) {
    Dd product(1.0);
    for (int64_t i = 2; i <= n; ++i) product = product * Dd(static_cast<double>(i));
    return log(product);
  }
  // Stirling's series with the coefficients B_2k / (2k (2k - 1)); at 33 its 15th term is below 2^-106.
  const double numerator[15] = {1.0,     -1.0,         1.0,      -1.0,          1.0,
                                -691.0,  1.0,          -3617.0,  43867.0,       -174611.0,
                                77683.0, -236364091.0, 657931.0, -3392780147.0, 1723168255201.0};
  const double denominator[15] = {12.0,     360.0,    1260.0, 1680.0,    1188.0, 360360.0, 156.0,    122400.0,
                                  244188.0, 125400.0, 5796.0, 1506960.0, 300.0,  93960.0,  2492028.0};
  const Dd x(static_cast<double>(n) + 1.0);
  const Dd inverse = Dd(1.0) / x;
  const Dd inverse2 = inverse * inverse;
  Dd series(0.0);
  for (int i = 14; i >= 0; --i) series = series * inverse2 + Dd(numerator[i]) / Dd(denominator[i]);
  const Dd half_log_2pi(9.189385332046727806e-01, -3.878294158067241550e-17);
  return (x - Dd(0.5)) * log(x) - x + half_log_2pi + series * inverse;
}

}  // namespace pacd
