// float16 and bfloat16 as bits, and their conversions, rounded like torch's.
#pragma once

#include "portable.h"

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

}  // namespace pacd
