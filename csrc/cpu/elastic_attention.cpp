// Attention over each example's input and tape rows, on the CPU: checks, allocation, tasks,
// registration.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"
#include "offset_checks.h"

namespace adatape {
namespace {

// Where the examples' rows lie in the buffer.
struct ExampleOffsets {
  const int32_t* cu_inputs;  // (batch + 1,)
  const int32_t* cu_tapes;   // (batch + 1,)
  int64_t batch;
  int64_t rows;  // of the buffer

  // Returns the rows of example i.
  int64_t len(int64_t i) const {
    return int64_t{cu_inputs[i + 1]} - cu_inputs[i] + cu_tapes[i + 1] - cu_tapes[i];
  }
  // Returns the rows that examples own.
  int64_t used_rows() const { return cu_tapes[batch]; }
};

ExampleOffsets checked_examples(const Tensor& q, const Tensor& cu_inputs, const Tensor& cu_tapes,
                                std::optional<int64_t> max_rows) {
  const ExampleOffsets examples{.cu_inputs = cu_inputs.const_data_ptr<int32_t>(),
                                .cu_tapes = cu_tapes.const_data_ptr<int32_t>(),
                                .batch = cu_inputs.size(0) - 1,
                                .rows = q.size(0)};
  check_offsets("cu_inputs", examples.cu_inputs, examples.batch, 0, examples.rows);
  check_offsets("cu_tapes", examples.cu_tapes, examples.batch, examples.cu_inputs[examples.batch],
                examples.rows);
  for (int64_t i = 0; max_rows && i < examples.batch; ++i) {
    if (examples.len(i) > *max_rows) {
      refuse("max_rows: expected at least ", examples.len(i), " (the rows of example ", i,
             "), got ", *max_rows);
    }
  }
  return examples;
}

CpuHeadRows head_rows(const Tensor& x) {
  return {.data = x.data_ptr(), .stride_row = x.stride(0), .stride_head = x.stride(1)};
}

float scale_of(const Tensor& q, std::optional<double> softmax_scale) {
  const double by_width = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  return static_cast<float>(softmax_scale ? *softmax_scale : by_width);
}

struct CpuAttentionOutputs {
  Tensor out;  // (rows, num_heads, head_dim)
  Tensor lse;  // (num_heads, rows)
};

// The kernels write all rows that examples own; the others become zeros here.
CpuAttentionOutputs allocate_attention(const Tensor& q, const ExampleOffsets& examples) {
  const int64_t used = examples.used_rows();
  const Tensor out = new_output("out", q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor lse = new_output("lse", q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (used < examples.rows) {
    zero_rows_from(out, used);
    zero_rows_from(torch::stable::transpose(lse, 0, 1), used);
  }
  return {.out = out, .lse = lse};
}

// What one call of the forward kernel does: queries from `first` on of one head of one example.
struct AttentionTask {
  int64_t example, head, first;
};

std::tuple<Tensor, Tensor> elastic_attention(const Tensor& q_any, const Tensor& k_any,
                                             const Tensor& v_any, const Tensor& cu_inputs_any,
                                             const Tensor& cu_tapes_any,
                                             std::optional<int64_t> max_rows,
                                             std::optional<double> softmax_scale) {
  check_elastic_attention(q_any, k_any, v_any, cu_inputs_any, cu_tapes_any, max_rows, softmax_scale,
                          kCpuDtypes);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const ExampleOffsets examples = checked_examples(q, cu_inputs, cu_tapes, max_rows);
  const CpuAttentionOutputs outputs = allocate_attention(q, examples);

  const CpuElasticAttentionParams p{
      .q = head_rows(q),
      .k = head_rows(k),
      .v = head_rows(v),
      .out = head_rows(outputs.out),
      .dout = {},
      .dq = {},
      .dk = {},
      .dv = {},
      .lse = outputs.lse.mutable_data_ptr<float>(),
      .cu_inputs = examples.cu_inputs,
      .cu_tapes = examples.cu_tapes,
      .rows = examples.rows,
      .head_dim = q.size(2),
      .softmax_scale = scale_of(q, softmax_scale),
      .dtype = dtype_of(q),
  };
  std::vector<AttentionTask> tasks;
  for (int64_t i = 0; i < examples.batch; ++i) {
    for (int64_t head = 0; head < q.size(1); ++head) {
      for (int64_t first = 0; first < examples.len(i); first += kQueryBlock) {
        tasks.push_back({.example = i, .head = head, .first = first});
      }
    }
  }
  const CpuKernels& chosen = cpu_kernels();
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    chosen.attention_fwd(p, tasks[t].example, tasks[t].head, tasks[t].first);
  });
  return {outputs.out, outputs.lse};
}

// Returns a gradient shaped as q, with zeros in the rows that no example owns.
Tensor allocate_gradient(const char* name, const Tensor& q, const ExampleOffsets& examples) {
  const Tensor gradient = new_output(name, q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  zero_rows_from(gradient, examples.used_rows());
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> elastic_attention_bwd(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, const Tensor& cu_inputs_any,
    const Tensor& cu_tapes_any, std::optional<int64_t> max_rows,
    std::optional<double> softmax_scale) {
  check_elastic_attention_bwd(dout_any, q_any, k_any, v_any, out_any, lse_any, cu_inputs_any,
                              cu_tapes_any, max_rows, softmax_scale, kCpuDtypes);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Tensor dout = with_dense_rows(dout_any), out = with_dense_rows(out_any);
  const Tensor lse = dense(lse_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const ExampleOffsets examples = checked_examples(q, cu_inputs, cu_tapes, max_rows);
  const int64_t num_heads = q.size(1);
  const Tensor dq = allocate_gradient("dq", q, examples);
  const Tensor dk = allocate_gradient("dk", q, examples);
  const Tensor dv = allocate_gradient("dv", q, examples);

  const CpuElasticAttentionParams p{
      .q = head_rows(q),
      .k = head_rows(k),
      .v = head_rows(v),
      .out = head_rows(out),
      .dout = head_rows(dout),
      .dq = head_rows(dq),
      .dk = head_rows(dk),
      .dv = head_rows(dv),
      .lse = static_cast<float*>(lse.data_ptr()),
      .cu_inputs = examples.cu_inputs,
      .cu_tapes = examples.cu_tapes,
      .rows = examples.rows,
      .head_dim = q.size(2),
      .softmax_scale = scale_of(q, softmax_scale),
      .dtype = dtype_of(q),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_tasks(examples.batch * num_heads, [&](int64_t task) {
    const int64_t example = task / num_heads, head = task % num_heads;
    if (examples.len(example) > 0) chosen.attention_bwd(p, example, head);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("elastic_attention", ADATAPE_KERNEL("elastic_attention", &adatape::elastic_attention));
  m.impl("elastic_attention_bwd",
         ADATAPE_KERNEL("elastic_attention_bwd", &adatape::elastic_attention_bwd));
}
