// Vectors of float for one instruction set.
//
// Only kernels include this header. They are compiled once for each instruction set, with
// ADATAPE_ISA naming it. Everything here lies in a namespace of that name, so that no inline
// function that was built for one processor is linked into code for another.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
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

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
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
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec result = x != x ? IntVec{} + 0x7fc0 : rounded;
  const HalfVec half = narrowed(result);
  std::memcpy(to, &half, sizeof half);
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

// Loads the first `count` elements, with zeros behind them.
template <class T>
inline Vec load_some(const T* from, int count) {
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = to_float(from[i]);
  return load(lanes);
}
// Stores the first `count` elements.
template <class T>
inline void store_some(T* to, Vec x, int count) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < count; ++i) to[i] = from_float<T>(lanes[i]);
}

#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

// Returns the first `count` lanes of x, and `other` in those behind them.
inline Vec first_lanes(Vec x, int64_t count, float other) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  return lane < static_cast<uint32_t>(count) ? x : broadcast(other);
}

// Returns -|x|.
inline Vec negative_size(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) | 0x80000000u);
}

inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float max(Vec x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// With x = n ln 2 + r and |r| <= ln 2 / 2, e^x is 2^n times a polynomial of r.
constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

inline Vec exp_polynomial(Vec x, Vec n) {
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = broadcast(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x is 2^n times `mantissa`. The integer n stands in the lowest bits of `shifted`, behind those
// of kShift. Takes x from -104 to 88.
struct SplitExp {
  static constexpr uint32_t kShift = 0x4b400000;
  Vec mantissa;
  IntVec shifted;

  explicit SplitExp(Vec x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23; to add it rounds to an integer
    const Vec rounded = x * kLog2e + kRound;
    mantissa = exp_polynomial(x, rounded - kRound);
    shifted = reinterpret_cast<IntVec>(rounded);
  }
};

// Returns 2^n for the bits of n + kShift, n from -126 to 127.
inline Vec power_of_2(IntVec shifted) {
  return reinterpret_cast<Vec>((shifted - SplitExp::kShift + 127) << 23);
}

// Returns e^x within 2 units in the last place. The result is 0 below -87, e^88 above 88, and NaN
// for NaN.
inline Vec exp(Vec x) {
  constexpr float kLowest = -87.0f, kHighest = 88.0f;
#if defined(__AVX512F__)
  // An instruction rounds to an integer, and another multiplies by a power of two.
  constexpr __mmask16 kAll = 0xffff;
  const auto as = [](Vec v) { return reinterpret_cast<__m512>(v); };
  const __mmask16 some = _mm512_cmp_ps_mask(as(x), as(broadcast(kLowest)), _CMP_NLT_UQ);
  const auto low = reinterpret_cast<Vec>(_mm512_maskz_min_ps(kAll, as(broadcast(kHighest)), as(x)));
  const __m512 n = _mm512_maskz_roundscale_ps(kAll, as(low * kLog2e), _MM_FROUND_TO_NEAREST_INT);
  const Vec mantissa = exp_polynomial(low, reinterpret_cast<Vec>(n));
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(some, as(mantissa), n));
#else
  const Vec above = x < kLowest ? broadcast(kLowest) : x;
  const SplitExp split(above > kHighest ? broadcast(kHighest) : above);
  const Vec result = split.mantissa * power_of_2(split.shifted);
  return x < kLowest ? Vec{} : result;
#endif
}

// Returns e^x as exp does, for x up to 0 only, but also where the result lies below the normal
// numbers: it is 0 from -104 down.
inline Vec exp_to_smallest(Vec x) {
  constexpr float kLowest = -104.0f;
  constexpr uint32_t kLowestPower = SplitExp::kShift - 126;
  const SplitExp split(x < kLowest ? broadcast(kLowest) : x);
  // A power of two below the normal numbers is the product of two that are normal.
  const IntVec below = split.shifted < kLowestPower ? kLowestPower - split.shifted : IntVec{};
  const Vec normal = split.mantissa * power_of_2(split.shifted + below);
  return normal * power_of_2(SplitExp::kShift - below);
}

// Turns the columns of a square of words, a vector a row, into its rows.
#if defined(__AVX512F__)
inline void transpose(IntVec (&rows)[kLanes]) {
  // The forms without a mask have an undefined operand in some compilers, which warn of it.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllTwos = 0xff;
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both vectors
  // First within each square of 4 words, then among the four quarters of the vectors.
  __m512i twos[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    const auto a = reinterpret_cast<__m512i>(rows[i]), b = reinterpret_cast<__m512i>(rows[i + 1]);
    twos[i] = _mm512_maskz_unpacklo_epi32(kAll, a, b);
    twos[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, a, b);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_maskz_unpacklo_epi64(kAllTwos, twos[i + j], twos[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(kAllTwos, twos[i + j], twos[i + 2 + j]);
    }
  }
  const auto quarters = [](__m512i a, __m512i b, auto which) {
    return _mm512_maskz_shuffle_i32x4(kAll, a, b, which);
  };
  for (int j = 0; j < 4; ++j) {
    const std::integral_constant<int, kEven> even{};
    const std::integral_constant<int, kOdd> odd{};
    const __m512i low[] = {quarters(fours[j], fours[4 + j], even),
                           quarters(fours[j], fours[4 + j], odd)};
    const __m512i high[] = {quarters(fours[8 + j], fours[12 + j], even),
                            quarters(fours[8 + j], fours[12 + j], odd)};
    for (int i = 0; i < 2; ++i) {
      rows[4 * i + j] = reinterpret_cast<IntVec>(quarters(low[i], high[i], even));
      rows[8 + 4 * i + j] = reinterpret_cast<IntVec>(quarters(low[i], high[i], odd));
    }
  }
}
#else
inline void transpose(IntVec (&rows)[kLanes]) {
  IntVec columns[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) columns[i][j] = rows[j][i];
  }
  std::memcpy(rows, columns, sizeof columns);
}
#endif

// Returns the smaller of two numbers, and b where one of them is NaN.
#if defined(__AVX512F__)
inline Vec min(Vec a, Vec b) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// Returns e^x as exp does, for x from -1000 to 1000 only, but also infinity above 89.
inline Vec exp_to_infinity(Vec x) {
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xffff;
  const auto scaled = reinterpret_cast<__m512>(x * kLog2e);
  const __m512 n = _mm512_maskz_roundscale_ps(kAll, scaled, _MM_FROUND_TO_NEAREST_INT);
  const Vec mantissa = exp_polynomial(x, reinterpret_cast<Vec>(n));
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(kAll, reinterpret_cast<__m512>(mantissa), n));
#else
  return x > 88.0f ? broadcast(__builtin_inff()) : exp(x);
#endif
}

}  // namespace adatape::ADATAPE_ISA
