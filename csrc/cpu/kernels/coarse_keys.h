// Coarse scores: products of a query and keys that are rounded to bytes, with a bound of what
// rounding can have changed.
//
// A key k is rounded to s n, where n is whole numbers from -127 to 127 and s the key's own step,
// and a query q to t m likewise. Because |k - s n| is at most s / 2 in every feature,
//
//   |q·k - s t (n·m)| = |(q - t m)·k + t m·(k - s n)| <= |q - t m| |k| + s / 2 · sum |t m|
//
// with the Euclidean norms of q - t m and k. n·m is a sum of whole numbers and has no error.
//
// The bytes of a bank lie in panels as its floats do in gemm.h, but the element is a quad: four
// features of one entry. Which four is up to the vectors at hand, and the same for keys and query.

#pragma once

#include "gemm.h"
#include "row_products.h"
#include "tape_select_step.h"

namespace adatape::ADATAPE_ISA {

// Four whole numbers, a byte each. Those of a query have a sign, those of keys are 128 more than
// what they stand for.
struct Quad {
  uint32_t bits;
};

constexpr float kMostOfKey = 127.0f, kMostOfQuery = 127.0f;
constexpr uint32_t kKeyOffset = 128;

// gemm.h finds these two by their arguments. The sums are whole numbers, whose bits stand in a
// vector of float.
inline IntVec load_elements(const Quad* from) {
  IntVec result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Vec multiply_add(Vec sum, const Quad* left, IntVec right) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Vec>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(right),
                          _mm512_set1_epi32(static_cast<int>(left->bits))));
#else
  // Without the instruction this serves no call; choose_kernels.cpp knows.
  IntVec products = {};
  for (int byte = 0; byte < 4; ++byte) {
    const int of_query = static_cast<int8_t>(left->bits >> 8 * byte);
    products += (right >> 8 * byte & 0xff) * static_cast<uint32_t>(of_query);
  }
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(sum) + products);
#endif
}

// Returns the quads of a key or a query of so many features.
constexpr int64_t quads_of(int64_t width) { return (width + 3) / 4; }

constexpr int64_t kFeaturesOfQuads = 4 * kLanes;

// Loads the features of a vector of quads from feature d on: of those that are left of the width,
// each of the four vectors has a quarter, with zeros behind it.
template <class T>
inline void load_quarters(const T* row, int64_t d, int64_t width, Vec (&quarters)[4]) {
  const int64_t left = width - d;
  if (left >= kFeaturesOfQuads) {
    for (int j = 0; j < 4; ++j) quarters[j] = load(row + d + j * kLanes);
    return;
  }
  const int64_t quads = quads_of(left);
  for (int j = 0; j < 4; ++j) {
    const int64_t behind = left - j * quads, count = behind < quads ? behind : quads;
    const T* const from = row + d + j * quads;
    quarters[j] = count <= 0 ? Vec{} : count < kLanes ? load_some(from, count) : load(from);
  }
}

// Added to a number, it leaves that number, rounded to nearest, in the lowest bits of the sum.
constexpr float kToWhole = 12582912.0f;  // 1.5 * 2^23

// Returns quads of the lowest bytes of four quarters.
inline IntVec quads_of_quarters(const Vec (&quarters)[4]) {
  const auto pair = [](Vec low, Vec high) {
    return (reinterpret_cast<IntVec>(low) & 0xff) | (reinterpret_cast<IntVec>(high) & 0xff) << 8;
  };
  return pair(quarters[0], quarters[1]) | pair(quarters[2], quarters[3]) << 16;
}

inline Vec size_of_lanes(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) & 0x7fffffffu);
}

// Beyond these bounds floats are too small or too large to round and bound with.
constexpr float kLeastRounded = 0x1p-100f, kMostSquares = 0x1p100f;

// Writes the bytes, the steps and the norms of entries `first` to `first + count` of an example's
// bank, both multiples of kPanelMultiple.
template <class T>
void pack_coarse(const CpuTapeSelectParams& p, int64_t example, const CpuCoarseKeys& to,
                 int64_t first, int64_t count) {
  constexpr int64_t kPanel = kTileVecs * kLanes;
  const int64_t width = p.keys.width, quads = quads_of(width);
  const int64_t used = (p.keys.bank_size + kPanel - 1) / kPanel * kPanel;
  const int64_t end = first + count < used ? first + count : used;
  Vec longest = {};
  for (int64_t c = first; c < end; c += kLanes) {
    // Entries behind the last are copies of it, which nobody reads.
    const T* rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      rows[l] = key_row<T>(p, example, c + l < p.keys.bank_size ? c + l : p.keys.bank_size - 1);
    }
    fetch_rows<T>(p, example, c + kRowsFetched);
    Vec squares[kLanes], largest[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      squares[l] = largest[l] = Vec{};
      for (int64_t d = 0; d < width; d += kFeaturesOfQuads) {
        Vec quarters[4];
        load_quarters(rows[l], d, width, quarters);
        for (const Vec& x : quarters) {
          squares[l] += x * x;
          largest[l] = max(size_of_lanes(x), largest[l]);
        }
      }
    }
    const Vec sums = folded_rows(squares, [](Vec a, Vec b) { return a + b; });
    longest = max(sums < kMostSquares ? sums : broadcast(__builtin_inff()), longest);
    const Vec most = folded_rows(largest, [](Vec a, Vec b) { return max(a, b); });
    const Vec small = broadcast(kLeastRounded);
    alignas(kVecBytes) float inverses[kLanes];
    store(inverses, most < small ? Vec{} : kMostOfKey / most);
    // All of a key that is rounded to zero may be an error, which is half a step.
    store(to.steps + c, most < small ? 2 * most : most / kMostOfKey);

    uint32_t* const panel = to.quads + c / kPanel * kPanel * quads + c % kPanel;
    for (int64_t d = 0; d < width; d += kFeaturesOfQuads) {
      IntVec square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        Vec quarters[4];
        load_quarters(rows[l], d, width, quarters);
        for (Vec& x : quarters) x = x * inverses[l] + (kToWhole + kKeyOffset);
        square[l] = quads_of_quarters(quarters);
      }
      transpose(square);
      const int64_t written = quads_of(width - d) < kLanes ? quads_of(width - d) : kLanes;
      for (int64_t f = 0; f < written; ++f) {
        std::memcpy(panel + (d / 4 + f) * kPanel, &square[f], sizeof square[f]);
      }
    }
    if ((c + kLanes) % kPanelMultiple == 0 || c + kLanes >= end) {
      // A little more than the norm: sums are rounded, and small squares are lost.
      to.norms[c / kPanelMultiple] = __builtin_sqrtf(max(longest)) * 1.001f + 0x1p-50f;
      longest = Vec{};
    }
  }
}

// A query in bytes, and what bounds the errors of its coarse scores. The score of a sum n·m lies
// within s · (t (n·m) ± reach) ± slack.
struct CoarseQuery {
  float step;      // t
  float reach;     // sum |t m| / 2
  float slack;     // what is the same for all keys, and what floats round
  uint32_t added;  // to n·m, because bytes of keys are more than what they stand for
  bool usable;     // whether all of these are numbers that are neither too small nor too large
};

// Writes the bytes of a query to `quads`. `norm` is the greatest of the keys.
inline CoarseQuery coarse_query(const float* query, int64_t width, float norm, Quad* quads) {
  const auto for_quarters = [&](const auto& take) {
    for (int64_t d = 0; d < width; d += kFeaturesOfQuads) {
      Vec quarters[4];
      load_quarters(query, d, width, quarters);
      take(d, quarters);
    }
  };
  Vec squares = {}, largest = {};
  for_quarters([&](int64_t, const Vec(&quarters)[4]) {
    for (const Vec& x : quarters) {
      squares += x * x;
      largest = max(size_of_lanes(x), largest);
    }
  });
  constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
  const float most = max(largest), length = __builtin_sqrtf(sum(squares)) * 1.001f;
  CoarseQuery result = {};
  result.usable = most >= kLeast && length <= kMost && norm >= kLeast && norm <= kMost;
  if (!result.usable) return result;

  const Vec inverse = broadcast(kMostOfQuery / most);
  result.step = most / kMostOfQuery;
  Vec errors = {}, sizes = {}, wholes = {};
  for_quarters([&](int64_t d, Vec(&quarters)[4]) {
    for (Vec& x : quarters) {
      const Vec sum = x * inverse + kToWhole, whole = sum - kToWhole;
      const Vec error = x - whole * result.step;
      errors += error * error;
      sizes += size_of_lanes(whole);
      wholes += whole;
      x = sum;
    }
    const IntVec bits = quads_of_quarters(quarters);
    const int64_t written = quads_of(width - d) < kLanes ? quads_of(width - d) : kLanes;
    std::memcpy(quads + d / 4, &bits, static_cast<size_t>(written) * sizeof bits[0]);
  });
  // Half a step of a key is a little more, because its inverse is rounded.
  constexpr float kHalf = 0.501f;
  result.reach = kHalf * result.step * sum(sizes);
  // Sums of so many features in float, exact scores among them, are wrong by so much at most.
  const float rounding = (static_cast<float>(width) + 64) * 0x1p-22f * length;
  const float error = __builtin_sqrtf(sum(errors)) * 1.001f + 0x1p-50f;
  result.slack = 1.001f * norm * (error + rounding);
  result.added = kKeyOffset * static_cast<uint32_t>(static_cast<int32_t>(sum(wholes)));
  return result;
}

}  // namespace adatape::ADATAPE_ISA
