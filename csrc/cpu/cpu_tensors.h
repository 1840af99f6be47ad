// How the ops on the CPU pass tensors to kernels, allocate outputs and share out their work.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../allocation.h"
#include "../op_checks.h"
#include "../stable_torch.h"
#include "cpu_kernels.h"
#include "kernels/scratch.h"

namespace adatape {

// The dtypes of an op's first argument that the kernels are compiled for.
constexpr ScalarType kCpuDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat;
  }
}

// Returns the bytes of a number.
constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Describes keys or values with dense rows, (bank_size, width) or (batch, bank_size, width).
inline CpuBank bank_of(const Tensor& x) {
  const bool own = x.dim() == 3;
  return {.data = x.data_ptr(),
          .stride_example = own ? x.stride(0) : 0,
          .stride_row = x.stride(x.dim() - 2),
          .bank_size = x.size(x.dim() - 2),
          .width = x.size(x.dim() - 1)};
}

// Asks the operating system for huge pages where a block is large, because the first touch of 4 kB
// pages costs several times what writing them does. It is advice only: where it is not taken,
// nothing but time is lost.
inline void advise_huge_pages(const Tensor& block) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(block.data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = start + static_cast<uintptr_t>(block.numel()) * block.element_size();
  if (end > first + kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(block);
#endif
}

// Fills a new tensor with what no kernel returns, where the environment variable ADATAPE_POISON is
// set, so that an output which was left unwritten shows: with NaN, or with large integers. The
// tests set it, because torch does not fill what is allocated without the dispatcher, whatever
// torch.utils.deterministic.fill_uninitialized_memory says.
inline void poison(const Tensor& x, ScalarType dtype) {
  static const bool wanted = std::getenv("ADATAPE_POISON") != nullptr;
  if (!wanted || x.numel() == 0) return;
  const bool whole = dtype == ScalarType::Int || dtype == ScalarType::Long;
  std::memset(x.data_ptr(), whole ? 0x7f : 0xff, static_cast<size_t>(x.numel() * size_of(dtype)));
}

// Does what `allocate` does, for a CPU, but without a search for an op by its name, which takes
// longer than all the rest.
inline Tensor allocate_on_cpu(const char* name, const Tensor& like,
                              torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMostDims = 4;
  if (sizes.size() > kMostDims) return allocate(name, like, sizes, dtype);
  int64_t strides[kMostDims], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    // A product that is too large is one of a request that torch refuses.
    if (__builtin_mul_overflow(stride, std::max<int64_t>(sizes[d], 1), &stride)) stride = 1;
  }
  const auto torch_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out;
  try {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides, torch_dtype,
        aoti_torch_device_type_cpu(), /*device_index=*/0, &out));
  } catch (const std::runtime_error&) {
    refuse_allocation(name, size_of(dtype), sizes);
  }
  const Tensor result(out);
  poison(result, dtype);
  return result;
}

// Returns offsets (batch + 1,), int32, without gaps between them. Those of tapes that have no rows
// may all be one number in memory.
inline Tensor dense_offsets(const Tensor& x) {
  if (x.is_contiguous()) return x;
  const Tensor out = allocate_on_cpu("offsets", x, {x.size(0)}, ScalarType::Int);
  const auto* const from = static_cast<const int32_t*>(x.data_ptr());
  auto* const to = static_cast<int32_t*>(out.data_ptr());
  for (int64_t i = 0, stride = x.stride(0); i < x.size(0); ++i) to[i] = from[i * stride];
  return out;
}

// Returns an uninitialised tensor on the device of `like`, in huge pages if it is large.
inline Tensor new_output(const char* name, const Tensor& like,
                         torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  const Tensor out = allocate_on_cpu(name, like, sizes, dtype);
  advise_huge_pages(out);
  return out;
}

// Runs task(0) to task(count - 1), each in the next idle thread of torch's pool. An exception that
// a task throws is thrown here, because torch's pool would lose its message.
template <class Task>
void run_tasks(int64_t count, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  torch::stable::parallel_for(0, threads < count ? threads : count, 1, [&](int64_t, int64_t) {
    // A thread's tasks share the memory that the first of them took, until all of them are done.
    const Scratch scratch;
    try {
      for (int64_t i = next++; i < count; i = next++) task(i);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
      next = count;
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Calls task(first, count) for blocks of at most `rows_per_task` rows, which together are all rows.
template <class Task>
void run_row_tasks(int64_t rows, int64_t rows_per_task, const Task& task) {
  run_tasks((rows + rows_per_task - 1) / rows_per_task, [&](int64_t i) {
    const int64_t first = i * rows_per_task;
    task(first, std::min(rows_per_task, rows - first));
  });
}

// Returns the sum of the parts (blocks, dim), which are written over: of kNeighbours that follow
// each other, then of kNeighbours such sums, and so on. So no chain of additions is longer than
// that, and what it rounds off does not grow with the number of parts.
inline Tensor sum_of_parts(const Tensor& parts, ScalarType dtype) {
  constexpr int64_t kNeighbours = 16;
  const int64_t blocks = parts.size(0), dim = parts.size(1);
  float* const first = parts.mutable_data_ptr<float>();
  for (int64_t apart = 1; apart < blocks; apart *= kNeighbours) {
    for (int64_t block = 0; block < blocks; block += apart) {
      const int64_t group = block - block % (apart * kNeighbours);
      if (group == block) continue;
      float* const to = first + group * dim;
      const float* const from = first + block * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
    }
  }
  Tensor sum = allocate_zeros("sum", parts, {dim}, ScalarType::Float);
  if (blocks > 0) std::copy_n(first, dim, sum.mutable_data_ptr<float>());
  return torch::stable::to(sum, dtype);
}

}  // namespace adatape
