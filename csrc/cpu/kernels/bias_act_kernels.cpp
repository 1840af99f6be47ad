// Bias and activation between the products of the two feed-forwards, in one pass over each row.

#include "../cpu_kernels.h"
#include "columns.h"

namespace adatape::ADATAPE_ISA {
namespace {

// The logistic function of x and that of -x, which is 1 less the first, given exp(-|x|). Each has
// the precision of that also where it is tiny.
struct CpuGates {
  Vec open, closed;

  CpuGates(Vec x, Vec e) {
    const Vec large = 1.0f / (1.0f + e), small = e * large;
    open = x < 0.0f ? small : large;
    closed = x < 0.0f ? large : small;
  }
};

// The gates of a GLU, which multiply numbers that may be as large as a gate is small.
CpuGates glu_gates(Vec x) { return CpuGates(x, exp_to_smallest(negative_size(x))); }

// The tanh form of GELU equals x · sigmoid(2u) with u = sqrt(2 / π) · (x + 0.044715 x³). Its gate,
// the sigmoid, is 1 / (1 + e) with e = exp(-2u), which is 0 where e is infinite.
constexpr float kTwiceRoot = 1.5957691216f, kCubic = 0.044715f;

struct GeluTanh {
  static Vec value(Vec x) {
    const Vec above = max(broadcast(-kGateEnd), x);
    return above / (1.0f + inverse_odds(min(broadcast(kGateEnd), above)));
  }

  static Vec gradient(Vec x, Vec dact) {
    const Vec inner = min(broadcast(kGateEnd), max(broadcast(-kGateEnd), x));
    const Vec e = inverse_odds(inner), open = 1.0f / (1.0f + e);
    // The gate of -x, which is 1 where e is infinite.
    const Vec closed = min(e * open, broadcast(1.0f));
    const Vec steepness = kTwiceRoot + (3.0f * kTwiceRoot * kCubic) * (inner * inner);
    return dact * (open + open * closed * (inner * steepness));
  }

 private:
  // Returns exp(-2u).
  static Vec inverse_odds(Vec x) {
    return exp_to_infinity(x * (-kTwiceRoot - (kTwiceRoot * kCubic) * (x * x)));
  }
};

// The exact form of GELU, whose formula stands in activation.h.
struct Gelu {
  static Vec value(Vec x) {
    const Vec size = clamp(x > 0.0f ? x : -x);
    return (x > 0.0f ? x : Vec{}) - size * tail(size, bell(size));
  }

  static Vec gradient(Vec x, Vec dact) {
    const Vec size = clamp(x > 0.0f ? x : -x), density = bell(size), above = tail(size, density);
    const Vec signed_size = x > 0.0f ? size : -size;
    return dact * ((x > 0.0f ? 1.0f - above : above) + signed_size * density * kNormalDensity);
  }

 private:
  static Vec clamp(Vec size) { return size > kTailEnd ? broadcast(kTailEnd) : size; }

  // Returns exp(-size² / 2).
  static Vec bell(Vec size) { return exp(-0.5f * size * size); }

  static Vec tail(Vec size, Vec bell) {
    const Vec s = 1.0f / (1.0f + kTailPlace * size);
    Vec p = broadcast(kTail8);
    p = p * s + kTail7;
    p = p * s + kTail6;
    p = p * s + kTail5;
    p = p * s + kTail4;
    p = p * s + kTail3;
    p = p * s + kTail2;
    p = p * s + kTail1;
    p = p * s + kTail0;
    return bell * (s * p);
  }
};

// NaN stays NaN, and its slope is 1, as in torch.
struct Relu {
  static Vec value(Vec x) { return x <= 0.0f ? Vec{} : x; }
  static Vec gradient(Vec x, Vec dact) { return x <= 0.0f ? Vec{} : dact; }
};

// The places of one row in the matrices of the parameters.
template <class T>
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

template <class T, class Act>
void plain_forward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      if (p.bias) {
        write(row.hidden + c, read(row.hidden + c, lanes) + read(row.bias + c, lanes), lanes);
      }
      // The activation is that of hidden as it is stored, so that the backward, which has nothing
      // else, recomputes the same one.
      write(row.act + c, Act::value(read(row.hidden + c, lanes)), lanes);
    });
  }
}

// The gradient of a bias, summed over the rows of one block.
class BiasGradient {
 public:
  BiasGradient(const CpuBiasActParams& p, int64_t first, int64_t columns)
      : sums_(p.dbias_parts + first / kActRows * columns) {
    for_columns(columns, [&](int64_t c, int lanes) { write(sums_ + c, Vec{}, lanes); });
  }

  void add(int64_t column, Vec dhidden, int lanes) const {
    write(sums_ + column, read(sums_ + column, lanes) + dhidden, lanes);
  }

 private:
  float* sums_;
};

template <class T, class Act>
void plain_backward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  const BiasGradient dbias(p, first, p.width);
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec dact = read(row.dact + c, lanes);
      const Vec dhidden = Act::gradient(read(row.hidden + c, lanes), dact);
      write(row.dhidden + c, dhidden, lanes);
      dbias.add(c, dhidden, lanes);
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
      write(row.act + c, a * glu_gates(g).open, lanes);
    });
  }
}

template <class T>
void glu_backward(const CpuBiasActParams& p, int64_t first, int64_t count) {
  const BiasGradient dbias(p, first, 2 * p.width);
  for (int64_t r = first; r < first + count; ++r) {
    const ActRow<T> row(p, r, 2 * p.width);
    for_columns(p.width, [&](int64_t c, int lanes) {
      const Vec a = read(row.hidden + c, lanes), dact = read(row.dact + c, lanes);
      const CpuGates gates = glu_gates(read(row.hidden + p.width + c, lanes));
      const Vec da = dact * gates.open, dg = dact * (a * gates.open * gates.closed);
      write(row.dhidden + c, da, lanes);
      write(row.dhidden + p.width + c, dg, lanes);
      dbias.add(c, da, lanes);
      dbias.add(p.width + c, dg, lanes);
    });
  }
}

template <class T>
void forward_of(const CpuBiasActParams& p, int64_t first, int64_t count) {
  switch (p.activation) {
    case Activation::kGeluTanh:
      return plain_forward<T, GeluTanh>(p, first, count);
    case Activation::kGelu:
      return plain_forward<T, Gelu>(p, first, count);
    case Activation::kRelu:
      return plain_forward<T, Relu>(p, first, count);
    case Activation::kGlu:
      return glu_forward<T>(p, first, count);
  }
}

template <class T>
void backward_of(const CpuBiasActParams& p, int64_t first, int64_t count) {
  switch (p.activation) {
    case Activation::kGeluTanh:
      return plain_backward<T, GeluTanh>(p, first, count);
    case Activation::kGelu:
      return plain_backward<T, Gelu>(p, first, count);
    case Activation::kRelu:
      return plain_backward<T, Relu>(p, first, count);
    case Activation::kGlu:
      return glu_backward<T>(p, first, count);
  }
}

}  // namespace

void bias(const CpuBiasActParams& p, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { add_bias<decltype(number)>(p, first, count); });
}

void bias_act(const CpuBiasActParams& p, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { forward_of<decltype(number)>(p, first, count); });
}

void act_bwd(const CpuBiasActParams& p, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { backward_of<decltype(number)>(p, first, count); });
}

}  // namespace adatape::ADATAPE_ISA
