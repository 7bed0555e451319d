// The certification loop: what to draw next, and certificates from the votes; and the table of bounds for every count.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "math/binomial.h"
#include "math/quantile.h"

namespace pacd {

// What is drawn next: samples [first, first + count) of an image on a stream (0 selection, 1 estimation).
using Piece = std::tuple<int64_t, int64_t, int64_t, int64_t>;

struct Certificate {
  int64_t prediction;  // -1 where it abstains
  int64_t selected;
  double p_lower, radius;
};

// CERTIFY of Cohen et al. 2019 for many images that share batches.  It plans which samples to draw, knows which images
// are complete, and turns their votes into certificates; it never sees an image, a model or a device.
class Certification {
 public:
  Certification(int64_t images, int64_t n0, int64_t n, double alpha, double sigma)
      : images_(images), samples_{n0, n}, alpha_(alpha), sigma_(sigma) {
    if (images < 0 || n0 < 0 || n < 1)
      throw std::invalid_argument("images and n0 must not be negative, n must be positive");
    if (!in_range(0, n, alpha)) throw std::invalid_argument("n must be below 2^31 and alpha in [1e-200, 1 - 2^-20]");
    if (!(sigma > 0.0 && std::isfinite(sigma))) throw std::invalid_argument("sigma must be positive and finite");
  }

  // The next rows, at most `rows` of them: whole images in order, each its selection samples, then its estimation
  // samples.  Streams differ, so the two never share a sample.  Empty when all is planned.
  std::vector<Piece> plan(int64_t rows) {
    if (rows < 1) throw std::invalid_argument("rows must be positive");
    std::vector<Piece> pieces;
    while (rows > 0 && image_ < images_) {
      const int64_t count = std::min(rows, samples_[stream_] - next_);
      if (count > 0) pieces.emplace_back(image_, stream_, next_, count);
      rows -= count;
      next_ += count;
      if (next_ == samples_[stream_]) {
        next_ = 0;
        if (++stream_ == 2) {
          stream_ = 0;
          ++image_;
        }
      }
    }
    return pieces;
  }

  // Images [0, planned()) have all their samples planned.
  int64_t planned() const { return image_; }

  // One image's certificate from its votes of each stream, a number per class.
  Certificate issue(const int64_t* chosen, const int64_t* votes, int64_t classes) const {
    if (classes < 1) throw std::invalid_argument("votes must have one number per class");
    int64_t sums[2] = {0, 0};
    for (int64_t c = 0; c < classes; ++c) {
      sums[0] += chosen[c];
      sums[1] += votes[c];
    }
    if (sums[0] != samples_[0] || sums[1] != samples_[1])
      throw std::invalid_argument("votes do not add up to n0 and n");
    const int64_t top = std::max_element(chosen, chosen + classes) - chosen;
    const double p_lower = clopper_pearson_bound(votes[top], samples_[1], alpha_, false);
    if (!(p_lower > 0.5)) return {-1, top, p_lower, 0.0};
    const double radius = product_down(sigma_, normal_quantile(p_lower, false));
    return {top, top, p_lower, std::max(radius, 0.0)};
  }

 private:
  int64_t images_;
  int64_t samples_[2];
  double alpha_, sigma_;
  int64_t image_ = 0, stream_ = 0, next_ = 0;
};

// Clopper-Pearson bounds for k = 0..n, on all processors, into bounds[n + 1].
inline void clopper_pearson_table(int64_t n, double alpha, bool upper, double* bounds) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    constexpr int64_t chunk = 256;
    for (int64_t begin = next.fetch_add(chunk); begin <= n; begin = next.fetch_add(chunk)) {
      for (int64_t k = begin; k <= std::min(n, begin + chunk - 1); ++k)
        bounds[k] = clopper_pearson_bound(k, n, alpha, upper);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::thread::hardware_concurrency() && n > 1024; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pacd
