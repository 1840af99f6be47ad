// Stands in for CUDA's header of the same name: as much of float16 as csrc/cuda uses.

#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;

struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
