// torch's matrix products and views of matrices, for both forms of the two feed-forwards.

#pragma once

#include <array>

#include "tensors.h"

namespace adatape {

// out = a b, written where `out` lies.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = x weightᵀ + bias, written where `out` lies.
inline void linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight),
      torch::stable::detail::from(std::optional<Tensor>(bias)), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// A view of the matrix x, made without a trip through the dispatcher.
inline Tensor transposed(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle view;
  constexpr int64_t kOffsetIncrement = 0;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, kOffsetIncrement, &view));
  return Tensor(view);
}

inline Tensor column_sums(const Tensor& x) {
  const int64_t rows = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

inline Tensor rows_of(const Tensor& x, int64_t first, int64_t count) {
  Tensor all = x;
  return first == 0 && count == x.size(0) ? x : torch::stable::narrow(all, 0, first, count);
}

}  // namespace adatape
