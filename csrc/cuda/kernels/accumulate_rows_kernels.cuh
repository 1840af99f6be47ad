// Rows come home: the formulas stand in adatape_kernels/reference.py.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

// Strides are in elements.
struct CudaAccumulateRowsParams {
  const void* total;           // (num_total, dim)
  int64_t stride_total;        // from a row of total to the next
  const void* rows;            // (num_rows, dim)
  int64_t stride_rows;         // from a row of rows to the next
  const int32_t* source;       // (num_rows,), the row of the total that each row is added to
  int32_t* row_of;             // (num_total,), the row that is added to each of the total, or -1
  const float* weights;        // (num_rows,)
  const float* total_weights;  // (num_rows,), or null for ones
  void* sum;                   // (num_total, dim); it may be total
  int64_t stride_sum;          // from a row of sum to the next
  int64_t num_total;
  int64_t num_rows;
  int64_t dim;
  bool in_place;  // whether a warp takes one of rows, else one of the total
};

// Strides are in elements. The last three are null without total_weights.
struct CudaAccumulateRowsBwdParams {
  const void* dsum;       // (num_total, dim)
  int64_t stride_dsum;    // from a row of dsum to the next
  const void* rows;       // (num_rows, dim)
  int64_t stride_rows;    // from a row of rows to the next
  const int32_t* source;  // (num_rows,)
  const float* weights;   // (num_rows,)
  void* drows;            // (num_rows, dim), contiguous
  float* dweights;        // (num_rows,)
  int64_t num_total;
  int64_t num_rows;
  int64_t dim;
  int64_t stride_total = 0;              // from a row of total to the next
  const void* total = nullptr;           // (num_total, dim)
  const float* total_weights = nullptr;  // (num_rows,)
  void* dtotal = nullptr;                // (num_total, dim), contiguous, a copy of dsum
  float* dtotal_weights = nullptr;       // (num_rows,)
};

constexpr int kAccumulateThreads = 256;
constexpr int kAccumulateWarps = kAccumulateThreads / kWarpSize;
constexpr int kAccumulateRegisters = 64;  // a thread takes no more
constexpr int kAccumulateBlocks = blocks_at_once(kAccumulateThreads, kAccumulateRegisters);

// So many neighbouring elements does a lane take at a time: 16 bytes of the wider of two types.
template <class T, class Row>
constexpr int kAccumulatePack =
    kAccessBytes / static_cast<int>(sizeof(T) > sizeof(Row) ? sizeof(T) : sizeof(Row));

// Loads elements from place d on out of a row of `width` elements as floats; behind the row's end
// they are zeros.
template <bool Aligned, class T, int N>
__device__ void load_floats(const T* row, int64_t d, int64_t width, float (&to)[N]) {
  Pack<T, N> pack;
  if constexpr (Aligned) {
    pack = *reinterpret_cast<const Pack<T, N>*>(row + d);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.x[i] = d + i < width ? row[d + i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.x[i]);
}

// Notes for each row of the total the row that is added to it; -1 is there for the others.
__global__ void __launch_bounds__(kAccumulateThreads, kAccumulateBlocks)
    accumulate_rows_places_kernel(CudaAccumulateRowsParams p) {
  const int64_t row = int64_t{blockIdx.x} * kAccumulateThreads + threadIdx.x;
  if (row >= p.num_rows) return;
  const int32_t place = p.source[row];
  if (place >= 0 && place < p.num_total) p.row_of[place] = static_cast<int32_t>(row);
}

// Warp w takes row w of the total and what is added to it; in place it takes row w of rows.
template <class T, class Row, bool Aligned>
__global__ void __launch_bounds__(kAccumulateThreads, kAccumulateBlocks)
    accumulate_rows_kernel(CudaAccumulateRowsParams p) {
  constexpr int kPack = kAccumulatePack<T, Row>;
  const int64_t one = int64_t{blockIdx.x} * kAccumulateWarps + threadIdx.x / kWarpSize;
  if (one >= (p.in_place ? p.num_rows : p.num_total)) return;
  const int64_t other = p.in_place ? p.source[one] : p.row_of[one];
  const bool added = other >= 0 && other < (p.in_place ? p.num_total : p.num_rows);
  if (p.in_place && !added) return;
  const int64_t place = p.in_place ? other : one, r = p.in_place ? one : other;
  const T* const total = static_cast<const T*>(p.total) + place * p.stride_total;
  T* const sum = static_cast<T*>(p.sum) + place * p.stride_sum;
  const Row* const row = static_cast<const Row*>(p.rows) + (added ? r * p.stride_rows : 0);
  const float weight = added ? p.weights[r] : 0.0f;
  const float total_weight = added && p.total_weights ? p.total_weights[r] : 1.0f;
#pragma unroll 2
  for (int64_t d = threadIdx.x % kWarpSize * kPack; d < p.dim; d += kWarpSize * kPack) {
    float before[kPack], value[kPack];
    load_floats<Aligned>(total, d, p.dim, before);
    if (added) {
      load_floats<Aligned>(row, d, p.dim, value);
#pragma unroll
      for (int i = 0; i < kPack; ++i) before[i] = total_weight * before[i] + weight * value[i];
    }
    store_pack<Aligned>(sum, d, p.dim, before);
  }
}

// Warp r writes the gradients of row r, of its factors, and of the total's row that it is added to.
template <class T, class Row, bool Aligned>
__global__ void __launch_bounds__(kAccumulateThreads, kAccumulateBlocks)
    accumulate_rows_bwd_kernel(CudaAccumulateRowsBwdParams p) {
  constexpr int kPack = kAccumulatePack<T, Row>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t r = int64_t{blockIdx.x} * kAccumulateWarps + threadIdx.x / kWarpSize;
  if (r >= p.num_rows) return;
  const int64_t place = p.source[r];
  const bool added = place >= 0 && place < p.num_total;
  const int64_t at = added ? place : 0;
  const T* const dsum = static_cast<const T*>(p.dsum) + at * p.stride_dsum;
  const T* const total = static_cast<const T*>(p.total) + at * p.stride_total;
  T* const dtotal = static_cast<T*>(p.dtotal) + at * p.dim;
  const Row* const row = static_cast<const Row*>(p.rows) + r * p.stride_rows;
  Row* const drow = static_cast<Row*>(p.drows) + r * p.dim;
  const float weight = added ? p.weights[r] : 0.0f;
  const float total_weight = added && p.total_weights ? p.total_weights[r] : 0.0f;
  float dweight = 0.0f, dtotal_weight = 0.0f;
  for (int64_t d = lane * kPack; d < p.dim; d += kWarpSize * kPack) {
    float given[kPack] = {}, value[kPack] = {};
    if (added) {
      load_floats<Aligned>(dsum, d, p.dim, given);
      load_floats<Aligned>(row, d, p.dim, value);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      dweight += value[i] * given[i];
      value[i] = added ? weight * given[i] : 0.0f;
    }
    store_pack<Aligned>(drow, d, p.dim, value);
    if (added && p.total_weights) {
      load_floats<Aligned>(total, d, p.dim, value);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        dtotal_weight += value[i] * given[i];
        given[i] *= total_weight;
      }
      store_pack<Aligned>(dtotal, d, p.dim, given);
    }
  }
  dweight = warp_sum(dweight);
  dtotal_weight = warp_sum(dtotal_weight);
  if (lane != 0) return;
  p.dweights[r] = dweight;
  if (p.total_weights) p.dtotal_weights[r] = dtotal_weight;
}

}  // namespace adatape::cuda
