// Two feed-forwards over one buffer: torch's matrix products, our bias and activation between them.

#include <array>
#include <optional>
#include <tuple>

#include "../products.h"
#include "tensors.h"

namespace adatape {
namespace {

using Kernel = void (*)(const ActParams&, int64_t, int64_t);

constexpr int64_t kRowsPerTask = 16;

// Parameters of one feed-forward, and the kernels of its activation: `gates` columns of the first
// product make one of the activation.
struct FFN {
  Tensor w1, b1, w2, b2;
  int64_t gates;
  Kernel forward, backward;
};

FFN input_ffn(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  return {w1, b1, w2, b2, 1, kernels().bias_gelu, kernels().gelu_bwd};
}
FFN tape_ffn(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  return {w1, b1, w2, b2, 2, kernels().bias_glu, kernels().glu_bwd};
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = new_output(a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply(a, b, out);
  return out;
}

void run(const ActParams& p, int64_t rows, Kernel kernel) {
  run_tasks((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask;
    kernel(p, first, rows - first < kRowsPerTask ? rows - first : kRowsPerTask);
  });
}

// Writes the pre-activations and the result of a run of rows.
void forward(const Tensor& x, const FFN& ffn, const Tensor& hidden, const Tensor& y) {
  const int64_t rows = x.size(0), width = ffn.w2.size(1);
  if (rows == 0) return;
  multiply(x, transposed(ffn.w1), hidden);
  const Tensor b1 = dense(ffn.b1), b2 = dense(ffn.b2);
  const Tensor act = new_output(x, {rows, width}, x.scalar_type());
  ActParams p{};
  p.hidden = hidden.data_ptr(), p.bias = b1.data_ptr(), p.act = act.data_ptr();
  p.width = width;
  p.dtype = dtype_of(x);
  run(p, rows, ffn.forward);
  multiply(act, transposed(ffn.w2), y);
  p.hidden = y.data_ptr(), p.bias = b2.data_ptr(), p.width = y.size(1);
  run(p, rows, kernels().bias);
}

// Writes dx of a run of rows; returns the gradients of w1, b1, w2 and b2. Beside the saved
// pre-activations one matrix of their size is held at a time: the activation, until w2 has its
// gradient, then what flows back through it.
std::array<Tensor, 4> backward(const Tensor& dy, const Tensor& x, const FFN& ffn,
                               const Tensor& hidden_any, const Tensor& dx) {
  const Tensor hidden = dense(hidden_any);
  const Tensor act = new_output(x, {x.size(0), ffn.w2.size(1)}, x.scalar_type());
  ActParams p{};
  p.hidden = hidden.data_ptr(), p.act = act.data_ptr();
  p.width = act.size(1);
  p.dtype = dtype_of(x);
  run(p, x.size(0), ffn.forward);
  const Tensor dw2 = product(transposed(dy), act);
  const Tensor& dact = act;
  multiply(dy, ffn.w2, dact);
  // In place where each element follows from its own.
  const Tensor dhidden =
      ffn.gates == 1 ? dact : new_output(x, {x.size(0), hidden.size(1)}, x.scalar_type());
  p.dact = dact.data_ptr(), p.dhidden = dhidden.data_ptr();
  run(p, x.size(0), ffn.backward);
  multiply(dhidden, ffn.w1, dx);
  return {product(transposed(dhidden), x), column_sums(dhidden), dw2, column_sums(dy)};
}

// How many input and tape rows there are: the bounds, unless a tensor holds the numbers.
std::tuple<int64_t, int64_t> row_counts(int64_t max_inputs, int64_t max_tapes, int64_t rows,
                                        const std::optional<Tensor>& bounds) {
  int64_t inputs = max_inputs, end = max_inputs + max_tapes;
  if (bounds) {
    const Tensor values = dense(*bounds);
    inputs = values.const_data_ptr<int64_t>()[0], end = values.const_data_ptr<int64_t>()[1];
  }
  if (inputs < 0 || end < inputs || end > rows) {
    refuse("num_input_rows: expected 0 <= num_input_rows <= num_rows <= ", rows,
           " (the rows of x), got ", inputs, " and ", end);
  }
  return {inputs, end - inputs};
}

std::tuple<Tensor, Tensor, Tensor> dual_ffn(const Tensor& x_any, int64_t max_inputs,
                                            int64_t max_tapes, const std::optional<Tensor>& bounds,
                                            const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                            const Tensor& b2, const std::optional<Tensor>& tape_w1,
                                            const std::optional<Tensor>& tape_b1,
                                            const std::optional<Tensor>& tape_w2,
                                            const std::optional<Tensor>& tape_b2) {
  const Tensor x = with_dense_rows(x_any);
  const auto [inputs, tapes] = row_counts(max_inputs, max_tapes, x.size(0), bounds);
  const Tensor y = new_output(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor hidden = new_output(x, {max_inputs, w1.size(0)}, x.scalar_type());
  const Tensor tape_hidden =
      new_output(x, {max_tapes, tape_w1 ? tape_w1->size(0) : 0}, x.scalar_type());
  forward(rows_of(x, 0, inputs), input_ffn(w1, b1, w2, b2), rows_of(hidden, 0, inputs),
          rows_of(y, 0, inputs));
  if (tape_w1) {
    forward(rows_of(x, inputs, tapes), tape_ffn(*tape_w1, *tape_b1, *tape_w2, *tape_b2),
            rows_of(tape_hidden, 0, tapes), rows_of(y, inputs, tapes));
  }
  zero_rows_from(y, inputs + tapes);
  zero_rows_from(hidden, inputs);
  zero_rows_from(tape_hidden, tapes);
  return {y, hidden, tape_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_ffn_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& hidden, const Tensor& tape_hidden,
    const std::optional<Tensor>& bounds, const Tensor& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const std::optional<Tensor>& tape_w1, const std::optional<Tensor>& tape_b1,
    const std::optional<Tensor>& tape_w2, const std::optional<Tensor>& tape_b2) {
  const Tensor dy = dense(dy_any), x = with_dense_rows(x_any);
  const auto [inputs, tapes] = row_counts(hidden.size(0), tape_hidden.size(0), x.size(0), bounds);
  const Tensor dx = new_output(x, {x.size(0), x.size(1)}, x.scalar_type());
  zero_rows_from(dx, inputs + tapes);
  const auto [dw1, db1, dw2, db2] =
      backward(rows_of(dy, 0, inputs), rows_of(x, 0, inputs), input_ffn(w1, b1, w2, b2),
               rows_of(hidden, 0, inputs), rows_of(dx, 0, inputs));
  if (!tape_w1) {
    const auto none = [&x] { return torch::stable::new_empty(x, {0}); };
    return {dx, dw1, db1, dw2, db2, none(), none(), none(), none()};
  }
  const auto [dv1, dc1, dv2, dc2] =
      backward(rows_of(dy, inputs, tapes), rows_of(x, inputs, tapes),
               tape_ffn(*tape_w1, *tape_b1, *tape_w2, *tape_b2), rows_of(tape_hidden, 0, tapes),
               rows_of(dx, inputs, tapes));
  return {dx, dw1, db1, dw2, db2, dv1, dc1, dv2, dc2};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cpu, m) {
  m.def(
      "dual_ffn(Tensor x, int max_input_rows, int max_tape_rows, Tensor? bounds, "
      "Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
      "Tensor? tape_w1, Tensor? tape_b1, Tensor? tape_w2, Tensor? tape_b2) "
      "-> (Tensor y, Tensor hidden, Tensor tape_hidden)");
  m.def(
      "dual_ffn_bwd(Tensor dy, Tensor x, Tensor hidden, Tensor tape_hidden, Tensor? bounds, "
      "Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
      "Tensor? tape_w1, Tensor? tape_b1, Tensor? tape_w2, Tensor? tape_b2) "
      "-> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, "
      "Tensor dtape_w1, Tensor dtape_b1, Tensor dtape_w2, Tensor dtape_b2)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("dual_ffn", TORCH_BOX(&adatape::dual_ffn));
  m.impl("dual_ffn_bwd", TORCH_BOX(&adatape::dual_ffn_bwd));
}
