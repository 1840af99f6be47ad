// Attention over each example's input and tape rows: checks, allocation, launches, registration.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "kernels/elastic_attention_bwd.cuh"
#include "kernels/elastic_attention_fwd.cuh"
#include "launch.h"

namespace adatape::cuda {
namespace {

constexpr int64_t kMaxRows = 512;  // of an example: what shared memory holds

// Of a block, on the current device.
int64_t most_shared_bytes() {
#if defined(ADATAPE_CUDA_HOST)
  return 227 << 10;
#else
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of a block");
  return bytes;
#endif
}

// `x` itself where the kernels can take it, else a copy.
Tensor in_accesses(const Tensor& x) {
  if (x.stride(2) == 1 && rows_aligned({x})) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  torch::stable::copy_(copy, x);
  return copy;
}

HeadRows head_rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

AttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& lse, const Tensor& cu_inputs, const Tensor& cu_tapes,
                       std::optional<int64_t> max_rows, std::optional<double> scale) {
  const bool half = q.scalar_type() == ScalarType::Half;
  if (q.size(2) != kHeadDim || (!half && q.scalar_type() != ScalarType::BFloat16)) {
    refuse("q: expected float16 or bfloat16 (rows, num_heads, ", kHeadDim, "), got head_dim ",
           q.size(2), " of ", q.element_size(), " bytes an element");
  }
  if (!max_rows || *max_rows < 0 || *max_rows > kMaxRows) {
    refuse("max_rows: expected 0 to ", kMaxRows, ", got ",
           max_rows ? std::to_string(*max_rows) : "None");
  }
  AttentionParams p{};
  p.q = head_rows(q), p.k = head_rows(k), p.v = head_rows(v), p.out = head_rows(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.cu_inputs = cu_inputs.const_data_ptr<int32_t>();
  p.cu_tapes = cu_tapes.const_data_ptr<int32_t>();
  p.rows = q.size(0);
  p.batch = static_cast<int>(cu_inputs.size(0) - 1), p.num_heads = static_cast<int>(q.size(1));
  p.capacity = static_cast<int>(ceil_div(std::min(*max_rows, p.rows), kStep) * kStep);
  p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(double{kHeadDim}));
  return p;
}

// A block for each example and head, or one, for unused rows only.
Grid grid(const AttentionParams& p) {
  const bool empty = p.rows == 0 || p.num_heads == 0;
  return {empty ? 0 : std::max<int64_t>(1, int64_t{p.batch} * p.num_heads)};
}

// As many as have a tile, in blocks that share a multiprocessor or in one that has it to itself.
int num_warps(const AttentionParams& p) {
  constexpr int kSharing = 4, kAlone = 8, kMostRowsSharing = 256;
  const int tiles = static_cast<int>(ceil_div(p.capacity, kTileRows));
  return std::clamp(tiles, 1, p.capacity > kMostRowsSharing ? kAlone : kSharing);
}

std::tuple<Tensor, Tensor> elastic_attention(const Tensor& q_any, const Tensor& k_any,
                                             const Tensor& v_any, const Tensor& cu_inputs_any,
                                             const Tensor& cu_tapes_any,
                                             std::optional<int64_t> max_rows,
                                             std::optional<double> scale) {
  const Tensor q = in_accesses(q_any), k = in_accesses(k_any), v = in_accesses(v_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const Stream stream = stream_of(q);
  const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Tensor lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  const AttentionParams p = params(q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, scale);
  const int warps = num_warps(p);
  const auto kernel = q.scalar_type() == ScalarType::Half
                          ? elastic_attention_fwd_kernel<__half>
                          : elastic_attention_fwd_kernel<__nv_bfloat16>;
  launch(kernel, grid(p), warps * kWarpSize, forward_shared_bytes(p.capacity, warps), stream, p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> elastic_attention_bwd(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, const Tensor& cu_inputs_any,
    const Tensor& cu_tapes_any, std::optional<int64_t> max_rows, std::optional<double> scale) {
  const Tensor q = in_accesses(q_any), k = in_accesses(k_any), v = in_accesses(v_any);
  const Tensor dout = in_accesses(dout_any), out = in_accesses(out_any), lse = dense(lse_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const Stream stream = stream_of(q);
  if (lse.numel() != q.size(0) * q.size(1)) {
    refuse("lse: expected (", q.size(1), ", ", q.size(0), "), got ", lse.numel(), " elements");
  }
  AttentionParams p = params(q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, scale);
  const auto gradient = [&] {
    return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  };
  const Tensor dq = gradient(), dk = gradient(), dv = gradient();
  p.dout = head_rows(dout), p.dq = head_rows(dq), p.dk = head_rows(dk), p.dv = head_rows(dv);
  int warps = num_warps(p);
  const int64_t most = most_shared_bytes();
  while (backward_shared_bytes(p.capacity, warps) > most && warps > 1) --warps;
  const auto kernel = q.scalar_type() == ScalarType::Half
                          ? elastic_attention_bwd_kernel<__half>
                          : elastic_attention_bwd_kernel<__nv_bfloat16>;
  launch(kernel, grid(p), warps * kWarpSize, backward_shared_bytes(p.capacity, warps), stream, p);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cuda, m) {
  m.def(
      "elastic_attention(Tensor q, Tensor k, Tensor v, Tensor cu_inputs, Tensor cu_tapes, "
      "int? max_rows, float? softmax_scale) -> (Tensor out, Tensor lse)");
  m.def(
      "elastic_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_inputs, Tensor cu_tapes, int? max_rows, float? softmax_scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("elastic_attention", TORCH_BOX(&adatape::cuda::elastic_attention));
  m.impl("elastic_attention_bwd", TORCH_BOX(&adatape::cuda::elastic_attention_bwd));
}
