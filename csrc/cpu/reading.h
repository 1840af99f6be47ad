// The two ops that a read of a tape consists of, for those that call them in C++.

#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "../stable_torch.h"

namespace adatape {

// Returns weights, ponder, indices and counts.
std::tuple<Tensor, Tensor, Tensor, Tensor> tape_select(const Tensor& query, const Tensor& keys,
                                                       int64_t num_tape_tokens, int64_t topk,
                                                       double halt_threshold, bool average_query,
                                                       const std::string& loss_type,
                                                       const std::optional<Tensor>& read_mask,
                                                       const std::optional<Tensor>& bank_lens);

// Returns tape and offsets.
std::tuple<Tensor, Tensor> tape_gather(const Tensor& bank, const Tensor& indices,
                                       const Tensor& weights, const Tensor& counts,
                                       std::optional<int64_t> capacity);

}  // namespace adatape
