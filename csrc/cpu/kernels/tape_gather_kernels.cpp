// Variable-length gathering: the formulas stand in adatape_kernels/reference.py.

#include "../cpu_kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

template <class T>
const T* bank_row(const CpuBank& bank, int64_t example, int64_t entry) {
  return static_cast<const T*>(bank.data) + example * bank.stride_example + entry * bank.stride_row;
}

// Writes `vecs` vectors of a tape token from feature d on: the weighted sum of the rows `entries`
// of the bank. No processor foresees where the next token's rows lie, so that they are fetched
// meanwhile.
template <int vecs, class T>
void merge(const CpuTapeGatherParams& p, int64_t example, const int32_t* entries,
           const int32_t* next, const float* weights, int64_t d, T* to) {
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

// Writes the tape tokens of example i.
template <class T>
void forward(const CpuTapeGatherParams& p, int64_t i) {
  constexpr int kVecs = 8;  // so many vectors of a row are served by one lookup of its place
  const int64_t count = p.offsets[i + 1] - p.offsets[i], width = p.bank.width;
  for (int64_t token = 0; token < count; ++token) {
    const int32_t* const entries = p.indices + (i * p.num_tape_tokens + token) * p.topk;
    const int32_t* const next = token + 1 < count ? entries + p.topk : entries;
    const float* const weights = p.weights + (i * p.num_tape_tokens + token) * p.topk;
    T* const to = static_cast<T*>(p.tape) + (p.offsets[i] + token) * p.stride_tape;
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

// Writes the gradients of the weights of example i, zeros where it has no such tape token.
template <class T>
void backward(const CpuTapeGatherParams& p, int64_t i) {
  const int64_t count = p.offsets[i + 1] - p.offsets[i], width = p.bank.width;
  for (int64_t token = 0; token < p.num_tape_tokens; ++token) {
    float* const dweights = p.dweights + (i * p.num_tape_tokens + token) * p.topk;
    const int32_t* const entries = p.indices + (i * p.num_tape_tokens + token) * p.topk;
    const T* const dtape = static_cast<const T*>(p.tape) + (p.offsets[i] + token) * p.stride_tape;
    for (int64_t j = 0; j < p.topk; ++j) {
      dweights[j] = 0.0f;
      if (token >= count) continue;
      const T* const row = bank_row<T>(p.bank, i, entries[j]);
      Vec products = {};
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) products += load(row + d) * load(dtape + d);
      const int tail = static_cast<int>(width - d);
      dweights[j] = sum(products + load_some(row + d, tail) * load_some(dtape + d, tail));
    }
  }
}

}  // namespace

void gather_fwd(const CpuTapeGatherParams& p, int64_t example) {
  with_number(p.dtype, [&](auto number) { forward<decltype(number)>(p, example); });
}

void gather_bwd(const CpuTapeGatherParams& p, int64_t example) {
  with_number(p.dtype, [&](auto number) { backward<decltype(number)>(p, example); });
}

}  // namespace adatape::ADATAPE_ISA
