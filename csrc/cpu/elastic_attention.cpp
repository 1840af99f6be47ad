// Attention over each example's input and tape rows: checks, tasks, registration.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace adatape {
namespace {

struct Layout {
  int64_t batch, rows;
  const int32_t* cu_inputs;
  const int32_t* cu_tapes;

  int64_t lens(int64_t i) const {
    return int64_t{cu_inputs[i + 1]} - cu_inputs[i] + cu_tapes[i + 1] - cu_tapes[i];
  }
  int64_t used() const { return cu_tapes[batch]; }
};

void check_offsets(const char* name, const int32_t* offsets, int64_t batch, int64_t start,
                   int64_t rows) {
  if (offsets[0] != start) {
    refuse(name, ": expected the first offset to be ", start, ", got ", offsets[0]);
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      refuse(name, ": expected ascending offsets, got ", offsets[i], " then ", offsets[i + 1],
             " at ", i, ", ", i + 1);
    }
  }
  if (offsets[batch] > rows) {
    refuse(name, ": expected the last offset to be at most ", rows, " (the number of rows), got ",
           offsets[batch]);
  }
}

Layout checked_layout(const Tensor& q, const Tensor& cu_inputs, const Tensor& cu_tapes,
                      std::optional<int64_t> max_rows) {
  const Layout layout{cu_inputs.size(0) - 1, q.size(0), cu_inputs.const_data_ptr<int32_t>(),
                      cu_tapes.const_data_ptr<int32_t>()};
  check_offsets("cu_inputs", layout.cu_inputs, layout.batch, 0, layout.rows);
  check_offsets("cu_tapes", layout.cu_tapes, layout.batch, layout.cu_inputs[layout.batch],
                layout.rows);
  for (int64_t i = 0; max_rows && i < layout.batch; ++i) {
    if (layout.lens(i) > *max_rows) {
      refuse("max_rows: expected at least ", layout.lens(i), " (the rows of example ", i, "), got ",
             *max_rows);
    }
  }
  return layout;
}

HeadRows head_rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

AttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& lse, const Layout& layout, std::optional<double> scale) {
  AttentionParams p{};
  p.q = head_rows(q), p.k = head_rows(k), p.v = head_rows(v), p.out = head_rows(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.cu_inputs = layout.cu_inputs, p.cu_tapes = layout.cu_tapes;
  p.rows = layout.rows;
  p.head_dim = q.size(2);
  p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(q.size(2))));
  p.dtype = dtype_of(q);
  return p;
}

std::tuple<Tensor, Tensor> elastic_attention(const Tensor& q_any, const Tensor& k_any,
                                             const Tensor& v_any, const Tensor& cu_inputs_any,
                                             const Tensor& cu_tapes_any,
                                             std::optional<int64_t> max_rows,
                                             std::optional<double> scale) {
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Tensor cu_inputs = dense(cu_inputs_any);
  const Tensor cu_tapes = dense(cu_tapes_any);
  const Layout layout = checked_layout(q, cu_inputs, cu_tapes, max_rows);
  const int64_t num_heads = q.size(1);
  const Tensor out = new_output(q, {q.size(0), num_heads, q.size(2)}, q.scalar_type());
  const Tensor lse = new_output(q, {num_heads, q.size(0)}, ScalarType::Float);
  if (layout.used() < layout.rows) {  // the kernels write all rows that examples own
    zero_rows_from(out, layout.used());
    zero_rows_from(torch::stable::transpose(lse, 0, 1), layout.used());
  }

  struct Task {
    int64_t example, head, first;
  };
  std::vector<Task> tasks;
  for (int64_t i = 0; i < layout.batch; ++i) {
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t r = 0; r < layout.lens(i); r += kQueryBlock) tasks.push_back({i, head, r});
    }
  }
  const AttentionParams p = params(q, k, v, out, lse, layout, scale);
  const Kernels& chosen = kernels();
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    chosen.attention_fwd(p, tasks[t].example, tasks[t].head, tasks[t].first);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> elastic_attention_bwd(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out, const Tensor& lse, const Tensor& cu_inputs_any, const Tensor& cu_tapes_any,
    std::optional<int64_t> max_rows, std::optional<double> scale) {
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Tensor dout = with_dense_rows(dout_any);
  const Tensor cu_inputs = dense(cu_inputs_any);
  const Tensor cu_tapes = dense(cu_tapes_any);
  const Layout layout = checked_layout(q, cu_inputs, cu_tapes, max_rows);
  const int64_t num_heads = q.size(1);
  if (lse.numel() != num_heads * layout.rows || !lse.is_contiguous()) {
    refuse("lse: expected a contiguous (", num_heads, ", ", layout.rows, "), got ", lse.numel(),
           " elements");
  }
  const auto gradient = [&] {
    const Tensor x = new_output(q, {q.size(0), num_heads, q.size(2)}, q.scalar_type());
    zero_rows_from(x, layout.used());
    return x;
  };
  const Tensor dq = gradient(), dk = gradient(), dv = gradient();
  AttentionParams p = params(q, k, v, out, lse, layout, scale);
  p.dout = head_rows(dout);
  p.dq = head_rows(dq), p.dk = head_rows(dk), p.dv = head_rows(dv);
  const Kernels& chosen = kernels();
  run_tasks(layout.batch * num_heads, [&](int64_t t) {
    if (layout.lens(t / num_heads) > 0) chosen.attention_bwd(p, t / num_heads, t % num_heads);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cpu, m) {
  m.def(
      "elastic_attention(Tensor q, Tensor k, Tensor v, Tensor cu_inputs, Tensor cu_tapes, "
      "int? max_rows, float? softmax_scale) -> (Tensor, Tensor)");
  m.def(
      "elastic_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_inputs, Tensor cu_tapes, int? max_rows, float? softmax_scale) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("elastic_attention", TORCH_BOX(&adatape::elastic_attention));
  m.impl("elastic_attention_bwd", TORCH_BOX(&adatape::elastic_attention_bwd));
}
