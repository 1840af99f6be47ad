// What the ops on the CPU share: names for torch's stable ABI, and checks with one-line messages.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <sstream>
#include <string>

#include "kernels.h"

namespace adatape {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as one line: "name: expected …, got …".
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// `x` itself when its last dimension is contiguous, as the kernels need, else a copy.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1
             ? x
             : torch::stable::contiguous(x);
}

inline DType dtype_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? DType::kFloat : DType::kBFloat16;
}

// `x` itself where it is contiguous, without a trip through the dispatcher.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// keys or values, (bank_size, width) or (batch, bank_size, width), with dense rows.
inline Bank bank_of(const Tensor& x) {
  const bool own = x.dim() == 3;
  return {x.data_ptr(), own ? x.stride(0) : 0, x.stride(x.dim() - 2), x.size(x.dim() - 2),
          x.size(x.dim() - 1)};
}

// An uninitialised tensor of the device of `like`. A large one asks for huge pages: the first touch
// of 4 kB pages costs several times what writing them does.
inline Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = start + static_cast<uintptr_t>(out.numel()) * out.element_size();
  // Advice only: where it is not taken, nothing but time is lost.
  if (end > first + kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return out;
}

// Zeros in rows `first` and on of x.
inline void zero_rows_from(Tensor x, int64_t first) {
  if (first == x.size(0)) return;
  Tensor rows = torch::stable::narrow(x, 0, first, x.size(0) - first);
  torch::stable::zero_(rows);
}

// Runs task(0) … task(count - 1), each by the next idle thread of torch's pool.
template <class Task>
void run_tasks(int64_t count, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < count ? threads : count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace adatape
