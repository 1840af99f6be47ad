// Sums the weighted rows that belong to each entry of a bank, in a fixed order: the gradient of a
// gather.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

// A contribution is one addend of the sum: a row with a weight, for one entry of a bank. All
// contributions to an entry are its segment:
//
//   out[m] = Σ_c weights[c] · rows[row_of[c]]   over the contributions c with entries[c] = m
struct CudaSegmentSumParams {
  const int32_t* entries;  // (num_banks, contributions), kNoEntry where one is to be left out
  const int32_t* row_of;   // the same shape, or null: contribution c has row c
  const float* weights;    // the same shape, or null: every weight is 1
  const void* rows;        // (any number, width), dense
  int64_t stride_row;      // from one of these rows to the next, in elements
  void* out;               // (num_banks, bank_size, width)
  int64_t num_banks;       // 1, or a bank for each example
  int64_t contributions;   // to one bank
  int64_t bank_size;
  int64_t width;
};

constexpr int32_t kNoEntry = -1;
constexpr int kSegmentSumThreads = 256;
constexpr int kSegmentSumWarps = kSegmentSumThreads / kWarpSize;
constexpr int kSegmentSumRegisters = 128;  // a thread takes no more
constexpr int kSegmentSumBlocks = blocks_at_once(kSegmentSumThreads, kSegmentSumRegisters);

// Returns how many blocks a launch needs.
inline int64_t segment_sum_blocks(const CudaSegmentSumParams& p) {
  return (p.num_banks * p.bank_size + kSegmentSumWarps - 1) / kSegmentSumWarps;
}

// Each warp writes one entry's row, after a look at every contribution to the entry's bank. So each
// contribution to a shared bank is looked at bank_size times, but neither a sort nor atomics are
// needed.
template <class From, class To, bool Aligned>
__global__ void __launch_bounds__(kSegmentSumThreads, kSegmentSumBlocks)
    segment_sum_kernel(CudaSegmentSumParams p) {
  constexpr int kPack = Pack<From>::kSize, kPacks = 4;
  // One pass over the contributions sums so many features.
  constexpr int kFeatures = kWarpSize * kPack * kPacks;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t bank_row = int64_t{blockIdx.x} * kSegmentSumWarps + threadIdx.x / kWarpSize;
  const int64_t bank = bank_row / p.bank_size, entry = bank_row % p.bank_size;
  if (bank >= p.num_banks) return;
  const int64_t end = (bank + 1) * p.contributions;
  for (int64_t first = 0; first < p.width; first += kFeatures) {
    float sum[kPacks][kPack] = {};
    // The lanes look at kWarpSize contributions at a time, and the warp adds up those of its entry.
    for (int64_t c = bank * p.contributions; c < end; c += kWarpSize) {
      const bool mine = c + lane < end && p.entries[c + lane] == entry;
      for (unsigned left = __ballot_sync(kFullMask, mine); left != 0; left &= left - 1) {
        const int64_t taken = c + __ffs(static_cast<int>(left)) - 1;
        const int64_t row = p.row_of ? p.row_of[taken] : taken;
        const float weight = p.weights ? p.weights[taken] : 1.0f;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
          const int64_t d = first + (n * kWarpSize + lane) * kPack;
          if (d >= p.width) continue;
          const auto x =
              load_pack<Aligned>(static_cast<const From*>(p.rows) + row * p.stride_row, d, p.width);
#pragma unroll
          for (int i = 0; i < kPack; ++i) sum[n][i] += weight * to_float(x.x[i]);
        }
      }
    }
    To* const out = static_cast<To*>(p.out) + bank_row * p.width;
#pragma unroll
    for (int n = 0; n < kPacks; ++n) {
      const int64_t d = first + (n * kWarpSize + lane) * kPack;
      if (d < p.width) store_pack<Aligned>(out, d, p.width, sum[n]);
    }
  }
}

}  // namespace adatape::cuda
