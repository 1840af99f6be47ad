// Copies from global to shared memory that a thread does not wait for (cp.async).

#pragma once

#include "device.cuh"

namespace adatape::cuda {

#if defined(ADATAPE_CUDA_HOST)

__device__ inline void copy_async(void* shared, const void* global) {
  struct alignas(kAccessBytes) Access {
    char bytes[kAccessBytes];
  };
  *static_cast<Access*>(shared) = *static_cast<const Access*>(global);
}
__device__ inline void close_group() {}
template <int Groups>
__device__ void wait_for_all_but() {}

#else

// 16 bytes, both addresses a multiple of that.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global));
}

// The copies since the last call make a group.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until the calling thread's own copies have arrived, but for those of the last few groups.
template <int Groups>
__device__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

#endif

}  // namespace adatape::cuda
