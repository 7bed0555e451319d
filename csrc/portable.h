// What lets one source compile for the host (g++, clang) and for the device (nvcc).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Bounds and equal bits rest on IEEE arithmetic, NaN included.  nvcc's --use_fast_math defines nothing: CMakeLists.txt
// refuses it.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "pacd_fast's bounds need IEEE arithmetic: build it without -ffast-math and the options that it stands for"
#endif

#if defined(__CUDACC__)
#define PACD_HD __host__ __device__
#define PACD_INLINE __host__ __device__ __forceinline__
#else
#define PACD_HD
// Forced: a function that is not inlined into a target_clones function keeps the baseline instruction set.
#define PACD_INLINE inline __attribute__((always_inline))
#endif

// A host function compiled three times and chosen when the library is loaded; equal bits at every level, because
// contraction is off (-ffp-contract=off) and every fma is written out.  PACD_NO_CLONES is for sanitizer builds, whose
// runtime is not up yet when the loader resolves the clones.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PACD_NO_CLONES)
#define PACD_HAS_LEVELS 1
#define PACD_CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PACD_CLONES
#endif

// PACD_LANES before a loop over lanes: not peeled into scalar code before the vectoriser sees it.
// PACD_NO_ALIAS before a loop whose reads and writes never overlap; not peeled either.
// PACD_UNROLL before a loop over rows of local arrays, which are to live in registers.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define PACD_LANES _Pragma("GCC unroll 1")
#define PACD_NO_ALIAS _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#define PACD_UNROLL _Pragma("GCC unroll 16")
#else
#define PACD_LANES
#define PACD_NO_ALIAS
#define PACD_UNROLL
#endif

namespace pacd {

// Written out rather than std::fma so that g++ sees the builtin and vectorises it.
PACD_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

PACD_INLINE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// Correctly rounded on both sides.
PACD_INLINE float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

PACD_INLINE double sqrt_rn(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

template <class To, class From>
PACD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The next double towards +infinity, or towards -infinity, for finite x.
PACD_INLINE double next_above(double x) {
  if (x == 0.0) return 4.9406564584124654e-324;
  return bits_as<double>(bits_as<int64_t>(x) + (x > 0.0 ? 1 : -1));
}

PACD_INLINE double next_below(double x) { return -next_above(-x); }

// a / b for numbers >= 0; quicker on a card where both are below 2^32.
PACD_INLINE int64_t quotient(int64_t a, int64_t b) {
  const bool small = (a | b) < 0x100000000;
  return small ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// Four neighbours in memory, moved at once.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

PACD_INLINE bool holds_fours(const void* place, size_t size) {
  return reinterpret_cast<uintptr_t>(place) % (4 * size) == 0;
}

}  // namespace pacd
