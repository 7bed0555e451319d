// Clopper-Pearson bounds in double, rounded outward: a lower bound is never above the exact one, an upper never below.
//
// With S = sum over j >= 0 of prod_{i < j} (n - k - i) / (k + 1 + i) * p / (1 - p), all terms positive,
//     P(Binomial(n, p) >= k) = C(n, k) p^k (1 - p)^(n - k) * S,        d log P / d log p = k / S.
// The bound solves P = alpha.  log P is concave in log p, so Newton's method in log p approaches the root from below,
// whatever the start.  The last steps run in double-double; the result is rounded to double and then *verified*: an
// upper bound on P, with every rounding error accounted for, must not exceed alpha, or the bound moves outward and is
// verified again.  An error e in log P moves p by a relative e S / k, which says how exact S has to be.
#pragma once

#include "math/double_double.h"

namespace pacd {

// S above, with a bound on its relative error, and the sum of j times the j-th term (what that bound is made of).
template <class Real>
struct TailSum {
  Dd sum;
  double moment;
  double error;
};

PACD_INLINE double leading(double x) { return x; }
PACD_INLINE double leading(Dd x) { return x.hi; }

// Real = double: a ratio costs four roundings, so the j-th term errs by 4 j 2^-53; Real = Dd: by 32 j 2^-106 at most.
// The terms are added in double-double.  Their ratios fall, so what follows a term is at most a geometric series; the
// sum stops when that is below `rest` times the sum, and adds it: S is never too small by truncation.
template <class Real>
PACD_INLINE TailSum<Real> tail_sum(int64_t n, int64_t k, Dd odds, double rest) {
  const Real w = sizeof(Real) == sizeof(double) ? Real(odds.hi) : Real(odds.hi) + Real(odds.lo);
  Real term(1.0);
  Dd sum(1.0);
  double moment = 0.0;
  double up = static_cast<double>(n - k), down = static_cast<double>(k + 1);
  for (double j = 1.0; up > 0.0; j += 1.0, up -= 1.0, down += 1.0) {
    const Real ratio = w * Real(up) / Real(down);
    term = term * ratio;
    const double t = leading(term);
    if constexpr (sizeof(Real) == sizeof(double)) {
      add_exactly(sum.hi, sum.lo, t);
    } else {
      sum = sum + term;
    }
    moment = fma(j, t, moment);
    const double next = leading(w) * (up - 1.0) / (down + 1.0);
    if (next < 1.0 && t * next <= rest * sum.hi * (1.0 - next)) {
      sum = sum + Dd(1.0000001 * t * next / (1.0 - next));
      break;
    }
  }
  sum = quick_two_sum(sum.hi, sum.lo);
  const double unit = sizeof(Real) == sizeof(double) ? 4.001 * 0x1p-53 : 33.0 * 0x1p-106;
  return {sum, moment, unit * moment / sum.hi + 0x1p-90};
}

// An upper bound on log P(Binomial(n, p) >= k) for 0 < k <= n, 0 < p < 1, q = 1 - p (both in double-double), and S.
// for_q: as sharp as a q needs that is far smaller than p, rather than p.
struct LogTail {
  Dd bound;
  double sum;
};

PACD_HD inline LogTail log_tail_above(int64_t n, int64_t k, Dd log_choose, Dd p, Dd q, bool for_q) {
  const Dd odds = p / q;
  // Plain double suffices where its error moves what is wanted, p or q, by less than a quarter of 2^-53; the test is
  // the error bound itself.
  const TailSum<double> quick = tail_sum<double>(n, k, odds, 0x1p-60);
  Dd sum = quick.sum;
  double error = quick.error;
  if (16.0 * quick.moment * (for_q ? ::fmax(odds.hi, 1.0) : 1.0) > static_cast<double>(k)) {
    const TailSum<Dd> exact = tail_sum<Dd>(n, k, odds, 0x1p-110);
    sum = exact.sum;
    error = exact.error;
  }
  const Dd from_p = Dd(static_cast<double>(k)) * log(p);
  const Dd from_q = Dd(static_cast<double>(n - k)) * log(q);
  // log_choose comes from factorials below n log n; log and products err by 2^-94 of their size.
  const double size =
      1.0 + static_cast<double>(n) * ::log(static_cast<double>(n) + 1.0) + ::fabs(from_p.hi) + ::fabs(from_q.hi);
  return {log_choose + from_p + from_q + log(sum) + Dd(error) + Dd(0x1p-94 * size), sum.hi};
}

// The solution p of P(Binomial(n, p) >= k) = alpha for 0 < k <= n, 0 < alpha < 1, to about 2^-90; not yet rounded.
PACD_HD inline Dd solve_binomial_tail(int64_t n, int64_t k, Dd log_choose, double alpha, bool for_q) {
  const double count = static_cast<double>(k), rest = static_cast<double>(n - k);
  const Dd target = log(Dd(alpha));
  if (k == n) {
    // alpha^(1/n), with the exponent in double-double.
    return exp(target / Dd(count));
  }
  // A start below the root costs a few steps, one above it is brought below by the first step: k/n is above for
  // alpha <= 1/2, and the union bound C(n, k) p^k = alpha is always below.
  const double spread = ::sqrt(-2.0 * target.hi * count * rest / static_cast<double>(n));
  double log_p =
      ::fmax((target.hi - log_choose.hi) / count, ::log(::fmax(count - spread, 1e-280) / static_cast<double>(n)));
  for (int step = 0; step < 60; ++step) {
    const double p = ::exp(log_p);
    if (!(p < 1.0)) {
      log_p = -0x1p-40;
      continue;
    }
    const double odds = p / -::expm1(log_p);
    const double sum = tail_sum<double>(n, k, Dd(odds), 0x1p-40).sum.hi;
    const double value = log_choose.hi + count * log_p + rest * ::log1p(-p) + ::log(sum) - target.hi;
    const double move = value * sum / count;
    log_p -= move;
    if (::fabs(move) <= 1e-9 * ::fabs(log_p) + 1e-13) break;
  }
  Dd p = exp(Dd(log_p));
  for (int step = 0; step < 6; ++step) {
    const LogTail tail = log_tail_above(n, k, log_choose, p, Dd(1.0) - p, for_q);
    const Dd h = (target - tail.bound) * Dd(tail.sum) / Dd(count);
    p = p + p * (h + scale(h * h, -1));
    if (::fabs(h.hi) < 0x1p-52) break;  // the step was quadratic: what is left is below 2^-90
  }
  return p;
}

PACD_HD inline Dd log_binomial(int64_t n, int64_t k) {
  return log_factorial(n) - log_factorial(k) - log_factorial(n - k);
}

constexpr double largest_alpha = 1.0 - 0x1p-20;  // beyond it Newton's steps are lost in rounding
constexpr int most_verifications = 64;           // one or two are enough; where these are not, the bound is trivial

PACD_HD inline bool in_range(int64_t k, int64_t n, double alpha) {
  return n >= 1 && n < (int64_t{1} << 31) && k >= 0 && k <= n && alpha >= 1e-200 && alpha <= largest_alpha;
}

// The largest double p that could be verified with P(Binomial(n, p) >= k) <= alpha: the Clopper-Pearson lower bound.
// 0 <= k <= n, 1 <= n < 2^31, 1e-200 <= alpha <= largest_alpha; anything else gives NaN.  Within 2 ULP of the exact
// bound.
PACD_HD inline double clopper_pearson_lower(int64_t k, int64_t n, double alpha) {
  if (!in_range(k, n, alpha)) return NAN;
  if (k == 0) return 0.0;
  const Dd log_choose = log_binomial(n, k);
  const Dd target = log(Dd(alpha)) - Dd(0x1p-94 * 500.0);
  const Dd solution = solve_binomial_tail(n, k, log_choose, alpha, false);
  double p = solution.lo < 0.0 ? next_below(solution.hi) : solution.hi;
  if (!(p < 1.0)) p = 1.0 - 0x1p-53;
  for (int step = 0; step < most_verifications && p > 0.0; ++step, p = next_below(p)) {
    if (log_tail_above(n, k, log_choose, Dd(p), two_sum(1.0, -p), false).bound <= target) return p;
  }
  return 0.0;
}

// The smallest double p that could be verified with P(Binomial(n, p) <= k) <= alpha: the upper bound.
// Failures are the successes of 1 - p; the equation is solved there, and 1 - p is never rounded on the way.
PACD_HD inline double clopper_pearson_upper(int64_t k, int64_t n, double alpha) {
  if (!in_range(k, n, alpha)) return NAN;
  if (k == n) return 1.0;
  const int64_t failures = n - k;
  const Dd log_choose = log_binomial(n, failures);
  const Dd target = log(Dd(alpha)) - Dd(0x1p-94 * 500.0);
  const Dd solution = Dd(1.0) - solve_binomial_tail(n, failures, log_choose, alpha, true);
  double p = solution.lo > 0.0 ? next_above(solution.hi) : solution.hi;
  for (int step = 0; step < most_verifications && p < 1.0; ++step, p = next_above(p)) {
    if (log_tail_above(n, failures, log_choose, two_sum(1.0, -p), Dd(p), true).bound <= target) return p;
  }
  return 1.0;
}

}  // namespace pacd
