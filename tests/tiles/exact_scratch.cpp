// The working memory of csrc/cpu/scratch.cpp for tests: each array is a block of its own, so that
// AddressSanitizer sees who leaves it, and begins as NaN, so that results show who reads what
// nobody wrote.

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/allocation.h"
#include "../../csrc/cpu/kernels/scratch.h"

namespace adatape {
namespace {

constexpr size_t kAlignment = 64;
constexpr int kNan = 0xff;  // in each byte of a float, or of a number in bfloat16

thread_local std::vector<void*> blocks;

}  // namespace

Scratch::Scratch() : used_before_(blocks.size()) {}

Scratch::~Scratch() {
  for (; blocks.size() > used_before_; blocks.pop_back()) std::free(blocks.back());
}

float* Scratch::take(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  void* block = nullptr;
  if (posix_memalign(&block, kAlignment, bytes) != 0) {
    throw CannotAllocate{"working memory", static_cast<int64_t>(bytes)};
  }
  std::memset(block, kNan, bytes);
  blocks.push_back(block);
  return static_cast<float*>(block);
}

}  // namespace adatape
