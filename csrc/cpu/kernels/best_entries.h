// The best of many scores, found while they are computed.
//
// A list holds the topk best so far. A vector of scores is compared with the last of them in one
// instruction; what lies above it goes into the list, one by one. That is rare once the list has
// seen good scores: of M scores in any order, about topk · log(M / topk) enter it.

#pragma once

#include <limits>

#include "../cpu_kernels.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adatape::ADATAPE_ISA {

// Of a row of bits, one for each entry of a bank, returns those of the kLanes entries from `first`
// on, a multiple of kLanes.
inline uint32_t lanes_of(const uint32_t* bits, int64_t first) {
  constexpr uint32_t kAll = (uint32_t{1} << kLanes) - 1;
  return bits[first / kUnreadBits] >> (first % kUnreadBits) & kAll;
}

// Returns a bit for each lane whose score lies above the bound: for none where the bound is NaN.
inline uint32_t lanes_above(Vec scores, float bound) {
  const Vec bounds = broadcast(bound);
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(scores), reinterpret_cast<__m512>(bounds),
                            _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(
      reinterpret_cast<__m256>(scores), reinterpret_cast<__m256>(bounds), _CMP_GT_OQ)));
#else
  const IntVec above = scores > bounds;
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= (above[l] & 1u) << l;
  return lanes;
#endif
}

// Returns x in the lanes whose bits are set, and `other` in the rest.
inline Vec chosen_lanes(uint32_t lanes, Vec x, float other) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(broadcast(other)),
                                                  static_cast<__mmask16>(lanes),
                                                  reinterpret_cast<__m512>(x)));
#else
  IntVec bit;
  for (int l = 0; l < kLanes; ++l) bit[l] = uint32_t{1} << l;
  return (bit & lanes) != 0 ? x : broadcast(other);
#endif
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNone = std::numeric_limits<float>::quiet_NaN();

// Returns a number that at least topk of some scores lie above, given the greatest of them in each
// lane: one just below the topk-th greatest of those. Returns NaN where there is no such number.
inline float bound_of_lanes(Vec greatest, int64_t topk) {
  if (topk > kLanes) return kNone;
  float lanes[kLanes], bound = kInfinity;
  store(lanes, greatest);
  for (const float lane : lanes) {
    const int above = __builtin_popcount(lanes_above(greatest, lane));
    bound = above < topk && lane < bound ? lane : bound;
  }
  if (bound == -kInfinity) return kNone;
  // Where denormal numbers count as zero, the next below zero must be a normal one.
  constexpr float kLeast = std::numeric_limits<float>::min();
  if (bound < 2 * kLeast && bound > -kLeast) return -kLeast;
  uint32_t bits;
  std::memcpy(&bits, &bound, sizeof bits);
  bits += bound > 0 ? ~uint32_t{0} : 1;
  std::memcpy(&bound, &bits, sizeof bound);
  return bound;
}

// The topk best of the scores that were offered, best first. Among equals the one that was offered
// first stands first, and NaN stands behind every number.
class BestEntries {
 public:
  // `list` has topk entries. It goes on with what the list holds.
  BestEntries(ScoredEntry* list, int64_t topk) : list_(list), topk_(topk) {}

  void clear() {
    for (int64_t j = 0; j < topk_; ++j) list_[j] = {kNone, -1};
  }

  void offer(ScoredEntry next) {
    int64_t j = topk_ - 1;
    if (!stands_above(next, list_[j])) return;
    for (; j > 0 && stands_above(next, list_[j - 1]); --j) list_[j] = list_[j - 1];
    list_[j] = next;
  }

  // Offers the scores of `count` entries from `first` on, both multiples of kLanes, as far as their
  // bits of `unread` are set.
  void offer(const float* scores, const uint32_t* unread, int64_t first, int64_t count) {
    float bound = this->bound();
    if (bound != bound) {
      Vec greatest = broadcast(-kInfinity);
      for (int64_t c = 0; c < count; c += kLanes) {
        const uint32_t lanes = lanes_of(unread, first + c);
        greatest = max(chosen_lanes(lanes, load(scores + c), -kInfinity), greatest);
      }
      bound = bound_of_lanes(greatest, topk_);
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      uint32_t lanes = bound != bound ? ~0u : lanes_above(load(scores + c), bound);
      if (lanes == 0) continue;
      lanes &= lanes_of(unread, first + c);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t at = c + __builtin_ctz(lanes);
        offer({scores[at], static_cast<int32_t>(first + at)});
      }
      if (this->bound() == this->bound()) bound = this->bound();
    }
  }

 private:
  // Returns what a score must lie above to enter; NaN where any may enter.
  float bound() const { return list_[topk_ - 1].score; }

  static bool stands_above(ScoredEntry a, ScoredEntry b) {
    if (a.score > b.score) return true;
    return b.score != b.score && (a.score == a.score || b.entry < 0);
  }

  ScoredEntry* list_;
  int64_t topk_;
};

}  // namespace adatape::ADATAPE_ISA
