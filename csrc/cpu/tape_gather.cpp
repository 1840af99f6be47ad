// Variable-length gathering on the CPU: checks, allocation, tasks, registration.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "reading.h"
#include "segment_sum.h"

namespace adatape {
namespace {

// How many rows of the tape a task takes: several tasks for each thread, but so many rows that a
// thread has more to do than to wake up.
int64_t rows_per_task(const CpuTapeGatherParams& p, int64_t total) {
  constexpr int64_t kTasksPerThread = 4, kLeastBytes = int64_t{64} << 10;
  const int64_t row_bytes = p.bank.width * size_of(p.dtype);
  const int64_t least = kLeastBytes / std::max<int64_t>((p.topk + 1) * row_bytes, 1) + 1;
  return std::max(least, total / (kTasksPerThread * torch::stable::get_num_threads()));
}

struct CpuTapeGatherOutputs {
  Tensor tape;     // (rows, width)
  Tensor offsets;  // (batch + 1,) int32
};

CpuTapeGatherOutputs allocate_tape(const Tensor& bank, const Tensor& counts, int64_t rows) {
  return {.tape = new_output("tape", bank, {rows, bank.size(bank.dim() - 1)}, bank.scalar_type()),
          .offsets = new_output("offsets", counts, {counts.size(0) + 1}, counts.scalar_type())};
}

}  // namespace

std::tuple<Tensor, Tensor> tape_gather(const Tensor& bank_any, const Tensor& indices_any,
                                       const Tensor& weights_any, const Tensor& counts_any,
                                       std::optional<int64_t> capacity) {
  check_tape_gather(bank_any, indices_any, weights_any, counts_any, capacity, kCpuDtypes);
  const Tensor bank = with_dense_rows(bank_any), indices = dense(indices_any);
  const Tensor weights = dense(weights_any), counts = dense(counts_any);
  const TapeReads reads = tape_reads(bank, indices, counts);
  const std::vector<int32_t> offsets = reads.checked_offsets();
  const int64_t total = offsets[reads.batch];
  if (capacity && *capacity < total) {
    refuse("capacity: expected at least the ", total, " tape rows read, got ", *capacity);
  }
  const CpuTapeGatherOutputs outputs = allocate_tape(bank, counts, capacity ? *capacity : total);
  std::copy(offsets.begin(), offsets.end(), outputs.offsets.mutable_data_ptr<int32_t>());

  const CpuTapeGatherParams p{
      .bank = bank_of(bank),
      .indices = reads.indices,
      .weights = weights.const_data_ptr<float>(),
      .offsets = offsets.data(),
      .tape = outputs.tape.data_ptr(),
      .stride_tape = outputs.tape.size(1),
      .batch = reads.batch,
      .num_tape_tokens = reads.num_tape_tokens,
      .topk = reads.topk,
      .dtype = dtype_of(bank),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_row_tasks(total, rows_per_task(p, total), [&](int64_t first, int64_t count) {
    // The last example that begins at the row or before it, as one without rows ends there.
    const auto behind = std::upper_bound(offsets.begin(), offsets.end() - 1, first);
    chosen.gather_fwd(p, behind - offsets.begin() - 1, first, count);
  });
  zero_rows_from(outputs.tape, total);
  return {outputs.tape, outputs.offsets};
}

namespace {

struct CpuTapeGatherGradients {
  SparseOutput dbank;  // as bank
  Tensor dweights;     // (batch, num_tape_tokens, topk), float32
};

CpuTapeGatherGradients allocate_gradients(const Tensor& bank, const Tensor& weights) {
  return {.dbank = new_sparse_output("dbank", bank, bank.sizes(), bank.scalar_type()),
          .dweights = new_output("dweights", weights, weights.sizes(), ScalarType::Float)};
}

std::tuple<Tensor, Tensor> tape_gather_bwd(const Tensor& dtape_any, const Tensor& bank_any,
                                           const Tensor& indices_any, const Tensor& weights_any,
                                           const Tensor& counts_any) {
  check_tape_gather_bwd(dtape_any, bank_any, indices_any, weights_any, counts_any, kCpuDtypes);
  const Tensor dtape = with_dense_rows(dtape_any), bank = with_dense_rows(bank_any);
  const Tensor indices = dense(indices_any);
  const Tensor weights = dense(weights_any), counts = dense(counts_any);
  const TapeReads reads = tape_reads(bank, indices, counts);
  const std::vector<int32_t> offsets = reads.checked_offsets();
  if (offsets[reads.batch] > dtape.size(0)) {
    refuse("dtape: expected at least the ", offsets[reads.batch], " tape rows read, got ",
           dtape.size(0));
  }
  Segments segments(reads, offsets);
  const CpuTapeGatherGradients gradients = allocate_gradients(bank, weights);

  const CpuTapeGatherParams p{
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
      .dtype = dtype_of(bank),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_tasks(reads.batch, [&](int64_t i) {
    chosen.gather_bwd(p, i);
    segments.list(i, [&](int64_t token, int64_t rank) -> Contribution {
      const int64_t read = (i * p.num_tape_tokens + token) * p.topk + rank;
      return {.row = offsets[i] + token, .read = read, .weight = p.weights[read]};
    });
  });
  segments.sum({.rows = p.tape,
                .stride_row = p.stride_tape,
                .out = gradients.dbank.tensor.data_ptr(),
                .width = p.bank.width,
                .rows_dtype = p.dtype,
                .out_dtype = p.dtype},
               gradients.dbank.holds_zeros);
  return {gradients.dbank.tensor, gradients.dweights};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_gather", ADATAPE_KERNEL("tape_gather", &adatape::tape_gather));
  m.impl("tape_gather_bwd", ADATAPE_KERNEL("tape_gather_bwd", &adatape::tape_gather_bwd));
}
