// Variable-length gathering: the formulas stand in adatape_kernels/reference.py.

#pragma once

#include "../device.cuh"
#include "segment_sum.cuh"

namespace adatape::cuda {

// What a look at the values has found, for the host.
struct TapeGatherStatus {
  int32_t rows;         // the tape rows of all examples
  int32_t bad_counts;   // how many counts lie outside 0 to num_tape_tokens
  int32_t count;        // one of these counts
  int32_t bad_indices;  // how many indices lie outside the bank
  int32_t index;        // one of these indices
};

// What becomes of the gradient of an entry that was merged into a token:
//   kNoted   its read's entry and row are noted, as a contribution for a segment sum,
//   kAdded   it is added, by atomics, to the gradient of a bank that examples share,
//   kStored  it is stored, in part, in the gradient of the example's own bank, of which the example
//            reads no entry twice.
enum class MergedGradients { kNoted, kAdded, kStored };

// Strides are in elements. The members at the end are null in the forward.
struct CudaTapeGatherParams {
  const void* bank;                    // (bank_size, dim) shared, or (batch, bank_size, dim)
  int64_t stride_example;              // from an example's bank to the next; 0 for a shared bank
  int64_t stride_entry;                // from an entry of the bank to the next
  const int32_t* indices;              // (batch, num_tape_tokens, topk)
  const float* weights;                // (batch, num_tape_tokens, topk)
  const int32_t* counts;               // (batch,)
  int32_t* offsets;                    // (batch + 1,), where each example's rows of the tape begin
  TapeGatherStatus* status = nullptr;  // zeros to be filled in, or null if nobody asks
  void* tape = nullptr;                // (rows, dim); in the backward it is the tape's gradient
  int64_t stride_tape = 0;             // from a row of the tape to the next
  int64_t batch;
  int64_t num_tape_tokens;
  int64_t topk;
  int64_t bank_size;
  int64_t dim;
  int64_t rows = 0;    // of the tape, used or not
  bool fused = false;  // whether each block adds up the offsets that it needs by itself

  // The rest is for the backward only.
  float* dweights = nullptr;   // (batch, num_tape_tokens, topk)
  int32_t* entries = nullptr;  // (batch, num_tape_tokens, topk), each read's entry, or kNoEntry
  int32_t* row_of =
      nullptr;            // (batch, num_tape_tokens, topk), the tape row of each read, or kNoRow
  void* dbank = nullptr;  // shaped as bank, contiguous; float32 if kAdded
  MergedGradients kind = MergedGradients::kNoted;
  const float* given = nullptr;  // (batch, num_tape_tokens, topk), added to dweights, or null
  int64_t key_dim = 0;           // if kStored: from this feature on rows of dbank are written
};

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / kWarpSize;
constexpr int kGatherRegisters = 80;  // a thread takes no more
constexpr int kGatherBlocks = blocks_at_once(kGatherThreads, kGatherRegisters);
// Static shared memory of a block: a number for each warp, in block_sum and in write_offsets.
constexpr int64_t kGatherStaticBytes = 2 * kGatherWarps * sizeof(int32_t);
// In a batch of at most so many examples every block adds up the offsets that it needs, so that one
// launch does all. In a larger one a launch of its own writes the offsets first.
constexpr int64_t kGatherFusedBatch = 2048;

// Returns how many tape tokens an example has, in bounds even where a caller's counts are not.
__device__ inline int32_t count_of(const CudaTapeGatherParams& p, int64_t example) {
  return static_cast<int32_t>(clamp(p.counts[example], 0, p.num_tape_tokens));
}

// Sums over the threads of the block; every thread gets the sum.
__device__ inline int32_t block_sum(int32_t x) {
  __shared__ int32_t sums[kGatherWarps];
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  __syncthreads();  // an earlier sum has been read by all
  if (threadIdx.x % kWarpSize == 0) sums[warp] = x;
  __syncthreads();
  int32_t total = 0;
  for (int i = 0; i < kGatherWarps; ++i) total += sums[i];
  return total;
}

// Writes offsets[i + 1], the sum of the counts of examples 0 to i, by the threads of one block.
__device__ inline void write_offsets(const CudaTapeGatherParams& p) {
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
    __syncthreads();  // the ends of the previous examples have been read by all
    if (lane == kWarpSize - 1) ends[warp] = end;
    __syncthreads();
    for (int i = 0; i < kGatherWarps; ++i) {
      if (i < warp) end += ends[i];
    }
    if (example < p.batch) p.offsets[example + 1] = before + end;
    for (int i = 0; i < kGatherWarps; ++i) before += ends[i];
  }
}

// Block 0 writes the offsets, and notes the number of rows and the corrupt counts in the status. In
// the other blocks, if the launch has any, each thread looks at the index of one read.
static __global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_offsets_kernel(CudaTapeGatherParams p) {
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
  const int64_t token = read / p.topk, example = token / p.num_tape_tokens;
  if (example >= p.batch || token % p.num_tape_tokens >= count_of(p, example)) return;
  const int32_t entry = p.indices[read];
  if ((entry < 0 || entry >= p.bank_size) && atomicAdd(&p.status->bad_indices, 1) == 0) {
    p.status->index = entry;
  }
}

// The place of one tape token.
struct TokenRow {
  int64_t example;    // whose token it is
  int64_t row;        // of the tape, where the token lies
  bool exists;        // whether the example has so many tokens, and the tape so many rows
  int64_t rows_used;  // how many rows of the tape all examples use
};

// Returns the place of the warp's token, which differs from warp to warp; all threads of the block
// call it. Where the offsets are not there yet, every block adds up those that it needs, and block
// 0 writes all of them.
__device__ inline TokenRow locate(const CudaTapeGatherParams& p, int64_t token) {
  TokenRow at{token / p.num_tape_tokens, token % p.num_tape_tokens, false, 0};
  if (p.fused) {
    // This is the example of the block's first token.
    const int64_t first = int64_t{blockIdx.x} * kGatherWarps / p.num_tape_tokens;
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
  at.exists = at.example < p.batch && token % p.num_tape_tokens < count_of(p, at.example) &&
              at.row < p.rows;
  return at;
}

// Returns the entry of a read, inside the bank even where a caller's indices are not.
__device__ inline int64_t entry_of(const CudaTapeGatherParams& p, int64_t read) {
  return clamp(p.indices[read], 0, p.bank_size - 1);
}

template <class T>
__device__ const T* bank_row(const CudaTapeGatherParams& p, int64_t example, int64_t entry) {
  return static_cast<const T*>(p.bank) + example * p.stride_example + entry * p.stride_entry;
}

// Warp w merges the entries of token w, counted over all tokens that the examples may have, and
// writes zeros to row w of the tape if no example uses it.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_kernel(CudaTapeGatherParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int first = threadIdx.x % kWarpSize * kPack;  // the first feature of the lane
  const int64_t token = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / kWarpSize;
  const TokenRow at = locate(p, token);
  T* const tape = static_cast<T*>(p.tape);
  if (token >= at.rows_used && token < p.rows) {
    const float zeros[kPack] = {};
    for (int64_t d = first; d < p.dim; d += kWarpSize * kPack) {
      store_pack<Aligned>(tape + token * p.stride_tape, d, p.dim, zeros);
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
    store_pack<Aligned>(tape + at.row * p.stride_tape, d, p.dim, merged);
  }
}

// Warp w writes the gradient of the weights of token w: for each read the product of dtape's row
// with the bank's entry, and the gradient that is given. What it does for the bank's gradient the
// parameters' kind says.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    tape_gather_bwd_kernel(CudaTapeGatherParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / kWarpSize;
  const TokenRow at = locate(p, token);
  if (at.example >= p.batch) return;
  const bool is_read = token % p.num_tape_tokens < count_of(p, at.example);
  const T* const dtape = static_cast<const T*>(p.tape) + at.row * p.stride_tape;
  for (int64_t read = token * p.topk; read < (token + 1) * p.topk; ++read) {
    const int64_t entry = is_read ? entry_of(p, read) : kNoEntry;
    const float weight = p.weights[read];
    float dot = 0.0f;
    for (int64_t d = lane * kPack; at.exists && d < p.dim; d += kWarpSize * kPack) {
      const Pack<T> value = load_pack<Aligned>(bank_row<T>(p, at.example, entry), d, p.dim);
      const Pack<T> dmerged = load_pack<Aligned>(dtape, d, p.dim);
      float drow[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        drow[i] = weight * to_float(dmerged.x[i]);
        dot += to_float(value.x[i]) * to_float(dmerged.x[i]);
      }
      if (p.kind == MergedGradients::kAdded) {
        float* const to = static_cast<float*>(p.dbank) + entry * p.dim + d;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          if (Aligned || d + i < p.dim) atomicAdd(to + i, drow[i]);
        }
      } else if (p.kind == MergedGradients::kStored && d + kPack > p.key_dim) {
        T* const to = static_cast<T*>(p.dbank) + (at.example * p.bank_size + entry) * p.dim;
        if (d >= p.key_dim) {
          store_pack<Aligned>(to, d, p.dim, drow);
        } else {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            if (d + i >= p.key_dim && d + i < p.dim) to[d + i] = from_float<T>(drow[i]);
          }
        }
      }
    }
    dot = warp_sum(dot);
    if (lane != 0) continue;
    p.dweights[read] = dot + (p.given != nullptr ? p.given[read] : 0.0f);
    if (p.kind == MergedGradients::kNoted) {
      p.entries[read] = static_cast<int32_t>(entry);
      p.row_of[read] = at.exists ? static_cast<int32_t>(at.row) : kNoRow;
    }
  }
}

}  // namespace adatape::cuda
