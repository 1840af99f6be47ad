// Sums the weighted rows that belong to each entry of a bank, in a fixed order: the gradient of a
// gather.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

// A contribution is one addend of the sum: a row with a weight, for one entry of a bank. All
// contributions to an entry are its segment:
//
//   out[m] = Σ_c weights[c] · rows[row_of[c]] + leading[c]   over the c with entries[c] = m
struct CudaSegmentSumParams {
  const int32_t* entries;  // (num_banks, contributions), kNoEntry where one is to be left out
  const int32_t* row_of;   // the same shape, kNoRow for none; or null: contribution c has row c
  const float* weights;    // the same shape, or null: every weight is 1
  const void* rows;        // (any number, width), dense
  int64_t stride_row;      // from one of these rows to the next, in elements
  const float* leading = nullptr;  // (contributions, lead_width), added to the first features
  int64_t lead_width = 0;
  void* out;              // (num_banks, bank_size, width)
  int64_t num_banks;      // 1, or a bank for each example
  int64_t contributions;  // to one bank
  int64_t bank_size;
  int64_t width;

  // The rest is for a bank that examples share: see segments.cuh.
  int32_t* starts = nullptr;     // (bank_size + 1,), zeros at first; where each segment begins
  int32_t* ranks = nullptr;      // (contributions,), the place of each one in its segment at first
  int32_t* unordered = nullptr;  // (contributions,), segment after segment, in any order inside
  int32_t* order = nullptr;      // (contributions,), segment after segment, each in order
  float* partial = nullptr;      // (2, further + 1, width), the sums of the parts of long segments
  int64_t further = 0;           // the most parts that are not the first ones of their segments
};

constexpr int32_t kNoEntry = -1;
constexpr int32_t kNoRow = -1;
constexpr int kSegmentSumThreads = 256;
constexpr int kSegmentSumWarps = kSegmentSumThreads / kWarpSize;
constexpr int kSegmentSumRegisters = 128;  // a thread takes no more
constexpr int kSegmentSumBlocks = blocks_at_once(kSegmentSumThreads, kSegmentSumRegisters);
// A warp sums so many packs of features of each lane in one pass over the contributions.
constexpr int kSegmentSumPacks = 4;

// Some features of a sum, which the lanes of a warp share out.
template <class From, bool Aligned>
struct FeatureSums {
  static constexpr int kPack = Pack<From>::kSize;
  static constexpr int kFeatures = kWarpSize * kPack * kSegmentSumPacks;

  const CudaSegmentSumParams& p;
  int64_t first;  // of these features
  float sum[kSegmentSumPacks][kPack] = {};

  // Returns the first feature of one of the lane's packs.
  __device__ int64_t feature(int pack) const {
    return first + (pack * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize) * kPack;
  }

  __device__ void add(int64_t contribution) {
    const int64_t row = p.row_of ? p.row_of[contribution] : contribution;
    const float weight = p.weights ? p.weights[contribution] : 1.0f;
    const From* const from = static_cast<const From*>(p.rows) + row * p.stride_row;
    const float* const lead = p.leading + contribution * p.lead_width;
#pragma unroll
    for (int n = 0; n < kSegmentSumPacks; ++n) {
      const int64_t d = feature(n);
      if (d >= p.width) continue;
      if (row != kNoRow) {
        const Pack<From> x = load_pack<Aligned>(from, d, p.width);
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[n][i] += weight * to_float(x.x[i]);
      }
#pragma unroll
      for (int i = 0; i < kPack; i += Pack<float>::kSize) {
        if (d + i >= p.lead_width) continue;
        const Pack<float> x = load_pack<Aligned>(lead, d + i, p.lead_width);
#pragma unroll
        for (int j = 0; j < Pack<float>::kSize; ++j) sum[n][i + j] += x.x[j];
      }
    }
  }

  template <class To>
  __device__ void store(To* to) const {
#pragma unroll
    for (int n = 0; n < kSegmentSumPacks; ++n) {
      if (feature(n) < p.width) store_pack<Aligned>(to, feature(n), p.width, sum[n]);
    }
  }
};

// Returns how many blocks a launch for the examples' own banks needs.
inline int64_t segment_sum_blocks(const CudaSegmentSumParams& p) {
  return (p.num_banks * p.bank_size + kSegmentSumWarps - 1) / kSegmentSumWarps;
}

// Each warp writes one entry's row, after a look at every contribution to the entry's bank, of
// which an example has few.
template <class From, class To, bool Aligned>
__global__ void __launch_bounds__(kSegmentSumThreads, kSegmentSumBlocks)
    segment_sum_kernel(CudaSegmentSumParams p) {
  using Sums = FeatureSums<From, Aligned>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t bank_row = int64_t{blockIdx.x} * kSegmentSumWarps + threadIdx.x / kWarpSize;
  const int64_t bank = bank_row / p.bank_size, entry = bank_row % p.bank_size;
  if (bank >= p.num_banks) return;
  const int64_t end = (bank + 1) * p.contributions;
  for (int64_t first = 0; first < p.width; first += Sums::kFeatures) {
    Sums sums{p, first};
    // The lanes look at kWarpSize contributions at a time, and the warp adds up those of its entry.
    for (int64_t c = bank * p.contributions; c < end; c += kWarpSize) {
      const bool mine = c + lane < end && p.entries[c + lane] == entry;
      for (unsigned left = __ballot_sync(kFullMask, mine); left != 0; left &= left - 1) {
        sums.add(c + __ffs(static_cast<int>(left)) - 1);
      }
    }
    sums.store(static_cast<To*>(p.out) + bank_row * p.width);
  }
}

}  // namespace adatape::cuda
