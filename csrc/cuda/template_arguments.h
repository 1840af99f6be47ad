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

// Calls body.template operator()<Unit>() where Unit is the widest access by which rows of every one
// of the tensors, of one dtype and width, can be moved: 16 bytes, 4, or 2.
template <class Body>
void with_unit_of(std::initializer_list<Tensor> tensors, const Body& body) {
  int64_t common = kAccessBytes;
  for (const Tensor& x : tensors) {
    const int64_t size = static_cast<int64_t>(x.element_size());
    const uint64_t bits = reinterpret_cast<uintptr_t>(x.data_ptr()) |
                          static_cast<uint64_t>(x.stride(0) * size) |
                          static_cast<uint64_t>(x.size(1) * size);
    while (bits % static_cast<uint64_t>(common) != 0) common /= 2;
  }
  if (common == kAccessBytes) return body.template operator()<uint4>();
  return common >= 4 ? body.template operator()<uint32_t>() : body.template operator()<uint16_t>();
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
