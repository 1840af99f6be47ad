// The activation between the products of the two feed-forwards, in one pass each way.
//
// A block takes a strip of columns and kBiasActRows rows. Each lane has a pack of the strip's
// columns, and each warp takes one row at a time.

#pragma once

#include "../../activation.h"
#include "../device.cuh"

namespace adatape::cuda {

// All matrices are contiguous. They have `width` columns, save for hidden and dhidden, which have
// twice as many where the activation is gated (a GLU).
struct CudaBiasActParams {
  void* hidden;                // (rows, width or 2 · width), the pre-activations
  void* act = nullptr;         // (rows, width), the activations
  const void* dact = nullptr;  // (rows, width), backward only
  void* dhidden = nullptr;     // shaped as hidden, backward only
  // The sums of dhidden over every kBiasActRows rows, (blocks of rows, columns of hidden), backward
  // only.
  float* dbias_parts = nullptr;
  // How many rows of the buffer are in use, on the device; null where the host knows that all are.
  const int64_t* num_rows = nullptr;
  int64_t first_row;  // the row of the buffer that is row 0 here
  int64_t rows;
  int64_t width;
};

constexpr int kBiasActThreads = 256;
constexpr int kBiasActWarps = kBiasActThreads / kWarpSize;
constexpr int kBiasActRows = 64;       // a block takes so many
constexpr int kBiasActRegisters = 80;  // a thread takes no more
constexpr int kBiasActBlocks = blocks_at_once(kBiasActThreads, kBiasActRegisters);

// The logistic function of x and that of -x, which is 1 less the first. Each has its full precision
// also where it is tiny.
struct CudaGates {
  float open, closed;
};
__device__ inline CudaGates gates(float x) {
  const float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e), small = e * large;
  return x < 0.0f ? CudaGates{small, large} : CudaGates{large, small};
}

// Returns act(x), and sets `slope` to its derivative at x.
template <Activation A>
__device__ float activate(float x, float& slope);

// The tanh form of GELU equals x · sigmoid(2u) with u = sqrt(2 / π) · (x + 0.044715 x³).
template <>
__device__ inline float activate<Activation::kGeluTanh>(float x, float& slope) {
  constexpr float kTwiceRoot = 1.5957691216f, kCubic = 0.044715f;
  const float above = x < -kGateEnd ? -kGateEnd : x;  // NaN stays NaN
  const float inner = above > kGateEnd ? kGateEnd : above;
  const CudaGates gate = gates(kTwiceRoot * (inner + kCubic * inner * inner * inner));
  const float steepness = kTwiceRoot * (1.0f + 3.0f * kCubic * inner * inner);
  slope = gate.open + inner * gate.open * gate.closed * steepness;
  return above * gate.open;
}

// The exact form of GELU, whose formula stands in activation.h.
template <>
__device__ inline float activate<Activation::kGelu>(float x, float& slope) {
  const float size = fabsf(x) > kTailEnd ? kTailEnd : fabsf(x);  // NaN stays NaN
  const float bell = expf(-0.5f * size * size), s = 1.0f / (1.0f + kTailPlace * size);
  float p = kTail8;
  p = p * s + kTail7;
  p = p * s + kTail6;
  p = p * s + kTail5;
  p = p * s + kTail4;
  p = p * s + kTail3;
  p = p * s + kTail2;
  p = p * s + kTail1;
  p = p * s + kTail0;
  const float tail = bell * (s * p), signed_size = x > 0.0f ? size : -size;
  slope = (x > 0.0f ? 1.0f - tail : tail) + signed_size * bell * kNormalDensity;
  return (x > 0.0f ? x : 0.0f) - size * tail;
}

// NaN stays NaN, and its slope is 1, as in torch.
template <>
__device__ inline float activate<Activation::kRelu>(float x, float& slope) {
  slope = x <= 0.0f ? 0.0f : 1.0f;
  return x <= 0.0f ? 0.0f : x;
}

__device__ inline bool row_in_use(const CudaBiasActParams& p, int64_t row) {
  return p.num_rows == nullptr || p.first_row + row < *p.num_rows;
}

// Loads a pack of hidden. In a row that is not in use it becomes zero, whatever stood there.
template <bool Aligned, class T>
__device__ Pack<T> load_hidden(T* hidden, int64_t d, int64_t width, bool used) {
  constexpr int kPack = Pack<T>::kSize;
  if (used) return load_pack<Aligned>(hidden, d, width);
  const float zeros[kPack] = {};
  store_pack<Aligned>(hidden, d, width, zeros);
  Pack<T> stored;
#pragma unroll
  for (int i = 0; i < kPack; ++i) stored.x[i] = from_float<T>(0.0f);
  return stored;
}

// Writes act: the activation of hidden or, for a GLU and hidden = [a, g], a · sigmoid(g).
template <class T, bool Aligned, Activation A>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks) act_kernel(CudaBiasActParams p) {
  constexpr int kPack = Pack<T>::kSize;
  constexpr bool kGated = A == Activation::kGlu;
  const int64_t columns = kGated ? 2 * p.width : p.width;
  const int64_t d = (int64_t{blockIdx.y} * kWarpSize + threadIdx.x % kWarpSize) * kPack;
  if (d >= p.width) return;
  for (int n = threadIdx.x / kWarpSize; n < kBiasActRows; n += kBiasActWarps) {
    const int64_t row = int64_t{blockIdx.x} * kBiasActRows + n;
    if (row >= p.rows) return;
    const bool used = row_in_use(p, row);
    T* const hidden = static_cast<T*>(p.hidden) + row * columns;
    const Pack<T> h = load_hidden<Aligned>(hidden, d, p.width, used);
    float act[kPack];
    if constexpr (kGated) {
      const Pack<T> g = load_hidden<Aligned>(hidden + p.width, d, p.width, used);
#pragma unroll
      for (int i = 0; i < kPack; ++i) act[i] = to_float(h.x[i]) * gates(to_float(g.x[i])).open;
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        float slope;
        act[i] = activate<A>(to_float(h.x[i]), slope);
      }
    }
    store_pack<Aligned>(static_cast<T*>(p.act) + row * p.width, d, p.width, act);
  }
}

// Static shared memory of a block of the backward: each warp's sums over its rows.
template <class T>
constexpr int64_t kBiasActBwdStaticBytes =
    kBiasActWarps * kWarpSize * Pack<T>::kSize * int64_t{sizeof(float)};

// Writes dhidden, given dact and hidden, then act once more, and the sum of dhidden over the
// block's rows.
template <class T, bool Aligned, Activation A>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks)
    bias_act_bwd_kernel(CudaBiasActParams p) {
  constexpr bool kGated = A == Activation::kGlu;
  constexpr int kPack = Pack<T>::kSize, kGates = kGated ? 2 : 1;
  __shared__ float sums[kBiasActWarps][kWarpSize * kPack];
  const int64_t columns = kGates * p.width;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t strip = int64_t{blockIdx.y} * kWarpSize * kPack, d = strip + lane * kPack;
  float dbias[kGates][kPack] = {};
  for (int n = warp; n < kBiasActRows; n += kBiasActWarps) {
    const int64_t row = int64_t{blockIdx.x} * kBiasActRows + n;
    if (row >= p.rows || d >= p.width) break;
    const T* const hidden = static_cast<const T*>(p.hidden) + row * columns;
    T* const dhidden = static_cast<T*>(p.dhidden) + row * columns;
    const Pack<T> dact =
        load_pack<Aligned>(static_cast<const T*>(p.dact) + row * p.width, d, p.width);
    const Pack<T> h = load_pack<Aligned>(hidden, d, p.width);
    float act[kPack], dh[kPack];
    if constexpr (kGated) {
      const Pack<T> g = load_pack<Aligned>(hidden + p.width, d, p.width);
      float dg[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const CudaGates gate = gates(to_float(g.x[i]));
        act[i] = to_float(h.x[i]) * gate.open;
        dh[i] = to_float(dact.x[i]) * gate.open;
        dg[i] = to_float(dact.x[i]) * (act[i] * gate.closed);
        dbias[1][i] += dg[i];
      }
      store_pack<Aligned>(dhidden + p.width, d, p.width, dg);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        float slope;
        act[i] = activate<A>(to_float(h.x[i]), slope);
        // Where ReLU is flat, not even an infinite gradient passes.
        const bool flat = A == Activation::kRelu && slope == 0.0f;
        dh[i] = flat ? 0.0f : to_float(dact.x[i]) * slope;
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) dbias[0][i] += dh[i];
    store_pack<Aligned>(dhidden, d, p.width, dh);
    store_pack<Aligned>(static_cast<T*>(p.act) + row * p.width, d, p.width, act);
  }

  for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sums[warp][lane * kPack + i] = dbias[gate][i];
    __syncthreads();
    for (int c = threadIdx.x; c < kWarpSize * kPack; c += kBiasActThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kBiasActWarps; ++w) sum += sums[w][c];
      float* const to = p.dbias_parts + int64_t{blockIdx.x} * columns + gate * p.width;
      if (strip + c < p.width) to[strip + c] = sum;
    }
    __syncthreads();  // these sums have been read by all
  }
}

// Writes zeros to the rows of hidden (rows, width) that are not in use.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks)
    clear_unused_kernel(CudaBiasActParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const float zeros[kPack] = {};
  const int64_t row = int64_t{blockIdx.x} * kBiasActWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows || row_in_use(p, row)) return;
  for (int64_t d = threadIdx.x % kWarpSize * kPack; d < p.width; d += kWarpSize * kPack) {
    store_pack<Aligned>(static_cast<T*>(p.hidden) + row * p.width, d, p.width, zeros);
  }
}

}  // namespace adatape::cuda
