// Radii from probabilities and probabilities from radii, rounded so that no radius is ever too large.
#pragma once

#include "math/quantile.h"

namespace pacd {

// The smallest double p in [1/2, 1) with sigma * Phi^-1(p), rounded down, at least `radius`; 1 where there is none.
inline double radius_target(double sigma, double radius) {
  const auto enough = [=](double p) { return product_down(sigma, normal_quantile(p, false)) >= radius; };
  double low = 0.5, high = 1.0 - 0x1p-53;
  if (enough(low)) return low;
  if (!enough(high)) return 1.0;
  while (next_above(low) < high) {
    const double middle = 0.5 * (low + high);  // exact: doubles of [1/2, 1) are multiples of 2^-53
    const double p = middle > low && middle < high ? middle : next_above(low);
    (enough(p) ? high : low) = p;
  }
  return high;
}

// sigma / 2 (z_lower - z_upper), rounded down: the l2 radius within which a class of probability at least Phi(z_lower)
// stays ahead of every class of probability at most Phi(z_upper) (Cohen et al. 2019, theorem 1).  What the class leaves
// bounds its rivals too, by Phi(-z_lower); the smaller bound is taken.  0 where there is no lead, NaN for NaN.
PACD_HD inline double radius_between(double sigma, double z_lower, double z_upper) {
  const double z = z_upper < -z_lower ? z_upper : -z_lower;
  if (!(z_lower > z)) return z_lower <= z ? 0.0 : NAN;
  if (z_lower == INFINITY || z == -INFINITY) return INFINITY;
  const Dd gap = two_sum(z_lower, -z);
  const double radius = product_down(0.5 * sigma, gap.lo < 0.0 ? next_below(gap.hi) : gap.hi);
  return radius > 0.0 ? radius : 0.0;
}

// The same from a lower bound on the class's probability and an upper bound on its rivals'.
PACD_HD inline double two_sided_radius(double sigma, double p_lower, double q_upper) {
  return radius_between(sigma, normal_quantile(p_lower, false), normal_quantile(q_upper, true));
}

}  // namespace pacd
