// Variable-length gathering: checks, tasks, registration.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "readers.h"
#include "tensors.h"

namespace adatape {
namespace {

// Offsets (batch + 1,) of each example's tape; refuses counts and indices out of range.
std::vector<int32_t> checked_offsets(const int32_t* indices, const int32_t* counts, int64_t batch,
                                     int64_t steps, int64_t topk, int64_t bank_size) {
  std::vector<int32_t> offsets(batch + 1, 0);
  for (int64_t i = 0; i < batch; ++i) {
    if (counts[i] < 0 || counts[i] > steps) {
      refuse("counts: expected 0 to ", steps, ", got ", counts[i]);
    }
    offsets[i + 1] = offsets[i] + counts[i];
    for (int64_t r = 0; r < counts[i] * topk; ++r) {
      const int32_t entry = indices[i * steps * topk + r];
      if (entry < 0 || entry >= bank_size) {
        refuse("indices: expected 0 to ", bank_size - 1, " (inside the bank) where read, got ",
               entry);
      }
    }
  }
  return offsets;
}

GatherParams params(const Tensor& bank, const Tensor& indices, const Tensor& weights) {
  GatherParams p{};
  p.bank = bank_of(bank);
  p.indices = indices.const_data_ptr<int32_t>();
  p.weights = weights.const_data_ptr<float>();
  p.steps = indices.size(1), p.topk = indices.size(2);
  p.dtype = dtype_of(bank);
  return p;
}

std::tuple<Tensor, Tensor> tape_gather(const Tensor& bank_any, const Tensor& indices_any,
                                       const Tensor& weights_any, const Tensor& counts_any,
                                       std::optional<int64_t> capacity) {
  const Tensor bank = with_dense_rows(bank_any);
  const Tensor indices = dense(indices_any);
  const Tensor weights = dense(weights_any);
  const Tensor counts = dense(counts_any);
  GatherParams p = params(bank, indices, weights);
  const int64_t batch = indices.size(0);
  const std::vector<int32_t> offsets = checked_offsets(p.indices, counts.const_data_ptr<int32_t>(),
                                                       batch, p.steps, p.topk, p.bank.size);
  const int64_t total = offsets[batch];
  if (capacity && *capacity < total) {
    refuse("capacity: expected at least the ", total, " tape rows read, got ", *capacity);
  }
  const int64_t rows = capacity ? *capacity : total;
  const Tensor tape = new_output(bank, {rows, p.bank.width}, bank.scalar_type());
  const Tensor offsets_out = new_output(counts, {batch + 1}, counts.scalar_type());
  std::copy(offsets.begin(), offsets.end(), static_cast<int32_t*>(offsets_out.data_ptr()));
  p.offsets = offsets.data();
  p.tape = tape.data_ptr();
  p.tape_row = p.bank.width;
  const Kernels& chosen = kernels();
  run_tasks(batch, [&](int64_t i) { chosen.gather_fwd(p, i); });
  zero_rows_from(tape, total);
  return {tape, offsets_out};
}

std::tuple<Tensor, Tensor> tape_gather_bwd(const Tensor& dtape_any, const Tensor& bank_any,
                                           const Tensor& indices_any, const Tensor& weights_any,
                                           const Tensor& counts_any) {
  const Tensor dtape = with_dense_rows(dtape_any), bank = with_dense_rows(bank_any);
  const Tensor indices = dense(indices_any);
  const Tensor weights = dense(weights_any);
  const Tensor counts = dense(counts_any);
  GatherParams p = params(bank, indices, weights);
  const int64_t batch = indices.size(0);
  const int32_t* const lens = counts.const_data_ptr<int32_t>();
  const std::vector<int32_t> offsets =
      checked_offsets(p.indices, lens, batch, p.steps, p.topk, p.bank.size);
  const Tensor dbank = new_output(bank, bank.sizes(), bank.scalar_type());
  const Tensor dweights = new_output(weights, weights.sizes(), ScalarType::Float);
  p.offsets = offsets.data();
  p.tape = dtape.data_ptr();
  p.tape_row = dtape.stride(0);
  p.dweights = static_cast<float*>(dweights.data_ptr());

  const Kernels& chosen = kernels();
  run_tasks(batch, [&](int64_t i) { chosen.gather_bwd(p, i); });
  const ReaderLists readers =
      list_readers(p.indices, lens, batch, p.steps, p.topk, p.bank.size, bank.dim() == 3,
                   [&](int64_t i, int64_t s, int64_t j) {
                     return Reader{offsets[i] + s, p.weights[(i * p.steps + s) * p.topk + j]};
                   });
  sum_into_bank(readers, p.tape, p.tape_row, p.dtype, dbank);
  return {dbank, dweights};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cpu, m) {
  m.def(
      "tape_gather(Tensor bank, Tensor indices, Tensor weights, Tensor counts, int? capacity) "
      "-> (Tensor tape, Tensor offsets)");
  m.def(
      "tape_gather_bwd(Tensor dtape, Tensor bank, Tensor indices, Tensor weights, Tensor counts) "
      "-> (Tensor dbank, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_gather", TORCH_BOX(&adatape::tape_gather));
  m.impl("tape_gather_bwd", TORCH_BOX(&adatape::tape_gather_bwd));
}
