// pool_*: 2x2 max-pooling with ReLU, and its derivatives.
#pragma once

#include "kernels/pooling.h"
#include "operators/tensors.h"

namespace pacd {

// Runs make(windows) over the windows of a [N, C, height, width] that is in channels_last.
template <class Exec, class Make>
void run_windows(const Tensor& on, int64_t height, int64_t width, const Make& make) {
  const int64_t images = on.size(0), channels = on.size(1), lines = images * (height / 2);
  if (lines * channels * (width / 2) == 0) return;
  const int64_t span = Exec::channels_together ? channels : 1, together = Exec::channels_together ? width / 2 : 1;
  Exec::run_rows(make(Windows{height, width, channels, span, together}),
                 lines * (width / 2 / together) * (channels / span), 4096 / (span * together) + 1, on);
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
      return PoolChoose<Bits, wanted>{windows, infinity, pointer<const Bits>(x), pointer<Bits>(out),
                                      pointer<uint8_t>(choice)};
    });
  });
  return {out, choice};
}

inline constexpr const char* schema_pool_max = "pool_max(Tensor x) -> Tensor";
template <class Exec>
Tensor pool_max(Tensor x) {
  return std::get<0>(pool<Exec, false>(x));
}

// The pooled numbers, and which of each window they are, as uint8.
inline constexpr const char* schema_pool_choose = "pool_choose(Tensor x) -> (Tensor, Tensor)";
template <class Exec>
std::tuple<Tensor, Tensor> pool_choose(Tensor x) {
  return pool<Exec, true>(x);
}

inline void check_choice(const char* name, const Tensor& choice, const Tensor& other, int64_t height, int64_t width) {
  STD_TORCH_CHECK(choice.dim() == 4 && other.dim() == 4 && choice.scalar_type() == ScalarType::Byte &&
                      choice.size(0) == other.size(0) && choice.size(1) == other.size(1) &&
                      choice.size(2) == height / 2 && choice.size(3) == width / 2,
                  name, ": choice must be uint8 [N, C, H / 2, W / 2]");
  STD_TORCH_CHECK(choice.get_device() == other.get_device(), name, ": choice must be on the other tensor's device");
}

// out from the windows of [N, C, height, width]: one of `numbers` and out has that shape, the other is pooled.
template <class Exec, template <class> class Kernel>
Tensor by_choice(const Tensor& choice, const Tensor& numbers, int64_t height, int64_t width, Tensor out) {
  const Tensor which = channels_last(choice), from = channels_last(numbers);
  with_bits(from.scalar_type(), [&](auto infinity) {
    using Bits = decltype(infinity);
    run_windows<Exec>(from, height, width, [&](const Windows& windows) {
      return Kernel<Bits>{windows, pointer<const uint8_t>(which), pointer<const Bits>(from), pointer<Bits>(out)};
    });
  });
  return out;
}

inline constexpr const char* schema_pool_pick = "pool_pick(Tensor choice, Tensor other) -> Tensor";
template <class Exec>
Tensor pool_pick(Tensor choice, Tensor other) {
  STD_TORCH_CHECK(other.dim() == 4, "pool_pick: other must be [N, C, H, W]");
  const int64_t height = other.size(2), width = other.size(3);
  check_choice("pool_pick", choice, other, height, width);
  Tensor out = empty_channels_last(other, {other.size(0), other.size(1), height / 2, width / 2}, other.scalar_type());
  return by_choice<Exec, PoolPick>(choice, other, height, width, out);
}

inline constexpr const char* schema_pool_spread =
    "pool_spread(Tensor choice, Tensor grad, SymInt height, SymInt width) -> Tensor";
template <class Exec>
Tensor pool_spread(Tensor choice, Tensor grad, int64_t height, int64_t width) {
  check_choice("pool_spread", choice, grad, height, width);
  STD_TORCH_CHECK(grad.size(2) == height / 2 && grad.size(3) == width / 2,
                  "pool_spread: grad must have the shape of choice");
  Tensor out = empty_channels_last(grad, {grad.size(0), grad.size(1), height, width}, grad.scalar_type());
  if (height % 2 || width % 2) torch::stable::zero_(out);  // a rim that no window covers
  return by_choice<Exec, PoolSpread>(choice, grad, height, width, out);
}

}  // namespace pacd
