// What the forward and the backward of attention share: their parameters, the place of an example
// in the buffer, rows in shared memory, and products with these rows.

#pragma once

#include <cmath>
#include <initializer_list>

#include "../ptx.cuh"

namespace adatape::cuda {

constexpr int kHeadDim = 64;
constexpr int kChunks = 8;     // a row of a head has so many chunks of 16 bytes
constexpr int kStep = 16;      // a product takes so many rows or columns at a time
constexpr int kTileRows = 32;  // a warp has so many rows at a time
constexpr int kSteps = kHeadDim / kStep;
constexpr int kRowBytes = kChunks * kAccessBytes;
constexpr float kLog2E = 1.4426950408889634f;

// A matrix of heads, (rows, num_heads, kHeadDim), in which every head's elements are contiguous.
// Strides are in elements.
struct CudaHeadRows {
  void* data = nullptr;
  int64_t stride_row = 0;   // from a row to the next
  int64_t stride_head = 0;  // from a head to the next
};

struct CudaElasticAttentionParams {
  CudaHeadRows q, k, v;      // (rows, num_heads, kHeadDim)
  CudaHeadRows out;          // the same shape, without gaps
  CudaHeadRows dout;         // the same shape, backward only
  CudaHeadRows dq, dk, dv;   // the same shape, backward only
  float* lse;                // (num_heads, rows)
  const int32_t* cu_inputs;  // (batch + 1,)
  const int32_t* cu_tapes;   // (batch + 1,)
  int64_t rows;
  int batch;
  int num_heads;
  int capacity;  // shared memory holds so many rows of an example, a multiple of kStep
  float softmax_scale;
};

// Rounds a number of rows up to whole steps.
__device__ __forceinline__ int round_up(int rows) { return (rows + kStep - 1) / kStep * kStep; }

// The example and head of this block. The example's rows are its inputs, then its tape. Where the
// offsets are corrupt the rows are wrong ones, but they never lie outside the buffer and are never
// more than shared memory holds.
struct BlockExample {
  int head;
  int first_input;  // the row of the buffer where the inputs begin
  int before_tape;  // the row where the tape begins, less num_inputs
  int num_inputs;
  int num_rows;  // of inputs and tape

  __device__ __forceinline__ explicit BlockExample(const CudaElasticAttentionParams& p) {
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
  // Returns the row of the buffer that is row r of the example.
  __device__ __forceinline__ int64_t at(int r) const {
    return r + (r < num_inputs ? first_input : before_tape);
  }
  // Returns the head's elements in row r of the example.
  template <class T>
  __device__ __forceinline__ T* in(const CudaHeadRows& x, int r) const {
    return static_cast<T*>(x.data) + at(r) * x.stride_row + head * x.stride_head;
  }
};

// Rows of kHeadDim elements in shared memory. Chunk c of row r lies at place c ^ (r % 8) of its
// row, so that the eight rows that load_matrices takes at a time lie in different banks.
struct SharedRows {
  int byte;  // of shared memory where row 0 begins, a multiple of the size of eight rows

  // Returns the rows from `row` on.
  __device__ __forceinline__ SharedRows from(int row) const { return {byte + row * kRowBytes}; }
  // Returns the byte of shared memory where a chunk begins.
  __device__ __forceinline__ int place(int row, int c) const {
    return byte + row * kRowBytes + (c ^ (row % 8)) * kAccessBytes;
  }
  __device__ __forceinline__ char* chunk(int row, int c) const {
    return dynamic_shared() + place(row, c);
  }
  // Loads rows `row` to row + 16 at columns 16 * step to 16 * step + 16, as four (8, 8) quarters.
  // These are the upper and the lower half of the left columns, then those of the right columns.
  // They are the first operand of mma; with kTranspose they are the second operand of two products.
  template <bool kTranspose>
  __device__ __forceinline__ void quarters(uint32_t (&to)[4], int row, int step) const {
    const int lane = threadIdx.x % kWarpSize;
    // The lane's chunk is 2 * step + lane / 16. It is found by this exclusive or, so that one
    // register holds what all steps need.
    const int here = place(row + lane % 16, lane / 16) ^ (2 * step * 16);
    load_matrices<kTranspose>(to, dynamic_shared() + here);
  }
};

// Starts to copy rows `first` to `first + count` of the example, where `threads` threads share the
// work and this one is number `thread`. Zeros arrive for rows that the example does not have. The
// rows are there after wait_for_copies and a barrier.
template <class T>
__device__ __forceinline__ void load_rows(SharedRows to, const CudaHeadRows& x,
                                          const BlockExample& e, int first, int count, int thread,
                                          int threads) {
  for (int i = thread; i < count * kChunks; i += threads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool exists = first + r < e.num_rows;
    const T* from = e.in<T>(x, exists ? first + r : 0) + c * Pack<T>::kSize;
    copy_async(to.chunk(r, c), from, exists);
  }
}

// Copies `count` rows from shared memory to the example's rows from `first` on, as many as it has.
template <class T>
__device__ __forceinline__ void store_rows(SharedRows from, const CudaHeadRows& x,
                                           const BlockExample& e, int first, int count) {
  for (int i = lane_anew(); i < count * kChunks; i += kWarpSize) {
    const int r = i / kChunks, c = i % kChunks;
    if (first + r >= e.num_rows) break;
    T* to = e.in<T>(x, first + r) + c * Pack<T>::kSize;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from.chunk(r, c));
  }
}

// Writes a sum (16, kHeadDim), as mma leaves it, to rows `row` to row + 16 of shared memory. The
// first eight rows are multiplied by low_factor, the others by high_factor.
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

// Loads rows 16 m to 16 m + 16 of `from` as first operands of mma, for m up to kCount.
template <int kCount>
__device__ __forceinline__ void load_operands(uint32_t (&to)[kCount][kSteps][4], SharedRows from) {
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) from.quarters<false>(to[m][step], m * kStep, step);
  }
}

// Adds a[m] · (rows `row` to row + 16 of b)ᵀ to sum[m] (16, 16), where a[m] is (16, kHeadDim).
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

// Does the same where a[m] lies in shared memory, as rows 16 m to 16 m + 16 of `a`.
template <class T, int kCount>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kCount][2][4], SharedRows a,
                                                    SharedRows b, int row) {
// Unrolled further, the operands of all steps would be fetched together and take all registers.
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

// Adds a[m] · (rows `row` to row + 16 of b) to sum[m] (16, kHeadDim), where a[m] is (16, 16).
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

// Converts a sum (16, 16), as mma leaves it, to a first operand of mma.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&to)[4], const float (&sum)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    to[2 * n] = pack<T>(sum[n][0], sum[n][1]);
    to[2 * n + 1] = pack<T>(sum[n][2], sum[n][3]);
  }
}

// Calls f(i) for all i from `first` to `end`, shared out among all threads of all blocks.
template <class F>
__device__ __forceinline__ void share(int64_t first, int64_t end, const F& f) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = first + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < end; i += threads) {
    f(i);
  }
}

// Returns the first row of the buffer that no example owns.
__device__ __forceinline__ int64_t first_unused(const CudaElasticAttentionParams& p) {
  return clamp(p.cu_tapes[p.batch], 0, p.rows);
}

// Returns a chunk of a head's elements in a row of the buffer.
__device__ __forceinline__ uint4* chunk_of(const CudaHeadRows& x, int64_t row, int64_t head,
                                           int64_t chunk) {
  constexpr int64_t kChunkElements = kHeadDim / kChunks;
  const int64_t chunks = (row * x.stride_row + head * x.stride_head) / kChunkElements;
  return static_cast<uint4*>(x.data) + chunks + chunk;
}

// Returns whether the block's example has more rows than max_rows said. If so, its rows of the
// results become NaN: the attention of its first rows alone would be wrong, and to refuse the
// example would take a copy to the host.
__device__ __forceinline__ bool spoiled(const CudaElasticAttentionParams& p,
                                        std::initializer_list<CudaHeadRows> results) {
  constexpr uint32_t kNaNs = 0x7fff7fff;  // a NaN twice, in float16 and in bfloat16
  const int i = static_cast<int>(blockIdx.x) / p.num_heads;
  const int head = static_cast<int>(blockIdx.x) % p.num_heads;
  const int64_t inputs = int64_t{p.cu_inputs[i + 1]} - p.cu_inputs[i];
  const int64_t tapes = int64_t{p.cu_tapes[i + 1]} - p.cu_tapes[i];
  if (inputs + tapes <= p.capacity) return false;
  for (const int32_t* offsets : {p.cu_inputs, p.cu_tapes}) {
    const int64_t first = clamp(offsets[i], 0, p.rows), end = clamp(offsets[i + 1], 0, p.rows);
    for (int64_t at = first * kChunks + threadIdx.x; at < end * kChunks; at += blockDim.x) {
      for (const CudaHeadRows& x : results) {
        *chunk_of(x, at / kChunks, head, at % kChunks) = make_uint4(kNaNs, kNaNs, kNaNs, kNaNs);
      }
    }
  }
  return true;
}

// Writes zeros to the rows that no example owns.
__device__ __forceinline__ void zero_unused(const CudaElasticAttentionParams& p,
                                            const CudaHeadRows& x) {
  const int64_t row_chunks = int64_t{kChunks} * p.num_heads;
  share(first_unused(p) * row_chunks, p.rows * row_chunks, [&x, row_chunks](int64_t i) {
    const int64_t place = i % row_chunks;
    *chunk_of(x, i / row_chunks, place / kChunks, place % kChunks) = make_uint4(0, 0, 0, 0);
  });
}

}  // namespace adatape::cuda
