// The label-flip tail bound: the cumulant of a linear vote under random label flips, minimised by bracketed Newton.
//
// A row alpha[n] of influences, given labels y[n] and a noise level q define the random vote
//     D(y~) = sum_i alpha_i s(y~_i) - thr,      y~_i the given label, or a random other one with probability q.
//   two classes:       s(1) = 1, s(0) = 0, thr = 1/2.  The base classifier says 1 iff D >= 0.
//   pair (c, d) of K:  s(c) = 1, s(d) = -1, s(other) = 0, thr = 0.  Class c beats class d iff D > 0.
// For t >= 0, P(D <= 0) <= exp(K(t)) with K(t) = t thr + sum_i log E exp(-t alpha_i s(y~_i)), and for t <= 0 the same
// number bounds P(D >= 0).  Both hold with ties counted against the prediction, and for every t: a solver that
// stopped early is loose, not wrong.  Only the evaluation of K has to be rounded up.
//
// One side, positive weights.  Let s = sign(t), tau = |t|, a_i = |alpha_i|.  Pulling the largest factor
// exp(tau a_i max(-s alpha_i s(.))) out of every term leaves
//     K = tau T + sum_i log m_i,   m_i = c0 + c1 e_i + c2 e_i^2 in (0, 1],   e_i = exp(-tau a_i),   c0 + c1 + c2 = 1,
//     T = s thr + (two classes: sum of a_i where s alpha_i < 0; pair: sum of all a_i),
// so nothing overflows for any t, and no precision beyond double is needed for any q (Rosenfeld et al., 2020,
// Algorithm 1 and appendix B, worked with products and needed arbitrary precision below q = 1e-4).
//
// Rounding, with u = 2^-53 (checked against 60 digits by python_tests/test_labelflip.py):
//  1. x_i = fl(tau a_i) is off by u x_i, which moves log m_i by at most u x_i w_i, w_i = -dlog m_i/dx_i. log m_i is
//     convex, so w_i decreases in x and x_i w_i <= integral of w = -log m_i. Error at most u |log m_i|.
//  2. exp_negative gives e within 3.5 u and g = 1 - e within 4 u, relative, for x in [0, 708]; above, x counts as 708,
//     which makes m_i larger.
//  3. d = 1 - m_i is formed from g without cancellation: relative error at most 6 u for two classes (1 - q, g, one
//     product) and 11 u for a pair. If d <= 1/2, 1 - d is kept as an exact sum of two doubles, and
//     |error of log m_i| <= error of d / (1 - d) <= 1.4427 (6 u or 11 u) |log m_i|, as d / ((1 - d) |log(1 - d)|) grows
//     to 1/log 2 = 1.4427 at d = 1/2. Else m_i is a sum of positive terms, within 6.5 u (10 u), and |log m_i| >= log 2
//     gives 1.4427 (6.5 u or 10 u) |log m_i| again.
//     1 to 3 together: at most 10.4 u |log m_i| for two classes, 16.9 u for a pair: row_ulp = 11 and 18.
//  4. The product of the m_i is compensated (its rounding errors are carried along, each known exactly from an fma):
//     at most 8 n^2 u^2 in the log. The sum of a_i in T is a double-double: at most 4 n u^2 tau sum a_i.
//  5. K is put together from exact products and exact sums, with one log of a number in [1/sqrt 2, sqrt 2) that is
//     within 4 u, absolute, and a final rounding of u |K|.
// log_tail = K + (row_ulp |sum log m_i| + 4 |K| + 8) u + 4 tau n u^2 sum a_i + 8 n^2 u^2, each evaluated upward.
#pragma once

#include "kernels/teams.h"
#include "math/elementary.h"

namespace pacd {

// state[0..2]: a compensated product (p + p_low) 2^exponent; state[3..4]: a double-double sum.
PACD_INLINE void multiply_exactly(double (&product)[5], double m, double m_low) {
  const double p = product[0] * m;
  product[1] = fma(product[0], m, -p) + fma(product[0], m_low, product[1] * m);
  product[0] = p;
}

// Brings p > 0 back to [1, 2), exactly.
struct SettleProduct {
  PACD_INLINE void operator()(double (&product)[5]) const {
    const int64_t biased = bits_as<int64_t>(product[0]) >> 52;  // the sign bit is clear
    const double scale = bits_as<double>((2046 - biased) << 52);
    product[0] *= scale;
    product[1] *= scale;
    // an integer below 2^52 becomes a double by pasting it into the bits of 2^52
    product[2] += bits_as<double>(biased | 0x4330000000000000) - (4503599627370496.0 + 1023.0);
  }
};

struct MultiplyStates {
  PACD_INLINE void operator()(double (&mine)[5], const double (&theirs)[5]) const {
    multiply_exactly(mine, theirs[0], theirs[1]);
    mine[2] += theirs[2];
    SettleProduct()(mine);
    add_exactly(mine[3], mine[4], theirs[3]);
    mine[4] += theirs[4];
  }
};

// One row: alpha against labels y. pair = false: two classes, labels 0 and 1. pair = true: class `c` against `d`.
template <bool pair>
struct ChernoffRow {
  const double* alpha;
  const int64_t* y;
  int64_t n;
  double keep;     // P(label stays): 1 - q
  double other;    // P(it becomes one given other label): q, or q / (K - 1)
  double neutral;  // pair: P(a label of c or d becomes neither): q (K - 2) / (K - 1)
  double outside;  // pair: P(a label that is neither stays so): 1 - 2 other
  int64_t c, d;
  double threshold;
  double reach;  // where the first step may go: tau times the largest influence; any positive number is right

  static constexpr double row_ulp = pair ? 18.0 : 11.0;

  struct Mix {
    double c0, c1, c2;  // of 1, e and e^2
  };

  // The coefficients of m_i; `signed_alpha` is s alpha_i.
  PACD_INLINE Mix mix(double signed_alpha, int64_t label) const {
    if constexpr (pair) {
      const double agree = label == c ? signed_alpha : (label == d ? -signed_alpha : 0.0);
      return {agree < 0 ? keep : other, agree != 0 ? neutral : outside, agree > 0 ? keep : other};
    } else {
      const double agree = label == 1 ? signed_alpha : -signed_alpha;
      return {agree > 0 ? other : keep, agree > 0 ? keep : other, 0.0};
    }
  }

  template <class Team>
  PACD_INLINE void solve(const Team& team, double* t_out, double* log_tail_out) const {
    // Sums that fix the side and the start: positive and negative influences, the vote's first three cumulants, the
    // largest influence. Plain sums: the bound holds for every t.
    double sums[6];
    const double zeros[6] = {0, 0, 0, 0, 0, 0};
    team.reduce(
        n, zeros, sums, 0,
        [this](double (&s)[6], int64_t i) {
          const double value = alpha[i];
          const double size = ::fabs(value);
          double mean, variance, third;
          if constexpr (pair) {
            const double sign = y[i] == c ? 1.0 : (y[i] == d ? -1.0 : 0.0);
            const double gap = keep - other, both = keep + other;
            mean = sign * gap;
            variance = sign != 0.0 ? both * neutral + 4.0 * keep * other : 2.0 * other;
            third = sign * (gap - 3.0 * gap * both + 2.0 * gap * gap * gap);
          } else {
            mean = y[i] == 1 ? keep : other;
            variance = keep * other;
            third = y[i] == 1 ? keep * other * (other - keep) : keep * other * (keep - other);
          }
          s[0] += size;
          s[1] += value;
          s[2] = fma(value, mean, s[2]);
          const double square = value * value;
          s[3] = fma(square, variance, s[3]);
          s[4] = fma(square * value, third, s[4]);
          s[5] = size > s[5] ? size : s[5];
        },
        NothingToSettle(),
        [](double (&a)[6], const double (&b)[6]) {
          for (int r = 0; r < 5; ++r) a[r] += b[r];
          a[5] = b[5] > a[5] ? b[5] : a[5];
        });
    const double margin = sums[2] - threshold, spread = sums[3];
    if (!(spread - spread == 0.0) || margin == 0.0) {  // not finite, or undecided
      *t_out = *log_tail_out = spread - spread;
      return;
    }
    const double side = margin > 0 ? 1.0 : -1.0, gap = ::fabs(margin);
    const double most = pair ? sums[0] : 0.5 * (sums[0] - side * sums[1]);         // what T has beside s thr
    double start = gap * spread / (spread * spread - 0.5 * side * gap * sums[4]);  // Halley's step from t = 0
    start = start > 0.0 && start * spread < 4.0 * gap ? start : gap / spread;
    const double tau = newton(team, side, fma(side, threshold, most), start, sums[5]);
    *t_out = side * tau;
    *log_tail_out = bound(team, side, tau, sums[0]);
  }

  // The root of K' on tau > 0, to about 1e-7: Halley's steps (three derivatives by one pass over the row) in a bracket.
  template <class Team>
  PACD_INLINE double newton(const Team& team, double side, double total, double start, double largest) const {
    // Where no label can change the vote K falls without end; past this tau the bound is small enough for any use.
    double limit = 1073741824.0 / largest;
    limit = limit < 1e300 ? limit : 1e300;
    double below = 0.0, above = 2.0 * limit;  // K' < 0 at `below`, K' > 0 at `above` once it is under the limit
    double tau = start * largest < reach ? start : reach / largest;
    tau = tau < limit ? tau : limit;
    for (int step = 0; step < 100; ++step) {
      double slopes[3];
      const double zeros[3] = {0, 0, 0};
      team.reduce(
          n, zeros, slopes, 0,
          [this, side, tau](double (&s)[3], int64_t i) {
            const double signed_alpha = side * alpha[i];
            const double a = ::fabs(signed_alpha);
            const Mix w = mix(signed_alpha, y[i]);
            const double e = exp_negative(tau * a).e;
            double mean, variance, third;  // cumulants of the number of factors e under the tilted probabilities
            if constexpr (pair) {
              const double scale = 1.0 / fma(fma(w.c2, e, w.c1), e, w.c0);
              const double first = w.c1 * e * scale, second = w.c2 * e * e * scale;
              mean = fma(2.0, second, first);
              const double square = fma(4.0, second, first);
              variance = fma(-mean, mean, square);
              third = fma(8.0, second, first) - mean * fma(3.0, square, -2.0 * mean * mean);
            } else {
              mean = w.c1 * e / fma(w.c1, e, w.c0);
              variance = fma(-mean, mean, mean);
              third = fma(-2.0 * mean, variance, variance);
            }
            const double square = a * a;
            s[0] = fma(a, mean, s[0]);
            s[1] = fma(square, variance, s[1]);
            s[2] = fma(square * a, third, s[2]);
          },
          NothingToSettle(), AddStates());
      const double slope = total - slopes[0], bend = slopes[1];  // K' and K''; the third derivative is -slopes[2]
      if (slope < 0)
        below = tau;
      else
        above = tau;
      if (slope == 0.0 || below == limit) return tau;
      const double plain = -slope / bend;
      double move = plain / (1.0 - 0.5 * plain * slopes[2] / bend);
      move = move * plain > 0.0 && ::fabs(move) < 2.0 * ::fabs(plain) ? move : plain;
      double next = tau + move;
      // the error left is of the order of this move cubed, 1e-7, and K feels its square
      if (::fabs(move) <= 4e-3 * tau) return next;
      if (!(next > below && next < above)) {
        if (above > limit)
          next = 8.0 * tau;  // no bracket yet
        else if (below == 0.0)
          next = 0.125 * above;
        else
          next = above > 16.0 * below ? 4.0 * below : 0.5 * (below + above);
      }
      next = next < limit ? next : limit;
      if (next == tau) return tau;
      tau = next;
    }
    return tau;
  }

  // K(tau), rounded up as derived at the top of this file; `norm` is the sum of all |alpha|.
  template <class Team>
  PACD_INLINE double bound(const Team& team, double side, double tau, double norm) const {
    const double one[5] = {1.0, 0.0, 0.0, 0.0, 0.0};
    double total[5];
    team.reduce(
        n, one, total, other >= 1e-30 ? 8 : 1,  // eight factors, none below `other`, stay far inside a double's range
        [this, side, tau](double (&s)[5], int64_t i) {
          const double signed_alpha = side * alpha[i];
          const double a = ::fabs(signed_alpha);
          const Mix w = mix(signed_alpha, y[i]);
          const ExpPair x = exp_negative(tau * a);
          double d, direct;
          if constexpr (pair) {
            d = x.g * fma(w.c2, 1.0 + x.e, w.c1);
            direct = fma(fma(w.c2, x.e, w.c1), x.e, w.c0);
          } else {
            d = x.g * w.c1;
            direct = fma(w.c1, x.e, w.c0);
          }
          const double rest = 1.0 - d;
          const bool small = d <= 0.5;
          multiply_exactly(s, small ? rest : direct, small ? (1.0 - rest) - d : 0.0);
          add_exactly(s[3], s[4], pair || signed_alpha < 0 ? a : 0.0);
        },
        SettleProduct(), MultiplyStates());
    double p = total[0], p_low = total[1], exponent = total[2];
    if (p > 1.4142135623730951) p *= 0.5, p_low *= 0.5, exponent += 1.0;
    const double fraction = log_near_one(p) + p_low / p;
    const double logs = fma(exponent, 0x1.62e42fefa39efp-1, fraction);  // sum log m_i, for the error term only
    // K = tau T + exponent log 2 + fraction, from exact parts
    double high = side * threshold, low = total[4];
    add_exactly(high, low, total[3]);
    double sum = tau * high;
    double rest = fma(tau, high, -sum) + tau * low;
    const double whole = exponent * 0x1.62e42fefa39efp-1;
    add_exactly(sum, rest, whole);
    rest += fma(exponent, 0x1.62e42fefa39efp-1, -whole) + exponent * 0x1.abc9e3b39803fp-56;
    add_exactly(sum, rest, fraction);
    const double value = sum + rest;
    const double u = 0x1p-53, count = static_cast<double>(n);
    const double error =
        u * (row_ulp * ::fabs(logs) + 4.0 * ::fabs(value) + 8.0) + 4.0 * u * u * count * (tau * norm + 2.0 * count);
    return value + error * (1.0 + 0x1p-40);
  }
};

// The bound of each row of alpha[rows, n] against two-class labels.
struct ChernoffNewton {
  const double* alpha;
  const int64_t* y;
  double* t;
  double* log_tail;
  int64_t n;
  double q, reach;

  template <class Team>
  PACD_INLINE void operator()(const Team& team, int64_t row) const {
    const ChernoffRow<false> problem{alpha + row * n, y, n, 1.0 - q, q, 0.0, 0.0, 0, 0, 0.5, reach};
    problem.solve(team, t + row, log_tail + row);
  }
};

// The same for pairs of K classes: pairs[rows, per_row, 2], t and log_tail [rows, per_row].
struct ChernoffPairs {
  const double* alpha;
  const int64_t* y;
  const int64_t* pairs;
  double* t;
  double* log_tail;
  int64_t n, per_row;
  double keep, other, neutral, outside, reach;

  template <class Team>
  PACD_INLINE void operator()(const Team& team, int64_t item) const {
    const ChernoffRow<true> problem{
        alpha + item / per_row * n, y,   n,    keep, other, neutral, outside, pairs[2 * item],
        pairs[2 * item + 1],        0.0, reach};
    problem.solve(team, t + item, log_tail + item);
  }
};

}  // namespace pacd
