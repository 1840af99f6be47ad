// What the CPU kernels take, and the table of them that each instruction set fills.

#pragma once

#include <cstdint>

namespace adatape {

enum class DType { kFloat, kBFloat16 };

// Rows of a matrix of heads: row r of head h starts at data + r * row + h * head (in elements).
struct HeadRows {
  void* data;
  int64_t row;
  int64_t head;
};

struct AttentionParams {
  HeadRows q, k, v, out;      // (rows, num_heads, head_dim)
  HeadRows dout, dq, dk, dv;  // the same, backward only
  float* lse;                 // (num_heads, rows)
  const int32_t* cu_inputs;   // (batch + 1,)
  const int32_t* cu_tapes;    // (batch + 1,)
  int64_t rows;
  int64_t head_dim;
  float scale;
  DType dtype;
};

// A bank (bank_size, width) for all examples, with `example` 0, or one for each.
struct Bank {
  void* data;
  int64_t example, row;  // strides in elements
  int64_t size, width;
};

struct SelectParams {
  const void* query;  // (batch, key_dim), rows query_row apart
  int64_t query_row;
  Bank keys;
  const float* keys_by_column;  // (key_dim, round_up(bank_size, 16)), of a shared bank only
  const bool* read_mask;        // (batch, bank_size) or null
  const int64_t* bank_lens;     // (batch,) or null
  float* weights;               // (batch, steps, topk)
  float* ponder;                // (batch,)
  int32_t* indices;             // (batch, steps, topk)
  int32_t* counts;              // (batch,)
  const float* dweights;        // backward only, as weights, ponder and query
  const float* dponder;
  float* dquery;  // (batch, key_dim)
  float* drows;   // (batch, steps, topk, key_dim): gradients of the keys that were read
  int64_t batch, steps, topk;
  float halt_threshold;
  bool average_query, entropy;
  DType dtype;
};

struct GatherParams {
  Bank bank;
  const int32_t* indices;  // (batch, steps, topk)
  const float* weights;    // (batch, steps, topk)
  const int32_t* offsets;  // (batch + 1,)
  void* tape;              // (rows, width), in the backward its gradient; rows tape_row apart
  int64_t tape_row;
  float* dweights;  // (batch, steps, topk), backward only
  int64_t steps, topk;
  DType dtype;
};

// Contiguous matrices; an activation kernel takes rows first … first + count of them.
struct ActParams {
  void* hidden;
  const void* bias;  // forward only; null where hidden has it already
  void* act;         // (rows, width), forward only
  const void* dact;  // backward only, as act
  void* dhidden;     // backward only, as hidden; of a GELU it may be dact
  int64_t width;
  DType dtype;
};

// One use of a bank row: the row of gradients that it adds, and with what weight.
struct Reader {
  int64_t row;
  float weight;
};

// Queries of one task of the forward; keys and queries of one step of the backward.
constexpr int64_t kQueryBlock = 512;
constexpr int64_t kKeyBlock = 1024;
constexpr int64_t kBackwardBlock = 256;
// Examples that read a shared bank in step, so that a pass over its keys serves all of them.
constexpr int64_t kSelectExamples = 6;
// Columns of keys_by_column are padded to a multiple of the widest vector.
constexpr int64_t kColumnMultiple = 16;
constexpr int64_t kMaxTopk = 32;

struct Kernels {
  const char* name;

  // One example and head; query rows from `first` on, kQueryBlock at most.
  void (*attention_fwd)(const AttentionParams&, int64_t example, int64_t head, int64_t first);
  // One example and head, all rows.
  void (*attention_bwd)(const AttentionParams&, int64_t example, int64_t head);

  // Writes columns first … first + count of a shared bank to keys_by_column.
  void (*select_columns)(const SelectParams&, float* to, int64_t first, int64_t count);
  // Up to kSelectExamples examples of a shared bank at a time, one of a bank of its own.
  void (*select_fwd)(const SelectParams&, int64_t example, int64_t count);
  void (*select_bwd)(const SelectParams&, int64_t example);

  void (*gather_fwd)(const GatherParams&, int64_t example);
  // The gradient of the weights.
  void (*gather_bwd)(const GatherParams&, int64_t example);
  // A row of a bank's gradient: to (width,) = Σ weight · rows[row] over its readers, zeros for
  // none. Of the dtypes only float rows to a bfloat16 sum differ.
  void (*sum_readers)(const Reader* first, const Reader* last, const void* rows, int64_t stride,
                      DType rows_dtype, void* to, int64_t width, DType to_dtype);

  // hidden (rows, width) += bias (width,).
  void (*bias)(const ActParams&, int64_t first, int64_t count);
  // hidden (rows, width) += bias (width,); act = gelu(hidden).
  void (*bias_gelu)(const ActParams&, int64_t first, int64_t count);
  // dhidden from dact and hidden.
  void (*gelu_bwd)(const ActParams&, int64_t first, int64_t count);
  // hidden (rows, 2 · width) = [a, g] += bias (2 · width,); act (rows, width) = a · sigmoid(g).
  void (*bias_glu)(const ActParams&, int64_t first, int64_t count);
  void (*glu_bwd)(const ActParams&, int64_t first, int64_t count);
};

// The kernels for the best instruction set of this processor, or for the one that the environment
// variable ADATAPE_CPU names: portable, avx2 or avx512.
const Kernels& kernels();

}  // namespace adatape
