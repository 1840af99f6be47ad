// The gradient of a bank, without atomics: every contribution to the bank is sorted into the
// segment of the entry that it belongs to, and every segment is summed by one thread.

#pragma once

#include <vector>

#include "cpu_tensors.h"

namespace adatape {

// The entries that a batch of examples has read from a bank.
struct TapeReads {
  const int32_t* indices;  // (batch, num_tape_tokens, topk), the entry of each read
  const int32_t* counts;   // (batch,), the tape tokens of each example
  int64_t batch, num_tape_tokens, topk;
  int64_t bank_size;
  bool own_banks;  // whether every example reads from a bank of its own

  // Returns the offsets (batch + 1,) of each example's tape tokens among those of all examples;
  // refuses counts and indices that are out of range.
  std::vector<int32_t> checked_offsets() const {
    std::vector<int32_t> offsets(batch + 1, 0);
    int64_t total = 0;
    for (int64_t i = 0; i < batch; ++i) {
      const int32_t count = counts[i];
      if (count < 0 || count > num_tape_tokens) {
        refuse("counts: expected 0 to ", num_tape_tokens, ", got ", count);
      }
      total += count;
      if (total > kMostRows) refuse("counts: expected a sum of at most ", kMostRows, ", got more");
      offsets[i + 1] = static_cast<int32_t>(total);
      const int32_t* const entries = indices + i * num_tape_tokens * topk;
      for (int64_t read = 0; read < count * topk; ++read) {
        if (entries[read] < 0 || entries[read] >= bank_size) {
          refuse("indices: expected 0 to ", bank_size - 1, " (inside the bank) where read, got ",
                 entries[read]);
        }
      }
    }
    return offsets;
  }

  // Calls visit(bank_row, example, token, rank) for every read, example after example, where
  // bank_row counts the rows of all banks.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t token = 0; token < counts[i]; ++token) {
        for (int64_t rank = 0; rank < topk; ++rank) {
          const int64_t entry = indices[(i * num_tape_tokens + token) * topk + rank];
          visit(own_banks ? i * bank_size + entry : entry, i, token, rank);
        }
      }
    }
  }
};

// All contributions, sorted by the row of the bank that they belong to. Those of row r are
// contributions[starts[r]] up to contributions[starts[r + 1]]. They stand in the order of examples,
// tape tokens and ranks, which fixes the order of their sum.
struct Segments {
  std::vector<int64_t> starts;              // (rows of all banks + 1,)
  std::vector<Contribution> contributions;  // (reads,)
};

// Sorts the reads into segments; `contribution(example, token, rank)` is what one read adds.
template <class MakeContribution>
Segments sort_into_segments(const TapeReads& reads, const MakeContribution& contribution) {
  const int64_t bank_rows = reads.own_banks ? reads.batch * reads.bank_size : reads.bank_size;
  Segments segments;
  segments.starts = allocate_vector<int64_t>("the starts of segments", bank_rows + 1);
  reads.for_each([&](int64_t row, int64_t, int64_t, int64_t) { ++segments.starts[row + 1]; });
  for (int64_t r = 0; r < bank_rows; ++r) segments.starts[r + 1] += segments.starts[r];
  segments.contributions =
      allocate_vector<Contribution>("contributions", segments.starts[bank_rows]);
  auto next = allocate_vector<int64_t>("the starts of segments", bank_rows);
  std::copy(segments.starts.begin(), segments.starts.end() - 1, next.begin());
  reads.for_each([&](int64_t row, int64_t i, int64_t token, int64_t rank) {
    segments.contributions[next[row]++] = contribution(i, token, rank);
  });
  return segments;
}

// Sums every segment into its row of a bank's gradient.
inline void sum_segments(const Segments& segments, const CpuSegmentSumParams& p) {
  constexpr int64_t kBankRowsPerTask = 256;
  const int64_t bank_rows = static_cast<int64_t>(segments.starts.size()) - 1;
  const Contribution* const all = segments.contributions.data();
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(bank_rows, kBankRowsPerTask, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      chosen.segment_sum(p, row, all + segments.starts[row], all + segments.starts[row + 1]);
    }
  });
}

}  // namespace adatape
