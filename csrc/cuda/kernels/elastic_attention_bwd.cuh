// The gradients of attention of one head over the rows of one example: the formulas stand in
// adatape_kernels/reference.py.
//
// A block owns one head of one example. First q and dout stay in shared memory, and a warp computes
// dk and dv of 32 keys at a time. Then k and v take their place, and a warp computes dq of 32
// queries at a time. So no sum crosses warps, at the price of seven products where five would do.
// These are estimates for 256 examples of 207 rows and 6 heads on an H200: to move 326 MB takes
// 68 µs, 59 GFLOP take 95 µs at the rate of mma.sync, and reads of shared memory take about 100 µs.

#pragma once

#include "attention_tiles.cuh"

namespace adatape::cuda {

// Two numbers for each query in shared memory, which the gradients need beside its scores.
struct QueryStatistics {
  int byte;  // of shared memory where those of query 0 begin

  // x is the query's lse times log2(e), or inf where there is no such query; y is Σ_d dout · out.
  __device__ __forceinline__ float2& operator[](int query) const {
    return reinterpret_cast<float2*>(dynamic_shared() + byte)[query];
  }
};

// Replaces a score by the key's weight for the query, and the gradient of that weight, which is in
// dscore, by the gradient of the score. Both are 0 where there is no such query. There the rows in
// shared memory are zeros, and their products with an infinite key or value are NaN.
__device__ __forceinline__ void differentiate(float& score, float& dscore, float scale_log2,
                                              float2 of_query) {
  const bool exists = of_query.x != INFINITY;
  score = exists ? exp2_fast(fmaf(score, scale_log2, -of_query.x)) : 0.0f;
  dscore = exists ? score * (dscore - of_query.y) : 0.0f;
}

// Computes dk and dv of 16 · kCount keys from `first` on. The keys and their values lie in tiles
// that belong to this warp, and which the results pass through.
template <class T, int kCount>
__device__ __forceinline__ void key_gradients(const CudaElasticAttentionParams& p, int num_rows,
                                              SharedRows queries, SharedRows douts,
                                              QueryStatistics statistics, SharedRows keys,
                                              SharedRows values, int first) {
  const int lane = threadIdx.x % kWarpSize;
  const float scale_log2 = p.softmax_scale * kLog2E;
  float dk[kCount][2 * kSteps][4] = {}, dv[kCount][2 * kSteps][4] = {};
#pragma unroll 1
  for (int query = 0; query < num_rows; query += kStep) {
    float scores[kCount][2][4] = {}, dscores[kCount][2][4] = {};
    multiply_transposed<T>(scores, keys, queries, query);
    multiply_transposed<T>(dscores, values, douts, query);
    uint32_t weights[kCount][4], dweights[kCount][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 of_query = statistics[query + 8 * n + lane % 4 * 2 + i];
#pragma unroll
        for (int m = 0; m < kCount; ++m) {
          differentiate(scores[m][n][i], dscores[m][n][i], scale_log2, of_query);
          differentiate(scores[m][n][i + 2], dscores[m][n][i + 2], scale_log2, of_query);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      as_operand<T>(weights[m], scores[m]);
      as_operand<T>(dweights[m], dscores[m]);
    }
    multiply<T>(dv, weights, douts, query);
    multiply<T>(dk, dweights, queries, query);
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    put_sum<T>(keys, m * kStep, dk[m], p.softmax_scale, p.softmax_scale);
    put_sum<T>(values, m * kStep, dv[m], 1.0f, 1.0f);
  }
  __syncwarp();
  const BlockExample e(p);
  store_rows<T>(keys, p.dk, e, first, kCount * kStep);
  store_rows<T>(values, p.dv, e, first, kCount * kStep);
  __syncwarp();
}

// Computes dq of 16 · kCount queries from `first` on. The queries and their dout lie in tiles that
// belong to this warp, and which the results pass through.
template <class T, int kCount>
__device__ __forceinline__ void query_gradients(const CudaElasticAttentionParams& p, int num_rows,
                                                SharedRows keys, SharedRows values,
                                                QueryStatistics statistics, SharedRows queries,
                                                SharedRows douts, int first) {
  const int lane = threadIdx.x % kWarpSize;
  const float scale_log2 = p.softmax_scale * kLog2E;
  float dq[kCount][2 * kSteps][4] = {};
  uint32_t q[kCount][kSteps][4], dout[kCount][kSteps][4];
  load_operands(q, queries);
  load_operands(dout, douts);
  float2 of_queries[kCount][2];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    of_queries[m][0] = statistics[first + m * kStep + lane / 4];
    of_queries[m][1] = statistics[first + m * kStep + lane / 4 + 8];
  }
#pragma unroll 1
  for (int key = 0; key < num_rows; key += kStep) {
    float scores[kCount][2][4] = {}, dscores[kCount][2][4] = {};
    multiply_transposed<T>(scores, q, keys, key);
    multiply_transposed<T>(dscores, dout, values, key);
    uint32_t dweights[kCount][4];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& dscore = dscores[m][i / 4][i % 4];
        differentiate(scores[m][i / 4][i % 4], dscore, scale_log2, of_queries[m][i / 2 % 2]);
        // A key that does not exist has a weight that may be infinite, and infinity times zero is
        // NaN.
        if (key + i / 4 * 8 + lane % 4 * 2 + i % 2 >= num_rows) dscore = 0.0f;
      }
      as_operand<T>(dweights[m], dscores[m]);
    }
    multiply<T>(dq, dweights, keys, key);
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kCount; ++m)
    put_sum<T>(queries, m * kStep, dq[m], p.softmax_scale, p.softmax_scale);
  __syncwarp();
  const BlockExample e(p);
  store_rows<T>(queries, p.dq, e, first, kCount * kStep);
  __syncwarp();
}

// Writes the statistics of all queries; eight lanes share a row, whose dout is in shared memory.
template <class T>
__device__ __forceinline__ void write_statistics(const CudaElasticAttentionParams& p,
                                                 const BlockExample& e, SharedRows douts,
                                                 QueryStatistics statistics) {
  for (int i = threadIdx.x; i < round_up(e.num_rows) * kChunks; i += blockDim.x) {
    const int r = i / kChunks, c = i % kChunks;
    const bool exists = r < e.num_rows;
    float sum = 0.0f;
    if (exists) {
      const auto* const out = reinterpret_cast<const Pack<T>*>(e.in<T>(p.out, r)) + c;
      const Pack<T> x = *out, y = *reinterpret_cast<const Pack<T>*>(douts.chunk(r, c));
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) sum += to_float(x.x[j]) * to_float(y.x[j]);
    }
#pragma unroll
    for (int bits = kChunks / 2; bits > 0; bits /= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, bits);
    }
    if (c == 0) {
      const float lse = exists ? p.lse[e.head * p.rows + e.at(r)] : INFINITY;
      statistics[r] = make_float2(lse * kLog2E, sum);
    }
  }
}

constexpr int kAttentionBwdThreads = 8 * kWarpSize;
constexpr int kAttentionBwdRegisters = 248;  // a thread takes no more
constexpr int kAttentionBwdBlocks = blocks_at_once(kAttentionBwdThreads, kAttentionBwdRegisters);

// Returns the bytes for two tensors of the example, two tiles of each warp, and the statistics of
// each query.
constexpr int64_t backward_shared_bytes(int capacity, int num_warps) {
  return int64_t{kRowBytes} * 2 * (capacity + num_warps * kTileRows) + sizeof(float2) * capacity;
}

template <class T>
__global__ void __launch_bounds__(kAttentionBwdThreads, kAttentionBwdBlocks)
    elastic_attention_bwd_kernel(const CudaElasticAttentionParams p) {
  zero_unused(p, p.dq);
  zero_unused(p, p.dk);
  zero_unused(p, p.dv);
  if (p.batch == 0 || spoiled(p, {p.dq, p.dk, p.dv})) return;
  const int num_rows = BlockExample(p).num_rows;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  const SharedRows left{0}, right = left.from(p.capacity), slots = right.from(p.capacity);
  const SharedRows left_tile = slots.from(warp * 2 * kTileRows);
  const SharedRows right_tile = left_tile.from(kTileRows);
  const QueryStatistics statistics{slots.from(num_warps * 2 * kTileRows).byte};
  const auto load_all = [&](const CudaHeadRows& to_left, const CudaHeadRows& to_right) {
    load_rows<T>(left, to_left, BlockExample(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
    load_rows<T>(right, to_right, BlockExample(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
    wait_for_copies();
    __syncthreads();
  };
  const auto load_tiles = [&](const CudaHeadRows& to_left, const CudaHeadRows& to_right,
                              int first) {
    load_rows<T>(left_tile, to_left, BlockExample(p), first, kTileRows, lane, kWarpSize);
    load_rows<T>(right_tile, to_right, BlockExample(p), first, kTileRows, lane, kWarpSize);
    wait_for_copies();
    __syncwarp();
  };

  load_all(p.q, p.dout);
  write_statistics<T>(p, BlockExample(p), right, statistics);
  __syncthreads();
  for (int first = warp * kTileRows; first < num_rows; first += num_warps * kTileRows) {
    load_tiles(p.k, p.v, first);
    if (first + kStep < num_rows) {
      key_gradients<T, 2>(p, num_rows, left, right, statistics, left_tile, right_tile, first);
    } else {
      key_gradients<T, 1>(p, num_rows, left, right, statistics, left_tile, right_tile, first);
    }
  }
  __syncthreads();
  load_all(p.k, p.v);
  for (int first = warp * kTileRows; first < num_rows; first += num_warps * kTileRows) {
    load_tiles(p.q, p.dout, first);
    if (first + kStep < num_rows) {
      query_gradients<T, 2>(p, num_rows, left, right, statistics, left_tile, right_tile, first);
    } else {
      query_gradients<T, 1>(p, num_rows, left, right, statistics, left_tile, right_tile, first);
    }
  }
}

}  // namespace adatape::cuda
