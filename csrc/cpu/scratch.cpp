// Keeps, for each thread, the memory that kernels/scratch.h hands out.
//
// Blocks are asked of the operating system, so that what is given back is free at once. Torch's
// allocator would show a block to memory profilers, but of the calling thread alone, and it calls
// malloc, which for blocks of ever other sizes has kept gigabytes that nothing used. Nor is
// anything of torch called when a thread ends, at which time torch's own thread-local state may be
// gone.

#include "kernels/scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../allocation.h"

namespace adatape {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kBlockMultiple = size_t{1} << 20;
// A thread looks so many calls back when it decides whether its block is too large.
constexpr int kCallsOfAWhile = 64;

constexpr size_t round_up(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A block of memory, or none.
class MemoryBlock {
 public:
  MemoryBlock() = default;
  explicit MemoryBlock(size_t bytes) : size_(round_up(bytes, kBlockMultiple)) {
    void* const data =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw CannotAllocate{"working memory", static_cast<int64_t>(size_)};
    data_ = static_cast<std::byte*>(data);
#if defined(__linux__)
    // A block that is not kept is touched for the first time in every call.
    if (size_ > Scratch::kMostKeptBytes) madvise(data, size_, MADV_HUGEPAGE);
#endif
  }
  MemoryBlock(MemoryBlock&& other) noexcept { swap(other); }
  MemoryBlock& operator=(MemoryBlock&& other) noexcept {
    MemoryBlock taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~MemoryBlock() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(MemoryBlock& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A thread's memory. What one task takes lies in `block`, as far as there is room, and behind that
// in `more`, which is given back when nothing is in use; the next task then finds one block in
// which all of it fits.
struct ThreadMemory {
  MemoryBlock block;
  std::vector<MemoryBlock> more;
  size_t used = 0;  // bytes that have been handed out
  size_t most = 0;  // the most that were in use at once in the last calls
  int depth = 0;    // how many objects of Scratch live
  int calls = 0;    // since `most` began at zero

  std::byte* take(size_t bytes) {
    if (!more.empty() || used + bytes > block.size()) return take_new(bytes);
    std::byte* const start = block.data() + used;
    count(bytes);
    return start;
  }

  std::byte* take_new(size_t bytes) {
    std::byte* start;
    if (used == 0) {
      block = {};  // before the new one is asked for, because both may not fit
      block = MemoryBlock(std::max(bytes, most));
      start = block.data();
    } else {
      more.push_back(MemoryBlock(bytes));
      start = more.back().data();
    }
    count(bytes);
    return start;
  }

  void count(size_t bytes) {
    used += bytes;
    most = std::max(most, used);
  }

  void give_back_to(size_t before) {
    used = before;
    if (used > 0 || more.empty()) return;
    more.clear();
    block = {};
  }

  void end_call() {
    if (block.size() > Scratch::kMostKeptBytes) block = {};
    if (most > Scratch::kMostKeptBytes) most = 0;
    if (++calls < kCallsOfAWhile) return;
    if (block.size() > round_up(2 * most, kBlockMultiple)) block = {};
    most = 0;
    calls = 0;
  }
};

thread_local ThreadMemory memory;

}  // namespace

Scratch::Scratch() : used_before_(memory.used) { ++memory.depth; }

Scratch::~Scratch() {
  memory.give_back_to(used_before_);
  if (--memory.depth == 0) memory.end_call();
}

float* Scratch::take(int64_t count) {
  const size_t bytes = round_up(static_cast<size_t>(count) * sizeof(float), kAlignment);
  return reinterpret_cast<float*>(memory.take(bytes));
}

}  // namespace adatape
