// A linear layer over few rows, for which a library's product has not enough to do.

#include "columns.h"
#include "row_products.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

template <class T>
void linear_of(const CpuLinearParams& p, int64_t first, int64_t count) {
  const auto* const weight = static_cast<const T*>(p.weight);
  const auto* const bias = static_cast<const T*>(p.bias);
  Scratch scratch;
  float* const row = scratch.take(p.depth);
  float* const arranged = scratch.take(arranged_size<T>(p.depth));
  for (int64_t r = first; r < first + count; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.stride_x;
    T* const out = static_cast<T*>(p.out) + r * p.stride_out;
    for_columns(p.depth, [&](int64_t d, int lanes) { write(row + d, read(x + d, lanes), lanes); });
    arrange_query<T>(row, p.depth, arranged);
    for_columns(p.columns, [&](int64_t c, int lanes) {
      const auto weight_row = [&](int64_t i) { return weight + (c + i) * p.stride_weight; };
      const Vec products = row_products<T>(arranged, weight_row, lanes, p.depth);
      write(out + c, products + read(bias + c, lanes), lanes);
    });
  }
}

}  // namespace

void linear(const CpuLinearParams& p, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { linear_of<decltype(number)>(p, first, count); });
}

}  // namespace adatape::ADATAPE_ISA
