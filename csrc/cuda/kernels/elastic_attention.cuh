// What the forward and the backward of attention share: parameters, an example's place in the
// buffer, rows in shared memory, and products with them.

#pragma once

#include <cmath>
#include <initializer_list>

#include "../ptx.cuh"

namespace adatape::cuda {

constexpr int kHeadDim = 64;
constexpr int kChunks = 8;     // of 16 bytes in a row of a head
constexpr int kStep = 16;      // rows or columns that a product takes at a time
constexpr int kTileRows = 32;  // of a warp
constexpr int kSteps = kHeadDim / kStep;
constexpr int kRowBytes = kChunks * kAccessBytes;
constexpr float kLog2E = 1.4426950408889634f;

// Row r of head h starts at data + r * row + h * head (in elements).
struct HeadRows {
  void* data;
  int64_t row, head;
};

struct AttentionParams {
  HeadRows q, k, v, out;      // (rows, num_heads, kHeadDim); out, dq, dk and dv without gaps
  HeadRows dout, dq, dk, dv;  // the same, backward only
  float* lse;                 // (num_heads, rows)
  const int32_t* cu_inputs;   // (batch + 1,)
  const int32_t* cu_tapes;    // (batch + 1,)
  int64_t rows;
  int batch, num_heads;
  int capacity;  // rows of an example that shared memory holds, a multiple of kStep
  float scale;
};

// Up to whole steps.
__device__ __forceinline__ int round_up(int rows) { return (rows + kStep - 1) / kStep * kStep; }

// The block's example and head. Its rows are the inputs, then the tape. Corrupt offsets give wrong
// rows, never rows outside the buffer or more than shared memory holds.
struct Example {
  int head, first_input, before_tape, num_inputs, num_rows;

  __device__ __forceinline__ explicit Example(const AttentionParams& p) {
    const auto inside = [&p](int offset) { return static_cast<int>(clamp(offset, 0, p.rows)); };
    const int i = static_cast<int>(blockIdx.x) / p.num_heads;
    const int first_tape = inside(p.cu_tapes[i]);
    head = static_cast<int>(blockIdx.x) % p.num_heads;
    first_input = inside(p.cu_inputs[i]);
    num_inputs = static_cast<int>(clamp(inside(p.cu_inputs[i + 1]) - first_input, 0, p.capacity));
    const int tapes =
        static_cast<int>(clamp(inside(p.cu_tapes[i + 1]) - first_tape, 0, p.capacity));
    num_rows = static_cast<int>(clamp(num_inputs + tapes, 0, p.capacity));
    before_tape = first_tape - num_inputs;
  }
  // Where row r of the example lies in the buffer.
  __device__ __forceinline__ int64_t at(int r) const {
    return r + (r < num_inputs ? first_input : before_tape);
  }
  // The head's elements in row r of the example.
  template <class T>
  __device__ __forceinline__ T* in(const HeadRows& x, int r) const {
    return static_cast<T*>(x.data) + at(r) * x.row + head * x.head;
  }
};

// Rows of kHeadDim elements in shared memory, from a byte on that is a multiple of eight rows.
// Chunk c of row r lies at place c ^ (r % 8): so the eight rows that load_matrices takes at a time
// lie in different banks.
struct SharedRows {
  int byte;

  __device__ __forceinline__ SharedRows from(int row) const { return {byte + row * kRowBytes}; }
  __device__ __forceinline__ int place(int row, int c) const {
    return byte + row * kRowBytes + (c ^ (row % 8)) * kAccessBytes;
  }
  __device__ __forceinline__ char* chunk(int row, int c) const {
    return dynamic_shared() + place(row, c);
  }
  // Rows `row` to row + 16 and columns 16 * step to 16 * step + 16 by quarters of (8, 8): upper and
  // lower half of the left columns, then of the right ones. That is the first operand of mma, and
  // transposed the second one, twice.
  template <bool kTranspose>
  __device__ __forceinline__ void quarters(uint32_t (&to)[4], int row, int step) const {
    const int lane = threadIdx.x % kWarpSize;
    // The chunk is 2 * step + lane / 16; so that one register holds the place for all steps.
    const int here = place(row + lane % 16, lane / 16) ^ (2 * step * 16);
    load_matrices<kTranspose>(to, dynamic_shared() + here);
  }
};

// Copies rows first … first + count of the example, zeros where it has none, by `threads` threads
// of which this is number `thread`. They arrive behind wait_for_copies and a barrier.
template <class T>
__device__ __forceinline__ void load_rows(SharedRows to, const HeadRows& x, const Example& e,
                                          int first, int count, int thread, int threads) {
  for (int i = thread; i < count * kChunks; i += threads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool exists = first + r < e.num_rows;
    const T* from = e.in<T>(x, exists ? first + r : 0) + c * Pack<T>::kSize;
    copy_async(to.chunk(r, c), from, exists);
  }
}

// The first rows of `from` to rows `first` and on of the example, as many as it has.
template <class T>
__device__ __forceinline__ void store_rows(SharedRows from, const HeadRows& x, const Example& e,
                                           int first, int count) {
  for (int i = lane_anew(); i < count * kChunks; i += kWarpSize) {
    const int r = i / kChunks, c = i % kChunks;
    if (first + r >= e.num_rows) break;
    T* to = e.in<T>(x, first + r) + c * Pack<T>::kSize;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from.chunk(r, c));
  }
}

// A sum (16, kHeadDim) of mma to rows `row` to row + 16, times a factor for each half of them.
template <class T>
__device__ __forceinline__ void put_sum(SharedRows to, int row, const float (&sum)[2 * kSteps][4],
                                        float low_factor, float high_factor) {
  const int lane = lane_anew(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < 2 * kSteps; ++c) {
    const auto place = [&](int r) {
      return reinterpret_cast<uint32_t*>(to.chunk(row + r, c) + 4 * t);
    };
    *place(g) = pack<T>(sum[c][0] * low_factor, sum[c][1] * low_factor);
    *place(g + 8) = pack<T>(sum[c][2] * high_factor, sum[c][3] * high_factor);
  }
}

// Rows 16 m to 16 m + 16 of `from` as first operands of mma.
template <int kCount>
__device__ __forceinline__ void load_operands(uint32_t (&to)[kCount][kSteps][4], SharedRows from) {
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) from.quarters<false>(to[m][step], m * kStep, step);
  }
}

// sum[m] (16, 16) += a[m] (16, kHeadDim) · (rows `row` to row + 16 of b)ᵀ
template <class T, int kCount>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kCount][2][4],
                                                    const uint32_t (&a)[kCount][kSteps][4],
                                                    SharedRows b, int row) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t quarters[4];
    b.quarters<false>(quarters, row, step);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      mma<T>(sum[m][0], a[m][step], quarters[0], quarters[2]);
      mma<T>(sum[m][1], a[m][step], quarters[1], quarters[3]);
    }
  }
}

// The same, where a[m] is rows 16 m to 16 m + 16 of `a` in shared memory.
template <class T, int kCount>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kCount][2][4], SharedRows a,
                                                    SharedRows b, int row) {
// Of all steps at once the operands would be fetched together, and take all registers.
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    uint32_t quarters[4];
    b.quarters<false>(quarters, row, step);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      uint32_t operand[4];
      a.quarters<false>(operand, m * kStep, step);
      mma<T>(sum[m][0], operand, quarters[0], quarters[2]);
      mma<T>(sum[m][1], operand, quarters[1], quarters[3]);
    }
  }
}

// sum[m] (16, kHeadDim) += a[m] (16, 16) · rows `row` to row + 16 of b
template <class T, int kCount>
__device__ __forceinline__ void multiply(float (&sum)[kCount][2 * kSteps][4],
                                         const uint32_t (&a)[kCount][4], SharedRows b, int row) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t quarters[4];
    b.quarters<true>(quarters, row, step);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      mma<T>(sum[m][2 * step], a[m], quarters[0], quarters[1]);
      mma<T>(sum[m][2 * step + 1], a[m], quarters[2], quarters[3]);
    }
  }
}

// A sum (16, 16) of mma as its first operand.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&to)[4], const float (&sum)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    to[2 * n] = pack<T>(sum[n][0], sum[n][1]);
    to[2 * n + 1] = pack<T>(sum[n][2], sum[n][3]);
  }
}

// Calls f(i) for all i from `first` to `end`: all threads of all blocks together, each its part.
template <class F>
__device__ __forceinline__ void share(int64_t first, int64_t end, const F& f) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = first + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < end; i += threads) {
    f(i);
  }
}

__device__ __forceinline__ int64_t first_unused(const AttentionParams& p) {
  return clamp(p.cu_tapes[p.batch], 0, p.rows);
}

// Whether the block's example is longer than max_rows said. Then its rows become NaN: nobody can
// refuse it without a copy to the host, and its first rows alone do not give its attention.
__device__ __forceinline__ bool spoiled(const AttentionParams& p,
                                        std::initializer_list<HeadRows> results) {
  constexpr uint32_t kNaNs = 0x7fff7fff;  // two of them, float16 or bfloat16
  const int i = static_cast<int>(blockIdx.x) / p.num_heads;
  const int head = static_cast<int>(blockIdx.x) % p.num_heads;
  const int64_t inputs = int64_t{p.cu_inputs[i + 1]} - p.cu_inputs[i];
  const int64_t tapes = int64_t{p.cu_tapes[i + 1]} - p.cu_tapes[i];
  if (inputs + tapes <= p.capacity) return false;
  for (const int32_t* offsets : {p.cu_inputs, p.cu_tapes}) {
    const int64_t first = clamp(offsets[i], 0, p.rows), end = clamp(offsets[i + 1], 0, p.rows);
    for (int64_t at = first * kChunks + threadIdx.x; at < end * kChunks; at += blockDim.x) {
      const int64_t chunk = (at / kChunks * p.num_heads + head) * kChunks + at % kChunks;
      for (const HeadRows& x : results) {
        static_cast<uint4*>(x.data)[chunk] = make_uint4(kNaNs, kNaNs, kNaNs, kNaNs);
      }
    }
  }
  return true;
}

// Zeros in the rows that no example owns.
__device__ __forceinline__ void zero_unused(const AttentionParams& p, const HeadRows& x) {
  const int64_t row_chunks = int64_t{kChunks} * p.num_heads;
  uint4* const chunks = static_cast<uint4*>(x.data);
  share(first_unused(p) * row_chunks, p.rows * row_chunks,
        [chunks](int64_t i) { chunks[i] = make_uint4(0, 0, 0, 0); });
}

}  // namespace adatape::cuda
