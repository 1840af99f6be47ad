// A check of the offsets that say which rows belong to which example.

#pragma once

#include <cstdint>

#include "../stable_torch.h"

namespace adatape {

// Refuses offsets (batch + 1,) that do not begin at `start`, descend, or exceed the number of rows.
inline void check_offsets(const char* name, const int32_t* offsets, int64_t batch, int64_t start,
                          int64_t rows) {
  if (offsets[0] != start) {
    refuse(name, ": expected the first offset to be ", start, ", got ", offsets[0]);
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      refuse(name, ": expected ascending offsets, got ", offsets[i], " then ", offsets[i + 1],
             " at ", i, ", ", i + 1);
    }
  }
  if (offsets[batch] > rows) {
    refuse(name, ": expected the last offset to be at most ", rows, " (the number of rows), got ",
           offsets[batch]);
  }
}

}  // namespace adatape
