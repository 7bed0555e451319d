// 2x2 max-pooling with ReLU: row kernels that choose a window's largest number, and that read and write there.
#pragma once

#include "portable.h"

namespace pacd {

// 2x2 max-pooling and ReLU of x [N, H, W, C]: of each window the first largest number, if it is above 0.  PoolChoose
// says which of the four that is, PoolPick reads another tensor there, PoolSpread writes there and 0 elsewhere.  These
// two are each other's derivative, so that all derivatives are these two.
//
// It is a choice, not arithmetic, so that numbers are taken as signed integers of their width, of any floating type:
// those above 0 have the order of the numbers, all others are of no interest.  It is written with masks, which the
// compiler turns into SIMD where it would not turn conditions.  An item is a line of windows in all channels or, with
// span and together 1, a window in one channel.
struct Windows {
  int64_t height, width, channels, span, together;  // channels and windows of an item

  // Of a window's first channel: at its first corner, and in the pooled tensor.
  struct Place {
    int64_t in, out;
  };

  PACD_INLINE Place place(int64_t item) const {
    const int64_t groups = channels / span, pixel = item / groups * together, c = item % groups * span;
    const int64_t columns = width / 2, rows = height / 2;
    const int64_t line = pixel / columns, j = pixel - line * columns, image = line / rows, i = line - image * rows;
    return {((image * height + 2 * i) * width + 2 * j) * channels + c, pixel * channels + c};
  }

  // From a window's first corner to the one below.
  PACD_INLINE int64_t below() const { return width * channels; }

  // Runs of a length that the compiler knows, for SIMD; the last may overlap the one before.
  template <class Kernel>
  PACD_INLINE void runs(const Kernel& kernel, int64_t item) const {
    Place at = place(item);
    const int64_t count = span;
    for (int64_t window = 0; window < together; ++window, at.in += 2 * channels, at.out += channels) {
      int64_t c = 0;
      for (; c + 16 <= count; c += 16) kernel.template run<16>(at, c);
      if (count >= 8) {
        for (; c < count; c += 8) kernel.template run<8>(at, c + 8 <= count ? c : count - 8);
      } else {
        for (; c < count; ++c) kernel.template run<1>(at, c);
      }
    }
  }

  // -1 for true, 0 for false.
  template <class Bits>
  static PACD_INLINE Bits mask(bool truth) {
    return static_cast<Bits>(-static_cast<Bits>(truth));
  }
};

// The pooled numbers and, where wanted, the choice: 0 to 3 for a corner, 4 for none.
template <class Bits, bool wanted>
struct PoolChoose : Windows {
  Bits infinity;  // the bits of it
  const Bits* x;
  Bits* out;
  uint8_t* choice;

  // NaN is the largest, as in torch.
  PACD_INLINE Bits order(Bits number) const {
    constexpr Bits most =
        static_cast<Bits>((uint64_t{1} << (8 * sizeof(Bits) - 1)) - 1);  // not numeric_limits: a host function
    const Bits nan = mask<Bits>((number & most) > infinity);
    return static_cast<Bits>((number & ~nan) | (most & nan));
  }

  template <int length>
  PACD_INLINE void run(const Place& at, int64_t first) const {
    const int64_t right = channels, below = this->below(), both = below + right;
    const Bits* from = x + at.in + first;
    Bits* target = out + at.out + first;
    uint8_t* which = wanted ? choice + at.out + first : nullptr;
    PACD_NO_ALIAS for (int i = 0; i < length; ++i) {
      const Bits a = order(from[i]), b = order(from[i + right]), c = order(from[i + below]), d = order(from[i + both]);
      const Bits ab = a > b ? a : b, cd = c > d ? c : d, best = ab > cd ? ab : cd;
      target[i] = best > 0 ? best : Bits(0);
      if (wanted) {
        const Bits corner = ab == best ? Bits(a != best) : Bits(2 + (c != best));
        which[i] = static_cast<uint8_t>(best > 0 ? corner : Bits(4));
      }
    }
  }

  PACD_INLINE void operator()(int64_t item) const { runs(*this, item); }
};

template <class Bits>
struct PoolPick : Windows {
  const uint8_t* choice;
  const Bits* other;
  Bits* out;

  template <int length>
  PACD_INLINE void run(const Place& at, int64_t first) const {
    const int64_t right = channels, below = this->below(), both = below + right;
    const uint8_t* which = choice + at.out + first;
    const Bits* from = other + at.in + first;
    Bits* target = out + at.out + first;
    PACD_NO_ALIAS for (int c = 0; c < length; ++c) {
      const Bits corner = which[c];
      target[c] =
          static_cast<Bits>((from[c] & mask<Bits>(corner == 0)) | (from[c + right] & mask<Bits>(corner == 1)) |
                            (from[c + below] & mask<Bits>(corner == 2)) | (from[c + both] & mask<Bits>(corner == 3)));
    }
  }

  PACD_INLINE void operator()(int64_t item) const { runs(*this, item); }
};

template <class Bits>
struct PoolSpread : Windows {
  const uint8_t* choice;
  const Bits* grad;
  Bits* out;

  template <int length>
  PACD_INLINE void run(const Place& at, int64_t first) const {
    const int64_t right = channels, below = this->below(), both = below + right;
    const uint8_t* which = choice + at.out + first;
    const Bits* from = grad + at.out + first;
    Bits* target = out + at.in + first;
    PACD_NO_ALIAS for (int c = 0; c < length; ++c) {
      const Bits corner = which[c];
      target[c] = from[c] & mask<Bits>(corner == 0);
      target[c + right] = from[c] & mask<Bits>(corner == 1);
      target[c + below] = from[c] & mask<Bits>(corner == 2);
      target[c + both] = from[c] & mask<Bits>(corner == 3);
    }
  }

  PACD_INLINE void operator()(int64_t item) const { runs(*this, item); }
};

}  // namespace pacd
