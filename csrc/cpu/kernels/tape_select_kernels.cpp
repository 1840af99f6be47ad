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

// Copies entries to panels: of each feature kPanel entries in a row, feature after feature.
template <class T>
void pack(const CpuTapeSelectParams& p, float* panels, int64_t first, int64_t count) {
  const int64_t width = p.keys.width;
  for (int64_t c = first; c < first + count; c += kLanes) {
    float* const to = panels + c / kPanel * kPanel * width + c % kPanel;
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

bool reads_on(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i) {
  return p.counts[i] < p.num_tape_tokens && s.halting[i] < p.halt_threshold && s.left[i] >= p.topk;
}

template <class T>
bool start(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i) {
  const T* const query = static_cast<const T*>(p.query) + i * p.stride_query;
  for (int64_t d = 0; d < s.stride_query; ++d) {
    s.queries[i * s.stride_query + d] = d < p.keys.width ? to_float(query[d]) : 0.0f;
  }
  const int64_t valid = p.bank_lens ? p.bank_lens[i] : p.keys.bank_size;
  const bool* const mask = p.read_mask ? p.read_mask + i * p.keys.bank_size : nullptr;
  s.left[i] = 0;
  for (int64_t w = 0; w < s.stride_unread; ++w) {
    const int64_t first = w * kUnreadBits, bits = smaller(larger(valid - first, 0), kUnreadBits);
    uint32_t unread = bits < kUnreadBits ? (uint32_t{1} << bits) - 1 : ~uint32_t{0};
    for (int64_t b = 0; mask && b < bits; ++b) unread &= ~(uint32_t{mask[first + b]} << b);
    s.unread[i * s.stride_unread + w] = unread;
    s.left[i] += __builtin_popcount(unread);
  }
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

// Fetches some rows of a bank into the second cache.
template <class T>
__attribute__((always_inline)) inline void fetch(const CpuTapeSelectParams& p, int64_t example,
                                                 int64_t first, int64_t count) {
  for (int64_t r = first; r < smaller(first + count, p.keys.bank_size); ++r) {
    prefetch<kSecondCache>(key_row<T>(p, example, r), p.keys.width);
  }
}

// Scans a part of an example's own bank. Meanwhile it fetches rows of the bank of example `next`
// from row `fetched` on, if that is not negative.
template <class T>
void scan_rows(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t i, int64_t part,
               int64_t next, int64_t fetched) {
  const int64_t width = p.keys.width, begin = part * s.part_size;
  const int64_t valid = p.bank_lens ? p.bank_lens[i] : p.keys.bank_size;
  const int64_t end = smaller(begin + s.part_size, valid);
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
      store(scores + count,
            row_products(query, key_row<T>(p, i, c), rows, p.keys.stride_row, width));
      if (fetched >= 0) fetch<T>(p, next, fetched, kRowsAhead), fetched += kRowsAhead;
    }
    best.offer(scores, s.unread + i * s.stride_unread, first, count);
  }
}

// Scans a part of a shared bank.
void scan_panels(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, const int64_t* examples,
                 int64_t count, int64_t part) {
  const int64_t width = p.keys.width, begin = part * s.part_size;
  const int64_t end = smaller(begin + s.part_size, p.keys.bank_size);
  Scratch scratch;
  float* const queries = scratch.take(count * width);
  for (int64_t e = 0; e < count; ++e) {
    const float* const query = s.queries + examples[e] * s.stride_query;
    for (int64_t d = 0; d < width; ++d) queries[e * width + d] = query[d];
    best_of_part(p, s, examples[e], part).clear();
  }
  for (int64_t first = begin; first < end; first += kPanel) {
    for (int64_t tile = 0; tile < count; tile += kExamplesOfTile) {
      const int64_t rows = smaller(kExamplesOfTile, count - tile);
      alignas(kVecBytes) float scores[kExamplesOfTile * kPanel];
      gemm<float>({.rows = rows,
                   .cols = kPanel,
                   .depth = width,
                   .a = queries + tile * width,
                   .stride_a_row = width,
                   .stride_a_col = 1,
                   .b = p.key_panels + first * width,
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
  const int64_t vectors = (p.keys.bank_size + kLanes - 1) / kLanes;
  for (int64_t i = first; i < first + count; ++i) {
    bool on = start<T>(p, s, i);
    for (int64_t token = 0; on; ++token) {
      // While the first token is read, memory is busy with this example's own bank.
      const bool ahead = token > 0 && i + 1 < first + count;
      scan_rows<T>(p, s, i, 0, i + 1, ahead ? (token - 1) * vectors * kRowsAhead : -1);
      on = read<T>(p, s, i);
    }
  }
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
    scan_panels(p, s, reading, readers, 0);
    const int64_t before = readers;
    readers = 0;
    for (int64_t r = 0; r < before; ++r) {
      if (read<T>(p, s, reading[r])) reading[readers++] = reading[r];
    }
  }
}

}  // namespace

void select_pack(const CpuTapeSelectParams& p, float* key_panels, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto number) { pack<decltype(number)>(p, key_panels, first, count); });
}

bool select_start(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t example) {
  return with_number(p.dtype, [&](auto number) { return start<decltype(number)>(p, s, example); });
}

void select_scan(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, const int64_t* examples,
                 int64_t count, int64_t part) {
  if (p.key_panels) return scan_panels(p, s, examples, count, part);
  with_number(p.dtype, [&](auto number) {
    for (int64_t e = 0; e < count; ++e) {
      scan_rows<decltype(number)>(p, s, examples[e], part, 0, -1);
    }
  });
}

bool select_read(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t example) {
  return with_number(p.dtype, [&](auto number) { return read<decltype(number)>(p, s, example); });
}

void select_fwd(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t first,
                int64_t count) {
  with_number(p.dtype, [&](auto number) {
    p.key_panels ? forward_panels<decltype(number)>(p, s, first, count)
                 : forward_rows<decltype(number)>(p, s, first, count);
  });
}

}  // namespace adatape::ADATAPE_ISA
