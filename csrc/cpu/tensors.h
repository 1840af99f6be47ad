// What the ops on the CPU share beside csrc/tensors.h.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "../tensors.h"
#include "kernels.h"

namespace adatape {

inline DType dtype_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? DType::kFloat : DType::kBFloat16;
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
