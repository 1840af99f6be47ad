// Attention over each example's input and tape rows, on the CPU: checks, allocation, tasks,
// registration.

#include <algorithm>
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

// Runs the tasks. Each kernel is told of a task so many ahead as there are threads, which is about
// the next one of its own thread.
template <class Kernel>
void run_attention(const CpuElasticAttentionParams& p, const std::vector<AttentionTask>& tasks,
                   const Kernel& kernel) {
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t threads = torch::stable::get_num_threads();
  run_tasks(count, [&](int64_t t) {
    kernel(p, tasks[t], t + threads < count ? &tasks[t + threads] : nullptr);
  });
}

// Attends, with arguments that were checked, whatever the strides of q, k and v.
std::tuple<Tensor, Tensor> attend(const HeadTensors& any, const Tensor& cu_inputs_any,
                                  const Tensor& cu_tapes_any, std::optional<int64_t> max_rows,
                                  std::optional<double> softmax_scale) {
  const Tensor q = with_dense_rows(any.q), k = with_dense_rows(any.k), v = with_dense_rows(any.v);
  const Tensor cu_inputs = dense_offsets(cu_inputs_any), cu_tapes = dense_offsets(cu_tapes_any);
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
  run_attention(p, tasks, cpu_kernels().attention_fwd);
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor> elastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_inputs, const Tensor& cu_tapes,
                                             std::optional<int64_t> max_rows,
                                             std::optional<double> softmax_scale) {
  check_elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale, kCpuDtypes);
  return attend({.q = q, .k = k, .v = v}, cu_inputs, cu_tapes, max_rows, softmax_scale);
}

// Returns the offsets of tapes that have no rows, which lie behind the last input row.
Tensor tapes_without_rows(const Tensor& cu_inputs) {
  if (!cu_inputs.defined() || !cu_inputs.is_cpu() || cu_inputs.dim() != 1 ||
      cu_inputs.size(0) == 0 || cu_inputs.scalar_type() != ScalarType::Int) {
    refuse("cu_inputs: expected int32 (batch + 1,) on a CPU, got another tensor");
  }
  const int64_t count = cu_inputs.size(0);
  const Tensor tapes = allocate_on_cpu("cu_tapes", cu_inputs, {count}, ScalarType::Int);
  const auto* const offsets = static_cast<const int32_t*>(cu_inputs.data_ptr());
  const int32_t last = offsets[(count - 1) * cu_inputs.stride(0)];
  std::fill_n(static_cast<int32_t*>(tapes.data_ptr()), count, last);
  return tapes;
}

// Does what elastic_attention does, also without offsets of tapes, where no example has one.
std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_inputs,
                                            const std::optional<Tensor>& cu_tapes,
                                            std::optional<int64_t> max_rows,
                                            std::optional<double> softmax_scale) {
  const Tensor tapes = cu_tapes ? *cu_tapes : tapes_without_rows(cu_inputs);
  return elastic_attention(q, k, v, cu_inputs, tapes, max_rows, softmax_scale);
}

std::tuple<Tensor, Tensor> elastic_attention_qkvpacked(const Tensor& qkv, const Tensor& cu_inputs,
                                                       const Tensor& cu_tapes,
                                                       std::optional<int64_t> max_rows,
                                                       std::optional<double> softmax_scale) {
  check_elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale, kCpuDtypes);
  return attend(parts_of(qkv), cu_inputs, cu_tapes, max_rows, softmax_scale);
}

std::tuple<Tensor, Tensor> varlen_attention_qkvpacked(const Tensor& qkv, const Tensor& cu_inputs,
                                                      const std::optional<Tensor>& cu_tapes,
                                                      std::optional<int64_t> max_rows,
                                                      std::optional<double> softmax_scale) {
  const Tensor tapes = cu_tapes ? *cu_tapes : tapes_without_rows(cu_inputs);
  return elastic_attention_qkvpacked(qkv, cu_inputs, tapes, max_rows, softmax_scale);
}

// Writes all rows of the gradients, with arguments that were checked, whatever the strides of the
// tensors that are read. The elements of a gradient's head are contiguous.
void write_gradients(const HeadTensors& to, const Tensor& dout_any, const HeadTensors& any,
                     const Tensor& out_any, const Tensor& lse_any, const Tensor& cu_inputs_any,
                     const Tensor& cu_tapes_any, std::optional<int64_t> max_rows,
                     std::optional<double> softmax_scale) {
  const Tensor q = with_dense_rows(any.q), k = with_dense_rows(any.k), v = with_dense_rows(any.v);
  const Tensor dout = with_dense_rows(dout_any), out = with_dense_rows(out_any);
  const Tensor lse = dense(lse_any);
  const Tensor cu_inputs = dense(cu_inputs_any), cu_tapes = dense(cu_tapes_any);
  const ExampleOffsets examples = checked_examples(q, cu_inputs, cu_tapes, max_rows);
  const int64_t num_heads = q.size(1);
  for (const Tensor& gradient : {to.q, to.k, to.v}) {
    zero_rows_from(gradient, examples.used_rows());
  }

  const CpuElasticAttentionParams p{
      .q = head_rows(q),
      .k = head_rows(k),
      .v = head_rows(v),
      .out = head_rows(out),
      .dout = head_rows(dout),
      .dq = head_rows(to.q),
      .dk = head_rows(to.k),
      .dv = head_rows(to.v),
      .lse = static_cast<float*>(lse.data_ptr()),
      .cu_inputs = examples.cu_inputs,
      .cu_tapes = examples.cu_tapes,
      .rows = examples.rows,
      .head_dim = q.size(2),
      .softmax_scale = scale_of(q, softmax_scale),
      .dtype = dtype_of(q),
  };
  std::vector<AttentionTask> tasks;
  for (int64_t i = 0; i < examples.batch; ++i) {
    for (int64_t head = 0; head < num_heads && examples.len(i) > 0; ++head) {
      tasks.push_back({.example = i, .head = head, .first = 0});
    }
  }
  run_attention(p, tasks, cpu_kernels().attention_bwd);
}

std::tuple<Tensor, Tensor, Tensor> elastic_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_inputs, const Tensor& cu_tapes,
    std::optional<int64_t> max_rows, std::optional<double> softmax_scale) {
  check_elastic_attention_bwd(dout, q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, softmax_scale,
                              kCpuDtypes);
  const auto like_q = [&q](const char* name) {
    return new_output(name, q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
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
                                        softmax_scale, kCpuDtypes);
  const Tensor dqkv =
      new_output("dqkv", qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)}, qkv.scalar_type());
  write_gradients(parts_of(dqkv), dout, parts_of(qkv), out, lse, cu_inputs, cu_tapes, max_rows,
                  softmax_scale);
  return dqkv;
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("elastic_attention", ADATAPE_KERNEL("elastic_attention", &adatape::elastic_attention));
  m.impl("elastic_attention_bwd",
         ADATAPE_KERNEL("elastic_attention_bwd", &adatape::elastic_attention_bwd));
  m.impl("elastic_attention_qkvpacked",
         ADATAPE_KERNEL("elastic_attention_qkvpacked", &adatape::elastic_attention_qkvpacked));
  m.impl("varlen_attention", ADATAPE_KERNEL("varlen_attention", &adatape::varlen_attention));
  m.impl("varlen_attention_qkvpacked",
         ADATAPE_KERNEL("varlen_attention_qkvpacked", &adatape::varlen_attention_qkvpacked));
  m.impl(
      "elastic_attention_qkvpacked_bwd",
      ADATAPE_KERNEL("elastic_attention_qkvpacked_bwd", &adatape::elastic_attention_qkvpacked_bwd));
}
