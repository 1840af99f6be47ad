// The parameters of the CPU kernels, and the table of kernels that each instruction set fills.
//
// A kernel does one task, such as one example, in one thread; the ops in this folder check their
// arguments, allocate the outputs and share the tasks out. Strides are in elements. Members that
// say "backward only" or "forward only" are null in the other direction.

#pragma once

#include <cstdint>

#include "../activation.h"

namespace adatape {

constexpr int64_t kCacheLine = 64;  // bytes

enum class DType { kFloat, kBFloat16, kFloat16 };

// A matrix of heads, (rows, num_heads, head_dim), in which every head's elements are contiguous.
struct CpuHeadRows {
  void* data = nullptr;
  int64_t stride_row = 0;   // from a row to the next
  int64_t stride_head = 0;  // from a head to the next
};

struct CpuElasticAttentionParams {
  CpuHeadRows q, k, v, out;      // (rows, num_heads, head_dim)
  CpuHeadRows dout, dq, dk, dv;  // the same shape, backward only
  float* lse;                    // (num_heads, rows)
  const int32_t* cu_inputs;      // (batch + 1,)
  const int32_t* cu_tapes;       // (batch + 1,)
  int64_t rows;
  int64_t head_dim;
  float softmax_scale;
  DType dtype;  // of all matrices of heads
};

// What one task of attention does: one head of one example, in the forward of the queries from
// `first` on.
struct AttentionTask {
  int64_t example, head, first;
};

// A bank of keys or values: one (bank_size, width) that all examples share, or one for each
// example, (batch, bank_size, width).
struct CpuBank {
  void* data;
  int64_t stride_example;  // from an example's bank to the next; 0 for a shared bank
  int64_t stride_row;      // from an entry to the next
  int64_t bank_size;
  int64_t width;
};

// An entry of a bank and its score; the entry is -1 where there is none.
struct ScoredEntry {
  float score;
  int32_t entry;
};

// The keys of a bank in bytes, which select_pack_coarse makes (kernels/coarse_keys.h). `entries` is
// the bank's size, rounded up to kPanelMultiple.
struct CpuCoarseKeys {
  uint32_t* quads = nullptr;  // (entries / panel, (width + 3) / 4, panel), four features each
  float* steps = nullptr;     // (entries,), what a whole number of a key stands for
  float* norms = nullptr;     // (entries / kPanelMultiple,), the greatest norm of their keys
};

// How far each example of a batch has read, forward only. `select_start` writes
// all of it but `best`, which `select_scan` does.
struct CpuTapeSelectState {
  // (batch, stride_query), the queries now, with zeros behind the features
  float* queries = nullptr;
  int64_t stride_query;
  // (batch, stride_unread), a bit for each entry, set where it may be read
  uint32_t* unread = nullptr;
  int64_t stride_unread;
  int64_t* left = nullptr;      // (batch,), how many bits are set
  float* halting = nullptr;     // (batch,), the halting scores
  ScoredEntry* best = nullptr;  // (batch, parts, topk), the best entries of each part of the bank
  int32_t* exact = nullptr;     // (batch, parts), whether coarse scores are of no use for a part
  int64_t parts;                // so many tasks share the bank
  int64_t part_size;            // entries of a part, a multiple of kPanelMultiple
};

struct CpuTapeSelectParams {
  const void* query;                  // (batch, key_dim)
  int64_t stride_query;               // from an example's query to the next
  CpuBank keys;                       // its width is key_dim
  const float* key_panels = nullptr;  // what select_pack makes of a shared bank, forward only
  bool own_banks = false;             // whether each example has a bank of its own, forward only
  bool coarse = false;                // whether scores are first computed in bytes, forward only
  // What select_pack_coarse makes of a bank that examples or tasks share, if `coarse`; of each
  // example's bank, if they have their own, and null where one task reads an example.
  const CpuCoarseKeys* coarse_keys = nullptr;
  const bool* read_mask = nullptr;     // (batch, bank_size) or null; true where not to be read
  const int64_t* bank_lens = nullptr;  // (batch,) or null; entries from there on are not read
  float* weights = nullptr;            // (batch, num_tape_tokens, topk), forward only
  float* ponder = nullptr;             // (batch,), forward only
  int32_t* indices;                    // (batch, num_tape_tokens, topk)
  int32_t* counts;                     // (batch,)
  const float* dweights = nullptr;     // (batch, num_tape_tokens, topk), backward only
  const float* dponder = nullptr;      // (batch,), backward only
  float* dquery = nullptr;             // (batch, key_dim), backward only
  // The gradients of the keys that were read, (batch, num_tape_tokens, topk, key_dim), backward
  // only.
  float* dread_keys = nullptr;
  int64_t num_tape_tokens;
  int64_t topk;
  float halt_threshold = 0.0f;  // forward only
  bool average_query;           // whether the next query is the mean of query and merged keys
  bool entropy;                 // whether the ponder loss is the entropy, else the top-1 loss
  DType dtype;                  // of query and keys
};

struct CpuTapeGatherParams {
  CpuBank bank;
  const int32_t* indices;     // (batch, num_tape_tokens, topk)
  const float* weights;       // (batch, num_tape_tokens, topk)
  const int32_t* offsets;     // (batch + 1,), where each example's rows of the tape begin
  void* tape;                 // (tape rows, width); in the backward it is the tape's gradient
  int64_t stride_tape;        // from a row of the tape to the next
  float* dweights = nullptr;  // (batch, num_tape_tokens, topk), backward only
  int64_t batch;
  int64_t num_tape_tokens;
  int64_t topk;
  DType dtype;  // of bank and tape
};

// One addend of the sum for row `bank_row` of all banks: `weight` times row `row` of
// CpuSegmentSumParams::rows, and row `read` of its leading features if there are any.
struct Contribution {
  int64_t bank_row = 0;
  int64_t row;
  int64_t read;
  float weight;
};

struct CpuSegmentSumParams {
  const void* rows;                // (any number, width), the rows that contributions name
  int64_t stride_row;              // from one of these rows to the next
  const float* leading = nullptr;  // (reads, lead_width), contiguous, added to the first features
  int64_t lead_width = 0;
  void* out;  // (rows of all banks, width), contiguous
  int64_t width;
  DType rows_dtype;
  DType out_dtype;  // of rows in 16 bits their own; float rows may have any
};

// The matrices are contiguous. `hidden` has 2 · width columns where the activation is a GLU.
struct CpuBiasActParams {
  void* hidden;                // (rows, width or 2 · width), the pre-activations
  const void* bias = nullptr;  // (columns of hidden,), or null where hidden has it already
  void* act = nullptr;         // (rows, width), the activations, forward only
  const void* dact = nullptr;  // (rows, width), backward only
  // Shaped as hidden, backward only; where the activation is no GLU it may lie where dact lies.
  void* dhidden = nullptr;
  // (blocks of kActRows rows, columns of hidden), backward only: dhidden, summed over each block.
  float* dbias_parts = nullptr;
  int64_t width;
  Activation activation;
  DType dtype;
};

// A linear layer: out = x · weightᵀ + bias.
struct CpuLinearParams {
  const void* x;          // (rows, depth)
  int64_t stride_x;       // from a row of x to the next
  const void* weight;     // (columns, depth)
  int64_t stride_weight;  // from a row of the weight to the next
  const void* bias;       // (columns,)
  void* out;              // (rows, columns)
  int64_t stride_out;     // from a row of out to the next
  int64_t depth;
  int64_t columns;
  DType dtype;
};

struct CpuAddLayerNormParams {
  const void* x;          // (rows, dim)
  int64_t stride_x;       // from a row of x to the next
  const void* branch;     // (rows, dim)
  int64_t stride_branch;  // from a row of branch to the next
  const float* weight;    // (dim,)
  const float* bias;      // (dim,)
  void* total;            // (rows, dim), contiguous, as the rest
  void* normed;           // (rows, dim)
  float* mean;            // (rows,)
  float* rstd;            // (rows,), one over each row's standard deviation
  int64_t dim;
  float eps;
  DType dtype;         // of x, total and normed
  DType branch_dtype;  // of branch
};

struct CpuAddLayerNormBwdParams {
  const void* dtotal;      // (rows, dim)
  int64_t stride_dtotal;   // from a row of dtotal to the next
  const void* dnormed;     // (rows, dim)
  int64_t stride_dnormed;  // from a row of dnormed to the next
  const void* total;       // (rows, dim), contiguous, as the rest
  const float* weight;     // (dim,)
  const float* mean;       // (rows,)
  const float* rstd;       // (rows,)
  void* dx;                // (rows, dim)
  float* dweight_parts;    // (blocks of kLayerNormRows rows, dim), the sum over each block's rows
  float* dbias_parts;      // the same
  int64_t dim;
  DType dtype;  // of dtotal, dnormed, total and dx
};

struct CpuAccumulateRowsParams {
  const void* total;           // (num_total, dim)
  int64_t stride_total;        // from a row of total to the next
  const void* rows;            // (rows, dim)
  int64_t stride_rows;         // from a row of rows to the next
  const int32_t* row_of;       // (num_total,), the row that is added to each of the total, or -1
  const float* weights;        // (rows,)
  const float* total_weights;  // (rows,), or null for ones
  void* sum;                   // (num_total, dim); it may be total
  int64_t stride_sum;          // from a row of sum to the next
  int64_t dim;
  DType dtype;       // of total and sum
  DType rows_dtype;  // of rows; those of 16 bits may have a total of their own dtype or float
};

struct CpuAccumulateRowsBwdParams {
  const void* dsum;            // (num_total, dim)
  int64_t stride_dsum;         // from a row of dsum to the next
  const void* total;           // (num_total, dim), null without total_weights, as the next
  int64_t stride_total;        // from a row of total to the next
  const void* rows;            // (rows, dim)
  int64_t stride_rows;         // from a row of rows to the next
  const int32_t* row_of;       // (num_total,), the row that is added to each of the total, or -1
  const float* weights;        // (rows,)
  const float* total_weights;  // (rows,), or null
  void* dtotal;                // (num_total, dim), contiguous as the rest, or null
  void* drows;                 // (rows, dim)
  float* dweights;             // (rows,)
  float* dtotal_weights;       // (rows,), or null
  int64_t dim;
  DType dtype;       // of dsum, total and dtotal
  DType rows_dtype;  // of rows and drows
};

// A task of the attention's forward takes this many queries of an example, and a pass of its
// softmax this many keys.
constexpr int64_t kQueryBlock = 512;
constexpr int64_t kKeyBlock = 1024;
// The attention's backward takes as many queries at a time as have so many scores, and some at
// least.
constexpr int64_t kBackwardScores = 256 * 256, kLeastBackwardQueries = 64;
// At most so many examples read a shared bank together, so that a pass over its keys serves all.
constexpr int64_t kExamplesPerBankPass = 48;
// A multiple of the entries in a panel of keys, whatever the instruction set.
constexpr int64_t kPanelMultiple = 192;
// The features of queries are padded to a multiple of those that the widest vectors hold.
constexpr int64_t kQueryMultiple = 32;
constexpr int64_t kUnreadBits = 32;  // of a word of CpuTapeSelectState::unread
constexpr int64_t kMaxTopk = 32;
// A task of add_layer_norm takes so many rows. The sums over such blocks of rows add up to the
// gradients of weight and bias, whatever the number of threads.
constexpr int64_t kLayerNormRows = 64;
// A task of act_bwd takes so many rows, whose sums add up to the gradient of the bias, likewise.
constexpr int64_t kActRows = 32;
// A task of accumulate_rows takes so many rows of the total.
constexpr int64_t kAccumulateRows = 32;

struct CpuKernels {
  const char* name;  // of the instruction set

  // The next two are told which task their thread is about to have next, or null.
  // Attends from kQueryBlock queries at most.
  void (*attention_fwd)(const CpuElasticAttentionParams&, const AttentionTask&,
                        const AttentionTask* next);
  // Writes all gradients of one head of one example.
  void (*attention_bwd)(const CpuElasticAttentionParams&, const AttentionTask&,
                        const AttentionTask* next);

  // Copies entries `first` to `first + count` of a shared bank to key_panels. Both are multiples of
  // kPanelMultiple; entries behind the bank's last are zeros.
  void (*select_pack)(const CpuTapeSelectParams&, float* key_panels, int64_t first, int64_t count);
  // Whether the next one is worth its time: it takes instructions that multiply bytes.
  bool multiplies_bytes;
  // Copies entries `first` to `first + count` of an example's bank in bytes, likewise.
  void (*select_pack_coarse)(const CpuTapeSelectParams&, int64_t example, const CpuCoarseKeys&,
                             int64_t first, int64_t count);
  // Begins to read for one example. Returns whether it reads anything.
  bool (*select_start)(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t example);
  // Finds the best unread entries of one part of the bank for each of so many examples:
  // kExamplesPerBankPass at most of a shared bank, and one of a bank of its own.
  void (*select_scan)(const CpuTapeSelectParams&, const CpuTapeSelectState&,
                      const int64_t* examples, int64_t count, int64_t part);
  // Reads one tape token for an example, given the best of each part. Returns whether the example
  // reads on.
  bool (*select_read)(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t example);
  // Does all of this for examples `first` to `first + count`, where the bank is one part.
  void (*select_fwd)(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t first,
                     int64_t count);
  // Writes dquery and dread_keys of one example.
  void (*select_bwd)(const CpuTapeSelectParams&, int64_t example);

  // Writes rows `first` to `first + count` of the tape, of which the first belongs to the example.
  void (*gather_fwd)(const CpuTapeGatherParams&, int64_t example, int64_t first, int64_t count);
  // Writes one example's rows of dweights.
  void (*gather_bwd)(const CpuTapeGatherParams&, int64_t example);
  // Writes a row of a bank's gradient: the sum of the contributions from `first` to before `last`,
  // one at least, which all belong to that row.
  void (*segment_sum)(const CpuSegmentSumParams&, const Contribution* first,
                      const Contribution* last);

  // The next four take rows `first` to `first + count`.
  // Writes them, rounded once, out of one product of vectors for each number. It is meant for few
  // rows, as each of them reads the whole weight.
  void (*linear)(const CpuLinearParams&, int64_t first, int64_t count);
  // Adds the bias to hidden, whatever the activation.
  void (*bias)(const CpuBiasActParams&, int64_t first, int64_t count);
  // Adds the bias to hidden, then writes act: the activation of hidden or, for a GLU and
  // hidden = [a, g], a · sigmoid(g).
  void (*bias_act)(const CpuBiasActParams&, int64_t first, int64_t count);
  // Writes dhidden, given dact and hidden, and the part of dbias_parts that is these rows' block.
  void (*act_bwd)(const CpuBiasActParams&, int64_t first, int64_t count);

  // Writes total, normed, mean and rstd of rows `first` to `first + count`.
  void (*add_layer_norm_fwd)(const CpuAddLayerNormParams&, int64_t first, int64_t count);
  // Writes dx of the rows of one block, and the block's part of the parameters' gradients.
  void (*add_layer_norm_bwd)(const CpuAddLayerNormBwdParams&, int64_t block, int64_t count);

  // The next two take rows `first` to `first + count` of the total.
  // Writes them to sum, with what is added to them.
  void (*accumulate_rows_fwd)(const CpuAccumulateRowsParams&, int64_t first, int64_t count);
  // Writes their gradients, if these are asked for, and those of what was added to them.
  void (*accumulate_rows_bwd)(const CpuAccumulateRowsBwdParams&, int64_t first, int64_t count);
};

#if defined(__x86_64__)
// What the kernels for AMX leave to those for AVX512-BF16.
namespace avx512_bf16 {
void attention_fwd(const CpuElasticAttentionParams&, const AttentionTask&, const AttentionTask*);
void attention_bwd(const CpuElasticAttentionParams&, const AttentionTask&, const AttentionTask*);
}  // namespace avx512_bf16
#endif

// Returns the kernels for the best instruction set of this processor, or for the one that the
// environment variable ADATAPE_CPU names: portable, avx2, avx512, avx512_bf16 or amx.
const CpuKernels& cpu_kernels();

}  // namespace adatape
