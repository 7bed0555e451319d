// Exact group-sequential tests of a Bernoulli probability: at fixed sample counts, when to accept and when to give up.
//
// Samples are looked at when there are T_1 < T_2 < ... < T_K = n of them.  A test of "the probability of a miss is below
// q" accepts at the first look with at most a_k misses, and gives up at the first look with at least b_k.
//
// Level.  The a_k are such that, where a miss has probability exactly q, P(at most a_k misses at some look k) <= alpha,
// give-ups left out of the account.  Where it is larger, couple the samples so that every miss under q is a miss under
// the larger one: acceptance only gets less likely.  So the test errs with probability at most alpha wherever its claim
// is false, *whatever* b_k is and whoever stops for whatever reason.
//
// Many claims at once.  Tests for q_1 > q_2 > ... (radii r_1 < r_2 < ...) are all run on the same samples, and the
// largest accepted radius is issued.  No union bound is needed: let q be the true miss probability and j the first claim
// that is false (q >= q_j).  The boundaries are made to fall with the radius, a_1k >= a_2k >= ... (lowering one is
// harmless), so accepting any false claim at a look is accepting claim j there, which has probability at most alpha.
// The same argument makes the accepted claims of all looks together a confidence sequence.
//
// The a_k come from the law of the misses by convolution from look to look ("alpha spending", Lan and DeMets 1983): look k
// takes the largest a_k that keeps what has been spent within alpha / 2 * sqrt(T_k / n), the last look within alpha.  The
// square root is the share of close cases: an image at distance d from q takes about 1 / d^2 samples, so those decided by
// T are a share of about sqrt(T).  Half is kept for the last look, for images that use all n samples.
//
// Rounding: every number is a sum of products of positive numbers; with e the bound on their relative errors, spent
// * (1 + e) is compared with alpha.  What is cut off is moved to where it can only be accepted sooner: increments too rare
// at the low end count as accepted at once, those at the high end and states far above the boundary as less misses.
//
// Give-ups cost power alone.  Given m misses among all n, those among the first T are hypergeometric, whatever q is; b_k
// is the smallest number with P(at least b_k | a_K misses at the end) <= beta (sqrt(T_k / n) - sqrt(T_{k-1} / n)), and
// fewer misses at the end make it less likely still.  So of the runs that the last look would accept, a share of at most
// beta is given up.  b_k is at most a_K + 1: more misses than a_K can never be made good.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "math/binomial.h"

namespace pacd {

// first, then an eighth more at each look (at least one), and n.  A look in the last sixteenth before n is left out.
inline std::vector<int64_t> look_schedule(int64_t n, int64_t first) {
  if (n < 1 || n >= (int64_t{1} << 31) || first < 1) throw std::invalid_argument("n must be in [1, 2^31) and first positive");
  std::vector<int64_t> looks;
  for (int64_t t = first; t < n - n / 16; t += std::max<int64_t>(1, t / 8)) looks.push_back(t);
  looks.push_back(n);
  return looks;
}

inline void check_looks(const std::vector<int64_t>& looks) {
  int64_t before = 0;
  for (int64_t t : looks) {
    if (t <= before) throw std::invalid_argument("looks must be positive and rise");
    before = t;
  }
  if (looks.empty() || before >= (int64_t{1} << 31)) throw std::invalid_argument("there must be a look, and all below 2^31");
}

// Numbers of misses first, first + 1, ... and their probabilities, each within a relative `error`.  What lies beyond the
// last is added to it; what lies before the first is at most `below`.
struct MissLaw {
  int64_t first;
  std::vector<double> mass;
  double below, error;
};

// Binomial(m, q) without its ends of at most `rare` each; p = 1 - q.  From the mode, which comes from double-double, by
// ratios that cost six roundings each.
inline MissLaw miss_law(int64_t m, Dd p, Dd q, double rare) {
  const double count = static_cast<double>(m), odds = q.hi / p.hi;
  const int64_t mode = std::min(m, static_cast<int64_t>(q.hi * (count + 1.0)));
  const Dd from_q = Dd(static_cast<double>(mode)) * log(q), from_p = Dd(static_cast<double>(m - mode)) * log(p);
  const double at_mode = exp(log_binomial(m, mode) + from_q + from_p).hi;
  std::vector<double> down;
  MissLaw law{mode, {}, 0.0, 0.0};
  double mass = at_mode;
  for (int64_t j = mode; j > 0; --j) {
    const double ratio = static_cast<double>(j) / (static_cast<double>(m - j + 1) * odds);
    const double next = mass * ratio;
    // The ratios fall on the way, so what is left is at most a geometric series.
    if (ratio < 1.0 && next <= rare * (1.0 - ratio)) {
      law.below = 1.0000001 * next / (1.0 - ratio) + 1e-300;
      break;
    }
    down.push_back(mass = next);
    law.first = j - 1;
  }
  law.mass.assign(down.rbegin(), down.rend());
  law.mass.push_back(mass = at_mode);
  for (int64_t j = mode; j < m; ++j) {
    const double ratio = static_cast<double>(m - j) * odds / static_cast<double>(j + 1);
    const double next = mass * ratio;
    if (ratio < 1.0 && next <= rare * (1.0 - ratio)) {
      law.mass.back() += 1.0000001 * next / (1.0 - ratio);
      break;
    }
    law.mass.push_back(mass = next);
  }
  law.error = (7.0 * static_cast<double>(law.mass.size()) + 16.0) * 0x1p-53;
  return law;
}

// out[i + j] += a[i] * b[j].  Each number is added to in the order of i, so its bits do not depend on the instruction set.
PACD_CLONES inline void add_products(const double* a, int64_t a_size, const double* b, int64_t b_size, double* out) {
  for (int64_t i = 0; i < a_size; ++i) {
    const double factor = a[i];
    double* to = out + i;
    PACD_NO_ALIAS
    for (int64_t j = 0; j < b_size; ++j) to[j] += factor * b[j];
  }
}

inline void convolve(const std::vector<double>& a, const std::vector<double>& b, std::vector<double>& out) {
  out.assign(a.size() + b.size() - 1, 0.0);
  const bool swap = a.size() > b.size();  // the longer one inside
  const std::vector<double>&outer = swap ? b : a, &inner = swap ? a : b;
  add_products(outer.data(), static_cast<int64_t>(outer.size()), inner.data(), static_cast<int64_t>(inner.size()), out.data());
}

// a_k: the most misses with which look k accepts "a miss has probability below q", -1 where none are few enough.
// p = 1 - q, both in (0, 1); 1e-200 <= alpha <= 1/2.
// The work is about n: 5 ms for n = 100 000.
inline std::vector<int64_t> acceptance_boundary(const std::vector<int64_t>& looks, double alpha, Dd p, Dd q) {
  check_looks(looks);
  if (!(alpha >= 1e-200 && alpha <= 0.5)) throw std::invalid_argument("alpha must be in [1e-200, 1/2]");
  if (!(p.hi > 0.0 && p.hi <= 1.0 && q.hi > 0.0 && q.hi <= 1.0)) throw std::invalid_argument("the probability must be in (0, 1)");
  const double n = static_cast<double>(looks.back()), rare = 1e-13 * alpha;
  std::vector<int64_t> boundary;
  std::vector<double> mass = {1.0}, next;  // of the misses first, first + 1, ... that no look has accepted
  int64_t first = 0, before = 0;
  double spent = 0.0, error = 0.0;
  for (const int64_t t : looks) {
    const MissLaw step = miss_law(t - before, p, q, rare);
    before = t;
    convolve(mass, step.mass, next);
    error += step.error + 1.01 * 0x1p-53 * static_cast<double>(std::min(mass.size(), step.mass.size()) + 4);
    mass.swap(next);
    first += step.first;
    spent += step.below + 1e-290;  // products may fall below the normal numbers
    double cut = 0.0;
    while (mass.size() > 1 && cut + mass.back() <= rare) {
      cut += mass.back();
      mass.pop_back();
    }
    mass.back() += cut;

    const double allowed = t == looks.back() ? alpha : 0.5 * alpha * std::sqrt(static_cast<double>(t) / n);
    error += 0x1p-53 * 8.0;
    size_t accepted = 0;
    const double slack = 1.0 + 1.01 * error + 0x1p-52 * static_cast<double>(mass.size() + 4);
    while (accepted < mass.size() && (spent + mass[accepted]) * slack <= allowed) spent += mass[accepted++];
    error += 0x1p-53 * static_cast<double>(accepted + 4);
    mass.erase(mass.begin(), mass.begin() + static_cast<int64_t>(accepted));
    first += static_cast<int64_t>(accepted);
    boundary.push_back(first - 1);  // what lies below was accepted here or before, or counted as accepted
  }
  return boundary;
}

// b_k: the fewest misses with which look k gives up on ending with at most `most` misses: with probability at most beta a
// run that would end so is given up at any look.  beta = 0 gives up only what has no chance left.
inline std::vector<int64_t> give_up_boundary(const std::vector<int64_t>& looks, int64_t most, double beta) {
  check_looks(looks);
  const int64_t n = looks.back();
  if (!(beta >= 0.0 && beta < 1.0)) throw std::invalid_argument("beta must be in [0, 1)");
  if (most < -1 || most > n) throw std::invalid_argument("the most misses must be in [-1, n]");
  std::vector<int64_t> boundary;
  double before = 0.0;
  for (const int64_t t : looks) {
    const double share = std::sqrt(static_cast<double>(t) / static_cast<double>(n));
    const double allowed = beta * (share - before);
    before = share;
    int64_t fewest = most + 1;
    if (t < n && most >= 0 && allowed > 0.0) {
      // Hypergeometric weights relative to the mode's, from there outwards by their ratios.
      const double N = static_cast<double>(n), K = static_cast<double>(most), T = static_cast<double>(t);
      const int64_t mode = static_cast<int64_t>((T + 1.0) * (K + 1.0) / (N + 2.0));
      double total = 0.0, weight = 1.0;
      for (double j = static_cast<double>(mode); j >= 1.0 && weight > 1e-40; j -= 1.0) {
        weight *= j * (N - K - T + j) / ((K - j + 1.0) * (T - j + 1.0));
        total += weight;
      }
      std::vector<double> up = {1.0};  // of mode, mode + 1, ...
      for (double j = static_cast<double>(mode); up.back() > 1e-40 && j < std::min(K, T); j += 1.0)
        up.push_back(up.back() * (K - j) * (T - j) / ((j + 1.0) * (N - K - T + j + 1.0)));
      for (const double w : up) total += w;
      // The last ratio is far below 1 where the weights were cut off, so the rest is less than the last weight's tenfold.
      double tail = up.back() <= 1e-40 ? 1e-39 : 0.0;
      int64_t candidate = mode + static_cast<int64_t>(up.size());
      while (candidate > mode && (tail + up[static_cast<size_t>(candidate - 1 - mode)]) * 1.000000001 <= allowed * total)
        tail += up[static_cast<size_t>(--candidate - mode)];
      fewest = std::min(fewest, candidate);
    }
    boundary.push_back(fewest);
  }
  return boundary;
}

}  // namespace pacd
