// As much of CUDA as csrc/cuda uses, on the host. It is for tests only. It is included before every
// .cu file that g++ compiles as C++, so that the kernels run on the CPU and under its sanitizers.
//
// The blocks of a grid run one after another, so that races between blocks do not show. The threads
// of a block are fibers, which take turns at barriers and warp collectives. Under ThreadSanitizer
// they are threads of the system instead, so that it reports a missing barrier as a race. Two
// faults that CUDA leaves undefined end the process with one line: a collective whose mask does not
// fit the lanes that arrive, and a barrier that some threads of the block never reach.

#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

namespace cuda_host {

using Where = std::source_location;

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kMostBytesExchanged = 64;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// The thread that asks, and its block: what CUDA calls threadIdx, blockIdx, blockDim and gridDim,
// and the block's dynamic shared memory.
struct Place {
  Dim thread, block, block_size, grid_size;
  std::byte* shared;
};
extern constinit thread_local const Place* place;

// A launch of a kernel.
struct HostLaunch {
  const char* kernel_name;  // for messages
  Dim grid;
  unsigned block_threads;
  size_t shared_bytes = 0;  // the dynamic shared memory of a block
  size_t static_bytes = 0;  // the kernel's own __shared__ variables
};

// Returns how many bytes of shared memory, static ones included, a block may have.
int64_t shared_limit();

// Runs a kernel for all threads of all blocks, and returns when it is done.
void run(const HostLaunch& launch, const std::function<void()>& kernel);

// Waits for all threads of the block. `where` is for messages, here and below.
void block_barrier(Where where);

// Lets the lanes of the mask meet. Each hands in `size` bytes, and gets the bytes of all lanes, one
// after another, in `all`. Lanes outside the mask leave bytes there that make a float NaN. `what`
// names the collective for messages.
void exchange_bytes(const char* what, unsigned mask, const void* mine, size_t size, void* all,
                    Where where);

// Lets the lanes of the mask meet. Each hands in `mine`, and gets what every lane has handed in.
template <class T>
std::array<T, kWarpLanes> exchange(const T& mine, unsigned mask = kAllLanes,
                                   const char* what = "exchange", Where where = Where::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostBytesExchanged);
  std::array<T, kWarpLanes> all;
  exchange_bytes(what, mask, &mine, sizeof(T), all.data(), where);
  return all;
}

inline unsigned lane() { return place->thread.x % kWarpLanes; }

template <class T>
T shuffle(const char* what, unsigned mask, const T& mine, unsigned from, Where where) {
  return exchange(mine, mask, what, where)[from];
}

template <class T>
T atomic_add(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

template <class T>
T atomic_max(T* to, T value) {
  T before = std::atomic_ref<T>(*to).load(std::memory_order_relaxed);
  while (before < value &&
         !std::atomic_ref<T>(*to).compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
}

}  // namespace cuda_host

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Static memory will do, because one block runs at a time.
#define __shared__ static

#define threadIdx (cuda_host::place->thread)
#define blockIdx (cuda_host::place->block)
#define blockDim (cuda_host::place->block_size)
#define gridDim (cuda_host::place->grid_size)

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::block_barrier(where);
}
inline void __syncwarp(unsigned mask = cuda_host::kAllLanes,
                       cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::exchange(char{}, mask, "__syncwarp", where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from,
              cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_sync", mask, value, from % cuda_host::kWarpLanes, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits,
                  cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, cuda_host::lane() ^ bits, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by,
                   cuda_host::Where where = cuda_host::Where::current()) {
  const unsigned lane = cuda_host::lane(), from = lane + by;
  return cuda_host::shuffle("__shfl_down_sync", mask, value,
                            from < cuda_host::kWarpLanes ? from : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by,
                 cuda_host::Where where = cuda_host::Where::current()) {
  const unsigned lane = cuda_host::lane();
  return cuda_host::shuffle("__shfl_up_sync", mask, value, lane < by ? lane : lane - by, where);
}

inline unsigned __ballot_sync(unsigned mask, int vote,
                              cuda_host::Where where = cuda_host::Where::current()) {
  const auto votes = cuda_host::exchange(vote, mask, "__ballot_sync", where);
  unsigned ballot = 0;
  for (unsigned i = 0; i < cuda_host::kWarpLanes; ++i) {
    if ((mask >> i & 1) && votes[i]) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int vote,
                      cuda_host::Where where = cuda_host::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      cuda_host::Where where = cuda_host::Where::current()) {
  return __ballot_sync(mask, vote, where) == mask;
}

inline int __reduce_max_sync(unsigned mask, int value,
                             cuda_host::Where where = cuda_host::Where::current()) {
  const auto values = cuda_host::exchange(value, mask, "__reduce_max_sync", where);
  for (unsigned i = 0; i < cuda_host::kWarpLanes; ++i) {
    if (mask >> i & 1) value = values[i] > value ? values[i] : value;
  }
  return value;
}
inline int __reduce_min_sync(unsigned mask, int value,
                             cuda_host::Where where = cuda_host::Where::current()) {
  const auto values = cuda_host::exchange(value, mask, "__reduce_min_sync", where);
  for (unsigned i = 0; i < cuda_host::kWarpLanes; ++i) {
    if (mask >> i & 1) value = values[i] < value ? values[i] : value;
  }
  return value;
}

inline float atomicAdd(float* to, float value) { return cuda_host::atomic_add(to, value); }
inline int atomicAdd(int* to, int value) { return cuda_host::atomic_add(to, value); }
inline int atomicMax(int* to, int value) { return cuda_host::atomic_max(to, value); }
inline unsigned atomicAnd(unsigned* to, unsigned value) {
  return std::atomic_ref<unsigned>(*to).fetch_and(value, std::memory_order_relaxed);
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }

// These types are aligned as on a GPU, so that UBSan reports an access that is not.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
