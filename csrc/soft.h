// The soft smoothed classifier: softmax averaged over noisy copies, its certified radius, and their gradients.
//
// A CopiesKernel works on the copies of one image side by side: `block<L>` takes L copies from `first` on, which are SIMD
// lanes on the CPU (L = 16) and one of sixteen neighbouring threads on CUDA (L = 1).  Both add up lanes in one order, and
// everything is written with fma, so that both give the same bits.
#pragma once

#include "hd.h"

namespace pacd {

template <class T>
struct FloatFacts;

template <>
struct FloatFacts<float> {
  using Bits = uint32_t;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.0f;      // exp below it is taken as 0
  static constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};

template <>
struct FloatFacts<double> {
  using Bits = uint64_t;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0;
  static constexpr double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023, degree = 14;
};

// A variable, not a function: device code may not call a host's constexpr function with a number known at run time.
template <int n>
constexpr double inverse_factorial = inverse_factorial<n - 1> / n;
template <>
constexpr double inverse_factorial<0> = 1.0;

// Horner's rule, from sum on: the terms of exp(r) from r^i down.
template <int i, class T>
PACD_INLINE T taylor(T sum, T r) {
  constexpr T coefficient = static_cast<T>(inverse_factorial<i>);
  sum = fma(sum, r, coefficient);
  if constexpr (i > 0) return taylor<i - 1>(sum, r);
  return sum;
}

// Likewise artanh(s) / s = 1 + s^2 / 3 + s^4 / 5 + ..., from s^i down to s^3.
template <int i>
PACD_INLINE double artanh_series(double sum, double s2) {
  sum = fma(sum, s2, 1.0 / i);
  if constexpr (i > 3) return artanh_series<i - 2>(sum, s2);
  return sum;
}

// exp(x) for x <= 0; relative error below 3e-7 in float and 1e-15 in double; 0 below -87 and -708; NaN for NaN.
template <class T>
PACD_INLINE T soft_exp(T x) {
  using Facts = FloatFacts<T>;
  using Bits = typename Facts::Bits;
  const T inside = x < Facts::lowest ? Facts::lowest : x;
  const T shifted = fma(inside, T(1.44269504088896340736), Facts::round);
  const T n = shifted - Facts::round;
  const T r = fma(n, -Facts::log2_low, fma(n, -Facts::log2_high, inside));  // |r| <= log(2) / 2
  constexpr T last = static_cast<T>(inverse_factorial<Facts::degree>);
  const T sum = taylor<Facts::degree - 1>(last, r);
  // shifted's low bits are n, so that 2^n needs no conversion to an integer (undefined for NaN)
  const Bits exponent = bits_as<Bits>(shifted) - bits_as<Bits>(Facts::round) + Bits(Facts::bias);
  const T scaled = sum * bits_as<T>(static_cast<Bits>(exponent << Facts::mantissa));
  return x < Facts::lowest ? T(0) : scaled;
}

// log(x) for normal positive x; relative error below 1e-15 away from 1, absolute below 1e-16 near it.
PACD_INLINE double log_positive(double x) {
  const int64_t shifted = bits_as<int64_t>(x) - 0x3FE6A09E667F3BCDll;  // m in [sqrt(1/2), sqrt(2))
  const int64_t e = shifted >> 52;
  const double m = bits_as<double>((shifted & 0x000FFFFFFFFFFFFFll) + 0x3FE6A09E667F3BCDll);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  const double sum = artanh_series<23>(0.0, s2);
  const double k = static_cast<double>(e);
  const double log_m = fma(2.0 * s * s2, sum, 2.0 * s);
  return fma(k, FloatFacts<double>::log2_high, fma(k, FloatFacts<double>::log2_low, log_m));
}

// Phi^-1(p), given p and q = 1 - p each to full relative precision; -inf, inf at 0 and 1.  Wichura's AS 241, relative
// error about 1e-15: quick and not a bound; normal_quantile in quantile.h is the one for certificates.
PACD_INLINE double quick_quantile(double p, double q) {
  const double tail = p < q ? p : q;
  if (!(tail >= 2.2250738585072014e-308)) return tail != tail ? tail : (p < q ? -INFINITY : INFINITY);
  const double centre = 0.5 * (p - q);
  double a, b;
  if (tail > 0.075) {
    const double r = fma(-centre, centre, 0.180625);
    a = fma(fma(fma(fma(fma(fma(fma(2509.0809287301226727, r, 33430.575583588128105), r, 67265.770927008700853), r,
                                45921.953931549871457), r, 13731.693765509461125), r, 1971.5909503065514427), r,
                133.14166789178437745), r, 3.387132872796366608);
    b = fma(fma(fma(fma(fma(fma(fma(5226.495278852854561, r, 28729.085735721942674), r, 39307.89580009271061), r,
                                21213.794301586595867), r, 5394.1960214247511077), r, 687.1870074920579083), r,
                42.313330701600911252), r, 1.0);
    return centre * a / b;
  }
  double r = ::sqrt(-log_positive(tail));
  if (r <= 5.0) {
    r -= 1.6;
    a = fma(fma(fma(fma(fma(fma(fma(7.7454501427834140764e-4, r, 0.0227238449892691845833), r, 0.24178072517745061177), r,
                                1.27045825245236838258), r, 3.64784832476320460504), r, 5.7694972214606914055), r,
                4.6303378461565452959), r, 1.42343711074968357734);
    b = fma(fma(fma(fma(fma(fma(fma(1.05075007164441684324e-9, r, 5.475938084995344946e-4), r, 0.0151986665636164571966), r,
                                0.14810397642748007459), r, 0.68976733498510000455), r, 1.6763848301838038494), r,
                2.05319162663775882187), r, 1.0);
  } else {
    r -= 5.0;
    a = fma(fma(fma(fma(fma(fma(fma(2.01033439929228813265e-7, r, 2.71155556874348757815e-5), r, 0.0012426609473880784386), r,
                                0.026532189526576123093), r, 0.29656057182850489123), r, 1.7848265399172913358), r,
                5.4637849111641143699), r, 6.6579046435011037772);
    b = fma(fma(fma(fma(fma(fma(fma(2.04426310338993978564e-15, r, 1.4215117583164458887e-7), r, 1.8463183175100546818e-5), r,
                                7.868691311456132591e-4), r, 0.0148753612908506148525), r, 0.13692988092273580531), r,
                0.59983220655588793769), r, 1.0);
  }
  return p < q ? -a / b : a / b;
}

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
        PACD_LANES for (int lane = 0; lane < L; ++lane) at.top[lane] = numbers[c * L + lane] > at.top[lane] ? numbers[c * L + lane] : at.top[lane];
      }
      for (int64_t c = 0; c < classes; ++c) {
        PACD_LANES for (int lane = 0; lane < L; ++lane) numbers[c * L + lane] = soft_exp(beta * (numbers[c * L + lane] - at.top[lane]));
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
    PACD_LANES for (int lane = 0; lane < L; ++lane) weight[lane] = first + lane < this->copies ? at.inverse[lane] * share : T(0);
    T* out = mean + image * this->classes;
    for (int64_t c = 0; c < this->classes; ++c) {
      T part[L];
      PACD_LANES for (int lane = 0; lane < L; ++lane) part[lane] = this->term(at, c, lane) * weight[lane];
      if (sum(part)) out[c] = first == 0 ? part[0] : out[c] + part[0];
    }
  }
};

// The gradient with respect to the logits of sum(slopes * mean): beta / copies * p * (slopes - <slopes, p>), p the softmax
// of a copy.
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
        PACD_LANES for (int lane = 0; lane < L; ++lane) numbers[c * L + lane] = numbers[c * L + lane] * scale[lane] * (slope[c] - dot[lane]);
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

// slopes[image, :] = grad[image] * d radius / d mean, up to a constant per image, which SoftSmoothBackward does not see:
// the likeliest class's share is put on all the others with the sign changed, because 1 - p is what is known well.
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
