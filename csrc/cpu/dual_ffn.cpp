// Two feed-forwards over one buffer, on the CPU: torch's matrix products, with our bias and
// activation between them.

#include <algorithm>
#include <array>
#include <bit>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../products.h"
#include "cpu_tensors.h"
#include "small_linear.h"

namespace adatape {
namespace {

using ActKernel = void (*)(const CpuBiasActParams&, int64_t first, int64_t count);

// One feed-forward: its parameters and its activation.
struct CpuFFN {
  Tensor w1;  // (columns of hidden, dim)
  Tensor b1;  // (columns of hidden,)
  Tensor w2;  // (dim, width)
  Tensor b2;  // (dim,)
  // Of a GLU, hidden has 2 · width columns, otherwise it has width.
  Activation activation;
};

Tensor product(const char* name, const Tensor& a, const Tensor& b) {
  Tensor out = new_output(name, a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply(a, b, out);
  return out;
}

void run(ActKernel kernel, int64_t rows, const CpuBiasActParams& p) {
  run_row_tasks(rows, kActRows, [&](int64_t first, int64_t count) { kernel(p, first, count); });
}

// Returns x · weightᵀ + bias by oneDNN, which adds the bias in the product. torch's own product in
// bfloat16 first copies the bias to every row of its result. Returns nothing if the call fails.
std::optional<Tensor> linear_by_onednn(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(weight),
                                    from(std::optional<Tensor>(bias)),
                                    from(std::string("none")),
                                    from(std::vector<std::optional<double>>{}),
                                    from(std::optional<std::string>())};
  if (torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION)) {
    return std::nullopt;
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns whether torch's own bfloat16 products are oneDNN's, and this build has the product above.
// The first call asks torch and tries it.
bool has_onednn(const Tensor& like) {
  static const bool found = [&] {
    StableIValue supported;
    if (torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", &supported,
                              TORCH_ABI_VERSION) ||
        !torch::stable::detail::to<bool>(supported)) {
      return false;
    }
    const auto zeros = [&](std::initializer_list<int64_t> sizes) {
      Tensor x = torch::stable::new_empty(like, sizes);
      return torch::stable::zero_(x);
    };
    return linear_by_onednn(zeros({1, 32}), zeros({32, 32}), zeros({32})).has_value();
  }();
  return found;
}

// Writes the bias and activation of `hidden`, which has the bias already where `bias` is null.
void activate(const Tensor& hidden, const Tensor* bias, const CpuFFN& ffn, const Tensor& act) {
  run(cpu_kernels().bias_act, hidden.size(0),
      {.hidden = hidden.data_ptr(),
       .bias = bias ? bias->data_ptr() : nullptr,
       .act = act.data_ptr(),
       .width = act.size(1),
       .activation = ffn.activation,
       .dtype = dtype_of(hidden)});
}

// Sends the rows x (rows, dim) through a feed-forward; writes the pre-activations and the result.
void forward(const Tensor& x, const CpuFFN& ffn, const Tensor& hidden, const Tensor& y) {
  const int64_t rows = x.size(0), width = ffn.w2.size(1);
  if (rows == 0) return;
  const Tensor b1 = dense(ffn.b1), b2 = dense(ffn.b2);
  // torch's product adds the bias before it rounds to 16 bits. Sums of float are not rounded any
  // further, so that their bias goes into the pass that takes the activation.
  const bool with_product = dtype_of(x) != DType::kFloat;
  if (with_product) {
    linear(x, ffn.w1, b1, hidden);
  } else {
    multiply(x, transposed(ffn.w1), hidden);
  }
  const Tensor act = new_output("act", x, {rows, width}, x.scalar_type());
  activate(hidden, with_product ? nullptr : &b1, ffn, act);
  if (with_product) {
    linear(act, ffn.w2, b2, y);
    return;
  }
  multiply(act, transposed(ffn.w2), y);
  run(cpu_kernels().bias, rows,
      {.hidden = y.data_ptr(),
       .bias = b2.data_ptr(),
       .width = y.size(1),
       .activation = ffn.activation,
       .dtype = dtype_of(x)});
}

// Does what `forward` does without a call of torch.
void forward_small(const Tensor& x, const CpuFFN& ffn, const Tensor& hidden, const Tensor& y) {
  const int64_t rows = x.size(0), width = ffn.w2.size(1);
  Scratch scratch;
  void* const act = scratch.take(rows * width);
  small_linear(x.data_ptr(), x.stride(0), rows, ffn.w1, ffn.b1, hidden.data_ptr());
  cpu_kernels().bias_act({.hidden = hidden.data_ptr(),
                          .act = act,
                          .width = width,
                          .activation = ffn.activation,
                          .dtype = dtype_of(x)},
                         0, rows);
  small_linear(act, width, rows, ffn.w2, ffn.b2, y.data_ptr());
}

// Returns how many rows have their activations in memory at a time: those of a part, of which all
// have as many. The activations of a part are still in a cache when the product reads them, and the
// memory that they lie in is not given back to the system after every call.
int64_t rows_of_a_part(int64_t rows) {
  const int64_t most = 256 * std::max<int64_t>(2, torch::stable::get_num_threads());
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// Does what `forward` does for all rows of x in bfloat16, and returns the pre-activations, or
// nothing where oneDNN is not there.
std::optional<Tensor> forward_by_onednn(const Tensor& x, const CpuFFN& ffn, const Tensor& y) {
  const int64_t rows = x.size(0);
  if (dtype_of(x) != DType::kBFloat16 || rows == 0 || !has_onednn(x)) return std::nullopt;
  const std::optional<Tensor> hidden = linear_by_onednn(dense(x), dense(ffn.w1), dense(ffn.b1));
  if (!hidden) return std::nullopt;
  const Tensor w2 = dense(ffn.w2), b2 = dense(ffn.b2);
  const int64_t part = rows_of_a_part(rows);
  const Tensor act = new_output("act", x, {part, w2.size(1)}, x.scalar_type());
  for (int64_t begin = 0; begin < rows; begin += part) {
    // The last part may reach back into the one before, whose rows it computes once more.
    const int64_t first = std::min(begin, rows - part);
    activate(rows_of(*hidden, first, part), nullptr, ffn, act);
    const std::optional<Tensor> result = linear_by_onednn(act, w2, b2);
    if (!result) return std::nullopt;
    Tensor to = rows_of(y, first, part);
    torch::stable::copy_(to, *result);
  }
  return hidden;
}

struct CpuFFNGradients {
  Tensor dw1, db1, dw2, db2;
};

// Writes the gradient of the rows x, and returns those of the parameters. Beside the saved
// pre-activations it holds one matrix of their size at a time: the activation, until w2 has its
// gradient, then what flows back through it.
CpuFFNGradients backward(const Tensor& dy, const Tensor& x, const CpuFFN& ffn,
                         const Tensor& hidden_any, const Tensor& dx) {
  const Tensor hidden = dense(hidden_any);
  const int64_t rows = x.size(0), width = ffn.w2.size(1);
  const Tensor act = new_output("act", x, {rows, width}, x.scalar_type());
  activate(hidden, nullptr, ffn, act);
  const Tensor dw2 = product("dw2", transposed(dy), act);
  const Tensor& dact = act;
  multiply(dy, ffn.w2, dact);
  // The gradient overwrites dact, because each of its elements depends on its own alone; a GLU's
  // has twice as many.
  const Tensor dhidden = ffn.activation == Activation::kGlu
                             ? new_output("dhidden", x, {rows, hidden.size(1)}, x.scalar_type())
                             : dact;
  const int64_t columns = hidden.size(1), blocks = (rows + kActRows - 1) / kActRows;
  const Tensor dbias_parts = new_output("dbias_parts", x, {blocks, columns}, ScalarType::Float);
  run(cpu_kernels().act_bwd, rows,
      {.hidden = hidden.data_ptr(),
       .dact = dact.data_ptr(),
       .dhidden = dhidden.data_ptr(),
       .dbias_parts = dbias_parts.mutable_data_ptr<float>(),
       .width = width,
       .activation = ffn.activation,
       .dtype = dtype_of(x)});
  multiply(dhidden, ffn.w1, dx);
  return {.dw1 = product("dw1", transposed(dhidden), x),
          .db1 = sum_of_parts(dbias_parts, ffn.b1.scalar_type()),
          .dw2 = dw2,
          .db2 = column_sums(dy)};
}

// torch's bfloat16 products on a CPU keep code for every number of rows that they have met. Where a
// call reserves rows beyond those in use, its products run on one of few numbers of rows.
bool rounds_rows(const Tensor& x, const std::optional<Tensor>& bounds) {
  return bounds && dtype_of(x) == DType::kBFloat16;
}

// Does what `forward` does in parts whose numbers of rows are powers of two. The last part may
// reach back into the one before, which leaves no trace, because every row depends on itself alone.
void forward_rounded(const Tensor& x, const CpuFFN& ffn, const Tensor& hidden, const Tensor& y) {
  constexpr int64_t kMostRows = 512;
  const int64_t rows = x.size(0);
  for (int64_t first = 0; first < rows;) {
    const int64_t left = rows - first;
    const auto floor = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(left)));
    const auto ceil = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(left)));
    const bool last = 8 * left <= rows && ceil <= kMostRows;
    const int64_t count = last ? ceil : std::min(floor, kMostRows);
    if (last) first = rows - count;
    forward(rows_of(x, first, count), ffn, rows_of(hidden, first, count), rows_of(y, first, count));
    first += count;
  }
}

// Returns a number of rows, at least as many as are given, of which there are two up to a number
// and its double.
int64_t rounded_rows(int64_t rows) {
  int64_t unit = 32;
  while (4 * unit < rows) unit *= 2;
  return rows <= 2 * unit ? 2 * unit : rows <= 3 * unit ? 3 * unit : 4 * unit;
}

// Returns a copy of `x` behind whose rows there are zeros.
Tensor with_rows(const char* name, const Tensor& x, int64_t rows) {
  const Tensor padded = new_output(name, x, {rows, x.size(1)}, x.scalar_type());
  Tensor part = rows_of(padded, 0, x.size(0));
  torch::stable::copy_(part, x);
  zero_rows_from(padded, x.size(0));
  return padded;
}

// Does what `backward` does, on copies with a rounded number of rows. Rows of zeros add nothing to
// any gradient.
CpuFFNGradients backward_rounded(const Tensor& dy, const Tensor& x, const CpuFFN& ffn,
                                 const Tensor& hidden, const Tensor& dx) {
  const int64_t rows = x.size(0), rounded = rounded_rows(rows);
  if (rows == 0 || rounded == rows) return backward(dy, x, ffn, hidden, dx);
  const Tensor dx_rounded = new_output("dx", x, {rounded, x.size(1)}, x.scalar_type());
  const CpuFFNGradients gradients =
      backward(with_rows("dy", dy, rounded), with_rows("x", x, rounded), ffn,
               with_rows("hidden", hidden, rounded), dx_rounded);
  Tensor to = dx;
  torch::stable::copy_(to, rows_of(dx_rounded, 0, rows));
  return gradients;
}

// How many rows of each kind there are: the input rows come first, then the tape rows, then rows
// that no example owns.
struct RowCounts {
  int64_t inputs, tapes;

  int64_t used() const { return inputs + tapes; }
};

// `bounds` (2,), if given, holds (num_input_rows, num_rows), the first of which is read where
// num_input_rows is None. Without a feed-forward for the tape all rows in use are input rows.
RowCounts checked_row_counts(std::optional<int64_t> num_input_rows, int64_t max_tape_rows,
                             const std::optional<Tensor>& bounds, int64_t rows, bool has_tape_ffn) {
  int64_t inputs = num_input_rows.value_or(0), end = inputs + max_tape_rows;
  if (bounds) {
    const Tensor values = dense(*bounds);
    const int64_t* const value = values.const_data_ptr<int64_t>();
    end = *(value + 1);
    const int64_t expected = has_tape_ffn ? num_input_rows.value_or(*value) : end;
    if (*value != expected) {
      refuse("bounds: expected ", expected, " (num_input_rows) first, got ", *value);
    }
    inputs = *value;
  }
  if (inputs < 0 || end < inputs || end > rows || inputs > num_input_rows.value_or(rows)) {
    refuse("num_input_rows: expected 0 <= num_input_rows <= num_rows <= ", rows,
           " (the rows of x), got ", inputs, " and ", end);
  }
  if (has_tape_ffn && end - inputs > max_tape_rows) {
    refuse("max_tape_rows: expected at least the ", end - inputs, " tape rows, got ",
           max_tape_rows);
  }
  return {.inputs = inputs, .tapes = end - inputs};
}

// Sends the first rows of a buffer, `used` of x, through a feed-forward. Writes the result and
// returns the pre-activations (hidden_rows, columns of w1's product), zeros from row `used` on.
Tensor forward_of(const Tensor& x, const CpuFFN& ffn, int64_t hidden_rows, bool rounds,
                  const char* name, const Tensor& y) {
  const int64_t used = x.size(0), products = used * (ffn.w1.numel() + ffn.w2.numel());
  const bool small = products <= most_small_products(dtype_of(x));
  if (used == hidden_rows && !rounds && !small) {
    if (const std::optional<Tensor> hidden = forward_by_onednn(x, ffn, y)) return *hidden;
  }
  const Tensor hidden = new_output(name, x, {hidden_rows, ffn.w1.size(0)}, x.scalar_type());
  const auto run_forward = small ? forward_small : rounds ? forward_rounded : forward;
  run_forward(x, ffn, rows_of(hidden, 0, used), y);
  zero_rows_from(hidden, used);
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> dual_ffn(
    const Tensor& x_any, std::optional<int64_t> num_input_rows, int64_t max_tape_rows,
    const std::optional<Tensor>& bounds, const std::string& activation, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const std::optional<Tensor>& tape_w1,
    const std::optional<Tensor>& tape_b1, const std::optional<Tensor>& tape_w2,
    const std::optional<Tensor>& tape_b2) {
  check_dual_ffn(x_any, num_input_rows, max_tape_rows, bounds, tape_w1.has_value(), kCpuDtypes);
  check_ffns(w1, b1, w2, b2, tape_w1, tape_b1, tape_w2, tape_b2, x_any);
  const Tensor x = with_dense_rows(x_any);
  const int64_t rows = x.size(0);
  const RowCounts count =
      checked_row_counts(num_input_rows, max_tape_rows, bounds, rows, tape_w1.has_value());
  const bool rounds = rounds_rows(x, bounds);
  const Tensor y = new_output("y", x, {rows, x.size(1)}, x.scalar_type());
  const Tensor hidden =
      forward_of(rows_of(x, 0, count.inputs),
                 {.w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2, .activation = activation_of(activation)},
                 num_input_rows.value_or(rows), rounds, "hidden", rows_of(y, 0, count.inputs));
  zero_rows_from(y, count.used());
  if (!tape_w1) {
    const Tensor none = new_output("tape_hidden", x, {max_tape_rows, 0}, x.scalar_type());
    return {y, hidden, none};
  }
  const Tensor tape_hidden =
      forward_of(rows_of(x, count.inputs, count.tapes),
                 {.w1 = *tape_w1,
                  .b1 = *tape_b1,
                  .w2 = *tape_w2,
                  .b2 = *tape_b2,
                  .activation = Activation::kGlu},
                 max_tape_rows, rounds, "tape_hidden", rows_of(y, count.inputs, count.tapes));
  return {y, hidden, tape_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_ffn_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& hidden, const Tensor& tape_hidden,
    std::optional<int64_t> num_input_rows, const std::optional<Tensor>& bounds,
    const std::string& activation, const Tensor& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const std::optional<Tensor>& tape_w1, const std::optional<Tensor>& tape_b1,
    const std::optional<Tensor>& tape_w2, const std::optional<Tensor>& tape_b2) {
  check_dual_ffn_bwd(dy_any, x_any, hidden, tape_hidden, num_input_rows, bounds, w1, tape_w1,
                     kCpuDtypes);
  check_ffns(w1, b1, w2, b2, tape_w1, tape_b1, tape_w2, tape_b2, x_any);
  const Tensor dy = dense(dy_any), x = with_dense_rows(x_any);
  const RowCounts count = checked_row_counts(num_input_rows, tape_hidden.size(0), bounds, x.size(0),
                                             tape_w1.has_value());
  const Tensor dx = new_output("dx", x, {x.size(0), x.size(1)}, x.scalar_type());
  zero_rows_from(dx, count.used());
  const auto run_backward = rounds_rows(x, bounds) ? backward_rounded : backward;
  const CpuFFNGradients input = run_backward(
      rows_of(dy, 0, count.inputs), rows_of(x, 0, count.inputs),
      {.w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2, .activation = activation_of(activation)},
      rows_of(hidden, 0, count.inputs), rows_of(dx, 0, count.inputs));
  if (!tape_w1) {
    const auto none = [&x] { return torch::stable::new_empty(x, {0}); };
    return {dx, input.dw1, input.db1, input.dw2, input.db2, none(), none(), none(), none()};
  }
  const CpuFFNGradients tape =
      run_backward(rows_of(dy, count.inputs, count.tapes), rows_of(x, count.inputs, count.tapes),
                   {.w1 = *tape_w1,
                    .b1 = *tape_b1,
                    .w2 = *tape_w2,
                    .b2 = *tape_b2,
                    .activation = Activation::kGlu},
                   rows_of(tape_hidden, 0, count.tapes), rows_of(dx, count.inputs, count.tapes));
  return {dx, input.dw1, input.db1, input.dw2, input.db2, tape.dw1, tape.db1, tape.dw2, tape.db2};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("dual_ffn", ADATAPE_KERNEL("dual_ffn", &adatape::dual_ffn));
  m.impl("dual_ffn_bwd", ADATAPE_KERNEL("dual_ffn_bwd", &adatape::dual_ffn_bwd));
}
