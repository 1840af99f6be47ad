// How the ops launch the segment sum: by a look at every contribution for banks of the examples'
// own, in parts of sorted segments for a bank that they share.

#pragma once

#include "../allocation.h"
#include "kernels/shared_segments.cuh"
#include "launch.h"

namespace adatape::cuda {

// Sums the segments of parameters that say nothing of what is for shared banks only. `like` is a
// tensor where they lie.
template <class From, class To, bool Aligned>
void sum_segments(CudaSegmentSumParams p, bool shared, const Tensor& like,
                  const LaunchStream& stream) {
  const auto blocks = [&stream](int64_t blocks, int64_t static_bytes = 0) -> LaunchConfig {
    return {.grid = {.x = blocks},
            .block_threads = kSegmentSumThreads,
            .static_bytes = static_bytes,
            .stream = stream};
  };
  if (!shared) {
    launch(segment_sum_kernel<From, To, Aligned>, blocks(segment_sum_blocks(p)), p);
    return;
  }
  const auto places = [&](const char* name) {
    return allocate(name, like, {p.contributions}, ScalarType::Int);
  };
  const Tensor starts = allocate_zeros("starts", like, {p.bank_size + 1}, ScalarType::Int);
  const Tensor ranks = places("ranks"), unordered = places("unordered"), order = places("order");
  p.further = p.contributions == 0 ? 0 : (p.contributions - 1) / kSegmentPart;
  const Tensor partial =
      allocate("partial sums", like, {2, p.further + 1, p.width}, ScalarType::Float);
  p.starts = starts.mutable_data_ptr<int32_t>();
  p.ranks = ranks.mutable_data_ptr<int32_t>();
  p.unordered = unordered.mutable_data_ptr<int32_t>();
  p.order = order.mutable_data_ptr<int32_t>();
  p.partial = partial.mutable_data_ptr<float>();
  const int64_t by_contribution = ceil_div(p.contributions, kSegmentSumThreads);
  launch(segment_count_kernel, blocks(by_contribution), p);
  launch(segment_starts_kernel, blocks(1, kSegmentStartsBytes), p);
  launch(segment_place_kernel, blocks(by_contribution), p);
  launch(segment_order_kernel, blocks(by_contribution), p);
  launch(segment_part_kernel<From, To, Aligned>,
         blocks(ceil_div(segment_parts(p), kSegmentSumWarps)), p);
  launch(segment_add_parts_kernel<To, Aligned>, blocks(ceil_div(p.further, kSegmentSumWarps)), p);
}

}  // namespace adatape::cuda
