// Attention over an example's input and tape rows: the formulas stand in
// adatape_kernels/reference.py.
//
// The rows of one head of an example, inputs first and then tape, are copied into dense matrices of
// float. A copy costs 1 / rows of what the products cost, and lets them run over dense matrices.
// Softmax takes one pass over up to kKeyBlock keys; where an example has more, blocks of keys are
// merged by the running maximum.

#include "../cpu_kernels.h"
#include "gemm.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

// The scores of so many queries fit the first-level cache.
constexpr int64_t kTileQueries = 4 * kTileRows;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the rows of one example lie: its inputs, then its tape.
struct ExampleRows {
  int64_t first_input, inputs, first_tape, tapes;

  ExampleRows(const CpuElasticAttentionParams& p, int64_t i)
      : first_input(p.cu_inputs[i]),
        inputs(p.cu_inputs[i + 1] - p.cu_inputs[i]),
        first_tape(p.cu_tapes[i]),
        tapes(p.cu_tapes[i + 1] - p.cu_tapes[i]) {}

  int64_t rows() const { return inputs + tapes; }
  // Returns the row of the buffer that is row r of the example.
  int64_t at(int64_t r) const { return r < inputs ? first_input + r : first_tape + r - inputs; }
};

template <class T>
const T* row_of(const CpuHeadRows& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.stride_row + head * x.stride_head;
}
template <class T>
T* row_to(const CpuHeadRows& x, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + row * x.stride_row + head * x.stride_head;
}

// Copies rows `first` to `first + count` of the example, times a factor, to the rows of `to`, which
// is (count, width); columns from `dim` on become zero.
template <class T>
void pack(const CpuHeadRows& x, const ExampleRows& e, int64_t head, int64_t first, int64_t count,
          int64_t dim, int64_t width, float factor, float* to) {
  for (int64_t r = 0; r < count; ++r, to += width) {
    const T* from = row_of<T>(x, e.at(first + r), head);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * factor);
    if (d < width) store(to + d, load_some(from + d, static_cast<int>(dim - d)) * factor);
  }
}

// Copies the same rows to the columns of `to`, which is (dim, width); columns from `count` on
// become zero.
template <class T>
void pack_transposed(const CpuHeadRows& x, const ExampleRows& e, int64_t head, int64_t first,
                     int64_t count, int64_t dim, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const T* from[kLanes];
    const int lanes = static_cast<int>(count - c < kLanes ? count - c : kLanes);
    for (int l = 0; l < lanes; ++l) from[l] = row_of<T>(x, e.at(first + c + l), head);
    for (int64_t d = 0; d < dim; ++d) {
      Vec column = {};
      for (int l = 0; l < lanes; ++l) column[l] = to_float(from[l][d]);
      store(to + d * width + c, column);
    }
  }
}

// Copies rows of float, `width` apart, to rows `first` to `first + count` of the example.
template <class T>
void unpack(const float* from, int64_t width, const CpuHeadRows& x, const ExampleRows& e,
            int64_t head, int64_t first, int64_t count, int64_t dim) {
  for (int64_t r = 0; r < count; ++r, from += width) {
    T* to = row_to<T>(x, e.at(first + r), head);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
    if (d < dim) store_some(to + d, load(from + d), static_cast<int>(dim - d));
  }
}

// Replaces a row of scores by exp(score - largest), with zeros from `count` on. `largest` and
// `total` run on from earlier blocks of keys; the result is the factor by which everything that
// those blocks have added up must be multiplied.
float softmax_row(float* s, int64_t count, int64_t width, float* largest, float* total) {
  for (int64_t c = count; c < width; ++c) s[c] = -__builtin_inff();
  Vec highest = load(s);
  for (int64_t c = kLanes; c < width; c += kLanes) highest = max(highest, load(s + c));
  const float block = max(highest), before = *largest;
  const float now = before > block ? before : block;
  // While all scores are -inf nothing may be subtracted, because -inf - -inf is NaN.
  const float shift = now == -__builtin_inff() ? 0.0f : now;
  Vec sums = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec e = exp(load(s + c) - shift);
    store(s + c, e);
    sums += e;
  }
  const float kept = before == -__builtin_inff() ? 0.0f : __builtin_expf(before - now);
  *largest = now;
  *total = *total * kept + sum(sums);
  return kept;
}

// Attends from kQueryBlock queries at most, which begin at row `first` of the example.
template <class T>
void forward(const CpuElasticAttentionParams& p, int64_t example, int64_t head, int64_t first) {
  const ExampleRows e(p, example);
  const int64_t rows = e.rows(), dim = p.head_dim, width = round_up(dim, kLanes);
  const int64_t queries = rows - first < kQueryBlock ? rows - first : kQueryBlock;
  const int64_t block = round_up(rows < kKeyBlock ? rows : kKeyBlock, kLanes);
  Scratch scratch;
  float* const q = scratch.take(queries * width);
  float* const kt = scratch.take(dim * block);
  float* const v = scratch.take(block * width);
  float* const out = scratch.take(queries * width);
  float* const largest = scratch.take(queries);
  float* const total = scratch.take(queries);
  float* const scores = scratch.take(kTileQueries * block);

  pack<T>(p.q, e, head, first, queries, dim, width, p.softmax_scale, q);
  for (int64_t r = 0; r < queries; ++r) largest[r] = -__builtin_inff(), total[r] = 0.0f;
  for (int64_t key = 0; key < rows; key += kKeyBlock) {
    const int64_t keys = rows - key < kKeyBlock ? rows - key : kKeyBlock;
    const int64_t columns = round_up(keys, kLanes);
    pack_transposed<T>(p.k, e, head, key, keys, dim, columns, kt);
    pack<T>(p.v, e, head, key, keys, dim, width, 1.0f, v);
    for (int64_t r = 0; r < queries; r += kTileQueries) {
      const int64_t count = queries - r < kTileQueries ? queries - r : kTileQueries;
      gemm({.rows = count,
            .cols = columns,
            .depth = dim,
            .a = q + r * width,
            .stride_a_row = width,
            .stride_a_col = 1,
            .b = kt,
            .stride_b = columns,
            .c = scores,
            .stride_c = columns,
            .accumulate = false});
      for (int64_t t = 0; t < count; ++t) {
        const float kept =
            softmax_row(scores + t * columns, keys, columns, largest + r + t, total + r + t);
        if (key > 0) {
          float* const o = out + (r + t) * width;
          for (int64_t d = 0; d < width; d += kLanes) store(o + d, load(o + d) * kept);
        }
      }
      gemm({.rows = count,
            .cols = width,
            .depth = keys,
            .a = scores,
            .stride_a_row = columns,
            .stride_a_col = 1,
            .b = v,
            .stride_b = width,
            .c = out + r * width,
            .stride_c = width,
            .accumulate = key > 0});
    }
  }
  for (int64_t r = 0; r < queries; ++r) {
    const float inverse = 1.0f / total[r];
    float* const o = out + r * width;
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, load(o + d) * inverse);
    p.lse[head * p.rows + e.at(first + r)] = largest[r] + __builtin_logf(total[r]);
  }
  unpack<T>(out, width, p.out, e, head, first, queries, dim);
}

// Computes the gradients block by block: for each block of keys all blocks of queries.
template <class T>
void backward(const CpuElasticAttentionParams& p, int64_t example, int64_t head) {
  const ExampleRows e(p, example);
  const int64_t rows = e.rows(), dim = p.head_dim, width = round_up(dim, kLanes);
  const int64_t block = rows < kBackwardBlock ? rows : kBackwardBlock;
  const int64_t wide_block = round_up(block, kLanes);
  Scratch scratch;
  float* const q = scratch.take(block * width);
  float* const dout = scratch.take(block * width);
  float* const k = scratch.take(block * width);
  float* const kt = scratch.take(dim * wide_block);
  float* const vt = scratch.take(dim * wide_block);
  float* const dq = scratch.take(rows * width);
  float* const dk = scratch.take(block * width);
  float* const dv = scratch.take(block * width);
  float* const delta = scratch.take(rows);
  float* const weights = scratch.take(block * wide_block);
  float* const ds = scratch.take(block * wide_block);

  for (int64_t r = 0; r < rows; ++r) {
    const T* const o = row_of<T>(p.out, e.at(r), head);
    const T* const d_o = row_of<T>(p.dout, e.at(r), head);
    Vec products = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) products += load(o + d) * load(d_o + d);
    const int tail = static_cast<int>(dim - d);
    delta[r] = sum(products + load_some(o + d, tail) * load_some(d_o + d, tail));
  }
  for (int64_t key = 0; key < rows; key += block) {
    const int64_t keys = rows - key < block ? rows - key : block;
    const int64_t columns = round_up(keys, kLanes);
    pack<T>(p.k, e, head, key, keys, dim, width, 1.0f, k);
    pack_transposed<T>(p.k, e, head, key, keys, dim, columns, kt);
    pack_transposed<T>(p.v, e, head, key, keys, dim, columns, vt);
    for (int64_t query = 0; query < rows; query += block) {
      const int64_t queries = rows - query < block ? rows - query : block;
      pack<T>(p.q, e, head, query, queries, dim, width, p.softmax_scale, q);
      pack<T>(p.dout, e, head, query, queries, dim, width, 1.0f, dout);
      gemm({.rows = queries,
            .cols = columns,
            .depth = dim,
            .a = q,
            .stride_a_row = width,
            .stride_a_col = 1,
            .b = kt,
            .stride_b = columns,
            .c = weights,
            .stride_c = columns,
            .accumulate = false});
      gemm({.rows = queries,
            .cols = columns,
            .depth = dim,
            .a = dout,
            .stride_a_row = width,
            .stride_a_col = 1,
            .b = vt,
            .stride_b = columns,
            .c = ds,
            .stride_c = columns,
            .accumulate = false});
      for (int64_t r = 0; r < queries; ++r) {
        const float lse = p.lse[head * p.rows + e.at(query + r)], shift = delta[query + r];
        float* const w_row = weights + r * columns;
        float* const ds_row = ds + r * columns;
        for (int64_t c = 0; c < columns; c += kLanes) {
          const Vec w = exp(load(w_row + c) - lse);
          store(w_row + c, w);
          store(ds_row + c, w * (load(ds_row + c) - shift));
        }
      }
      // The packed q has been multiplied by the scale, so that dk is complete; dq is scaled at the
      // end.
      const bool later_query = query > 0, later_key = key > 0;
      gemm({.rows = keys,
            .cols = width,
            .depth = queries,
            .a = ds,
            .stride_a_row = 1,
            .stride_a_col = columns,
            .b = q,
            .stride_b = width,
            .c = dk,
            .stride_c = width,
            .accumulate = later_query});
      gemm({.rows = keys,
            .cols = width,
            .depth = queries,
            .a = weights,
            .stride_a_row = 1,
            .stride_a_col = columns,
            .b = dout,
            .stride_b = width,
            .c = dv,
            .stride_c = width,
            .accumulate = later_query});
      gemm({.rows = queries,
            .cols = width,
            .depth = keys,
            .a = ds,
            .stride_a_row = columns,
            .stride_a_col = 1,
            .b = k,
            .stride_b = width,
            .c = dq + query * width,
            .stride_c = width,
            .accumulate = later_key});
    }
    unpack<T>(dk, width, p.dk, e, head, key, keys, dim);
    unpack<T>(dv, width, p.dv, e, head, key, keys, dim);
  }
  for (int64_t i = 0; i < rows * width; i += kLanes) store(dq + i, load(dq + i) * p.softmax_scale);
  unpack<T>(dq, width, p.dq, e, head, 0, rows, dim);
}

}  // namespace

void attention_fwd(const CpuElasticAttentionParams& p, int64_t example, int64_t head,
                   int64_t first) {
  p.dtype == DType::kFloat ? forward<float>(p, example, head, first)
                           : forward<bfloat16>(p, example, head, first);
}

void attention_bwd(const CpuElasticAttentionParams& p, int64_t example, int64_t head) {
  p.dtype == DType::kFloat ? backward<float>(p, example, head)
                           : backward<bfloat16>(p, example, head);
}

}  // namespace adatape::ADATAPE_ISA
