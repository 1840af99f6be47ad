// Attention of one head over the rows of one example, whose keys and values stay in shared memory.
//
// A block owns one head of one example, and a warp has 32 of its queries at a time. These are
// estimates for 256 examples of 207 rows and 6 heads on an H200. To move q, k, v and out, which are
// 163 MB, takes 34 µs. The products are 17 GFLOP, which take 28 µs at the rate of mma.sync. Reads
// of shared memory take 18 µs; they would take twice as long if a warp had one tile of 16 queries
// instead of two. The exponentials take as long again. A block has 68 kB of shared memory, so that
// three blocks share a multiprocessor, and one loads while others multiply.

#pragma once

#include "attention_tiles.cuh"

namespace adatape::cuda {

// What stays in registers while 16 · kCount queries meet all keys. A thread has two rows of each
// tile of 16; of a pair, element 0 belongs to its row in the upper half and 1 to that in the lower.
template <int kCount>
struct RunningSoftmax {
  uint32_t q[kCount][kSteps][4];     // the queries, as first operands of mma
  float out[kCount][2 * kSteps][4];  // the weighted sum of values so far
  float total[kCount][2];            // the sum of weights so far, of this thread's columns alone
  float largest[kCount][2];          // the largest score so far, times log2(e)
};

// Returns what may be subtracted from scores of which this is the largest. While all scores are
// -inf that is 0, because -inf - -inf is NaN.
__device__ __forceinline__ float finite(float largest) {
  return largest == -INFINITY ? 0.0f : largest;
}

// Lets the queries meet 16 · kKeySteps keys from `first` on. With kTail some of these keys may not
// exist.
template <class T, int kKeySteps, bool kTail, int kCount>
__device__ __forceinline__ void attend(RunningSoftmax<kCount>& s, SharedRows keys,
                                       SharedRows values, int first, int num_rows,
                                       float scale_log2) {
  float scores[kKeySteps][kCount][2][4] = {};
#pragma unroll
  for (int step = 0; step < kKeySteps; ++step) {
    multiply_transposed<T>(scores[step], s.q, keys, first + step * kStep);
  }
  const int column = first + static_cast<int>(threadIdx.x % 4) * 2;  // this thread's first
  const auto exists = [&](int step, int n, int i) {
    return !kTail || column + step * kStep + 8 * n + i < num_rows;
  };

  float decay[kCount][2];
  bool grew = false;
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = scores[step][m][i / 2][2 * half + i % 2];
          highest = fmaxf(highest, exists(step, i / 2, i % 2) ? score : -INFINITY);
        }
      }
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2));
      const float before = s.largest[m][half], now = fmaxf(before, highest * scale_log2);
      s.largest[m][half] = now;
      grew |= now > before;
      decay[m][half] = exp2_fast(before - finite(now));
    }
  }
  if (__any_sync(kFullMask, grew)) {  // otherwise every decay is 1
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s.total[m][half] *= decay[m][half];
#pragma unroll
        for (int c = 0; c < 2 * kSteps; ++c) {
          s.out[m][c][2 * half] *= decay[m][half];
          s.out[m][c][2 * half + 1] *= decay[m][half];
        }
      }
    }
  }
#pragma unroll
  for (int step = 0; step < kKeySteps; ++step) {
    uint32_t p[kCount][4];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 2 % 2;
        float& score = scores[step][m][i / 4][i % 4];
        score = exp2_fast(fmaf(score, scale_log2, -finite(s.largest[m][half])));
        if (!exists(step, i / 4, i % 2)) score = 0.0f;
        s.total[m][half] += score;
      }
      as_operand<T>(p[m], scores[step][m]);
    }
    multiply<T>(s.out, p, values, first + step * kStep);
  }
}

// Attends from queries `first` to first + 16 · kCount of the example. The queries lie in `slot`,
// which belongs to this warp, and which the results pass through.
template <class T, int kCount>
__device__ __forceinline__ void attend_all(const CudaElasticAttentionParams& p, int num_rows,
                                           SharedRows keys, SharedRows values, SharedRows slot,
                                           int first) {
  RunningSoftmax<kCount> s = {};
  // The largest score is sought before the scores are scaled. That needs a scale that is not
  // negative, so that the sign of a negative one moves to the queries.
  const uint32_t sign = p.softmax_scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    s.largest[m][0] = s.largest[m][1] = -INFINITY;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      slot.quarters<false>(s.q[m][step], m * kStep, step);
#pragma unroll
      for (int r = 0; r < 4; ++r) s.q[m][step][r] ^= sign;
    }
  }
  const float scale_log2 = fabsf(p.softmax_scale) * kLog2E;
  int key = 0;
#pragma unroll 1
  for (; key + 2 * kStep <= num_rows; key += 2 * kStep) {
    attend<T, 2, false>(s, keys, values, key, num_rows, scale_log2);
  }
  if (key + kStep <= num_rows) {
    attend<T, 1, false>(s, keys, values, key, num_rows, scale_log2);
    key += kStep;
  }
  if (key < num_rows) attend<T, 1, true>(s, keys, values, key, num_rows, scale_log2);

  __syncwarp();
  // The example is looked up once more, so that it takes no registers during the loop.
  const BlockExample e(p);
  const int lane = lane_anew();
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = s.total[m][half];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
      inverse[half] = 1.0f / total;
      const int r = first + m * kStep + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < e.num_rows) {
        p.lse[e.head * p.rows + e.at(r)] = (s.largest[m][half] + log2f(total)) / kLog2E;
      }
    }
    put_sum<T>(slot, m * kStep, s.out[m], inverse[0], inverse[1]);
  }
  __syncwarp();
  store_rows<T>(slot, p.out, e, first, kCount * kStep);
  __syncwarp();
}

// Twelve warps share a multiprocessor, as a rule in three blocks of four. The compiler is told that
// a block may have all twelve, which keeps it to 168 registers a thread. If it is asked for three
// blocks instead, it spills for architecture 10.0.
constexpr int kAttentionFwdThreads = 12 * kWarpSize;

// Returns the bytes for keys and values of the example and for a tile of queries of each warp.
constexpr int64_t forward_shared_bytes(int capacity, int num_warps) {
  return int64_t{kRowBytes} * (2 * capacity + num_warps * kTileRows);
}

template <class T>
__global__ void __launch_bounds__(kAttentionFwdThreads)
    elastic_attention_fwd_kernel(const CudaElasticAttentionParams p) {
  zero_unused(p, p.out);
  for (int head = 0; head < p.num_heads; ++head) {
    share(head * p.rows + first_unused(p), (head + 1) * p.rows,
          [&p](int64_t i) { p.lse[i] = 0.0f; });
  }
  if (p.batch == 0) return;
  // The rows of a spoiled example that fit into shared memory are overwritten below, and stay NaN
  // in part only. To return here would cost a spill.
  spoiled(p, {p.out});
  const int warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize, num_rows = BlockExample(p).num_rows;
  const SharedRows keys{0}, values = keys.from(p.capacity);
  const SharedRows slot = values.from(p.capacity + warp * kTileRows);
  const auto load_queries = [&](int first) {
    load_rows<T>(slot, p.q, BlockExample(p), first, kTileRows, lane_anew(), kWarpSize);
  };

  load_rows<T>(keys, p.k, BlockExample(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
  load_rows<T>(values, p.v, BlockExample(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
  load_queries(warp * kTileRows);
  wait_for_copies();
  __syncthreads();
  for (int first = warp * kTileRows; first < num_rows; first += num_warps * kTileRows) {
    if (first >= num_warps * kTileRows) {
      load_queries(first);
      wait_for_copies();
      __syncwarp();
    }
    if (first + kStep < num_rows) {
      attend_all<T, 2>(p, num_rows, keys, values, slot, first);
    } else {
      attend_all<T, 1>(p, num_rows, keys, values, slot, first);
    }
  }
}

}  // namespace adatape::cuda
