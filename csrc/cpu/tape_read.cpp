// Reading a tape on the CPU, and its gradient: checks, allocation, tasks, registration.
//
// In the gradient each row of the bank's is written once: the sum of what the merging and the
// selection add to an entry, or zeros.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "reading.h"
#include "segment_sum.h"

namespace adatape {
namespace {

// Returns the first `width` features of a bank's entries, as a view.
Tensor leading_features(const Tensor& bank, int64_t width) {
  const int64_t last = bank.dim() - 1;
  if (bank.size(last) == width) return bank;
  Tensor all = bank;
  return torch::stable::narrow(all, last, 0, width);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tape_read(
    const Tensor& query, const Tensor& bank, int64_t num_tape_tokens, int64_t topk,
    double halt_threshold, bool average_query, const std::string& loss_type,
    const std::optional<Tensor>& read_mask, const std::optional<Tensor>& bank_lens,
    std::optional<int64_t> capacity) {
  check_tape_read(query, bank, kCpuDtypes);
  const auto [weights, ponder, indices, counts] =
      tape_select(query, leading_features(bank, query.size(1)), num_tape_tokens, topk,
                  halt_threshold, average_query, loss_type, read_mask, bank_lens);
  const auto [tape, offsets] = tape_gather(bank, indices, weights, counts, capacity);
  return {tape, weights, ponder, offsets, indices, counts};
}

struct CpuTapeReadGradients {
  Tensor dquery;       // (batch, key_dim), float32 whatever the dtype of the query
  Tensor dweights;     // (batch, num_tape_tokens, topk), float32
  Tensor dread_keys;   // (batch, num_tape_tokens, topk, key_dim), float32
  SparseOutput dbank;  // as bank
};

CpuTapeReadGradients allocate_gradients(const Tensor& query, const Tensor& bank,
                                        const Tensor& indices) {
  const int64_t batch = query.size(0), key_dim = query.size(1);
  const int64_t num_tape_tokens = indices.size(1), topk = indices.size(2);
  return {
      .dquery = new_output("dquery", query, {batch, key_dim}, ScalarType::Float),
      .dweights = new_output("dweights", query, {batch, num_tape_tokens, topk}, ScalarType::Float),
      .dread_keys = new_output("dread_keys", query, {batch, num_tape_tokens, topk, key_dim},
                               ScalarType::Float),
      .dbank = new_sparse_output("dbank", bank, bank.sizes(), bank.scalar_type())};
}

std::tuple<Tensor, Tensor> tape_read_bwd(const Tensor& query_any, const Tensor& bank_any,
                                         const Tensor& dtape_any, const Tensor& dweights_any,
                                         const Tensor& dponder_any, const Tensor& weights_any,
                                         const Tensor& indices_any, const Tensor& counts_any,
                                         bool average_query, const std::string& loss_type) {
  check_tape_read_bwd(query_any, bank_any, dtape_any, dweights_any, dponder_any, weights_any,
                      indices_any, counts_any, loss_type, kCpuDtypes);
  const Tensor query = with_dense_rows(query_any), bank = with_dense_rows(bank_any);
  const Tensor dtape = with_dense_rows(dtape_any), weights = dense(weights_any);
  const Tensor dweights = dense(dweights_any), dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any), counts = dense(counts_any);
  const TapeReads reads = tape_reads(bank, indices, counts);
  const std::vector<int32_t> offsets = reads.checked_offsets();
  if (offsets[reads.batch] > dtape.size(0)) {
    refuse("dtape: expected at least the ", offsets[reads.batch], " tape rows read, got ",
           dtape.size(0));
  }
  Segments segments(reads, offsets);
  const CpuTapeReadGradients gradients = allocate_gradients(query, bank, indices);
  const DType dtype = dtype_of(query);

  const CpuTapeGatherParams merging{
      .bank = bank_of(bank),
      .indices = reads.indices,
      .weights = weights.const_data_ptr<float>(),
      .offsets = offsets.data(),
      .tape = dtape.data_ptr(),
      .stride_tape = dtape.stride(0),
      .dweights = gradients.dweights.mutable_data_ptr<float>(),
      .batch = reads.batch,
      .num_tape_tokens = reads.num_tape_tokens,
      .topk = reads.topk,
      .dtype = dtype,
  };
  CpuBank keys = merging.bank;
  keys.width = query.size(1);
  const CpuTapeSelectParams selection{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = keys,
      .indices = static_cast<int32_t*>(indices.data_ptr()),
      .counts = static_cast<int32_t*>(counts.data_ptr()),
      .dweights = merging.dweights,
      .dponder = dponder.const_data_ptr<float>(),
      .dquery = gradients.dquery.mutable_data_ptr<float>(),
      .dread_keys = gradients.dread_keys.mutable_data_ptr<float>(),
      .num_tape_tokens = reads.num_tape_tokens,
      .topk = reads.topk,
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .dtype = dtype,
  };
  const float* const given = dweights.const_data_ptr<float>();
  const CpuKernels& chosen = cpu_kernels();
  run_tasks(reads.batch, [&](int64_t i) {
    chosen.gather_bwd(merging, i);
    const int64_t first = i * reads.num_tape_tokens * reads.topk;
    const int64_t count = reads.counts[i] * reads.topk;
    for (int64_t read = first; read < first + count; ++read) merging.dweights[read] += given[read];
    chosen.select_bwd(selection, i);
    segments.list(i, [&](int64_t token, int64_t rank) -> Contribution {
      const int64_t read = (i * reads.num_tape_tokens + token) * reads.topk + rank;
      return {.row = offsets[i] + token, .read = read, .weight = merging.weights[read]};
    });
  });
  segments.sum({.rows = merging.tape,
                .stride_row = merging.stride_tape,
                .leading = selection.dread_keys,
                .lead_width = keys.width,
                .out = gradients.dbank.tensor.data_ptr(),
                .width = merging.bank.width,
                .rows_dtype = dtype,
                .out_dtype = dtype},
               gradients.dbank.holds_zeros);
  return {torch::stable::to(gradients.dquery, query.scalar_type()), gradients.dbank.tensor};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_read", ADATAPE_KERNEL("tape_read", &adatape::tape_read));
  m.impl("tape_read_bwd", ADATAPE_KERNEL("tape_read_bwd", &adatape::tape_read_bwd));
}
