// When an image is decided, and what its certificate says: a pure function of its votes up to each look.
//
// Looks are at fixed numbers of estimation samples; no rule ever sees a batch, a device or another image.  A void sample
// (one that the noise could not draw) is a miss for the selected class A and a hit for every rival.
//
//   FullCertificates    all n samples and one Clopper-Pearson bound; who cannot be certified any more stops early
//   SequentialRadii     the largest of some radii, or the radius within a tolerance, by group-sequential tests
//   SequentialPredict   the class of the smoothed classifier, by bets against every rival
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "math/betting.h"
#include "math/group_sequential.h"
#include "math/radius.h"

namespace pacd {

// What an image ends with.  `counts` are the votes of the first `counted` estimation samples: those that the certificate
// is issued on, which the last `samples` - `counted` only failed to improve.
struct Outcome {
  int64_t prediction = -1, selected = -1;
  double radius = 0.0, p_lower = 0.0, rival_upper = 1.0;
  int64_t samples = 0, counted = 0, voids = 0;
  std::vector<int64_t> selection, counts;
};

// An image on its way: votes so far, and what the rule has concluded from the looks so far.
struct Progress {
  std::vector<int64_t> selection, votes;
  int64_t voids = 0, samples = 0, selected = -1;
  int64_t open = INT64_MAX, rival_open = INT64_MAX;  // SequentialRadii: the first claim that was given up
  Outcome outcome;

  int64_t misses() const { return samples - votes[static_cast<size_t>(selected)]; }
  int64_t rival() const {  // the most that any other class can have got
    int64_t most = 0;
    for (size_t c = 0; c < votes.size(); ++c)
      if (static_cast<int64_t>(c) != selected) most = std::max(most, votes[c]);
    return most + voids;
  }
};

class Rule {
 public:
  Rule(int64_t n0, std::vector<int64_t> looks, double alpha) : n0_(n0), looks_(std::move(looks)), alpha_(alpha) {
    check_looks(looks_);
    if (n0 < 1) throw std::invalid_argument("n0 must be positive");
    if (!in_range(0, n(), alpha)) throw std::invalid_argument("alpha must be in [1e-200, 1 - 2^-20]");
  }
  virtual ~Rule() = default;
  int64_t n0() const { return n0_; }
  int64_t n() const { return looks_.back(); }
  const std::vector<int64_t>& looks() const { return looks_; }

  // The n0 selection samples: the class is chosen, the lowest among equals.
  void select(Progress& image, const int64_t* votes, int64_t classes) const {
    image.selection.assign(votes, votes + classes);
    image.votes.assign(static_cast<size_t>(classes), 0);
    image.selected = std::max_element(votes, votes + classes) - votes;
  }

  // The votes of the samples between look k - 1 and look k.  True where the image is decided; its outcome is complete.
  bool look(Progress& image, size_t k, const int64_t* votes, int64_t voids) const {
    for (size_t c = 0; c < image.votes.size(); ++c) image.votes[c] += votes[c];
    image.voids += voids;
    image.samples = looks_[k];
    const bool done = decide(image, k) || k + 1 == looks_.size();
    Outcome& outcome = image.outcome;
    if (outcome.prediction < 0) record(image);  // nothing was issued: the votes are those that it abstains on
    outcome.samples = image.samples;
    if (done) outcome.selection = image.selection;
    return done;
  }

  // What the votes of the first `counted` samples alone are worth: every certificate rests on a single look, so this says
  // again what an outcome with these counts says.
  Outcome issue(const int64_t* selection, const int64_t* votes, int64_t voids, int64_t classes) const {
    int64_t counted = voids;
    for (int64_t c = 0; c < classes; ++c) counted += votes[c];
    const auto at = std::find(looks_.begin(), looks_.end(), counted);
    if (at == looks_.end()) throw std::invalid_argument("the votes add up to " + std::to_string(counted) + ", where nothing looks");
    Progress image;
    select(image, selection, classes);
    look(image, static_cast<size_t>(at - looks_.begin()), votes, voids);
    image.outcome.selection = image.selection;
    return image.outcome;
  }

 protected:
  virtual bool decide(Progress& image, size_t k) const = 0;

  void record(Progress& image) const {
    image.outcome.selected = image.selected;
    image.outcome.counts = image.votes;
    image.outcome.counted = image.samples;
    image.outcome.voids = image.voids;
  }

  // The hope of A to end ahead of a rival that is ahead now is lost: if A were ahead at the end, then among the samples
  // that fell on either, A would have this few so far with probability at most exp(-s KL(share of A || 1/2)) (Chernoff,
  // for draws without replacement Hoeffding 1963).  Over all looks and rivals this errs with probability at most `level`.
  bool behind(const Progress& image, double level) const {
    const int64_t ours = image.votes[static_cast<size_t>(image.selected)], theirs = image.rival() - image.voids;
    if (theirs - ours >= n() - image.samples) return true;
    if (!(level > 0.0) || ours >= theirs) return false;
    const double sum = static_cast<double>(ours + theirs);
    const Dd entropy = [&] {
      Dd h(0.0);
      for (const int64_t count : {ours, theirs})
        if (count > 0) h = h - Dd(static_cast<double>(count)) * log(Dd(static_cast<double>(count) / sum));
      return h;
    }();
    const Dd log2(6.931471805599452862e-01, 2.319046813846299558e-17);
    const double chances = static_cast<double>(looks_.size()) * static_cast<double>(image.votes.size());
    return (Dd(sum) * log2 - entropy).hi >= log(Dd(chances / level)).hi * (1.0 + 1e-12);
  }

  const int64_t n0_;
  const std::vector<int64_t> looks_;
  const double alpha_;
};

// CERTIFY of Cohen et al. 2019 on all n samples.  sides = 1: radius sigma Phi^-1(p), p the Clopper-Pearson lower bound of
// A's probability at level alpha.  sides = 2: two_sided_radius of that bound at alpha / 2 and the upper bound of the most
// frequent rival at alpha / 2 (the bound rises with the count, so it covers the true runner-up, whichever that is).
//
// Certificates come from the fixed-n test alone, so they are the same with and without giving up, and giving up costs
// power alone: an image that all n samples would certify is lost with probability at most `futility` (give_up_boundary,
// whatever its p; `behind` for two sides).  futility = 0: one look, at n.
class FullCertificates : public Rule {
 public:
  FullCertificates(int64_t n0, int64_t n, double alpha, double sigma, int sides, double futility)
      : Rule(n0, look_schedule(n, futility > 0.0 ? 32 : std::max<int64_t>(n, 1)), alpha),
        sigma_(sigma),
        sides_(sides),
        futility_(futility) {
    if (sides != 1 && sides != 2) throw std::invalid_argument("sides must be 1 or 2");
    if (!(sigma > 0.0 && std::isfinite(sigma))) throw std::invalid_argument("sigma must be positive and finite");
    if (!(futility >= 0.0 && futility < 1.0)) throw std::invalid_argument("futility must be in [0, 1)");
    if (sides == 2) return;
    int64_t none = 0, all = n + 1;  // the fewest hits with a bound above 1/2, by bisection: the bound rises with the hits
    while (none + 1 < all) {
      const int64_t hits = none + (all - none) / 2;
      (clopper_pearson_lower(hits, n, alpha) > 0.5 ? all : none) = hits;
    }
    give_up_ = give_up_boundary(looks_, n - all, futility);
  }

 protected:
  bool decide(Progress& image, size_t k) const override {
    if (image.samples < n()) return sides_ == 1 ? image.misses() >= give_up_[k] : behind(image, futility_);
    const int64_t hits = n() - image.misses();
    record(image);
    Outcome& outcome = image.outcome;
    if (sides_ == 1) {
      outcome.p_lower = clopper_pearson_lower(hits, n(), alpha_);
      if (outcome.p_lower > 0.5) {
        outcome.prediction = image.selected;
        outcome.radius = std::max(0.0, product_down(sigma_, normal_quantile(outcome.p_lower, false)));
      }
    } else {
      outcome.p_lower = clopper_pearson_lower(hits, n(), 0.5 * alpha_);
      outcome.rival_upper = clopper_pearson_upper(image.rival(), n(), 0.5 * alpha_);
      outcome.radius = two_sided_radius(sigma_, outcome.p_lower, outcome.rival_upper);
      if (outcome.radius > 0.0) outcome.prediction = image.selected;
    }
    return true;
  }

 private:
  const double sigma_;
  const int sides_;
  const double futility_;
  std::vector<int64_t> give_up_;
};

// Tests of "a miss has probability below q_i", q_1 > q_2 > ..., on the same samples, as columns by look.
class Tests {
 public:
  // p, q: each claim's probability of a hit and of a miss, p + q = 1.  beta: the share of acceptances given up.
  Tests(const std::vector<int64_t>& looks, double alpha, const std::vector<std::pair<Dd, Dd>>& claims, double beta)
      : size_(claims.size()), accept_(looks.size() * size_), give_up_(accept_.size()) {
    std::vector<std::vector<int64_t>> accept(size_), give_up(size_);
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i = next++; i < size_; i = next++) {
        accept[i] = acceptance_boundary(looks, alpha, claims[i].first, claims[i].second);
        give_up[i] = give_up_boundary(looks, accept[i].back(), beta);
      }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < std::min<size_t>(size_, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
    for (size_t k = 0; k < looks.size(); ++k) {
      for (size_t i = 0; i < size_; ++i) {
        const size_t at = k * size_ + i;
        accept_[at] = i > 0 ? std::min(accept[i][k], accept_[at - 1]) : accept[i][k];
        give_up_[at] = i > 0 ? std::min(give_up[i][k], give_up_[at - 1]) : give_up[i][k];
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(size_); }
  // How many of the claims look k accepts: the first so many.
  int64_t accepted(size_t k, int64_t misses) const { return first(accept_, k, [=](int64_t a) { return misses > a; }); }
  // The first claim that look k gives up; size() if none.
  int64_t given_up(size_t k, int64_t misses) const { return first(give_up_, k, [=](int64_t b) { return misses >= b; }); }
  int64_t accept(size_t k, int64_t claim) const { return accept_[k * size_ + static_cast<size_t>(claim)]; }
  int64_t give_up(size_t k, int64_t claim) const { return give_up_[k * size_ + static_cast<size_t>(claim)]; }

 private:
  template <class Beyond>
  int64_t first(const std::vector<int64_t>& table, size_t k, Beyond beyond) const {
    const auto begin = table.begin() + static_cast<int64_t>(k * size_);
    return std::partition_point(begin, begin + size(), [&](int64_t bound) { return !beyond(bound); }) - begin;
  }

  size_t size_;
  std::vector<int64_t> accept_, give_up_;
};

// The largest of `radii` that is certified, or, where there are none, the radius within `tolerance`.
//
// sides = 1: one test for each radius at level alpha (for each step of tolerance / 8), see group_sequential.h for why the
// largest accepted one errs with probability at most alpha.  sides = 2: tests of A's probability on a grid of Phi^-1 at
// level alpha / 2, tests of the rivals' likewise; what has been accepted at a look makes p_lower and rival_upper, each of
// them wrong at any look with probability at most alpha / 2.  The count of the most frequent rival decides: a claim that
// is false for the true runner-up needs even fewer votes of that one.
//
// An image stops when nothing larger can be issued any more: each test gives up on a share of at most kGiveUp of the
// runs that it would accept at n.
class SequentialRadii : public Rule {
 public:
  static constexpr double kGiveUp = 0.05, kStep = 0.01, kLeast = -2.0, kSteps = 8.0;

  SequentialRadii(int64_t n0, int64_t n, double alpha, double sigma, std::vector<double> radii, double tolerance, int sides)
      : Rule(n0, look_schedule(n, 32), alpha), sigma_(sigma), radii_(std::move(radii)), tolerance_(tolerance), sides_(sides) {
    if (sides != 1 && sides != 2) throw std::invalid_argument("sides must be 1 or 2");
    if (!(sigma > 0.0 && std::isfinite(sigma))) throw std::invalid_argument("sigma must be positive and finite");
    if (!(alpha <= 0.5)) throw std::invalid_argument("alpha must be at most 1/2 to stop early");
    const bool grid = radii_.empty();
    if (grid && !(tolerance > 0.0)) throw std::invalid_argument("give radii or a positive tolerance");
    for (size_t i = 0; i < radii_.size(); ++i)
      if (!(radii_[i] >= 0.0 && (i == 0 || radii_[i] > radii_[i - 1])))
        throw std::invalid_argument("radii must not be negative and must rise");
    const double level = sides == 1 ? alpha : 0.5 * alpha;
    const double step = (grid ? tolerance / (kSteps * sigma) : kStep) * (1.0 + 0x1p-40);
    const double most = normal_quantile(clopper_pearson_lower(n, n, level), false);
    if (!(most > 0.0))
      throw std::invalid_argument("n = " + std::to_string(n) + " is too small to certify anything at alpha = " + std::to_string(alpha));
    if ((most - kLeast) / step > 4096.0) {
      const double least = (most - kLeast) * kSteps / 4096.0 * sigma;
      throw std::invalid_argument("tolerance must be at least " + std::to_string(least) + " at this sigma, n and alpha");
    }

    std::vector<std::pair<Dd, Dd>> claims, rival_claims;
    const auto add = [&](double p, double z) {
      claims.emplace_back(Dd(p), two_sum(1.0, -p));
      lower_.push_back(p);
      lower_z_.push_back(z);
    };
    if (sides == 1 && !grid) {
      for (const double r : radii_) {
        const double p = radius_target(sigma, r);
        if (!(p < 1.0)) throw too_large(r, level);
        add(p, normal_quantile(p, false));
      }
    } else {
      // Phi in double-double is arithmetic alone, so the grid has the same bits everywhere.  A trifle more than whole steps:
      // rounded down, a radius that is a whole number of steps is then still reached.
      for (int64_t i = sides == 1 ? 0 : -static_cast<int64_t>(-kLeast / step); static_cast<double>(i) * step <= most; ++i) {
        const double z = static_cast<double>(i) * step;
        const Dd half = normal_from_centre(Dd(std::fabs(z)));
        const double p = (z < 0.0 ? Dd(0.5) - half : Dd(0.5) + half).hi;
        add(p, normal_quantile(p, false));
      }
    }
    for (int64_t i = 0; sides == 2 && static_cast<double>(i) * step <= most; ++i) {
      const double q = (Dd(0.5) - normal_from_centre(Dd(static_cast<double>(i) * step))).hi;
      rival_claims.emplace_back(two_sum(1.0, -q), Dd(q));
      upper_.push_back(q);
      upper_z_.push_back(normal_quantile(q, true));
    }
    tests_.emplace_back(looks_, level, claims, kGiveUp);
    if (sides == 2) tests_.emplace_back(looks_, level, rival_claims, kGiveUp);
    const size_t last = looks_.size() - 1;
    if (!grid && radius(tests_[0].accepted(last, 0), sides == 2 ? tests_[1].accepted(last, 0) : 0) < radii_.back())
      throw too_large(radii_.back(), level);
  }

  const Tests& tests(bool rival) const { return tests_.at(rival ? 1 : 0); }
  const std::vector<double>& claims(bool rival) const { return rival ? upper_ : lower_; }

 protected:
  bool decide(Progress& image, size_t k) const override {
    const int64_t misses = image.misses(), rival = sides_ == 2 ? image.rival() : 0;
    const int64_t accepted = tests_[0].accepted(k, misses);
    const int64_t rival_accepted = sides_ == 2 ? tests_[1].accepted(k, rival) : 0;
    image.open = std::min(image.open, tests_[0].given_up(k, misses));
    if (sides_ == 2) image.rival_open = std::min(image.rival_open, tests_[1].given_up(k, rival));

    Outcome& outcome = image.outcome;
    const double now = issued(radius(accepted, rival_accepted));
    if (now > (outcome.prediction < 0 ? -1.0 : outcome.radius)) {
      record(image);
      outcome.prediction = image.selected;
      outcome.radius = now;
      outcome.p_lower = lower_[static_cast<size_t>(accepted - 1)];
      outcome.rival_upper = rival_accepted > 0 ? upper_[static_cast<size_t>(rival_accepted - 1)] : 1.0;
    }
    const int64_t open = std::min(image.open, tests_[0].size());
    const double reach = issued(radius(open, sides_ == 2 ? std::min(image.rival_open, tests_[1].size()) : 0));
    // On a grid the radius may lie up to a step beyond the last claim that is still open.
    return reach <= (outcome.prediction < 0 ? -1.0 : outcome.radius) + (radii_.empty() ? (1.0 - 1.0 / kSteps) * tolerance_ : 0.0);
  }

 private:
  // The last look of a test at `level` has at least level / 2 left, so a radius up to this one can be certified.
  std::invalid_argument too_large(double radius, double level) const {
    const double largest = product_down(sigma_, normal_quantile(clopper_pearson_lower(n(), n(), 0.5 * level), false));
    return std::invalid_argument("radius " + std::to_string(radius) + " cannot be certified with n = " + std::to_string(n()) +
                                 ", alpha = " + std::to_string(alpha_) + ": radii up to " +
                                 std::to_string(std::max(0.0, largest)) + " can");
  }

  // The radius when the first `count` claims and rival claims hold; -1 where no lead follows.
  double radius(int64_t count, int64_t rival_count) const {
    if (count == 0) return -1.0;
    const double z = lower_z_[static_cast<size_t>(count - 1)];
    if (sides_ == 1) return product_down(sigma_, z);
    const double r = radius_between(sigma_, z, rival_count > 0 ? upper_z_[static_cast<size_t>(rival_count - 1)] : -z);
    return r > 0.0 ? r : -1.0;
  }

  double issued(double r) const {  // what is issued of a radius: the largest given one; -1 where there is none
    if (radii_.empty() || r < 0.0) return r;
    const auto above = std::upper_bound(radii_.begin(), radii_.end(), r);
    return above == radii_.begin() ? -1.0 : *(above - 1);
  }

  const double sigma_;
  const std::vector<double> radii_;
  const double tolerance_;
  const int sides_;
  std::vector<double> lower_, lower_z_, upper_, upper_z_;
  std::vector<Tests> tests_;
};

// PREDICT: the class of the smoothed classifier, wrong with probability at most alpha; abstains where n samples do not tell.
//
// For each rival, the samples that fell on A or on it are bets against "A is not the more probable of the two" (betting.h,
// p = 1/2).  A is predicted once it has won against every rival: the truly most probable class, were it not A, is one of
// them, so no union bound is needed.  The bet against the most frequent rival decides: log wealth is convex in a rival's
// votes and at most 0 where they equal A's, so below that it falls with them.  The last look adds the exact binomial test.
// Each has alpha / 2.  The prior is from the selection samples: A's votes and the runner-up's.
class SequentialPredict : public Rule {
 public:
  SequentialPredict(int64_t n0, int64_t n, double alpha, double futility)
      : Rule(n0, look_schedule(n, 8), alpha), futility_(futility) {
    if (!(alpha >= 2e-200)) throw std::invalid_argument("alpha must be at least 2e-200");
    if (!(futility >= 0.0 && futility < 1.0)) throw std::invalid_argument("futility must be in [0, 1)");
  }

 protected:
  bool decide(Progress& image, size_t k) const override {
    const size_t a = static_cast<size_t>(image.selected);
    const int64_t ours = image.votes[a], theirs = image.rival();
    record(image);
    if (ours > theirs) {
      int64_t second = 0;
      for (size_t c = 0; c < image.selection.size(); ++c)
        if (c != a) second = std::max(second, image.selection[c]);
      const BettingPrior prior{image.selection[a], image.selection[a] + second};
      const bool bet = possible(ours, theirs) && betting_reaches(ours, ours + theirs, 0.5, 0.5 * alpha_, prior);
      const bool last = k + 1 == looks_.size() && clopper_pearson_lower(ours, ours + theirs, 0.5 * alpha_) >= 0.5;
      if (bet || last) image.outcome.prediction = image.selected;
      return bet || last;
    }
    return behind(image, futility_);
  }

 private:
  // No bet can have won more than the one that knew the outcome: a quick no, well clear of what any prior reaches.
  bool possible(int64_t ours, int64_t theirs) const {
    const double a = static_cast<double>(ours), b = static_cast<double>(theirs), s = a + b;
    return a * std::log(2.0 * a / s) + (theirs > 0 ? b * std::log(2.0 * b / s) : 0.0) >= -std::log(0.5 * alpha_) - 1e-6;
  }

  const double futility_;
};

}  // namespace pacd
