// Two feed-forwards over one buffer: torch's matrix products, our bias and activation between them.

#include <array>
#include <optional>
#include <tuple>

#include "../products.h"
#include "dispatch.h"
#include "kernels/bias_act.cuh"
#include "launch.h"

namespace adatape::cuda {
namespace {

// Parameters of one feed-forward, and whether `gated`: a GLU, else a GELU.
struct FFN {
  Tensor w1, b1, w2, b2;
  bool gated;
};

// The rows that go through one feed-forward, `first` to `first + count` of the buffer. Where a
// tensor holds how many are in use, `bounds`[1] is their end.
struct Rows {
  int64_t first, count;
  std::optional<Tensor> bounds;
};

BiasActParams params(const Rows& rows, const Tensor& hidden, int64_t width) {
  BiasActParams p{};
  p.hidden = hidden.data_ptr();
  p.bounds = rows.bounds ? rows.bounds->const_data_ptr<int64_t>() : nullptr;
  p.first_row = rows.first, p.rows = rows.count, p.width = width;
  return p;
}

// Blocks for runs of rows and, in y, strips of columns.
Grid strips(const BiasActParams& p, int64_t pack) {
  return {ceil_div(p.rows, kBiasActRun), ceil_div(p.width, kWarpSize * pack)};
}

void clear_unused(const Rows& rows, const Tensor& x) {
  if (!rows.bounds || x.numel() == 0) return;
  const Stream stream = stream_of(x);
  const BiasActParams p = params(rows, x, x.size(1));
  with_type_of(x, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(clear_unused_kernel<T, Aligned>, {ceil_div(p.rows, kBiasActWarps)},
                 kBiasActThreads, 0, stream, p);
        },
        rows_aligned({x}));
  });
}

// A matrix product multiplies what stands in unused rows by zero, and NaN stays NaN: the rows with
// zeros there instead.
Tensor without_unused(const Rows& rows, const Tensor& x) {
  if (!rows.bounds) return x;
  const Tensor copy = torch::stable::clone(dense(x));
  clear_unused(rows, copy);
  return copy;
}

// Writes the result of a run of rows to y; returns the pre-activations.
Tensor forward(const Rows& rows, const Tensor& x, const FFN& ffn, const Tensor& y) {
  const Tensor hidden = torch::stable::new_empty(x, {rows.count, ffn.w1.size(0)}, x.scalar_type());
  if (rows.count == 0) return hidden;
  const Tensor act = torch::stable::new_empty(x, {rows.count, ffn.w2.size(1)}, x.scalar_type());
  multiply(x, transposed(ffn.w1), hidden);
  const Tensor b1 = dense(ffn.b1);
  const Stream stream = stream_of(x);
  BiasActParams p = params(rows, hidden, act.size(1));
  p.bias = b1.data_ptr(), p.act = act.data_ptr();
  with_type_of(x, [&]<class T>() {
    with_flags(
        [&]<bool Aligned, bool Gated>() {
          launch(bias_act_kernel<T, Aligned, Gated>, strips(p, Pack<T>::kSize), kBiasActThreads, 0,
                 stream, p);
        },
        rows_aligned({b1, act, hidden}), ffn.gated);
  });
  linear(act, ffn.w2, ffn.b2, y);
  clear_unused(rows, y);
  return hidden;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply(a, b, out);
  return out;
}

// Writes dx of a run of rows; returns the gradients of w1, b1, w2 and b2.
std::array<Tensor, 4> backward(const Rows& rows, const Tensor& dy_any, const Tensor& x_any,
                               const FFN& ffn, const Tensor& hidden_any, const Tensor& dx) {
  const Tensor dy = without_unused(rows, dy_any), x = without_unused(rows, x_any);
  const Tensor hidden = dense(hidden_any), dact = product(dy, ffn.w2);
  const Tensor act = torch::stable::new_empty(dact, dact.sizes());
  const Tensor dhidden = torch::stable::new_empty(hidden, hidden.sizes());
  const Tensor dbias = torch::stable::new_empty(
      hidden, {ceil_div(rows.count, kBiasActRun), hidden.size(1)}, ScalarType::Float);
  const Stream stream = stream_of(x);
  BiasActParams p = params(rows, hidden, act.size(1));
  p.act = act.data_ptr(), p.dact = dact.data_ptr(), p.dhidden = dhidden.data_ptr();
  p.dbias = dbias.mutable_data_ptr<float>();
  with_type_of(x, [&]<class T>() {
    with_flags(
        [&]<bool Aligned, bool Gated>() {
          launch(bias_act_bwd_kernel<T, Aligned, Gated>, strips(p, Pack<T>::kSize), kBiasActThreads,
                 0, stream, p);
        },
        rows_aligned({act, hidden}), ffn.gated);
  });
  multiply(dhidden, ffn.w1, dx);
  return {product(transposed(dhidden), x), torch::stable::to(column_sums(dbias), x.scalar_type()),
          product(transposed(dy), act), column_sums(dy)};
}

Rows input_rows(int64_t inputs, int64_t tapes, const std::optional<Tensor>& bounds) {
  return {0, inputs, tapes == 0 ? bounds : std::nullopt};
}

// The host knows where the tape rows start: the first max_inputs rows are input rows. `bounds`
// (2,) int64, if any, ends the last kind's rows.
std::tuple<Tensor, Tensor, Tensor> dual_ffn(const Tensor& x_any, int64_t max_inputs,
                                            int64_t max_tapes, const std::optional<Tensor>& bounds,
                                            const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                            const Tensor& b2, const std::optional<Tensor>& tape_w1,
                                            const std::optional<Tensor>& tape_b1,
                                            const std::optional<Tensor>& tape_w2,
                                            const std::optional<Tensor>& tape_b2) {
  const Tensor x = with_dense_rows(x_any);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  zero_rows_from(y, max_inputs + max_tapes);
  const Tensor hidden =
      forward(input_rows(max_inputs, max_tapes, bounds), rows_of(x, 0, max_inputs),
              {w1, b1, w2, b2, false}, rows_of(y, 0, max_inputs));
  if (!tape_w1) return {y, hidden, torch::stable::new_empty(x, {0, 0}, x.scalar_type())};
  const Tensor tape_hidden =
      forward({max_inputs, max_tapes, bounds}, rows_of(x, max_inputs, max_tapes),
              {*tape_w1, *tape_b1, *tape_w2, *tape_b2, true}, rows_of(y, max_inputs, max_tapes));
  return {y, hidden, tape_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_ffn_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& hidden, const Tensor& tape_hidden,
    const std::optional<Tensor>& bounds, const Tensor& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const std::optional<Tensor>& tape_w1, const std::optional<Tensor>& tape_b1,
    const std::optional<Tensor>& tape_w2, const std::optional<Tensor>& tape_b2) {
  const Tensor dy = dense(dy_any), x = with_dense_rows(x_any);
  const int64_t inputs = hidden.size(0), tapes = tape_hidden.size(0);
  const Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  zero_rows_from(dx, inputs + tapes);
  const auto [dw1, db1, dw2, db2] =
      backward(input_rows(inputs, tapes, bounds), rows_of(dy, 0, inputs), rows_of(x, 0, inputs),
               {w1, b1, w2, b2, false}, hidden, rows_of(dx, 0, inputs));
  if (!tape_w1) {
    const auto none = [&x] { return torch::stable::new_empty(x, {0}); };
    return {dx, dw1, db1, dw2, db2, none(), none(), none(), none()};
  }
  const auto [dv1, dc1, dv2, dc2] = backward(
      {inputs, tapes, bounds}, rows_of(dy, inputs, tapes), rows_of(x, inputs, tapes),
      {*tape_w1, *tape_b1, *tape_w2, *tape_b2, true}, tape_hidden, rows_of(dx, inputs, tapes));
  return {dx, dw1, db1, dw2, db2, dv1, dc1, dv2, dc2};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cuda, m) {
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

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("dual_ffn", TORCH_BOX(&adatape::cuda::dual_ffn));
  m.impl("dual_ffn_bwd", TORCH_BOX(&adatape::cuda::dual_ffn_bwd));
}
