// Philox4x32-10: 128 bits of counter and 64 bits of key to 128 random bits, without state.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.  The tests hold it
// against the known answers that the authors publish with Random123.
#pragma once

#include "portable.h"

namespace pacd {

struct Words {
  uint32_t w0, w1, w2, w3;
};

PACD_INLINE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  // Words travel in 64-bit lanes whose upper halves are ignored: then a round is two products, two shifts and two xors,
  // without the shuffles that 32-bit lanes need (AVX-512: 0.27 instead of 0.56 ns a word).
  constexpr uint64_t low = 0xFFFFFFFFu;
  uint64_t w0 = counter.w0, w1 = counter.w1, w2 = counter.w2, w3 = counter.w3;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53u * (w0 & low);
    const uint64_t p1 = 0xCD9E8D57u * (w2 & low);
    w0 = (p1 >> 32) ^ w1 ^ key0;
    w1 = p1;
    w2 = (p0 >> 32) ^ w3 ^ key1;
    w3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {static_cast<uint32_t>(w0), static_cast<uint32_t>(w1), static_cast<uint32_t>(w2), static_cast<uint32_t>(w3)};
}

// How the package lays its randomness out: noise is a function of these four numbers and the block, and nothing else.
struct NoiseKey {
  uint64_t seed;    // the generator's key
  uint64_t image;   // 48 bits: the image's id in its data set
  uint32_t stream;  // 16 bits: which use; 0 selection, 1 estimation, 2 and up training and attacks
  uint32_t sample;  // which copy of the image
};

// Block b holds the random words of four elements of the image.
PACD_INLINE Words random_words(const NoiseKey& key, uint32_t block) {
  const Words counter = {block, key.sample, static_cast<uint32_t>(key.image),
                         (key.stream << 16) | static_cast<uint32_t>((key.image >> 32) & 0xFFFFu)};
  return philox4x32(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

}  // namespace pacd
