// The best entries of a bank in the registers of a warp, and the order that decides which those
// are: the higher score, and among equal ones the lower entry; NaN below every number.

#pragma once

#include <climits>
#include <cmath>

#include "../device.cuh"

namespace adatape::cuda {

constexpr int kUnreadable = INT_MIN;  // below the order of every score
constexpr int kNanOrder = INT_MIN + 1;
constexpr int kMagnitude = INT_MAX;  // the bits of a float but its sign

// Integers in the order of the scores, -0 equal to 0.
__device__ inline int order_of(float score) {
  if (score != score) return kNanOrder;
  const int bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return bits < 0 ? bits ^ kMagnitude : bits;
}
__device__ inline float score_of(int order) {
  return __int_as_float(order < 0 ? order ^ kMagnitude : order);
}

struct Ranked {
  int order, entry;
};

constexpr Ranked kNoEntryYet{kUnreadable, INT_MAX};

__device__ inline bool better(Ranked a, Ranked b) {
  return a.order > b.order || (a.order == b.order && a.entry < b.entry);
}

__device__ inline Ranked shuffled(Ranked x, int from) {
  return {__shfl_sync(kFullMask, x.order, from), __shfl_sync(kFullMask, x.entry, from)};
}

// Lane j holds the j-th best so far in `best`, and one more candidate each lane in `mine`. Those
// among the `topk` best of both are put where they belong, one after another.
__device__ inline void keep_best(Ranked& best, Ranked mine, int topk) {
  const int lane = threadIdx.x % kWarpSize;
  const Ranked last = shuffled(best, topk - 1);
  const bool wanted = mine.order != kUnreadable && better(mine, last);
  for (unsigned left = __ballot_sync(kFullMask, wanted); left != 0; left &= left - 1) {
    const Ranked next = shuffled(mine, __ffs(static_cast<int>(left)) - 1);
    const int place = __popc(__ballot_sync(kFullMask, better(best, next)));
    const Ranked before{__shfl_up_sync(kFullMask, best.order, 1),
                        __shfl_up_sync(kFullMask, best.entry, 1)};
    if (lane > place) best = before;
    if (lane == place) best = next;
  }
}

// Lane j has the j-th score, and gets its weight; 0 from lane `topk` on. NaN if a score is NaN or
// the best one infinite.
__device__ inline float softmax(float score, int topk) {
  const bool is_one = static_cast<int>(threadIdx.x) % kWarpSize < topk;
  float highest = is_one ? score : -INFINITY;
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, bits));
  }
  const float exponential = is_one ? expf(score - highest) : 0.0f;
  // A rounded division: equal scores weigh exactly 1 / topk, so that halting is exact.
  return exponential / warp_sum(exponential);
}

}  // namespace adatape::cuda
