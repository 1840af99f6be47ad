// Bias and activation of the feed-forwards, between torch's own matrix products: registration.

#include <tuple>

#include "tensors.h"

namespace adatape {
namespace {

using Kernel = void (*)(const ActParams&, int64_t, int64_t);

constexpr int64_t kRowsPerTask = 16;

void run(const ActParams& p, int64_t rows, Kernel kernel) {
  run_tasks((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask;
    kernel(p, first, rows - first < kRowsPerTask ? rows - first : kRowsPerTask);
  });
}

// gates: how many columns of hidden make one of the activation.
Tensor forward(const Tensor& hidden, const Tensor& bias_any, int64_t gates, Kernel kernel) {
  const Tensor bias = torch::stable::contiguous(bias_any);
  const int64_t rows = hidden.size(0), width = hidden.size(1) / gates;
  if (!hidden.is_contiguous() || bias.numel() != hidden.size(1)) {
    refuse("hidden: expected a contiguous (rows, ", bias.numel(), ") matrix like bias, got (", rows,
           ", ", hidden.size(1), ")");
  }
  const Tensor act = torch::stable::new_empty(hidden, {rows, width});
  ActParams p{};
  p.hidden = hidden.data_ptr(), p.bias = bias.data_ptr(), p.act = act.data_ptr();
  p.width = width;
  p.dtype = dtype_of(hidden);
  run(p, rows, kernel);
  return act;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dact_any, const Tensor& hidden_any, int64_t gates,
                                    Kernel kernel) {
  const Tensor dact = torch::stable::contiguous(dact_any);
  const Tensor hidden = torch::stable::contiguous(hidden_any);
  const int64_t rows = hidden.size(0), width = hidden.size(1) / gates;
  const Tensor dhidden = torch::stable::new_empty(hidden, {rows, hidden.size(1)});
  const Tensor act = torch::stable::new_empty(hidden, {rows, width});
  ActParams p{};
  p.hidden = hidden.data_ptr(), p.act = act.data_ptr();
  p.dact = dact.data_ptr(), p.dhidden = dhidden.data_ptr();
  p.width = width;
  p.dtype = dtype_of(hidden);
  run(p, rows, kernel);
  return {dhidden, act};
}

Tensor bias_gelu(const Tensor& hidden, const Tensor& bias) {
  return forward(hidden, bias, 1, kernels().bias_gelu);
}
Tensor bias_glu(const Tensor& hidden, const Tensor& bias) {
  return forward(hidden, bias, 2, kernels().bias_glu);
}
std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& dact, const Tensor& hidden) {
  return backward(dact, hidden, 1, kernels().gelu_bwd);
}
std::tuple<Tensor, Tensor> glu_bwd(const Tensor& dact, const Tensor& hidden) {
  return backward(dact, hidden, 2, kernels().glu_bwd);
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cpu, m) {
  m.def("bias_gelu(Tensor(a!) hidden, Tensor bias) -> Tensor");
  m.def("bias_glu(Tensor(a!) hidden, Tensor bias) -> Tensor");
  m.def("gelu_bwd(Tensor dact, Tensor hidden) -> (Tensor dhidden, Tensor act)");
  m.def("glu_bwd(Tensor dact, Tensor hidden) -> (Tensor dhidden, Tensor act)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&adatape::bias_gelu));
  m.impl("bias_glu", TORCH_BOX(&adatape::bias_glu));
  m.impl("gelu_bwd", TORCH_BOX(&adatape::gelu_bwd));
  m.impl("glu_bwd", TORCH_BOX(&adatape::glu_bwd));
}
