// The sum of the weighted rows that belong to one entry of a bank, in float and in a fixed order.

#include "../cpu_kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

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
};

// Writes `vecs` vectors of the sum, from feature d on.
template <int vecs, class From, class To>
void add_up(const Segment& segment, int64_t d, To* to) {
  Vec sums[vecs] = {};
  for (const Contribution* c = segment.first; c != segment.last; ++c) {
    const From* const row = segment.row<From>(c) + d;
    for (int v = 0; v < vecs; ++v) sums[v] += c->weight * load(row + v * kLanes);
  }
  for (int v = 0; v < vecs && d + v * kLanes < segment.p.lead_width; ++v) {
    const int64_t lanes = segment.p.lead_width - d - v * kLanes;
    for (const Contribution* c = segment.first; c != segment.last; ++c) {
      const float* const from = segment.leading(c) + d + v * kLanes;
      sums[v] += lanes >= kLanes ? load(from) : load_some(from, lanes);
    }
  }
  for (int v = 0; v < vecs; ++v) store(to + v * kLanes, sums[v]);
}

template <class From, class To>
void add_up_row(const Segment& segment) {
  constexpr int kVecs = 4;  // so many vectors of a row are served by one lookup of its place
  const CpuSegmentSumParams& p = segment.p;
  To* const out = static_cast<To*>(p.out) + segment.first->bank_row * p.width;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= p.width; d += kVecs * kLanes) {
    add_up<kVecs, From>(segment, d, out + d);
  }
  for (; d + kLanes <= p.width; d += kLanes) add_up<1, From>(segment, d, out + d);
  for (; d < p.width; ++d) {
    float sum = 0.0f;
    for (const Contribution* c = segment.first; c != segment.last; ++c) {
      sum += c->weight * to_float(segment.row<From>(c)[d]);
    }
    for (const Contribution* c = segment.first; d < p.lead_width && c != segment.last; ++c) {
      sum += segment.leading(c)[d];
    }
    out[d] = from_float<To>(sum);
  }
}

}  // namespace

void segment_sum(const CpuSegmentSumParams& p, const Contribution* first,
                 const Contribution* last) {
  const Segment segment{p, first, last};
  with_wide_and_narrow(p.rows_dtype, p.out_dtype, [&](auto row, auto out) {
    add_up_row<decltype(row), decltype(out)>(segment);
  });
}

}  // namespace adatape::ADATAPE_ISA
