// Vectors whose lanes are folded, by an addition or a maximum, for as many rows at a time as a
// vector has lanes: one lane of the result a row.
//
// The lanes of each row are folded by the same tree, so that equal rows give equal bits wherever
// they stand.

#pragma once

#include "vec.h"

namespace adatape::ADATAPE_ISA {

#if defined(__AVX512F__)
template <class Fold>
inline Vec folded_rows(const Vec (&rows)[kLanes], const Fold& fold) {
  // The forms without a mask have an undefined operand in some compilers, which warn of it.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllTwos = 0xff;
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both vectors
  const auto as = [](Vec x) { return reinterpret_cast<__m512>(x); };
  const auto as_twos = [](Vec x) { return reinterpret_cast<__m512d>(x); };
  Vec twos[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    const Vec a = rows[2 * i], b = rows[2 * i + 1];
    twos[i] = fold(reinterpret_cast<Vec>(_mm512_maskz_unpacklo_ps(kAll, as(a), as(b))),
                   reinterpret_cast<Vec>(_mm512_maskz_unpackhi_ps(kAll, as(a), as(b))));
  }
  for (int i = 0; i < 4; ++i) {
    const Vec a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] =
        fold(reinterpret_cast<Vec>(_mm512_maskz_unpacklo_pd(kAllTwos, as_twos(a), as_twos(b))),
             reinterpret_cast<Vec>(_mm512_maskz_unpackhi_pd(kAllTwos, as_twos(a), as_twos(b))));
  }
  const auto halves = [&](Vec a, Vec b) {
    return fold(reinterpret_cast<Vec>(_mm512_maskz_shuffle_f32x4(kAll, as(a), as(b), kEven)),
                reinterpret_cast<Vec>(_mm512_maskz_shuffle_f32x4(kAll, as(a), as(b), kOdd)));
  };
  for (int i = 0; i < 2; ++i) eights[i] = halves(fours[2 * i], fours[2 * i + 1]);
  return halves(eights[0], eights[1]);
}
#elif defined(__AVX2__)
template <class Fold>
inline Vec folded_rows(const Vec (&rows)[kLanes], const Fold& fold) {
  const auto as = [](Vec x) { return reinterpret_cast<__m256>(x); };
  const auto as_twos = [](Vec x) { return reinterpret_cast<__m256d>(x); };
  Vec twos[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Vec a = rows[2 * i], b = rows[2 * i + 1];
    twos[i] = fold(reinterpret_cast<Vec>(_mm256_unpacklo_ps(as(a), as(b))),
                   reinterpret_cast<Vec>(_mm256_unpackhi_ps(as(a), as(b))));
  }
  for (int i = 0; i < 2; ++i) {
    const Vec a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = fold(reinterpret_cast<Vec>(_mm256_unpacklo_pd(as_twos(a), as_twos(b))),
                    reinterpret_cast<Vec>(_mm256_unpackhi_pd(as_twos(a), as_twos(b))));
  }
  return fold(reinterpret_cast<Vec>(_mm256_permute2f128_ps(as(fours[0]), as(fours[1]), 0x20)),
              reinterpret_cast<Vec>(_mm256_permute2f128_ps(as(fours[0]), as(fours[1]), 0x31)));
}
#else
template <class Fold>
inline Vec folded_rows(const Vec (&rows)[kLanes], const Fold& fold) {
  IntVec square[kLanes];
  std::memcpy(square, rows, sizeof square);
  transpose(square);
  Vec lanes[kLanes];
  std::memcpy(lanes, square, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = fold(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}
#endif

}  // namespace adatape::ADATAPE_ISA
