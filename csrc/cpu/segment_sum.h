// The gradient of a bank, without atomics: every contribution to the bank is sorted into the
// segment of the entry that it belongs to, and every segment is summed by one thread. So each row
// of the gradient is written once, and those of entries that nobody read not at all where the
// memory holds zeros already.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_tensors.h"
#include "zero_pages.h"

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
      check_entries(indices + i * num_tape_tokens * topk, count * topk);
    }
    return offsets;
  }

  // Refuses entries that are not inside the bank.
  void check_entries(const int32_t* entries, int64_t count) const {
    // Without a branch, and with negative numbers above all others, several are looked at at once.
    const auto size = static_cast<uint32_t>(std::min<int64_t>(bank_size, int64_t{1} << 31));
    const auto outside = [size](int32_t entry) { return static_cast<uint32_t>(entry) >= size; };
    uint32_t found = 0;
    for (int64_t read = 0; read < count; ++read) found |= outside(entries[read]);
    if (found == 0) return;
    refuse("indices: expected 0 to ", bank_size - 1, " (inside the bank) where read, got ",
           *std::find_if(entries, entries + count, outside));
  }

  // The rows of all banks together.
  int64_t bank_rows() const { return own_banks ? batch * bank_size : bank_size; }
};

// Describes what was read from `bank`, given indices (batch, num_tape_tokens, topk) and counts
// (batch,), both contiguous.
inline TapeReads tape_reads(const Tensor& bank, const Tensor& indices, const Tensor& counts) {
  return {.indices = indices.const_data_ptr<int32_t>(),
          .counts = counts.const_data_ptr<int32_t>(),
          .batch = indices.size(0),
          .num_tape_tokens = indices.size(1),
          .topk = indices.size(2),
          .bank_size = bank.size(bank.dim() - 2),
          .own_banks = bank.dim() == 3};
}

// What the reads of a batch add to the gradient of a bank, and the sums of it.
//
// The contributions of an example stand in the order of tape tokens and ranks, and those to one row
// of a bank in the order of examples before that, which fixes the order of their sum.
class Segments {
 public:
  // `offsets` are those that `reads` has checked.
  Segments(const TapeReads& reads, const std::vector<int32_t>& offsets)
      : reads_(reads),
        offsets_(offsets),
        contributions_(allocate_vector<Contribution>(
            "contributions", static_cast<int64_t>(offsets[reads.batch]) * reads.topk)) {}

  // Lists what the reads of example i add, where `make(token, rank)` is what one of them does; its
  // bank_row is set here. Several threads may list examples at the same time.
  template <class Make>
  void list(int64_t i, const Make& make) {
    Contribution* const first = contributions_.data() + offsets_[i] * reads_.topk;
    Contribution* last = first;
    const int32_t* entry = reads_.indices + i * reads_.num_tape_tokens * reads_.topk;
    const int64_t bank = reads_.own_banks ? i * reads_.bank_size : 0;
    for (int64_t token = 0; token < reads_.counts[i]; ++token) {
      for (int64_t rank = 0; rank < reads_.topk; ++rank) {
        *last = make(token, rank);
        last++->bank_row = bank + *entry++;
      }
    }
    // All that is added to the example's own bank is here.
    if (reads_.own_banks) {
      std::sort(first, last, [](const Contribution& a, const Contribution& b) {
        return a.bank_row != b.bank_row ? a.bank_row < b.bank_row : a.read < b.read;
      });
    }
  }

  // Writes the sums of all that was listed to p.out, and zeros to the rows of a bank that nothing
  // is added to, unless `holds_zeros` says that they are there.
  void sum(const CpuSegmentSumParams& p, bool holds_zeros) {
    constexpr int64_t kBankRowsPerTask = 256;
    if (!reads_.own_banks) sort_all();
    const Contribution* const all = contributions_.data();
    const Contribution* const end = all + contributions_.size();
    const int64_t row_bytes = p.width * size_of(p.out_dtype);
    const CpuKernels& chosen = cpu_kernels();
    run_row_tasks(reads_.bank_rows(), kBankRowsPerTask, [&](int64_t first_row, int64_t count) {
      const Contribution* next = std::lower_bound(
          all, end, first_row,
          [](const Contribution& c, int64_t bank_row) { return c.bank_row < bank_row; });
      const int64_t last_row = first_row + count;
      for (int64_t row = first_row; row < last_row; ++row) {
        // The next row that something is added to.
        const int64_t used = next != end && next->bank_row < last_row ? next->bank_row : last_row;
        if (!holds_zeros && row_bytes > 0) {
          std::memset(static_cast<std::byte*>(p.out) + row * row_bytes, 0,
                      static_cast<size_t>((used - row) * row_bytes));
        }
        if (used == last_row) return;
        const Contribution* const first = next;
        while (next != end && next->bank_row == used) ++next;
        chosen.segment_sum(p, first, next);
        row = used;
      }
    });
  }

 private:
  // Sorts all contributions by the row of a shared bank that they belong to.
  void sort_all() {
    auto next = allocate_vector<int64_t>("the starts of segments", reads_.bank_rows() + 1);
    for (const Contribution& c : contributions_) ++next[c.bank_row + 1];
    for (int64_t r = 0; r < reads_.bank_rows(); ++r) next[r + 1] += next[r];
    auto sorted =
        allocate_vector<Contribution>("contributions", static_cast<int64_t>(contributions_.size()));
    for (const Contribution& c : contributions_) sorted[next[c.bank_row]++] = c;
    contributions_.swap(sorted);
  }

  const TapeReads& reads_;
  const std::vector<int32_t>& offsets_;
  std::vector<Contribution> contributions_;
};

}  // namespace adatape
