// The kernels of lattice noise: where the pixels lie on their lattice, once, and the noisy cells, once a copy.
#pragma once

#include <type_traits>

#include "kernels/noise.h"
#include "math/lattice.h"

namespace pacd {

// lattices[channel] from step and offset of the channel.
struct MakeLattices {
  const double* step;
  const double* offset;
  Lattice* lattices;
  float sigma;

  PACD_INLINE void operator()(int64_t channel) const {
    lattices[channel] = Lattice(sigma, step[channel], offset[channel]);
  }
};

// x = (whole + part) * step + offset of 64 pixels: x[images, elements], of which `plane` at a time share a lattice.  A part
// is NaN where its pixel is out of range.
struct PlacePixels {
  const float* x;
  const Lattice* lattices;
  float* whole;
  float* part;
  int64_t count, plane, channels;  // pixels in all, pixels and number of the lattices

  PACD_INLINE void operator()(int64_t item) const {
    int64_t begin = item * tile_size;
    const int64_t end = begin + tile_size < count ? begin + tile_size : count;
    while (begin < end) {
      const int64_t row = begin / plane;
      const int64_t stop = end < (row + 1) * plane ? end : (row + 1) * plane;
      const Lattice lattice = lattices[row % channels];
      PACD_NO_ALIAS for (int64_t e = begin; e < stop; ++e) {
        const Place place = place_of(lattice, x[e]);
        whole[e] = static_cast<float>(place.whole);
        part[e] = static_cast<float>(place.part);
      }
      begin = stop;
    }
  }
};

// out[row] = the point of the cell that holds x[image] + sigma Z, with image and Z of the row; voids[row] = 1 where a cell
// could not be decided.
template <class Out>
struct LatticeCopies {
  const float* x;
  const float* whole;
  const float* part;
  const Lattice* lattices;  // one a channel, or one
  Out* out;
  uint8_t* voids;
  BatchRows rows;
  int64_t elements, channels, plane;  // plane: the elements of one lattice
  bool channels_last;

  using Pairs = BoundedBoxMuller;
  static constexpr bool plain = false;

  struct Row {
    NoiseKey key;
    int64_t pixels;  // where the image begins in x, whole and part
    Out* target;
    uint8_t* voids;
  };

  PACD_INLINE Row row(int64_t r) const {
    const int64_t image = rows.image(r);
    return {rows.key(r, image), image * elements, out + r * elements, voids + r};
  }

  PACD_INLINE const Lattice& lattice_of(int64_t e) const { return lattices[e / plane]; }

  PACD_INLINE int64_t place_in_row(int64_t e) const {
    if (!channels_last) return e;
    const int64_t pixels = elements / channels, channel = e / pixels;
    return (e - channel * pixels) * channels + channel;
  }

  // A cell that float leaves open: its words are drawn again, and their further digits.
  PACD_INLINE void settle(const Row& at, int64_t e) const {
    const int64_t lane = e % tile_lanes, word = e % tile_size / tile_lanes;
    const uint32_t block = static_cast<uint32_t>(e / tile_size * tile_lanes + lane);
    NoiseKey further = at.key;
    further.stream |= further_digits;
    const Words w = random_words(at.key, block), v = random_words(further, block);
    const bool second = word >= 2;
    const Digits digits{static_cast<uint64_t>(second ? w.w2 : w.w0) << 32 | (second ? v.w2 : v.w0), second ? w.w3 : w.w1,
                        second ? v.w3 : v.w1, word % 2 != 0};
    const Lattice& lattice = lattice_of(e);
    const ExactCell exact = exact_cell(lattice, x[at.pixels + e], digits);
    convert(lattice.point(exact.cell), at.target + place_in_row(e));
    if (!exact.decided) mark(at.voids);
  }

  // One element, anywhere.
  PACD_INLINE void put(const Row& at, int64_t e, float number) const {
    const Lattice& lattice = lattice_of(e);
    const float t = quick_sum(lattice, part[at.pixels + e], number), j = round_whole(t);
    if (is_open(lattice, t, j)) return settle(at, e);
    convert(lattice.point(whole[at.pixels + e] + j), at.target + place_in_row(e));
  }

  static constexpr int wide = 1;  // lanes of a tile that a thread of a card takes
  PACD_INLINE void put_neighbours(const Row& at, int64_t e, const float (&numbers)[wide]) const {
    put(at, e, numbers[0]);
  }

  // The elements [begin, end) of some tiles, in runs of one channel.
  PACD_INLINE void put_run(const Row& at, int64_t begin, int64_t end, const float* numbers) const {
    const bool scattered = channels_last && channels > 1;
    const int64_t run = scattered ? elements / channels : plane;
    while (begin < end) {
      const int64_t channel = begin / run, edge = (channel + 1) * run;
      const int64_t stop = end < edge ? end : edge;
      const Lattice lattice = lattice_of(begin);
      for (; begin < stop; begin += tile_size, numbers += tile_size) {
        const int length = stop - begin < tile_size ? static_cast<int>(stop - begin) : tile_size;
        if (scattered) {
          put_cells(at, lattice, begin, length, numbers, at.target + (begin - channel * run) * channels + channel, channels);
        } else if (length == tile_size) {
          put_cells(at, lattice, begin, tile_size, numbers, at.target + begin, 1);
        } else {
          put_cells(at, lattice, begin, length, numbers, at.target + begin, 1);
        }
      }
      numbers -= begin - stop;
      begin = stop;
    }
  }

 private:
  // At most a tile: all of it quickly, by loops that the compiler can vectorise, then what is open.
  PACD_INLINE void put_cells(const Row& at, const Lattice& lattice, int64_t begin, int length, const float* numbers, Out* target,
                             int64_t stride) const {
    alignas(64) float points[tile_size];
    alignas(64) uint32_t open[tile_size];
    const float *wholes = whole + at.pixels + begin, *parts = part + at.pixels + begin;
    uint32_t any = 0;
    PACD_LANES for (int i = 0; i < length; ++i) {
      const float t = quick_sum(lattice, parts[i], numbers[i]), j = round_whole(t);
      open[i] = is_open(lattice, t, j);
      any |= open[i];
      points[i] = lattice.point(wholes[i] + j);
    }
    if (stride == 1 || std::is_same_v<Out, float>) {
      PACD_NO_ALIAS for (int i = 0; i < length; ++i) convert(points[i], target + i * stride);
    } else {
      Out converted[tile_size];
      PACD_LANES for (int i = 0; i < length; ++i) convert(points[i], converted + i);
      for (int i = 0; i < length; ++i) target[i * stride] = converted[i];
    }
    for (int i = 0; any && i < length; ++i)
      if (open[i]) settle(at, begin + i);
  }

  PACD_INLINE static void mark(uint8_t* flag) {  // others may write the same at the same time
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<volatile uint8_t*>(flag) = 1;
#else
    __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
#endif
  }
};

}  // namespace pacd
