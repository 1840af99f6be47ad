// Working memory of one task, from a buffer that each thread keeps.

#pragma once

#include <cstddef>
#include <cstdint>

namespace adatape {

// Hands out aligned, uninitialised arrays of float; the destructor takes all of them back. Blocks
// stay with the thread, so that a task after the first allocates nothing.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(int64_t count);

 private:
  size_t block_, used_;
};

}  // namespace adatape
