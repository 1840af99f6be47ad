// Adaptive tape reading in CUDA: checks, allocation, launches, registration.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "../allocation.h"
#include "kernels/tape_select_bwd.cuh"
#include "kernels/tape_select_fwd.cuh"
#include "kernels/tape_select_tiles.cuh"
#include "launch.h"
#include "sum_segments.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// A bank of at most so many entries is scored by one warp for each block, a larger one by
// kSelectThreads.
constexpr int64_t kOneWarpBank = 64;
// An own bank of at most so many bytes stays in shared memory for all tape tokens, where a block
// may have as many. Then two blocks fit into the 227 kB that a multiprocessor of 9.0 has.
constexpr int64_t kResidentBytes = 108 << 10;
// The query and unread bits of a block, or its queries, lie in shared memory if they take no more
// than this.
constexpr int64_t kSharedWorkspaceBytes = 48 << 10;

float scale_of(const Tensor& query) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(query.size(1))));
}

struct CudaTapeSelectOutputs {
  Tensor weights, ponder, indices, counts;
};

CudaTapeSelectOutputs allocate_selection(const Tensor& query, int64_t num_tape_tokens,
                                         int64_t topk) {
  const int64_t batch = query.size(0);
  return {.weights = allocate("weights", query, {batch, num_tape_tokens, topk}, ScalarType::Float),
          .ponder = allocate("ponder", query, {batch}, ScalarType::Float),
          .indices = allocate("indices", query, {batch, num_tape_tokens, topk}, ScalarType::Int),
          .counts = allocate("counts", query, {batch}, ScalarType::Int)};
}

// A block for each example.
void select_from_own_banks(const Tensor& query, const Tensor& keys, int threads,
                           CudaTapeSelectParams p) {
  const TapeSelectSizes sizes(p.key_dim, p.bank_size, static_cast<int>(keys.element_size()),
                              threads);
  const int64_t workspace = sizes.workspace_bytes();
  constexpr int64_t kStatic = sizeof(TapeSelectShared);
  const int64_t most = most_shared_bytes(query) - dynamic_start(kStatic);
  const int64_t streamed = sizes.tile_bytes(threads, false, p.bank_size);
  std::optional<Tensor> workspaces;
  if (workspace > std::min(kSharedWorkspaceBytes, most - streamed)) {
    workspaces = allocate("workspaces", query, {p.batch * workspace}, ScalarType::Byte);
    p.workspaces = static_cast<char*>(workspaces->data_ptr());
  }
  const int64_t shared_workspace = workspaces ? 0 : workspace;
  p.resident = sizes.tile_bytes(threads, true, p.bank_size) <=
               std::min(kResidentBytes, most - shared_workspace);
  const LaunchStream stream = stream_of(query);
  const LaunchConfig config{
      .grid = {.x = p.batch},
      .block_threads = threads,
      .shared_bytes = shared_workspace + sizes.tile_bytes(threads, p.resident, p.bank_size),
      .static_bytes = kStatic,
      .stream = stream};
  with_type_of(query, [&]<class T>() {
    with_flags([&]<bool Aligned>() { launch(tape_select_kernel<T, Aligned>, config, p); },
               rows_aligned({keys}));
  });
}

// Two launches for each tape token: tiles of the bank are scored, and their lists merged.
void select_from_tiles(const Tensor& query, const Tensor& keys, int threads,
                       const CudaTapeSelectParams& read) {
  const TapeSelectSizes sizes(read.key_dim, read.bank_size, static_cast<int>(keys.element_size()),
                              threads);
  const int64_t groups = ceil_div(read.batch, kExamplesOfTile);
  const int64_t examples = groups * kExamplesOfTile;
  constexpr int64_t kStatic = sizeof(TapeSelectTileShared);
  const int64_t most = most_shared_bytes(query) - dynamic_start(kStatic);
  const int64_t tile = sizes.tile_bytes(threads, false, read.bank_size);
  const int64_t group_bytes = kExamplesOfTile * sizes.features * int64_t{sizeof(float)};
  const Tensor queries = allocate("queries", query, {examples, sizes.features}, ScalarType::Float);
  const Tensor unread = allocate("unread", query, {examples, sizes.words}, ScalarType::Int);
  const Tensor left = allocate("left", query, {examples}, ScalarType::Long);
  const Tensor halting = allocate("halting", query, {examples}, ScalarType::Float);
  const Tensor lists =
      allocate("lists", query, {examples, sizes.tiles, read.topk, 2}, ScalarType::Int);
  const CudaTapeSelectTilesParams p{
      .read = read,
      .queries = queries.mutable_data_ptr<float>(),
      .unread = reinterpret_cast<unsigned*>(unread.mutable_data_ptr<int32_t>()),
      .left = left.mutable_data_ptr<int64_t>(),
      .halting = halting.mutable_data_ptr<float>(),
      .lists = reinterpret_cast<OrderedEntry*>(lists.mutable_data_ptr<int32_t>()),
      .groups = groups,
      .tiles = sizes.tiles,
      .queries_shared = group_bytes <= std::min(kSharedWorkspaceBytes, most - tile)};
  const LaunchStream stream = stream_of(query);
  const LaunchConfig preparing{.grid = {.x = examples}, .block_threads = threads, .stream = stream};
  const LaunchConfig scoring{.grid = {.x = groups * sizes.tiles},
                             .block_threads = threads,
                             .shared_bytes = tile + (p.queries_shared ? group_bytes : 0),
                             .static_bytes = kStatic,
                             .stream = stream};
  const LaunchConfig merging{.grid = {.x = read.batch},
                             .block_threads = threads,
                             .static_bytes = sizeof(TapeSelectMergeShared),
                             .stream = stream};
  with_type_of(query, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_select_prepare_kernel<T>, preparing, p);
          for (int32_t token = 0; token < read.num_tape_tokens; ++token) {
            launch(tape_select_tile_kernel<T, Aligned>, scoring, p);
            launch(tape_select_merge_kernel<T>, merging, p);
          }
        },
        rows_aligned({keys}));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tape_select(
    const Tensor& query_any, const Tensor& keys_any, int64_t num_tape_tokens, int64_t topk,
    double halt_threshold, bool average_query, const std::string& loss_type,
    const std::optional<Tensor>& read_mask_any, const std::optional<Tensor>& bank_lens_any) {
  check_tape_select(query_any, keys_any, num_tape_tokens, topk, halt_threshold, loss_type,
                    read_mask_any, bank_lens_any, kCudaDtypes);
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const int64_t batch = query.size(0), bank_size = keys.size(keys.dim() - 2);
  const bool own_banks = keys.dim() == 3;
  std::optional<Tensor> read_mask, bank_lens;
  if (read_mask_any) read_mask = dense(*read_mask_any);
  if (bank_lens_any) bank_lens = dense(torch::stable::to(*bank_lens_any, ScalarType::Long));
  const CudaTapeSelectOutputs outputs = allocate_selection(query, num_tape_tokens, topk);

  const int threads = bank_size <= kOneWarpBank ? kWarpSize : kSelectThreads;
  const CudaTapeSelectParams p{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = keys.data_ptr(),
      .stride_example = own_banks ? keys.stride(0) : 0,
      .stride_entry = keys.stride(keys.dim() - 2),
      .read_mask = read_mask ? read_mask->const_data_ptr<bool>() : nullptr,
      .bank_lens = bank_lens ? bank_lens->const_data_ptr<int64_t>() : nullptr,
      .weights = outputs.weights.mutable_data_ptr<float>(),
      .ponder = outputs.ponder.mutable_data_ptr<float>(),
      .indices = outputs.indices.mutable_data_ptr<int32_t>(),
      .counts = outputs.counts.mutable_data_ptr<int32_t>(),
      .workspaces = nullptr,
      .batch = batch,
      .bank_size = bank_size,
      .key_dim = query.size(1),
      .num_tape_tokens = static_cast<int32_t>(num_tape_tokens),
      .topk = static_cast<int32_t>(topk),
      .halt_threshold = static_cast<float>(halt_threshold),
      .scale = scale_of(query),
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .resident = false,
  };
  if (own_banks) {
    select_from_own_banks(query, keys, threads, p);
  } else {
    select_from_tiles(query, keys, threads, p);
  }
  return {outputs.weights, outputs.ponder, outputs.indices, outputs.counts};
}

struct CudaTapeSelectGradients {
  Tensor dquery;         // as query
  Tensor dkeys;          // shaped as keys; in float32 where reads add to it by atomics
  Tensor contributions;  // (reads, key_dim) float32; without rows if not kContributions
  Tensor entries;        // (batch, num_tape_tokens, topk), each read's entry
  Tensor states;         // (batch, num_tape_tokens + 1, key_dim), float32
};

CudaTapeSelectGradients allocate_gradients(const Tensor& query, const Tensor& keys,
                                           const Tensor& indices, KeyGradients kind) {
  const int64_t batch = indices.size(0), num_tape_tokens = indices.size(1);
  const int64_t key_dim = query.size(1);
  const int64_t rows = kind == KeyGradients::kContributions ? indices.numel() : 0;
  return {.dquery = allocate("dquery", query, query.sizes()),
          .dkeys = kind == KeyGradients::kStored ? allocate_zeros("dkeys", keys, keys.sizes())
                   : kind == KeyGradients::kAdded
                       ? allocate_zeros("dkeys", keys, keys.sizes(), ScalarType::Float)
                       : allocate("dkeys", keys, keys.sizes()),
          .contributions = allocate("contributions", query, {rows, key_dim}, ScalarType::Float),
          .entries = allocate("entries", indices, indices.sizes()),
          .states =
              allocate("states", query, {batch, num_tape_tokens + 1, key_dim}, ScalarType::Float)};
}

// If `deterministic`, the gradient of a shared bank's keys is summed in a fixed order, so that
// equal input gives equal bits, instead of by atomics.
std::tuple<Tensor, Tensor> tape_select_bwd(const Tensor& query_any, const Tensor& keys_any,
                                           const Tensor& dweights_any, const Tensor& dponder_any,
                                           const Tensor& indices_any, const Tensor& counts_any,
                                           bool average_query, const std::string& loss_type,
                                           bool deterministic) {
  check_tape_select_bwd(query_any, keys_any, dweights_any, dponder_any, indices_any, counts_any,
                        loss_type, kCudaDtypes);
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const Tensor dweights = dense(dweights_any), dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any), counts = dense(counts_any);
  const int64_t batch = indices.size(0);
  const bool own_banks = keys.dim() == 3;
  const auto kind = own_banks       ? KeyGradients::kStored
                    : deterministic ? KeyGradients::kContributions
                                    : KeyGradients::kAdded;
  const CudaTapeSelectGradients gradients = allocate_gradients(query, keys, indices, kind);

  const CudaTapeSelectBwdParams p{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = keys.data_ptr(),
      .stride_example = own_banks ? keys.stride(0) : 0,
      .stride_entry = keys.stride(keys.dim() - 2),
      .dweights = dweights.const_data_ptr<float>(),
      .dponder = dponder.const_data_ptr<float>(),
      .indices = indices.const_data_ptr<int32_t>(),
      .counts = counts.const_data_ptr<int32_t>(),
      .states = gradients.states.mutable_data_ptr<float>(),
      .dquery = gradients.dquery.data_ptr(),
      .dkeys = kind == KeyGradients::kContributions ? gradients.contributions.data_ptr()
                                                    : gradients.dkeys.data_ptr(),
      .stride_dkey = query.size(1),
      .entries = kind == KeyGradients::kContributions
                     ? gradients.entries.mutable_data_ptr<int32_t>()
                     : nullptr,
      .bank_size = keys.size(keys.dim() - 2),
      .key_dim = query.size(1),
      .num_tape_tokens = static_cast<int32_t>(indices.size(1)),
      .topk = static_cast<int32_t>(indices.size(2)),
      .scale = scale_of(query),
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .kind = kind,
  };
  const CudaSegmentSumParams segments{
      .entries = p.entries,
      .row_of = nullptr,
      .weights = nullptr,
      .rows = gradients.contributions.data_ptr(),
      .stride_row = p.key_dim,
      .out = gradients.dkeys.data_ptr(),
      .num_banks = 1,
      .contributions = indices.numel(),
      .bank_size = p.bank_size,
      .width = p.key_dim,
  };
  const LaunchStream stream = stream_of(query);
  const LaunchConfig by_example{.grid = {.x = batch},
                                .block_threads = kSelectBwdThreads,
                                .static_bytes = sizeof(TapeSelectBwdShared),
                                .stream = stream};
  with_type_of(query, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_select_bwd_kernel<T, Aligned>, by_example, p);
          if (kind == KeyGradients::kContributions) {
            sum_segments<float, T, Aligned>(segments, true, query, stream);
          }
        },
        rows_aligned({keys}));
  });
  const bool added = kind == KeyGradients::kAdded;
  return {gradients.dquery,
          added ? torch::stable::to(gradients.dkeys, keys.scalar_type()) : gradients.dkeys};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("tape_select", ADATAPE_KERNEL("tape_select", &adatape::cuda::tape_select));
  m.impl("tape_select_bwd", ADATAPE_KERNEL("tape_select_bwd", &adatape::cuda::tape_select_bwd));
}
