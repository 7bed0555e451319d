// The noisy copies of images: a noise kernel, for the executors that draw its normal numbers tile by tile.
//
// It has `Pairs`, which makes two normal numbers of two random words, `row`, what the elements of a row share, and `put`,
// which turns one normal number into one element (`put_run`: a tile of them).
#pragma once

#include <type_traits>

#include "math/half.h"
#include "math/normal.h"

namespace pacd {

// out[row] = (x[row / copies] + sigma * noise - mean) * (1 / std), with the noise of
// (seed, stream, image, first + row % copies).
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
    const bool small = (r | copies) < 0x100000000;  // a quicker division
    const int64_t image = small ? static_cast<uint32_t>(r) / static_cast<uint32_t>(copies) : r / copies;
    const uint64_t id = static_cast<uint64_t>(image_ids ? image_ids[image] : image);
    return {{seed, id, stream, static_cast<uint32_t>(first + (r - image * copies))},
            x + image * elements,
            out + r * elements};
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
