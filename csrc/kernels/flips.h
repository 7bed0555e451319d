// How many label flips a prediction survives: exact Neyman-Pearson tables, and the counts for classifiers that are
// linear in the labels. Everything is rounded so that a count is never too large.
//
// It runs on the host alone and calls libm's log, log1p, pow, exp and erfc: the slack of each bound covers their
// errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "math/double_double.h"

namespace pacd {

// The label noise: a label stays with probability `keep` = 1 - q and becomes each other one with `other` = q / (K - 1).
struct LabelNoise {
  double keep, other;
  int64_t classes;

  LabelNoise(double q, int64_t k) : keep(1.0 - q), other(q / static_cast<double>(k - 1)), classes(k) {
    if (k < 2) throw std::invalid_argument("label flips need at least 2 classes");
    if (!(q >= 1e-300 && keep > other)) throw std::invalid_argument("q must lie in (0, (K - 1) / K) for K classes");
  }
};

// log tau(r) for r = 0, 1, ..., rounded down: r flips cannot change the majority vote of a base classifier that misses
// its class with probability below tau(r). Ends at `r_max`, or with the first entry that is at most `log_smallest`.
//
// Only the r differing labels matter (Neyman-Pearson). Let S be (number of them drawn as given) - (number drawn as
// attacked): mu steps S by +1, -1, 0 with probabilities keep, other, the rest; the attacked measure rho by the mirror
// image; the likelihood ratio mu/rho is (keep/other)^S. So tau(r) = min mu(B) over (randomised) sets B with
// rho(B) >= 1/2 fills rho's mass from the smallest S upwards until 1/2 is reached, at a price (keep/other)^S a unit.
// The minimum is strict: mu(B) < tau(r) gives rho(B) < 1/2, whatever the tie rule.
//
// As a linear program in "how much of the mass at each S", larger capacities only lower the minimum. So rho's masses
// are rounded up (the factor 1 + 2^-50 in the steps covers three roundings and those of the probabilities), and mass
// that is dropped from the ends of the window (below 1e-24 each) is counted as filled at price 0. The window is
// +- 10 standard deviations, sqrt(r) wide: r_max^1.5 steps in all, 0.3 s for r_max = 60 000, against r_max^2 for whole
// convolutions. Prices never leave log space. tau is monotone in r by theory (a test on r labels is one on r + 1), and
// made so.
inline std::vector<double> log_flip_table(const LabelNoise& noise, int64_t r_max, double log_smallest) {
  constexpr double u = 0x1p-53, up = 1.0 + 0x1p-50, dropped_mass = 1e-24;
  const double rest = noise.classes == 2 ? 0.0 : noise.other * static_cast<double>(noise.classes - 2) * up;
  const double down_step = noise.keep * up, up_step = noise.other * up;
  const double log_ratio = std::log1p((noise.keep - noise.other) / noise.other);  // log(keep / other)
  const double log_ratio_error = 8.0 * u * (1.0 + log_ratio);
  const double ratio = noise.other / noise.keep * (1.0 - 0x1p-50);

  std::vector<double> mass = {1.0}, next, table = {std::log(0.5) * (1.0 + 4.0 * u)};
  int64_t first = 0;     // S of mass[0]
  double dropped = 0.0;  // rounded up
  for (int64_t r = 1; r <= r_max && table.back() > log_smallest; ++r) {
    // one more label: the window grows by one on each side, then loses what is negligible
    const int64_t width = static_cast<int64_t>(mass.size());
    next.resize(static_cast<size_t>(width + 2));
    const double* m = mass.data();
    double* out = next.data();
    const auto at = [m, width](int64_t i) { return i >= 0 && i < width ? m[i] : 0.0; };
    for (int64_t j : {int64_t{0}, int64_t{1}, width, width + 1})
      out[j] = fma(down_step, at(j), fma(rest, at(j - 1), up_step * at(j - 2)));
    for (int64_t j = 2; j < width; ++j) out[j] = fma(down_step, m[j], fma(rest, m[j - 1], up_step * m[j - 2]));
    first -= 1;
    size_t begin = 0, end = next.size();
    while (end - begin > 1 && next[begin] < dropped_mass) dropped += next[begin++];
    while (end - begin > 1 && next[end - 1] < dropped_mass) dropped += next[--end];
    dropped = dropped * (1.0 + 0x1p-45) + 1e-290;  // the sums above, and products that fell below the normal numbers
    mass.assign(next.begin() + static_cast<int64_t>(begin), next.begin() + static_cast<int64_t>(end));
    first += static_cast<int64_t>(begin);

    // fill 1/2 from below; `price` is in units of (keep/other)^S at the current S
    const double slack = 1.0 + 2.0 * u * static_cast<double>(mass.size() + 4);
    const double wanted = (0.5 - dropped) * (1.0 - 4.0 * u);
    double filled = 0.0, price = 0.0;
    size_t j = 0;
    while (j + 1 < mass.size() && (filled + mass[j]) * slack < wanted) {
      filled += mass[j];
      price = fma(price, ratio, mass[j]);
      ++j;
    }
    price = fma(price, ratio, std::max(0.0, wanted - filled * slack));
    const double s = static_cast<double>(first + static_cast<int64_t>(j));
    const double log_tau = std::log(price) + s * log_ratio;
    const double error = std::fabs(s) * log_ratio_error + 4.0 * u * std::fabs(log_tau) +
                         4.0 * u * (8.0 - std::log(price)) + 4.0 * u * static_cast<double>(mass.size() + 8);
    table.push_back(price > 0.0 ? std::min(table.back(), log_tau - error) : -INFINITY);
  }
  return table;
}

// Exact and smoothed answers for test points whose vote is sum_i alpha_i s(y_i) - threshold; chernoff.h has the two
// forms (two classes: one vote with threshold 1/2; K classes: one vote per rival of the predicted class).
//
// A flip of label i takes |alpha_i| from a vote (twice that where the winner's label becomes the rival's), so r flips
// take at most the sum of the r largest harms, and the unsmoothed classifier's answer is exact: how many harms it takes
// to cross the threshold. Under label noise every harm shrinks by keep - other, the mean stays linear, and
//     P(vote lost) <= min of
//       Cantelli        v / (v + m^2)
//       Berry-Esseen    Phi(-m / sqrt v) + 0.56 rho / v^1.5     (independent, not identically distributed terms)
//       Bernstein       exp(-m^2 / (2 v + 2 b m / 3))           (only matters where K - 1 rivals are added up)
// with m the attacked mean. Two classes: the variance v does not depend on the labels. K classes: a label of the winner
// or the rival has more variance than any other, so v lies within delta times the sum of the r largest alpha^2 of its
// value under the given labels, and likewise the third moment rho. The prediction stands while the bounds, summed over
// the rivals, stay below 1/2: then the base classifier has its class with probability above 1/2, which makes it the
// most probable one under any tie rule.
//
// Rounding: votes and harms are summed in double-double (2^-103 n relative to sum |alpha|) and rounded outward; the
// sums of squares and cubes are plain, within n 2^-53, and enter through `up` and `down`.
class LinearVote {
 public:
  // smoothed = false: the classifier without label noise, whose answer is exact.
  LinearVote(const int64_t* labels, int64_t count, const LabelNoise& label_noise, bool with_noise)
      : y_(labels), n_(count), classes_(label_noise.classes), smoothed_(with_noise), pair_(label_noise.classes > 2) {
    const double keep = label_noise.keep, other = label_noise.other;
    const double neutral = other * static_cast<double>(classes_ - 2);
    keep_ = keep;
    other_ = other;
    scale_ = smoothed_ ? keep - other + 0x1p-51 : 1.0;
    if (pair_) {  // in formulas without cancellation; 1 - (keep - other) = neutral + 2 other
      const double mean = keep - other;
      inside_ = (keep + other) * neutral + 4.0 * keep * other;
      outside_ = 2.0 * other;
      inside3_ =
          keep * std::pow(neutral + 2.0 * other, 3) + neutral * std::pow(mean, 3) + other * std::pow(1.0 + mean, 3);
      outside3_ = 2.0 * other;
      reach_ = 1.0 + mean;
    } else {
      inside_ = outside_ = keep * other;
      inside3_ = outside3_ = keep * other * (keep * keep + other * other);
      reach_ = keep;
    }
    up_ = 1.0 + 0x1p-52 * static_cast<double>(n_ + 32);
    down_ = 1.0 - 0x1p-52 * static_cast<double>(n_ + 32);
  }

  // The predicted class, and the largest number of flips that provably cannot change it (0 where nothing is proved).
  void solve(const double* alpha, int64_t* prediction, int64_t* flips) {
    *prediction = prepare(alpha);
    *flips = count();
  }

  // What the decision about r flips is made of, per rival: the margin before them, what they take from it, and the
  // bound on losing the noisy vote after them (0 without noise). For the tests.
  struct Bound {
    int64_t rival;
    double margin, harm, miss;
  };
  std::vector<Bound> bounds(const double* alpha, int64_t r) {
    prepare(alpha);
    sort_all();
    std::vector<Bound> out;
    for (Contest& c : contests_) {
      list_harms(c, n_);
      const size_t count = static_cast<size_t>(r);
      const double lost = smoothed_ ? miss(c, next_below(c.margin - c.harm[count]), count) : 0.0;
      out.push_back({c.rival, c.margin, c.harm[count], lost});
    }
    return out;
  }

 private:
  // Votes and contests of a test point; returns the predicted class.
  int64_t prepare(const double* alpha) {
    alpha_ = alpha;
    scores_.assign(static_cast<size_t>(classes_), Dd(0.0));
    squares_.assign(static_cast<size_t>(classes_), 0.0);
    cubes_.assign(static_cast<size_t>(classes_), 0.0);
    double norm = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      const size_t k = static_cast<size_t>(y_[i]);
      const double a = std::fabs(alpha[i]);
      scores_[k] = scores_[k] + Dd(alpha[i]);
      squares_[k] += a * a;
      cubes_[k] += a * a * a;
      norm += a;
    }
    const double doubt = (norm + 1.0) * (0x1p-103 * static_cast<double>(n_ + 8) + (smoothed_ ? 0x1p-50 : 0.0));
    contests_.clear();
    int64_t best = 0;
    if (pair_) {
      for (int64_t k = 1; k < classes_; ++k)
        if (score(best) < score(k)) best = k;
      for (int64_t k = 0; k < classes_; ++k)
        if (k != best)
          contests_.push_back(contest(best, k, (score(best) - score(k)) * Dd(smoothed_ ? keep_ - other_ : 1.0), doubt));
    } else {
      const Dd mean = smoothed_ ? score(1) * Dd(keep_) + score(0) * Dd(other_) : score(1);
      const Dd vote = mean - Dd(0.5);
      best = vote < Dd(0.0) ? 0 : 1;
      contests_.push_back(contest(best, 1 - best, best == 1 ? vote : -vote, doubt));
    }
    return best;
  }

  struct Sized {
    double size;
    int64_t index;
  };
  struct Larger {
    bool operator()(const Sized& a, const Sized& b) const { return a.size > b.size; }
  };
  struct Contest {
    int64_t winner, rival;
    double margin;             // of the vote, or of its mean under label noise; rounded down
    double variance, third;    // sum alpha^2 Var s, sum |alpha|^3 E|s - E s|^3 under the given labels
    std::vector<double> harm;  // harm[r]: what the r worst flips take from the margin, rounded up
  };

  Dd score(int64_t k) const { return scores_[static_cast<size_t>(k)]; }

  Contest contest(int64_t winner, int64_t rival, Dd margin, double doubt) const {
    Contest out{winner, rival, next_below(margin.hi - doubt), 0.0, 0.0, {}};
    for (int64_t k = 0; k < classes_; ++k) {
      const bool in = k == winner || k == rival;
      out.variance += squares_[static_cast<size_t>(k)] * (in ? inside_ : outside_);
      out.third += cubes_[static_cast<size_t>(k)] * (in ? inside3_ : outside3_);
    }
    return out;
  }

  // What the worst new label of point i takes from a contest, in units of |alpha_i|.
  int weight(int64_t i, const Contest& c) const {
    const bool positive = alpha_[i] > 0.0;
    if (!pair_) return (y_[i] == 1) == (positive == (c.winner == 1)) ? 1 : 0;
    if (y_[i] == (positive ? c.rival : c.winner)) return 0;
    return y_[i] == (positive ? c.winner : c.rival) ? 2 : 1;
  }

  void list_sizes() {
    order_.resize(static_cast<size_t>(n_));
    for (int64_t i = 0; i < n_; ++i) order_[static_cast<size_t>(i)] = {std::fabs(alpha_[i]), i};
  }

  void sort_all() {
    list_sizes();
    std::sort(order_.begin(), order_.end(), Larger());
    sum_powers(n_);
  }

  int64_t count() {
    for (const Contest& c : contests_)
      if (!(c.margin > 0.0)) return 0;
    list_sizes();
    // Few answers need more than the largest influences in order: 1024 of them, then 8 times as many, ...
    for (int64_t top = std::min<int64_t>(n_, 1024), sorted = 0;; sorted = top, top = std::min<int64_t>(n_, 8 * top)) {
      if (top < n_) std::nth_element(order_.begin() + sorted, order_.begin() + top, order_.end(), Larger());
      std::sort(order_.begin() + sorted, order_.begin() + top, Larger());
      int64_t known = top;
      for (Contest& c : contests_) known = std::min(known, list_harms(c, top));
      if (smoothed_) sum_powers(top);
      if (stands(known)) {
        if (top == n_) return n_;
        continue;
      }
      int64_t good = -1, bad = known;  // stands() is monotone
      while (bad - good > 1) {
        const int64_t middle = good + (bad - good) / 2;
        (stands(middle) ? good : bad) = middle;
      }
      return std::max<int64_t>(good, 0);
    }
  }

  // c.harm[0..known] from the `top` largest influences, as far as nothing outside them could come first.
  int64_t list_harms(Contest& c, int64_t top) {
    single_.clear();
    twice_.clear();
    for (int64_t j = 0; j < top; ++j) {
      const Sized& item = order_[static_cast<size_t>(j)];
      const int w = weight(item.index, c);
      if (w == 1) single_.push_back(item.size);
      if (w == 2) twice_.push_back(2.0 * item.size);
    }
    merged_.resize(single_.size() + twice_.size());
    std::merge(single_.begin(), single_.end(), twice_.begin(), twice_.end(), merged_.begin(), std::greater<double>());
    const bool whole = top == n_;
    const double outside = whole ? 0.0 : (pair_ ? 2.0 : 1.0) * order_[static_cast<size_t>(top - 1)].size;
    c.harm.assign(1, 0.0);
    Dd total(0.0);
    for (double harm : merged_) {
      if (harm < outside) break;
      total = total + Dd(harm);
      c.harm.push_back(next_above(smoothed_ ? next_above(total.hi) * scale_ : total.hi));
    }
    if (whole) c.harm.resize(static_cast<size_t>(n_ + 1), c.harm.back());
    return static_cast<int64_t>(c.harm.size()) - 1;
  }

  void sum_powers(int64_t top) {
    top_squares_.assign(1, 0.0);
    top_cubes_.assign(1, 0.0);
    for (int64_t j = 0; j < top; ++j) {
      const double a = order_[static_cast<size_t>(j)].size;
      top_squares_.push_back(top_squares_.back() + a * a);
      top_cubes_.push_back(top_cubes_.back() + a * a * a);
    }
  }

  bool stands(int64_t r) const {
    double missed = 0.0;
    for (const Contest& c : contests_) {
      const double margin = next_below(c.margin - c.harm[static_cast<size_t>(r)]);
      if (!(margin > 0.0)) return false;
      if (smoothed_) missed += miss(c, margin, static_cast<size_t>(r));
    }
    return missed * (1.0 + 0x1p-40) < 0.5;
  }

  // An upper bound on the probability that the noisy vote of c is lost once r labels are flipped.
  double miss(const Contest& c, double margin, size_t r) const {
    const double shift = (inside_ - outside_) * top_squares_[r];
    const double most = (c.variance + shift) * up_, least = c.variance * down_ - shift * up_;
    const double third = (c.third + std::fabs(inside3_ - outside3_) * top_cubes_[r]) * up_;
    const double square = margin * margin;
    double bound = most / (most + square);
    bound = std::min(bound, std::exp(-square / (2.0 * most + reach_ * order_[0].size * margin * (2.0 / 3.0))));
    if (least > 0.0)
      bound =
          std::min(bound, 0.5 * std::erfc(margin / std::sqrt(2.0 * most)) + 0.56 * third / (least * std::sqrt(least)));
    return bound * (1.0 + 0x1p-40);  // far above the few ULPs of the lines before, and 2^-43 of exp and erfc
  }

  const int64_t* y_;
  int64_t n_, classes_;
  bool smoothed_, pair_;
  double keep_, other_, scale_, inside_, outside_, inside3_, outside3_, reach_, up_, down_;
  const double* alpha_ = nullptr;
  std::vector<Dd> scores_;
  std::vector<double> squares_, cubes_, single_, twice_, merged_, top_squares_, top_cubes_;
  std::vector<Contest> contests_;
  std::vector<Sized> order_;
};

// LinearVote for `rows` test points, alpha[rows, n], on `threads` threads.
inline void linear_flips(const double* alpha, int64_t rows, const int64_t* y, int64_t n, const LabelNoise& noise,
                         bool smoothed, int64_t* prediction, int64_t* flips, int threads) {
  const auto work = [&](int64_t begin, int64_t end) {
    LinearVote vote(y, n, noise, smoothed);
    for (int64_t row = begin; row < end; ++row) vote.solve(alpha + row * n, prediction + row, flips + row);
  };
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<std::thread> pool;
  for (int64_t k = 1; k < parts; ++k) pool.emplace_back(work, rows * k / parts, rows * (k + 1) / parts);
  work(0, rows / parts);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace pacd
