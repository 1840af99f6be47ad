// Variable-length gathering: see adatape_kernels/reference.py for the formulas.

#pragma once

#include "../device.cuh"
#include "scatter.cuh"

namespace adatape::cuda {

// What the host has to know about the values, when it may ask.
struct GatherStatus {
  int32_t rows;                // that all examples read
  int32_t bad_counts, count;   // how many there are, and one of them
  int32_t bad_indices, index;  // the same
};

struct GatherParams {
  const void* bank;                // (bank_size, dim), or (batch, bank_size, dim)
  int64_t bank_example, bank_row;  // its strides in elements, the first 0 for a shared bank
  const int32_t* indices;          // (batch, steps, topk)
  const float* weights;            // (batch, steps, topk)
  const int32_t* counts;           // (batch,)
  int32_t* offsets;                // (batch + 1,), of each example's rows
  GatherStatus* status;            // or null
  void* tape;                      // (rows, dim), in the backward its gradient
  int64_t tape_row;                // its stride
  int64_t batch, steps, topk, bank_size, dim, rows;
  bool own_banks;
  bool fused;  // the offsets are summed by the kernel that needs them

  // Backward only.
  float* dweights;   // (batch, steps, topk)
  int32_t* entries;  // (batch, steps, topk): each read's entry, kNoEntry where there is none
  int32_t* row_of;   // the same: the row of its token
  void* dbank;       // as bank, contiguous; float32 if atomic
  bool atomic;       // reads add to dbank as they come
};

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / kWarpSize;
constexpr int kGatherRegisters = 80;  // a thread, at most
constexpr int kGatherBlocks = blocks_at_once(kGatherThreads, kGatherRegisters);
// An offset of a batch up to this is summed by every block that needs it, in one launch with the
// copy; of a larger one by a launch of its own.
constexpr int64_t kGatherFusedBatch = 2048;

__device__ inline int32_t count_of(const GatherParams& p, int64_t example) {
  return static_cast<int32_t>(clamp(p.counts[example], 0, p.steps));
}

// A sum over the block's threads; every thread gets it.
__device__ inline int32_t block_sum(int32_t x) {
  __shared__ int32_t sums[kGatherWarps];
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  __syncthreads();  // until an earlier sum has been read
  if (threadIdx.x % kWarpSize == 0) sums[warp] = x;
  __syncthreads();
  int32_t total = 0;
  for (int i = 0; i < kGatherWarps; ++i) total += sums[i];
  return total;
}

// By one block: offsets[i + 1] = the counts up to i.
__device__ inline void write_offsets(const GatherParams& p) {
  __shared__ int32_t ends[kGatherWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int32_t before = 0;
  if (threadIdx.x == 0) p.offsets[0] = 0;
  for (int64_t first = 0; first < p.batch; first += kGatherThreads) {
    const int64_t example = first + threadIdx.x;
    int32_t end = example < p.batch ? count_of(p, example) : 0;
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int32_t other = __shfl_up_sync(kFullMask, end, by);
      if (lane >= by) end += other;
    }
    __syncthreads();  // until the ends of the previous run have been read
    if (lane == kWarpSize - 1) ends[warp] = end;
    __syncthreads();
    for (int i = 0; i < kGatherWarps; ++i) {
      if (i < warp) end += ends[i];
    }
    if (example < p.batch) p.offsets[example + 1] = before + end;
    for (int i = 0; i < kGatherWarps; ++i) before += ends[i];
  }
}

// Block 0 writes the offsets; the others, if any, look at a read each thread. A corrupt value is
// counted in the status, which comes as zeros.
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_offsets_kernel(GatherParams p) {
  if (blockIdx.x == 0) {
    write_offsets(p);
    int32_t rows = 0;
    for (int64_t i = threadIdx.x; i < p.batch; i += kGatherThreads) {
      rows += count_of(p, i);
      if (p.status && p.counts[i] != count_of(p, i) && atomicAdd(&p.status->bad_counts, 1) == 0) {
        p.status->count = p.counts[i];
      }
    }
    rows = block_sum(rows);
    if (p.status && threadIdx.x == 0) p.status->rows = rows;
    return;
  }
  const int64_t read = (int64_t{blockIdx.x} - 1) * kGatherThreads + threadIdx.x;
  const int64_t token = read / p.topk, example = token / p.steps;
  if (example >= p.batch || token % p.steps >= count_of(p, example)) return;
  const int32_t entry = p.indices[read];
  if ((entry < 0 || entry >= p.bank_size) && atomicAdd(&p.status->bad_indices, 1) == 0) {
    p.status->index = entry;
  }
}

// Where a token's row lies on the tape.
struct TokenRow {
  int64_t example, row;
  bool exists;
  int64_t rows_used;  // of the tape, by all examples
};

// The row of the warp's own token; called by all threads of the block. Where the offsets are not
// there yet every block sums its own, and the first one writes all.
__device__ inline TokenRow locate(const GatherParams& p, int64_t token) {
  TokenRow at{token / p.steps, token % p.steps, false, 0};
  if (p.fused) {
    const int64_t first =
        int64_t{blockIdx.x} * kGatherWarps / p.steps;  // the block's first example
    int32_t before = 0, all = 0;
    for (int64_t i = threadIdx.x; i < p.batch; i += kGatherThreads) {
      const int32_t count = count_of(p, i);
      all += count;
      if (i < first) before += count;
    }
    at.row += block_sum(before);
    at.rows_used = block_sum(all);
    for (int64_t i = first; i < at.example && i < p.batch; ++i) at.row += count_of(p, i);
    if (blockIdx.x == 0) write_offsets(p);
  } else {
    at.rows_used = p.offsets[p.batch];
    if (at.example < p.batch) at.row += p.offsets[at.example];
  }
  at.exists = at.example < p.batch && token % p.steps < count_of(p, at.example) && at.row < p.rows;
  return at;
}

__device__ inline int64_t entry_of(const GatherParams& p, int64_t read) {
  return clamp(p.indices[read], 0, p.bank_size - 1);
}

template <class T>
__device__ const T* bank_row(const GatherParams& p, int64_t example, int64_t entry) {
  return static_cast<const T*>(p.bank) + example * p.bank_example + entry * p.bank_row;
}

// Warp w merges token w of all that may exist, and clears row w if it is unused.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_kernel(GatherParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int first = threadIdx.x % kWarpSize * kPack;  // of the lane's features
  const int64_t token = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / kWarpSize;
  const TokenRow at = locate(p, token);
  T* const tape = static_cast<T*>(p.tape);
  if (token >= at.rows_used && token < p.rows) {
    const float zeros[kPack] = {};
    for (int64_t d = first; d < p.dim; d += kWarpSize * kPack) {
      store_pack<Aligned>(tape + token * p.tape_row, d, p.dim, zeros);
    }
  }
  if (!at.exists) return;
  for (int64_t d = first; d < p.dim; d += kWarpSize * kPack) {
    float merged[kPack] = {};
#pragma unroll 4
    for (int64_t read = token * p.topk; read < (token + 1) * p.topk; ++read) {
      const T* const row = bank_row<T>(p, at.example, entry_of(p, read));
      const Pack<T> value = load_pack<Aligned>(row, d, p.dim);
      const float weight = p.weights[read];
#pragma unroll
      for (int i = 0; i < kPack; ++i) merged[i] += weight * to_float(value.x[i]);
    }
    store_pack<Aligned>(tape + at.row * p.tape_row, d, p.dim, merged);
  }
}

// Warp w: dweights[token, j] = dtape[row] · bank[entry of j] for token w. The bank's gradient gets
// its share here if that is atomic; else each read's entry and row are noted for scatter_kernel.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_bwd_kernel(GatherParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / kWarpSize;
  const TokenRow at = locate(p, token);
  if (at.example >= p.batch) return;
  const T* const dtape = static_cast<const T*>(p.tape) + at.row * p.tape_row;
  for (int64_t read = token * p.topk; read < (token + 1) * p.topk; ++read) {
    const int64_t entry = at.exists ? entry_of(p, read) : kNoEntry;
    const float weight = p.weights[read];
    float dot = 0.0f;
    for (int64_t d = lane * kPack; at.exists && d < p.dim; d += kWarpSize * kPack) {
      const Pack<T> value = load_pack<Aligned>(bank_row<T>(p, at.example, entry), d, p.dim);
      const Pack<T> dmerged = load_pack<Aligned>(dtape, d, p.dim);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        dot += to_float(value.x[i]) * to_float(dmerged.x[i]);
        if (p.atomic) {
          float* const to = static_cast<float*>(p.dbank) + entry * p.dim + d + i;
          if (Aligned || d + i < p.dim) atomicAdd(to, weight * to_float(dmerged.x[i]));
        }
      }
    }
    dot = warp_sum(dot);
    if (lane != 0) continue;
    p.dweights[read] = dot;
    if (!p.atomic) {
      p.entries[read] = static_cast<int32_t>(entry);
      p.row_of[read] = static_cast<int32_t>(at.row);
    }
  }
}

}  // namespace adatape::cuda
