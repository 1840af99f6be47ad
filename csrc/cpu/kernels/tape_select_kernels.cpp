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
//   the task are multiplied with it: a dense product, in which every score is a chain of fused
//   multiply-adds over the features, or a few (gemm.h).
//
// Where a processor multiplies bytes and a bank is read often enough, keys are packed as bytes,
// once. The scores of these have errors with a bound (coarse_keys.h). They leave some candidates, a
// few dozen of thousands of entries, and the exact scores of those alone are computed, in the order
// of addition above. So results are the same bits. Where too many are left, as in a bank of many
// equal rows, or numbers are too large, too small or none, the exact scores of all are computed.
//
// Neither order of addition depends on where a row stands or on who else reads. So equal rows of a
// bank give equal bits, and so does an example in any batch. Scores are looked at while they are in
// the first cache and then forgotten (best_entries.h); what has been read is a bit of an entry.
//
// bfloat16 keys are multiplied as float. SPEC 3 wants sums in float32 of a query that has 24 bits
// from the second token on, and AVX512-BF16 multiplies 8: the query would have to be split into
// three parts, whose products take 3 instructions where two of float do, and numbers below the
// normal ones would count as zero.

#include "scratch.h"
#include "tape_select_scan.h"

namespace adatape::ADATAPE_ISA {
namespace {

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

// Returns the product of a query and a key, added up lane by lane. The chains of a product with a
// shared bank are good enough to choose by, but weights are made of the differences of scores.
template <class T>
float product_in_lanes(const float* query, const T* key, int64_t width) {
  Vec sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    sums[0] += load(query + d) * load(key + d);
    sums[1] += load(query + d + kLanes) * load(key + d + kLanes);
  }
  for (; d < width; d += kLanes)
    sums[0] += load(query + d) * load_some(key + d, smaller(kLanes, width - d));
  return sum(sums[0] + sums[1]);
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
  float* const query = s.queries + i * s.stride_query;
  float scores[kMaxTopk];
  for (int64_t j = 0; j < p.topk; ++j) {
    const int32_t entry = merged[j].entry;
    scores[j] = p.own_banks ? merged[j].score
                            : product_in_lanes(query, key_row<T>(p, i, entry), p.keys.width);
    p.indices[out + j] = entry;
    s.unread[i * s.stride_unread + entry / kUnreadBits] &= ~(uint32_t{1} << entry % kUnreadBits);
  }
  s.left[i] -= p.topk;
  p.ponder[i] += merge_weights(p, scores, p.weights + out);
  s.halting[i] += p.weights[out];
  p.counts[i] += 1;
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
  const int64_t exacts = scan_coarse<T>(p, s, *p.coarse_keys, examples, count, part, exact, [] {});
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
  with_number(p.dtype,
              [&](auto number) { pack_coarse<decltype(number)>(p, example, keys, first, count); });
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
