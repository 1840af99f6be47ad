// How the entries of a bank are scanned for one tape token: by exact scores, or by coarse ones
// first. tape_select_kernels.cpp says where the keys come from.

#pragma once

#include "candidates.h"
#include "gemm.h"
#include "scratch.h"
#include "tape_select_step.h"

namespace adatape::ADATAPE_ISA {

// Entries of a panel, and examples whose scores of a panel stand in the first cache together.
constexpr int64_t kPanel = kTileVecs * kLanes, kExamplesOfTile = 2 * kTileRows;
static_assert(kPanelMultiple % kPanel == 0 && kPanelMultiple % kUnreadBits == 0);
static_assert(kQueryMultiple % kFeaturesOfVector<bfloat16> == 0);
// So many scores of a bank of an example's own stand in the first cache.
constexpr int64_t kScores = 1024;
// Of the next example's bank so many rows are fetched for each vector of scores, so that all have
// come after a few tokens.
constexpr int64_t kRowsAhead = kLanes / 4;

// The standard library's functions are not for kernels: their code, which may be compiled for this
// instruction set, is shared by all.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Copies entries to panels, of which the first one begins with entry `base`: of each feature kPanel
// entries in a row, feature after feature.
template <class T>
void pack(const CpuTapeSelectParams& p, float* panels, int64_t first, int64_t count, int64_t base) {
  const int64_t width = p.keys.width;
  for (int64_t c = first; c < first + count; c += kLanes) {
    float* const to = panels + (c / kPanel * kPanel - base) * width + c % kPanel;
    const int64_t entries = smaller(larger(p.keys.bank_size - c, 0), kLanes);
    fetch_rows<T>(p, 0, c + kRowsFetched);
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t features = smaller(kLanes, width - d);
      IntVec square[kLanes] = {};
      for (int64_t l = 0; l < entries; ++l) {
        const T* const row = key_row<T>(p, 0, c + l) + d;
        square[l] =
            reinterpret_cast<IntVec>(features < kLanes ? load_some(row, features) : load(row));
      }
      transpose(square);
      for (int64_t f = 0; f < features; ++f) {
        store(to + (d + f) * kPanel, reinterpret_cast<Vec>(square[f]));
      }
    }
  }
}

inline int64_t valid_entries(const CpuTapeSelectParams& p, int64_t example) {
  return p.bank_lens ? p.bank_lens[example] : p.keys.bank_size;
}

inline BestEntries best_of_part(const CpuTapeSelectParams& p, const CpuTapeSelectState& s,
                                int64_t i, int64_t part) {
  return {s.best + (i * s.parts + part) * p.topk, p.topk};
}

// Fetches a bank into the second cache, line by line, while something else is done.
template <class T>
class Ahead {
 public:
  // Fetches nothing if `some` is false.
  Ahead(const CpuTapeSelectParams& p, int64_t example, bool some)
      : from_(some ? key_row<T>(p, example, 0) : nullptr),
        rows_(some ? p.keys.bank_size : 0),
        width_(p.keys.width),
        stride_(p.keys.stride_row) {}

  __attribute__((always_inline)) void line() {
    if (rows_ == 0) return;
    prefetch<kSecondCache>(from_ + column_, 1);
    column_ += kCacheLine / static_cast<int64_t>(sizeof(T));
    if (column_ >= width_) next_row();
  }

  __attribute__((always_inline)) void rows(int64_t count) {
    for (; count > 0 && rows_ > 0; --count) {
      prefetch<kSecondCache>(from_ + column_, width_ - column_);
      next_row();
    }
  }

 private:
  void next_row() {
    column_ = 0;
    from_ += stride_;
    --rows_;
  }

  const T* from_;
  int64_t rows_, width_, stride_, column_ = 0;
};

// The entries of one part of the bank that an example may read.
struct Range {
  int64_t begin, end;
};

inline Range range_of(const CpuTapeSelectState& s, int64_t part, int64_t valid) {
  const int64_t begin = part * s.part_size;
  return {begin, smaller(begin + s.part_size, valid)};
}

// Scans a part of an example's own bank.
template <class T>
void scan_rows(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i, int64_t part,
               Ahead<T>& ahead) {
  const int64_t width = p.keys.width;
  const auto [begin, end] = range_of(s, part, valid_entries(p, i));
  BestEntries best = best_of_part(p, s, i, part);
  best.clear();
  Scratch scratch;
  float* const query = scratch.take(arranged_size<T>(width));
  arrange_query<T>(s.queries + i * s.stride_query, width, query);
  for (int64_t first = begin; first < end; first += kScores) {
    alignas(kVecBytes) float scores[kScores];
    int64_t count = 0;
    for (; count < kScores && first + count < end; count += kLanes) {
      const int64_t c = first + count, rows = smaller(kLanes, end - c);
      const T* const from = key_row<T>(p, i, c);
      const auto row = [&](int64_t r) { return from + r * p.keys.stride_row; };
      store(scores + count, row_products<T>(query, row, rows, width));
      ahead.rows(kRowsAhead);
    }
    best.offer(scores, s.unread + i * s.stride_unread, first, count);
  }
}

// Scans a part of a shared bank.
template <class T>
void scan_panels(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, const int64_t* examples,
                 int64_t count, int64_t part) {
  const int64_t width = p.keys.width;
  const auto [begin, end] = range_of(s, part, p.keys.bank_size);
  Scratch scratch;
  float* const queries = scratch.take(count * width);
  // Where the bank was packed in bytes only, a panel of floats is made when it is needed.
  float* const made = p.key_panels ? nullptr : scratch.take(kPanel * width);
  for (int64_t e = 0; e < count; ++e) {
    const float* const query = s.queries + examples[e] * s.stride_query;
    for (int64_t d = 0; d < width; ++d) queries[e * width + d] = query[d];
    best_of_part(p, s, examples[e], part).clear();
  }
  for (int64_t first = begin; first < end; first += kPanel) {
    if (made) pack<T>(p, made, first, kPanel, first);
    for (int64_t tile = 0; tile < count; tile += kExamplesOfTile) {
      const int64_t rows = smaller(kExamplesOfTile, count - tile);
      alignas(kVecBytes) float scores[kExamplesOfTile * kPanel];
      gemm<float>({.rows = rows,
                   .cols = kPanel,
                   .depth = width,
                   .a = queries + tile * width,
                   .stride_a_row = width,
                   .stride_a_col = 1,
                   .b = made ? made : p.key_panels + first * width,
                   .stride_b = kPanel,
                   .c = scores,
                   .stride_c = kPanel,
                   .accumulate = false});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = examples[tile + r];
        best_of_part(p, s, i, part)
            .offer(scores + r * kPanel, s.unread + i * s.stride_unread, first, kPanel);
      }
    }
  }
}

// Returns the scores of a vector of entries of a shared bank, whose bits are those of scan_panels:
// chains of multiply-adds over the features for each.
template <class T>
Vec chained_products(const float* query, const T* const (&rows)[kLanes], int64_t width) {
  const int64_t length = chain_length(width, kLongestChain);
  Vec scores = {};
  for (int64_t begin = 0; begin < width; begin += length) {
    const int64_t end = smaller(begin + length, width);
    Vec chains = {};
    for (int64_t d = begin; d < end; d += kLanes) {
      const int64_t features = smaller(kLanes, end - d);
      IntVec square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        square[l] = reinterpret_cast<IntVec>(features < kLanes ? load_some(rows[l] + d, features)
                                                               : load(rows[l] + d));
      }
      transpose(square);
      for (int64_t f = 0; f < features; ++f) {
        chains = multiply_add(chains, query + d + f, reinterpret_cast<Vec>(square[f]));
      }
    }
    scores = begin > 0 ? chains + scores : chains;
  }
  return scores;
}

// Finds the best of an example's candidates by their exact scores.
template <class T>
void choose(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i, int64_t part,
            const Candidates& candidates) {
  const int64_t width = p.keys.width;
  BestEntries best = best_of_part(p, s, i, part);
  best.clear();
  Scratch scratch;
  const float* const query = s.queries + i * s.stride_query;
  float* const arranged = scratch.take(arranged_size<T>(width));
  if (p.own_banks) arrange_query<T>(query, width, arranged);
  const ScoredEntry* const list = candidates.list();
  for (int64_t first = 0; first < candidates.count(); first += kLanes) {
    const int64_t count = smaller(kLanes, candidates.count() - first);
    const auto row = [&](int64_t l) {
      return key_row<T>(p, i, list[first + smaller(l, count - 1)].entry);
    };
    float scores[kLanes];
    if (p.own_banks) {
      store(scores, row_products<T>(arranged, row, count, width));
    } else {
      const T* rows[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) rows[l] = row(l);
      store(scores, chained_products<T>(query, rows, width));
    }
    for (int64_t l = 0; l < count; ++l) best.offer({scores[l], list[first + l].entry});
  }
}

// Scans a part of a bank for some examples by coarse scores. Writes to `exact` those of the
// examples for which that is of no use, and returns how many they are.
template <class T, class Aside>
int64_t scan_coarse(const CpuTapeSelectParams& p, const CpuTapeSelectState& s,
                    const CpuCoarseKeys& keys, const int64_t* examples, int64_t count, int64_t part,
                    int64_t* exact, const Aside& aside) {
  const int64_t quads = quads_of(p.keys.width);
  const auto [begin, end] =
      range_of(s, part, p.own_banks ? valid_entries(p, examples[0]) : p.keys.bank_size);
  float norm = 0.0f;
  for (int64_t b = 0; b * kPanelMultiple < p.keys.bank_size; ++b) {
    norm = keys.norms[b] > norm ? keys.norms[b] : norm;
  }
  Scratch scratch;
  auto* const queries = reinterpret_cast<Quad*>(scratch.take(count * quads));
  const int64_t memory = Candidates::memory_size(p.topk);
  auto* const memories = reinterpret_cast<ScoredEntry*>(scratch.take(2 * count * memory));
  Candidates candidates[kExamplesPerBankPass];
  int64_t coarse[kExamplesPerBankPass], scanned = 0, exacts = 0;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t i = examples[e];
    CoarseQuery query = {};
    if (!s.exact[i * s.parts + part]) {
      query = coarse_query(s.queries + i * s.stride_query, p.keys.width, norm,
                           queries + scanned * quads);
    }
    if (query.usable) {
      candidates[scanned] = Candidates(memories + scanned * memory, p.topk, query);
      coarse[scanned++] = i;
    } else {
      exact[exacts++] = i;
    }
  }
  // With few examples, a tile is several panels.
  const int64_t panels = larger(kExamplesOfTile / larger(scanned, 1), 1);
  for (int64_t first = begin; first < end && scanned > 0; first += panels * kPanel) {
    const int64_t cols = smaller(panels * kPanel, (end - first + kPanel - 1) / kPanel * kPanel);
    for (int64_t tile = 0; tile < scanned; tile += kExamplesOfTile) {
      const int64_t rows = smaller(kExamplesOfTile, scanned - tile);
      alignas(kVecBytes) float sums[kExamplesOfTile * kPanel];
      for (int64_t c = 0; c < cols; c += kPanel) {
        gemm<Quad>({.rows = rows,
                    .cols = kPanel,
                    .depth = quads,
                    .a = queries + tile * quads,
                    .stride_a_row = quads,
                    .stride_a_col = 1,
                    .b = reinterpret_cast<const Quad*>(keys.quads + (first + c) * quads),
                    .stride_b = kPanel,
                    .c = sums + c,
                    .stride_c = cols,
                    .accumulate = false},
                   aside);
      }
      for (int64_t r = 0; r < rows; ++r) {
        candidates[tile + r].offer(sums + r * cols, keys.steps + first,
                                   s.unread + coarse[tile + r] * s.stride_unread, first, cols);
      }
    }
  }
  for (int64_t e = 0; e < scanned; ++e) {
    const int64_t i = coarse[e];
    if (candidates[e].finish()) {
      choose<T>(p, s, i, part, candidates[e]);
    } else {
      s.exact[i * s.parts + part] = 1;
      exact[exacts++] = i;
    }
  }
  return exacts;
}

}  // namespace adatape::ADATAPE_ISA
