// Variable-length gathering: the formulas stand in adatape_kernels/reference.py.

#include "../cpu_kernels.h"
#include "columns.h"

namespace adatape::ADATAPE_ISA {
namespace {

// So many vectors of a row are served by one lookup of its place, and of what is left so many.
#if defined(__AVX512F__)
constexpr int kMostVecs = 6, kSomeVecs = 2;
#else
constexpr int kMostVecs = 8, kSomeVecs = 2;
#endif

// A row of the tape, and the example that it belongs to.
struct TapeRow {
  int64_t row, example;

  void advance(const CpuTapeGatherParams& p) {
    if (++row == p.offsets[p.batch]) return;
    while (p.offsets[example + 1] <= row) ++example;  // past those without rows, too
  }

  int64_t first_read(const CpuTapeGatherParams& p) const {
    return (example * p.num_tape_tokens + row - p.offsets[example]) * p.topk;
  }
};

// The rows of a bank that one row of the tape is merged from.
template <class T>
struct BankRows {
  const T* bank;
  const int32_t* entries;
  int64_t stride;

  BankRows(const CpuTapeGatherParams& p, const TapeRow& at)
      : bank(static_cast<const T*>(p.bank.data) + at.example * p.bank.stride_example),
        entries(p.indices + at.first_read(p)),
        stride(p.bank.stride_row) {}

  const T* operator[](int64_t j) const { return bank + entries[j] * stride; }
};

// Returns how many rows of the tape ahead its entries are fetched: no processor foresees where
// they lie, and they shall still be in the first cache when their turn comes.
template <class T>
int64_t rows_ahead(const CpuTapeGatherParams& p) {
  constexpr int64_t kBytesAhead = int64_t{12} << 10, kMostRows = 16;
  const int64_t bytes = p.topk * p.bank.width * static_cast<int64_t>(sizeof(T));
  if (bytes * kMostRows <= kBytesAhead) return kMostRows;
  return bytes >= kBytesAhead ? 1 : kBytesAhead / bytes;
}

// Does what `merge` does for pairs of numbers in bfloat16, of which a vector holds two vectors of
// float: the one of each pair becomes a float by a shift, the other by a mask.
template <int vecs>
void merge_pairs(const BankRows<bfloat16>& rows, const BankRows<bfloat16>& later,
                 const float* weights, int64_t topk, int64_t d, bfloat16* to) {
  constexpr uint32_t kUpper = 0xffff0000;
  Vec low[vecs / 2] = {}, high[vecs / 2] = {};
  for (int64_t j = 0; j < topk; ++j) {
    prefetch<kFirstCache>(later[j] + d, vecs * kLanes);
    const bfloat16* const row = rows[j] + d;
    for (int v = 0; v < vecs / 2; ++v) {
      IntVec pairs;
      std::memcpy(&pairs, row + 2 * v * kLanes, sizeof pairs);
      low[v] += weights[j] * reinterpret_cast<Vec>(pairs << 16);
      high[v] += weights[j] * reinterpret_cast<Vec>(pairs & kUpper);
    }
  }
  // As store rounds a vector of float, but the result is in the upper half of each word.
  const auto rounded = [](Vec x) {
    const IntVec bits = reinterpret_cast<IntVec>(x);
    return x != x ? IntVec{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
  };
  for (int v = 0; v < vecs / 2; ++v) {
    const IntVec pairs = (rounded(low[v]) >> 16) | (rounded(high[v]) & kUpper);
    std::memcpy(to + 2 * v * kLanes, &pairs, sizeof pairs);
  }
}

// Writes `vecs` vectors of a row of the tape from feature d on, and fetches those of a later one.
template <int vecs, class T>
void merge(const BankRows<T>& rows, const BankRows<T>& later, const float* weights, int64_t topk,
           int64_t d, T* to) {
  if constexpr (std::is_same_v<T, bfloat16> && vecs % 2 == 0) {
    return merge_pairs<vecs>(rows, later, weights, topk, d, to);
  }
  Vec sums[vecs] = {};
  for (int64_t j = 0; j < topk; ++j) {
    prefetch<kFirstCache>(later[j] + d, vecs * kLanes);
    const T* const row = rows[j] + d;
    for (int v = 0; v < vecs; ++v) sums[v] += weights[j] * load(row + v * kLanes);
  }
  for (int v = 0; v < vecs; ++v) store(to + v * kLanes, sums[v]);
}

// Writes `count` rows of the tape, of which the first belongs to the example.
template <class T>
void forward(const CpuTapeGatherParams& p, int64_t example, int64_t first, int64_t count) {
  const int64_t total = p.offsets[p.batch], width = p.bank.width;
  const int64_t ahead = rows_ahead<T>(p);
  TapeRow at{.row = first, .example = example}, later = at;
  for (int64_t r = 0; r < ahead && later.row < total; ++r) {
    const BankRows<T> rows(p, later);
    for (int64_t j = 0; j < p.topk; ++j) prefetch<kFirstCache>(rows[j], width);
    later.advance(p);
  }
  for (; at.row < first + count; at.advance(p)) {
    const BankRows<T> rows(p, at);
    const BankRows<T> next = later.row < total ? BankRows<T>(p, later) : rows;
    const float* const weights = p.weights + at.first_read(p);
    T* const to = static_cast<T*>(p.tape) + at.row * p.stride_tape;
    int64_t d = 0;
    for (; d + kMostVecs * kLanes <= width; d += kMostVecs * kLanes) {
      merge<kMostVecs>(rows, next, weights, p.topk, d, to + d);
    }
    for (; d + kSomeVecs * kLanes <= width; d += kSomeVecs * kLanes) {
      merge<kSomeVecs>(rows, next, weights, p.topk, d, to + d);
    }
    for (; d + kLanes <= width; d += kLanes) merge<1>(rows, next, weights, p.topk, d, to + d);
    for (; d < width; ++d) {
      float sum = 0.0f;
      for (int64_t j = 0; j < p.topk; ++j) sum += weights[j] * to_float(rows[j][d]);
      to[d] = from_float<T>(sum);
    }
    if (later.row < total) later.advance(p);
  }
}

// Writes the gradients of the weights of example i, zeros where it has no such tape token.
template <class T>
void backward(const CpuTapeGatherParams& p, int64_t i) {
  const int64_t width = p.bank.width, ahead = rows_ahead<T>(p);
  float* const dweights = p.dweights + i * p.num_tape_tokens * p.topk;
  const int64_t first = p.offsets[i], count = p.offsets[i + 1] - first;
  for (int64_t read = count * p.topk; read < p.num_tape_tokens * p.topk; ++read) {
    dweights[read] = 0.0f;
  }
  TapeRow at{.row = first, .example = i}, later = at;
  const auto fetch_next = [&] {
    if (later.row >= first + count) return;
    const BankRows<T> rows(p, later);
    for (int64_t j = 0; j < p.topk; ++j) prefetch<kFirstCache>(rows[j], width);
    ++later.row;
  };
  for (int64_t r = 0; r < ahead; ++r) fetch_next();
  for (; at.row < first + count; ++at.row) {
    fetch_next();
    const BankRows<T> rows(p, at);
    const T* const dtape = static_cast<const T*>(p.tape) + at.row * p.stride_tape;
    float* const to = dweights + (at.row - first) * p.topk;
    for (int64_t j = 0; j < p.topk; ++j) to[j] = dot(rows[j], dtape, width);
  }
}

}  // namespace

void gather_fwd(const CpuTapeGatherParams& p, int64_t example, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { forward<decltype(number)>(p, example, first, count); });
}

void gather_bwd(const CpuTapeGatherParams& p, int64_t example) {
  with_number(p.dtype, [&](auto number) { backward<decltype(number)>(p, example); });
}

}  // namespace adatape::ADATAPE_ISA
