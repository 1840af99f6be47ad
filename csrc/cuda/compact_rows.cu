// Rows leave, in CUDA: checks, allocation, launches, registration.

#include <algorithm>
#include <optional>
#include <tuple>

#include "../allocation.h"
#include "kernels/compact_rows_kernels.cuh"
#include "launch.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

int64_t bytes_per_row(const Tensor& x, int64_t elements) {
  return elements * static_cast<int64_t>(x.element_size());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_rows(const Tensor& data_any,
                                                        const Tensor& keep_any,
                                                        const Tensor& cu_inputs_any,
                                                        const Tensor& cu_tapes_any,
                                                        std::optional<int64_t> capacity) {
  check_compact_rows(data_any, keep_any, cu_inputs_any, cu_tapes_any, capacity, kCudaDtypes);
  const Tensor data = with_dense_rows(data_any), keep = dense(keep_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const LaunchStream stream = stream_of(data);
  const int64_t num_rows = data.size(0), num_offsets = cu_inputs.size(0);
  const Tensor before = allocate("before", cu_inputs, {num_rows + 1});
  const Tensor order = allocate("order", cu_inputs, {num_rows});
  const Tensor kept_inputs = allocate("kept_inputs", cu_inputs, {num_offsets});
  const Tensor kept_tapes = allocate("kept_tapes", cu_tapes, {num_offsets});
  CudaCompactRowsParams p{
      .data = static_cast<const char*>(data.data_ptr()),
      .stride_data = bytes_per_row(data, data.stride(0)),
      .keep = static_cast<const uint8_t*>(keep.data_ptr()),
      .cu_inputs = cu_inputs.const_data_ptr<int32_t>(),
      .cu_tapes = cu_tapes.const_data_ptr<int32_t>(),
      .num_offsets = num_offsets,
      .num_rows = num_rows,
      .width = bytes_per_row(data, data.size(1)),
      .chunk =
          kCompactChunk * std::max<int64_t>(ceil_div(num_rows, kCompactChunk * kCompactChunks), 1),
      .before = before.mutable_data_ptr<int32_t>(),
      .order = order.mutable_data_ptr<int32_t>(),
      .kept_inputs = kept_inputs.mutable_data_ptr<int32_t>(),
      .kept_tapes = kept_tapes.mutable_data_ptr<int32_t>(),
  };
  launch(compact_rows_prefix_kernel,
         {.grid = {.x = std::max<int64_t>(ceil_div(num_rows, p.chunk), 1)},
          .block_threads = kCompactThreads,
          .static_bytes = kCompactStaticBytes,
          .stream = stream},
         p);
  int32_t kept = 0;
  if (!capacity) copy_to_host(&kept, p.before + num_rows, sizeof kept, stream);
  // A kernel that failed leaves any number here, which no size may follow beyond the rows.
  p.num_packed = capacity ? *capacity : std::clamp<int64_t>(kept, 0, num_rows);
  const Tensor packed = allocate("packed", data, {p.num_packed, data.size(1)});
  const Tensor source = allocate("source", cu_inputs, {p.num_packed});
  p.packed = static_cast<char*>(packed.data_ptr());
  p.source = source.mutable_data_ptr<int32_t>();
  const LaunchConfig config{.grid = {.x = std::max(ceil_div(p.num_packed, kCompactWarps),
                                                   ceil_div(num_offsets, kCompactThreads))},
                            .block_threads = kCompactThreads,
                            .stream = stream};
  with_unit_of({data, packed},
               [&]<class Unit>() { launch(compact_rows_copy_kernel<Unit>, config, p); });
  return {packed, kept_inputs, kept_tapes, source};
}

Tensor compact_rows_bwd(const Tensor& dpacked_any, const Tensor& source_any, int64_t rows) {
  check_compact_rows_bwd(dpacked_any, source_any, rows, kCudaDtypes);
  const Tensor dpacked = with_dense_rows(dpacked_any), source = dense(source_any);
  const Tensor ddata = allocate("ddata", dpacked, {rows, dpacked.size(1)});
  const LaunchStream stream = stream_of(dpacked);
  const CudaCompactRowsBwdParams p{
      .dpacked = static_cast<const char*>(dpacked.data_ptr()),
      .stride_dpacked = bytes_per_row(dpacked, dpacked.stride(0)),
      .source = source.const_data_ptr<int32_t>(),
      .num_packed = source.size(0),
      .ddata = static_cast<char*>(ddata.data_ptr()),
      .num_rows = rows,
      .width = bytes_per_row(dpacked, dpacked.size(1)),
  };
  const LaunchConfig config{.grid = {.x = ceil_div(rows, kCompactWarps)},
                            .block_threads = kCompactThreads,
                            .stream = stream};
  with_unit_of({dpacked, ddata},
               [&]<class Unit>() { launch(compact_rows_bwd_kernel<Unit>, config, p); });
  return ddata;
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("compact_rows", ADATAPE_KERNEL("compact_rows", &adatape::cuda::compact_rows));
  m.impl("compact_rows_bwd", ADATAPE_KERNEL("compact_rows_bwd", &adatape::cuda::compact_rows_bwd));
}
