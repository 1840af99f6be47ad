// The sum of the weighted rows that belong to one entry of a bank, in float and in a fixed order.

#include "../cpu_kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

// A long segment is summed in parts of so many contributions, whose sums are then added up. What a
// chain of additions rounds off grows with its length, since every addition rounds a sum of all
// that came before. What is compiled for short segments has one part.
constexpr int64_t kPart = 64;

// The contributions of one segment.
struct Segment {
  const CpuSegmentSumParams& p;
  const Contribution* first;
  const Contribution* last;

  template <class From>
  const From* row(const Contribution* c) const {
    return static_cast<const From*>(p.rows) + c->row * p.stride_row;
  }
  const float* leading(const Contribution* c) const { return p.leading + c->read * p.lead_width; }

  // Returns where the part ends that begins at a contribution.
  template <bool is_long>
  const Contribution* end_of_part(const Contribution* begin) const {
    return is_long && last - begin > kPart ? begin + kPart : last;
  }
};

// Writes `vecs` vectors of the sum, from feature d on.
template <bool is_long, int vecs, class From, class To>
__attribute__((always_inline)) inline void add_up(const Segment& segment, int64_t d, To* to) {
  Vec sums[vecs] = {};
  const Contribution* begin = segment.first;
  do {
    const Contribution* const end = segment.end_of_part<is_long>(begin);
    Vec part[vecs] = {};
    for (const Contribution* c = begin; c != end; ++c) {
      const From* const row = segment.row<From>(c) + d;
      for (int v = 0; v < vecs; ++v) part[v] += c->weight * load(row + v * kLanes);
    }
    for (int v = 0; v < vecs && d + v * kLanes < segment.p.lead_width; ++v) {
      const int64_t lanes = segment.p.lead_width - d - v * kLanes;
      Vec leading = {};
      for (const Contribution* c = begin; c != end; ++c) {
        const float* const from = segment.leading(c) + d + v * kLanes;
        leading += lanes >= kLanes ? load(from) : load_some(from, lanes);
      }
      part[v] += leading;
    }
    for (int v = 0; v < vecs; ++v) sums[v] = is_long ? sums[v] + part[v] : part[v];
    begin = end;
  } while (is_long && begin != segment.last);
  for (int v = 0; v < vecs; ++v) store(to + v * kLanes, sums[v]);
}

// Returns the one feature d of the sum.
template <bool is_long, class From>
inline float add_up(const Segment& segment, int64_t d) {
  float sum = 0.0f;
  const Contribution* begin = segment.first;
  do {
    const Contribution* const end = segment.end_of_part<is_long>(begin);
    float part = 0.0f;
    for (const Contribution* c = begin; c != end; ++c) {
      part += c->weight * to_float(segment.row<From>(c)[d]);
    }
    for (const Contribution* c = begin; d < segment.p.lead_width && c != end; ++c) {
      part += segment.leading(c)[d];
    }
    sum = is_long ? sum + part : part;
    begin = end;
  } while (is_long && begin != segment.last);
  return sum;
}

template <bool is_long, class From, class To>
void add_up_row(const Segment& segment) {
  constexpr int kVecs = 4;  // so many vectors of a row are served by one lookup of its place
  const CpuSegmentSumParams& p = segment.p;
  To* const out = static_cast<To*>(p.out) + segment.first->bank_row * p.width;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= p.width; d += kVecs * kLanes) {
    add_up<is_long, kVecs, From>(segment, d, out + d);
  }
  for (; d + kLanes <= p.width; d += kLanes) add_up<is_long, 1, From>(segment, d, out + d);
  for (; d < p.width; ++d) out[d] = from_float<To>(add_up<is_long, From>(segment, d));
}

}  // namespace

void segment_sum(const CpuSegmentSumParams& p, const Contribution* first,
                 const Contribution* last) {
  const Segment segment{p, first, last};
  with_wide_and_narrow(p.rows_dtype, p.out_dtype, [&](auto row, auto out) {
    using Row = decltype(row);
    using Out = decltype(out);
    last - first > kPart ? add_up_row<true, Row, Out>(segment)
                         : add_up_row<false, Row, Out>(segment);
  });
}

}  // namespace adatape::ADATAPE_ISA
