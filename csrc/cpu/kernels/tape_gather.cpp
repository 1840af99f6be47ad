// Variable-length gathering: see adatape_kernels/reference.py for the formulas.

#include "../kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

template <class T>
const T* bank_row(const Bank& bank, int64_t example, int64_t entry) {
  return static_cast<const T*>(bank.data) + example * bank.example + entry * bank.row;
}

// to[0 …] = Σ_j weights[j] · row j[d …] for `vecs` vectors. No processor foresees scattered rows:
// those of the next step are fetched meanwhile.
template <int vecs, class T>
void merge(const GatherParams& p, int64_t example, const int32_t* entries, const int32_t* next,
           const float* weights, int64_t d, T* to) {
  constexpr int kLine = 64 / sizeof(T);
  Vec sums[vecs] = {};
  for (int64_t j = 0; j < p.topk; ++j) {
    const T* const row = bank_row<T>(p.bank, example, entries[j]) + d;
    const T* const later = bank_row<T>(p.bank, example, next[j]) + d;
    for (int c = 0; c < vecs * kLanes; c += kLine) __builtin_prefetch(later + c);
    for (int v = 0; v < vecs; ++v) sums[v] += weights[j] * load(row + v * kLanes);
  }
  for (int v = 0; v < vecs; ++v) store(to + v * kLanes, sums[v]);
}

template <class T>
void forward(const GatherParams& p, int64_t i) {
  constexpr int kVecs = 8;  // that one lookup of a row serves
  const int64_t count = p.offsets[i + 1] - p.offsets[i], width = p.bank.width;
  for (int64_t s = 0; s < count; ++s) {
    const int32_t* const entries = p.indices + (i * p.steps + s) * p.topk;
    const int32_t* const next = s + 1 < count ? entries + p.topk : entries;
    const float* const weights = p.weights + (i * p.steps + s) * p.topk;
    T* const to = static_cast<T*>(p.tape) + (p.offsets[i] + s) * p.tape_row;
    int64_t d = 0;
    for (; d + kVecs * kLanes <= width; d += kVecs * kLanes) {
      merge<kVecs>(p, i, entries, next, weights, d, to + d);
    }
    for (; d + kLanes <= width; d += kLanes) merge<1>(p, i, entries, next, weights, d, to + d);
    for (; d < width; ++d) {
      float sum = 0.0f;
      for (int64_t j = 0; j < p.topk; ++j) {
        sum += weights[j] * to_float(bank_row<T>(p.bank, i, entries[j])[d]);
      }
      to[d] = from_float<T>(sum);
    }
  }
}

template <class T>
void backward(const GatherParams& p, int64_t i) {
  const int64_t count = p.offsets[i + 1] - p.offsets[i], width = p.bank.width;
  for (int64_t s = 0; s < p.steps; ++s) {
    float* const dweights = p.dweights + (i * p.steps + s) * p.topk;
    const int32_t* const entries = p.indices + (i * p.steps + s) * p.topk;
    const T* const dtape = static_cast<const T*>(p.tape) + (p.offsets[i] + s) * p.tape_row;
    for (int64_t j = 0; j < p.topk; ++j) {
      dweights[j] = 0.0f;
      if (s >= count) continue;
      const T* const row = bank_row<T>(p.bank, i, entries[j]);
      Vec products = {};
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) products += load(row + d) * load(dtape + d);
      const int tail = static_cast<int>(width - d);
      dweights[j] = sum(products + load_some(row + d, tail) * load_some(dtape + d, tail));
    }
  }
}

template <class From, class To>
void add_up(const Reader* first, const Reader* last, const void* rows, int64_t stride, void* out,
            int64_t width) {
  const auto row = [&](const Reader* reader) {
    return static_cast<const From*>(rows) + reader->row * stride;
  };
  To* const to = static_cast<To*>(out);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Vec sum = {};
    for (const Reader* r = first; r != last; ++r) sum += r->weight * load(row(r) + d);
    store(to + d, sum);
  }
  for (; d < width; ++d) {
    float sum = 0.0f;
    for (const Reader* r = first; r != last; ++r) sum += r->weight * to_float(row(r)[d]);
    to[d] = from_float<To>(sum);
  }
}

}  // namespace

void gather_fwd(const GatherParams& p, int64_t example) {
  p.dtype == DType::kFloat ? forward<float>(p, example) : forward<bfloat16>(p, example);
}

void gather_bwd(const GatherParams& p, int64_t example) {
  p.dtype == DType::kFloat ? backward<float>(p, example) : backward<bfloat16>(p, example);
}

void sum_readers(const Reader* first, const Reader* last, const void* rows, int64_t stride,
                 DType rows_dtype, void* to, int64_t width, DType to_dtype) {
  if (rows_dtype == DType::kBFloat16) {
    add_up<bfloat16, bfloat16>(first, last, rows, stride, to, width);
  } else if (to_dtype == DType::kBFloat16) {
    add_up<float, bfloat16>(first, last, rows, stride, to, width);
  } else {
    add_up<float, float>(first, last, rows, stride, to, width);
  }
}

}  // namespace adatape::ADATAPE_ISA
