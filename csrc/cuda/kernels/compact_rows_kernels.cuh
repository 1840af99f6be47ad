// Rows leave: the definition stands in adatape_kernels/reference.py. Rows are copied as bytes.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

// Pointers to rows are to bytes, and so are widths and strides.
struct CudaCompactRowsParams {
  const char* data;          // (num_rows, width)
  int64_t stride_data;       // from a row of data to the next
  const uint8_t* keep;       // (num_rows,)
  const int32_t* cu_inputs;  // (num_offsets,)
  const int32_t* cu_tapes;   // (num_offsets,)
  int64_t num_offsets;
  int64_t num_rows;
  int64_t width;
  int64_t chunk;           // rows that a block numbers
  int32_t* before;         // (num_rows + 1,), how many are kept before each row; then all of them
  int32_t* order;          // (num_rows,), in its first places the rows that are kept
  char* packed = nullptr;  // (num_packed, width), contiguous
  int64_t num_packed = 0;
  int32_t* kept_inputs = nullptr;  // (num_offsets,)
  int32_t* kept_tapes = nullptr;   // (num_offsets,)
  int32_t* source = nullptr;       // (num_packed,)
};

struct CudaCompactRowsBwdParams {
  const char* dpacked;     // (num_packed, width)
  int64_t stride_dpacked;  // from a row of dpacked to the next
  const int32_t* source;   // (num_packed,)
  int64_t num_packed;
  char* ddata;  // (num_rows, width), contiguous
  int64_t num_rows;
  int64_t width;
};

constexpr int kCompactThreads = 256;
constexpr int kCompactWarps = kCompactThreads / kWarpSize;
constexpr int kCompactRegisters = 40;  // a thread takes no more
constexpr int kCompactBlocks = blocks_at_once(kCompactThreads, kCompactRegisters);
// Static shared memory of a block: a number for each warp, in block_rank and in compact_block_sum.
constexpr int64_t kCompactStaticBytes = 2 * kCompactWarps * sizeof(int32_t);
// A block numbers at least so many rows, and no launch has more than so many blocks that do. Each
// block counts all that is kept before its chunk by itself, so that blocks wait for nobody and need
// no atomics: together they read 64 bytes a row from the L2 cache, where the copy moves two rows.
constexpr int64_t kCompactChunk = 1024;
constexpr int64_t kCompactChunks = 128;
// A lane has so many accesses in flight before it stores the first.
constexpr int kCompactInFlight = 4;

// Returns how many of the first threads of the block, this one included, hold `kept`; `all` becomes
// the number of those of the whole block.
__device__ inline int32_t block_rank(bool kept, int32_t* all) {
  __shared__ int32_t counts[kCompactWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int32_t rank = kept;
#pragma unroll
  for (int by = 1; by < kWarpSize; by *= 2) {
    const int32_t other = __shfl_up_sync(kFullMask, rank, by);
    if (lane >= by) rank += other;
  }
  __syncthreads();  // earlier counts have been read by all
  if (lane == kWarpSize - 1) counts[warp] = rank;
  __syncthreads();
  *all = 0;
  for (int i = 0; i < kCompactWarps; ++i) {
    if (i < warp) rank += counts[i];
    *all += counts[i];
  }
  return rank;
}

// Sums over the threads of the block; every thread gets the sum.
__device__ inline int32_t compact_block_sum(int32_t x) {
  __shared__ int32_t sums[kCompactWarps];
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  int32_t total = 0;
  for (int i = 0; i < kCompactWarps; ++i) total += sums[i];
  return total;
}

// Returns how many of the four bytes are not zero.
__device__ inline int32_t bytes_set(uint32_t x) {
  // A byte's highest bit becomes set by adding to its other bits, which carries nothing out of it.
  return __popc((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u);
}

// Returns how many of the first `end` rows are kept; every thread of the block gets the number.
__device__ inline int32_t kept_before(const uint8_t* keep, int64_t end) {
  const bool aligned = reinterpret_cast<uintptr_t>(keep) % kAccessBytes == 0;
  const int64_t packs = aligned ? end / kAccessBytes : 0;
  int32_t kept = 0;
  for (int64_t i = threadIdx.x; i < packs; i += kCompactThreads) {
    const uint4 x = reinterpret_cast<const uint4*>(keep)[i];
    kept += bytes_set(x.x) + bytes_set(x.y) + bytes_set(x.z) + bytes_set(x.w);
  }
  for (int64_t row = packs * kAccessBytes + threadIdx.x; row < end; row += kCompactThreads) {
    kept += keep[row] != 0;
  }
  return compact_block_sum(kept);
}

// Numbers the rows of a block's chunk.
__global__ void __launch_bounds__(kCompactThreads, kCompactBlocks)
    compact_rows_prefix_kernel(CudaCompactRowsParams p) {
  const int64_t first = int64_t{blockIdx.x} * p.chunk;
  const int64_t used = clamp(p.cu_tapes[p.num_offsets - 1], 0, p.num_rows);
  int32_t before = kept_before(p.keep, first < used ? first : used);
  for (int64_t start = first; start < first + p.chunk && start < p.num_rows;
       start += kCompactThreads) {
    const int64_t row = start + threadIdx.x;
    const bool kept = row < used && p.keep[row] != 0;
    int32_t all;
    const int32_t place = before + block_rank(kept, &all) - kept;
    if (row < p.num_rows) p.before[row] = place;
    if (kept) p.order[place] = static_cast<int32_t>(row);
    before += all;
  }
  if (threadIdx.x == 0 && first + p.chunk >= p.num_rows) p.before[p.num_rows] = before;
}

// A warp copies a row of `width` bytes by accesses of a Unit, or clears it where there is no
// `from`.
template <class Unit>
__device__ void copy_row(const char* from, char* to, int64_t width) {
  const int64_t units = width / static_cast<int64_t>(sizeof(Unit));
  const Unit* const source = reinterpret_cast<const Unit*>(from);
  Unit* const target = reinterpret_cast<Unit*>(to);
  for (int64_t start = threadIdx.x % kWarpSize; start < units;
       start += kCompactInFlight * kWarpSize) {
    Unit held[kCompactInFlight] = {};
#pragma unroll
    for (int i = 0; i < kCompactInFlight; ++i) {
      const int64_t place = start + i * kWarpSize;
      if (from && place < units) held[i] = source[place];
    }
#pragma unroll
    for (int i = 0; i < kCompactInFlight; ++i) {
      const int64_t place = start + i * kWarpSize;
      if (place < units) target[place] = held[i];
    }
  }
}

// Warp w copies the row for place w, and thread t translates the offsets at place t.
template <class Unit>
__global__ void __launch_bounds__(kCompactThreads, kCompactBlocks)
    compact_rows_copy_kernel(CudaCompactRowsParams p) {
  const int64_t offset = int64_t{blockIdx.x} * kCompactThreads + threadIdx.x;
  if (offset < p.num_offsets) {
    p.kept_inputs[offset] = p.before[clamp(p.cu_inputs[offset], 0, p.num_rows)];
    p.kept_tapes[offset] = p.before[clamp(p.cu_tapes[offset], 0, p.num_rows)];
  }
  const int64_t place = int64_t{blockIdx.x} * kCompactWarps + threadIdx.x / kWarpSize;
  if (place >= p.num_packed) return;
  const int32_t row = place < p.before[p.num_rows] ? p.order[place] : -1;
  if (threadIdx.x % kWarpSize == 0) p.source[place] = row;
  copy_row<Unit>(row < 0 ? nullptr : p.data + row * p.stride_data, p.packed + place * p.width,
                 p.width);
}

// Warp w writes row w of the gradient: a copy, or zeros if it had left.
template <class Unit>
__global__ void __launch_bounds__(kCompactThreads, kCompactBlocks)
    compact_rows_bwd_kernel(CudaCompactRowsBwdParams p) {
  const int64_t row = int64_t{blockIdx.x} * kCompactWarps + threadIdx.x / kWarpSize;
  if (row >= p.num_rows) return;
  // Each step leaves one of 33 parts, between which the lanes look at 32 sources at once. Unused
  // ones, of -1, count as above all rows.
  int64_t low = 0, high = p.num_packed;
  while (low < high) {
    const int64_t lane = threadIdx.x % kWarpSize;
    const int64_t part = (high - low + kWarpSize) / (kWarpSize + 1);
    const int64_t last = low + (lane + 1) * part - 1;
    const int64_t looked = last < high ? last : high - 1;
    const int32_t source = p.source[looked];
    const bool below = last < high && source >= 0 && source < row;
    const int64_t parts = __popc(__ballot_sync(kFullMask, below));
    const int64_t end = low + (parts + 1) * part - 1;
    low += parts * part;
    if (end < high) high = end;
  }
  const bool kept = low < p.num_packed && p.source[low] == row;
  copy_row<Unit>(kept ? p.dpacked + low * p.stride_dpacked : nullptr, p.ddata + row * p.width,
                 p.width);
}

}  // namespace adatape::cuda
