// The gradient of adaptive tape reading: the formulas stand in adatape_kernels/reference.py.
//
// A block takes one example. It computes the example's queries once more, and then, from the last
// tape token to the first, the gradients of the queries and of the keys that were read. Gradients
// of keys that were not read are not touched.

#pragma once

#include "../device.cuh"
#include "segment_sum.cuh"
#include "top_entries.cuh"

namespace adatape::cuda {

// What becomes of the gradient of a key that was read:
//   kStored         it is stored in the gradient of the example's own bank,
//   kAdded          it is added, by atomics, to the gradient of a bank that examples share,
//   kContributions  it is written, one row a read, as a contribution for segment_sum_kernel.
enum class KeyGradients { kStored, kAdded, kContributions };

// Strides are in elements.
struct CudaTapeSelectBwdParams {
  const void* query;       // (batch, key_dim)
  int64_t stride_query;    // from an example's query to the next
  const void* keys;        // (bank_size, key_dim) shared, or (batch, bank_size, key_dim)
  int64_t stride_example;  // from an example's bank to the next; 0 for a shared bank
  int64_t stride_entry;    // from an entry of the bank to the next
  const float* dweights;   // (batch, num_tape_tokens, topk)
  const float* dponder;    // (batch,)
  const int32_t* indices;  // (batch, num_tape_tokens, topk)
  const int32_t* counts;   // (batch,)
  // Row s of an example is the query of its tape token s, and after that token's turn in the
  // backward its gradient: (batch, num_tape_tokens + 1, key_dim).
  float* states;
  void* dquery;  // (batch, key_dim)
  // By kind: kStored (batch, bank_size, key_dim or more) as keys, kAdded (bank_size, key_dim or
  // more) in float32, kContributions (batch, num_tape_tokens, topk, key_dim) in float32.
  void* dkeys;
  int64_t stride_dkey;  // from a row of these to the next
  int32_t* entries;     // (batch, num_tape_tokens, topk), each read's entry; or null if nobody asks
  int64_t bank_size;
  int64_t key_dim;
  int32_t num_tape_tokens;
  int32_t topk;
  float scale;         // of the scores, one over the root of key_dim
  bool average_query;  // whether the next query is the mean of query and merged keys
  bool entropy;        // whether the ponder loss is the entropy, else the top-1 loss
  KeyGradients kind;

  // The gradient of the tape that the entries were merged into, or null. What it adds to the keys'
  // features is added before they are stored, if kStored.
  const void* dtape = nullptr;         // (tape_rows, key_dim or more)
  int64_t stride_tape = 0;             // from a row of the tape to the next
  int64_t tape_rows = 0;               // of the tape, used or not
  const float* merged_with = nullptr;  // (batch, num_tape_tokens, topk), the weights of the merging
  const int32_t* offsets = nullptr;    // (batch + 1,), where each example's rows of the tape begin
};

constexpr int kSelectBwdThreads = 128;
constexpr int kSelectBwdWarps = kSelectBwdThreads / kWarpSize;
constexpr int kSelectBwdRegisters = 80;  // a thread takes no more
constexpr int kSelectBwdBlocks = blocks_at_once(kSelectBwdThreads, kSelectBwdRegisters);

// Finds one example's elements in the tensors of the parameters.
template <class T>
struct TapeSelectBwdExample {
  const CudaTapeSelectBwdParams& p;
  int64_t example;

  // Returns the place of the j-th read of a tape token among the reads of all examples.
  __device__ int64_t read(int token, int j) const {
    return (example * p.num_tape_tokens + token) * p.topk + j;
  }
  // Returns the entry of that read, inside the bank even where a caller's indices are not.
  __device__ int64_t entry(int token, int j) const {
    return clamp(p.indices[read(token, j)], 0, p.bank_size - 1);
  }
  __device__ const T* key(int64_t entry) const {
    return static_cast<const T*>(p.keys) + example * p.stride_example + entry * p.stride_entry;
  }
  // Returns the query of a tape token, or its gradient: see `states`.
  __device__ float* state(int token) const {
    return p.states + (example * (p.num_tape_tokens + 1) + token) * p.key_dim;
  }
};

// Returns the product of a key with a query or a gradient, which the lanes of the warp share out.
template <class T, bool Aligned>
__device__ float dot(const T* key, const float* with, int64_t key_dim) {
  constexpr int kPack = Pack<T>::kSize;
  float sum = 0.0f;
  for (int64_t d = threadIdx.x % kWarpSize * kPack; d < key_dim; d += kWarpSize * kPack) {
    const Pack<T> row = load_pack<Aligned>(key, d, key_dim);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (Aligned || d + i < key_dim) sum = fmaf(to_float(row.x[i]), with[d + i], sum);
    }
  }
  return warp_sum(sum);
}

// What the threads of a block exchange, in static shared memory: a number for each entry of a read.
struct TapeSelectBwdShared {
  float scores[kWarpSize], dots[kWarpSize], weights[kWarpSize], dscores[kWarpSize];
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kSelectBwdThreads, kSelectBwdBlocks)
    tape_select_bwd_kernel(CudaTapeSelectBwdParams p) {
  __shared__ TapeSelectBwdShared exchanged;
  auto& scores = exchanged.scores;
  auto& dots = exchanged.dots;
  auto& weights = exchanged.weights;
  auto& dscores = exchanged.dscores;
  const TapeSelectBwdExample<T> at{p, blockIdx.x};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int count = static_cast<int>(clamp(p.counts[at.example], 0, p.num_tape_tokens));
  // The next query is keep · query + take · merged keys.
  const float keep = p.average_query ? 0.5f : 0.0f, take = p.average_query ? 0.5f : 1.0f;

  const T* const query = static_cast<const T*>(p.query) + at.example * p.stride_query;
  for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
    at.state(0)[d] = to_float(query[d]);
  }
  __syncthreads();
  for (int token = 0; token + 1 < count; ++token) {
    const float* const q = at.state(token);
    for (int j = warp; j < p.topk; j += kSelectBwdWarps) {
      const float score = dot<T, Aligned>(at.key(at.entry(token, j)), q, p.key_dim);
      if (lane == 0) scores[j] = score;
    }
    __syncthreads();
    if (warp == 0) weights[lane] = softmax(lane < p.topk ? scores[lane] * p.scale : 0.0f, p.topk);
    __syncthreads();
    for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
      float merged = 0.0f;
      for (int j = 0; j < p.topk; ++j) {
        merged += weights[j] * to_float(at.key(at.entry(token, j))[d]);
      }
      at.state(token + 1)[d] = p.average_query ? (q[d] + merged) * 0.5f : merged;
    }
    __syncthreads();
  }

  for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
    at.state(count)[d] = 0.0f;  // nothing depends on a query behind the last token
  }
  __syncthreads();
  for (int token = count - 1; token >= 0; --token) {
    float* const q = at.state(token);
    const float* const dnext = at.state(token + 1);
    for (int j = warp; j < p.topk; j += kSelectBwdWarps) {
      const T* const key = at.key(at.entry(token, j));
      const float score = dot<T, Aligned>(key, q, p.key_dim);
      const float dmerged = dot<T, Aligned>(key, dnext, p.key_dim);
      if (lane == 0) scores[j] = score, dots[j] = take * dmerged;
    }
    __syncthreads();
    if (warp == 0) {
      const bool is_one = lane < p.topk;
      const float weight = softmax(is_one ? scores[lane] * p.scale : 0.0f, p.topk);
      float dweight = is_one ? p.dweights[at.read(token, lane)] + dots[lane] : 0.0f;
      if (p.entropy) {
        dweight -= 2.0f * p.dponder[at.example] * weight;
      } else {  // the largest weights, if several are equal, share the gradient
        float most = weight;
#pragma unroll
        for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
          most = fmaxf(most, __shfl_xor_sync(kFullMask, most, bits));
        }
        const float best = is_one && weight == most ? 1.0f : 0.0f;
        dweight -= p.dponder[at.example] * (best / warp_sum(best));
      }
      const float mean = warp_sum(is_one ? weight * dweight : 0.0f);
      weights[lane] = weight;
      dscores[lane] = weight * (dweight - mean) * p.scale;
    }
    __syncthreads();
    const T* dmerged = nullptr;
    if (p.dtape != nullptr && p.offsets[at.example] + token < p.tape_rows) {
      dmerged = static_cast<const T*>(p.dtape) + (p.offsets[at.example] + token) * p.stride_tape;
    }
    for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
      const float following = dnext[d], before = q[d];
      const float merged = dmerged != nullptr ? to_float(dmerged[d]) : 0.0f;
      float dq = keep * following;
      for (int j = 0; j < p.topk; ++j) {
        const int64_t entry = at.entry(token, j);
        const float dkey = weights[j] * (take * following) + dscores[j] * before;
        dq = fmaf(dscores[j], to_float(at.key(entry)[d]), dq);
        if (p.kind == KeyGradients::kStored) {
          const int64_t row = at.example * p.bank_size + entry;
          const float weight = dmerged != nullptr ? p.merged_with[at.read(token, j)] : 0.0f;
          static_cast<T*>(p.dkeys)[row * p.stride_dkey + d] = from_float<T>(dkey + weight * merged);
        } else if (p.kind == KeyGradients::kAdded) {
          atomicAdd(static_cast<float*>(p.dkeys) + entry * p.stride_dkey + d, dkey);
        } else {
          static_cast<float*>(p.dkeys)[at.read(token, j) * p.stride_dkey + d] = dkey;
        }
      }
      q[d] = dq;
    }
    __syncthreads();
  }

  T* const dquery = static_cast<T*>(p.dquery) + at.example * p.key_dim;
  for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
    dquery[d] = from_float<T>(at.state(0)[d]);
  }
  if (p.entries != nullptr) {
    for (int r = threadIdx.x; r < p.num_tape_tokens * p.topk; r += kSelectBwdThreads) {
      const int token = r / p.topk, j = r % p.topk;
      p.entries[at.read(token, j)] =
          token < count ? static_cast<int32_t>(at.entry(token, j)) : kNoEntry;
    }
  }
}

}  // namespace adatape::cuda
