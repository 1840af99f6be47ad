// Makes ops of the wrappers in csrc/cuda/ptx.cuh, each of which runs one warp. Tests look with them
// at what lies in which register.

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.cuh"

namespace adatape::cuda {
namespace {

constexpr int kMatrices = 4, kRows = 8, kRegisters = 4;

struct LoadMatricesParams {
  const char* matrices;  // (4, 8, 8), elements of two bytes
  uint32_t* registers;   // (32, 4), those of each lane
  bool transpose;
  bool wait;  // whether the lanes wait for their copies before they load
};

__global__ void load_kernel(LoadMatricesParams p) {
  char* const row = dynamic_shared() + threadIdx.x * kAccessBytes;
  copy_async(row, p.matrices + threadIdx.x * kAccessBytes);
  if (p.wait) wait_for_copies();
  __syncwarp();
  uint32_t loaded[kRegisters];
  p.transpose ? load_matrices<true>(loaded, row) : load_matrices<false>(loaded, row);
  for (int r = 0; r < kRegisters; ++r) p.registers[threadIdx.x * kRegisters + r] = loaded[r];
  wait_for_copies();
}

struct MmaParams {
  const uint32_t* a;  // (32, 4), the registers of each lane, as b and sum
  const uint32_t* b;  // (32, 2)
  float* sum;         // (32, 4)
};

template <class T>
__global__ void mma_kernel(MmaParams p) {
  const int lane = threadIdx.x;
  uint32_t a[kRegisters];
  float sum[kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    a[r] = p.a[lane * kRegisters + r], sum[r] = p.sum[lane * kRegisters + r];
  }
  mma<T>(sum, a, p.b[lane * 2], p.b[lane * 2 + 1]);
  for (int r = 0; r < kRegisters; ++r) p.sum[lane * kRegisters + r] = sum[r];
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

Tensor load(const Tensor& matrices, bool transpose, bool wait) {
  const Tensor registers =
      torch::stable::new_empty(matrices, {kWarpSize, kRegisters}, ScalarType::Int);
  const LoadMatricesParams p{.matrices = data<char>(matrices),
                             .registers = data<uint32_t>(registers),
                             .transpose = transpose,
                             .wait = wait};
  const LaunchStream stream = stream_of(matrices);
  launch(load_kernel,
         {.grid = {.x = 1},
          .block_threads = kWarpSize,
          .shared_bytes = kMatrices * kRows * kAccessBytes,
          .stream = stream},
         p);
  return registers;
}

void multiply(Tensor sum, const Tensor& a, const Tensor& b, bool bfloat16) {
  const MmaParams p{.a = data<uint32_t>(a), .b = data<uint32_t>(b), .sum = data<float>(sum)};
  const LaunchStream stream = stream_of(sum);
  launch(bfloat16 ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>,
         {.grid = {.x = 1}, .block_threads = kWarpSize, .stream = stream}, p);
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY(adatape_ptx, m) {
  m.def("load_matrices(Tensor matrices, bool transpose, bool wait) -> Tensor");
  m.def("mma(Tensor(a!) sum, Tensor a, Tensor b, bool bfloat16) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_ptx, ADATAPE_CUDA_KEY, m) {
  m.impl("load_matrices", TORCH_BOX(&adatape::cuda::load));
  m.impl("mma", TORCH_BOX(&adatape::cuda::multiply));
}
