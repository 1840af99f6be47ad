// Rows leave, on the CPU: checks, a scan over what is kept, and copies of runs of rows.

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"
#include "offset_checks.h"

namespace adatape {
namespace {

// A task copies what is kept of so many rows, and the scan counts so many rows at a time.
constexpr int64_t kCompactRows = 64;

// Of the next row so many bytes are asked for while one is copied; the rest follows by itself.
constexpr int64_t kPrefetchedBytes = 3072;

// Rows of bytes, whatever their dtype.
struct RowBytes {
  std::byte* data;
  int64_t stride;  // bytes from a row to the next
  int64_t width;   // bytes of a row

  explicit RowBytes(const Tensor& x)
      : data(static_cast<std::byte*>(x.data_ptr())),
        stride(x.stride(0) * static_cast<int64_t>(x.element_size())),
        width(x.size(1) * static_cast<int64_t>(x.element_size())) {}
  std::byte* row(int64_t r) const { return data + r * stride; }
};

// Copies `count` neighbouring rows, by one call where no gap lies between them.
void copy_rows(const RowBytes& from, int64_t from_row, const RowBytes& to, int64_t to_row,
               int64_t count) {
  if (count == 0 || to.width == 0) return;
  if (from.stride == from.width && to.stride == to.width) {
    std::memcpy(to.row(to_row), from.row(from_row), static_cast<size_t>(count * to.width));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to.row(to_row + i), from.row(from_row + i), static_cast<size_t>(to.width));
  }
}

// Asks for the beginning of the row that is copied next, as no processor foresees where it lies. It
// packs a quarter of 6,304 rows of 1,536 bytes at 0.7 of a copy's rate rather than at 0.6.
void prefetch_row(const RowBytes& from, int64_t row) {
  const std::byte* const begin = from.row(row);
  for (int64_t i = 0; i < std::min(from.width, kPrefetchedBytes); i += kCacheLine) {
    __builtin_prefetch(begin + i, /*rw=*/0, /*locality=*/2);
  }
}

void clear_rows(const RowBytes& to, int64_t first, int64_t count) {
  if (count == 0 || to.width == 0) return;
  std::memset(to.row(first), 0, static_cast<size_t>(count * to.width));
}

// The rows that are kept: those before `used`, the rows that examples own, for which `keep` holds.
class KeptRows {
 public:
  KeptRows(const Tensor& keep, int64_t used)
      : keep_(static_cast<const uint8_t*>(keep.data_ptr())),
        used_(used),
        before_(allocate_vector<int32_t>("the rows before each block",
                                         (used + kCompactRows - 1) / kCompactRows + 1)) {
    for (size_t block = 0; block + 1 < before_.size(); ++block) {
      const int64_t first = static_cast<int64_t>(block) * kCompactRows;
      before_[block + 1] = before_[block] + count(first, std::min(first + kCompactRows, used_));
    }
  }

  int64_t used() const { return used_; }
  int32_t total() const { return before_.back(); }
  bool operator[](int64_t row) const { return keep_[row] != 0; }

  // Returns how many rows before this one are kept.
  int32_t before(int64_t row) const {
    const int64_t block = row / kCompactRows;
    return before_[static_cast<size_t>(block)] + count(block * kCompactRows, row);
  }

 private:
  int32_t count(int64_t first, int64_t last) const {
    int32_t kept = 0;
    for (int64_t r = first; r < last; ++r) kept += keep_[r] != 0;
    return kept;
  }

  const uint8_t* keep_;
  int64_t used_;
  std::vector<int32_t> before_;  // how many rows before each block are kept; then all of them
};

void translate(const Tensor& offsets, const KeptRows& kept, const Tensor& to) {
  const int32_t* const given = offsets.const_data_ptr<int32_t>();
  int32_t* const found = to.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < offsets.size(0); ++i) found[i] = kept.before(given[i]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_rows(const Tensor& data_any,
                                                        const Tensor& keep_any,
                                                        const Tensor& cu_inputs_any,
                                                        const Tensor& cu_tapes_any,
                                                        std::optional<int64_t> capacity) {
  check_compact_rows(data_any, keep_any, cu_inputs_any, cu_tapes_any, capacity, kCpuDtypes);
  const Tensor data = with_dense_rows(data_any), keep = dense(keep_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const int64_t batch = cu_inputs.size(0) - 1;
  const int32_t* const inputs = cu_inputs.const_data_ptr<int32_t>();
  const int32_t* const tapes = cu_tapes.const_data_ptr<int32_t>();
  check_offsets("cu_inputs", inputs, batch, 0, data.size(0));
  check_offsets("cu_tapes", tapes, batch, inputs[batch], data.size(0));
  const KeptRows kept(keep, tapes[batch]);
  if (capacity && *capacity < kept.total()) {
    refuse("capacity: expected at least the ", kept.total(), " rows kept, got ", *capacity);
  }
  const int64_t rows = capacity ? *capacity : kept.total();
  const Tensor packed = new_output("packed", data, {rows, data.size(1)}, data.scalar_type());
  const Tensor source = new_output("source", cu_inputs, {rows}, ScalarType::Int);
  const Tensor kept_inputs = new_output("kept_inputs", cu_inputs, {batch + 1}, ScalarType::Int);
  const Tensor kept_tapes = new_output("kept_tapes", cu_tapes, {batch + 1}, ScalarType::Int);
  translate(cu_inputs, kept, kept_inputs);
  translate(cu_tapes, kept, kept_tapes);

  const RowBytes from(data), to(packed);
  int32_t* const numbers = source.mutable_data_ptr<int32_t>();
  run_row_tasks(kept.used(), kCompactRows, [&](int64_t first, int64_t count) {
    int64_t place = kept.before(first);
    for (int64_t row = first; row < first + count;) {
      int64_t end = row;
      for (; end < first + count && kept[end]; ++end) {
        numbers[place + end - row] = static_cast<int32_t>(end);
      }
      int64_t next = end;  // the rows from `end` to it leave
      while (next < first + count && !kept[next]) ++next;
      if (next < first + count) prefetch_row(from, next);
      copy_rows(from, row, to, place, end - row);
      place += end - row;
      row = next;
    }
  });
  zero_rows_from(packed, kept.total());
  std::fill(numbers + kept.total(), numbers + rows, -1);
  return {packed, kept_inputs, kept_tapes, source};
}

// Refuses a source that is not one of compact_rows, and returns how many rows it names.
int64_t checked_sources(const int32_t* source, int64_t count, int64_t rows) {
  int64_t named = 0;
  for (; named < count && source[named] >= 0; ++named) {
    if (source[named] >= rows || (named > 0 && source[named] <= source[named - 1])) break;
  }
  for (int64_t i = named; i < count; ++i) {
    if (source[i] == -1) continue;
    refuse("source: expected ascending numbers of ", rows, " rows and then -1, got ", source[i],
           " at ", i);
  }
  return named;
}

Tensor compact_rows_bwd(const Tensor& dpacked_any, const Tensor& source_any, int64_t rows) {
  check_compact_rows_bwd(dpacked_any, source_any, rows, kCpuDtypes);
  const Tensor dpacked = with_dense_rows(dpacked_any), source = dense(source_any);
  const int32_t* const numbers = source.const_data_ptr<int32_t>();
  const int32_t* const end = numbers + checked_sources(numbers, source.size(0), rows);
  const Tensor ddata = new_output("ddata", dpacked, {rows, dpacked.size(1)}, dpacked.scalar_type());
  const RowBytes from(dpacked), to(ddata);
  run_row_tasks(rows, kCompactRows, [&](int64_t first, int64_t count) {
    const int32_t* next = std::lower_bound(numbers, end, static_cast<int32_t>(first));
    for (int64_t row = first; row < first + count;) {
      // Until the next row that was kept, all have left; then as many as follow each other return.
      const int64_t kept = next < end ? std::min<int64_t>(*next, first + count) : first + count;
      clear_rows(to, row, kept - row);
      row = kept;
      const int64_t place = next - numbers;
      for (; next < end && row < first + count && *next == row; ++next) ++row;
      copy_rows(from, place, to, kept, row - kept);
    }
  });
  return ddata;
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("compact_rows", ADATAPE_KERNEL("compact_rows", &adatape::compact_rows));
  m.impl("compact_rows_bwd", ADATAPE_KERNEL("compact_rows_bwd", &adatape::compact_rows_bwd));
}
