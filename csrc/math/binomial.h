// Clopper-Pearson bounds in double, rounded outward: a lower bound is never above the exact one, an upper never below.
//
// With S = sum over j >= 0 of prod_{i < j} (n - k - i) / (k + 1 + i) * p / (1 - p), all terms positive,
//     P(Binomial(n, p) >= k) = C(n, k) p^k (1 - p)^(n - k) * S,        d log P / d log p = k / S.
// The bound solves P = alpha.  log P is concave in log p, so Newton's method in log p approaches the root from below,
// whatever the start.  The last steps run in double-double; then doubles next to the root are *verified*: an upper
// bound on P, with every rounding error accounted for, must not exceed alpha.  The result is the innermost that passes.
// An error e in log P moves p by a relative e S / k, which says how exact S has to be.
//
// Near 1, log P says little about p.  So a level above 1/2 is turned: P(Binomial(n, p) >= k) <= alpha where the
// opposite tail, of n - k + 1 failures or more, is at least 1 - alpha, and that is what is solved and verified from
// below.
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

PACD_HD inline Dd log_binomial(int64_t n, int64_t k) {
  return log_factorial(n) - log_factorial(k) - log_factorial(n - k);
}

// log P(Binomial(n, x) >= k), within `doubt` on the side that matters, and S.
struct LogTail {
  Dd value;
  double doubt, sum;
};

// The equation P(Binomial(n, x) >= k) = level, for 0 < k <= n < 2^31 and a level in [1e-200, 1/2].
struct BinomialTail {
  int64_t n, k;
  bool complement;  // what is wanted, to full precision, is 1 - x and not x
  bool at_least;    // the tail must not be below the level; else not above
  Dd log_choose, log_level;

  PACD_HD BinomialTail(int64_t draws, int64_t hits, double level, bool wants_complement, bool is_least)
      : n(draws), k(hits), complement(wants_complement), at_least(is_least) {
    log_choose = log_binomial(n, k);
    log_level = log(Dd(level)) + outward(-0x1p-94 * 500.0);
  }

  PACD_HD Dd outward(double doubt) const { return Dd(at_least ? -doubt : doubt); }

  PACD_HD LogTail log_tail(Dd x, Dd rest) const {
    const Dd odds = x / rest;
    // Plain double suffices where its error moves what is wanted by less than a quarter of 2^-53; the test is the error
    // bound itself.
    double truncated = 0x1p-60;
    const TailSum<double> quick = tail_sum<double>(n, k, odds, truncated);
    Dd sum = quick.sum;
    double error = quick.error;
    if (16.0 * quick.moment * (complement ? ::fmax(odds.hi, 1.0) : 1.0) > static_cast<double>(k)) {
      truncated = 0x1p-110;
      const TailSum<Dd> exact = tail_sum<Dd>(n, k, odds, truncated);
      sum = exact.sum;
      error = exact.error;
    }
    // S is at most sum (1 + error), and at least sum (1 - error - truncated), whose log is above -error - error^2.
    if (at_least) error += 1.01 * truncated;
    if (at_least) error += error * error;
    const Dd from_x = Dd(static_cast<double>(k)) * log(x);
    const Dd from_rest = Dd(static_cast<double>(n - k)) * log(rest);
    // log_choose comes from factorials below n log n; log and products err by 2^-94 of their size.
    const double draws = static_cast<double>(n);
    const double size = 1.0 + draws * log_positive(draws + 1.0) + ::fabs(from_x.hi) + ::fabs(from_rest.hi);
    return {log_choose + from_x + from_rest + log(sum), error + 0x1p-94 * size, sum.hi};
  }

  // x, to far below an ULP of what is wanted.
  PACD_HD Dd root() const {
    const double count = static_cast<double>(k), others = static_cast<double>(n - k);
    if (k == n) return exp(log_level / Dd(count));
    // Newton's method for y = -log x in double.  A start below the root costs a few steps, one above it is brought
    // below by the first step: k/n is above, and the union bound C(n, k) x^k = level is always below.
    const double spread = ::sqrt(-2.0 * log_level.hi * count * others / static_cast<double>(n));
    double y = ::fmin((log_choose.hi - log_level.hi) / count,
                      -log_positive(::fmax(count - spread, 1e-280) / static_cast<double>(n)));
    for (int step = 0; step < 60; ++step) {
      if (!(y > 0.0)) y = 0x1p-40;
      const ExpPair x = exp_negative(y);
      const double sum = tail_sum<double>(n, k, Dd(x.e / x.g), 0x1p-40).sum.hi;
      const double value = log_choose.hi - count * y + others * log_positive(x.g) + log_positive(sum) - log_level.hi;
      const double move = value * sum / count;
      y += move;
      if (::fabs(move) <= 1e-9 * ::fabs(y)) break;
    }
    Dd x = exp(Dd(-y));
    for (int step = 0; step < 8; ++step) {
      const Dd rest = Dd(1.0) - x;
      const LogTail tail = log_tail(x, rest);
      const Dd h = (log_level - (tail.value + outward(tail.doubt))) * Dd(tail.sum) / Dd(count);
      const double relative = ::fabs(h.hi) * (complement ? ::fmax(x.hi / rest.hi, 1.0) : 1.0);
      x = x + x * (h + scale(h * h, -1));
      if (relative < 0x1p-40) break;  // the step was quadratic, with a factor below 2^20
    }
    return x;
  }

  // Whether the tail surely keeps to the level where the wanted probability is p.
  PACD_HD bool holds(double p) const {
    const Dd rest = two_sum(1.0, -p);
    const LogTail tail = complement ? log_tail(rest, Dd(p)) : log_tail(Dd(p), rest);
    const Dd surely = tail.value + outward(tail.doubt);
    return at_least ? log_level <= surely : surely <= log_level;
  }
};

constexpr double largest_alpha = 1.0 - 0x1p-20;  // what the tests go up to
constexpr int most_steps = 64;                   // one or two are enough; where these are not, the bound is trivial

PACD_HD inline bool in_range(int64_t k, int64_t n, double alpha) {
  return n >= 1 && n < (int64_t{1} << 31) && k >= 0 && k <= n && alpha >= 1e-200 && alpha <= largest_alpha;
}

// The Clopper-Pearson bound on p from k successes in n draws: the largest double that could be verified to have
// P(Binomial(n, p) >= k) <= alpha or, with upper, the smallest with P(Binomial(n, p) <= k) <= alpha.
// 0 <= k <= n, 1 <= n < 2^31, 1e-200 <= alpha <= largest_alpha; anything else gives NaN.  Within 2 ULP of the exact
// bound.
PACD_HD inline double clopper_pearson_bound(int64_t k, int64_t n, double alpha, bool upper) {
  if (!in_range(k, n, alpha)) return NAN;
  const double trivial = upper ? 1.0 : 0.0;
  if (k == (upper ? n : 0)) return trivial;
  // Failures are the successes of 1 - p; their equation is solved for 1 - p, which is never rounded on the way.
  const bool turned = alpha > 0.5, of_failures = upper != turned;
  const int64_t least = turned ? (upper ? k + 1 : n - k + 1) : (upper ? n - k : k);
  const BinomialTail tail(n, least, turned ? 1.0 - alpha : alpha, of_failures, turned);
  const Dd exact = of_failures ? Dd(1.0) - tail.root() : tail.root();
  double p = exact.hi < 1.0 ? exact.hi : 1.0 - 0x1p-53;
  // One double at a time, inward while they hold, or outward until one does: the result does not depend on the solver.
  const bool inward = tail.holds(p);
  for (int step = 0; step < most_steps; ++step) {
    const double next = inward != upper ? next_above(p) : next_below(p);
    if (!(next > 0.0 && next < 1.0)) break;
    if (tail.holds(next) != inward) return inward ? p : next;
    p = next;
  }
  return inward ? p : trivial;
}

PACD_HD inline double clopper_pearson_lower(int64_t k, int64_t n, double alpha) {
  return clopper_pearson_bound(k, n, alpha, false);
}

PACD_HD inline double clopper_pearson_upper(int64_t k, int64_t n, double alpha) {
  return clopper_pearson_bound(k, n, alpha, true);
}

}  // namespace pacd
