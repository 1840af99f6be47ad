// What all kernels share: conversions between the numbers that are stored and the floats that are
// computed with, accesses of 16 bytes, and sums over a warp.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace adatape::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
// The widest load or store of a thread moves so many bytes.
constexpr int kAccessBytes = 16;

// Returns how many blocks a multiprocessor holds at once, if a thread takes so many registers. As
// the second argument of __launch_bounds__ it keeps the compiler to that many; `make audit` checks
// that the compiler did so, and that nothing was spilled.
constexpr int blocks_at_once(int threads, int registers) {
  constexpr int kRegistersOfMultiprocessor = 65536;
  return kRegistersOfMultiprocessor / (threads * registers);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Neighbouring elements, which one access moves together.
template <class T, int N = kAccessBytes / static_cast<int>(sizeof(T))>
struct alignas(sizeof(T) * N) Pack {
  static constexpr int kSize = N;
  T x[N];
};

// Loads a pack of elements from place d on out of a row of `width` elements; behind the row's end
// it holds zeros. A row that is not Aligned to 16 bytes is read element after element.
template <bool Aligned, class T>
__device__ Pack<T> load_pack(const T* row, int64_t d, int64_t width) {
  Pack<T> pack;
  if constexpr (Aligned) {
    pack = *reinterpret_cast<const Pack<T>*>(row + d);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) {
      pack.x[i] = d + i < width ? row[d + i] : from_float<T>(0.0f);
    }
  }
  return pack;
}

// Stores the values from place d on in a row of `width` elements; those behind the row's end are
// dropped.
template <bool Aligned, class T, int N>
__device__ void store_pack(T* row, int64_t d, int64_t width, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.x[i] = from_float<T>(values[i]);
  if constexpr (Aligned && sizeof pack == kAccessBytes) {
    uint4 whole;
    memcpy(&whole, &pack, sizeof pack);
    // The compiler may make four stores of 4 bytes out of an assignment.
    __stwb(reinterpret_cast<uint4*>(row + d), whole);
  } else if constexpr (Aligned) {
    *reinterpret_cast<Pack<T, N>*>(row + d) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (d + i < width) row[d + i] = pack.x[i];
    }
  }
}

// Sums over the warp. Every lane gets the same bits, because the order of the sum is fixed.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  return x;
}

__device__ inline int64_t clamp(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

// Returns the block's dynamic shared memory, which has as many bytes as its launch asks for.
__device__ inline char* dynamic_shared() {
#if defined(ADATAPE_CUDA_HOST)
  return reinterpret_cast<char*>(cuda_host::place->shared);
#else
  extern __shared__ __align__(128) char bytes[];
  return bytes;
#endif
}

}  // namespace adatape::cuda
