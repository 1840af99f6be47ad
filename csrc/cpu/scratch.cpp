// Keeps, for each thread, the memory that kernels/scratch.h hands out.

#include "kernels/scratch.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace adatape {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestBlockBytes = size_t{1} << 20;

struct AlignedDeleter {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

struct MemoryBlock {
  std::unique_ptr<std::byte, AlignedDeleter> data;
  size_t size;
};

// A thread's blocks of memory, and the place of the next free byte: `used` bytes into block number
// `block`.
struct ThreadMemory {
  std::vector<MemoryBlock> blocks;
  size_t block = 0, used = 0;
};

thread_local ThreadMemory memory;

}  // namespace

Scratch::Scratch() : block_(memory.block), used_(memory.used) {}

Scratch::~Scratch() {
  memory.block = block_;
  memory.used = used_;
}

float* Scratch::take(int64_t count) {
  const size_t bytes =
      (static_cast<size_t>(count) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  for (; memory.block < memory.blocks.size(); ++memory.block, memory.used = 0) {
    if (memory.used + bytes <= memory.blocks[memory.block].size) break;
  }
  if (memory.block == memory.blocks.size()) {
    const size_t size = std::max(bytes, kSmallestBlockBytes);
    auto* data = static_cast<std::byte*>(::operator new(size, std::align_val_t{kAlignment}));
    memory.blocks.push_back({std::unique_ptr<std::byte, AlignedDeleter>(data), size});
  }
  std::byte* const start = memory.blocks[memory.block].data.get() + memory.used;
  memory.used += bytes;
  return reinterpret_cast<float*>(start);
}

}  // namespace adatape
