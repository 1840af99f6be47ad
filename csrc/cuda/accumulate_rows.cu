// Rows come home, in CUDA: checks, allocation, launches, registration.

#include <optional>
#include <tuple>
#include <type_traits>

#include "../allocation.h"
#include "kernels/accumulate_rows_kernels.cuh"
#include "launch.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// Calls body.template operator()<T, Row, Aligned>() for the types of a total and of rows, and with
// whether every row of the tensors, the first two among them, is aligned.
template <class Body>
void with_types_of(const Tensor& total, const Tensor& rows, bool aligned, const Body& body) {
  const bool wide = total.scalar_type() != rows.scalar_type();
  with_type_of(rows, [&]<class Row>() {
    with_flags(
        [&]<bool Wide, bool Aligned>() {
          body.template operator()<std::conditional_t<Wide, float, Row>, Row, Aligned>();
        },
        wide, aligned);
  });
}

LaunchConfig by_row(int64_t rows, const LaunchStream& stream) {
  return {.grid = {.x = ceil_div(rows, kAccumulateWarps)},
          .block_threads = kAccumulateThreads,
          .stream = stream};
}

// Writes the sum, which may be the total itself, and has dense rows as it has.
void add_rows(const Tensor& total, const Tensor& rows_any, const Tensor& source_any,
              const Tensor& weights_any, const std::optional<Tensor>& total_weights_any,
              const Tensor& sum, bool in_place) {
  const Tensor rows = with_dense_rows(rows_any), source = dense(source_any);
  const Tensor weights = dense(weights_any);
  std::optional<Tensor> total_weights, row_of;
  if (total_weights_any) total_weights = dense(*total_weights_any);
  const LaunchStream stream = stream_of(total);
  CudaAccumulateRowsParams p{
      .total = total.data_ptr(),
      .stride_total = total.stride(0),
      .rows = rows.data_ptr(),
      .stride_rows = rows.stride(0),
      .source = source.const_data_ptr<int32_t>(),
      .row_of = nullptr,
      .weights = weights.const_data_ptr<float>(),
      .total_weights = total_weights ? total_weights->const_data_ptr<float>() : nullptr,
      .sum = sum.data_ptr(),
      .stride_sum = sum.stride(0),
      .num_total = total.size(0),
      .num_rows = rows.size(0),
      .dim = total.size(1),
      .in_place = in_place,
  };
  if (!in_place) {
    row_of = allocate("row_of", source, {p.num_total});
    torch::stable::fill_(*row_of, -1.0);
    p.row_of = row_of->mutable_data_ptr<int32_t>();
    launch(accumulate_rows_places_kernel,
           {.grid = {.x = ceil_div(p.num_rows, kAccumulateThreads)},
            .block_threads = kAccumulateThreads,
            .stream = stream},
           p);
  }
  const LaunchConfig config = by_row(in_place ? p.num_rows : p.num_total, stream);
  with_types_of(total, rows, rows_aligned({total, rows, sum}),
                [&]<class T, class Row, bool Aligned>() {
                  launch(accumulate_rows_kernel<T, Row, Aligned>, config, p);
                });
}

Tensor accumulate_rows(const Tensor& total_any, const Tensor& rows, const Tensor& source,
                       const Tensor& weights, const std::optional<Tensor>& total_weights) {
  check_accumulate_rows("total", total_any, rows, source, weights, total_weights, kCudaDtypes);
  const Tensor total = with_dense_rows(total_any);
  const Tensor sum = allocate("sum", total, {total.size(0), total.size(1)});
  add_rows(total, rows, source, weights, total_weights, sum, false);
  return sum;
}

void accumulate_rows_in_place(Tensor total, const Tensor& rows, const Tensor& source,
                              const Tensor& weights, const std::optional<Tensor>& total_weights) {
  check_accumulate_rows("total", total, rows, source, weights, total_weights, kCudaDtypes);
  check_own_places(total);
  const Tensor held = with_dense_rows(total);
  add_rows(held, rows, source, weights, total_weights, held, true);
  if (held.data_ptr() != total.data_ptr()) torch::stable::copy_(total, held);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> accumulate_rows_bwd(
    const Tensor& dsum_any, const std::optional<Tensor>& total_any, const Tensor& rows_any,
    const Tensor& source_any, const Tensor& weights_any,
    const std::optional<Tensor>& total_weights_any) {
  check_accumulate_rows_bwd(dsum_any, total_any, rows_any, source_any, weights_any,
                            total_weights_any, kCudaDtypes);
  const Tensor dsum = with_dense_rows(dsum_any), rows = with_dense_rows(rows_any);
  const Tensor source = dense(source_any), weights = dense(weights_any);
  const bool weighted = total_weights_any.has_value();
  const int64_t num_total = dsum.size(0), num_rows = rows.size(0), dim = rows.size(1);
  Tensor dtotal = allocate("dtotal", dsum, {weighted ? num_total : 0, dim});
  const Tensor drows = allocate("drows", rows, {num_rows, dim});
  const Tensor dweights = allocate("dweights", weights, {num_rows});
  const Tensor dtotal_weights = allocate("dtotal_weights", weights, {weighted ? num_rows : 0});
  const LaunchStream stream = stream_of(dsum);
  CudaAccumulateRowsBwdParams p{
      .dsum = dsum.data_ptr(),
      .stride_dsum = dsum.stride(0),
      .rows = rows.data_ptr(),
      .stride_rows = rows.stride(0),
      .source = source.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr<float>(),
      .drows = drows.data_ptr(),
      .dweights = dweights.mutable_data_ptr<float>(),
      .num_total = num_total,
      .num_rows = num_rows,
      .dim = dim,
  };
  bool aligned = rows_aligned({dsum, rows, drows});
  std::optional<Tensor> total, total_weights;
  if (weighted) {
    total = with_dense_rows(*total_any);
    total_weights = dense(*total_weights_any);
    torch::stable::copy_(dtotal, dsum);
    aligned = aligned && rows_aligned({*total, dtotal});
    p.total = total->data_ptr();
    p.stride_total = total->stride(0);
    p.total_weights = total_weights->const_data_ptr<float>();
    p.dtotal = dtotal.data_ptr();
    p.dtotal_weights = dtotal_weights.mutable_data_ptr<float>();
  }
  const LaunchConfig config = by_row(num_rows, stream);
  with_types_of(dsum, rows, aligned, [&]<class T, class Row, bool Aligned>() {
    launch(accumulate_rows_bwd_kernel<T, Row, Aligned>, config, p);
  });
  return {dtotal, drows, dweights, dtotal_weights};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("accumulate_rows", ADATAPE_KERNEL("accumulate_rows", &adatape::cuda::accumulate_rows));
  m.impl("accumulate_rows_",
         ADATAPE_KERNEL("accumulate_rows_", &adatape::cuda::accumulate_rows_in_place));
  m.impl("accumulate_rows_bwd",
         ADATAPE_KERNEL("accumulate_rows_bwd", &adatape::cuda::accumulate_rows_bwd));
}
