// Outputs of which most rows are zero, in memory that the operating system has filled with zeros.
//
// It does so with every page that a process touches for the first time, which for a gradient of 77
// MB takes 6.5 ms in huge pages; to write the same zeros once more takes 3.7 ms on one thread.
// Pages of 4 kB for the rows that are not zero alone would take 7 ms, and 10 ms more of whoever
// reads the rest.

#pragma once

#include "cpu_tensors.h"

#if defined(__linux__)
#include <unistd.h>

#include <cstring>
#include <vector>
#endif

namespace adatape {

// From this size on glibc's malloc maps pages for a block alone, and unmaps them when it is freed,
// so that every call touches them for the first time.
constexpr int64_t kOwnPagesBytes = int64_t{32} << 20;

// Gives a fresh block's pages back, so that the operating system fills them with zeros when they
// are touched again, where few of them are there yet. Returns whether the block now holds zeros; it
// holds anything if not.
inline bool drop_pages(void* block, int64_t bytes) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(block), end = start + static_cast<size_t>(bytes);
  const uintptr_t first = (start + page - 1) / page * page, last = end / page * page;
  if (bytes < kOwnPagesBytes || first >= last) return false;
  // Another malloc may have kept the pages of an earlier block, or some of them. They are of more
  // use as they are: to fill memory that is there takes less time than to get new pages.
  auto present = allocate_vector<unsigned char>("the pages of an output",
                                                static_cast<int64_t>((last - first) / page));
  if (mincore(reinterpret_cast<void*>(first), last - first, present.data()) != 0) return false;
  size_t pages = 0;
  for (const unsigned char each : present) pages += each & 1;
  if (pages > present.size() / 8) return false;
  // Pages may also have been swapped out. This drops them all, but not those of shared memory, and
  // emulators are known to ignore it: a probe tells. It is in the last page, as it keeps what is
  // around it from becoming a huge page.
  volatile char* const probe = reinterpret_cast<volatile char*>(last - page);
  *probe = 1;
  if (madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED) != 0) return false;
  if (*probe != 0) return false;
  std::memset(block, 0, first - start);
  std::memset(reinterpret_cast<void*>(last), 0, end - last);
  return true;
#else
  static_cast<void>(block), static_cast<void>(bytes);
  return false;
#endif
}

// An output, and whether it holds zeros.
struct SparseOutput {
  Tensor tensor;
  bool holds_zeros;
};

// Returns an output that is to be zero but for some rows. Where it does not hold zeros already it
// is uninitialised.
inline SparseOutput new_sparse_output(const char* name, const Tensor& like,
                                      torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                      ScalarType dtype) {
  const Tensor out = allocate(name, like, sizes, dtype);
  const bool holds_zeros =
      drop_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  advise_huge_pages(out);
  return {out, holds_zeros};
}

}  // namespace adatape
