// Bias and activation between the products of the two feed-forwards, in one pass.

#include "../kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// The tanh form of GELU is x · sigmoid(2u), u = sqrt(2 / π) (x + 0.044715 x³).
constexpr float kTwoRoot = 1.5957691216f, kCubic = 0.044715f;

Vec gelu(Vec x) { return x * sigmoid(kTwoRoot * (x + kCubic * x * x * x)); }

Vec gelu_slope(Vec x) {
  const Vec s = sigmoid(kTwoRoot * (x + kCubic * x * x * x));
  return s + x * s * (1.0f - s) * kTwoRoot * (1.0f + 3.0f * kCubic * x * x);
}

// Calls body(column, lanes) for whole vectors, then for what is left of the width.
template <class Body>
void for_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes);
  if (c < width) body(c, static_cast<int>(width - c));
}

template <class T>
Vec read(const T* from, int lanes) {
  return lanes == kLanes ? load(from) : load_some(from, lanes);
}
template <class T>
void write(T* to, Vec x, int lanes) {
  lanes == kLanes ? store(to, x) : store_some(to, x, lanes);
}

template <class T>
struct Rows {
  T* hidden;
  const T* bias;
  T* act;
  const T* dact;
  T* dhidden;

  Rows(const ActParams& p, int64_t row, int64_t hidden_width)
      : hidden(static_cast<T*>(p.hidden) + row * hidden_width),
        bias(static_cast<const T*>(p.bias)),
        act(static_cast<T*>(p.act) + row * p.width),
        dact(static_cast<const T*>(p.dact) + row * p.width),
        dhidden(static_cast<T*>(p.dhidden) + row * hidden_width) {}
};

template <class T>
void add_bias(const ActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const Rows<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
    });
  }
}

template <class T>
void gelu_forward(const ActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const Rows<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      if (p.bias) {
        write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
      }
      // What is saved is what is used, so that the backward recomputes the same activation.
      write(row.act + c, gelu(read(row.hidden + c, lanes)), lanes);
    });
  }
}

template <class T>
void gelu_backward(const ActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const Rows<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec slope = gelu_slope(read(row.hidden + c, lanes));
      write(row.dhidden + c, read(row.dact + c, lanes) * slope, lanes);
    });
  }
}

template <class T>
void glu_forward(const ActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const Rows<T> row(p, r, 2 * p.width);
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
void glu_backward(const ActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const Rows<T> row(p, r, 2 * p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec a = read(row.hidden + c, lanes), s = sigmoid(read(row.hidden + p.width + c, lanes));
      const Vec dact = read(row.dact + c, lanes);
      write(row.dhidden + c, dact * s, lanes);
      write(row.dhidden + p.width + c, dact * a * s * (1.0f - s), lanes);
    });
  }
}

}  // namespace

void bias(const ActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? add_bias<float>(p, first, count) : add_bias<bfloat16>(p, first, count);
}

void bias_gelu(const ActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? gelu_forward<float>(p, first, count)
                           : gelu_forward<bfloat16>(p, first, count);
}

void gelu_bwd(const ActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? gelu_backward<float>(p, first, count)
                           : gelu_backward<bfloat16>(p, first, count);
}

void bias_glu(const ActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? glu_forward<float>(p, first, count)
                           : glu_forward<bfloat16>(p, first, count);
}

void glu_bwd(const ActParams& p, int64_t first, int64_t count) {
  p.dtype == DType::kFloat ? glu_backward<float>(p, first, count)
                           : glu_backward<bfloat16>(p, first, count);
}

}  // namespace adatape::ADATAPE_ISA
