// Every kernel as a plain struct: its arguments, and what one work item does.  No torch in here.
//
// A row kernel has `void operator()(int64_t row) const`.  A team kernel has `void operator()(const Team&, int64_t row)
// const` and sums over its row in the team's lanes (chernoff.h).  A noise kernel has `row`, what the elements of a row
// share, and `put`, which turns one normal number into one element (`put_run`: a tile of them); the executors in
// ops_cpu.cpp and ops_cuda.cu draw the numbers, tile by tile, and run any kernel.
#pragma once

#include "binomial.h"
#include "chernoff.h"
#include "normal.h"
#include "quantile.h"

#include <type_traits>

namespace pacd {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

PACD_INLINE float to_float(float x) { return x; }
PACD_INLINE float to_float(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
PACD_INLINE float to_float(Half x) {
  // Shift the fields into place and let one product mend the exponent (subnormals included); inf and NaN apart.
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float finite = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7F800000u | (magnitude << 13);
  return bits_as<float>((magnitude >= 0x7C00u ? special : bits_as<uint32_t>(finite)) | sign);
}

// Rounding to nearest, ties to even, like torch.
PACD_INLINE void convert(float x, float* out) { *out = x; }
PACD_INLINE void convert(float x, Bfloat16* out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}
PACD_INLINE void convert(float x, Half* out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: drop 13 bits with rounding and re-bias.  Subnormal ones: let a float addition round at 2^-24.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and up round to infinity
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  out->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

// out[row] = (x[row / copies] + sigma * noise - mean) * (1 / std), the noise of (seed, stream, image, first + row % copies).
template <class Out, bool normalise>
struct NoisyCopies {
  const float* x;
  Out* out;
  const int64_t* image_ids;  // null: 0, 1, 2, ...
  const float* mean;         // per channel, with normalise
  const float* std;
  int64_t copies, first, elements, channels;
  uint64_t seed;
  uint32_t stream;
  float sigma;
  bool channels_last;

  static constexpr bool plain = std::is_same_v<Out, float> && !normalise;  // value() is fma(sigma, number, pixel), in float
  PACD_INLINE bool scattered() const { return channels_last && channels > 1; }

  // What all elements of a row share.
  struct Row {
    NoiseKey key;
    const float* pixels;
    Out* target;
  };

  PACD_INLINE Row row(int64_t r) const {
    const int64_t image = (r | copies) < 0x100000000 ? static_cast<uint32_t>(r) / static_cast<uint32_t>(copies) : r / copies;  // quicker
    const uint64_t id = static_cast<uint64_t>(image_ids ? image_ids[image] : image);
    return {{seed, id, stream, static_cast<uint32_t>(first + (r - image * copies))}, x + image * elements, out + r * elements};
  }

  PACD_INLINE float value(float pixel, float number, float shift, float inverse) const {
    const float noisy = fma(sigma, number, pixel);
    return normalise ? (noisy - shift) * inverse : noisy;
  }

  // One element, anywhere.
  PACD_INLINE void put(const Row& at, int64_t e, float number) const {
    const int64_t plane = elements / channels, channel = e / plane;
    const float shift = normalise ? mean[channel] : 0.0f, inverse = normalise ? 1.0f / std[channel] : 1.0f;
    const int64_t place = channels_last ? (e - channel * plane) * channels + channel : e;
    convert(value(at.pixels[e], number, shift, inverse), at.target + place);
  }

  // The elements [begin, end) of some tiles from their numbers, in runs of one channel, whose loops the compiler can vectorise.
  PACD_INLINE void put_run(const Row& at, int64_t begin, int64_t end, const float* numbers) const {
    const float* pixels = at.pixels;
    Out* target = at.target;
    const bool scattered = this->scattered();
    const bool whole = !normalise && !scattered;
    const int64_t plane = whole ? end : elements / channels;
    while (begin < end) {
      const int64_t channel = whole ? 0 : begin / plane;
      const int64_t stop = end < (channel + 1) * plane ? end : (channel + 1) * plane;
      const float shift = normalise ? mean[channel] : 0.0f, inverse = normalise ? 1.0f / std[channel] : 1.0f;
      const int length = static_cast<int>(stop - begin);
      if (scattered) {
        Out* place = target + (begin - channel * plane) * channels + channel;
        for (int i = 0; i < length; ++i) convert(value(pixels[begin + i], numbers[i], shift, inverse), place + i * channels);
      } else {
        for (int i = 0; i < length; ++i) convert(value(pixels[begin + i], numbers[i], shift, inverse), target + begin + i);
      }
      numbers += length;
      begin = stop;
    }
  }
};

// counts[image_index[row], argmax(logits[row])] += 1; a row with a NaN goes to nan_rows[image_index[row]] instead.
template <class In>
struct AddVotes {
  const In* logits;
  const int64_t* image_index;
  int64_t* counts;
  int64_t* nan_rows;
  int64_t images, classes;

  PACD_INLINE void operator()(int64_t row) const {
    const int64_t image = image_index[row];
    if (image < 0 || image >= images) return;  // refused by the caller where it can be; never written through
    const In* values = logits + row * classes;
    float best = to_float(values[0]);
    int64_t vote = 0;
    bool nan = best != best;
    for (int64_t c = 1; c < classes; ++c) {
      const float v = to_float(values[c]);
      nan = nan || v != v;
      if (v > best) {  // strictly: the lowest index wins a tie
        best = v;
        vote = c;
      }
    }
    add_atomically(nan ? nan_rows + image : counts + image * classes + vote, 1);
  }
};

struct ClopperPearson {
  const int64_t* k;
  const int64_t* n;
  const double* alpha;
  double* bound;
  bool upper;

  PACD_INLINE void operator()(int64_t i) const {
    bound[i] = upper ? clopper_pearson_upper(k[i], n[i], alpha[i]) : clopper_pearson_lower(k[i], n[i], alpha[i]);
  }
};

// The label-flip tail bound of each row of alpha[rows, n] against two-class labels; chernoff.h.
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
    const ChernoffRow<true> problem{alpha + item / per_row * n, y,       n, keep, other, neutral, outside,
                                    pairs[2 * item],            pairs[2 * item + 1], 0.0, reach};
    problem.solve(team, t + item, log_tail + item);
  }
};

struct NormalQuantile {
  const double* p;
  double* z;
  bool up;

  PACD_INLINE void operator()(int64_t i) const { z[i] = normal_quantile(p[i], up); }
};

}  // namespace pacd
