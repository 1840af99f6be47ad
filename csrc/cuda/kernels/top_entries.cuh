// The best entries of a bank, which a warp keeps in its registers. Better is the higher score, and
// among equal scores the lower entry; NaN lies below every number.

#pragma once

#include <climits>
#include <cmath>

#include "../device.cuh"

namespace adatape::cuda {

constexpr int kUnreadable = INT_MIN;  // lies below the order of every score
constexpr int kNanOrder = INT_MIN + 1;
constexpr int kMagnitude = INT_MAX;  // masks all bits of a float but its sign

// Returns an integer; integers are ordered as the scores are, and -0 equals 0.
__device__ inline int order_of(float score) {
  if (score != score) return kNanOrder;
  const int bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return bits < 0 ? bits ^ kMagnitude : bits;
}
// Returns the score that has this order.
__device__ inline float score_of(int order) {
  return __int_as_float(order < 0 ? order ^ kMagnitude : order);
}

// An entry of the bank with the order of its score.
struct OrderedEntry {
  int order, entry;
};

constexpr OrderedEntry kNoEntryYet{kUnreadable, INT_MAX};

__device__ inline bool better(OrderedEntry a, OrderedEntry b) {
  return a.order > b.order || (a.order == b.order && a.entry < b.entry);
}

__device__ inline OrderedEntry shuffled(OrderedEntry x, int from) {
  return {__shfl_sync(kFullMask, x.order, from), __shfl_sync(kFullMask, x.entry, from)};
}

// Lane j holds the j-th best entry so far in `best`, and every lane holds more candidates in
// `mine`. The best candidate of all lanes moves to its place, as long as it belongs among the
// `topk` best: a turn is two reductions of the hardware, and there are no more turns than places.
// `mine` is used up.
template <int Candidates>
__device__ inline void keep_best(OrderedEntry& best, OrderedEntry (&mine)[Candidates], int topk) {
  const int lane = threadIdx.x % kWarpSize;
  for (int turn = 0; turn < topk; ++turn) {
    OrderedEntry first = mine[0];
#pragma unroll
    for (int n = 1; n < Candidates; ++n) {
      if (better(mine[n], first)) first = mine[n];
    }
    const OrderedEntry last = shuffled(best, topk - 1);
    const bool wanted = first.order != kUnreadable && better(first, last);
    if (!__any_sync(kFullMask, wanted)) return;
    const int order = __reduce_max_sync(kFullMask, wanted ? first.order : kUnreadable);
    const int entry =
        __reduce_min_sync(kFullMask, wanted && first.order == order ? first.entry : INT_MAX);
    const OrderedEntry next{order, entry};
    const int place = __popc(__ballot_sync(kFullMask, better(best, next)));
    const OrderedEntry before{__shfl_up_sync(kFullMask, best.order, 1),
                              __shfl_up_sync(kFullMask, best.entry, 1)};
    if (lane > place) best = before;
    if (lane == place) best = next;
#pragma unroll
    for (int n = 0; n < Candidates; ++n) {
      if (mine[n].entry == entry) mine[n].order = kUnreadable;
    }
  }
}

// Puts the best of `listed` entries, which are in any order, into their places in `best`.
__device__ inline void merge_lists(OrderedEntry& best, const OrderedEntry* entries, int64_t listed,
                                   int topk) {
  constexpr int kAtOnce = 2;  // candidates of a lane
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t start = 0; start < listed; start += kAtOnce * kWarpSize) {
    OrderedEntry some[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = start + i * kWarpSize + lane;
      some[i] = n < listed ? entries[n] : kNoEntryYet;
    }
    keep_best(best, some, topk);
  }
}

// Lane j hands in the j-th score and gets its weight; lanes from `topk` on get 0. The weights are
// NaN if a score is NaN or the best one is infinite.
__device__ inline float softmax(float score, int topk) {
  const bool is_one = static_cast<int>(threadIdx.x) % kWarpSize < topk;
  float highest = is_one ? score : -INFINITY;
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, bits));
  }
  const float exponential = is_one ? expf(score - highest) : 0.0f;
  // This division is correctly rounded, so that equal scores weigh exactly 1 / topk and halting is
  // exact.
  return exponential / warp_sum(exponential);
}

}  // namespace adatape::cuda
