// Adaptive tape reading on the CPU: checks, allocation, tasks, registration.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "reading.h"
#include "segment_sum.h"

namespace adatape {
namespace {

constexpr int64_t kBankRowsPerTask = 256;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::vector<int64_t> checked_bank_lens(const Tensor& any, int64_t bank_size) {
  const Tensor lens = dense(torch::stable::to(any, ScalarType::Long));
  const int64_t* const values = lens.const_data_ptr<int64_t>();
  std::vector<int64_t> result = allocate_vector<int64_t>("bank_lens", any.numel());
  std::copy(values, values + any.numel(), result.begin());
  for (const int64_t len : result) {
    if (len < 0 || len > bank_size) {
      refuse("bank_lens: expected 0 to ", bank_size, " (the bank's size), got ", len);
    }
  }
  return result;
}

struct CpuTapeSelectOutputs {
  Tensor weights, ponder, indices, counts;
};

CpuTapeSelectOutputs allocate_selection(const Tensor& query, int64_t num_tape_tokens,
                                        int64_t topk) {
  const int64_t batch = query.size(0);
  return {
      .weights = new_output("weights", query, {batch, num_tape_tokens, topk}, ScalarType::Float),
      .ponder = new_output("ponder", query, {batch}, ScalarType::Float),
      .indices = new_output("indices", query, {batch, num_tape_tokens, topk}, ScalarType::Int),
      .counts = new_output("counts", query, {batch}, ScalarType::Int)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> tape_select(
    const Tensor& query_any, const Tensor& keys_any, int64_t num_tape_tokens, int64_t topk,
    double halt_threshold, bool average_query, const std::string& loss_type,
    const std::optional<Tensor>& read_mask_any, const std::optional<Tensor>& bank_lens) {
  check_tape_select(query_any, keys_any, num_tape_tokens, topk, halt_threshold, loss_type,
                    read_mask_any, bank_lens, kCpuDtypes);
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const int64_t batch = query.size(0);
  const CpuBank bank = bank_of(keys);
  std::optional<Tensor> read_mask;
  if (read_mask_any) read_mask = dense(*read_mask_any);
  std::vector<int64_t> lens;
  if (bank_lens) lens = checked_bank_lens(*bank_lens, bank.bank_size);
  const bool shared_bank = keys.dim() == 2 && batch > 0;
  const int64_t columns = round_up(bank.bank_size, kColumnMultiple);
  std::optional<Tensor> by_column;
  if (shared_bank)
    by_column = new_output("keys by column", query, {bank.width, columns}, ScalarType::Float);
  const CpuTapeSelectOutputs outputs = allocate_selection(query, num_tape_tokens, topk);

  const CpuTapeSelectParams p{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = bank,
      .keys_by_column = by_column ? by_column->const_data_ptr<float>() : nullptr,
      .read_mask = read_mask ? read_mask->const_data_ptr<bool>() : nullptr,
      .bank_lens = bank_lens ? lens.data() : nullptr,
      .weights = outputs.weights.mutable_data_ptr<float>(),
      .ponder = outputs.ponder.mutable_data_ptr<float>(),
      .indices = outputs.indices.mutable_data_ptr<int32_t>(),
      .counts = outputs.counts.mutable_data_ptr<int32_t>(),
      .num_tape_tokens = num_tape_tokens,
      .topk = topk,
      .halt_threshold = static_cast<float>(halt_threshold),
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .dtype = dtype_of(query),
  };
  const CpuKernels& chosen = cpu_kernels();
  if (shared_bank) {
    float* const to = by_column->mutable_data_ptr<float>();
    run_row_tasks(columns, kBankRowsPerTask, [&](int64_t first, int64_t count) {
      chosen.select_columns(p, to, first, count);
    });
  }
  run_row_tasks(batch, shared_bank ? kExamplesPerBankPass : 1,
                [&](int64_t first, int64_t count) { chosen.select_fwd(p, first, count); });
  return {outputs.weights, outputs.ponder, outputs.indices, outputs.counts};
}

namespace {

struct CpuTapeSelectGradients {
  Tensor dquery;      // (batch, key_dim), float32 whatever the dtype of the query
  Tensor dread_keys;  // (batch, num_tape_tokens, topk, key_dim), float32
  Tensor dkeys;       // as keys
};

CpuTapeSelectGradients allocate_gradients(const Tensor& query, const Tensor& keys,
                                          const Tensor& indices) {
  const int64_t batch = query.size(0), key_dim = keys.size(keys.dim() - 1);
  return {.dquery = new_output("dquery", query, {batch, key_dim}, ScalarType::Float),
          .dread_keys =
              new_output("dread_keys", query, {batch, indices.size(1), indices.size(2), key_dim},
                         ScalarType::Float),
          .dkeys = new_output("dkeys", keys, keys.sizes(), keys.scalar_type())};
}

std::tuple<Tensor, Tensor> tape_select_bwd(const Tensor& query_any, const Tensor& keys_any,
                                           const Tensor& dweights_any, const Tensor& dponder_any,
                                           const Tensor& indices_any, const Tensor& counts_any,
                                           bool average_query, const std::string& loss_type) {
  check_tape_select_bwd(query_any, keys_any, dweights_any, dponder_any, indices_any, counts_any,
                        loss_type, kCpuDtypes);
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const Tensor dweights = dense(dweights_any), dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any), counts = dense(counts_any);
  const int64_t batch = query.size(0), num_tape_tokens = indices.size(1), topk = indices.size(2);
  const TapeReads reads{.indices = indices.const_data_ptr<int32_t>(),
                        .counts = counts.const_data_ptr<int32_t>(),
                        .batch = batch,
                        .num_tape_tokens = num_tape_tokens,
                        .topk = topk,
                        .bank_size = keys.size(keys.dim() - 2),
                        .own_banks = keys.dim() == 3};
  reads.checked_offsets();
  const CpuTapeSelectGradients gradients = allocate_gradients(query, keys, indices);

  const CpuTapeSelectParams p{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = bank_of(keys),
      .indices = static_cast<int32_t*>(indices.data_ptr()),
      .counts = static_cast<int32_t*>(counts.data_ptr()),
      .dweights = dweights.const_data_ptr<float>(),
      .dponder = dponder.const_data_ptr<float>(),
      .dquery = gradients.dquery.mutable_data_ptr<float>(),
      .dread_keys = gradients.dread_keys.mutable_data_ptr<float>(),
      .num_tape_tokens = num_tape_tokens,
      .topk = topk,
      .average_query = average_query,
      .entropy = loss_type == "entropy",
      .dtype = dtype_of(query),
  };
  const CpuKernels& chosen = cpu_kernels();
  run_tasks(batch, [&](int64_t i) { chosen.select_bwd(p, i); });

  const Segments segments =
      sort_into_segments(reads, [&](int64_t i, int64_t token, int64_t rank) -> Contribution {
        const int64_t read = (i * num_tape_tokens + token) * topk + rank;
        return {.row = read, .read = read, .weight = 1.0f};
      });
  sum_segments(segments, {.rows = p.dread_keys,
                          .stride_row = p.keys.width,
                          .out = gradients.dkeys.data_ptr(),
                          .width = p.keys.width,
                          .rows_dtype = DType::kFloat,
                          .out_dtype = dtype_of(gradients.dkeys)});
  return {torch::stable::to(gradients.dquery, query.scalar_type()), gradients.dkeys};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_select", ADATAPE_KERNEL("tape_select", &adatape::tape_select));
  m.impl("tape_select_bwd", ADATAPE_KERNEL("tape_select_bwd", &adatape::tape_select_bwd));
}
