// The PTX instructions that kernels use. Beside each one stands what it does in tests, where the
// kernels run on the host.
//
// A fragment is the part of a matrix that a thread holds in its registers, as the PTX manual
// defines it. With g = lane / 4 and t = lane % 4, one register of a thread holds the pair of
// elements that lies at columns 2t and 2t + 1 of row g of an (8, 8) matrix.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef ADATAPE_CUDA_HOST
#include <array>
#include <deque>
#include <utility>
#include <vector>
#endif

#include "device.cuh"

namespace adatape::cuda {

// `unpack` and `pack` convert the pair of elements in one register of a fragment, which lies there
// as it would in memory.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  T x[2];
  memcpy(x, &pair, sizeof pair);
  return make_float2(to_float(x[0]), to_float(x[1]));
}
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 both = __floats2half2_rn(x, y);
  uint32_t pair;
  memcpy(&pair, &both, sizeof pair);
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  uint32_t pair;
  memcpy(&pair, &both, sizeof pair);
  return pair;
}

#ifndef ADATAPE_CUDA_HOST
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Returns the thread's lane, and reads it anew at each call. So the compiler cannot keep what
// follows from it in registers from one turn of a loop to the next, which would take too many.
__device__ __forceinline__ int lane_anew() {
#ifdef ADATAPE_CUDA_HOST
  return threadIdx.x % kWarpSize;
#else
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

// Returns 2 ** x to about two units in the last place; results below the normal range are zero.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef ADATAPE_CUDA_HOST
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

#ifdef ADATAPE_CUDA_HOST
// The copies to shared memory that a thread has started, in groups. On the host a copy arrives no
// earlier than it must, so that a test shows where a wait is missing.
struct StartedCopies {
  struct StartedCopy {
    uint4* to;
    const uint4* from;  // null where zeros are to arrive
  };
  std::vector<StartedCopy> open;  // since the last group was closed
  std::deque<std::vector<StartedCopy>> groups;

  static StartedCopies& mine() {
    static thread_local std::array<StartedCopies, 1024> of_block;
    return of_block[threadIdx.x];
  }
  void arrive(size_t all_but) {
    for (; groups.size() > all_but; groups.pop_front()) {
      for (const StartedCopy& copy : groups.front()) *copy.to = copy.from ? *copy.from : uint4{};
    }
  }
};
#endif

// Starts to copy 16 bytes to shared memory. Where they do not exist, zeros arrive and `from` is not
// read. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists = true) {
#ifdef ADATAPE_CUDA_HOST
  StartedCopies::mine().open.push_back(
      {static_cast<uint4*>(to), exists ? static_cast<const uint4*>(from) : nullptr});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
#endif
}

// Makes a group of the copies that this thread has started since the last call.
__device__ __forceinline__ void close_group() {
#ifdef ADATAPE_CUDA_HOST
  StartedCopies& mine = StartedCopies::mine();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until the copies that this thread has started have arrived, save for those of its last
// kGroups groups. Other threads see them after a barrier.
template <int kGroups>
__device__ __forceinline__ void wait_for_all_but() {
#ifdef ADATAPE_CUDA_HOST
  StartedCopies::mine().arrive(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Waits until all copies that this thread has started have arrived.
__device__ __forceinline__ void wait_for_copies() {
  close_group();
  wait_for_all_but<0>();
}

// Loads four (8, 8) matrices from shared memory, by the lanes of a warp together. The `row` of lane
// i is row i % 8 of matrix i / 8, which has 16 bytes. Register m gets elements (g, 2t) and
// (g, 2t + 1) of matrix m, or with kTranspose (2t, g) and (2t + 1, g).
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef ADATAPE_CUDA_HOST
  // A lane reads its row before it meets the others, so that it does not see what they have written
  // without a barrier.
  struct MatrixRow {
    uint16_t elements[8];
  };
  MatrixRow mine;
  const uint4 bits = *static_cast<const uint4*>(row);
  memcpy(&mine, &bits, sizeof mine);
  const auto rows = cuda_host::exchange(mine, kFullMask, "ldmatrix");
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  for (int m = 0; m < 4; ++m) {
    const MatrixRow* matrix = rows.data() + 8 * m;
    const uint32_t low = kTranspose ? matrix[2 * t].elements[g] : matrix[g].elements[2 * t];
    const uint32_t high =
        kTranspose ? matrix[2 * t + 1].elements[g] : matrix[g].elements[2 * t + 1];
    to[m] = low | high << 16;
  }
#else
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// Adds the product a (16, 16) · b (16, 8) to sum (16, 8) in float32, by the lanes of a warp
// together. Of the three matrices a thread holds these elements:
//   a    registers 0 to 3: row g, row g + 8, row g, row g + 8; the first two at columns 2t and
//        2t + 1, the last two at columns 2t + 8 and 2t + 9
//   b    column g, at rows 2t and 2t + 1 in b0, at rows 2t + 8 and 2t + 9 in b1
//   sum  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#ifdef ADATAPE_CUDA_HOST
  struct MmaOperands {
    uint32_t a[4], b[2];
  };
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto lanes = cuda_host::exchange(mine, kFullMask, "mma");
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  // The eight pairs of columns of a meet the eight pairs of rows of b.
  for (int pair = 0; pair < 8; ++pair) {
    const int high = pair / 4;
    for (int column = 0; column < 2; ++column) {
      const float2 y = unpack<T>(lanes[4 * (2 * t + column) + pair % 4].b[high]);
      for (int half = 0; half < 2; ++half) {
        const float2 x = unpack<T>(lanes[4 * g + pair % 4].a[2 * high + half]);
        sum[2 * half + column] += x.x * y.x + x.y * y.y;
      }
    }
  }
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace adatape::cuda
