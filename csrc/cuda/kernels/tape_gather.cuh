// Variable-length gathering: see adatape_kernels/reference.py for the formulas.

#pragma once

#include "../device.cuh"

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
};

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / kWarpSize;
constexpr int kGatherRegisters = 64;  // a thread; make audit checks it
// An offset of a batch up to this is summed by every block that needs it, in one launch with the
// copy; of a larger one by a launch of its own.
constexpr int64_t kGatherFusedBatch = 2048;

__device__ inline int64_t clamp(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

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
__global__ void __launch_bounds__(kGatherThreads) tape_gather_offsets_kernel(GatherParams p) {
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

template <class T>
__device__ const T* bank_row(const GatherParams& p, int64_t example, int64_t read) {
  const int64_t entry = clamp(p.indices[read], 0, p.bank_size - 1);
  return static_cast<const T*>(p.bank) + example * p.bank_example + entry * p.bank_row;
}

// Warp w merges token w of all that may exist, and clears row w if it is unused. Fused: the offsets
// are not there yet; every block sums its own, and the first one writes all.
template <class T, bool Aligned, bool Fused>
__global__ void __launch_bounds__(kGatherThreads) tape_gather_kernel(GatherParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = int64_t{blockIdx.x} * kGatherWarps;
  const int64_t token = first + threadIdx.x / kWarpSize, example = token / p.steps;
  int64_t used, row = 0;
  if constexpr (Fused) {
    int32_t before = 0, all = 0;
    for (int64_t i = threadIdx.x; i < p.batch; i += kGatherThreads) {
      const int32_t count = count_of(p, i);
      all += count;
      if (i < first / p.steps) before += count;
    }
    row = block_sum(before);
    used = block_sum(all);
    for (int64_t i = first / p.steps; i < example && i < p.batch; ++i) row += count_of(p, i);
    if (blockIdx.x == 0) write_offsets(p);
  } else {
    used = p.offsets[p.batch];
    if (example < p.batch) row = p.offsets[example];
  }

  T* const tape = static_cast<T*>(p.tape);
  if (token >= used && token < p.rows) {
    const float zeros[kPack] = {};
    for (int64_t d = lane * kPack; d < p.dim; d += kWarpSize * kPack) {
      store_pack<Aligned>(tape + token * p.tape_row, d, p.dim, zeros);
    }
  }
  const int64_t step = token % p.steps;
  row += step;
  if (example >= p.batch || step >= count_of(p, example) || row >= p.rows) return;
  for (int64_t d = lane * kPack; d < p.dim; d += kWarpSize * kPack) {
    float merged[kPack] = {};
#pragma unroll 4
    for (int64_t j = 0; j < p.topk; ++j) {
      const int64_t read = token * p.topk + j;
      const Pack<T> value = load_pack<Aligned>(bank_row<T>(p, example, read), d, p.dim);
      const float weight = p.weights[read];
#pragma unroll
      for (int i = 0; i < kPack; ++i) merged[i] += weight * to_float(value.x[i]);
    }
    store_pack<Aligned>(tape + row * p.tape_row, d, p.dim, merged);
  }
}

}  // namespace adatape::cuda
