// Memory for the ops of every device: each request has a name, so that one that fails says what
// could not be had, for what, and how much was asked for.

#pragma once

#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "stable_torch.h"

// Returns the message of the calling thread's last exception inside torch. It is part of torch's
// stable ABI from 2.13 on, and null in an older torch.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace adatape {

// What a request for memory asked for in vain.
struct CannotAllocate {
  std::string name;  // what the memory was for
  int64_t bytes;     // the largest int64_t where they are more
};

// Returns torch's message about the call of it that failed last, or "" where torch is too old to
// tell.
inline std::string message_of_torch() {
  if (!torch_exception_get_what_without_backtrace) return "";
  const std::string all = torch_exception_get_what_without_backtrace();
  return all.substr(0, all.find('\n'));
}

// Returns the product of an element's size and all sizes, or the largest int64_t where it is more.
inline int64_t bytes_of(int64_t element_size, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t bytes = element_size;
  for (const int64_t size : sizes) {
    if (size <= 0) return 0;
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::numeric_limits<int64_t>::max();
  }
  return bytes;
}

inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// Throws in place of the exception that is being handled, which a request for memory has thrown.
[[noreturn]] inline void refuse_allocation(const char* name, int64_t element_size,
                                           torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const std::string why = message_of_torch();
  const auto tells_of = [&why](const char* word) { return why.find(word) != std::string::npos; };
  // A GPU's allocator is also where an earlier kernel's fault may come to light.
  if (!why.empty() && !tells_of("allocate") && !tells_of("overflow")) throw;
  throw CannotAllocate{name, bytes_of(element_size, sizes)};
}

// Returns an uninitialised tensor on the device of `like`, of its dtype if none is given.
inline Tensor allocate(const char* name, const Tensor& like,
                       torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::runtime_error&) {
    refuse_allocation(name, dtype ? size_of(*dtype) : like.element_size(), sizes);
  }
}

// Returns the same filled with zeros.
inline Tensor allocate_zeros(const char* name, const Tensor& like,
                             torch::headeronly::IntHeaderOnlyArrayRef sizes,
                             std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_zeros(like, sizes, dtype);
  } catch (const std::runtime_error&) {
    refuse_allocation(name, dtype ? size_of(*dtype) : like.element_size(), sizes);
  }
}

// Returns a vector of `count` copies of `value`.
template <class T>
std::vector<T> allocate_vector(const char* name, int64_t count, const T& value = T()) {
  try {
    return std::vector<T>(static_cast<size_t>(count), value);
  } catch (const std::exception&) {  // bad_alloc, or length_error where the count is absurd
    throw CannotAllocate{name, bytes_of(sizeof(T), {count})};
  }
}

inline Tensor contiguous_copy(const Tensor& x) {
  try {
    return torch::stable::contiguous(x);
  } catch (const std::runtime_error&) {
    refuse_allocation("a contiguous copy of an argument", x.element_size(), x.sizes());
  }
}

// Returns `x` itself where its last dimension is contiguous, as the kernels need it, else a copy.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1
             ? x
             : contiguous_copy(x);
}

// Returns `x` itself where it is contiguous, which costs no trip through the dispatcher, else a
// copy.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : contiguous_copy(x); }

// An op's name as an argument of a template.
template <size_t kSize>
struct OpName {
  char text[kSize];

  constexpr OpName(const char (&name)[kSize]) {
    for (size_t i = 0; i < kSize; ++i) text[i] = name[i];
  }
};

// Throws the exception that is being handled once more. Where it tells of a lack of memory, or of a
// call of torch that failed, it becomes one line that begins with the op's name.
[[noreturn]] inline void rethrow_for(const char* op) {
  try {
    throw;
  } catch (const CannotAllocate& wanted) {
    refuse(op, ": out of memory: cannot allocate ", wanted.bytes, " bytes for ", wanted.name);
  } catch (const std::bad_alloc&) {
    refuse(op, ": out of memory: cannot allocate memory for a list on the host");
  } catch (const std::runtime_error& error) {
    if (std::string_view(error.what()).find("API call failed") == std::string_view::npos) throw;
    const std::string why = message_of_torch();
    const bool known = !why.empty();
    refuse(op, ": ", known ? why : "a call of torch failed, perhaps for lack of memory: ",
           known ? "" : error.what());
  }
}

// Runs a boxed kernel, whose failures it reports under the op's name.
template <OpName name, auto kBoxed>
void named_kernel(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  try {
    kBoxed(stack, num_args, num_outputs);
  } catch (...) {
    rethrow_for(name.text);
  }
}

}  // namespace adatape

// The function as a kernel for the dispatcher, which fails under the name of the op.
#define ADATAPE_KERNEL(op, function) &adatape::named_kernel<op, TORCH_BOX(function)>
