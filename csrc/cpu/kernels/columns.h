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
// A wide row is summed in pieces of so many columns, and a narrow one in one piece. What a chain of
// additions rounds off grows with its length, since every addition rounds a sum of all that came
// before.
constexpr int64_t kPieceColumns = 1024;

// Returns run(wide), whose type tells whether a row is wide. What is compiled for narrow rows has
// one piece.
template <class Run>
inline auto with_wide(int64_t width, const Run& run) {
  return width > kPieceColumns ? run(std::true_type{}) : run(std::false_type{});
}

// Returns where the piece ends that begins at a column: at the end of the row, or before.
template <bool wide>
inline int64_t end_of_piece(int64_t begin, int64_t width) {
  return wide && width - begin > kPieceColumns ? begin + kPieceColumns : width;
}

// Calls body(column, lanes, chain) like for_columns, for the columns of a piece; neighbouring
// vectors belong to different chains, 0 to kChains - 1.
template <class Body>
inline void for_columns_in_chains(int64_t first, int64_t last, const Body& body) {
  int64_t c = first;
  for (; c + kChains * kLanes <= last; c += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) body(c + chain * kLanes, kLanes, chain);
  }
  for (; c + kLanes <= last; c += kLanes) body(c, kLanes, 0);
  if (c < last) body(c, static_cast<int>(last - c), 0);
}

// Adds the chains of a piece to the sum of those before it, if a row has several.
template <bool wide>
inline void add_piece(Vec& row, const Vec (&chains)[kChains]) {
  static_assert(kChains == 4);
  const Vec piece = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  row = wide ? row + piece : piece;
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

// Returns the product of two rows.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t width) {
  return with_wide(width, [&](auto wide) {
    Vec row = {};
    int64_t first = 0;
    do {
      const int64_t last = end_of_piece<wide>(first, width);
      Vec products[kChains] = {};
      for_columns_in_chains(first, last, [&](int64_t c, int lanes, int chain) {
        products[chain] += read(a + c, lanes) * read(b + c, lanes);
      });
      add_piece<wide>(row, products);
      first = last;
    } while (wide && first < width);
    return sum(row);
  });
}

}  // namespace adatape::ADATAPE_ISA
