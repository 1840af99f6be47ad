// Working memory for one task, out of blocks that each thread keeps.

#pragma once

#include <cstddef>
#include <cstdint>

namespace adatape {

// Hands out aligned, uninitialised arrays of float, and takes all of them back when it is
// destroyed. The memory stays with the thread, so that only a thread's first tasks allocate any.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(int64_t count);

 private:
  size_t block_, used_;  // where the thread's free memory began before
};

}  // namespace adatape
