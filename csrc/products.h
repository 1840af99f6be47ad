// torch's matrix products, views of matrices, and the names of activations: what both devices need
// for the two feed-forwards.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <string>

#include "activation.h"
#include "stable_torch.h"

namespace adatape {

// Returns the activation of input rows that has this name in Python.
inline Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  refuse("activation: expected 'gelu_tanh', 'gelu' or 'relu', got '", name, "'");
}

// Writes the product a · b to `out`.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (out.is_cpu()) {  // without a trip through the dispatcher
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
    return;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The call leaves a new reference to `out` on the stack, which this conversion releases.
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Writes x · weightᵀ + bias to `out`.
inline void linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight),
      torch::stable::detail::from(std::optional<Tensor>(bias)), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns a view of the transposed matrix `x`, made without a trip through the dispatcher.
inline Tensor transposed(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle view;
  constexpr int64_t kOffsetIncrement = 0;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, kOffsetIncrement, &view));
  return Tensor(view);
}

// Returns the sum of the rows of the matrix `x`.
inline Tensor column_sums(const Tensor& x) {
  const int64_t rows = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

// Returns a view of rows `first` to `first + count` of `x`, or `x` itself where these are all.
inline Tensor rows_of(const Tensor& x, int64_t first, int64_t count) {
  Tensor all = x;
  return first == 0 && count == x.size(0) ? x : torch::stable::narrow(all, 0, first, count);
}

}  // namespace adatape
