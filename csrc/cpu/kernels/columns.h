// Loops over the columns of a row by whole vectors, and then over what is left of its width.

#pragma once

#include "vec.h"

namespace adatape::ADATAPE_ISA {

// Calls body(column, lanes) for whole vectors, where lanes is kLanes, then for the rest, if any.
template <class Body>
inline void for_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes);
  if (c < width) body(c, static_cast<int>(width - c));
}

// Sums over a row take so many vectors in turn, so that an addition need not wait for the last one.
constexpr int kChains = 4;

// Calls body(column, lanes, chain) like for_columns; neighbouring vectors belong to different
// chains, 0 to kChains - 1.
template <class Body>
inline void for_columns_in_chains(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; c + kChains * kLanes <= width; c += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) body(c + chain * kLanes, kLanes, chain);
  }
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes, 0);
  if (c < width) body(c, static_cast<int>(width - c), 0);
}

inline float sum(const Vec (&chains)[kChains]) {
  static_assert(kChains == 4);
  return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// Reads a vector of which the first `lanes` elements exist; the others are zero.
template <class T>
inline Vec read(const T* from, int lanes) {
  return lanes == kLanes ? load(from) : load_some(from, lanes);
}

// Writes the first `lanes` elements of a vector.
template <class T>
inline void write(T* to, Vec x, int lanes) {
  lanes == kLanes ? store(to, x) : store_some(to, x, lanes);
}

// Returns the first `lanes` elements of a vector, with zeros behind them.
inline Vec first_lanes(Vec x, int lanes) {
  if (lanes == kLanes) return x;
  for (int i = lanes; i < kLanes; ++i) x[i] = 0.0f;
  return x;
}

}  // namespace adatape::ADATAPE_ISA
