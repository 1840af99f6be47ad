// The gradient of adaptive tape reading: see adatape_kernels/reference.py for the formulas.
//
// A block takes one example: its queries again, then their gradients and those of the keys that it
// read, backwards. Rows that it did not read are not touched.

#pragma once

#include "../device.cuh"
#include "scatter.cuh"
#include "top_entries.cuh"

namespace adatape::cuda {

// What becomes of a read key's gradient: it is stored in the example's own bank, added to a bank
// that examples share, or listed, read after read, for scatter_kernel.
enum class KeyGradients { kStored, kAdded, kListed };

struct SelectBwdParams {
  const void* query;               // (batch, key_dim)
  int64_t query_row;               // its stride in elements
  const void* keys;                // (bank_size, key_dim), or (batch, bank_size, key_dim)
  int64_t keys_example, keys_row;  // its strides in elements, the first 0 for a shared bank
  const float* dweights;           // (batch, steps, topk)
  const float* dponder;            // (batch,)
  const int32_t* indices;          // (batch, steps, topk)
  const int32_t* counts;           // (batch,)
  // (batch, steps + 1, key_dim): row s is the query of step s, from its turn on its gradient.
  float* states;
  void* dquery;      // (batch, key_dim)
  void* dkeys;       // as keys; float32 where added to, (batch, steps, topk, key_dim) where listed
  int32_t* entries;  // (batch, steps, topk), where listed: each read's entry, or kNoEntry
  int64_t bank_size, key_dim;
  int32_t steps, topk;
  float scale;
  bool average_query, entropy;
  KeyGradients kind;
};

constexpr int kSelectBwdThreads = 128;
constexpr int kSelectBwdWarps = kSelectBwdThreads / kWarpSize;
constexpr int kSelectBwdRegisters = 80;  // a thread, at most
constexpr int kSelectBwdBlocks = blocks_at_once(kSelectBwdThreads, kSelectBwdRegisters);

// One example's view of the parameters.
template <class T>
struct SelectBwdExample {
  const SelectBwdParams& p;
  int64_t example;

  __device__ int64_t read(int step, int j) const { return (example * p.steps + step) * p.topk + j; }
  // Inside the bank even where a caller's indices are not.
  __device__ int64_t entry(int step, int j) const {
    return clamp(p.indices[read(step, j)], 0, p.bank_size - 1);
  }
  __device__ const T* key(int64_t entry) const {
    return static_cast<const T*>(p.keys) + example * p.keys_example + entry * p.keys_row;
  }
  __device__ float* state(int step) const {
    return p.states + (example * (p.steps + 1) + step) * p.key_dim;
  }
};

// The warp's lanes share the product of a key with a query or a gradient.
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

template <class T, bool Aligned>
__global__ void __launch_bounds__(kSelectBwdThreads, kSelectBwdBlocks)
    tape_select_bwd_kernel(SelectBwdParams p) {
  __shared__ float scores[kWarpSize], dots[kWarpSize], weights[kWarpSize], dscores[kWarpSize];
  const SelectBwdExample<T> at{p, blockIdx.x};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int count = static_cast<int>(clamp(p.counts[at.example], 0, p.steps));
  const float keep = p.average_query ? 0.5f : 0.0f, take = p.average_query ? 0.5f : 1.0f;

  const T* const query = static_cast<const T*>(p.query) + at.example * p.query_row;
  for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
    at.state(0)[d] = to_float(query[d]);
  }
  __syncthreads();
  for (int step = 0; step + 1 < count; ++step) {
    const float* const q = at.state(step);
    for (int j = warp; j < p.topk; j += kSelectBwdWarps) {
      const float score = dot<T, Aligned>(at.key(at.entry(step, j)), q, p.key_dim);
      if (lane == 0) scores[j] = score;
    }
    __syncthreads();
    if (warp == 0) weights[lane] = softmax(lane < p.topk ? scores[lane] * p.scale : 0.0f, p.topk);
    __syncthreads();
    for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
      float merged = 0.0f;
      for (int j = 0; j < p.topk; ++j) {
        merged += weights[j] * to_float(at.key(at.entry(step, j))[d]);
      }
      at.state(step + 1)[d] = p.average_query ? (q[d] + merged) * 0.5f : merged;
    }
    __syncthreads();
  }

  for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
    at.state(count)[d] = 0.0f;  // nothing follows the last step
  }
  __syncthreads();
  for (int step = count - 1; step >= 0; --step) {
    float* const q = at.state(step);
    const float* const dnext = at.state(step + 1);
    for (int j = warp; j < p.topk; j += kSelectBwdWarps) {
      const T* const key = at.key(at.entry(step, j));
      const float score = dot<T, Aligned>(key, q, p.key_dim);
      const float dmerged = dot<T, Aligned>(key, dnext, p.key_dim);
      if (lane == 0) scores[j] = score, dots[j] = take * dmerged;
    }
    __syncthreads();
    if (warp == 0) {
      const bool is_one = lane < p.topk;
      const float weight = softmax(is_one ? scores[lane] * p.scale : 0.0f, p.topk);
      float dweight = is_one ? p.dweights[at.read(step, lane)] + dots[lane] : 0.0f;
      if (p.entropy) {
        dweight -= 2.0f * p.dponder[at.example] * weight;
      } else {  // equal maxima share the gradient
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
    for (int64_t d = threadIdx.x; d < p.key_dim; d += kSelectBwdThreads) {
      const float following = dnext[d], before = q[d];
      float dq = keep * following;
      for (int j = 0; j < p.topk; ++j) {
        const int64_t entry = at.entry(step, j);
        const float dkey = weights[j] * (take * following) + dscores[j] * before;
        dq = fmaf(dscores[j], to_float(at.key(entry)[d]), dq);
        if (p.kind == KeyGradients::kStored) {
          const int64_t row = at.example * p.bank_size + entry;
          static_cast<T*>(p.dkeys)[row * p.key_dim + d] = from_float<T>(dkey);
        } else if (p.kind == KeyGradients::kAdded) {
          atomicAdd(static_cast<float*>(p.dkeys) + entry * p.key_dim + d, dkey);
        } else {
          static_cast<float*>(p.dkeys)[at.read(step, j) * p.key_dim + d] = dkey;
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
  if (p.kind == KeyGradients::kListed) {
    for (int r = threadIdx.x; r < p.steps * p.topk; r += kSelectBwdThreads) {
      const int step = r / p.topk, j = r % p.topk;
      p.entries[at.read(step, j)] =
          step < count ? static_cast<int32_t>(at.entry(step, j)) : kNoEntry;
    }
  }
}

}  // namespace adatape::cuda
