// Bias and activation between the products of the two feed-forwards, in one pass each way.
//
// A block takes a strip of columns, a pack each lane, and a run of rows, one each warp at a time.

#pragma once

#include "../device.cuh"

namespace adatape::cuda {

struct BiasActParams {
  void* hidden;           // (rows, columns), contiguous
  const void* bias;       // (columns,), forward only
  void* act;              // (rows, width)
  const void* dact;       // (rows, width), backward only, as what follows
  void* dhidden;          // (rows, columns)
  float* dbias;           // (runs of rows, columns): the sums over each
  const int64_t* bounds;  // null, or [1] is the end of the rows in use
  int64_t first_row;      // where row 0 stands among the rows that `bounds` counts
  int64_t rows, width;    // columns are the width, or twice that where gated
};

constexpr int kBiasActThreads = 256;
constexpr int kBiasActWarps = kBiasActThreads / kWarpSize;
constexpr int kBiasActRun = 64;  // rows of a block
constexpr int kBiasActRegisters = 80;
constexpr int kBiasActBlocks = blocks_at_once(kBiasActThreads, kBiasActRegisters);

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The tanh form of GELU is x · sigmoid(2u), u = sqrt(2 / π) (x + 0.044715 x³).
constexpr float kTwoRoot = 1.5957691216f, kCubic = 0.044715f;

__device__ inline float gelu_gate(float x) { return sigmoid(kTwoRoot * (x + kCubic * x * x * x)); }
__device__ inline float gelu_slope(float x, float gate) {
  return gate + x * gate * (1.0f - gate) * kTwoRoot * (1.0f + 3.0f * kCubic * x * x);
}

__device__ inline bool row_in_use(const BiasActParams& p, int64_t row) {
  return p.bounds == nullptr || p.first_row + row < p.bounds[1];
}

// hidden += bias, rounded to what is stored; zeros in unused rows, whatever stood there.
template <bool Aligned, class T>
__device__ Pack<T> add_bias(T* hidden, const Pack<T>& bias, int64_t d, int64_t width, bool used) {
  constexpr int kPack = Pack<T>::kSize;
  float sum[kPack] = {};
  if (used) {
    const Pack<T> x = load_pack<Aligned>(hidden, d, width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[i] = to_float(x.x[i]) + to_float(bias.x[i]);
  }
  store_pack<Aligned>(hidden, d, width, sum);
  Pack<T> stored;
#pragma unroll
  for (int i = 0; i < kPack; ++i) stored.x[i] = from_float<T>(sum[i]);
  return stored;
}

// hidden += bias; act = gelu(hidden), or a · sigmoid(g) where Gated, [a, g] = hidden.
template <class T, bool Aligned, bool Gated>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks)
    bias_act_kernel(BiasActParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t columns = Gated ? 2 * p.width : p.width;
  const int64_t d = (int64_t{blockIdx.y} * kWarpSize + threadIdx.x % kWarpSize) * kPack;
  if (d >= p.width) return;
  const T* const bias = static_cast<const T*>(p.bias);
  const Pack<T> b = load_pack<Aligned>(bias, d, p.width);
  Pack<T> gate_b;
  if constexpr (Gated) gate_b = load_pack<Aligned>(bias + p.width, d, p.width);
  for (int n = threadIdx.x / kWarpSize; n < kBiasActRun; n += kBiasActWarps) {
    const int64_t row = int64_t{blockIdx.x} * kBiasActRun + n;
    if (row >= p.rows) return;
    const bool used = row_in_use(p, row);
    T* const hidden = static_cast<T*>(p.hidden) + row * columns;
    const Pack<T> h = add_bias<Aligned>(hidden, b, d, p.width, used);
    float act[kPack];
    if constexpr (Gated) {
      const Pack<T> g = add_bias<Aligned>(hidden + p.width, gate_b, d, p.width, used);
#pragma unroll
      for (int i = 0; i < kPack; ++i) act[i] = to_float(h.x[i]) * sigmoid(to_float(g.x[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) act[i] = to_float(h.x[i]) * gelu_gate(to_float(h.x[i]));
    }
    store_pack<Aligned>(static_cast<T*>(p.act) + row * p.width, d, p.width, act);
  }
}

// dhidden from dact and hidden, act once more, and the sum of dhidden over the block's rows.
template <class T, bool Aligned, bool Gated>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks)
    bias_act_bwd_kernel(BiasActParams p) {
  constexpr int kPack = Pack<T>::kSize, kGates = Gated ? 2 : 1;
  __shared__ float sums[kBiasActWarps][kWarpSize * kPack];
  const int64_t columns = kGates * p.width;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t strip = int64_t{blockIdx.y} * kWarpSize * kPack, d = strip + lane * kPack;
  float dbias[kGates][kPack] = {};
  for (int n = warp; n < kBiasActRun; n += kBiasActWarps) {
    const int64_t row = int64_t{blockIdx.x} * kBiasActRun + n;
    if (row >= p.rows || d >= p.width) break;
    const T* const hidden = static_cast<const T*>(p.hidden) + row * columns;
    T* const dhidden = static_cast<T*>(p.dhidden) + row * columns;
    const Pack<T> dact =
        load_pack<Aligned>(static_cast<const T*>(p.dact) + row * p.width, d, p.width);
    const Pack<T> h = load_pack<Aligned>(hidden, d, p.width);
    float act[kPack], dh[kPack];
    if constexpr (Gated) {
      const Pack<T> g = load_pack<Aligned>(hidden + p.width, d, p.width);
      float dg[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float gate = sigmoid(to_float(g.x[i]));
        act[i] = to_float(h.x[i]) * gate;
        dh[i] = to_float(dact.x[i]) * gate;
        dg[i] = to_float(dact.x[i]) * act[i] * (1.0f - gate);
        dbias[1][i] += dg[i];
      }
      store_pack<Aligned>(dhidden + p.width, d, p.width, dg);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float x = to_float(h.x[i]), gate = gelu_gate(x);
        act[i] = x * gate;
        dh[i] = to_float(dact.x[i]) * gelu_slope(x, gate);
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
      float* const to = p.dbias + int64_t{blockIdx.x} * columns + gate * p.width;
      if (strip + c < p.width) to[strip + c] = sum;
    }
    __syncthreads();  // until these sums have been read
  }
}

// Zeros in the unused rows of hidden (rows, width).
template <class T, bool Aligned>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks)
    clear_unused_kernel(BiasActParams p) {
  constexpr int kPack = Pack<T>::kSize;
  const float zeros[kPack] = {};
  const int64_t row = int64_t{blockIdx.x} * kBiasActWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows || row_in_use(p, row)) return;
  for (int64_t d = threadIdx.x % kWarpSize * kPack; d < p.width; d += kWarpSize * kPack) {
    store_pack<Aligned>(static_cast<T*>(p.hidden) + row * p.width, d, p.width, zeros);
  }
}

}  // namespace adatape::cuda
