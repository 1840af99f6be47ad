// Bias and activation between the products of the two feed-forwards, in one pass over each row.

#include "../cpu_kernels.h"
#include "columns.h"

namespace adatape::ADATAPE_ISA {
namespace {

Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// The tanh form of GELU equals x · sigmoid(2u) with u = sqrt(2 / π) · (x + 0.044715 x³).
constexpr float kTwiceRoot = 1.5957691216f, kCubic = 0.044715f;

Vec gelu(Vec x) { return x * sigmoid(kTwiceRoot * (x + kCubic * x * x * x)); }

Vec gelu_slope(Vec x) {
  const Vec s = sigmoid(kTwiceRoot * (x + kCubic * x * x * x));
  return s + x * s * (1.0f - s) * kTwiceRoot * (1.0f + 3.0f * kCubic * x * x);
}

template <class T>
// The places of one row in the matrices of the parameters.
struct ActRow {
  T* hidden;
  const T* bias;
  T* act;
  const T* dact;
  T* dhidden;

  ActRow(const CpuBiasActParams& p, int64_t row, int64_t hidden_width)
      : hidden(static_cast<T*>(p.hidden) + row * hidden_width),
        bias(static_cast<const T*>(p.bias)),
        act(static_cast<T*>(p.act) + row * p.width),
        dact(static_cast<const T*>(p.dact) + row * p.width),
        dhidden(static_cast<T*>(p.dhidden) + row * hidden_width) {}
};

template <class T>
void add_bias(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
    });
  }
}

template <class T>
void gelu_forward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      if (p.bias) {
        write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
      }
      // The activation is that of hidden as it is stored, so that the backward, which has nothing
      // else, recomputes the same one.
      write(row.act + c, gelu(read(row.hidden + c, lanes)), lanes);
    });
  }
}

template <class T>
void gelu_backward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec slope = gelu_slope(read(row.hidden + c, lanes));
      write(row.dhidden + c, read(row.dact + c, lanes) * slope, lanes);
    });
  }
}

template <class T>
void glu_forward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, 2 * p.width);
    for_columns(p.bias ? 2 * p.width : 0, [&](int64_t c, int lanes) {
      write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
    });
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec a = read(row.hidden + c, lanes), g = read(row.hidden + p.width + c, lanes);
      write(row.act + c, a * sigmoid(g), lanes);
    });
  }
}

template <class T>
void glu_backward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, 2 * p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec a = read(row.hidden + c, lanes), s = sigmoid(read(row.hidden + p.width + c, lanes));
      const Vec dact = read(row.dact + c, lanes);
      write(row.dhidden + c, dact * s, lanes);
      write(row.dhidden + p.width + c, dact * a * s * (1.0f - s), lanes);
    });
  }
}

}  // namespace

void bias(const CpuBiasActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? add_bias<float>(p, first, count) : add_bias<bfloat16>(p, first, count);
}

void bias_gelu(const CpuBiasActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? gelu_forward<float>(p, first, count)
                           : gelu_forward<bfloat16>(p, first, count);
}

void gelu_bwd(const CpuBiasActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? gelu_backward<float>(p, first, count)
                           : gelu_backward<bfloat16>(p, first, count);
}

void bias_glu(const CpuBiasActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? glu_forward<float>(p, first, count)
                           : glu_forward<bfloat16>(p, first, count);
}

void glu_bwd(const CpuBiasActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? glu_backward<float>(p, first, count)
                           : glu_backward<bfloat16>(p, first, count);
}

}  // namespace adatape::ADATAPE_ISA
