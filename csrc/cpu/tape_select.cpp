// Adaptive tape reading: checks, tasks, registration.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "readers.h"
#include "tensors.h"

namespace adatape {
namespace {

constexpr int64_t kRowsPerTask = 256;  // of a bank

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

SelectParams params(const Tensor& query, const Tensor& keys, int64_t steps, int64_t topk,
                    bool average_query, const std::string& loss_type) {
  SelectParams p{};
  p.query = query.data_ptr();
  p.query_row = query.stride(0);
  p.keys = bank_of(keys);
  p.batch = query.size(0);
  p.steps = steps, p.topk = topk;
  p.average_query = average_query, p.entropy = loss_type == "entropy";
  p.dtype = dtype_of(query);
  return p;
}

std::vector<int64_t> checked_bank_lens(const Tensor& any, int64_t bank_size) {
  const Tensor lens = dense(torch::stable::to(any, ScalarType::Long));
  const int64_t* const values = lens.const_data_ptr<int64_t>();
  std::vector<int64_t> result(values, values + any.numel());
  for (const int64_t len : result) {
    if (len < 0 || len > bank_size) {
      refuse("bank_lens: expected 0 to ", bank_size, " (the bank's size), got ", len);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tape_select(
    const Tensor& query_any, const Tensor& keys_any, int64_t steps, int64_t topk,
    double halt_threshold, bool average_query, const std::string& loss_type,
    const std::optional<Tensor>& read_mask_any, const std::optional<Tensor>& bank_lens) {
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  SelectParams p = params(query, keys, steps, topk, average_query, loss_type);
  p.halt_threshold = static_cast<float>(halt_threshold);
  std::optional<Tensor> read_mask;
  if (read_mask_any) {
    read_mask = dense(*read_mask_any);
    p.read_mask = read_mask->const_data_ptr<bool>();
  }
  std::vector<int64_t> lens;
  if (bank_lens) {
    lens = checked_bank_lens(*bank_lens, p.keys.size);
    p.bank_lens = lens.data();
  }
  const Tensor weights = new_output(query, {p.batch, steps, topk}, ScalarType::Float);
  const Tensor ponder = new_output(query, {p.batch}, ScalarType::Float);
  const Tensor indices = new_output(query, {p.batch, steps, topk}, ScalarType::Int);
  const Tensor counts = new_output(query, {p.batch}, ScalarType::Int);
  p.weights = static_cast<float*>(weights.data_ptr());
  p.ponder = static_cast<float*>(ponder.data_ptr());
  p.indices = static_cast<int32_t*>(indices.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());

  const Kernels& chosen = kernels();
  std::optional<Tensor> columns;
  int64_t together = 1;
  if (keys.dim() == 2 && p.batch > 0) {
    together = kSelectExamples;
    const int64_t padded = round_up(p.keys.size, kColumnMultiple);
    columns = new_output(query, {p.keys.width, padded}, ScalarType::Float);
    float* const to = static_cast<float*>(columns->data_ptr());
    run_tasks((padded + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      const int64_t first = task * kRowsPerTask;
      chosen.select_columns(p, to, first, std::min(kRowsPerTask, padded - first));
    });
    p.keys_by_column = to;
  }
  run_tasks((p.batch + together - 1) / together, [&](int64_t task) {
    const int64_t first = task * together;
    chosen.select_fwd(p, first, std::min(together, p.batch - first));
  });
  return {weights, ponder, indices, counts};
}

std::tuple<Tensor, Tensor> tape_select_bwd(const Tensor& query_any, const Tensor& keys_any,
                                           const Tensor& dweights_any, const Tensor& dponder_any,
                                           const Tensor& indices_any, const Tensor& counts_any,
                                           bool average_query, const std::string& loss_type) {
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const Tensor dweights = dense(dweights_any);
  const Tensor dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any);
  const Tensor counts = dense(counts_any);
  const int64_t steps = indices.size(1), topk = indices.size(2);
  SelectParams p = params(query, keys, steps, topk, average_query, loss_type);
  const Tensor dquery = new_output(query, {p.batch, p.keys.width}, ScalarType::Float);
  const Tensor drows = new_output(query, {p.batch, steps, topk, p.keys.width}, ScalarType::Float);
  const Tensor dkeys = new_output(keys, keys.sizes(), keys.scalar_type());
  p.dweights = dweights.const_data_ptr<float>();
  p.dponder = dponder.const_data_ptr<float>();
  p.indices = static_cast<int32_t*>(indices.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  p.dquery = static_cast<float*>(dquery.data_ptr());
  p.drows = static_cast<float*>(drows.data_ptr());

  const Kernels& chosen = kernels();
  run_tasks(p.batch, [&](int64_t i) { chosen.select_bwd(p, i); });
  const ReaderLists readers = list_readers(
      p.indices, p.counts, p.batch, steps, topk, p.keys.size, keys.dim() == 3,
      [&](int64_t i, int64_t s, int64_t j) { return Reader{(i * steps + s) * topk + j, 1.0f}; });
  sum_into_bank(readers, p.drows, p.keys.width, DType::kFloat, dkeys);
  return {torch::stable::to(dquery, query.scalar_type()), dkeys};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cpu, m) {
  m.def(
      "tape_select(Tensor query, Tensor keys, int num_tape_tokens, int topk, "
      "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
      "Tensor? bank_lens) -> (Tensor weights, Tensor ponder, Tensor indices, Tensor counts)");
  m.def(
      "tape_select_bwd(Tensor query, Tensor keys, Tensor dweights, Tensor dponder, "
      "Tensor indices, Tensor counts, bool average_query, str loss_type) "
      "-> (Tensor dquery, Tensor dkeys)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_select", TORCH_BOX(&adatape::tape_select));
  m.impl("tape_select_bwd", TORCH_BOX(&adatape::tape_select_bwd));
}
