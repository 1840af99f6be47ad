// What the ops of every device share: short names for torch's stable ABI, refusals in one line,
// and tensors in the form that kernels take.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

// torch 2.13 brings the check that passes a message on; before it there is the one without.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace adatape {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws an error that Python sees as one line. A refusal of a bad value has the form
// "name: expected …, got …".
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Fills the rows of `x` from row `first` on with zeros.
inline void zero_rows_from(Tensor x, int64_t first) {
  if (first == x.size(0)) return;
  Tensor rows = torch::stable::narrow(x, 0, first, x.size(0) - first);
  torch::stable::zero_(rows);
}

}  // namespace adatape
