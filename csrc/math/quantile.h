// The standard normal distribution function and its inverse, rounded outward; and a quick inverse that is no bound.
//
// Phi(z) - 1/2 = phi(z) (z + z^3 / 3 + z^5 / (3 5) + ...) has positive terms only; far out, 1 - Phi(z) is phi(z) times
// Laplace's continued fraction.  Both run in double-double; a quantile is found by Newton's method, rounded to double
// and then verified against Phi with its error bound, so that a lower quantile is never above the exact one.
#pragma once

#include "math/double_double.h"

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
    const double t = ::sqrt(-2.0 * log_positive(tail));
    // Abramowitz and Stegun 26.2.23, error below 4.5e-4.
    const double z =
        t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
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

// Phi^-1(p), given p and q = 1 - p each to full relative precision; -inf, inf at 0 and 1.  Wichura's AS 241, relative
// error about 1e-15: quick and not a bound; normal_quantile is the one for certificates.
PACD_INLINE double quick_quantile(double p, double q) {
  const double tail = p < q ? p : q;
  if (!(tail >= 2.2250738585072014e-308)) return tail != tail ? tail : (p < q ? -INFINITY : INFINITY);
  const double centre = 0.5 * (p - q);
  double a, b;
  if (tail > 0.075) {
    const double r = fma(-centre, centre, 0.180625);
    a = horner(r, 2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
               13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608);
    b = horner(r, 5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
               5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0);
    return centre * a / b;
  }
  double r = ::sqrt(-log_positive(tail));
  if (r <= 5.0) {
    r -= 1.6;
    a = horner(r, 7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
               3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734);
    b = horner(r, 1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
               0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0);
  } else {
    r -= 5.0;
    a = horner(r, 2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386,
               0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699,
               6.6579046435011037772);
    b = horner(r, 2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
               7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0);
  }
  return p < q ? -a / b : a / b;
}

// sigma * z rounded down, for finite sigma > 0.
PACD_HD inline double product_down(double sigma, double z) {
  const double r = sigma * z;
  return fma(sigma, z, -r) < 0.0 ? next_below(r) : r;
}

}  // namespace pacd
