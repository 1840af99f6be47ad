// Attention over an example's input and tape rows: the formulas stand in
// adatape_kernels/reference.py.
//
// Softmax takes one pass over up to kKeyBlock keys; where an example has more, blocks of keys are
// merged by the running maximum. Where the processor multiplies bfloat16, the weights of attention
// and the gradients of the scores are rounded to it for the products that they go into; all sums
// are float.

#include "attention_operands.h"
#include "attention_softmax.h"
#include "attention_softmax_bwd.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

// So many queries are taken together: whole tiles of products and whole vectors of rows. Their
// scores fit the nearer caches.
template <class Element>
constexpr int64_t kTileQueries = kWholeTile<Element> > 1 ? 2 * kWholeTile<Element>
                                 : kLanes == 16          ? 48
                                                         : 16;
static_assert(kTileQueries<float> % kLanes == 0 && kTileQueries<float> % kTileRows == 0);

// The values of more keys are copied together, because they lie far apart and are read once for
// each tile of columns.
constexpr int64_t kKeysInPlace = 16 * kLanes;

// Takes a matrix of elements, which are as large as a float.
template <class Element>
Element* take(Scratch& scratch, int64_t count) {
  static_assert(sizeof(Element) == sizeof(float));
  return reinterpret_cast<Element*>(scratch.take(count));
}

// Plain torch's products of small matrices have short chains, too.
int64_t longest_chain(int64_t rows, int64_t dim) { return rows < 32 || dim <= 16 ? 32 : 128; }

// Attends from kQueryBlock queries at most, which begin at row `first` of the example.
template <class Form>
void forward(const CpuElasticAttentionParams& p, const AttentionTask& task,
             const AttentionTask* next) {
  using T = typename Form::Number;
  using Element = typename Form::Element;
  const ExampleRows e(p, task.example);
  const int64_t head = task.head, first = task.first;
  const int64_t rows = e.rows(), dim = p.head_dim, width = round_up(dim, kLanes);
  const int64_t depth = elements<Form>(dim), wide_depth = round_up(depth, kLanes);
  const int64_t queries = rows - first < kQueryBlock ? rows - first : kQueryBlock;
  const int64_t block = round_up(rows < kKeyBlock ? rows : kKeyBlock, kLanes);
  const int64_t chain = longest_chain(rows, dim);
  Scratch scratch;
  Element* const q = take<Element>(scratch, whole_tiles<Element>(queries) * wide_depth);
  Element* const kt = take<Element>(scratch, whole_elements<Form>(dim) * block);
  Element* const v = take<Element>(scratch, whole_elements<Form>(block) * width);
  float* const out = scratch.take(whole_tiles<Element>(queries) * width);
  const int64_t whole = round_up(queries, kLanes);
  const SoftmaxOfRows softmax{
      .largest = scratch.take(whole), .total = scratch.take(whole), .kept = scratch.take(whole)};
  float* const scores = scratch.take(kTileQueries<Element> * block);
  Element* const weights = reinterpret_cast<Element*>(scores);
  const float scale = p.softmax_scale * kLog2e,
              share = share_of_key(HeadBlock<T>{p.v, e, head, 0, rows, dim});
  const int64_t own = ComingRows::rows_of(p, task);
  const int64_t others = next ? ComingRows::rows_of(p, *next) : 0;
  ComingRows coming(scratch, dim * static_cast<int64_t>(sizeof(T)), own + 3 * others);
  coming.add<T>(p, task, {p.out});
  if (next) coming.add<T>(p, *next, {p.q, p.k, p.v});
  const auto ask = [&coming]() __attribute__((always_inline)) { coming.ask(); };

  const HeadBlock<T> queries_of{p.q, e, head, first, queries, dim};
  const HeadBlock<T> out_of{p.out, e, head, first, queries, dim};
  // Whole vectors of float are multiplied, and their sums written, where they lie.
  const bool in_place = std::is_same_v<T, float> && dim == width;
  if (!in_place) copy_rows(queries_of, wide_depth, q);
  softmax.start(queries);
  for (int64_t key = 0; key < rows; key += kKeyBlock) {
    const int64_t keys = rows - key < kKeyBlock ? rows - key : kKeyBlock;
    const int64_t columns = round_up(keys, kLanes);
    const HeadBlock<T> values_of{p.v, e, head, key, keys, dim};
    copy_to_columns(HeadBlock<T>{p.k, e, head, key, keys, dim}, columns, kt);
    const bool values_in_place = in_place && keys <= kKeysInPlace;
    if (!values_in_place) copy_along_depth(values_of, width, v);
    for (int64_t r = 0; r < queries; r += kTileQueries<Element>) {
      const int64_t most = kTileQueries<Element>, count = queries - r < most ? queries - r : most;
      const SmallProduct<Element> products{.rows = count,
                                           .cols = keys,
                                           .depth = depth,
                                           .a = q + r * wide_depth,
                                           .stride_a_row = wide_depth,
                                           .stride_a_col = 1,
                                           .b = kt,
                                           .stride_b = columns,
                                           .c = scores,
                                           .stride_c = columns,
                                           .accumulate = false,
                                           .longest_chain = chain};
      if constexpr (std::is_same_v<T, float>) {
        const auto query_row = [&](int64_t t) -> const float* {
          return in_place ? queries_of.row(r + t) : products.a + t * wide_depth;
        };
        gemm(products, ask, query_row, StoreRows(products));
      } else {
        gemm(products, ask);
      }
      weigh({.at = scores, .queries = count, .keys = keys, .columns = columns, .scale = scale},
            share, weights, softmax.from(r));
      close_rows(weights, count, columns, keys);
      for (int64_t t = r; key > 0 && t < r + count; ++t) {
        float* const o = out + t * width;
        for (int64_t d = 0; d < width; d += kLanes) store(o + d, load(o + d) * softmax.kept[t]);
      }
      SmallProduct<Element> sums{.rows = count,
                                 .cols = width,
                                 .depth = elements<Form>(keys),
                                 .a = weights,
                                 .stride_a_row = columns,
                                 .stride_a_col = 1,
                                 .b = v,
                                 .stride_b = width,
                                 .c = out + r * width,
                                 .stride_c = width,
                                 .accumulate = key > 0,
                                 .longest_chain = chain};
      if constexpr (std::is_same_v<T, float>) {
        if (values_in_place) {
          sums.b = values_of.row(0);
          sums.stride_b = p.v.stride_row;
          sums.first_b = e.inputs - key;
          sums.other_b = values_of.row(e.inputs - key);
        }
        const bool last = in_place && key + keys == rows;
        gemm(sums, ask, LeftRows(sums), [&](int64_t t) {
          float* const to = last ? out_of.row(r + t) : sums.c + t * width;
          const float factor = last ? 1.0f / (softmax.total[r + t] * share) : 1.0f;
          return [to, factor](int64_t d, Vec x)
                     __attribute__((always_inline)) { store(to + d, x * factor); };
        });
      } else {
        gemm(sums, ask);
      }
    }
  }
  for (int64_t r = 0; r < queries; ++r) {
    p.lse[head * p.rows + e.at(first + r)] =
        softmax.largest[r] * kLn2 + __builtin_logf(softmax.total[r]);
  }
  if (in_place) return;
  copy_out(out, width, out_of, [&](int64_t r) { return 1.0f / (softmax.total[r] * share); });
}

// Returns how many queries of an example are taken at a time, about the same in each block.
int64_t queries_at_once(int64_t rows) {
  if (rows * rows <= kBackwardScores) return rows;
  const int64_t blocks = rows * rows / kBackwardScores + 1;
  const int64_t queries = round_up((rows + blocks - 1) / blocks, kLeastBackwardQueries);
  return queries < rows ? queries : rows;
}

// Computes the gradients a block of queries after another, each with all keys.
template <class Form>
void backward(const CpuElasticAttentionParams& p, const AttentionTask& task,
              const AttentionTask* next) {
  using T = typename Form::Number;
  using Element = typename Form::Element;
  constexpr bool kPairs = Form::kNumbers > 1;
  const ExampleRows e(p, task.example);
  const int64_t head = task.head;
  const int64_t rows = e.rows(), dim = p.head_dim, width = round_up(dim, kLanes);
  const int64_t depth = elements<Form>(dim), wide_depth = round_up(depth, kLanes);
  const int64_t columns = round_up(rows, kLanes), block = queries_at_once(rows);
  const int64_t chain = longest_chain(rows, dim);
  const int64_t whole_depth = whole_elements<Form>(dim), whole_block = whole_tiles<Element>(block);
  const int64_t half_block = whole_elements<Form>(block);
  Scratch scratch;
  // Queries and their gradients as the left operands of products over features, keys and values as
  // the right ones; then the same as right operands of products over rows. In float a matrix of
  // rows is both.
  Element* const q = take<Element>(scratch, whole_block * wide_depth);
  Element* const dout = take<Element>(scratch, whole_block * wide_depth);
  Element* const kt = take<Element>(scratch, whole_depth * columns);
  Element* const vt = take<Element>(scratch, whole_depth * columns);
  Element* const k = take<Element>(scratch, whole_elements<Form>(rows) * width);
  Element* const q_rows = kPairs ? take<Element>(scratch, half_block * width) : q;
  Element* const dout_rows = kPairs ? take<Element>(scratch, half_block * width) : dout;
  float* const dq = scratch.take(whole_block * width);
  float* const dk = scratch.take(whole_tiles<Element>(rows) * width);
  float* const dv = scratch.take(whole_tiles<Element>(rows) * width);
  float* const lse = scratch.take(rows);
  float* const scores = scratch.take(whole_block * columns);
  float* const ds = scratch.take(whole_block * columns);
  Element* const weights = reinterpret_cast<Element*>(scores);
  Element* const ds_by_key = reinterpret_cast<Element*>(ds);
  Element* const ds_by_query = kPairs ? take<Element>(scratch, half_block * columns) : ds_by_key;
  constexpr bool kTiles = kWholeTile<Element> > 1;
  Element* const room = kTiles ? take<Element>(scratch, half_block * columns) : nullptr;

  const float scale = p.softmax_scale * kLog2e;
  const int64_t own = ComingRows::rows_of(p, task);
  const int64_t others = next ? ComingRows::rows_of(p, *next) : 0;
  ComingRows coming(scratch, dim * static_cast<int64_t>(sizeof(T)), 3 * own + 5 * others);
  coming.add<T>(p, task, {p.dq, p.dk, p.dv});
  if (next) coming.add<T>(p, *next, {p.q, p.k, p.v, p.out, p.dout});
  const auto ask = [&coming]() __attribute__((always_inline)) { coming.ask(); };

  for (int64_t r = 0; r < rows; ++r) lse[r] = p.lse[head * p.rows + e.at(r)] * kLog2e;
  const auto unscaled = [](int64_t) { return 1.0f; };
  const auto scaled = [&p](int64_t) { return p.softmax_scale; };
  const HeadBlock<T> keys_of{p.k, e, head, 0, rows, dim};
  copy_along_depth(keys_of, width, k);
  copy_to_columns(keys_of, columns, kt);
  copy_to_columns(HeadBlock<T>{p.v, e, head, 0, rows, dim}, columns, vt);
  for (int64_t query = 0; query < rows; query += block) {
    const int64_t queries = rows - query < block ? rows - query : block;
    const HeadBlock<T> queries_of{p.q, e, head, query, queries, dim};
    const HeadBlock<T> gradients_of{p.dout, e, head, query, queries, dim};
    copy_rows(queries_of, wide_depth, q);
    copy_rows(gradients_of, wide_depth, dout);
    if constexpr (kPairs) {
      copy_along_depth(queries_of, width, q_rows);
      copy_along_depth(gradients_of, width, dout_rows);
    }
    const auto over_features = [&](const Element* left, const Element* right, float* to) {
      gemm<Element>({.rows = queries,
                     .cols = rows,
                     .depth = depth,
                     .a = left,
                     .stride_a_row = wide_depth,
                     .stride_a_col = 1,
                     .b = right,
                     .stride_b = columns,
                     .c = to,
                     .stride_c = columns,
                     .accumulate = false,
                     .longest_chain = chain},
                    ask);
    };
    over_features(q, kt, scores);
    over_features(dout, vt, ds);
    differentiate(scores, ds, ds_by_query, queries, rows, columns, scale, lse + query,
                  [&](int64_t r) {
                    return product_of_rows(HeadBlock<T>{p.out, e, head, query, queries, dim},
                                           gradients_of, r);
                  });
    close_rows(ds_by_key, queries, columns, rows);
    const auto over_queries = [&](const Element* by_query, const Element* right, float* to) {
      const auto left = turned(by_query, elements<Form>(queries), columns, room);
      gemm<Element>({.rows = rows,
                     .cols = width,
                     .depth = elements<Form>(queries),
                     .a = left.at,
                     .stride_a_row = left.stride_row,
                     .stride_a_col = left.stride_col,
                     .b = right,
                     .stride_b = width,
                     .c = to,
                     .stride_c = width,
                     .accumulate = query > 0,
                     .longest_chain = chain},
                    ask);
    };
    over_queries(ds_by_query, q_rows, dk);
    over_queries(weights, dout_rows, dv);
    gemm<Element>({.rows = queries,
                   .cols = width,
                   .depth = elements<Form>(rows),
                   .a = ds_by_key,
                   .stride_a_row = columns,
                   .stride_a_col = 1,
                   .b = k,
                   .stride_b = width,
                   .c = dq,
                   .stride_c = width,
                   .accumulate = false,
                   .longest_chain = chain},
                  ask);
    copy_out(dq, width, HeadBlock<T>{p.dq, e, head, query, queries, dim}, scaled);
  }
  copy_out(dk, width, HeadBlock<T>{p.dk, e, head, 0, rows, dim}, scaled);
  copy_out(dv, width, HeadBlock<T>{p.dv, e, head, 0, rows, dim}, unscaled);
}

}  // namespace

void attention_fwd(const CpuElasticAttentionParams& p, const AttentionTask& task,
                   const AttentionTask* next) {
#if defined(__AMX_BF16__)
  if (!as_pairs(p, task)) return avx512_bf16::attention_fwd(p, task, next);
  const TilesInUse tiles;
  forward<AsPairs>(p, task, next);
#else
  in_form_of(p, task, [&](auto form) { forward<decltype(form)>(p, task, next); });
#endif
}

void attention_bwd(const CpuElasticAttentionParams& p, const AttentionTask& task,
                   const AttentionTask* next) {
#if defined(__AMX_BF16__)
  if (!as_pairs(p, task)) return avx512_bf16::attention_bwd(p, task, next);
  const TilesInUse tiles;
  backward<AsPairs>(p, task, next);
#else
  in_form_of(p, task, [&](auto form) { backward<decltype(form)>(p, task, next); });
#endif
}

}  // namespace adatape::ADATAPE_ISA
