// What the ops of every device share: short names for torch's stable ABI, refusals in one line,
// and tensors in the form that kernels take.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

// torch 2.13 brings the check that passes a message on; before it there is the one without.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace adatape {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Returns a part of a message as text. A stream would do that by the locale, of which there may be
// two in a process, one of them in a C++ library that the compiler brought and torch did not load.
template <class Part>
std::string text_of_part(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(part));
    return text;
  } else if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}

// Throws an error that Python sees as one line. A refusal of a bad value has the form
// "name: expected …, got …".
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text_of_part(parts)));
}

// Fills the rows of `x` from row `first` on with zeros.
inline void zero_rows_from(Tensor x, int64_t first) {
  if (first == x.size(0)) return;
  Tensor rows = torch::stable::narrow(x, 0, first, x.size(0) - first);
  torch::stable::zero_(rows);
}

// Queries, keys and values, or their gradients: (rows, num_heads, head_dim) each.
struct HeadTensors {
  Tensor q, k, v;
};

// Returns views of the three parts of qkv (rows, 3, num_heads, head_dim).
inline HeadTensors parts_of(const Tensor& qkv) {
  return {.q = torch::stable::select(qkv, 1, 0),
          .k = torch::stable::select(qkv, 1, 1),
          .v = torch::stable::select(qkv, 1, 2)};
}

}  // namespace adatape
