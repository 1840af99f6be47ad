// Adaptive tape reading: checks, allocation, launches, registration.

#include <optional>
#include <string>
#include <tuple>

#include "dispatch.h"
#include "kernels/tape_select.cuh"
#include "kernels/tape_select_bwd.cuh"
#include "launch.h"

namespace adatape::cuda {
namespace {

// A bank up to this is scored by one warp an example, a larger one by a block.
constexpr int64_t kOneWarpBank = 64;
// A bank up to this stays in shared memory for all steps, so that two blocks fit 227 kB.
constexpr int64_t kResidentBytes = 108 << 10;
// Queries and unread bits of a block lie in shared memory up to this.
constexpr int64_t kSharedWorkspaceBytes = 48 << 10;

float scale_of(const Tensor& query) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(query.size(1))));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tape_select(
    const Tensor& query_any, const Tensor& keys_any, int64_t steps, int64_t topk,
    double halt_threshold, bool average_query, const std::string& loss_type,
    const std::optional<Tensor>& read_mask_any, const std::optional<Tensor>& bank_lens_any) {
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const int64_t batch = query.size(0), bank_size = keys.size(keys.dim() - 2);
  const bool own_banks = keys.dim() == 3;
  if (topk < 1 || topk > kMaxTopk) refuse("topk: expected 1 to ", kMaxTopk, ", got ", topk);
  std::optional<Tensor> read_mask, bank_lens;
  if (read_mask_any) read_mask = dense(*read_mask_any);
  if (bank_lens_any) bank_lens = dense(torch::stable::to(*bank_lens_any, ScalarType::Long));
  const Tensor weights = torch::stable::new_empty(query, {batch, steps, topk}, ScalarType::Float);
  const Tensor ponder = torch::stable::new_empty(query, {batch}, ScalarType::Float);
  const Tensor indices = torch::stable::new_empty(query, {batch, steps, topk}, ScalarType::Int);
  const Tensor counts = torch::stable::new_empty(query, {batch}, ScalarType::Int);

  SelectParams p{};
  p.query = query.data_ptr(), p.query_row = query.stride(0);
  p.keys = keys.data_ptr();
  p.keys_example = own_banks ? keys.stride(0) : 0, p.keys_row = keys.stride(keys.dim() - 2);
  p.read_mask = read_mask ? read_mask->const_data_ptr<bool>() : nullptr;
  p.bank_lens = bank_lens ? bank_lens->const_data_ptr<int64_t>() : nullptr;
  p.weights = weights.mutable_data_ptr<float>(), p.ponder = ponder.mutable_data_ptr<float>();
  p.indices = indices.mutable_data_ptr<int32_t>(), p.counts = counts.mutable_data_ptr<int32_t>();
  p.batch = batch, p.bank_size = bank_size, p.key_dim = query.size(1);
  p.steps = static_cast<int32_t>(steps), p.topk = static_cast<int32_t>(topk);
  p.halt_threshold = static_cast<float>(halt_threshold), p.scale = scale_of(query);
  p.average_query = average_query, p.entropy = loss_type == "entropy";

  const int threads = bank_size <= kOneWarpBank ? kWarpSize : kSelectThreads;
  const int examples = own_banks ? 1 : kSelectExamples;
  const SelectSizes sizes(p, static_cast<int>(keys.element_size()), threads);
  const int64_t workspace = sizes.workspace_bytes(examples);
  const Grid grid{ceil_div(batch, examples)};
  std::optional<Tensor> scratch;
  if (workspace > kSharedWorkspaceBytes) {
    scratch = torch::stable::new_empty(query, {grid.x * workspace}, ScalarType::Byte);
    p.scratch = static_cast<char*>(scratch->data_ptr());
  }
  p.resident = sizes.tile_bytes(threads, true, bank_size) <= kResidentBytes;
  const int64_t shared =
      (scratch ? 0 : workspace) + sizes.tile_bytes(threads, p.resident, bank_size);
  const Stream stream = stream_of(query);
  with_type_of(query, [&]<class T>() {
    with_flags(
        [&]<bool Aligned, bool Own>() {
          launch(tape_select_kernel < T, Aligned, Own ? 1 : kSelectExamples >, grid, threads,
                 shared, stream, p);
        },
        rows_aligned({keys}), own_banks);
  });
  return {weights, ponder, indices, counts};
}

// `ordered`: the gradient of a shared bank's keys is summed in a fixed order, so that equal input
// gives equal bits, instead of by atomics.
std::tuple<Tensor, Tensor> tape_select_bwd(const Tensor& query_any, const Tensor& keys_any,
                                           const Tensor& dweights_any, const Tensor& dponder_any,
                                           const Tensor& indices_any, const Tensor& counts_any,
                                           bool average_query, const std::string& loss_type,
                                           bool ordered) {
  const Tensor query = with_dense_rows(query_any), keys = with_dense_rows(keys_any);
  const Tensor dweights = dense(dweights_any), dponder = dense(dponder_any);
  const Tensor indices = dense(indices_any), counts = dense(counts_any);
  const int64_t batch = indices.size(0), steps = indices.size(1), topk = indices.size(2);
  const int64_t bank_size = keys.size(keys.dim() - 2), key_dim = query.size(1);
  const bool own_banks = keys.dim() == 3;
  const auto kind = own_banks ? KeyGradients::kStored
                    : ordered ? KeyGradients::kListed
                              : KeyGradients::kAdded;
  const Tensor states =
      torch::stable::new_empty(query, {batch, steps + 1, key_dim}, ScalarType::Float);
  const Tensor dquery = torch::stable::new_empty(query, query.sizes());
  const Tensor entries = torch::stable::new_empty(indices, indices.sizes());
  const Tensor dkeys = kind == KeyGradients::kStored ? torch::stable::new_zeros(keys, keys.sizes())
                       : kind == KeyGradients::kAdded
                           ? torch::stable::new_zeros(keys, keys.sizes(), ScalarType::Float)
                           : torch::stable::new_empty(keys, keys.sizes());
  const Tensor listed = torch::stable::new_empty(
      query, {kind == KeyGradients::kListed ? indices.numel() : 0, key_dim}, ScalarType::Float);

  SelectBwdParams p{};
  p.query = query.data_ptr(), p.query_row = query.stride(0);
  p.keys = keys.data_ptr();
  p.keys_example = own_banks ? keys.stride(0) : 0, p.keys_row = keys.stride(keys.dim() - 2);
  p.dweights = dweights.const_data_ptr<float>(), p.dponder = dponder.const_data_ptr<float>();
  p.indices = indices.const_data_ptr<int32_t>(), p.counts = counts.const_data_ptr<int32_t>();
  p.states = states.mutable_data_ptr<float>(), p.dquery = dquery.data_ptr();
  p.dkeys = kind == KeyGradients::kListed ? listed.data_ptr() : dkeys.data_ptr();
  p.entries = entries.mutable_data_ptr<int32_t>();
  p.bank_size = bank_size, p.key_dim = key_dim;
  p.steps = static_cast<int32_t>(steps), p.topk = static_cast<int32_t>(topk);
  p.scale = scale_of(query);
  p.average_query = average_query, p.entropy = loss_type == "entropy";
  p.kind = kind;

  const ScatterParams reads{p.entries,        nullptr, nullptr,         p.dkeys,   key_dim,
                            dkeys.data_ptr(), 1,       indices.numel(), bank_size, key_dim};
  const Stream stream = stream_of(query);
  with_type_of(query, [&]<class T>() {
    with_flags(
        [&]<bool Aligned>() {
          launch(tape_select_bwd_kernel<T, Aligned>, {batch}, kSelectBwdThreads, 0, stream, p);
          if (kind == KeyGradients::kListed) {
            launch(scatter_kernel<float, T, Aligned>, {scatter_blocks(reads)}, kScatterThreads, 0,
                   stream, reads);
          }
        },
        rows_aligned({keys}));
  });
  return {dquery,
          kind == KeyGradients::kAdded ? torch::stable::to(dkeys, keys.scalar_type()) : dkeys};
}

}  // namespace
}  // namespace adatape::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(adatape_cuda, m) {
  m.def(
      "tape_select(Tensor query, Tensor keys, int num_tape_tokens, int topk, "
      "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
      "Tensor? bank_lens) -> (Tensor weights, Tensor ponder, Tensor indices, Tensor counts)");
  m.def(
      "tape_select_bwd(Tensor query, Tensor keys, Tensor dweights, Tensor dponder, "
      "Tensor indices, Tensor counts, bool average_query, str loss_type, bool ordered) "
      "-> (Tensor dquery, Tensor dkeys)");
}

STABLE_TORCH_LIBRARY_IMPL(adatape_cuda, ADATAPE_CUDA_KEY, m) {
  m.impl("tape_select", TORCH_BOX(&adatape::cuda::tape_select));
  m.impl("tape_select_bwd", TORCH_BOX(&adatape::cuda::tape_select_bwd));
}
