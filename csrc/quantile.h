// The standard normal distribution function and its inverse, rounded outward.
//
// Phi(z) - 1/2 = phi(z) (z + z^3 / 3 + z^5 / (3 5) + ...) has positive terms only; far out, 1 - Phi(z) is phi(z) times
// Laplace's continued fraction.  Both run in double-double; a quantile is found by Newton's method, rounded to double and
// then verified against Phi with its error bound, so that a lower quantile is never above the exact one.
#pragma once

#include "double_double.h"

namespace pacd {

PACD_INLINE Dd normal_density(Dd z) {
  return exp(scale(z * z, -1) * Dd(-1.0)) * Dd(3.989422804014327029e-01, -2.492327202277730044e-17);
}

// Phi(z) - 1/2 for 0 <= z <= 6; relative error below 2^-90.
PACD_HD inline Dd normal_from_centre(Dd z) {
  const Dd z2 = z * z;
  Dd term = z, sum = z;
  for (int i = 3; term.hi > 0x1p-108 * sum.hi; i += 2) {
    term = term * z2 / Dd(static_cast<double>(i));
    sum = sum + term;
  }
  return sum * normal_density(z);
}

// 1 - Phi(z) for 6 <= z <= 36; relative error below 2^-84 (the density's exponent is up to 650).
PACD_HD inline Dd normal_tail(Dd z) {
  Dd fraction = z;
  for (int i = 120; i >= 1; --i) fraction = z + Dd(static_cast<double>(i)) / fraction;
  return normal_density(z) / fraction;
}

struct NormalGap {
  Dd gap;        // Phi(z) - p
  double doubt;  // a bound on the error of gap
};

PACD_HD inline NormalGap normal_gap(Dd z, double p) {
  const bool negative = z.hi < 0.0;
  const Dd w = negative ? -z : z;
  if (w.hi > 6.0) {
    const Dd tail = normal_tail(w);
    return {negative ? tail - Dd(p) : two_sum(1.0, -p) - tail, 0x1p-82 * tail.hi};
  }
  const Dd centre = normal_from_centre(w);
  return {(negative ? -centre : centre) - two_sum(p, -0.5), 0x1p-88 * centre.hi};
}

// Phi^-1(p) rounded down (up = false) or up, for 0 <= p <= 1; NaN outside.  Within 1 ULP of the exact quantile for
// p in [1e-280, 1 - 2^-53].
PACD_HD inline double normal_quantile(double p, bool up) {
  if (!(p >= 0.0 && p <= 1.0)) return NAN;
  if (p == 0.5) return 0.0;
  if (p == 0.0 || p == 1.0) return p == 0.0 ? -INFINITY : INFINITY;
  if (p < 1e-280) return up ? -35.7 : -38.6;  // the extremes: true bounds, not tight ones
  // A start good to a few digits: the tail's leading terms, or the slope at the centre.
  const double tail = p < 0.5 ? p : 1.0 - p;
  double start;
  if (tail > 0.2) {
    const double c = (p - 0.5) * 2.5066282746310002;
    start = c + c * c * c / 6.0 + 7.0 * c * c * c * c * c / 120.0;
  } else {
    const double t = ::sqrt(-2.0 * ::log(tail));
    // Abramowitz and Stegun 26.2.23, error below 4.5e-4.
    const double z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
    start = p < 0.5 ? -z : z;
  }
  Dd z(start);
  for (int step = 0; step < 8; ++step) {
    // Halley's step: the gap over the density is h to second order, and Phi'' = -z Phi'.
    const Dd h = normal_gap(z, p).gap / normal_density(z);
    const Dd move = h / (Dd(1.0) + scale(z * h, -1));
    z = z - move;
    if (::fabs(move.hi) < 0x1p-35 * ::fabs(z.hi)) break;  // cubic: what is left is below 2^-100
  }
  double result = z.hi;
  if (up ? z.lo > 0.0 : z.lo < 0.0) result = up ? next_above(result) : next_below(result);
  for (;;) {
    const NormalGap at = normal_gap(Dd(result), p);
    if (up ? Dd(at.doubt) <= at.gap : at.gap <= Dd(-at.doubt)) return result;
    result = up ? next_above(result) : next_below(result);
  }
}

// sigma * z rounded down, for finite sigma > 0.
PACD_HD inline double product_down(double sigma, double z) {
  const double r = sigma * z;
  return fma(sigma, z, -r) < 0.0 ? next_below(r) : r;
}

}  // namespace pacd
