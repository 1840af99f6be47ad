// The segment sum for a bank that examples share, which may have long segments.
//
// The contributions are sorted by entry and, within a segment, by their number: counted, placed as
// they were counted, and put in order. Then every segment is summed in parts of kSegmentPart
// contributions, a warp each, and the parts of a long one are added up. Where all of 256 examples
// read one entry, a warp waits for 16 contributions and another for 16 parts, not one for 256. The
// length of a part is a constant, so that the order of a sum depends on its contributions alone.

#pragma once

#include "segment_sum.cuh"

namespace adatape::cuda {

constexpr int kSegmentPart = 16;
// Static shared memory of a block of segment_starts_kernel: a number for each warp.
constexpr int64_t kSegmentStartsBytes = kSegmentSumWarps * sizeof(int32_t);

// Counts the contributions to entry m in starts[m + 1], and notes how many each one found there.
static __global__ void __launch_bounds__(kSegmentSumThreads)
    segment_count_kernel(CudaSegmentSumParams p) {
  const int64_t c = int64_t{blockIdx.x} * kSegmentSumThreads + threadIdx.x;
  if (c >= p.contributions || p.entries[c] == kNoEntry) return;
  p.ranks[c] = atomicAdd(p.starts + p.entries[c] + 1, 1);
}

// Sums the counts, by the threads of one block: starts[m + 1] becomes the end of segment m.
__device__ inline void write_starts(const CudaSegmentSumParams& p) {
  __shared__ int32_t ends[kSegmentSumWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int32_t before = 0;
  for (int64_t first = 1; first <= p.bank_size; first += kSegmentSumThreads) {
    const int64_t at = first + threadIdx.x;
    int32_t end = at <= p.bank_size ? p.starts[at] : 0;
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int32_t other = __shfl_up_sync(kFullMask, end, by);
      if (lane >= by) end += other;
    }
    __syncthreads();  // the ends of the previous entries have been read by all
    if (lane == kWarpSize - 1) ends[warp] = end;
    __syncthreads();
    for (int i = 0; i < warp; ++i) end += ends[i];
    if (at <= p.bank_size) p.starts[at] = before + end;
    for (int i = 0; i < kSegmentSumWarps; ++i) before += ends[i];
  }
}

static __global__ void __launch_bounds__(kSegmentSumThreads)
    segment_starts_kernel(CudaSegmentSumParams p) {
  write_starts(p);
}

// Puts each contribution into its segment, as it was counted.
static __global__ void __launch_bounds__(kSegmentSumThreads)
    segment_place_kernel(CudaSegmentSumParams p) {
  const int64_t c = int64_t{blockIdx.x} * kSegmentSumThreads + threadIdx.x;
  if (c >= p.contributions || p.entries[c] == kNoEntry) return;
  p.unordered[p.starts[p.entries[c]] + p.ranks[c]] = static_cast<int32_t>(c);
}

// Puts the contributions of each segment in order: each thread counts those that go before its own.
static __global__ void __launch_bounds__(kSegmentSumThreads)
    segment_order_kernel(CudaSegmentSumParams p) {
  const int64_t place = int64_t{blockIdx.x} * kSegmentSumThreads + threadIdx.x;
  if (place >= p.starts[p.bank_size]) return;
  const int32_t c = p.unordered[place];
  const int32_t start = p.starts[p.entries[c]], end = p.starts[p.entries[c] + 1];
  int32_t before = 0;
  for (int32_t other = start; other < end; ++other) before += p.unordered[other] < c;
  p.order[start + before] = c;
}

// A segment, and where the part begins that is not its first and begins in a given slot of the
// order; if there is none, the part begins at the segment's end.
struct FurtherPart {
  int32_t entry, start, begin, end;
};

// A slot is kSegmentPart places of the order. Further parts of one segment begin kSegmentPart
// places apart; the first further part of the next one begins more than that behind the last one of
// this: so that no two begin in one slot. The segment of such a part holds the slot's first place.
__device__ inline FurtherPart further_part(const CudaSegmentSumParams& p, int64_t slot) {
  const int64_t place = slot * kSegmentPart;
  if (place >= p.starts[p.bank_size]) return {0, 0, 0, 0};
  const int32_t entry = p.entries[p.order[place]];
  FurtherPart part{entry, p.starts[entry], 0, p.starts[entry + 1]};
  const auto behind = static_cast<int32_t>(place) - part.start;
  const int32_t begin = part.start + (behind + kSegmentPart - 1) / kSegmentPart * kSegmentPart;
  // A segment that begins at the place has its first part there.
  part.begin = behind == 0 || begin > part.end ? part.end : begin;
  return part;
}

// Returns where the sum of a part is kept: that of a segment's first part by the slot in which it
// begins, those of the others likewise, behind all of these.
__device__ inline float* partial_sum(const CudaSegmentSumParams& p, int64_t slot, bool is_first) {
  return p.partial + (slot + (is_first ? 0 : p.further + 1)) * p.width;
}

// Returns how many warps sum parts: one for the first of each entry, the rest for the others.
inline int64_t segment_parts(const CudaSegmentSumParams& p) { return p.bank_size + p.further; }

template <class From, class To, bool Aligned>
__global__ void __launch_bounds__(kSegmentSumThreads, kSegmentSumBlocks)
    segment_part_kernel(CudaSegmentSumParams p) {
  using Sums = FeatureSums<From, Aligned>;
  const int64_t warp = int64_t{blockIdx.x} * kSegmentSumWarps + threadIdx.x / kWarpSize;
  if (warp >= p.bank_size + p.further) return;
  const bool is_first = warp < p.bank_size;
  int32_t begin, end;
  int64_t slot;
  if (is_first) {
    begin = p.starts[warp], end = p.starts[warp + 1];
    slot = begin / kSegmentPart;
  } else {
    slot = warp - p.bank_size + 1;
    const FurtherPart part = further_part(p, slot);
    begin = part.begin, end = part.end;
    if (begin == end) return;
  }
  const bool is_whole = is_first && end - begin <= kSegmentPart;
  if (end > begin + kSegmentPart) end = begin + kSegmentPart;
  for (int64_t first = 0; first < p.width; first += Sums::kFeatures) {
    Sums sums{p, first};
    for (int32_t place = begin; place < end; ++place) sums.add(p.order[place]);
    if (is_whole) {
      sums.store(static_cast<To*>(p.out) + warp * p.width);
    } else {
      sums.store(partial_sum(p, slot, is_first));
    }
  }
}

// The warp of a long segment's second part adds up the sums of all its parts, in their order.
template <class To, bool Aligned>
__global__ void __launch_bounds__(kSegmentSumThreads, kSegmentSumBlocks)
    segment_add_parts_kernel(CudaSegmentSumParams p) {
  constexpr int kPack = Pack<float>::kSize;
  const int64_t slot = int64_t{blockIdx.x} * kSegmentSumWarps + threadIdx.x / kWarpSize + 1;
  if (slot > p.further) return;
  const FurtherPart part = further_part(p, slot);
  if (part.begin == part.end || part.begin != part.start + kSegmentPart) return;
  const int64_t parts = (part.end - part.begin + kSegmentPart - 1) / kSegmentPart;
  const float* const one = partial_sum(p, part.start / kSegmentPart, true);
  const float* const others = partial_sum(p, slot, false);
  for (int64_t d = threadIdx.x % kWarpSize * kPack; d < p.width; d += kWarpSize * kPack) {
    Pack<float> total = load_pack<Aligned>(one, d, p.width);
#pragma unroll 4
    for (int64_t i = 0; i < parts; ++i) {
      const Pack<float> sum = load_pack<Aligned>(others + i * p.width, d, p.width);
#pragma unroll
      for (int j = 0; j < kPack; ++j) total.x[j] += sum.x[j];
    }
    store_pack<Aligned>(static_cast<To*>(p.out) + part.entry * p.width, d, p.width, total.x);
  }
}

}  // namespace adatape::cuda
