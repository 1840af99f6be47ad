// Which reads met each row of a bank: the transpose of the indices, for gradients without atomics.

#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace adatape {

// The readers of row r of the flattened bank are list[starts[r]] up to list[starts[r + 1]], in the
// order of examples, steps and ranks, which fixes the order of their sum.
struct ReaderLists {
  std::vector<int64_t> starts;
  std::vector<Reader> list;
};

// `reader(i, s, j)` is the Reader of that read; counts (batch,) tape tokens of each example,
// indices (batch, steps, topk) entries of a bank with `bank_size` rows, an own one for each example
// if `own_banks`.
template <class MakeReader>
ReaderLists list_readers(const int32_t* indices, const int32_t* counts, int64_t batch,
                         int64_t steps, int64_t topk, int64_t bank_size, bool own_banks,
                         const MakeReader& reader) {
  const auto each_read = [&](const auto& visit) {
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t s = 0; s < counts[i]; ++s) {
        for (int64_t j = 0; j < topk; ++j) {
          const int64_t entry = indices[(i * steps + s) * topk + j];
          visit(own_banks ? i * bank_size + entry : entry, i, s, j);
        }
      }
    }
  };
  ReaderLists lists;
  const int64_t rows = own_banks ? batch * bank_size : bank_size;
  lists.starts.assign(rows + 1, 0);
  each_read([&](int64_t row, int64_t, int64_t, int64_t) { ++lists.starts[row + 1]; });
  for (int64_t r = 0; r < rows; ++r) lists.starts[r + 1] += lists.starts[r];
  lists.list.resize(lists.starts[rows]);
  std::vector<int64_t> next(lists.starts.begin(), lists.starts.end() - 1);
  each_read([&](int64_t row, int64_t i, int64_t s, int64_t j) {
    lists.list[next[row]++] = reader(i, s, j);
  });
  return lists;
}

// dbank (…, width), contiguous: every row the sum of the rows (stride apart) that its readers name.
inline void sum_into_bank(const ReaderLists& readers, const void* rows, int64_t stride,
                          DType rows_dtype, const Tensor& dbank) {
  constexpr int64_t kRowsPerTask = 256;
  const int64_t width = dbank.size(dbank.dim() - 1);
  const int64_t bank_rows = static_cast<int64_t>(readers.starts.size()) - 1;
  const DType dtype = dtype_of(dbank);
  char* const to = static_cast<char*>(dbank.data_ptr());
  const int64_t row_bytes = width * static_cast<int64_t>(dbank.element_size());
  const Kernels& chosen = kernels();
  run_tasks((bank_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min(bank_rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const Reader* const list = readers.list.data();
      chosen.sum_readers(list + readers.starts[row], list + readers.starts[row + 1], rows, stride,
                         rows_dtype, to + row * row_bytes, width, dtype);
    }
  });
}

}  // namespace adatape
