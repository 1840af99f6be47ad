// The gradient of reading a tape in CUDA: checks, allocation, launches, registration.
//
// A bank's gradient is written once. That of an example's own bank is filled with zeros; then the
// rows of the entries that were read are stored, the features behind the keys' by the kernel that
// goes over the tape's tokens, the keys' by the one that goes back over an example's steps.

#include <cmath>
#include <tuple>

#include "../allocation.h"
#include "kernels/tape_gather_kernels.cuh"
#include "kernels/tape_select_bwd.cuh"
#include "launch.h"
#include "sum_segments.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// How the gradient of a bank comes about: of the examples' own, of a shared one by atomics, or of a
// shared one in a fixed order.
struct BankGradients {
  MergedGradients merged;
  KeyGradients keys;
};

BankGradients kinds_of(bool own_banks, bool deterministic) {
  if (own_banks) return {MergedGradients::kStored, KeyGradients::kStored};
  if (deterministic) return {MergedGradients::kNoted, KeyGradients::kContributions};
  return {MergedGradients::kAdded, KeyGradients::kAdded};
}

struct CudaTapeReadGradients {
  Tensor dquery;         // as query
  Tensor dbank;          // shaped as bank; in float32 where reads add to it by atomics
  Tensor dweights;       // (batch, num_tape_tokens, topk), float32
  Tensor states;         // (batch, num_tape_tokens + 1, key_dim), float32
  Tensor contributions;  // (reads, key_dim) float32; without rows if not kContributions
  Tensor entries;        // (batch, num_tape_tokens, topk), each read's entry
  Tensor row_of;         // (batch, num_tape_tokens, topk), each read's row of the tape
};

CudaTapeReadGradients allocate_gradients(const Tensor& query, const Tensor& bank,
                                         const Tensor& indices, MergedGradients kind) {
  const int64_t batch = indices.size(0), num_tape_tokens = indices.size(1);
  const int64_t key_dim = query.size(1);
  const int64_t rows = kind == MergedGradients::kNoted ? indices.numel() : 0;
  return {
      .dquery = allocate("dquery", query, query.sizes()),
      .dbank = kind == MergedGradients::kStored ? allocate_zeros("dbank", bank, bank.sizes())
               : kind == MergedGradients::kAdded
                   ? allocate_zeros("dbank", bank, bank.sizes(), ScalarType::Float)
                   : allocate("dbank", bank, bank.sizes()),
      .dweights = allocate("dweights", query, indices.sizes(), ScalarType::Float),
      .states = allocate("states", query, {batch, num_tape_tokens + 1, key_dim}, ScalarType::Float),
      .contributions = allocate("contributions", query, {rows, key_dim}, ScalarType::Float),
      .entries = allocate("entries", indices, indices.sizes()),
      .row_of = allocate("row_of", indices, indices.sizes())};
}

std::tuple<Tensor, Tensor> tape_read_bwd(const Tensor& query_any, const Tensor& bank_any,
                                         const Tensor& dtape_any, const Tensor& dweights_any,
                                         const Tensor& dponder_any, const Tensor& weights_any,
                                         const Tensor& indices_any, const Tensor& counts_any,
                                         bool average_query, const std::string& loss_type,
                                         bool deterministic) {
  check_tape_read_bwd(query_any, bank_any, dtape_any, dweights_any, dponder_any, weights_any,
                      indices_any, counts_any, loss_type, kCudaDtypes);
  const Tensor query = with_dense_rows(query_any), bank = with_dense_rows(bank_any);
  const Tensor dtape = with_dense_rows(dtape_any), weights = dense(weights_any);
  const Tensor dweights = dense(dweights_any), dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any), counts = dense(counts_any);
  if (indices.numel() == 0) {
    return {allocate_zeros("dquery", query, query.sizes()),
            allocate_zeros("dbank", bank, bank.sizes())};
  }
  const bool own_banks = bank.dim() == 3;
  const BankGradients kinds = kinds_of(own_banks, deterministic);
  const CudaTapeReadGradients gradients = allocate_gradients(query, bank, indices, kinds.merged);
  const int64_t batch = indices.size(0), key_dim = query.size(1), dim = bank.size(bank.dim() - 1);
  const Tensor offsets = allocate("offsets", counts, {batch + 1});
  const int64_t key_bytes = key_dim * static_cast<int64_t>(query.element_size());
  const bool listed = kinds.merged == MergedGradients::kNoted;

  const CudaTapeGatherParams merging{
      .bank = bank.data_ptr(),
      .stride_example = own_banks ? bank.stride(0) : 0,
      .stride_entry = bank.stride(bank.dim() - 2),
      .indices = indices.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr<float>(),
      .counts = counts.const_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int32_t>(),
      .tape = dtape.data_ptr(),
      .stride_tape = dtape.stride(0),
      .batch = batch,
      .num_tape_tokens = indices.size(1),
      .topk = indices.size(2),
      .bank_size = bank.size(bank.dim() - 2),
      .dim = dim,
      .rows = dtape.size(0),
      .fused = batch <= kGatherFusedBatch,
      .dweights = gradients.dweights.mutable_data_ptr<float>(),
      .entries = gradients.entries.mutable_data_ptr<int32_t>(),
      .row_of = gradients.row_of.mutable_data_ptr<int32_t>(),
      .dbank = gradients.dbank.data_ptr(),
      .kind = kinds.merged,
      .given = dweights.const_data_ptr<float>(),
      .key_dim = key_dim,
  };
  const CudaTapeSelectBwdParams selection{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = merging.bank,
      .stride_example = merging.stride_example,
      .stride_entry = merging.stride_entry,
      .dweights = merging.dweights,
      .dponder = dponder.const_data_ptr<float>(),
      .indices = merging.indices,
      .counts = merging.counts,
      .states = gradients.states.mutable_data_ptr<float>(),
      .dquery = gradients.dquery.data_ptr(),
      .dkeys = listed ? gradients.contributions.data_ptr() : merging.dbank,
      .stride_dkey = listed ? key_dim : dim,
      .entries = nullptr,
      .bank_size = merging.bank_size,
      .key_dim = key_dim,
      .num_tape_tokens = static_cast<int32_t>(merging.num_tape_tokens),
      .topk = static_cast<int32_t>(merging.topk),
      .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(key_dim))),
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .kind = kinds.keys,
      .dtape = own_banks ? dtape.data_ptr() : nullptr,
      .stride_tape = merging.stride_tape,
      .tape_rows = merging.rows,
      .merged_with = merging.weights,
      .offsets = merging.offsets,
  };
  const CudaSegmentSumParams segments{
      .entries = merging.entries,
      .row_of = merging.row_of,
      .weights = merging.weights,
      .rows = merging.tape,
      .stride_row = merging.stride_tape,
      .leading = static_cast<const float*>(gradients.contributions.data_ptr()),
      .lead_width = key_dim,
      .out = merging.dbank,
      .num_banks = 1,
      .contributions = indices.numel(),
      .bank_size = merging.bank_size,
      .width = dim,
  };
  const LaunchStream stream = stream_of(query);
  const LaunchConfig one_block{.grid = {.x = merging.fused ? 0 : 1},
                               .block_threads = kGatherThreads,
                               .static_bytes = kGatherStaticBytes,
                               .stream = stream};
  const LaunchConfig by_token{
      .grid = {.x = ceil_div(batch * merging.num_tape_tokens, kGatherWarps)},
      .block_threads = kGatherThreads,
      .static_bytes = kGatherStaticBytes,
      .stream = stream};
  const LaunchConfig by_example{.grid = {.x = batch},
                                .block_threads = kSelectBwdThreads,
                                .static_bytes = sizeof(TapeSelectBwdShared),
                                .stream = stream};
  launch(tape_gather_offsets_kernel, one_block, merging);
  with_type_of(query, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_gather_bwd_kernel<T, Aligned>, by_token, merging);
          launch(tape_select_bwd_kernel<T, Aligned>, by_example, selection);
          if (listed) sum_segments<T, T, Aligned>(segments, true, query, stream);
        },
        rows_aligned({dtape, bank}) && key_bytes % kAccessBytes == 0);
  });
  const bool added = kinds.merged == MergedGradients::kAdded;
  return {gradients.dquery,
          added ? torch::stable::to(gradients.dbank, bank.scalar_type()) : gradients.dbank};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("tape_read_bwd", ADATAPE_KERNEL("tape_read_bwd", &adatape::cuda::tape_read_bwd));
}
