// Residual addition and the LayerNorm of the sum, on the CPU: allocation, tasks, registration.

#include <algorithm>
#include <tuple>

#include "cpu_tensors.h"

namespace adatape {
namespace {

// Returns the parameter (dim,) of a LayerNorm as contiguous float32, as the kernels take it.
Tensor as_float(const Tensor& parameter) {
  return dense(torch::stable::to(parameter, ScalarType::Float));
}

// Returns `x` with dense rows; a dtype that the kernels do not read becomes float32.
Tensor readable(const Tensor& x) {
  const bool known = std::ranges::find(kCpuDtypes, x.scalar_type()) != std::end(kCpuDtypes);
  return with_dense_rows(known ? x : torch::stable::to(x, ScalarType::Float));
}

// Returns x + branch, added in double precision and then rounded to the dtype of `x`.
Tensor sum_in_double(const Tensor& x, const Tensor& branch) {
  const Tensor summand = dense(torch::stable::to(x, ScalarType::Double)), other = dense(branch);
  Tensor sum = new_output("sum", summand, {x.size(0), x.size(1)}, ScalarType::Double);
  const double* const a = summand.const_data_ptr<double>();
  const double* const b = other.const_data_ptr<double>();
  double* const to = sum.mutable_data_ptr<double>();
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = a[i] + b[i];
  return torch::stable::to(sum, x.scalar_type());
}

// Returns a row (1, dim) that changes no bit of what it is added to: of minus zeros.
Tensor neutral_row(const Tensor& x) {
  Tensor row = new_output("branch", x, {1, x.size(1)}, ScalarType::Float);
  std::fill_n(row.mutable_data_ptr<float>(), x.size(1), -0.0f);
  return row;
}

struct CpuAddLayerNormOutputs {
  Tensor total;   // (rows, dim), as x
  Tensor normed;  // (rows, dim), as x
  Tensor mean;    // (rows,), float32
  Tensor rstd;    // (rows,), float32
};

CpuAddLayerNormOutputs allocate_outputs(const Tensor& x) {
  return {.total = new_output("total", x, {x.size(0), x.size(1)}, x.scalar_type()),
          .normed = new_output("normed", x, {x.size(0), x.size(1)}, x.scalar_type()),
          .mean = new_output("mean", x, {x.size(0)}, ScalarType::Float),
          .rstd = new_output("rstd", x, {x.size(0)}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x_any,
                                                          const Tensor& branch_any,
                                                          const Tensor& weight_any,
                                                          const Tensor& bias_any, double eps) {
  check_add_layer_norm(x_any, branch_any, weight_any, bias_any, eps, kCpuDtypes);
  // The kernels add in float32, for which a branch in double precision would first be rounded.
  const bool wide = branch_any.scalar_type() == ScalarType::Double;
  const Tensor x = with_dense_rows(wide ? sum_in_double(x_any, branch_any) : x_any);
  const Tensor branch = wide ? neutral_row(x) : readable(branch_any);
  const Tensor weight = as_float(weight_any), bias = as_float(bias_any);
  const CpuAddLayerNormOutputs outputs = allocate_outputs(x);

  const CpuAddLayerNormParams p{
      .x = x.data_ptr(),
      .stride_x = x.stride(0),
      .branch = branch.data_ptr(),
      .stride_branch = wide ? 0 : branch.stride(0),
      .weight = weight.const_data_ptr<float>(),
      .bias = bias.const_data_ptr<float>(),
      .total = outputs.total.data_ptr(),
      .normed = outputs.normed.data_ptr(),
      .mean = outputs.mean.mutable_data_ptr<float>(),
      .rstd = outputs.rstd.mutable_data_ptr<float>(),
      .dim = x.size(1),
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(x),
      .branch_dtype = dtype_of(branch),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(x.size(0), kLayerNormRows,
                [&](int64_t first, int64_t count) { chosen.add_layer_norm_fwd(p, first, count); });
  return {outputs.total, outputs.normed, outputs.mean, outputs.rstd};
}

struct CpuAddLayerNormGradients {
  Tensor dx;             // (rows, dim), as total
  Tensor dweight_parts;  // (blocks of kLayerNormRows rows, dim), float32
  Tensor dbias_parts;    // the same
};

CpuAddLayerNormGradients allocate_gradients(const Tensor& total) {
  const int64_t rows = total.size(0), dim = total.size(1);
  const int64_t blocks = (rows + kLayerNormRows - 1) / kLayerNormRows;
  return {.dx = new_output("dx", total, {rows, dim}, total.scalar_type()),
          .dweight_parts = new_output("dweight_parts", total, {blocks, dim}, ScalarType::Float),
          .dbias_parts = new_output("dbias_parts", total, {blocks, dim}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& dtotal_any, const Tensor& dnormed_any, const Tensor& total_any,
    const Tensor& weight_any, const Tensor& mean_any, const Tensor& rstd_any) {
  check_add_layer_norm_bwd(dtotal_any, dnormed_any, total_any, weight_any, mean_any, rstd_any,
                           kCpuDtypes);
  const Tensor total = dense(total_any);
  const ScalarType dtype = total.scalar_type();
  const Tensor dtotal = with_dense_rows(torch::stable::to(dtotal_any, dtype));
  const Tensor dnormed = with_dense_rows(torch::stable::to(dnormed_any, dtype));
  const Tensor weight = as_float(weight_any), mean = dense(mean_any), rstd = dense(rstd_any);
  const CpuAddLayerNormGradients gradients = allocate_gradients(total);

  const CpuAddLayerNormBwdParams p{
      .dtotal = dtotal.data_ptr(),
      .stride_dtotal = dtotal.stride(0),
      .dnormed = dnormed.data_ptr(),
      .stride_dnormed = dnormed.stride(0),
      .total = total.data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .mean = mean.const_data_ptr<float>(),
      .rstd = rstd.const_data_ptr<float>(),
      .dx = gradients.dx.data_ptr(),
      .dweight_parts = gradients.dweight_parts.mutable_data_ptr<float>(),
      .dbias_parts = gradients.dbias_parts.mutable_data_ptr<float>(),
      .dim = total.size(1),
      .dtype = dtype_of(total),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(total.size(0), kLayerNormRows, [&](int64_t first, int64_t count) {
    chosen.add_layer_norm_bwd(p, first / kLayerNormRows, count);
  });
  return {gradients.dx, sum_of_parts(gradients.dweight_parts, weight_any.scalar_type()),
          sum_of_parts(gradients.dbias_parts, weight_any.scalar_type())};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("add_layer_norm", ADATAPE_KERNEL("add_layer_norm", &adatape::add_layer_norm));
  m.impl("add_layer_norm_bwd", ADATAPE_KERNEL("add_layer_norm_bwd", &adatape::add_layer_norm_bwd));
}
