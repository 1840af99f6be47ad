// Two feed-forwards over one buffer, in CUDA: torch's matrix products, which add the biases before
// they round, with our activation between them.

#include <optional>
#include <string>
#include <tuple>

#include "../allocation.h"
#include "../products.h"
#include "kernels/bias_act.cuh"
#include "launch.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// One feed-forward: its parameters and its activation.
struct CudaFFN {
  Tensor w1;  // (columns of hidden, dim)
  Tensor b1;  // (columns of hidden,)
  Tensor w2;  // (dim, width)
  Tensor b2;  // (dim,)
  Activation activation;
};

// The rows of the buffer that go through one feed-forward, `first` to `first + count`.
struct FFNRows {
  int64_t first, count;
  // On the device, how many rows of the buffer are in use, if the host does not know.
  const int64_t* num_rows;

  Tensor of(const Tensor& x) const { return rows_of(x, first, count); }
};

// Calls body.template operator()<Aligned, activation>().
template <class Body>
void with_activation(const Body& body, bool aligned, Activation activation) {
  const auto with = [&]<Activation A>() {
    with_flags([&]<bool Aligned>() { body.template operator()<Aligned, A>(); }, aligned);
  };
  switch (activation) {
    case Activation::kGeluTanh:
      return with.template operator()<Activation::kGeluTanh>();
    case Activation::kGelu:
      return with.template operator()<Activation::kGelu>();
    case Activation::kRelu:
      return with.template operator()<Activation::kRelu>();
    case Activation::kGlu:
      return with.template operator()<Activation::kGlu>();
  }
}

// Returns the launch of a kernel over blocks of rows and strips of columns.
LaunchConfig by_strip(const CudaBiasActParams& p, int64_t pack, const LaunchStream& stream) {
  return {.grid = {.x = ceil_div(p.rows, kBiasActRows), .y = ceil_div(p.width, kWarpSize * pack)},
          .block_threads = kBiasActThreads,
          .stream = stream};
}

// Writes zeros to the unused ones of these rows, which are all that `x` has.
void clear_unused(const FFNRows& rows, const Tensor& x) {
  if (rows.num_rows == nullptr || x.numel() == 0) return;
  const LaunchStream stream = stream_of(x);
  const CudaBiasActParams p{.hidden = x.data_ptr(),
                            .num_rows = rows.num_rows,
                            .first_row = rows.first,
                            .rows = rows.count,
                            .width = x.size(1)};
  const LaunchConfig by_row{.grid = {.x = ceil_div(p.rows, kBiasActWarps)},
                            .block_threads = kBiasActThreads,
                            .stream = stream};
  with_type_of(x, [&]<class T>() {
    with_flags([&]<bool Aligned>() { launch(clear_unused_kernel<T, Aligned>, by_row, p); },
               rows_aligned({x}));
  });
}

// Returns the rows with zeros in the unused ones. A matrix product would multiply what stands there
// by zero, and NaN would stay NaN.
Tensor without_unused(const FFNRows& rows, const Tensor& x) {
  if (rows.num_rows == nullptr) return x;
  const Tensor copy = torch::stable::clone(dense(x));
  clear_unused(rows, copy);
  return copy;
}

// Sends the rows x (count, dim) through a feed-forward; writes the pre-activations and the result.
void forward(const FFNRows& rows, const Tensor& x, const CudaFFN& ffn, const Tensor& hidden,
             const Tensor& y) {
  if (rows.count == 0) return;
  const Tensor act = allocate("act", x, {rows.count, ffn.w2.size(1)}, x.scalar_type());
  linear(x, ffn.w1, ffn.b1, hidden);
  const LaunchStream stream = stream_of(x);
  const CudaBiasActParams p{.hidden = hidden.data_ptr(),
                            .act = act.data_ptr(),
                            .num_rows = rows.num_rows,
                            .first_row = rows.first,
                            .rows = rows.count,
                            .width = act.size(1)};
  with_type_of(x, [&]<class T>() {
    with_activation(
        [&]<bool Aligned, Activation A>() {
          launch(act_kernel<T, Aligned, A>, by_strip(p, Pack<T>::kSize, stream), p);
        },
        rows_aligned({act, hidden}), ffn.activation);
  });
  linear(act, ffn.w2, ffn.b2, y);
  clear_unused(rows, y);
}

Tensor product(const char* name, const Tensor& a, const Tensor& b) {
  const Tensor out = allocate(name, a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply(a, b, out);
  return out;
}

struct CudaFFNGradients {
  Tensor dw1, db1, dw2, db2;
};

// Writes the gradient of the rows x, and returns those of the parameters.
CudaFFNGradients backward(const FFNRows& rows, const Tensor& dy_any, const Tensor& x_any,
                          const CudaFFN& ffn, const Tensor& hidden_any, const Tensor& dx) {
  const Tensor dy = without_unused(rows, dy_any), x = without_unused(rows, x_any);
  const Tensor hidden = dense(hidden_any), dact = product("dact", dy, ffn.w2);
  const Tensor act = allocate("act", dact, dact.sizes());
  const Tensor dhidden = allocate("dhidden", hidden, hidden.sizes());
  const Tensor dbias_parts =
      allocate("dbias_parts", hidden, {ceil_div(rows.count, kBiasActRows), hidden.size(1)},
               ScalarType::Float);
  const LaunchStream stream = stream_of(x);
  const CudaBiasActParams p{.hidden = hidden.data_ptr(),
                            .act = act.data_ptr(),
                            .dact = dact.data_ptr(),
                            .dhidden = dhidden.data_ptr(),
                            .dbias_parts = dbias_parts.mutable_data_ptr<float>(),
                            .num_rows = rows.num_rows,
                            .first_row = rows.first,
                            .rows = rows.count,
                            .width = act.size(1)};
  with_type_of(x, [&]<class T>() {
    with_activation(
        [&]<bool Aligned, Activation A>() {
          LaunchConfig config = by_strip(p, Pack<T>::kSize, stream);
          config.static_bytes = kBiasActBwdStaticBytes<T>;
          launch(bias_act_bwd_kernel<T, Aligned, A>, config, p);
        },
        rows_aligned({act, hidden}), ffn.activation);
  });
  multiply(dhidden, ffn.w1, dx);
  return {.dw1 = product("dw1", transposed(dhidden), x),
          .db1 = torch::stable::to(column_sums(dbias_parts), x.scalar_type()),
          .dw2 = product("dw2", transposed(dy), act),
          .db2 = column_sums(dy)};
}

// The rows of each kind. The rows behind both belong to no example.
struct FFNRowKinds {
  FFNRows inputs, tapes;

  int64_t end() const { return tapes.first + tapes.count; }
};

// The kernels need to know on the host where the tape rows begin. Without a feed-forward for the
// tape there are none, so that all rows may be input rows. `bounds` (2,), if given, holds
// (num_input_rows, num_rows) on the device; the second ends the rows of the last kind.
FFNRowKinds row_kinds(const Tensor& x, std::optional<int64_t> num_input_rows, int64_t max_tape_rows,
                      const std::optional<Tensor>& bounds, bool has_tape_ffn) {
  const int64_t rows = x.size(0), inputs = num_input_rows.value_or(rows);
  const int64_t tapes = has_tape_ffn ? max_tape_rows : 0;
  if (!num_input_rows && (has_tape_ffn || !bounds)) {
    refuse("num_input_rows: expected an int, got a number on the device");
  }
  const int64_t* const num_rows = bounds ? bounds->const_data_ptr<int64_t>() + 1 : nullptr;
  return {.inputs = {.first = 0, .count = inputs, .num_rows = tapes == 0 ? num_rows : nullptr},
          .tapes = {.first = inputs, .count = tapes, .num_rows = num_rows}};
}

struct CudaDualFFNOutputs {
  Tensor y;            // (rows, dim)
  Tensor hidden;       // (input rows, columns of w1's product)
  Tensor tape_hidden;  // (tape rows, columns of tape_w1's product), or (0, 0)
};

CudaDualFFNOutputs allocate_outputs(const Tensor& x, const FFNRowKinds& rows, const Tensor& w1,
                                    const std::optional<Tensor>& tape_w1) {
  const int64_t tape_columns = tape_w1 ? tape_w1->size(0) : 0;
  return {
      .y = allocate("y", x, {x.size(0), x.size(1)}, x.scalar_type()),
      .hidden = allocate("hidden", x, {rows.inputs.count, w1.size(0)}, x.scalar_type()),
      .tape_hidden = allocate("tape_hidden", x, {rows.tapes.count, tape_columns}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> dual_ffn(
    const Tensor& x_any, std::optional<int64_t> num_input_rows, int64_t max_tape_rows,
    const std::optional<Tensor>& bounds_any, const std::string& activation, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const std::optional<Tensor>& tape_w1,
    const std::optional<Tensor>& tape_b1, const std::optional<Tensor>& tape_w2,
    const std::optional<Tensor>& tape_b2) {
  check_dual_ffn(x_any, num_input_rows, max_tape_rows, bounds_any, tape_w1.has_value(),
                 kCudaDtypes);
  check_ffns(w1, b1, w2, b2, tape_w1, tape_b1, tape_w2, tape_b2, x_any);
  const Tensor x = with_dense_rows(x_any);
  std::optional<Tensor> bounds;
  if (bounds_any) bounds = dense(*bounds_any);
  const FFNRowKinds rows = row_kinds(x, num_input_rows, max_tape_rows, bounds, tape_w1.has_value());
  const auto [y, hidden, tape_hidden] = allocate_outputs(x, rows, w1, tape_w1);
  zero_rows_from(y, rows.end());
  forward(rows.inputs, rows.inputs.of(x),
          {.w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2, .activation = activation_of(activation)}, hidden,
          rows.inputs.of(y));
  if (tape_w1) {
    forward(rows.tapes, rows.tapes.of(x),
            {.w1 = *tape_w1,
             .b1 = *tape_b1,
             .w2 = *tape_w2,
             .b2 = *tape_b2,
             .activation = Activation::kGlu},
            tape_hidden, rows.tapes.of(y));
  }
  return {y, hidden, tape_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_ffn_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& hidden, const Tensor& tape_hidden,
    std::optional<int64_t> num_input_rows, const std::optional<Tensor>& bounds_any,
    const std::string& activation, const Tensor& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const std::optional<Tensor>& tape_w1, const std::optional<Tensor>& tape_b1,
    const std::optional<Tensor>& tape_w2, const std::optional<Tensor>& tape_b2) {
  check_dual_ffn_bwd(dy_any, x_any, hidden, tape_hidden, num_input_rows, bounds_any, w1, tape_w1,
                     kCudaDtypes);
  check_ffns(w1, b1, w2, b2, tape_w1, tape_b1, tape_w2, tape_b2, x_any);
  const Tensor dy = dense(dy_any), x = with_dense_rows(x_any);
  std::optional<Tensor> bounds;
  if (bounds_any) bounds = dense(*bounds_any);
  const FFNRowKinds rows =
      row_kinds(x, num_input_rows, tape_hidden.size(0), bounds, tape_w1.has_value());
  const Tensor dx = allocate("dx", x, {x.size(0), x.size(1)}, x.scalar_type());
  zero_rows_from(dx, rows.end());
  const CudaFFNGradients input =
      backward(rows.inputs, rows.inputs.of(dy), rows.inputs.of(x),
               {.w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2, .activation = activation_of(activation)},
               hidden, rows.inputs.of(dx));
  if (!tape_w1) {
    const auto none = [&x] { return torch::stable::new_empty(x, {0}); };
    return {dx, input.dw1, input.db1, input.dw2, input.db2, none(), none(), none(), none()};
  }
  const CudaFFNGradients tape = backward(rows.tapes, rows.tapes.of(dy), rows.tapes.of(x),
                                         {.w1 = *tape_w1,
                                          .b1 = *tape_b1,
                                          .w2 = *tape_w2,
                                          .b2 = *tape_b2,
                                          .activation = Activation::kGlu},
                                         tape_hidden, rows.tapes.of(dx));
  return {dx, input.dw1, input.db1, input.dw2, input.db2, tape.dw1, tape.db1, tape.dw2, tape.db2};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("dual_ffn", ADATAPE_KERNEL("dual_ffn", &adatape::cuda::dual_ffn));
  m.impl("dual_ffn_bwd", ADATAPE_KERNEL("dual_ffn_bwd", &adatape::cuda::dual_ffn_bwd));
}
