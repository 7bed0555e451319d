// Tiles of 64 normal numbers on the CPU: the same function three times, chosen when the library is loaded.
//
// Two are the portable code, compiled for AVX2 and for any processor.  The one for AVX-512 writes the 32 x 32 -> 64 bit
// products of Philox out, where g++ 12 takes full 64 x 64 bit ones: a tenth less time.  The bits are equal: test_ops.py
// holds all of them against the portable code.
#pragma once

#include "math/lattice.h"

namespace pacd {

// The two keys of each of Philox's ten rounds, a 64-bit lane each: a function of the seed alone, made once a call.
struct RoundKeys {
  int64_t keys[20];
  explicit RoundKeys(uint64_t seed) {
    for (int i = 0; i < 20; ++i) {
      const uint32_t half = static_cast<uint32_t>(i % 2 ? seed >> 32 : seed);
      keys[i] = static_cast<uint32_t>(half + static_cast<uint32_t>(i / 2) * (i % 2 ? 0xBB67AE85u : 0x9E3779B9u));
    }
  }
};

// The numbers of `count` tiles from `first` on, of the last tile only `wanted`.  With pixels, fma(sigma, number, pixel)
// instead, and nothing is written behind the last one.
template <class Pairs>
PACD_INLINE void portable_tiles(const NoiseKey& key, int64_t first, int count, int wanted, float* out,
                                const float* pixels, float sigma) {
  for (int i = 0; i < count; ++i, out += tile_size) {
    alignas(64) float drawn[tile_size];
    float* numbers = pixels ? drawn : out;
    for (int lane = 0; lane < tile_lanes; ++lane)
      four_normals<Pairs>(random_words(key, static_cast<uint32_t>((first + i) * tile_lanes + lane)), numbers + lane,
                          tile_lanes);
    if (pixels) {
      const int length = i == count - 1 ? wanted : tile_size;
      for (int j = 0; j < length; ++j) out[j] = fma(sigma, numbers[j], pixels[j]);
      pixels += tile_size;
    }
  }
}

}  // namespace pacd

#if defined(PACD_HAS_LEVELS)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // both: in the headers of g++ 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace pacd {

#define PACD_V4 __attribute__((target("arch=x86-64-v4")))

// Ten rounds for eight counters, each word in the low half of a 64-bit lane; keys: the two of each round in turn.
PACD_V4 inline __attribute__((always_inline)) void philox_eight(__m512i w[4], const int64_t* keys) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(w[0], m0), p1 = _mm512_mul_epu32(w[2], m1);
    w[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), w[1], _mm512_set1_epi64(keys[2 * round]), 0x96);
    w[1] = p1;
    w[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), w[3], _mm512_set1_epi64(keys[2 * round + 1]), 0x96);
    w[3] = p0;
  }
}

// As portable_tiles; where the first half of the last tile is enough, the other is not made.
template <class Pairs>
PACD_V4 inline __attribute__((always_inline)) void avx512_tiles(const RoundKeys& rounds, const NoiseKey& key,
                                                                int64_t first, int count, int wanted, float* numbers,
                                                                const float* pixels, float sigma) {
  const int64_t* keys = rounds.keys;
  const uint32_t top = (key.stream << 16) | static_cast<uint32_t>((key.image >> 32) & 0xFFFFu);
  const __m512i sample = _mm512_set1_epi64(key.sample), image = _mm512_set1_epi64(static_cast<uint32_t>(key.image));
  const __m512i stream = _mm512_set1_epi64(top);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i block = _mm512_add_epi64(_mm512_set1_epi64(first * tile_lanes), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  for (int i = 0; i < count; ++i, numbers += tile_size) {
    __m512i low[4] = {block, sample, image, stream};
    block = _mm512_add_epi64(block, _mm512_set1_epi64(8));
    __m512i high[4] = {block, sample, image, stream};
    block = _mm512_add_epi64(block, _mm512_set1_epi64(8));
    philox_eight(low, keys);
    philox_eight(high, keys);
    alignas(64) uint32_t words[4][tile_lanes];
    for (int w = 0; w < 4; ++w) _mm512_store_si512(words[w], _mm512_permutex2var_epi32(low[w], even, high[w]));
    if (i == count - 1 && wanted < tile_size) {
      alignas(64) float drawn[tile_size];
      float* last = pixels ? drawn : numbers;
      if (wanted == tile_lanes && pixels) {  // 28 x 28 images: no sines, and no way round
        for (int lane = 0; lane < tile_lanes; ++lane)
          numbers[lane] = fma(sigma, Pairs::pair(words[0][lane], words[1][lane]).first, pixels[lane]);
        return;
      }
      for (int lane = 0; lane < tile_lanes; ++lane) {
        const NormalPair a = Pairs::pair(words[0][lane], words[1][lane]);
        last[lane] = a.first;
        last[lane + tile_lanes] = a.second;
      }
      if (wanted > tile_size / 2) {
        for (int lane = 0; lane < tile_lanes; ++lane) {
          const NormalPair b = Pairs::pair(words[2][lane], words[3][lane]);
          last[lane + 2 * tile_lanes] = b.first;
          last[lane + 3 * tile_lanes] = b.second;
        }
      }
      if (pixels) {
        for (int j = 0; j < wanted; ++j) numbers[j] = fma(sigma, drawn[j], pixels[j]);
      }
    } else if (pixels) {
      for (int lane = 0; lane < tile_lanes; ++lane) {
        const NormalPair a = Pairs::pair(words[0][lane], words[1][lane]), b = Pairs::pair(words[2][lane], words[3][lane]);
        numbers[lane] = fma(sigma, a.first, pixels[lane]);
        numbers[lane + tile_lanes] = fma(sigma, a.second, pixels[lane + tile_lanes]);
        numbers[lane + 2 * tile_lanes] = fma(sigma, b.first, pixels[lane + 2 * tile_lanes]);
        numbers[lane + 3 * tile_lanes] = fma(sigma, b.second, pixels[lane + 3 * tile_lanes]);
      }
      pixels += tile_size;
    } else {
      for (int lane = 0; lane < tile_lanes; ++lane)
        four_normals<Pairs>({words[0][lane], words[1][lane], words[2][lane], words[3][lane]}, numbers + lane, tile_lanes);
    }
  }
}

// draw_tiles(Pairs(), ...) at each level, for each way to make numbers of words.
#define PACD_TILES_ARGUMENTS                                                                                  \
  [[maybe_unused]] const RoundKeys &rounds, const NoiseKey &key, int64_t first, int count, int wanted,        \
      float *numbers, const float *pixels, float sigma
#define PACD_DRAW_TILES(Pairs)                                                                    \
  PACD_V4 inline void draw_tiles(Pairs, PACD_TILES_ARGUMENTS) {                                   \
    avx512_tiles<Pairs>(rounds, key, first, count, wanted, numbers, pixels, sigma);               \
  }                                                                                               \
  __attribute__((target("arch=x86-64-v3"))) inline void draw_tiles(Pairs, PACD_TILES_ARGUMENTS) { \
    portable_tiles<Pairs>(key, first, count, wanted, numbers, pixels, sigma);                     \
  }                                                                                               \
  __attribute__((target("default"))) inline void draw_tiles(Pairs, PACD_TILES_ARGUMENTS) {        \
    portable_tiles<Pairs>(key, first, count, wanted, numbers, pixels, sigma);                     \
  }

PACD_DRAW_TILES(BoxMuller)
PACD_DRAW_TILES(BoundedBoxMuller)

}  // namespace pacd
#pragma GCC diagnostic pop
#else
namespace pacd {
template <class Pairs>
inline void draw_tiles(Pairs, const RoundKeys&, const NoiseKey& key, int64_t first, int count, int wanted,
                       float* numbers, const float* pixels, float sigma) {
  portable_tiles<Pairs>(key, first, count, wanted, numbers, pixels, sigma);
}
}  // namespace pacd
#endif
