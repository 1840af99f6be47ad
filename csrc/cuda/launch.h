// How a host function starts a kernel, on a GPU or, in tests, on the host (tests/cuda_host).
//
// Every kernel takes one struct of parameters. The ops of csrc/cuda are registered for the dispatch
// key ADATAPE_CUDA_KEY.

#pragma once

#include <source_location>
#include <string>

#include "../stable_torch.h"

#if defined(ADATAPE_CUDA_HOST)
#define ADATAPE_CUDA_KEY CPU
#else
#define ADATAPE_CUDA_KEY CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// torch declares this function in its CUDA builds only, and csrc/cuda is also compiled beside the
// others.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace adatape::cuda {

// The blocks of a launch. Where one of the numbers is 0, nothing is launched.
struct Grid {
  int64_t x = 1, y = 1, z = 1;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
};

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Dynamic shared memory begins at a multiple of so many bytes: see device.cuh.
constexpr int64_t kSharedAlignment = 128;

// The stream that a launch goes to.
struct LaunchStream {
#if !defined(ADATAPE_CUDA_HOST)
  // The stream's device is the current device as long as this lives.
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
#endif
};

// Returns where a block's dynamic shared memory begins, behind the kernel's own variables.
constexpr int64_t dynamic_start(int64_t static_bytes) {
  return ceil_div(static_bytes, kSharedAlignment) * kSharedAlignment;
}

// How a kernel is launched.
struct LaunchConfig {
  Grid grid;
  int block_threads;
  int64_t shared_bytes = 0;  // the dynamic shared memory of a block
  int64_t static_bytes = 0;  // the kernel's own __shared__ variables
  const LaunchStream& stream;

  // Returns the bytes of both.
  int64_t block_bytes() const { return dynamic_start(static_bytes) + shared_bytes; }
};

#if defined(ADATAPE_CUDA_HOST)

inline LaunchStream stream_of(const Tensor&) { return {}; }

// Returns how many bytes of shared memory, static ones included, a block may have where `x` lies.
inline int64_t most_shared_bytes(const Tensor&) { return cuda_host::shared_limit(); }

template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params,
            std::source_location where = std::source_location::current()) {
  if (config.grid.empty()) return;
  const auto dim = [](int64_t n) { return static_cast<unsigned>(n); };
  const std::string file = where.file_name();
  const std::string name = file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
  if (config.block_bytes() > cuda_host::shared_limit()) {
    refuse(name, ": ", config.shared_bytes, " bytes of dynamic and ", config.static_bytes,
           " of static shared memory, where a block has ", cuda_host::shared_limit());
  }
  cuda_host::run({.kernel_name = name.c_str(),
                  .grid = {dim(config.grid.x), dim(config.grid.y), dim(config.grid.z)},
                  .block_threads = static_cast<unsigned>(config.block_threads),
                  .shared_bytes = static_cast<size_t>(config.shared_bytes),
                  .static_bytes = static_cast<size_t>(config.static_bytes)},
                 [&] { kernel(params); });
}

inline void copy_to_host(void* to, const void* from, size_t bytes, const LaunchStream&) {
  std::memcpy(to, from, bytes);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) refuse(what, ": ", cudaGetErrorString(error));
}

// Returns torch's current stream on the device of `x`.
inline LaunchStream stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return {.guard = torch::stable::accelerator::DeviceGuard(x.get_device_index()),
          .stream = static_cast<cudaStream_t>(stream)};
}

// Returns how many bytes of shared memory, static ones included, a block may have where `x` lies.
inline int64_t most_shared_bytes(const Tensor& x) {
  int bytes = 0;
  check(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()),
      "shared memory of a block");
  return bytes;
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params,
            std::source_location where = std::source_location::current()) {
  constexpr int64_t kSharedWithoutAsking = 48 << 10;
  const Grid& grid = config.grid;
  if (grid.empty()) return;
  cudaError_t error = cudaSuccess;
  if (config.block_bytes() > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.shared_bytes));
  }
  if (error == cudaSuccess) {
    const auto dim = [](int64_t n) { return static_cast<unsigned>(n); };
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(kernel, dim3(dim(grid.x), dim(grid.y), dim(grid.z)),
                             dim3(config.block_threads), arguments,
                             static_cast<size_t>(config.shared_bytes), config.stream.stream);
  }
  if (error != cudaSuccess) {
    const char* name = "its kernel";
    cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel));
    refuse(where.function_name(), ": ", name, " with grid (", grid.x, ", ", grid.y, ", ", grid.z,
           "), ", config.block_threads, " threads, ", config.shared_bytes, " bytes of dynamic and ",
           config.static_bytes, " of static shared memory: ", cudaGetErrorString(error));
  }
}

// Copies from the device, and waits until all that the stream has been given before is done.
inline void copy_to_host(void* to, const void* from, size_t bytes, const LaunchStream& on) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on.stream), "copy to the host");
  check(cudaStreamSynchronize(on.stream), "kernels before a copy to the host");
}

#endif

}  // namespace adatape::cuda
