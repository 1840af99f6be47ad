// Linear layers over few rows, without a call of torch, which would take longer than the product.

#pragma once

#include "cpu_tensors.h"

namespace adatape {

// So many multiply-adds take less time in one thread than what torch does beside its products. Its
// products in 16 bits prepare more.
constexpr int64_t most_small_products(DType dtype) {
  return dtype == DType::kFloat ? int64_t{1} << 16 : int64_t{1} << 18;
}

// Writes out = x · weightᵀ + bias, rounded once, in this thread alone. The rows of x (rows, depth)
// lie `stride_x` numbers apart, those of out (rows, columns) follow each other; all numbers have
// the dtype of weight (columns, depth).
inline void small_linear(const void* x, int64_t stride_x, int64_t rows, const Tensor& weight_any,
                         const Tensor& bias_any, void* out) {
  const Tensor weight = with_dense_rows(weight_any), bias = dense(bias_any);
  cpu_kernels().linear({.x = x,
                        .stride_x = stride_x,
                        .weight = weight.data_ptr(),
                        .stride_weight = weight.stride(0),
                        .bias = bias.data_ptr(),
                        .out = out,
                        .stride_out = weight.size(0),
                        .depth = weight.size(1),
                        .columns = weight.size(0),
                        .dtype = dtype_of(weight)},
                       0, rows);
}

}  // namespace adatape
