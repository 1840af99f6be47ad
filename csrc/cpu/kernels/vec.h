// Arithmetic of vectors of float for one instruction set; numbers.h says how these are compiled.

#pragma once

#include <type_traits>

#include "numbers.h"

namespace adatape::ADATAPE_ISA {

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

// A sum folds halves of the vector onto each other until one lane is left, in this order with and
// without AVX-512's instructions.
#if defined(__AVX512F__)
template <class Fold>
inline float folded(Vec x, const Fold& fold) {
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  const __m256 eight = fold(halves[0], halves[1]);
  const __m256 four = fold(eight, _mm256_permute2f128_ps(eight, eight, 1));
  const __m256 two = fold(four, _mm256_permute_ps(four, 0b01001110));
  return _mm256_cvtss_f32(fold(two, _mm256_permute_ps(two, 0b10110001)));
}
inline float sum(Vec x) {
  return folded(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}
inline float max(Vec x) {
  return folded(x, [](__m256 a, __m256 b) { return _mm256_max_ps(b, a); });
}
#else
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
#endif

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
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23; to add it rounds to an integer
  Vec mantissa;
  IntVec shifted;

  explicit SplitExp(Vec x) {
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

// Returns 2^x within 1 unit in the last place, for x up to 127. From -126 down it may be 0, and
// from -150 down it is. NaN gives NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  constexpr float kLowest = -150.0f;
  constexpr __mmask16 kAll = 0xffff;
  const auto as = [](Vec v) { return reinterpret_cast<__m512>(v); };
  // The larger of two numbers is the second one where either is NaN.
  const __m512 above = _mm512_maskz_max_ps(kAll, as(broadcast(kLowest)), as(x));
  const __m512 n = _mm512_maskz_roundscale_ps(kAll, above, _MM_FROUND_TO_NEAREST_INT);
  const Vec r = reinterpret_cast<Vec>(above) - reinterpret_cast<Vec>(n);
#else
  constexpr float kLowest = -127.0f;
  const Vec above = x < kLowest ? broadcast(kLowest) : x;
  const Vec shifted = above + SplitExp::kRound;
  const Vec r = above - (shifted - SplitExp::kRound);
#endif
  // 2^r for |r| <= 1 / 2, exact at 0.
  Vec p = broadcast(1.54531634e-4f);
  p = p * r + 1.33908633e-3f;
  p = p * r + 9.61808302e-3f;
  p = p * r + 5.55035695e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(kAll, as(p), n));
#else
  return p * power_of_2(reinterpret_cast<IntVec>(shifted));
#endif
}

// Turns the columns of a square of words, a vector a row, into its rows.
#if defined(__AVX512F__)
// Takes two quarters of both vectors, which are 0 and 2, or 1 and 3. They are an argument of the
// template, because the instruction has them, whether the call is inlined or not.
constexpr int kEvenQuarters = 0x88, kOddQuarters = 0xdd;
template <int which>
inline __m512i quarters(__m512i a, __m512i b) {
  return _mm512_maskz_shuffle_i32x4(0xffff, a, b, which);
}

__attribute__((always_inline)) inline void transpose(IntVec (&rows)[kLanes]) {
  // The forms without a mask have an undefined operand in some compilers, which warn of it.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllTwos = 0xff;
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
  for (int j = 0; j < 4; ++j) {
    const __m512i low[] = {quarters<kEvenQuarters>(fours[j], fours[4 + j]),
                           quarters<kOddQuarters>(fours[j], fours[4 + j])};
    const __m512i high[] = {quarters<kEvenQuarters>(fours[8 + j], fours[12 + j]),
                            quarters<kOddQuarters>(fours[8 + j], fours[12 + j])};
    for (int i = 0; i < 2; ++i) {
      rows[4 * i + j] = reinterpret_cast<IntVec>(quarters<kEvenQuarters>(low[i], high[i]));
      rows[8 + 4 * i + j] = reinterpret_cast<IntVec>(quarters<kOddQuarters>(low[i], high[i]));
    }
  }
}
#else
__attribute__((always_inline)) inline void transpose(IntVec (&rows)[kLanes]) {
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
