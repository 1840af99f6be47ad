// Variable-length gathering in CUDA: checks, allocation, launches, registration.

#include <algorithm>
#include <optional>
#include <tuple>

#include "../allocation.h"
#include "kernels/tape_gather_kernels.cuh"
#include "launch.h"
#include "sum_segments.h"
#include "template_arguments.h"

namespace adatape::cuda {
namespace {

// What forward and backward tell the kernels about the bank and its reads.
CudaTapeGatherParams reading_params(const Tensor& bank, const Tensor& indices,
                                    const Tensor& weights, const Tensor& counts,
                                    const Tensor& offsets) {
  return {
      .bank = bank.data_ptr(),
      .stride_example = bank.dim() == 3 ? bank.stride(0) : 0,
      .stride_entry = bank.stride(bank.dim() - 2),
      .indices = indices.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr<float>(),
      .counts = counts.const_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int32_t>(),
      .batch = indices.size(0),
      .num_tape_tokens = indices.size(1),
      .topk = indices.size(2),
      .bank_size = bank.size(bank.dim() - 2),
      .dim = bank.size(bank.dim() - 1),
  };
}

Tensor allocate_offsets(const Tensor& counts) {
  return allocate("offsets", counts, {counts.size(0) + 1});
}

Tensor allocate_tape(const Tensor& bank, int64_t rows) {
  return allocate("tape", bank, {rows, bank.size(bank.dim() - 1)});
}

void write_offsets(const CudaTapeGatherParams& p, const LaunchStream& stream) {
  launch(tape_gather_offsets_kernel,
         {.grid = {.x = 1},
          .block_threads = kGatherThreads,
          .static_bytes = kGatherStaticBytes,
          .stream = stream},
         p);
}

// Writes the offsets, looks at every count and index, and returns how many rows are read.
int64_t checked_rows(CudaTapeGatherParams p, const Tensor& counts, const LaunchStream& stream) {
  constexpr int64_t kInts = sizeof(TapeGatherStatus) / sizeof(int32_t);
  const Tensor status = allocate_zeros("status", counts, {kInts});
  p.status = reinterpret_cast<TapeGatherStatus*>(status.data_ptr());
  const int64_t looking = ceil_div(p.batch * p.num_tape_tokens * p.topk, kGatherThreads);
  launch(tape_gather_offsets_kernel,
         {.grid = {.x = 1 + looking},
          .block_threads = kGatherThreads,
          .static_bytes = kGatherStaticBytes,
          .stream = stream},
         p);
  TapeGatherStatus found;
  copy_to_host(&found, p.status, sizeof found, stream);
  if (found.bad_counts) refuse("counts: expected 0 to ", p.num_tape_tokens, ", got ", found.count);
  if (found.bad_indices) {
    refuse("indices: expected 0 to ", p.bank_size - 1, " (inside the bank) where read, got ",
           found.index);
  }
  return found.rows;
}

std::tuple<Tensor, Tensor> tape_gather(const Tensor& bank_any, const Tensor& indices_any,
                                       const Tensor& weights_any, const Tensor& counts_any,
                                       std::optional<int64_t> capacity) {
  check_tape_gather(bank_any, indices_any, weights_any, counts_any, capacity, kCudaDtypes);
  const Tensor bank = with_dense_rows(bank_any), indices = dense(indices_any);
  const Tensor weights = dense(weights_any), counts = dense(counts_any);
  const LaunchStream stream = stream_of(bank);
  const Tensor offsets = allocate_offsets(counts);
  CudaTapeGatherParams p = reading_params(bank, indices, weights, counts, offsets);
  const bool empty = indices.numel() == 0 || bank.numel() == 0;
  p.fused = capacity && !empty && p.batch <= kGatherFusedBatch;
  if (!capacity) {
    p.rows = checked_rows(p, counts, stream);
  } else {
    p.rows = *capacity;
    if (!p.fused) write_offsets(p, stream);
  }
  if (empty) return {allocate_zeros("tape", bank, {p.rows, p.dim}), offsets};

  const Tensor tape = allocate_tape(bank, p.rows);
  p.tape = tape.data_ptr();
  p.stride_tape = p.dim;
  const LaunchConfig config{
      .grid = {.x = ceil_div(std::max(p.batch * p.num_tape_tokens, p.rows), kGatherWarps)},
      .block_threads = kGatherThreads,
      .static_bytes = kGatherStaticBytes,
      .stream = stream};
  with_type_of(bank, [&]<class T>() {
    with_flags([&]<bool Aligned>() { launch(tape_gather_kernel<T, Aligned>, config, p); },
               rows_aligned({bank, tape}));
  });
  return {tape, offsets};
}

struct CudaTapeGatherGradients {
  Tensor dbank;     // shaped as bank; in float32, and zeros, where reads add to it by atomics
  Tensor dweights;  // (batch, num_tape_tokens, topk)
  Tensor entries;   // (batch, num_tape_tokens, topk), each read's entry
  Tensor row_of;    // (batch, num_tape_tokens, topk), each read's row of the tape
};

CudaTapeGatherGradients allocate_gradients(const Tensor& bank, const Tensor& indices,
                                           const Tensor& weights, bool atomic) {
  return {.dbank = atomic ? allocate_zeros("dbank", bank, bank.sizes(), ScalarType::Float)
                          : allocate("dbank", bank, bank.sizes()),
          .dweights = allocate("dweights", weights, weights.sizes()),
          .entries = allocate("entries", indices, indices.sizes()),
          .row_of = allocate("row_of", indices, indices.sizes())};
}

// If `deterministic`, a bank's gradient is summed in a fixed order, so that equal input gives equal
// bits. That of an example's own bank always is; for a shared one it costs more than atomics do.
std::tuple<Tensor, Tensor> tape_gather_bwd(const Tensor& dtape_any, const Tensor& bank_any,
                                           const Tensor& indices_any, const Tensor& weights_any,
                                           const Tensor& counts_any, bool deterministic) {
  check_tape_gather_bwd(dtape_any, bank_any, indices_any, weights_any, counts_any, kCudaDtypes);
  const Tensor dtape = with_dense_rows(dtape_any), bank = with_dense_rows(bank_any);
  const Tensor indices = dense(indices_any), weights = dense(weights_any);
  const Tensor counts = dense(counts_any);
  if (indices.numel() == 0 || bank.numel() == 0) {
    return {allocate_zeros("dbank", bank, bank.sizes()),
            allocate_zeros("dweights", weights, weights.sizes())};
  }
  const LaunchStream stream = stream_of(bank);
  const Tensor offsets = allocate_offsets(counts);
  const bool own_banks = bank.dim() == 3, atomic = !own_banks && !deterministic;
  const CudaTapeGatherGradients gradients = allocate_gradients(bank, indices, weights, atomic);

  CudaTapeGatherParams p = reading_params(bank, indices, weights, counts, offsets);
  p.tape = dtape.data_ptr();
  p.stride_tape = dtape.stride(0);
  p.rows = dtape.size(0);
  p.fused = p.batch <= kGatherFusedBatch;
  p.dweights = gradients.dweights.mutable_data_ptr<float>();
  p.entries = gradients.entries.mutable_data_ptr<int32_t>();
  p.row_of = gradients.row_of.mutable_data_ptr<int32_t>();
  p.dbank = gradients.dbank.data_ptr();
  p.kind = atomic ? MergedGradients::kAdded : MergedGradients::kNoted;
  if (!p.fused) write_offsets(p, stream);

  const int64_t num_banks = own_banks ? p.batch : 1;
  const CudaSegmentSumParams segments{
      .entries = p.entries,
      .row_of = p.row_of,
      .weights = p.weights,
      .rows = p.tape,
      .stride_row = p.stride_tape,
      .out = p.dbank,
      .num_banks = num_banks,
      .contributions = p.batch / num_banks * p.num_tape_tokens * p.topk,
      .bank_size = p.bank_size,
      .width = p.dim,
  };
  const LaunchConfig by_token{.grid = {.x = ceil_div(p.batch * p.num_tape_tokens, kGatherWarps)},
                              .block_threads = kGatherThreads,
                              .static_bytes = kGatherStaticBytes,
                              .stream = stream};
  with_type_of(bank, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_gather_bwd_kernel<T, Aligned>, by_token, p);
          if (!atomic) sum_segments<T, T, Aligned>(segments, !own_banks, bank, stream);
        },
        rows_aligned({dtape, bank}));
  });
  return {atomic ? torch::stable::to(gradients.dbank, bank.scalar_type()) : gradients.dbank,
          gradients.dweights};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("tape_gather", ADATAPE_KERNEL("tape_gather", &adatape::cuda::tape_gather));
  m.impl("tape_gather_bwd", ADATAPE_KERNEL("tape_gather_bwd", &adatape::cuda::tape_gather_bwd));
}
