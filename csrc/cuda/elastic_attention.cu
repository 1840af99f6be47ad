// Attention over each example's input and tape rows, in CUDA: checks, allocation, launches,
// registration.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "../allocation.h"
#include "kernels/elastic_attention_bwd.cuh"
#include "kernels/elastic_attention_fwd.cuh"
#include "launch.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// The longest example that is served, and the fewest warps of a block that its length leaves room
// for.
constexpr int64_t kMaxRows = 512;
constexpr int kFewestWarps = 2;

// Returns the longest example that shared memory holds, in the forward and in the backward.
int64_t most_rows(int64_t shared_bytes) {
  int rows = kMaxRows;
  while (rows > 0 && backward_shared_bytes(rows, kFewestWarps) > shared_bytes) rows -= kStep;
  return rows;
}

// Returns `x` itself where all its rows can be read in accesses of 16 bytes, else a copy.
Tensor in_accesses(const Tensor& x) {
  if (x.stride(2) == 1 && rows_aligned({x})) return x;
  Tensor copy = allocate("a copy with dense rows", x, {x.size(0), x.size(1), x.size(2)});
  torch::stable::copy_(copy, x);
  return copy;
}

constexpr ScalarType kHalves[] = {ScalarType::Half, ScalarType::BFloat16};

// Refuses what the kernels do not serve.
void check_served(const Tensor& q, std::optional<int64_t> max_rows) {
  if (q.size(2) != kHeadDim) refuse("q: expected head_dim ", kHeadDim, ", got ", q.size(2));
  const int64_t most = most_rows(most_shared_bytes(q));
  if (!max_rows || *max_rows < 0 || *max_rows > most) {
    refuse("max_rows: expected 0 to ", most, ", got ",
           max_rows ? std::to_string(*max_rows) : "None");
  }
}

CudaHeadRows head_rows(const Tensor& x) {
  return {.data = x.data_ptr(), .stride_row = x.stride(0), .stride_head = x.stride(1)};
}

// Returns how many rows of an example shared memory has to hold, in whole steps.
int capacity_of(const Tensor& q, int64_t max_rows) {
  return static_cast<int>(ceil_div(std::min(max_rows, q.size(0)), kStep) * kStep);
}

float scale_of(std::optional<double> softmax_scale) {
  return static_cast<float>(softmax_scale ? *softmax_scale : 1.0 / std::sqrt(double{kHeadDim}));
}

// Returns a block for each head of each example, or one block if there are none but rows to clear.
Grid attention_grid(const CudaElasticAttentionParams& p) {
  const bool empty = p.rows == 0 || p.num_heads == 0;
  return {.x = empty ? 0 : std::max<int64_t>(1, int64_t{p.batch} * p.num_heads)};
}

// Returns the warps of a block: as many as have a tile of rows and as shared memory has room for,
// up to a number that depends on whether the block shares its multiprocessor with others or has it
// to itself. `bytes` are those of shared memory that a block of this capacity takes with so many
// warps.
int num_warps(const CudaElasticAttentionParams& p, int64_t (*bytes)(int, int),
              int64_t shared_bytes) {
  constexpr int kSharing = 4, kAlone = 8, kMostRowsSharing = 256;
  const int tiles = static_cast<int>(ceil_div(p.capacity, kTileRows));
  int warps = std::clamp(tiles, 1, p.capacity > kMostRowsSharing ? kAlone : kSharing);
  while (warps > 1 && bytes(p.capacity, warps) > shared_bytes) --warps;
  return warps;
}

struct CudaAttentionOutputs {
  Tensor out;  // (rows, num_heads, head_dim)
  Tensor lse;  // (num_heads, rows)
};

CudaAttentionOutputs allocate_attention(const Tensor& q) {
  return {.out = allocate("out", q, {q.size(0), q.size(1), q.size(2)}),
          .lse = allocate("lse", q, {q.size(1), q.size(0)}, ScalarType::Float)};
}

// Attends, with arguments that were checked, whatever the strides of q, k and v.
std::tuple<Tensor, Tensor> attend(const HeadTensors& any, const Tensor& cu_inputs_any,
                                  const Tensor& cu_tapes_any, std::optional<int64_t> max_rows,
                                  std::optional<double> softmax_scale) {
  check_served(any.q, max_rows);
  const Tensor q = in_accesses(any.q), k = in_accesses(any.k), v = in_accesses(any.v);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const CudaAttentionOutputs outputs = allocate_attention(q);

  const CudaElasticAttentionParams p{
      .q = head_rows(q),
      .k = head_rows(k),
      .v = head_rows(v),
      .out = head_rows(outputs.out),
      .dout = {},
      .dq = {},
      .dk = {},
      .dv = {},
      .lse = outputs.lse.mutable_data_ptr<float>(),
      .cu_inputs = cu_inputs.const_data_ptr<int32_t>(),
      .cu_tapes = cu_tapes.const_data_ptr<int32_t>(),
      .rows = q.size(0),
      .batch = static_cast<int>(cu_inputs.size(0) - 1),
      .num_heads = static_cast<int>(q.size(1)),
      .capacity = capacity_of(q, *max_rows),
      .softmax_scale = scale_of(softmax_scale),
  };
  const int warps = num_warps(p, forward_shared_bytes, most_shared_bytes(q));
  const auto kernel = q.scalar_type() == ScalarType::Half
                          ? elastic_attention_fwd_kernel<__half>
                          : elastic_attention_fwd_kernel<__nv_bfloat16>;
  const LaunchStream stream = stream_of(q);
  launch(kernel,
         {.grid = attention_grid(p),
          .block_threads = warps * kWarpSize,
          .shared_bytes = forward_shared_bytes(p.capacity, warps),
          .stream = stream},
         p);
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor> elastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_inputs, const Tensor& cu_tapes,
                                             std::optional<int64_t> max_rows,
                                             std::optional<double> softmax_scale) {
  check_elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale, kHalves);
  return attend({.q = q, .k = k, .v = v}, cu_inputs, cu_tapes, max_rows, softmax_scale);
}

std::tuple<Tensor, Tensor> elastic_attention_qkvpacked(const Tensor& qkv, const Tensor& cu_inputs,
                                                       const Tensor& cu_tapes,
                                                       std::optional<int64_t> max_rows,
                                                       std::optional<double> softmax_scale) {
  check_elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale, kHalves);
  return attend(parts_of(qkv), cu_inputs, cu_tapes, max_rows, softmax_scale);
}

// Writes all rows of the gradients, with arguments that were checked, whatever the strides of the
// tensors that are read. The gradients' rows can be written in accesses of 16 bytes.
void write_gradients(const HeadTensors& to, const Tensor& dout_any, const HeadTensors& any,
                     const Tensor& out_any, const Tensor& lse_any, const Tensor& cu_inputs_any,
                     const Tensor& cu_tapes_any, std::optional<int64_t> max_rows,
                     std::optional<double> softmax_scale) {
  const Tensor q = in_accesses(any.q), k = in_accesses(any.k), v = in_accesses(any.v);
  const Tensor dout = in_accesses(dout_any), out = in_accesses(out_any), lse = dense(lse_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);

  const CudaElasticAttentionParams p{
      .q = head_rows(q),
      .k = head_rows(k),
      .v = head_rows(v),
      .out = head_rows(out),
      .dout = head_rows(dout),
      .dq = head_rows(to.q),
      .dk = head_rows(to.k),
      .dv = head_rows(to.v),
      .lse = static_cast<float*>(lse.data_ptr()),
      .cu_inputs = cu_inputs.const_data_ptr<int32_t>(),
      .cu_tapes = cu_tapes.const_data_ptr<int32_t>(),
      .rows = q.size(0),
      .batch = static_cast<int>(cu_inputs.size(0) - 1),
      .num_heads = static_cast<int>(q.size(1)),
      .capacity = capacity_of(q, *max_rows),
      .softmax_scale = scale_of(softmax_scale),
  };
  const LaunchStream stream = stream_of(q);
  const int warps = num_warps(p, backward_shared_bytes, most_shared_bytes(q));
  const auto kernel = q.scalar_type() == ScalarType::Half
                          ? elastic_attention_bwd_kernel<__half>
                          : elastic_attention_bwd_kernel<__nv_bfloat16>;
  launch(kernel,
         {.grid = attention_grid(p),
          .block_threads = warps * kWarpSize,
          .shared_bytes = backward_shared_bytes(p.capacity, warps),
          .stream = stream},
         p);
}

std::tuple<Tensor, Tensor, Tensor> elastic_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_inputs, const Tensor& cu_tapes,
    std::optional<int64_t> max_rows, std::optional<double> softmax_scale) {
  check_elastic_attention_bwd(dout, q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, softmax_scale,
                              kHalves);
  check_served(q, max_rows);
  const auto like_q = [&q](const char* name) {
    return allocate(name, q, {q.size(0), q.size(1), q.size(2)});
  };
  const HeadTensors gradients{.q = like_q("dq"), .k = like_q("dk"), .v = like_q("dv")};
  write_gradients(gradients, dout, {.q = q, .k = k, .v = v}, out, lse, cu_inputs, cu_tapes,
                  max_rows, softmax_scale);
  return {gradients.q, gradients.k, gradients.v};
}

Tensor elastic_attention_qkvpacked_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                                       const Tensor& lse, const Tensor& cu_inputs,
                                       const Tensor& cu_tapes, std::optional<int64_t> max_rows,
                                       std::optional<double> softmax_scale) {
  check_elastic_attention_qkvpacked_bwd(dout, qkv, out, lse, cu_inputs, cu_tapes, max_rows,
                                        softmax_scale, kHalves);
  const HeadTensors given = parts_of(qkv);
  check_served(given.q, max_rows);
  const Tensor dqkv = allocate("dqkv", qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  write_gradients(parts_of(dqkv), dout, given, out, lse, cu_inputs, cu_tapes, max_rows,
                  softmax_scale);
  return dqkv;
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("elastic_attention",
         ADATAPE_KERNEL("elastic_attention", &adatape::cuda::elastic_attention));
  m.impl("elastic_attention_bwd",
         ADATAPE_KERNEL("elastic_attention_bwd", &adatape::cuda::elastic_attention_bwd));
  m.impl(
      "elastic_attention_qkvpacked",
      ADATAPE_KERNEL("elastic_attention_qkvpacked", &adatape::cuda::elastic_attention_qkvpacked));
  m.impl("elastic_attention_qkvpacked_bwd",
         ADATAPE_KERNEL("elastic_attention_qkvpacked_bwd",
                        &adatape::cuda::elastic_attention_qkvpacked_bwd));
}
