// Bounds on a Bernoulli probability that hold at every number of samples at once (a confidence sequence), rounded outward.
//
// A gambler bets against the claim "the probability is p".  With H hits in T draws a gambler who believes in theta has
// the wealth (theta / p)^H ((1 - theta) / (1 - p))^(T - H); one who spreads his money over theta by a prior has
//     W(H, T; p) = Q(H, T) / (p^H (1 - p)^(T - H)),      Q(H, T) = integral of theta^H (1 - theta)^(T - H) d prior(theta).
// Under the true p it is a martingale that starts at 1, so it ever reaches 1 / alpha with probability at most alpha
// (Ville 1939; Robbins 1970).  The claims whose wealth stays below are an interval: -H log p - (T - H) log(1 - p) is
// convex in p with its minimum at H / T.  The ends of the interval are the bounds.
//
// The prior is 1/4 Beta(1/2, 1/2), which loses little wherever p lies (Krichevsky, Trofimov 1981), and 3/4
// Beta((h + 1) / 2, (m - h + 1) / 2) where h of m earlier samples were hits, which loses less where p lies near h / m.
// Any prior is valid as long as these m samples are not among the T.
//
// The bounds rise with H at fixed T, whatever the prior: log W is convex in H (the logarithm of a mixture of exponentials)
// and at most 0 at H = p T, so from there on upwards the H with W >= 1 / alpha are all those from some H on, and likewise
// downwards.  So the upper bound of the most frequent of several classes is the largest of their upper bounds.
//
// Rounding: like binomial.h, a solution in double-double is rounded to double and then verified, a lower bound on log W
// against an upper bound on log(1 / alpha), or moves outward and is verified again.
#pragma once

#include "math/double_double.h"

namespace pacd {

// What a bet knows beforehand: `hits` of `samples` selection samples.  Without any, the whole prior is Beta(1/2, 1/2).
struct BettingPrior {
  int64_t hits, samples;
};

// log Gamma(m / 2) for an integer m >= 1, as Gamma(j + 1/2) = (2j)! / (4^j j!) sqrt(pi); error below 2^-93 (1 + m log m).
PACD_HD inline Dd log_gamma_of_half(int64_t m) {
  const int64_t j = m / 2;
  if (m % 2 == 0) return log_factorial(j - 1);
  const Dd log4(1.38629436111989057e+00, 4.63809362769259912e-17);
  const Dd half_log_pi(5.72364942924700082e-01, 5.13297558135391319e-18);
  return log_factorial(2 * j) - log_factorial(j) - Dd(static_cast<double>(j)) * log4 + half_log_pi;
}

PACD_HD inline Dd log_beta_of_halves(int64_t a, int64_t b) {  // log Beta(a / 2, b / 2)
  return log_gamma_of_half(a) + log_gamma_of_half(b) - log_gamma_of_half(a + b);
}

PACD_HD inline bool in_betting_range(int64_t hits, int64_t samples, BettingPrior prior) {
  return samples >= 0 && samples < (int64_t{1} << 31) && hits >= 0 && hits <= samples && prior.samples >= 0 &&
         prior.samples < (int64_t{1} << 31) && prior.hits >= 0 && prior.hits <= prior.samples;
}

// log Q(H, T); its error is below betting_error(T, prior).
PACD_HD inline Dd log_evidence(int64_t hits, int64_t samples, BettingPrior prior) {
  const int64_t misses = samples - hits, before = prior.samples - prior.hits;
  const Dd broad = log_beta_of_halves(2 * hits + 1, 2 * misses + 1) - log_beta_of_halves(1, 1);
  if (prior.samples == 0) return broad;
  const Dd narrow = log_beta_of_halves(2 * hits + prior.hits + 1, 2 * misses + before + 1) -
                    log_beta_of_halves(prior.hits + 1, before + 1);
  const bool swap = broad < narrow;
  const Dd larger = swap ? narrow : broad, apart = swap ? broad - narrow : narrow - broad;
  const double share = swap ? 0.75 : 0.25;
  // The smaller one is left out where it is not even 2^-800 of the larger: never more than the sum.
  const Dd rest = apart.hi > -560.0 ? exp(apart) * Dd(1.0 - share) : Dd(0.0);
  return larger + log(Dd(share) + rest);
}

// Twelve log-gammas of at most 2 (T + m + 1), each within 2^-93 of its size, their sums, and log and exp on top.
PACD_HD inline double betting_error(int64_t samples, BettingPrior prior) {
  const double m = 2.0 * (static_cast<double>(samples) + static_cast<double>(prior.samples) + 1.0);
  return 0x1p-89 * (1.0 + m * ::log(m));
}

// A lower bound on log W(H, T; p) for 0 < p < 1 and q = 1 - p in double-double, given log Q.
PACD_HD inline Dd log_wealth_below(int64_t hits, int64_t samples, Dd log_q, double error, Dd p, Dd q) {
  const Dd from_p = hits > 0 ? Dd(static_cast<double>(hits)) * log(p) : Dd(0.0);
  const Dd from_q = samples > hits ? Dd(static_cast<double>(samples - hits)) * log(q) : Dd(0.0);
  return log_q - from_p - from_q - Dd(error + 0x1p-93 * (1.0 + ::fabs(from_p.hi) + ::fabs(from_q.hi)));
}

// Whether the wealth against "the probability is p", 0 < p < 1, has surely reached 1 / alpha; false where it is within
// rounding of it.  p >= H / T makes it a bet against "at least p", p <= H / T one against "at most p".
PACD_HD inline bool betting_reaches(int64_t hits, int64_t samples, double p, double alpha, BettingPrior prior) {
  if (!in_betting_range(hits, samples, prior) || !(p > 0.0 && p < 1.0) || !(alpha >= 1e-200 && alpha < 1.0)) return false;
  const Dd log_q = log_evidence(hits, samples, prior);
  const Dd wealth = log_wealth_below(hits, samples, log_q, betting_error(samples, prior), Dd(p), two_sum(1.0, -p));
  return Dd(0x1p-94 * 500.0) - log(Dd(alpha)) <= wealth;
}

// The p below H / T with log W = target, to about 2^-90; not yet rounded.  H > 0.
// In u = log p the wealth's logarithm is convex, so Newton's method approaches the root from below, whatever the start.
PACD_HD inline Dd solve_betting(int64_t hits, int64_t samples, Dd log_q, Dd target) {
  const double h = static_cast<double>(hits), f = static_cast<double>(samples - hits), share = h / (h + f);
  double u;
  if (hits == samples) {
    u = (log_q.hi - target.hi) / h;
  } else {
    // Above the root: from H / T down to here the first term alone rises by all that the wealth lacks there.
    const double lacks = target.hi - (log_q.hi - h * ::log(share) - f * ::log1p(-share));
    const double spread = ::sqrt(2.0 * ::fmax(lacks, 1e-12) * share * (1.0 - share) / (h + f));
    u = share > 2.0 * spread ? ::log(share - spread) : ::log(share) - ::fmax(lacks, 1e-12) / h;
    for (int step = 0; step < 100; ++step) {
      const double p = ::exp(u), q = -::expm1(u), slope = f * p / q - h;
      const double value = log_q.hi - h * u - f * ::log(q) - target.hi;
      if (!(slope < 0.0)) {  // rounded to H / T
        u -= 0x1p-40;
        continue;
      }
      const double move = value / slope;
      u -= move;
      if (::fabs(move) <= 1e-9 * ::fabs(u)) break;
    }
  }
  Dd p = exp(Dd(u));
  for (int step = 0; step < 8; ++step) {
    const Dd q = Dd(1.0) - p;
    const Dd slope = Dd(h) - Dd(f) * p / q;
    const Dd value = log_q - Dd(h) * log(p) - (samples > hits ? Dd(f) * log(q) : Dd(0.0)) - target;
    const Dd move = value / slope;
    p = p + p * (move + scale(move * move, -1));
    if (::fabs(move.hi) < 0x1p-52) break;  // quadratic: what is left is far below
  }
  return p;
}

PACD_HD inline bool in_alpha_range(double alpha) { return alpha >= 1e-200 && alpha <= 1.0 - 0x1p-20; }

// The largest double p that could be verified to have W(H, T; p') >= 1 / alpha for all p' <= p: with probability at least
// 1 - alpha it is at most the true probability at every T at once.  0 <= H <= T < 2^31, 1e-200 <= alpha <= 1 - 2^-20,
// anything else gives NaN.  Within 2 ULP of the exact bound for T <= 10^7.
PACD_HD inline double betting_lower(int64_t hits, int64_t samples, double alpha, BettingPrior prior) {
  if (!in_betting_range(hits, samples, prior) || !in_alpha_range(alpha)) return NAN;
  if (hits == 0) return 0.0;
  const Dd log_q = log_evidence(hits, samples, prior);
  const double error = betting_error(samples, prior);
  const Dd target = Dd(0x1p-94 * 500.0) - log(Dd(alpha));
  const Dd solution = solve_betting(hits, samples, log_q, target + Dd(error));
  double p = solution.lo < 0.0 ? next_below(solution.hi) : solution.hi;
  if (!(p < 1.0)) p = 1.0 - 0x1p-53;
  for (int step = 0; step < 64 && p > 0.0; ++step, p = next_below(p)) {
    // Below H / T the wealth falls with p: what holds at p holds below it.
    const bool left = Dd(p) * Dd(static_cast<double>(samples)) < Dd(static_cast<double>(hits));
    if (left && target <= log_wealth_below(hits, samples, log_q, error, Dd(p), two_sum(1.0, -p))) return p;
  }
  return 0.0;
}

// The smallest double p that could be verified to have W(H, T; p') >= 1 / alpha for all p' >= p: the upper bound, with
// the same ranges and promise.  Misses are the hits of 1 - p, and 1 - p is never rounded on the way.
PACD_HD inline double betting_upper(int64_t hits, int64_t samples, double alpha, BettingPrior prior) {
  if (!in_betting_range(hits, samples, prior) || !in_alpha_range(alpha)) return NAN;
  if (hits == samples) return 1.0;
  const int64_t misses = samples - hits;
  const BettingPrior mirrored{prior.samples - prior.hits, prior.samples};
  const Dd log_q = log_evidence(misses, samples, mirrored);
  const double error = betting_error(samples, prior);
  const Dd target = Dd(0x1p-94 * 500.0) - log(Dd(alpha));
  const Dd solution = Dd(1.0) - solve_betting(misses, samples, log_q, target + Dd(error));
  double p = solution.lo > 0.0 ? next_above(solution.hi) : solution.hi;
  for (int step = 0; step < 64 && p < 1.0; ++step, p = next_above(p)) {
    const bool right = Dd(static_cast<double>(hits)) < Dd(p) * Dd(static_cast<double>(samples));
    if (right && target <= log_wealth_below(misses, samples, log_q, error, two_sum(1.0, -p), Dd(p))) return p;
  }
  return 1.0;
}

}  // namespace pacd
