// Rows come home, on the CPU: checks, allocation, tasks, registration.

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"

namespace adatape {
namespace {

// Returns for each row of the total the row that is added to it, or -1; refuses a source that names
// a row that is not there, or one of them twice.
std::vector<int32_t> checked_rows_of(const Tensor& source, int64_t num_total) {
  std::vector<int32_t> row_of = allocate_vector<int32_t>("the row of each place", num_total, -1);
  const int32_t* const places = source.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < source.size(0); ++r) {
    const int32_t place = places[r];
    if (place == -1) continue;
    if (place < 0 || place >= num_total) {
      refuse("source: expected -1 to ", num_total - 1, " (a row of total), got ", place);
    }
    int32_t& row = row_of[static_cast<size_t>(place)];
    if (row >= 0) refuse("source: expected each row of total once, got ", place, " twice");
    row = static_cast<int32_t>(r);
  }
  return row_of;
}

// Writes the sum, which may be the total itself, and has dense rows as it has.
void add_rows(const Tensor& total, const Tensor& rows_any, const Tensor& weights_any,
              const std::optional<Tensor>& total_weights_any, const std::vector<int32_t>& row_of,
              const Tensor& sum) {
  const Tensor rows = with_dense_rows(rows_any), weights = dense(weights_any);
  std::optional<Tensor> total_weights;
  if (total_weights_any) total_weights = dense(*total_weights_any);
  const CpuAccumulateRowsParams p{
      .total = total.data_ptr(),
      .stride_total = total.stride(0),
      .rows = rows.data_ptr(),
      .stride_rows = rows.stride(0),
      .row_of = row_of.data(),
      .weights = weights.const_data_ptr<float>(),
      .total_weights = total_weights ? total_weights->const_data_ptr<float>() : nullptr,
      .sum = sum.data_ptr(),
      .stride_sum = sum.stride(0),
      .dim = total.size(1),
      .dtype = dtype_of(total),
      .rows_dtype = dtype_of(rows),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(total.size(0), kAccumulateRows,
                [&](int64_t first, int64_t count) { chosen.accumulate_rows_fwd(p, first, count); });
}

Tensor accumulate_rows(const Tensor& total_any, const Tensor& rows, const Tensor& source,
                       const Tensor& weights, const std::optional<Tensor>& total_weights) {
  check_accumulate_rows("total", total_any, rows, source, weights, total_weights, kCpuDtypes);
  const Tensor total = with_dense_rows(total_any);
  const std::vector<int32_t> row_of = checked_rows_of(dense(source), total.size(0));
  const Tensor sum = new_output("sum", total, {total.size(0), total.size(1)}, total.scalar_type());
  add_rows(total, rows, weights, total_weights, row_of, sum);
  return sum;
}

void accumulate_rows_in_place(Tensor total, const Tensor& rows, const Tensor& source,
                              const Tensor& weights, const std::optional<Tensor>& total_weights) {
  check_accumulate_rows("total", total, rows, source, weights, total_weights, kCpuDtypes);
  check_own_places(total);
  const std::vector<int32_t> row_of = checked_rows_of(dense(source), total.size(0));
  const Tensor held = with_dense_rows(total);
  add_rows(held, rows, weights, total_weights, row_of, held);
  if (held.data_ptr() != total.data_ptr()) torch::stable::copy_(total, held);
}

struct CpuAccumulateRowsGradients {
  Tensor dtotal;          // (num_total, dim), or (0, dim) without total_weights
  Tensor drows;           // (rows, dim)
  Tensor dweights;        // (rows,)
  Tensor dtotal_weights;  // (rows,), or (0,) without total_weights
};

CpuAccumulateRowsGradients allocate_gradients(const Tensor& dsum, const Tensor& rows,
                                              const Tensor& weights, bool weighted) {
  const int64_t count = rows.size(0), dim = rows.size(1);
  return {
      .dtotal = new_output("dtotal", dsum, {weighted ? dsum.size(0) : 0, dim}, dsum.scalar_type()),
      .drows = new_output("drows", rows, {count, dim}, rows.scalar_type()),
      .dweights = new_output("dweights", weights, {count}, ScalarType::Float),
      .dtotal_weights =
          new_output("dtotal_weights", weights, {weighted ? count : 0}, ScalarType::Float)};
}

// Rows that are added to none get zeros.
void clear_unused(const Tensor& source, const CpuAccumulateRowsGradients& gradients) {
  const int32_t* const places = source.const_data_ptr<int32_t>();
  const size_t bytes = static_cast<size_t>(gradients.drows.size(1)) *
                       static_cast<size_t>(gradients.drows.element_size());
  std::byte* const drows = static_cast<std::byte*>(gradients.drows.data_ptr());
  float* const dweights = gradients.dweights.mutable_data_ptr<float>();
  const bool weighted = gradients.dtotal_weights.size(0) > 0;
  float* const dtotal_weights =
      weighted ? gradients.dtotal_weights.mutable_data_ptr<float>() : nullptr;
  run_row_tasks(source.size(0), kAccumulateRows, [&](int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r) {
      if (places[r] >= 0) continue;
      if (bytes > 0) std::memset(drows + static_cast<size_t>(r) * bytes, 0, bytes);
      dweights[r] = 0.0f;
      if (dtotal_weights) dtotal_weights[r] = 0.0f;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> accumulate_rows_bwd(
    const Tensor& dsum_any, const std::optional<Tensor>& total_any, const Tensor& rows_any,
    const Tensor& source_any, const Tensor& weights_any,
    const std::optional<Tensor>& total_weights_any) {
  check_accumulate_rows_bwd(dsum_any, total_any, rows_any, source_any, weights_any,
                            total_weights_any, kCpuDtypes);
  const Tensor dsum = with_dense_rows(dsum_any), rows = with_dense_rows(rows_any);
  const Tensor source = dense(source_any), weights = dense(weights_any);
  const bool weighted = total_weights_any.has_value();
  std::optional<Tensor> total, total_weights;
  if (weighted) {
    total = with_dense_rows(*total_any);
    total_weights = dense(*total_weights_any);
  }
  const std::vector<int32_t> row_of = checked_rows_of(source, dsum.size(0));
  const CpuAccumulateRowsGradients gradients = allocate_gradients(dsum, rows, weights, weighted);
  const CpuAccumulateRowsBwdParams p{
      .dsum = dsum.data_ptr(),
      .stride_dsum = dsum.stride(0),
      .total = weighted ? total->data_ptr() : nullptr,
      .stride_total = weighted ? total->stride(0) : 0,
      .rows = rows.data_ptr(),
      .stride_rows = rows.stride(0),
      .row_of = row_of.data(),
      .weights = weights.const_data_ptr<float>(),
      .total_weights = weighted ? total_weights->const_data_ptr<float>() : nullptr,
      .dtotal = weighted ? gradients.dtotal.data_ptr() : nullptr,
      .drows = gradients.drows.data_ptr(),
      .dweights = gradients.dweights.mutable_data_ptr<float>(),
      .dtotal_weights = weighted ? gradients.dtotal_weights.mutable_data_ptr<float>() : nullptr,
      .dim = rows.size(1),
      .dtype = dtype_of(dsum),
      .rows_dtype = dtype_of(rows),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(dsum.size(0), kAccumulateRows,
                [&](int64_t first, int64_t count) { chosen.accumulate_rows_bwd(p, first, count); });
  clear_unused(source, gradients);
  return {gradients.dtotal, gradients.drows, gradients.dweights, gradients.dtotal_weights};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("accumulate_rows", ADATAPE_KERNEL("accumulate_rows", &adatape::accumulate_rows));
  m.impl("accumulate_rows_",
         ADATAPE_KERNEL("accumulate_rows_", &adatape::accumulate_rows_in_place));
  m.impl("accumulate_rows_bwd",
         ADATAPE_KERNEL("accumulate_rows_bwd", &adatape::accumulate_rows_bwd));
}
