// The noisy copies of images: a noise kernel, for the executors that draw its normal numbers tile by tile.
//
// It has `Pairs`, which makes two normal numbers of two random words, `row`, what the elements of a row share, and
// what turns normal numbers into elements: `put_neighbours` for the few of a card's thread, `put_run` for some tiles.
#pragma once

#include <type_traits>

#include "math/half.h"
#include "math/normal.h"

namespace pacd {

// Which image each row of a batch shows, and with which noise: row by row as a table says, or samples [first, first +
// copies) of every image, one image after the other.
struct BatchRows {
  const int64_t* image_ids;  // null: 0, 1, 2, ...
  const int64_t* table;      // (image, stream, sample) of every row; or null
  int64_t images, copies, first;
  uint64_t seed;
  uint32_t stream;

  PACD_INLINE int64_t image(int64_t r) const {
    if (!table) return quotient(r, copies);
    const int64_t image = table[3 * r];
    return image >= 0 && image < images ? image : 0;  // refused by the caller where it can be; never read outside
  }

  PACD_INLINE NoiseKey key(int64_t r, int64_t image) const {
    const uint64_t id = static_cast<uint64_t>(image_ids ? image_ids[image] : image);
    if (table) return {seed, id, static_cast<uint32_t>(table[3 * r + 1]), static_cast<uint32_t>(table[3 * r + 2])};
    return {seed, id, stream, static_cast<uint32_t>(first + (r - image * copies))};
  }
};

// out[row] = (x[image] + sigma * noise - mean) * (1 / std), with image and noise of the row.
template <class Out, bool normalise>
struct NoisyCopies {
  const float* x;
  Out* out;
  BatchRows rows;
  const float* mean;  // per channel, with normalise
  const float* std;
  int64_t elements, channels;
  float sigma;
  bool channels_last;

  using Pairs = BoxMuller;
  // value() is fma(sigma, number, pixel), in float
  static constexpr bool plain = std::is_same_v<Out, float> && !normalise;
  PACD_INLINE bool scattered() const { return channels_last && channels > 1; }

  // What all elements of a row share.
  struct Row {
    NoiseKey key;
    const float* pixels;
    Out* target;
  };

  PACD_INLINE Row row(int64_t r) const {
    const int64_t image = rows.image(r);
    return {rows.key(r, image), x + image * elements, out + r * elements};
  }

  PACD_INLINE float value(float pixel, float number, float shift, float inverse) const {
    const float noisy = fma(sigma, number, pixel);
    return normalise ? (noisy - shift) * inverse : noisy;
  }

  static constexpr int wide = 4;  // lanes of a tile that a thread of a card takes

  // The elements from e on that there are of `wide`, anywhere.
  PACD_INLINE void put_neighbours(const Row& at, int64_t e, const float (&numbers)[wide]) const {
    const float* pixels = at.pixels + e;
    Out* target = at.target + e;
    if (!normalise && !scattered() && e + wide <= elements && holds_fours(pixels, sizeof(float)) &&
        holds_fours(target, sizeof(Out))) {
      const auto four = *reinterpret_cast<const Four<float>*>(pixels);
      Four<Out> noisy;
      for (int j = 0; j < wide; ++j) convert(fma(sigma, numbers[j], four.at[j]), noisy.at + j);
      *reinterpret_cast<Four<Out>*>(target) = noisy;
      return;
    }
    const int64_t plane = normalise || scattered() ? quotient(elements, channels) : elements;
    int64_t channel = quotient(e, plane), pixel = e - channel * plane;
    for (int j = 0; j < wide && e + j < elements; ++j, ++pixel) {
      if (pixel == plane) ++channel, pixel = 0;
      const float shift = normalise ? mean[channel] : 0.0f, inverse = normalise ? 1.0f / std[channel] : 1.0f;
      Out* place = scattered() ? at.target + pixel * channels + channel : target + j;
      convert(value(pixels[j], numbers[j], shift, inverse), place);
    }
  }

  // The elements [begin, end) of some tiles from their numbers, in runs of one channel: loops that become SIMD.
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
        for (int i = 0; i < length; ++i)
          convert(value(pixels[begin + i], numbers[i], shift, inverse), place + i * channels);
      } else {
        for (int i = 0; i < length; ++i)
          convert(value(pixels[begin + i], numbers[i], shift, inverse), target + begin + i);
      }
      numbers += length;
      begin = stop;
    }
  }
};

}  // namespace pacd
