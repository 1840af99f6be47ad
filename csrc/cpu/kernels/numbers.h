// Numbers of 32 and of 16 bits, and vectors of float for one instruction set that are loaded from
// them and stored to them.
//
// Only kernels include this header. They are compiled once for each instruction set, with
// ADATAPE_ISA naming it. Everything here lies in a namespace of that name, so that no inline
// function that was built for one processor is linked into code for another.

#pragma once

#include <cstdint>
#include <cstring>

#include "../cpu_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adatape::ADATAPE_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kTileRows = 6, kTileVecs = 4;  // of 32 registers 24 hold the tile of a product
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kTileRows = 4, kTileVecs = 3;  // of 16 registers 12 do
#else
constexpr int kVecBytes = 16;
constexpr int kTileRows = 4, kTileVecs = 2;  // of 16 registers 8 do
#endif
constexpr int kLanes = kVecBytes / 4;

// These types have no attribute that lets them alias others, because elements are loaded and stored
// by memcpy.
using Vec = float __attribute__((vector_size(kVecBytes)));
using IntVec = uint32_t __attribute__((vector_size(kVecBytes)));
using HalfVec = uint16_t __attribute__((vector_size(kVecBytes / 2)));

// Between numbers of 16 and of 32 bits. Some compilers make many instructions of a conversion that
// is one.
inline IntVec widened(HalfVec x) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, &x, sizeof half);
  return reinterpret_cast<IntVec>(_mm512_maskz_cvtepu16_epi32(0xffff, half));
#elif defined(__AVX2__)
  __m128i half;
  std::memcpy(&half, &x, sizeof half);
  return reinterpret_cast<IntVec>(_mm256_cvtepu16_epi32(half));
#else
  return __builtin_convertvector(x, IntVec);
#endif
}
inline HalfVec narrowed(IntVec x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x));
  HalfVec result;
  std::memcpy(&result, &half, sizeof result);
  return result;
#else
  return __builtin_convertvector(x, HalfVec);
#endif
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_float(float16 x) {
  constexpr uint32_t kInfinite = 0x7c00, kSmallestNormal = 0x0400;
  const uint32_t size = x.bits & 0x7fffu, sign = uint32_t{x.bits & 0x8000u} << 16;
  // Numbers below the normal ones are multiples of 2^-24.
  const float small = static_cast<float>(size) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &small, sizeof bits);
  if (size >= kSmallestNormal) bits = (size << 13) + (112u << 23);
  if (size >= kInfinite) bits = (size << 13) | 0x7f800000u;
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  if (x != x) return {0x7fc0};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x7fff + ((bits >> 16) & 1);  // rounds to nearest, and ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

template <>
inline float16 from_float<float16>(float x) {
  constexpr uint32_t kTooLarge = 0x47800000;        // 2^16
  constexpr uint32_t kSmallestNormal = 0x38800000;  // 2^-14
  constexpr uint32_t kHalf = 0x3f000000;            // 0.5
  if (x != x) return {0x7e00};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size >= kTooLarge) return {static_cast<uint16_t>(sign | 0x7c00)};
  uint32_t result;
  if (size < kSmallestNormal) {
    // Beside 0.5 what is left of a number is a multiple of 2^-24, rounded to nearest.
    const float beside = (x < 0.0f ? -x : x) + 0.5f;
    std::memcpy(&result, &beside, sizeof result);
    result -= kHalf;
  } else {
    result = (size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Vec load(const bfloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  const IntVec bits = widened(half) << 16;
  return reinterpret_cast<Vec>(bits);
}
#if defined(__AVX512F__)
inline Vec load(const float16* from) {
  __m256i half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, half));
}
#elif defined(__F16C__)
inline Vec load(const float16* from) {
  __m128i half;
  std::memcpy(&half, from, sizeof half);
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(half));
}
#else
inline Vec load(const float16* from) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = to_float(from[i]);
  return result;
}
#endif
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec result = x != x ? IntVec{} + 0x7fc0 : rounded;
  const HalfVec half = narrowed(result);
  std::memcpy(to, &half, sizeof half);
}

#if defined(__AVX512F__)
inline void store(float16* to, Vec x) {
  const __m256i half =
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof half);
}
#elif defined(__F16C__)
inline void store(float16* to, Vec x) {
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof half);
}
#else
inline void store(float16* to, Vec x) {
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<float16>(x[i]);
}
#endif

// Which cache memory is fetched into, by the numbers of the compiler.
constexpr int kFirstCache = 3, kSecondCache = 2;

// Fetches `count` numbers into a cache. Were it not inlined, a compiler might take a function that
// only fetches for one that does nothing.
template <int cache, class T>
__attribute__((always_inline)) inline void prefetch(const T* from, int64_t count) {
  constexpr auto kNumbers = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += kNumbers) __builtin_prefetch(from + i, 0, cache);
}

// Two numbers in bfloat16, the first in the lower half.
struct BFloat16Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
// Rounds to nearest, and ties to even. Where a number is below the normal ones it becomes 0, so
// that this is for what a kernel computes with, not for what it writes.
inline HalfVec rounded(Vec x) {
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  HalfVec result;
  std::memcpy(&result, &half, sizeof result);
  return result;
}
#endif

// Loads the first `count` numbers, fewer than a vector, with zeros behind them.
#if defined(__AVX512F__)
inline Vec load_some(const float* from, int64_t count) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
}
#endif
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  T some[kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
  return load(some);
}
// Stores the first `count` elements.
template <class T>
inline void store_some(T* to, Vec x, int count) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < count; ++i) to[i] = from_float<T>(lanes[i]);
}

// Returns run(number), whose type tells of what a matrix of this dtype consists.
template <class Run>
inline auto with_number(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kBFloat16:
      return run(bfloat16{});
    case DType::kFloat16:
      return run(float16{});
    case DType::kFloat:
      break;
  }
  return run(float{});
}

// Calls run(wide, narrow) for two matrices of one dtype, or of which the first one is in float.
template <class Run>
inline void with_wide_and_narrow(DType wide, DType narrow, const Run& run) {
  with_number(narrow, [&](auto number) {
    wide == DType::kFloat ? run(float{}, number) : run(number, number);
  });
}

}  // namespace adatape::ADATAPE_ISA
