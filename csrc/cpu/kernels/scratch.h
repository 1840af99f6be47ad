// Working memory for one task, out of a block that each thread keeps.

#pragma once

#include <cstddef>
#include <cstdint>

namespace adatape {

// Hands out aligned, uninitialised arrays of float, and takes all of them back when it is
// destroyed. One that is made while another lives takes its arrays from the same memory, behind
// those of the other. When a thread's outermost Scratch is destroyed, the thread keeps one block of
// at most kMostKeptBytes for the next, and that only while the block is used.
class Scratch {
 public:
  static constexpr size_t kMostKeptBytes = size_t{4} << 20;

  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Throws CannotAllocate where there is no memory.
  float* take(int64_t count);

 private:
  size_t used_before_;
};

}  // namespace adatape
