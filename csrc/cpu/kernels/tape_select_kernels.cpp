// Adaptive tape reading: the formulas stand in adatape_kernels/reference.py.
//
// The query of a tape token depends on what the token before it read, so that every token takes a
// product of the query with all keys of the bank. What can be saved is where the keys come from.
//
// - A bank of an example's own is taken as it lies in memory. It comes from there once; it stays in
//   the second cache for the tokens that follow, while the next example's bank is fetched. A row is
//   multiplied lane by lane, and the lanes of sixteen rows are added up together (row_products.h).
// - A bank that examples share is packed once, into panels of as many entries as a register tile of
//   a product has columns. A panel stays in the first cache while the queries of all examples of
//   the task are multiplied with it: a dense product, in which every score is one chain of fused
//   multiply-adds over the features.
//
// Neither order of addition depends on where a row stands or on who else reads. So equal rows of a
// bank give equal bits, and so does an example in any batch. Scores are looked at while they are in
// the first cache and then forgotten (best_entries.h); what has been read is a bit of an entry.
//
// bfloat16 keys are multiplied as float. SPEC 3 wants sums in float32 of a query that has 24 bits
// from the second token on, and AVX512-BF16 multiplies 8: the query would have to be split into
// three parts, whose products take 3 instructions where two of float do, and numbers below the
// normal ones would count as zero.

#include "best_entries.h"
#include "candidates.h"
#include "coarse_keys.h"
#include "gemm.h"
#include "scratch.h"
#include "tape_select_step.h"

namespace adatape::ADATAPE_ISA {
namespace {

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
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Copies entries to panels, of which the first one begins with entry `base`: of each feature kPanel
// entries in a row, feature after feature.
template <class T>
void pack(const CpuTapeSelectParams& p, float* panels, int64_t first, int64_t count,
          int64_t base) {
  const int64_t width = p.keys.width;
  for (int64_t c = first; c < first + count; c += kLanes) {
    float* const to = panels + (c / kPanel * kPanel - base) * width + c % kPanel;
    const int64_t entries = smaller(larger(p.keys.bank_size - c, 0), kLanes);
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

int64_t valid_entries(const CpuTapeSelectParams& p, int64_t example) {
  return p.bank_lens ? p.bank_lens[example] : p.keys.bank_size;
}

bool reads_on(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i) {
  return p.counts[i] < p.num_tape_tokens && s.halting[i] < p.halt_threshold && s.left[i] >= p.topk;
}

template <class T>
bool start(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i) {
  const T* const query = static_cast<const T*>(p.query) + i * p.stride_query;
  for (int64_t d = 0; d < s.stride_query; ++d) {
    s.queries[i * s.stride_query + d] = d < p.keys.width ? to_float(query[d]) : 0.0f;
  }
  const int64_t valid = valid_entries(p, i);
  const bool* const mask = p.read_mask ? p.read_mask + i * p.keys.bank_size : nullptr;
  s.left[i] = 0;
  for (int64_t w = 0; w < s.stride_unread; ++w) {
    const int64_t first = w * kUnreadBits, bits = smaller(larger(valid - first, 0), kUnreadBits);
    uint32_t unread = bits < kUnreadBits ? (uint32_t{1} << bits) - 1 : ~uint32_t{0};
    for (int64_t b = 0; mask && b < bits; ++b) unread &= ~(uint32_t{mask[first + b]} << b);
    s.unread[i * s.stride_unread + w] = unread;
    s.left[i] += __builtin_popcount(unread);
  }
  for (int64_t part = 0; part < s.parts; ++part) s.exact[i * s.parts + part] = 0;
  s.halting[i] = 0.0f;
  p.counts[i] = 0;
  p.ponder[i] = 0.0f;
  const int64_t reads = p.num_tape_tokens * p.topk;
  for (int64_t j = i * reads; j < (i + 1) * reads; ++j) p.indices[j] = -1, p.weights[j] = 0.0f;
  return reads_on(p, s, i);
}

BestEntries best_of_part(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i,
                         int64_t part) {
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

Range range_of(const CpuTapeSelectState& s, int64_t part, int64_t valid) {
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
// a chain of multiply-adds over the features for each.
template <class T>
Vec chained_products(const float* query, const T* const (&rows)[kLanes], int64_t width) {
  Vec sums = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t features = smaller(kLanes, width - d);
    IntVec square[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      square[l] = reinterpret_cast<IntVec>(features < kLanes ? load_some(rows[l] + d, features)
                                                             : load(rows[l] + d));
    }
    transpose(square);
    for (int64_t f = 0; f < features; ++f) {
      sums = multiply_add(sums, query + d + f, reinterpret_cast<Vec>(square[f]));
    }
  }
  return sums;
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
    const T* rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      rows[l] = key_row<T>(p, i, list[first + smaller(l, count - 1)].entry);
    }
    float scores[kLanes];
    store(scores, p.own_banks ? row_products<T>(
                                    arranged, [&](int64_t r) { return rows[r]; }, count, width)
                              : chained_products<T>(query, rows, width));
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

template <class T>
bool read(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i) {
  ScoredEntry merged[kMaxTopk];
  const ScoredEntry* const found = s.best + i * s.parts * p.topk;
  BestEntries best(merged, p.topk);
  best.clear();
  for (int64_t j = 0; j < s.parts * p.topk; ++j) {
    if (found[j].entry >= 0) best.offer(found[j]);
  }
  const int64_t out = (i * p.num_tape_tokens + p.counts[i]) * p.topk;
  float scores[kMaxTopk];
  for (int64_t j = 0; j < p.topk; ++j) {
    const int32_t entry = merged[j].entry;
    scores[j] = merged[j].score;
    p.indices[out + j] = entry;
    s.unread[i * s.stride_unread + entry / kUnreadBits] &= ~(uint32_t{1} << entry % kUnreadBits);
  }
  s.left[i] -= p.topk;
  p.ponder[i] += merge_weights(p, scores, p.weights + out);
  s.halting[i] += p.weights[out];
  p.counts[i] += 1;
  float* const query = s.queries + i * s.stride_query;
  next_query<T>(p, i, p.indices + out, p.weights + out, query, query);
  return reads_on(p, s, i);
}

// Reads for examples that have a bank of their own, one after another.
template <class T>
void forward_rows(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t first,
                  int64_t count) {
  Scratch scratch;
  CpuCoarseKeys keys;
  const int64_t entries = (p.keys.bank_size + kPanelMultiple - 1) / kPanelMultiple * kPanelMultiple;
  if (p.coarse) {
    keys.quads = reinterpret_cast<uint32_t*>(scratch.take(entries * quads_of(p.keys.width)));
    keys.steps = scratch.take(entries);
    keys.norms = scratch.take(entries / kPanelMultiple);
  }
  for (int64_t i = first; i < first + count; ++i) {
    bool on = start<T>(p, s, i);
    if (!on) continue;
    if (p.coarse) pack_coarse<T>(p, i, keys, 0, entries);
    Ahead<T> none(p, 0, false), ahead(p, i + 1, i + 1 < first + count);
    for (int64_t token = 0; on; ++token) {
      int64_t exact[1];
      if (!p.coarse || scan_coarse<T>(p, s, keys, &i, 1, 0, exact, [&] { ahead.line(); }) > 0) {
        // While the first token is read, memory is busy with this example's own bank.
        scan_rows<T>(p, s, i, 0, token > 0 ? ahead : none);
      }
      on = read<T>(p, s, i);
    }
  }
}

// Scans a part of a shared bank, for some examples.
template <class T>
void scan_shared(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, const int64_t* examples,
                 int64_t count, int64_t part) {
  if (!p.coarse) return scan_panels<T>(p, s, examples, count, part);
  int64_t exact[kExamplesPerBankPass];
  const int64_t exacts =
      scan_coarse<T>(p, s, *p.coarse_keys, examples, count, part, exact, [] {});
  if (exacts > 0) scan_panels<T>(p, s, exact, exacts, part);
}

// Reads for examples that share a bank. Those that read on are scanned for together.
template <class T>
void forward_panels(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t first,
                    int64_t count) {
  int64_t reading[kExamplesPerBankPass], readers = 0;
  for (int64_t i = first; i < first + count; ++i) {
    if (start<T>(p, s, i)) reading[readers++] = i;
  }
  while (readers > 0) {
    scan_shared<T>(p, s, reading, readers, 0);
    const int64_t before = readers;
    readers = 0;
    for (int64_t r = 0; r < before; ++r) {
      if (read<T>(p, s, reading[r])) reading[readers++] = reading[r];
    }
  }
}

}  // namespace

void select_pack(const CpuTapeSelectParams& p, float* key_panels, int64_t first, int64_t count) {
  with_number(p.dtype,
              [&](auto number) { pack<decltype(number)>(p, key_panels, first, count, 0); });
}

void select_pack_coarse(const CpuTapeSelectParams& p, int64_t example, const CpuCoarseKeys& keys,
                        int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) {
    pack_coarse<decltype(number)>(p, example, keys, first, count);
  });
}

bool select_start(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t example) {
  return with_number(p.dtype, [&](auto number) { return start<decltype(number)>(p, s, example); });
}

void select_scan(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, const int64_t* examples,
                 int64_t count, int64_t part) {
  with_number(p.dtype, [&](auto number) {
    using T = decltype(number);
    if (!p.own_banks) return scan_shared<T>(p, s, examples, count, part);
    for (int64_t e = 0; e < count; ++e) {
      int64_t exact[1];
      Ahead<T> none(p, 0, false);
      if (!p.coarse || scan_coarse<T>(p, s, p.coarse_keys[examples[e]], examples + e, 1, part,
                                      exact, [] {}) > 0) {
        scan_rows<T>(p, s, examples[e], part, none);
      }
    }
  });
}

bool select_read(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t example) {
  return with_number(p.dtype, [&](auto number) { return read<decltype(number)>(p, s, example); });
}

void select_fwd(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t first,
                int64_t count) {
  with_number(p.dtype, [&](auto number) {
    p.own_banks ? forward_rows<decltype(number)>(p, s, first, count)
                : forward_panels<decltype(number)>(p, s, first, count);
  });
}

}  // namespace adatape::ADATAPE_ISA
