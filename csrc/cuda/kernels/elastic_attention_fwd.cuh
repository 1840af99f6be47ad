// Attention of one head over the rows of one example, whose keys and values stay in shared memory.
//
// A block owns an example and head, a warp 32 of its queries at a time. By napkin, for 256 examples
// of 207 rows and 6 heads on an H200: q, k, v and out are 163 MB, 34 µs; 17 GFLOP, 28 µs at the
// rate of mma.sync; reads of shared memory, halved by two tiles of queries a warp, 18 µs; as long
// for the exponentials. 68 kB of shared memory let three blocks share a multiprocessor, so that one
// loads while others multiply.

#pragma once

#include "elastic_attention.cuh"

namespace adatape::cuda {

// What stays in registers while 16 · kCount queries meet all keys. Index 0 of a pair is a thread's
// row of the upper half of a tile, 1 of the lower.
template <int kCount>
struct Queries {
  uint32_t q[kCount][kSteps][4];
  float out[kCount][2 * kSteps][4];
  float total[kCount][2];    // of this thread's columns alone
  float largest[kCount][2];  // score, in units of log2
};

// While all scores are -inf nothing may be subtracted from them: -inf - -inf is NaN.
__device__ __forceinline__ float finite(float largest) {
  return largest == -INFINITY ? 0.0f : largest;
}

// Adds 16 · kKeySteps keys from `first` on to the running softmax; in the tail not all exist.
template <class T, int kKeySteps, bool kTail, int kCount>
__device__ __forceinline__ void attend(Queries<kCount>& s, SharedRows keys, SharedRows values,
                                       int first, int num_rows, float scale_log2) {
  float scores[kKeySteps][kCount][2][4] = {};
#pragma unroll
  for (int step = 0; step < kKeySteps; ++step) {
    multiply_transposed<T>(scores[step], s.q, keys, first + step * kStep);
  }
  const int column = first + static_cast<int>(threadIdx.x % 4) * 2;  // the first of this thread
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
  if (__any_sync(kFullMask, grew)) {  // else all factors are 1
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

// Queries first … first + 16 · kCount of the example; `slot` is this warp's own.
template <class T, int kCount>
__device__ __forceinline__ void attend_all(const AttentionParams& p, int num_rows, SharedRows keys,
                                           SharedRows values, SharedRows slot, int first) {
  Queries<kCount> s = {};
  // The largest score is sought before the scale, which must not be negative for that.
  const uint32_t sign = p.scale < 0.0f ? 0x80008000u : 0u;
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
  const float scale_log2 = fabsf(p.scale) * kLog2E;
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
  // Looked up once more, so that it takes no registers above.
  const Example e(p);
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

// Twelve warps share a multiprocessor: three blocks of four, as a rule. That a block might have all
// keeps the compiler to 168 registers a thread; asked for three blocks instead it spills, for 10.0.
constexpr int kAttentionFwdThreads = 12 * kWarpSize;

// Keys and values of the example, a tile of queries for each warp.
constexpr int64_t forward_shared_bytes(int capacity, int num_warps) {
  return int64_t{kRowBytes} * (2 * capacity + num_warps * kTileRows);
}

template <class T>
__global__ void __launch_bounds__(kAttentionFwdThreads)
    elastic_attention_fwd_kernel(const AttentionParams p) {
  zero_unused(p, p.out);
  for (int head = 0; head < p.num_heads; ++head) {
    share(head * p.rows + first_unused(p), (head + 1) * p.rows,
          [&p](int64_t i) { p.lse[i] = 0.0f; });
  }
  if (p.batch == 0) return;
  // Of a spoiled example the rows that fit are overwritten: to return here would cost a spill.
  spoiled(p, {p.out});
  const int warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize, num_rows = Example(p).num_rows;
  const SharedRows keys{0}, values = keys.from(p.capacity);
  const SharedRows slot = values.from(p.capacity + warp * kTileRows);
  const auto load_queries = [&](int first) {
    load_rows<T>(slot, p.q, Example(p), first, kTileRows, lane_anew(), kWarpSize);
  };

  load_rows<T>(keys, p.k, Example(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
  load_rows<T>(values, p.v, Example(p), 0, round_up(num_rows), threadIdx.x, blockDim.x);
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
