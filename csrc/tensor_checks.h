// What the ops of both devices ask of one argument: its shape, dtype and device, which the host
// knows without a look at any value.
//
// An op is called by whoever finds it under torch.ops, so that no argument is trusted. A look takes
// a few nanoseconds, because it makes no trip through torch's dispatcher.

#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string>

#include "stable_torch.h"

namespace adatape {

// The dtypes of an op's first argument that a device's kernels are compiled for.
using Dtypes = std::span<const ScalarType>;

// Stands for a size that may be anything.
constexpr int64_t kAnySize = -1;

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Returns a shape as Python writes it; a size that may be anything reads "any".
template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  size_t number = 0;
  for (const int64_t size : sizes) {
    text += (number++ ? ", " : "") + (size == kAnySize ? "any" : std::to_string(size));
  }
  return text + (number == 1 ? ",)" : ")");
}

inline bool on_same_device(const Tensor& x, const Tensor& like) {
  return x.is_cuda() == like.is_cuda() && x.is_cpu() == like.is_cpu() &&
         (!x.is_cuda() || x.get_device_index() == like.get_device_index());
}

inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (size != kAnySize && x.size(d) != size) return false;
    ++d;
  }
  return true;
}

// Refuses None, which the dispatcher passes on as a tensor that is not defined.
inline void check_defined(const char* name, const Tensor& x) {
  if (!x.defined()) refuse(name, ": expected a tensor, got None");
}

// Refuses a tensor that lies elsewhere than `like`.
inline void check_device(const char* name, const Tensor& x, const Tensor& like) {
  if (!on_same_device(x, like)) {
    refuse(name, ": expected a tensor on the device of the op's other arguments, got another");
  }
}

// Refuses a tensor of another dtype, of other sizes, or on another device than `like`.
inline void check_tensor(const char* name, const Tensor& x, const Tensor& like, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  check_defined(name, x);
  if (x.scalar_type() != dtype || !has_sizes(x, sizes)) {
    refuse(name, ": expected ", name_of(dtype), " ", text_of(sizes), ", got ",
           name_of(x.scalar_type()), " ", text_of(x.sizes()));
  }
  check_device(name, x, like);
}

// Refuses an op's first argument, which decides the dtype and the device of the others, if no
// kernel is compiled for it.
inline void check_first(const char* name, const Tensor& x, Dtypes dtypes,
                        std::initializer_list<int64_t> sizes) {
  check_defined(name, x);
  bool known = false;
  for (const ScalarType dtype : dtypes) known |= x.scalar_type() == dtype;
  if (known && has_sizes(x, sizes)) return;
  std::string names;
  for (const ScalarType dtype : dtypes)
    names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  refuse(name, ": expected ", names, " ", text_of(sizes), ", got ", name_of(x.scalar_type()), " ",
         text_of(x.sizes()));
}

// Refuses a number outside `lowest` to `most`.
inline void check_range(const char* name, int64_t value, int64_t lowest, int64_t most) {
  if (value < lowest || value > most) {
    refuse(name, ": expected ", lowest, " to ", most, ", got ", value);
  }
}

// Offsets, counts and the numbers of rows that they stand for are int32.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

}  // namespace adatape
