// Makes template arguments of what is known only when an op is called: the type of the elements,
// and properties such as the alignment of rows.

#pragma once

#include <initializer_list>

#include "../op_checks.h"
#include "../stable_torch.h"
#include "device.cuh"

namespace adatape::cuda {

// The dtypes of an op's first argument that the kernels are compiled for.
constexpr ScalarType kCudaDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

// Calls body.template operator()<T>() where T is the type of the elements of `x`.
template <class Body>
void with_type_of(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Half:
      return body.template operator()<__half>();
    default:
      return body.template operator()<__nv_bfloat16>();
  }
}

// Calls body.template operator()<flags…>(), with the flags that follow as template arguments.
template <bool... Known, class Body>
void with_flags(const Body& body) {
  body.template operator()<Known...>();
}
template <bool... Known, class Body, class... Flags>
void with_flags(const Body& body, bool flag, Flags... flags) {
  flag ? with_flags<Known..., true>(body, flags...) : with_flags<Known..., false>(body, flags...);
}

// Returns whether every row of every tensor begins and ends at a multiple of 16 bytes. The last
// dimension of the tensors is contiguous.
inline bool rows_aligned(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors) {
    const int64_t elements = kAccessBytes / static_cast<int64_t>(x.element_size());
    if (reinterpret_cast<uintptr_t>(x.data_ptr()) % kAccessBytes != 0) return false;
    if (x.size(x.dim() - 1) % elements != 0) return false;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) {
      if (x.stride(d) % elements != 0) return false;
    }
  }
  return true;
}

}  // namespace adatape::cuda
