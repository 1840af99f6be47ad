// What each op asks of its arguments before anything is allocated or read, on either device.
// The ops' docstrings in Python say what the arguments are. Values that tensors hold are checked in
// the pass over them that an op makes anyway, or, on a GPU, kept within bounds by the kernels.

#pragma once

#include <algorithm>

#include "tensor_checks.h"

namespace adatape {

// The most bank entries that one tape token merges.
constexpr int64_t kMostTopk = 32;

// Refuses a bank of keys or values, (bank_size, width) or (batch, bank_size, width).
inline void check_bank(const char* name, const Tensor& bank, const Tensor& like, int64_t batch,
                       int64_t width) {
  check_defined(name, bank);
  const ScalarType dtype = like.scalar_type();
  if (bank.dim() == 3) {
    check_tensor(name, bank, like, dtype, {batch, kAnySize, width});
  } else {
    check_tensor(name, bank, like, dtype, {kAnySize, width});
  }
}

inline void check_loss_type(const std::string& loss_type) {
  if (loss_type != "entropy" && loss_type != "max") {
    refuse("loss_type: expected 'entropy' or 'max', got '", loss_type, "'");
  }
}

// Refuses a query without features, and keys that do not fit it or of which there are too few. The
// keys are rows of `width` features, of which the first are the query's.
inline void check_query_and_keys(const Tensor& query, const char* name, const Tensor& keys,
                                 int64_t width, int64_t topk) {
  if (query.size(1) == 0) refuse("query: expected key_dim at least 1, got 0");
  check_bank(name, keys, query, query.size(0), width);
  const int64_t bank_size = keys.size(keys.dim() - 2);
  if (bank_size < topk || bank_size > kMostRows) {
    refuse(name, ": expected at least topk = ", topk, " bank entries and at most ", kMostRows,
           ", got ", bank_size);
  }
}

inline void check_tape_select(const Tensor& query, const Tensor& keys, int64_t num_tape_tokens,
                              int64_t topk, double halt_threshold, const std::string& loss_type,
                              const std::optional<Tensor>& read_mask,
                              const std::optional<Tensor>& bank_lens, Dtypes dtypes) {
  check_range("topk", topk, 1, kMostTopk);
  check_range("num_tape_tokens", num_tape_tokens, 0, kMostRows);
  check_first("query", query, dtypes, {kAnySize, kAnySize});
  check_query_and_keys(query, "keys", keys, query.size(1), topk);
  if (std::isnan(halt_threshold)) refuse("halt_threshold: expected a number, got nan");
  check_loss_type(loss_type);
  const int64_t batch = query.size(0);
  if (read_mask) {
    check_tensor("read_mask", *read_mask, query, ScalarType::Bool,
                 {batch, keys.size(keys.dim() - 2)});
  }
  if (bank_lens) {
    check_defined("bank_lens", *bank_lens);
    const bool is_int = bank_lens->scalar_type() == ScalarType::Int;
    check_tensor("bank_lens", *bank_lens, query, is_int ? ScalarType::Int : ScalarType::Long,
                 {batch});
  }
}

// Refuses what the gradient of reading along does not take; the rest is the caller's to check.
inline void check_reading_along(const Tensor& query, const char* name, const Tensor& keys,
                                int64_t width, const Tensor& dweights, const Tensor& dponder,
                                const Tensor& indices, const Tensor& counts,
                                const std::string& loss_type) {
  const int64_t batch = query.size(0);
  check_tensor("indices", indices, query, ScalarType::Int, {batch, kAnySize, kAnySize});
  const int64_t num_tape_tokens = indices.size(1), topk = indices.size(2);
  if (topk < 1 || topk > kMostTopk) {
    refuse("indices: expected 1 to ", kMostTopk, " entries a tape token, got ", topk);
  }
  check_range("indices", num_tape_tokens, 0, kMostRows);
  check_query_and_keys(query, name, keys, width, topk);
  check_tensor("dweights", dweights, query, ScalarType::Float, {batch, num_tape_tokens, topk});
  check_tensor("dponder", dponder, query, ScalarType::Float, {batch});
  check_tensor("counts", counts, query, ScalarType::Int, {batch});
  check_loss_type(loss_type);
}

inline void check_tape_select_bwd(const Tensor& query, const Tensor& keys, const Tensor& dweights,
                                  const Tensor& dponder, const Tensor& indices,
                                  const Tensor& counts, const std::string& loss_type,
                                  Dtypes dtypes) {
  check_first("query", query, dtypes, {kAnySize, kAnySize});
  check_reading_along(query, "keys", keys, query.size(1), dweights, dponder, indices, counts,
                      loss_type);
}

// Refuses a bank that is too narrow to hold keys of the query's width; the rest is the caller's to
// check. Returns the bank's width.
inline int64_t check_tape_read(const Tensor& query, const Tensor& bank, Dtypes dtypes) {
  check_first("query", query, dtypes, {kAnySize, kAnySize});
  check_defined("bank", bank);
  const int64_t dim = bank.dim() == 2 || bank.dim() == 3 ? bank.size(bank.dim() - 1) : 0;
  if (dim < query.size(1)) {
    refuse("bank: expected ([batch,] bank_size, dim), dim at least key_dim = ", query.size(1),
           ", got ", text_of(bank.sizes()));
  }
  return dim;
}

inline void check_tape_read_bwd(const Tensor& query, const Tensor& bank, const Tensor& dtape,
                                const Tensor& dweights, const Tensor& dponder,
                                const Tensor& weights, const Tensor& indices, const Tensor& counts,
                                const std::string& loss_type, Dtypes dtypes) {
  const int64_t dim = check_tape_read(query, bank, dtypes);
  check_reading_along(query, "bank", bank, dim, dweights, dponder, indices, counts, loss_type);
  check_tensor("weights", weights, query, ScalarType::Float,
               {indices.size(0), indices.size(1), indices.size(2)});
  check_tensor("dtape", dtape, query, query.scalar_type(), {kAnySize, dim});
}

// Refuses a bank and what is read from it where they do not fit each other.
inline void check_reading(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                          const Tensor& counts, Dtypes dtypes) {
  check_defined("bank", bank);
  if (bank.dim() == 3) {
    check_first("bank", bank, dtypes, {kAnySize, kAnySize, kAnySize});
  } else {
    check_first("bank", bank, dtypes, {kAnySize, kAnySize});
  }
  const int64_t batch = bank.dim() == 3 ? bank.size(0) : kAnySize;
  check_tensor("indices", indices, bank, ScalarType::Int, {batch, kAnySize, kAnySize});
  check_range("indices", indices.size(1), 0, kMostRows);
  check_tensor("weights", weights, bank, ScalarType::Float,
               {indices.size(0), indices.size(1), indices.size(2)});
  check_tensor("counts", counts, bank, ScalarType::Int, {indices.size(0)});
}

inline void check_tape_gather(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                              const Tensor& counts, std::optional<int64_t> capacity,
                              Dtypes dtypes) {
  check_reading(bank, indices, weights, counts, dtypes);
  if (capacity) check_range("capacity", *capacity, 0, kMostRows);
}

inline void check_tape_gather_bwd(const Tensor& dtape, const Tensor& bank, const Tensor& indices,
                                  const Tensor& weights, const Tensor& counts, Dtypes dtypes) {
  check_reading(bank, indices, weights, counts, dtypes);
  check_tensor("dtape", dtape, bank, bank.scalar_type(), {kAnySize, bank.size(bank.dim() - 1)});
}

// Refuses offsets and options that do not fit attention of rows like `rows`.
inline void check_attention_options(const Tensor& rows, const Tensor& cu_inputs,
                                    const Tensor& cu_tapes, std::optional<int64_t> max_rows,
                                    std::optional<double> softmax_scale) {
  check_tensor("cu_inputs", cu_inputs, rows, ScalarType::Int, {kAnySize});
  if (cu_inputs.size(0) == 0) refuse("cu_inputs: expected (batch + 1,), got (0,)");
  check_tensor("cu_tapes", cu_tapes, rows, ScalarType::Int, {cu_inputs.size(0)});
  if (max_rows && *max_rows < 0) refuse("max_rows: expected 0 or more, got ", *max_rows);
  if (softmax_scale && !std::isfinite(*softmax_scale)) {
    refuse("softmax_scale: expected a finite number, got ", *softmax_scale);
  }
}

// Refuses what a backward has beside the forward's arguments, where the forward's queries are of
// these sizes.
inline void check_attention_results(const Tensor& like, const Tensor& dout, const Tensor& out,
                                    const Tensor& lse, int64_t rows, int64_t num_heads,
                                    int64_t head_dim) {
  check_tensor("dout", dout, like, like.scalar_type(), {rows, num_heads, head_dim});
  check_tensor("out", out, like, like.scalar_type(), {rows, num_heads, head_dim});
  check_tensor("lse", lse, like, ScalarType::Float, {num_heads, rows});
}

inline void check_compact_rows(const Tensor& data, const Tensor& keep, const Tensor& cu_inputs,
                               const Tensor& cu_tapes, std::optional<int64_t> capacity,
                               Dtypes dtypes) {
  check_first("data", data, dtypes, {kAnySize, kAnySize});
  check_range("data", data.size(0), 0, kMostRows);
  check_tensor("keep", keep, data, ScalarType::Bool, {data.size(0)});
  check_tensor("cu_inputs", cu_inputs, data, ScalarType::Int, {kAnySize});
  if (cu_inputs.size(0) == 0) refuse("cu_inputs: expected (batch + 1,), got (0,)");
  check_tensor("cu_tapes", cu_tapes, data, ScalarType::Int, {cu_inputs.size(0)});
  if (capacity) check_range("capacity", *capacity, 0, kMostRows);
}

inline void check_compact_rows_bwd(const Tensor& dpacked, const Tensor& source, int64_t rows,
                                   Dtypes dtypes) {
  check_first("dpacked", dpacked, dtypes, {kAnySize, kAnySize});
  check_tensor("source", source, dpacked, ScalarType::Int, {dpacked.size(0)});
  check_range("rows", rows, 0, kMostRows);
}

// Refuses a total, or its gradient, and what is added to it where they do not fit each other.
inline void check_accumulate_rows(const char* name, const Tensor& total, const Tensor& rows,
                                  const Tensor& source, const Tensor& weights,
                                  const std::optional<Tensor>& total_weights, Dtypes dtypes) {
  check_first(name, total, dtypes, {kAnySize, kAnySize});
  check_range(name, total.size(0), 0, kMostRows);
  check_first("rows", rows, dtypes, {kAnySize, total.size(1)});
  check_device("rows", rows, total);
  const int64_t count = rows.size(0);
  if (total.scalar_type() != ScalarType::Float) {
    check_tensor("rows", rows, total, total.scalar_type(), {count, total.size(1)});
  }
  check_tensor("source", source, total, ScalarType::Int, {count});
  check_tensor("weights", weights, total, ScalarType::Float, {count});
  if (total_weights)
    check_tensor("total_weights", *total_weights, total, ScalarType::Float, {count});
}

// Refuses a total that cannot be written into, since several of its elements lie at one place.
inline void check_own_places(const Tensor& total) {
  if (total.numel() == 0) return;
  const int64_t larger = total.stride(0) < total.stride(1) ? 1 : 0, smaller = 1 - larger;
  int64_t apart = 1;  // the number of elements that the smaller strides span
  for (const int64_t d : {smaller, larger}) {
    if (total.size(d) <= 1) continue;
    if (total.stride(d) < apart) {
      refuse("total: expected each element at a place of its own, got strides ", total.stride(0),
             " and ", total.stride(1));
    }
    apart += total.stride(d) * (total.size(d) - 1);
  }
}

inline void check_accumulate_rows_bwd(const Tensor& dsum, const std::optional<Tensor>& total,
                                      const Tensor& rows, const Tensor& source,
                                      const Tensor& weights,
                                      const std::optional<Tensor>& total_weights, Dtypes dtypes) {
  check_accumulate_rows("dsum", dsum, rows, source, weights, total_weights, dtypes);
  if (total) {
    check_tensor("total", *total, dsum, dsum.scalar_type(), {dsum.size(0), dsum.size(1)});
  } else if (total_weights) {
    refuse("total: expected a tensor beside total_weights, got None");
  }
}

inline void check_elastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& cu_inputs, const Tensor& cu_tapes,
                                    std::optional<int64_t> max_rows,
                                    std::optional<double> softmax_scale, Dtypes dtypes) {
  check_first("q", q, dtypes, {kAnySize, kAnySize, kAnySize});
  const int64_t rows = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  if (head_dim == 0) refuse("q: expected head_dim at least 1, got 0");
  check_range("q", rows, 0, kMostRows);
  check_tensor("k", k, q, q.scalar_type(), {rows, num_heads, head_dim});
  check_tensor("v", v, q, q.scalar_type(), {rows, num_heads, head_dim});
  check_attention_options(q, cu_inputs, cu_tapes, max_rows, softmax_scale);
}

inline void check_elastic_attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& out, const Tensor& lse,
                                        const Tensor& cu_inputs, const Tensor& cu_tapes,
                                        std::optional<int64_t> max_rows,
                                        std::optional<double> softmax_scale, Dtypes dtypes) {
  check_elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale, dtypes);
  check_attention_results(q, dout, out, lse, q.size(0), q.size(1), q.size(2));
}

inline void check_elastic_attention_qkvpacked(const Tensor& qkv, const Tensor& cu_inputs,
                                              const Tensor& cu_tapes,
                                              std::optional<int64_t> max_rows,
                                              std::optional<double> softmax_scale, Dtypes dtypes) {
  check_first("qkv", qkv, dtypes, {kAnySize, 3, kAnySize, kAnySize});
  if (qkv.size(3) == 0) refuse("qkv: expected head_dim at least 1, got 0");
  check_range("qkv", qkv.size(0), 0, kMostRows);
  check_attention_options(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale);
}

inline void check_elastic_attention_qkvpacked_bwd(const Tensor& dout, const Tensor& qkv,
                                                  const Tensor& out, const Tensor& lse,
                                                  const Tensor& cu_inputs, const Tensor& cu_tapes,
                                                  std::optional<int64_t> max_rows,
                                                  std::optional<double> softmax_scale,
                                                  Dtypes dtypes) {
  check_elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale, dtypes);
  check_attention_results(qkv, dout, out, lse, qkv.size(0), qkv.size(2), qkv.size(3));
}

// The parameters of one feed-forward as an op has them, with the names of its arguments. Those of
// the feed-forward for tape rows may all be missing.
struct GivenFFN {
  const char* names[4];
  const Tensor* w1;
  const Tensor* b1;
  const Tensor* w2;
  const Tensor* b2;
};

// Refuses parameters that do not fit the rows x (rows, dim). `gates` is 2 for a GLU, else 1.
inline void check_ffn(const GivenFFN& ffn, const Tensor& x, int64_t gates) {
  const ScalarType dtype = x.scalar_type();
  const int64_t dim = x.size(1);
  check_tensor(ffn.names[0], *ffn.w1, x, dtype, {kAnySize, dim});
  const int64_t columns = ffn.w1->size(0), width = columns / gates;
  check_tensor(ffn.names[2], *ffn.w2, x, dtype, {dim, width});
  check_tensor(ffn.names[0], *ffn.w1, x, dtype, {gates * width, dim});
  check_tensor(ffn.names[1], *ffn.b1, x, dtype, {columns});
  check_tensor(ffn.names[3], *ffn.b2, x, dtype, {dim});
}

inline void check_ffns(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                       const std::optional<Tensor>& tape_w1, const std::optional<Tensor>& tape_b1,
                       const std::optional<Tensor>& tape_w2, const std::optional<Tensor>& tape_b2,
                       const Tensor& x) {
  check_ffn({{"w1", "b1", "w2", "b2"}, &w1, &b1, &w2, &b2}, x, 1);
  const int given =
      tape_w1.has_value() + tape_b1.has_value() + tape_w2.has_value() + tape_b2.has_value();
  if (given == 0) return;
  if (given != 4)
    refuse("tape_w1: expected all four of the tape's parameters or none, got ", given);
  check_ffn(
      {{"tape_w1", "tape_b1", "tape_w2", "tape_b2"}, &*tape_w1, &*tape_b1, &*tape_w2, &*tape_b2}, x,
      2);
}

// Refuses numbers of rows that x does not have. `bounds` (2,), if given, holds (num_input_rows,
// num_rows) on the device.
inline void check_row_numbers(std::optional<int64_t> num_input_rows, int64_t max_tape_rows,
                              const std::optional<Tensor>& bounds, const Tensor& x,
                              bool has_tape_ffn) {
  const int64_t rows = x.size(0);
  check_range("x", rows, 0, kMostRows);
  if (bounds) {
    check_tensor("bounds", *bounds, x, ScalarType::Long, {2});
  } else if (!num_input_rows) {
    refuse("bounds: expected a tensor where num_input_rows is None, got None");
  }
  const int64_t inputs = num_input_rows.value_or(0);
  if (inputs < 0 || inputs > rows || max_tape_rows < 0 || max_tape_rows > rows - inputs) {
    // The sum of two numbers that are far too large may not be one.
    const bool is_number = inputs <= kMostRows && max_tape_rows <= kMostRows;
    refuse("num_input_rows: expected 0 <= num_input_rows <= num_rows <= ", rows,
           " (the rows of x), got ", inputs, " and ",
           is_number ? inputs + max_tape_rows : std::max(inputs, max_tape_rows));
  }
  if (!has_tape_ffn && max_tape_rows != 0) {
    refuse("max_tape_rows: expected 0 without a feed-forward for the tape, got ", max_tape_rows);
  }
}

inline void check_dual_ffn(const Tensor& x, std::optional<int64_t> num_input_rows,
                           int64_t max_tape_rows, const std::optional<Tensor>& bounds,
                           bool has_tape_ffn, Dtypes dtypes) {
  check_first("x", x, dtypes, {kAnySize, kAnySize});
  check_row_numbers(num_input_rows, max_tape_rows, bounds, x, has_tape_ffn);
}

inline void check_dual_ffn_bwd(const Tensor& dy, const Tensor& x, const Tensor& hidden,
                               const Tensor& tape_hidden, std::optional<int64_t> num_input_rows,
                               const std::optional<Tensor>& bounds, const Tensor& w1,
                               const std::optional<Tensor>& tape_w1, Dtypes dtypes) {
  check_first("x", x, dtypes, {kAnySize, kAnySize});
  const ScalarType dtype = x.scalar_type();
  check_tensor("dy", dy, x, dtype, {x.size(0), x.size(1)});
  check_tensor("w1", w1, x, dtype, {kAnySize, x.size(1)});
  if (tape_w1) check_tensor("tape_w1", *tape_w1, x, dtype, {kAnySize, x.size(1)});
  check_tensor("tape_hidden", tape_hidden, x, dtype,
               {kAnySize, tape_w1 ? tape_w1->size(0) : kAnySize});
  check_row_numbers(num_input_rows, tape_hidden.size(0), bounds, x, tape_w1.has_value());
  check_tensor("hidden", hidden, x, dtype, {num_input_rows.value_or(x.size(0)), w1.size(0)});
}

// Refuses a parameter (dim,) of a LayerNorm that is neither float32 nor of the dtype of x.
inline void check_norm_parameter(const char* name, const Tensor& parameter, const Tensor& x) {
  check_defined(name, parameter);
  const bool as_x = parameter.scalar_type() == x.scalar_type();
  check_tensor(name, parameter, x, as_x ? x.scalar_type() : ScalarType::Float, {x.size(1)});
}

inline void check_add_layer_norm(const Tensor& x, const Tensor& branch, const Tensor& weight,
                                 const Tensor& bias, double eps, Dtypes dtypes) {
  constexpr ScalarType kBranchDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                          ScalarType::Double};
  check_first("x", x, dtypes, {kAnySize, kAnySize});
  if (x.size(1) == 0) refuse("x: expected dim at least 1, got 0");
  check_first("branch", branch, kBranchDtypes, {x.size(0), x.size(1)});
  check_device("branch", branch, x);
  check_norm_parameter("weight", weight, x);
  check_norm_parameter("bias", bias, x);
  if (!(eps >= 0) || std::isinf(eps)) {
    refuse("eps: expected a finite number of at least 0, got ", eps);
  }
}

inline void check_add_layer_norm_bwd(const Tensor& dtotal, const Tensor& dnormed,
                                     const Tensor& total, const Tensor& weight, const Tensor& mean,
                                     const Tensor& rstd, Dtypes dtypes) {
  check_first("total", total, dtypes, {kAnySize, kAnySize});
  if (total.size(1) == 0) refuse("total: expected dim at least 1, got 0");
  const int64_t rows = total.size(0), dim = total.size(1);
  check_tensor("dtotal", dtotal, total, total.scalar_type(), {rows, dim});
  check_tensor("dnormed", dnormed, total, total.scalar_type(), {rows, dim});
  check_norm_parameter("weight", weight, total);
  check_tensor("mean", mean, total, ScalarType::Float, {rows});
  check_tensor("rstd", rstd, total, ScalarType::Float, {rows});
}

}  // namespace adatape
