// Rows come home: the formulas stand in adatape_kernels/reference.py.

#include "../cpu_kernels.h"
#include "columns.h"

namespace adatape::ADATAPE_ISA {
namespace {

// A row without its factor is copied as it is.
template <class T>
void copy_row(const T* from, T* to, int64_t dim) {
  if (from != to && dim > 0) std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
}

template <class T, class Row>
void forward(const CpuAccumulateRowsParams& p, int64_t first, int64_t count) {
  for (int64_t place = first; place < first + count; ++place) {
    const T* const total = static_cast<const T*>(p.total) + place * p.stride_total;
    T* const sum = static_cast<T*>(p.sum) + place * p.stride_sum;
    const int64_t r = p.row_of[place];
    if (r < 0) {
      copy_row(total, sum, p.dim);
      continue;
    }
    const Row* const row = static_cast<const Row*>(p.rows) + r * p.stride_rows;
    const float weight = p.weights[r];
    if (p.total_weights) {
      const float total_weight = p.total_weights[r];
      for_columns(p.dim, [&](int64_t c, int lanes) {
        write(sum + c, total_weight * read(total + c, lanes) + weight * read(row + c, lanes),
              lanes);
      });
    } else {
      for_columns(p.dim, [&](int64_t c, int lanes) {
        write(sum + c, read(total + c, lanes) + weight * read(row + c, lanes), lanes);
      });
    }
  }
}

template <bool wide, class T, class Row>
void backward(const CpuAccumulateRowsBwdParams& p, int64_t first, int64_t count) {
  for (int64_t place = first; place < first + count; ++place) {
    const T* const dsum = static_cast<const T*>(p.dsum) + place * p.stride_dsum;
    T* const dtotal = p.dtotal ? static_cast<T*>(p.dtotal) + place * p.dim : nullptr;
    const int64_t r = p.row_of[place];
    if (r < 0) {
      if (dtotal) copy_row(dsum, dtotal, p.dim);
      continue;
    }
    const Row* const row = static_cast<const Row*>(p.rows) + r * p.stride_rows;
    Row* const drow = static_cast<Row*>(p.drows) + r * p.dim;
    const float weight = p.weights[r];
    Vec dot = {};
    int64_t begin = 0;
    do {
      const int64_t end = end_of_piece<wide>(begin, p.dim);
      Vec products[kChains] = {};
      for_columns_in_chains(begin, end, [&](int64_t c, int lanes, int chain) {
        const Vec given = read(dsum + c, lanes);
        products[chain] += given * read(row + c, lanes);
        write(drow + c, weight * given, lanes);
      });
      add_piece<wide>(dot, products);
      begin = end;
    } while (wide && begin < p.dim);
    p.dweights[r] = sum(dot);
    // Not by dtotal, which is null where a row has no features.
    if (!p.total_weights) continue;
    const T* const total = static_cast<const T*>(p.total) + place * p.stride_total;
    const float total_weight = p.total_weights[r];
    Vec total_dot = {};
    begin = 0;
    do {
      const int64_t end = end_of_piece<wide>(begin, p.dim);
      Vec products[kChains] = {};
      for_columns_in_chains(begin, end, [&](int64_t c, int lanes, int chain) {
        const Vec given = read(dsum + c, lanes);
        products[chain] += given * read(total + c, lanes);
        write(dtotal + c, total_weight * given, lanes);
      });
      add_piece<wide>(total_dot, products);
      begin = end;
    } while (wide && begin < p.dim);
    p.dtotal_weights[r] = sum(total_dot);
  }
}

}  // namespace

void accumulate_rows_fwd(const CpuAccumulateRowsParams& p, int64_t first, int64_t count) {
  with_wide_and_narrow(p.dtype, p.rows_dtype, [&](auto total, auto row) {
    forward<decltype(total), decltype(row)>(p, first, count);
  });
}

void accumulate_rows_bwd(const CpuAccumulateRowsBwdParams& p, int64_t first, int64_t count) {
  with_wide_and_narrow(p.dtype, p.rows_dtype, [&](auto total, auto row) {
    with_wide(p.dim,
              [&](auto wide) { backward<wide, decltype(total), decltype(row)>(p, first, count); });
  });
}

}  // namespace adatape::ADATAPE_ISA
