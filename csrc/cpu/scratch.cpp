// Working memory of one task: see kernels/scratch.h.

#include "kernels/scratch.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace adatape {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestBlock = size_t{1} << 20;  // bytes

struct Deleter {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

struct Block {
  std::unique_ptr<std::byte, Deleter> data;
  size_t size;
};

struct Buffer {
  std::vector<Block> blocks;
  size_t block = 0, used = 0;  // the next free byte
};

thread_local Buffer buffer;

}  // namespace

Scratch::Scratch() : block_(buffer.block), used_(buffer.used) {}

Scratch::~Scratch() {
  buffer.block = block_;
  buffer.used = used_;
}

float* Scratch::take(int64_t count) {
  const size_t bytes =
      (static_cast<size_t>(count) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  for (; buffer.block < buffer.blocks.size(); ++buffer.block, buffer.used = 0) {
    if (buffer.used + bytes <= buffer.blocks[buffer.block].size) break;
  }
  if (buffer.block == buffer.blocks.size()) {
    const size_t size = std::max(bytes, kSmallestBlock);
    auto* data = static_cast<std::byte*>(::operator new(size, std::align_val_t{kAlignment}));
    buffer.blocks.push_back({std::unique_ptr<std::byte, Deleter>(data), size});
  }
  std::byte* const start = buffer.blocks[buffer.block].data.get() + buffer.used;
  buffer.used += bytes;
  return reinterpret_cast<float*>(start);
}

}  // namespace adatape
