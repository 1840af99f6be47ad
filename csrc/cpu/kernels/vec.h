// Vectors of float for one instruction set.
//
// Only kernels include this header. They are compiled once for each instruction set, with
// ADATAPE_ISA naming it. Everything here lies in a namespace of that name, so that no inline
// function that was built for one processor is linked into code for another.

#pragma once

#include <cstdint>
#include <cstring>

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
  const IntVec bits = __builtin_convertvector(half, IntVec) << 16;
  return reinterpret_cast<Vec>(bits);
}
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec result = x != x ? IntVec{} + 0x7fc0 : rounded;
  const HalfVec half = __builtin_convertvector(result, HalfVec);
  std::memcpy(to, &half, sizeof half);
}

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

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

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

// With x = n ln 2 + r and |r| <= ln 2 / 2, e^x is 2^n times `mantissa`, a polynomial of r. The
// integer n stands in the lowest bits of `shifted`, behind those of kShift. Takes x from -104
// to 88.
struct SplitExp {
  static constexpr uint32_t kShift = 0x4b400000;
  Vec mantissa;
  IntVec shifted;

  explicit SplitExp(Vec x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23; to add it rounds to an integer
    const Vec rounded = x * kLog2e + kRound;
    const Vec n = rounded - kRound;
    const Vec r = (x - n * kLn2High) - n * kLn2Low;
    Vec p = broadcast(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    mantissa = p * (r * r) + r + 1.0f;
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
  const Vec above = x < kLowest ? broadcast(kLowest) : x;
  const SplitExp split(above > kHighest ? broadcast(kHighest) : above);
  const Vec result = split.mantissa * power_of_2(split.shifted);
  return x < kLowest ? Vec{} : result;
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

}  // namespace adatape::ADATAPE_ISA
