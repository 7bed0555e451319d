// Evidence for lattice.h, for its tests: float's error over all words, and cells against double-double arithmetic.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "math/double_double.h"
#include "math/lattice.h"

namespace pacd {

// Runs body(chunk) for chunk = 0, 1, ..., chunks - 1 on some threads and returns what `merge` makes of their results.
template <class Result, class Body, class Merge>
Result over_threads(int64_t chunks, int threads, Body body, Merge merge) {
  std::vector<Result> results(std::max(threads, 1));
  std::atomic<int64_t> next{0};
  auto work = [&](Result* result) {
    for (int64_t chunk = next.fetch_add(1); chunk < chunks; chunk = next.fetch_add(1)) merge(*result, body(chunk));
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < results.size(); ++i) others.emplace_back(work, &results[i]);
  work(&results[0]);
  for (std::thread& thread : others) thread.join();
  for (size_t i = 1; i < results.size(); ++i) merge(results[0], results[i]);
  return results[0];
}

// The worst of |float radius - radius|, for every value of the unread digits, and of the bound on |z - Z| that follows,
// over the radius words first, first + stride, ..., last.  The radius falls from one end of a word's interval to the other.
struct RadiusErrors {
  double radius = 0.0, number = 0.0;
};

PACD_CLONES inline RadiusErrors radius_errors(uint64_t first, uint64_t last, uint64_t stride) {
  constexpr double slack = 1e-13;  // of exact_radius and of half a unit in its 64th digit
  double worst = 0.0, worst_number = 0.0;
  for (uint64_t word = first; word <= last; word += stride) {
    const double found = box_muller_radius(static_cast<uint32_t>(word));
    const double high = exact_radius(word << 32), low = exact_radius((word << 32) + 0xFFFFFFFFu);
    const double error = std::max(std::fabs(found - high), std::fabs(found - low)) + slack;
    worst = std::max(worst, error);
    worst_number = std::max(worst_number, error + high * angle_error + found * 0x1p-24);
  }
  return {worst, worst_number};
}

inline RadiusErrors radius_errors(uint64_t first, uint64_t last, uint64_t stride, int threads) {
  const uint64_t words = (last - first) / stride + 1, chunk = 1 << 16;
  return over_threads<RadiusErrors>(
      static_cast<int64_t>((words + chunk - 1) / chunk), threads,
      [&](int64_t i) {
        const uint64_t begin = first + static_cast<uint64_t>(i) * chunk * stride;
        return radius_errors(begin, std::min(last, begin + (chunk - 1) * stride), stride);
      },
      [](RadiusErrors& into, const RadiusErrors& from) {
        into = {std::max(into.radius, from.radius), std::max(into.number, from.number)};
      });
}

// Likewise the worst of float's sine and cosine over the angle words with `eighth` as their first three digits, and the
// largest of their sizes.
struct AngleErrors {
  double error = 0.0, size = 0.0;
};

PACD_CLONES inline AngleErrors angle_errors(uint32_t eighth, uint32_t first, uint32_t last, uint32_t stride) {
  constexpr double slack = 1e-14;  // of exact_circle and of half a unit in its 61st digit
  double worst = 0.0, size = 0.0;
  for (uint64_t place = first; place <= last; place += stride) {
    const uint32_t word = eighth << 29 | static_cast<uint32_t>(place);
    const SinCos found = sincos_uniform(word);
    for (const uint32_t further : {0u, 0xFFFFFFFFu}) {
      worst = std::max({worst, std::fabs(found.sin - exact_circle(word, further, true)) + slack,
                        std::fabs(found.cos - exact_circle(word, further, false)) + slack});
    }
    size = std::max({size, std::fabs(static_cast<double>(found.sin)), std::fabs(static_cast<double>(found.cos))});
  }
  return {worst, size};
}

inline AngleErrors angle_errors(uint32_t eighth, uint32_t stride, int threads) {
  constexpr uint32_t words = 1u << 29;
  const uint32_t chunk = 1u << 16, wanted = (words - 1) / stride + 1;
  return over_threads<AngleErrors>(
      (wanted + chunk - 1) / chunk, threads,
      [&](int64_t i) {
        const uint64_t begin = static_cast<uint64_t>(i) * chunk * stride, end = begin + uint64_t{chunk - 1} * stride;
        return angle_errors(eighth, static_cast<uint32_t>(begin), static_cast<uint32_t>(std::min<uint64_t>(words - 1, end)), stride);
      },
      [](AngleErrors& into, const AngleErrors& from) {
        into = {std::max(into.error, from.error), std::max(into.size, from.size)};
      });
}

// --- Cells against double-double --------------------------------------------------------------------------------------

// (x - offset) / step + sigma / step * Z to about 90 digits: Z from the 64 digits and 32 random ones more, of each word.
PACD_INLINE Dd reference_sum(double x, double sigma, double step, double offset, const uint32_t (&radius)[3], const uint32_t (&angle)[3],
                             bool sine) {
  const Dd u = Dd(radius[0] * 0x1p-32) + Dd(radius[1] * 0x1p-64) + Dd((radius[2] + 0.5) * 0x1p-96);
  const Dd square = Dd(-2.0) * log(u);
  const double start = std::sqrt(square.hi);
  const Dd r = Dd(start) + (square - Dd(start) * Dd(start)) / Dd(2.0 * start);
  const Dd pi_quarter(0.78539816339744827900, 3.06161699786838301793e-17);
  const Dd turn = Dd((angle[0] & 0x1FFFFFFFu) * 0x1p-29) + Dd(angle[1] * 0x1p-61) + Dd((angle[2] + 0.5) * 0x1p-93);
  const Dd v = turn * pi_quarter, v2 = v * v;
  const bool swap = angle[0] & 0x20000000u;
  const bool want_sine = sine != swap;
  Dd term = want_sine ? v : Dd(1.0), value = term;  // Taylor's series; 0.79^30 / 30! is below 2^-117
  for (int k = want_sine ? 2 : 1; k < 30; k += 2) {
    term = -(term * v2) / Dd(static_cast<double>(k * (k + 1)));
    value = value + term;
  }
  if (angle[0] & (sine ? 0x80000000u : 0x40000000u)) value = -value;
  return (Dd(x) - Dd(offset)) / Dd(step) + Dd(sigma) / Dd(step) * (r * value);
}

PACD_INLINE double nearest(Dd sum) {
  const double k = std::nearbyint(sum.hi);
  const Dd rest = sum - Dd(k);
  return rest.hi > 0.5 ? k + 1.0 : rest.hi < -0.5 ? k - 1.0 : k;
}

struct CellErrors {
  int64_t cells = 0;        // looked at
  int64_t open = 0;         // left open by the quick decision
  int64_t near = 0;         // would be void if the exact decision's error were 2^20 times as large
  int64_t voids = 0;        // left open by the exact decision too
  int64_t wrong_quick = 0;  // decided quickly, but another cell
  int64_t wrong_exact = 0;  // decided exactly, but another cell
  double quick_share = 0.0, exact_share = 0.0;  // the largest |t - T| in units of what it is bounded by
};

// The cells of elements 0, 1, ... of one sample.  What is decided quickly is compared in double, whose error here is far
// below 1e-9, and in double-double where that is too near a cell's end; what is decided exactly, in double-double.
inline CellErrors cell_errors(const Lattice& lattice, const float* x, int64_t elements, float sigma, const NoiseKey& key) {
  CellErrors found;
  NoiseKey beyond = key, deeper = key;
  beyond.stream |= further_digits;
  deeper.stream = 0xFFFF;
  for (int64_t e = 0; e < elements; ++e) {
    const int64_t lane = e % tile_lanes, word = e % tile_size / tile_lanes;
    const uint32_t block = static_cast<uint32_t>(e / tile_size * tile_lanes + lane);
    const Words w = random_words(key, block), v = random_words(beyond, block);
    const bool sine = word % 2, second = word / 2;
    const uint32_t radius = second ? w.w2 : w.w0, angle = second ? w.w3 : w.w1;
    const uint32_t radius_further = second ? v.w2 : v.w0, angle_further = second ? v.w3 : v.w1;
    const uint64_t digits = static_cast<uint64_t>(radius) << 32 | radius_further;
    const NormalPair pair = BoundedBoxMuller::pair(radius, angle);
    const Place place = place_of(lattice, x[e]);
    const float t = quick_sum(lattice, static_cast<float>(place.part), sine ? pair.second : pair.first), j = round_whole(t);
    const bool open = is_open(lattice, t, j);
    const auto reference = [&] {
      const Words rest = random_words(deeper, static_cast<uint32_t>(e));
      return reference_sum(x[e], sigma, lattice.step, lattice.offset, {radius, radius_further, rest.w0}, {angle, angle_further, rest.w1}, sine);
    };
    ++found.cells;
    found.open += open;
    if (!open) {
      const double u = static_cast<double>(digits) * 0x1p-64;
      const double v29 = ((angle & 0x1FFFFFFFu) + angle_further * 0x1p-32) * (0.78539816339744830962 / (1 << 29));
      const double turn = sine != static_cast<bool>(angle & 0x20000000u) ? std::sin(v29) : std::cos(v29);
      const double z = std::sqrt(-2.0 * (u > 0.5 ? std::log1p(-(static_cast<double>(~digits) * 0x1p-64)) : std::log(u))) *
                       (angle & (sine ? 0x80000000u : 0x40000000u) ? -turn : turn);
      const double exact = lattice.s * z + place.part;
      found.quick_share = std::max(found.quick_share, std::fabs(t - exact) / (std::fabs(t) * 0x1p-22 + lattice.margin));
      const double doubtful = 1e-9 * (1.0 + std::fabs(exact));
      const double cell = std::fabs(exact - std::nearbyint(exact)) < 0.5 - doubtful ? place.whole + std::nearbyint(exact) : nearest(reference());
      found.wrong_quick += cell != place.whole + j;
    }
    if (open || e % 1024 == 0) {
      const Digits known{digits, angle, angle_further, sine};
      const ExactSum sum = exact_sum(lattice, place, known);
      const ExactCell exact = exact_cell(lattice, x[e], known);
      const Dd total = reference(), rest = total - Dd(place.whole);
      if (sum.error < 1.0) found.exact_share = std::max(found.exact_share, std::fabs((Dd(sum.t) - rest).hi) / sum.error);
      found.wrong_exact += exact.decided && nearest(total) != exact.cell;
      if (open) {
        found.voids += !exact.decided;
        found.near += !(std::fabs(sum.t - round_whole(sum.t)) <= 0.5 - 0x1p20 * sum.error);
      }
    }
  }
  return found;
}

inline CellErrors cell_errors(const Lattice& lattice, const float* x, int64_t elements, float sigma, uint64_t seed, int64_t samples,
                              int threads) {
  return over_threads<CellErrors>(
      samples, threads,
      [&](int64_t sample) { return cell_errors(lattice, x, elements, sigma, {seed, 0, 1, static_cast<uint32_t>(sample)}); },
      [](CellErrors& into, const CellErrors& from) {
        into = {into.cells + from.cells, into.open + from.open, into.near + from.near, into.voids + from.voids,
                into.wrong_quick + from.wrong_quick, into.wrong_exact + from.wrong_exact,
                std::max(into.quick_share, from.quick_share), std::max(into.exact_share, from.exact_share)};
      });
}

}  // namespace pacd
