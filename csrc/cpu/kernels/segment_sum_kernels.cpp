// The sum of the weighted rows that belong to one entry of a bank, in float and in a fixed order.

#include "../cpu_kernels.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {
namespace {

template <class From, class To>
void add_up(const CpuSegmentSumParams& p, int64_t bank_row, const Contribution* first,
            const Contribution* last) {
  const auto row_of = [&p](const Contribution* contribution) {
    return static_cast<const From*>(p.rows) + contribution->row * p.stride_row;
  };
  const auto leading_of = [&p](const Contribution* contribution) {
    return p.leading + contribution->read * p.lead_width;
  };
  To* const out = static_cast<To*>(p.out) + bank_row * p.width;
  int64_t d = 0;
  for (; d + kLanes <= p.width; d += kLanes) {
    Vec sum = {};
    for (const Contribution* c = first; c != last; ++c) sum += c->weight * load(row_of(c) + d);
    if (d + kLanes <= p.lead_width) {
      for (const Contribution* c = first; c != last; ++c) sum += load(leading_of(c) + d);
    } else if (d < p.lead_width) {
      const int some = static_cast<int>(p.lead_width - d);
      for (const Contribution* c = first; c != last; ++c) sum += load_some(leading_of(c) + d, some);
    }
    store(out + d, sum);
  }
  for (; d < p.width; ++d) {
    float sum = 0.0f;
    for (const Contribution* c = first; c != last; ++c) sum += c->weight * to_float(row_of(c)[d]);
    for (const Contribution* c = first; d < p.lead_width && c != last; ++c) sum += leading_of(c)[d];
    out[d] = from_float<To>(sum);
  }
}

}  // namespace

void segment_sum(const CpuSegmentSumParams& p, int64_t bank_row, const Contribution* first,
                 const Contribution* last) {
  with_wide_and_narrow(p.rows_dtype, p.out_dtype, [&](auto row, auto out) {
    add_up<decltype(row), decltype(out)>(p, bank_row, first, last);
  });
}

}  // namespace adatape::ADATAPE_ISA
