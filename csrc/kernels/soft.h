// The soft smoothed classifier: softmax averaged over noisy copies, its certified radius, and their gradients.
//
// A CopiesKernel works on the copies of one image side by side: `block<L>` takes L copies from `first` on, which are
// SIMD lanes on the CPU (L = 16) and one of sixteen neighbouring threads on CUDA (L = 1).  Both add up lanes in one
// order, and everything is written with fma, so that both give the same bits.
#pragma once

#include "math/quantile.h"

namespace pacd {

// What the kernels of copies share: the logits, and their softmax at inverse temperature beta.
template <class T>
struct Copies {
  using Number = T;
  const T* logits;  // [images, copies, classes]
  int64_t copies, classes;
  T beta;

  // L copies of an image: where they are, their largest logit, and 1 / (sum of exponentials).
  template <int L>
  struct Block {
    const T* x[L];
    T top[L], inverse[L];
    T* numbers;  // the exponentials, [classes, L]; where L is 1 there are none and they are made again
  };

  template <int L>
  PACD_INLINE T term(const Block<L>& at, int64_t c, int lane) const {
    if constexpr (L == 1) {
      return soft_exp(beta * (at.x[0][c] - at.top[0]));
    } else {
      return at.numbers[c * L + lane];
    }
  }

  // Copies past the last are the last once more.
  template <int L>
  PACD_INLINE Block<L> block(int64_t image, int64_t first, T* numbers) const {
    Block<L> at;
    at.numbers = numbers;
    PACD_LANES for (int lane = 0; lane < L; ++lane) {
      const int64_t j = first + lane < copies ? first + lane : copies - 1;
      at.x[lane] = logits + (image * copies + j) * classes;
      at.top[lane] = at.x[lane][0];
    }
    if constexpr (L > 1) {
      PACD_LANES for (int lane = 0; lane < L; ++lane) {
        for (int64_t c = 0; c < classes; ++c) numbers[c * L + lane] = at.x[lane][c];
      }
      for (int64_t c = 1; c < classes; ++c) {
        PACD_LANES for (int lane = 0; lane < L; ++lane) at.top[lane] =
            numbers[c * L + lane] > at.top[lane] ? numbers[c * L + lane] : at.top[lane];
      }
      for (int64_t c = 0; c < classes; ++c) {
        PACD_LANES for (int lane = 0; lane < L; ++lane) numbers[c * L + lane] =
            soft_exp(beta * (numbers[c * L + lane] - at.top[lane]));
      }
    } else {
      for (int64_t c = 1; c < classes; ++c) at.top[0] = at.x[0][c] > at.top[0] ? at.x[0][c] : at.top[0];
    }
    T total[L];
    PACD_LANES for (int lane = 0; lane < L; ++lane) total[lane] = T(0);
    for (int64_t c = 0; c < classes; ++c) {
      PACD_LANES for (int lane = 0; lane < L; ++lane) total[lane] = total[lane] + term(at, c, lane);
    }
    PACD_LANES for (int lane = 0; lane < L; ++lane) at.inverse[lane] = T(1) / total[lane];
    return at;
  }
};

// mean[image, c] = mean over the copies of softmax(beta * logits)[c].
template <class T>
struct SoftSmooth : Copies<T> {
  T* mean;

  // `sum` adds sixteen lanes' numbers into part[0], and is true where this thread has the result.
  template <int L, class Sum>
  PACD_INLINE void operator()(int64_t image, int64_t first, T* numbers, const Sum& sum) const {
    const auto at = this->template block<L>(image, first, numbers);
    const T share = T(1) / static_cast<T>(this->copies);
    T weight[L];
    PACD_LANES for (int lane = 0; lane < L; ++lane) weight[lane] =
        first + lane < this->copies ? at.inverse[lane] * share : T(0);
    T* out = mean + image * this->classes;
    for (int64_t c = 0; c < this->classes; ++c) {
      T part[L];
      PACD_LANES for (int lane = 0; lane < L; ++lane) part[lane] = this->term(at, c, lane) * weight[lane];
      if (sum(part)) out[c] = first == 0 ? part[0] : out[c] + part[0];
    }
  }
};

// The gradient with respect to the logits of sum(slopes * mean): beta / copies * p * (slopes - <slopes, p>), p the
// softmax of a copy.
template <class T>
struct SoftSmoothBackward : Copies<T> {
  const T* slopes;  // [images, classes]
  T* out;           // [images, copies, classes]

  template <int L, class Sum>
  PACD_INLINE void operator()(int64_t image, int64_t first, T* numbers, const Sum&) const {
    const auto at = this->template block<L>(image, first, numbers);
    const T* slope = slopes + image * this->classes;
    T dot[L], scale[L];
    PACD_LANES for (int lane = 0; lane < L; ++lane) dot[lane] = T(0);
    for (int64_t c = 0; c < this->classes; ++c) {
      PACD_LANES for (int lane = 0; lane < L; ++lane) dot[lane] = fma(this->term(at, c, lane), slope[c], dot[lane]);
    }
    const T share = this->beta / static_cast<T>(this->copies);
    PACD_LANES for (int lane = 0; lane < L; ++lane) {
      dot[lane] = dot[lane] * at.inverse[lane];
      scale[lane] = share * at.inverse[lane];
    }
    if constexpr (L > 1) {
      for (int64_t c = 0; c < this->classes; ++c) {
        PACD_LANES for (int lane = 0; lane < L; ++lane) numbers[c * L + lane] =
            numbers[c * L + lane] * scale[lane] * (slope[c] - dot[lane]);
      }
    }
    for (int lane = 0; lane < L && first + lane < this->copies; ++lane) {
      T* target = out + (image * this->copies + first + lane) * this->classes;
      for (int64_t c = 0; c < this->classes; ++c) {
        target[c] = L > 1 ? numbers[c * L + lane] : this->term(at, c, lane) * scale[lane] * (slope[c] - dot[lane]);
      }
    }
  }
};

// The two likeliest classes of an image's mean softmax, and Phi^-1 of their squeezed probabilities.
template <class T>
struct TopTwo {
  int64_t first, second;
  double high, low;

  PACD_INLINE TopTwo(const T* mean, int64_t classes, double squeeze) {
    first = mean[1] > mean[0] ? 1 : 0;  // strictly: the lowest index wins a tie
    second = 1 - first;
    for (int64_t c = 2; c < classes; ++c) {
      if (mean[c] > mean[first]) {
        second = first;
        first = c;
      } else if (mean[c] > mean[second]) {
        second = c;
      }
    }
    double others = 0.0;  // 1 - mean[first] without the cancellation
    for (int64_t c = 0; c < classes; ++c) others += c == first ? 0.0 : static_cast<double>(mean[c]);
    const double keep = 1.0 - 2.0 * squeeze;
    const double rest = fma(keep, others, squeeze), p = fma(keep, static_cast<double>(mean[second]), squeeze);
    high = quick_quantile(1.0 - rest, rest);
    low = quick_quantile(p, 1.0 - p);
  }

  // d Phi^-1(squeezed p) / dp at z = Phi^-1(squeezed p); 0 where that overflows T.
  static PACD_INLINE T slope(double z, double squeeze) {
    const double density = 0.398942280401432678 * soft_exp(-0.5 * z * z);
    const double value = (1.0 - 2.0 * squeeze) / density;
    return density > 0.0 && value < (sizeof(T) == 4 ? 1e38 : 1e300) ? static_cast<T>(value) : T(0);
  }
};

// radius[image] = sigma / 2 * (high - low) where the likeliest class is the label, 0 where not, NaN for NaN.
template <class T>
struct SoftRadius {
  const T* mean;
  const int64_t* labels;
  T* radius;
  int64_t classes;
  double sigma, squeeze;

  PACD_INLINE void operator()(int64_t image) const {
    const T* z = mean + image * classes;
    const TopTwo<T> top(z, classes, squeeze);
    const T value = top.high > top.low ? static_cast<T>(0.5 * sigma * (top.high - top.low)) : T(0);  // a tie, rounded
    radius[image] = z[0] != z[0] ? z[0] : top.first == labels[image] ? value : T(0);
  }
};

// slopes[image, :] = grad[image] * d radius / d mean, up to a constant per image, which SoftSmoothBackward does not
// see: the likeliest class's share is put on all the others with the sign changed, because 1 - p is what is known well.
template <class T>
struct SoftRadiusSlopes {
  const T* means;
  const int64_t* labels;
  const T* grad;
  T* slopes;  // [images, classes], like the means
  int64_t classes;
  double sigma, squeeze;

  PACD_INLINE void operator()(int64_t image) const {
    const T* p = means + image * classes;
    T* z = slopes + image * classes;
    const TopTwo<T> top(p, classes, squeeze);
    const T scale = top.first == labels[image] ? static_cast<T>(0.5 * sigma) * grad[image] : T(0);
    const T high = scale * TopTwo<T>::slope(top.high, squeeze), low = scale * TopTwo<T>::slope(top.low, squeeze);
    const T nan = p[0] != p[0] ? p[0] : T(0);
    for (int64_t c = 0; c < classes; ++c) z[c] = nan + (c == top.first ? T(0) : c == top.second ? -high - low : -high);
  }
};

}  // namespace pacd
