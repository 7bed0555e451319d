// 2x2 max-pooling with ReLU: the kernels, then the operators, for any executor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

#include "hd.h"

namespace pacd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 2x2 max-pooling and ReLU of x [N, H, W, C]: of each window the first largest number, if it is above 0.  PoolChoose says
// which of the four that is, PoolPick reads another tensor there, PoolSpread writes there and 0 elsewhere.  These two are
// each other's derivative, so that all derivatives are these two.
//
// It is a choice, not arithmetic, so that numbers are taken as signed integers of their width, of any floating type: those
// above 0 have the order of the numbers, all others are of no interest.  It is written with masks, which the compiler turns
// into SIMD where it would not turn conditions.  An item is a line of windows in all channels or, with span and together 1,
// a window in one channel.
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
    constexpr Bits most = static_cast<Bits>((uint64_t{1} << (8 * sizeof(Bits) - 1)) - 1);  // not numeric_limits: a host function
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
      target[c] = static_cast<Bits>((from[c] & mask<Bits>(corner == 0)) | (from[c + right] & mask<Bits>(corner == 1)) |
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

inline Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast); }

inline Tensor empty_channels_last(const Tensor& on, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, on.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls run(infinity), the bits of infinity as a signed integer of a floating dtype's width.
template <class Run>
void with_bits(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(int32_t{0x7F800000});
  if (dtype == ScalarType::Double) return run(int64_t{0x7FF0000000000000});
  if (dtype == ScalarType::BFloat16) return run(int16_t{0x7F80});
  STD_TORCH_CHECK(dtype == ScalarType::Half, "expected a floating dtype");
  run(int16_t{0x7C00});
}

// Runs make(windows) over the windows of a [N, C, height, width] that is in channels_last.
template <class Exec, class Make>
void run_windows(const Tensor& on, int64_t height, int64_t width, const Make& make) {
  const int64_t images = on.size(0), channels = on.size(1), lines = images * (height / 2);
  if (lines * channels * (width / 2) == 0) return;
  const int64_t span = Exec::channels_together ? channels : 1, together = Exec::channels_together ? width / 2 : 1;
  Exec::run_rows(make(Windows{height, width, channels, span, together}), lines * (width / 2 / together) * (channels / span),
                 4096 / (span * together) + 1, on);
}

template <class Exec, bool wanted>
std::tuple<Tensor, Tensor> pool(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 4, "pool: x must be [N, C, H, W]");
  const Tensor x = channels_last(given);
  const std::vector<int64_t> size{x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2};
  Tensor out = empty_channels_last(x, size, x.scalar_type());
  Tensor choice = empty_channels_last(x, wanted ? size : std::vector<int64_t>{0, 1, 1, 1}, ScalarType::Byte);
  with_bits(x.scalar_type(), [&](auto infinity) {
    using Bits = decltype(infinity);
    run_windows<Exec>(x, x.size(2), x.size(3), [&](const Windows& windows) {
      return PoolChoose<Bits, wanted>{windows, infinity, static_cast<const Bits*>(x.data_ptr()), static_cast<Bits*>(out.data_ptr()),
                                      static_cast<uint8_t*>(choice.data_ptr())};
    });
  });
  return {out, choice};
}

template <class Exec>
Tensor pool_max(Tensor x) {
  return std::get<0>(pool<Exec, false>(x));
}

// The pooled numbers, and which of each window they are, as uint8.
template <class Exec>
std::tuple<Tensor, Tensor> pool_choose(Tensor x) {
  return pool<Exec, true>(x);
}

inline void check_choice(const char* name, const Tensor& choice, const Tensor& other, int64_t height, int64_t width) {
  STD_TORCH_CHECK(choice.dim() == 4 && other.dim() == 4 && choice.scalar_type() == ScalarType::Byte &&
                      choice.size(0) == other.size(0) && choice.size(1) == other.size(1) && choice.size(2) == height / 2 &&
                      choice.size(3) == width / 2,
                  name, ": choice must be uint8 [N, C, H / 2, W / 2]");
  STD_TORCH_CHECK(choice.get_device() == other.get_device(), name, ": choice must be on the other tensor's device");
}

// out from the windows of [N, C, height, width], of which one of `numbers` and out has the shape and the other is pooled.
template <class Exec, template <class> class Kernel>
Tensor by_choice(const Tensor& choice, const Tensor& numbers, int64_t height, int64_t width, Tensor out) {
  const Tensor which = channels_last(choice), from = channels_last(numbers);
  with_bits(from.scalar_type(), [&](auto infinity) {
    using Bits = decltype(infinity);
    run_windows<Exec>(from, height, width, [&](const Windows& windows) {
      return Kernel<Bits>{windows, static_cast<const uint8_t*>(which.data_ptr()), static_cast<const Bits*>(from.data_ptr()),
                          static_cast<Bits*>(out.data_ptr())};
    });
  });
  return out;
}

template <class Exec>
Tensor pool_pick(Tensor choice, Tensor other) {
  STD_TORCH_CHECK(other.dim() == 4, "pool_pick: other must be [N, C, H, W]");
  const int64_t height = other.size(2), width = other.size(3);
  check_choice("pool_pick", choice, other, height, width);
  Tensor out = empty_channels_last(other, {other.size(0), other.size(1), height / 2, width / 2}, other.scalar_type());
  return by_choice<Exec, PoolPick>(choice, other, height, width, out);
}

template <class Exec>
Tensor pool_spread(Tensor choice, Tensor grad, int64_t height, int64_t width) {
  check_choice("pool_spread", choice, grad, height, width);
  STD_TORCH_CHECK(grad.size(2) == height / 2 && grad.size(3) == width / 2, "pool_spread: grad must have the shape of choice");
  Tensor out = empty_channels_last(grad, {grad.size(0), grad.size(1), height, width}, grad.scalar_type());
  if (height % 2 || width % 2) torch::stable::zero_(out);  // a rim that no window covers
  return by_choice<Exec, PoolSpread>(choice, grad, height, width, out);
}

}  // namespace pacd
