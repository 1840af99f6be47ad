// Sums rows into the bank entries that they belong to, in a fixed order: a gather's gradient.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

// out[m] = Σ_p weights[p] · rows[row_of[p]] over the contributions p with entries[p] = m.
struct ScatterParams {
  const int32_t* entries;  // (banks, contributions), kNoEntry where there is none
  const int32_t* row_of;   // the same, or null: each contribution has a row of its own
  const float* weights;    // the same, or null: 1
  const void* rows;        // (…, width), dense, `row` elements apart
  int64_t row;
  void* out;  // (banks, bank_size, width)
  int64_t banks, contributions, bank_size, width;
};

constexpr int32_t kNoEntry = -1;
constexpr int kScatterThreads = 256;
constexpr int kScatterWarps = kScatterThreads / kWarpSize;
constexpr int kScatterRegisters = 128;  // a thread, at most
constexpr int kScatterBlocks = blocks_at_once(kScatterThreads, kScatterRegisters);

inline int64_t scatter_blocks(const ScatterParams& p) {
  return (p.banks * p.bank_size + kScatterWarps - 1) / kScatterWarps;
}

// Warp w writes row w of the flattened banks, after a look at every contribution to its bank. That
// costs a shared bank bank_size looks at each; it needs neither a sort nor atomics.
template <class From, class To, bool Aligned>
__global__ void __launch_bounds__(kScatterThreads, kScatterBlocks) scatter_kernel(ScatterParams p) {
  constexpr int kPack = Pack<From>::kSize, kPacks = 4;
  constexpr int kFeatures = kWarpSize * kPack * kPacks;  // of one pass over the contributions
  const int lane = threadIdx.x % kWarpSize;
  const int64_t bank_row = int64_t{blockIdx.x} * kScatterWarps + threadIdx.x / kWarpSize;
  const int64_t bank = bank_row / p.bank_size, entry = bank_row % p.bank_size;
  if (bank >= p.banks) return;
  const int64_t end = (bank + 1) * p.contributions;
  for (int64_t first = 0; first < p.width; first += kFeatures) {
    float sum[kPacks][kPack] = {};
    for (int64_t run = bank * p.contributions; run < end; run += kWarpSize) {
      const bool mine = run + lane < end && p.entries[run + lane] == entry;
      for (unsigned left = __ballot_sync(kFullMask, mine); left != 0; left &= left - 1) {
        const int64_t taken = run + __ffs(static_cast<int>(left)) - 1;
        const int64_t row = p.row_of ? p.row_of[taken] : taken;
        const float weight = p.weights ? p.weights[taken] : 1.0f;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
          const int64_t d = first + (n * kWarpSize + lane) * kPack;
          if (d >= p.width) continue;
          const auto x =
              load_pack<Aligned>(static_cast<const From*>(p.rows) + row * p.row, d, p.width);
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
