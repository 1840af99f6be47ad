// How a host function starts a kernel: on a GPU or, for tests, on the host (tests/cuda_host).
//
// Kernels take one struct of parameters. ADATAPE_CUDA_KEY is the dispatch key that the ops of
// csrc/cuda are registered for.

#pragma once

#include <source_location>
#include <string>

#include "../tensors.h"

#if defined(ADATAPE_CUDA_HOST)
#define ADATAPE_CUDA_KEY CPU
#else
#define ADATAPE_CUDA_KEY CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// Declared by torch for its own CUDA builds only; csrc/cuda also compiles beside the others.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace adatape::cuda {

// Blocks of a launch; 0 in any direction launches nothing.
struct Grid {
  int64_t x = 1, y = 1, z = 1;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
};

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

#if defined(ADATAPE_CUDA_HOST)

struct Stream {};

inline Stream stream_of(const Tensor&) { return {}; }

template <class Params>
void launch(void (*kernel)(Params), Grid grid, int block_threads, int64_t shared_bytes, Stream,
            const Params& params, std::source_location where = std::source_location::current()) {
  if (grid.empty()) return;
  const auto dim = [](int64_t n) { return static_cast<unsigned>(n); };
  const std::string file = where.file_name();
  const std::string name = file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
  cuda_host::run(name.c_str(), {dim(grid.x), dim(grid.y), dim(grid.z)}, block_threads, shared_bytes,
                 [&] { kernel(params); });
}

inline void copy_to_host(void* to, const void* from, size_t bytes, Stream) {
  std::memcpy(to, from, bytes);
}

#else

// The current stream of a device, which is the current device as long as this lives.
struct Stream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) refuse(what, ": ", cudaGetErrorString(error));
}

inline Stream stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return {torch::stable::accelerator::DeviceGuard(x.get_device_index()),
          static_cast<cudaStream_t>(stream)};
}

template <class Params>
void launch(void (*kernel)(Params), Grid grid, int block_threads, int64_t shared_bytes,
            const Stream& on, const Params& params,
            std::source_location where = std::source_location::current()) {
  constexpr int64_t kSharedWithoutAsking = 48 << 10;
  if (grid.empty()) return;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    const auto dim = [](int64_t n) { return static_cast<unsigned>(n); };
    void* arguments[] = {const_cast<Params*>(&params)};
    error =
        cudaLaunchKernel(kernel, dim3(dim(grid.x), dim(grid.y), dim(grid.z)), dim3(block_threads),
                         arguments, static_cast<size_t>(shared_bytes), on.stream);
  }
  if (error != cudaSuccess) {
    const char* name = "its kernel";
    cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel));
    refuse(where.function_name(), ": ", name, " with grid (", grid.x, ", ", grid.y, ", ", grid.z,
           "), ", block_threads, " threads and ", shared_bytes,
           " bytes of shared memory: ", cudaGetErrorString(error));
  }
}

// Waits for what the stream has under way.
inline void copy_to_host(void* to, const void* from, size_t bytes, const Stream& on) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on.stream), "copy to the host");
  check(cudaStreamSynchronize(on.stream), "kernels before a copy to the host");
}

#endif

}  // namespace adatape::cuda
