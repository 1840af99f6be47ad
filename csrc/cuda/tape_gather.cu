// Variable-length gathering: checks, allocation, launches, registration.

#include <algorithm>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "kernels/tape_gather.cuh"
#include "launch.h"

namespace adatape::cuda {
namespace {

GatherParams params(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                    const Tensor& counts, const Tensor& offsets) {
  GatherParams p{};
  p.own_banks = bank.dim() == 3;
  p.bank = bank.data_ptr();
  p.bank_example = p.own_banks ? bank.stride(0) : 0;
  p.bank_row = bank.stride(bank.dim() - 2);
  p.indices = indices.const_data_ptr<int32_t>();
  p.weights = weights.const_data_ptr<float>();
  p.counts = counts.const_data_ptr<int32_t>();
  p.offsets = offsets.mutable_data_ptr<int32_t>();
  p.batch = indices.size(0), p.steps = indices.size(1), p.topk = indices.size(2);
  p.bank_size = bank.size(bank.dim() - 2), p.dim = bank.size(bank.dim() - 1);
  return p;
}

// Writes the offsets and looks at every count and index; returns the rows that are read.
int64_t checked_rows(GatherParams p, const Tensor& counts, const Stream& stream) {
  constexpr int64_t kInts = sizeof(GatherStatus) / sizeof(int32_t);
  const Tensor status = torch::stable::new_zeros(counts, {kInts});
  p.status = reinterpret_cast<GatherStatus*>(status.data_ptr());
  const int64_t looking = ceil_div(p.batch * p.steps * p.topk, kGatherThreads);
  launch(tape_gather_offsets_kernel, {1 + looking}, kGatherThreads, 0, stream, p);
  GatherStatus found;
  copy_to_host(&found, p.status, sizeof found, stream);
  if (found.bad_counts) refuse("counts: expected 0 to ", p.steps, ", got ", found.count);
  if (found.bad_indices) {
    refuse("indices: expected 0 to ", p.bank_size - 1, " (inside the bank) where read, got ",
           found.index);
  }
  return found.rows;
}

std::tuple<Tensor, Tensor> tape_gather(const Tensor& bank_any, const Tensor& indices_any,
                                       const Tensor& weights_any, const Tensor& counts_any,
                                       std::optional<int64_t> capacity) {
  const Tensor bank = with_dense_rows(bank_any), indices = dense(indices_any);
  const Tensor weights = dense(weights_any), counts = dense(counts_any);
  const Stream stream = stream_of(bank);
  const Tensor offsets = torch::stable::new_empty(counts, {indices.size(0) + 1});
  GatherParams p = params(bank, indices, weights, counts, offsets);
  const bool empty = indices.numel() == 0 || bank.numel() == 0;
  p.fused = capacity && !empty && p.batch <= kGatherFusedBatch;
  if (!capacity) {
    p.rows = checked_rows(p, counts, stream);
  } else {
    p.rows = *capacity;
    if (!p.fused) launch(tape_gather_offsets_kernel, {1}, kGatherThreads, 0, stream, p);
  }
  if (empty) return {torch::stable::new_zeros(bank, {p.rows, p.dim}), offsets};

  const Tensor tape = torch::stable::new_empty(bank, {p.rows, p.dim});
  p.tape = tape.data_ptr(), p.tape_row = p.dim;
  const Grid grid{ceil_div(std::max(p.batch * p.steps, p.rows), kGatherWarps)};
  with_type_of(bank, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_gather_kernel<T, Aligned>, grid, kGatherThreads, 0, stream, p);
        },
        rows_aligned({bank, tape}));
  });
  return {tape, offsets};
}

// `ordered`: the bank's gradient is summed in a fixed order, so that equal input gives equal bits.
// A bank of an example's own always is; adding to a shared one by atomics costs less.
std::tuple<Tensor, Tensor> tape_gather_bwd(const Tensor& dtape_any, const Tensor& bank_any,
                                           const Tensor& indices_any, const Tensor& weights_any,
                                           const Tensor& counts_any, bool ordered) {
  const Tensor dtape = with_dense_rows(dtape_any), bank = with_dense_rows(bank_any);
  const Tensor indices = dense(indices_any), weights = dense(weights_any);
  const Tensor counts = dense(counts_any);
  if (indices.numel() == 0 || bank.numel() == 0) {
    return {torch::stable::new_zeros(bank, bank.sizes()),
            torch::stable::new_zeros(weights, weights.sizes())};
  }
  const Stream stream = stream_of(bank);
  const Tensor offsets = torch::stable::new_empty(counts, {indices.size(0) + 1});
  const Tensor entries = torch::stable::new_empty(indices, indices.sizes());
  const Tensor row_of = torch::stable::new_empty(indices, indices.sizes());
  const Tensor dweights = torch::stable::new_empty(weights, weights.sizes());
  const bool atomic = bank.dim() == 2 && !ordered;
  const Tensor dbank = atomic ? torch::stable::new_zeros(bank, bank.sizes(), ScalarType::Float)
                              : torch::stable::new_empty(bank, bank.sizes());
  GatherParams p = params(bank, indices, weights, counts, offsets);
  p.tape = dtape.data_ptr(), p.tape_row = dtape.stride(0), p.rows = dtape.size(0);
  p.dweights = dweights.mutable_data_ptr<float>();
  p.entries = entries.mutable_data_ptr<int32_t>();
  p.row_of = row_of.mutable_data_ptr<int32_t>();
  p.dbank = dbank.data_ptr();
  p.atomic = atomic, p.fused = p.batch <= kGatherFusedBatch;

  if (!p.fused) launch(tape_gather_offsets_kernel, {1}, kGatherThreads, 0, stream, p);
  const Grid tokens{ceil_div(p.batch * p.steps, kGatherWarps)};
  const int64_t banks = p.own_banks ? p.batch : 1;
  const ScatterParams reads{p.entries,   p.row_of, p.weights, p.tape,
                            p.tape_row,  p.dbank,  banks,     p.batch / banks * p.steps * p.topk,
                            p.bank_size, p.dim};
  with_type_of(bank, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_gather_bwd_kernel<T, Aligned>, tokens, kGatherThreads, 0, stream, p);
          if (!p.atomic) {
            launch(scatter_kernel<T, T, Aligned>, {scatter_blocks(reads)}, kScatterThreads, 0,
                   stream, reads);
          }
        },
        rows_aligned({dtape, bank}));
  });
  return {atomic ? torch::stable::to(dbank, bank.scalar_type()) : dbank, dweights};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cuda, m) {
  m.def(
      "tape_gather(Tensor bank, Tensor indices, Tensor weights, Tensor counts, int? capacity) "
      "-> (Tensor tape, Tensor offsets)");
  m.def(
      "tape_gather_bwd(Tensor dtape, Tensor bank, Tensor indices, Tensor weights, Tensor counts, "
      "bool ordered) -> (Tensor dbank, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("tape_gather", TORCH_BOX(&adatape::cuda::tape_gather));
  m.impl("tape_gather_bwd", TORCH_BOX(&adatape::cuda::tape_gather_bwd));
}
