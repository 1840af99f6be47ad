// Adaptive tape reading on the CPU: checks, allocation, tasks, registration.
//
// A task reads the whole tape of some examples. Where there are too few examples to keep all
// threads busy, or to share a pass over a bank, the tasks of each tape token share out the bank
// instead, and what they find is merged before the next token.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "reading.h"
#include "segment_sum.h"

namespace adatape {
namespace {

// The largest task of examples that have a bank of their own. Within a task, an example's bank is
// fetched while the one before it reads.
constexpr int64_t kOwnBanksPerTask = 8;
// With fewer examples than this, a task of a shared bank waits for the keys, if there are so many
// numbers in them that they do not stay in a thread's own caches.
constexpr int64_t kLeastExamplesPerTask = 12;
constexpr int64_t kLargeBank = int64_t{1} << 18;
// A task that scans for one tape token makes at least so many products, which take longer than it
// takes to share tasks out.
constexpr int64_t kLeastProductsPerScan = int64_t{1} << 18;

// Scores are computed in bytes first where a bank has at least so many numbers: one that examples
// share, and one of an example's own, which would not stay in the second cache as it is. And it has
// to be read for so many tokens. Sums of more features would not fit.
constexpr int64_t kLeastSharedBank = int64_t{1} << 14, kLeastOwnBankBytes = int64_t{1} << 20;
constexpr int64_t kLeastTokensOfBytes = 3, kLeastWidthOfBytes = 32, kMostWidthOfBytes = 8192;

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

// How the work of a call is shared out: the examples of a task, and the parts of the bank.
struct Shares {
  int64_t examples;
  int64_t parts;
};

Shares shares_of(const CpuTapeSelectParams& p, int64_t batch, bool shared_bank) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = round_up(p.keys.bank_size, kPanelMultiple) / kPanelMultiple;
  const int64_t each = (batch + threads - 1) / threads;
  const bool waits =
      shared_bank && each < kLeastExamplesPerTask && p.keys.bank_size * p.keys.width >= kLargeBank;
  const bool few = batch < threads || waits;
  if (few && threads > 1) {
    // A bank of an example's own makes tasks of its own.
    const int64_t together = shared_bank ? batch : 1;
    const int64_t products = together * p.keys.bank_size * p.keys.width;
    const int64_t wanted = shared_bank ? threads : (threads + batch - 1) / batch;
    const int64_t parts = std::min({wanted, units, products / kLeastProductsPerScan});
    if (parts > 1) return {std::min(together, kExamplesPerBankPass), parts};
  }
  if (!shared_bank) return {std::clamp<int64_t>(batch / (4 * threads), 1, kOwnBanksPerTask), 1};
  // Tasks of one size, and a whole number of them for each thread.
  const int64_t rounds = (each + kExamplesPerBankPass - 1) / kExamplesPerBankPass;
  return {(each + rounds - 1) / rounds, 1};
}

// Takes the working memory of the whole batch, in one piece.
CpuTapeSelectState state_of(const CpuTapeSelectParams& p, int64_t batch, int64_t parts,
                            Scratch& scratch) {
  constexpr int64_t kFloatsOfLine = kCacheLine / sizeof(float);
  const int64_t entries = round_up(p.keys.bank_size, kPanelMultiple);
  const int64_t part = (entries / kPanelMultiple + parts - 1) / parts * kPanelMultiple;
  CpuTapeSelectState s{.stride_query = round_up(p.keys.width, kQueryMultiple),
                       .stride_unread = entries / kUnreadBits,
                       .parts = parts,
                       .part_size = part};
  const auto floats_of = []<class Number>(Number*, int64_t count) {
    static_assert(sizeof(Number) % sizeof(float) == 0);
    return round_up(count * static_cast<int64_t>(sizeof(Number) / sizeof(float)), kFloatsOfLine);
  };
  // Calls `take(member, count)` for each array of the state.
  const auto for_each = [&](const auto& take) {
    take(s.queries, batch * s.stride_query);
    take(s.unread, batch * s.stride_unread);
    take(s.left, batch);
    take(s.exact, batch * parts);
    take(s.halting, batch);
    take(s.best, batch * parts * p.topk);
  };
  int64_t all = 0;
  for_each([&](auto* member, int64_t count) { all += floats_of(member, count); });
  float* next = scratch.take(all);
  for_each([&]<class Number>(Number*& member, int64_t count) {
    member = reinterpret_cast<Number*>(next);
    next += floats_of(member, count);
  });
  return s;
}

// Returns whether scores are first computed in bytes: where a bank is read so often that this takes
// less time than to make the bytes.
bool coarse_pays(const CpuTapeSelectParams& p) {
  const int64_t numbers = p.keys.bank_size * p.keys.width;
  const bool large =
      p.own_banks ? numbers * size_of(p.dtype) >= kLeastOwnBankBytes : numbers >= kLeastSharedBank;
  return large && p.num_tape_tokens >= kLeastTokensOfBytes && p.keys.width >= kLeastWidthOfBytes &&
         p.keys.width <= kMostWidthOfBytes;
}

// Packs some examples' banks, or one that they share, in bytes. Returns what holds them.
Tensor pack_coarse(const CpuTapeSelectParams& p, int64_t banks,
                   std::vector<CpuCoarseKeys>& coarse_keys, const Tensor& like) {
  const int64_t entries = round_up(p.keys.bank_size, kPanelMultiple);
  const int64_t quads = (p.keys.width + 3) / 4, blocks = entries / kPanelMultiple;
  const int64_t each = entries * quads + entries + round_up(blocks, kCacheLine / sizeof(float));
  const Tensor packed = new_output("packed keys", like, {banks, each}, ScalarType::Float);
  float* const memory = packed.mutable_data_ptr<float>();
  coarse_keys = allocate_vector<CpuCoarseKeys>("packed keys", banks);
  for (int64_t i = 0; i < banks; ++i) {
    float* const quads_of_bank = memory + i * each;
    float* const steps = quads_of_bank + entries * quads;
    coarse_keys[i] = {.quads = reinterpret_cast<uint32_t*>(quads_of_bank),
                      .steps = steps,
                      .norms = steps + entries};
  }
  run_tasks(banks * blocks, [&](int64_t task) {
    const int64_t i = task / blocks, first = task % blocks * kPanelMultiple;
    cpu_kernels().select_pack_coarse(p, i, coarse_keys[i], first, kPanelMultiple);
  });
  return packed;
}

// Reads the tape of all examples, token by token; the tasks of a token share out the bank.
void read_in_parts(const CpuTapeSelectParams& p, const CpuTapeSelectState& s, int64_t batch,
                   int64_t examples_per_task) {
  const CpuKernels& chosen = cpu_kernels();
  std::vector<int64_t> reading = allocate_vector<int64_t>("the examples that read on", batch);
  int64_t readers = 0;
  for (int64_t i = 0; i < batch; ++i) {
    if (chosen.select_start(p, s, i)) reading[readers++] = i;
  }
  while (readers > 0) {
    const int64_t groups = (readers + examples_per_task - 1) / examples_per_task;
    run_tasks(groups * s.parts, [&](int64_t task) {
      const int64_t first = task / s.parts * examples_per_task;
      chosen.select_scan(p, s, reading.data() + first, std::min(examples_per_task, readers - first),
                         task % s.parts);
    });
    const auto end = std::remove_if(reading.begin(), reading.begin() + readers,
                                    [&](int64_t i) { return !chosen.select_read(p, s, i); });
    readers = end - reading.begin();
  }
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
  const bool shared_bank = keys.dim() == 2;
  const CpuTapeSelectOutputs outputs = allocate_selection(query, num_tape_tokens, topk);

  if (batch == 0) return {outputs.weights, outputs.ponder, outputs.indices, outputs.counts};

  CpuTapeSelectParams p{
      .query = query.data_ptr(),
      .stride_query = query.stride(0),
      .keys = bank,
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
  const Shares shares = shares_of(p, batch, shared_bank);
  p.own_banks = !shared_bank;
  p.coarse = chosen.multiplies_bytes && coarse_pays(p);
  Scratch scratch;
  const CpuTapeSelectState state = state_of(p, batch, shares.parts, scratch);
  std::optional<Tensor> packed;
  std::vector<CpuCoarseKeys> coarse_keys;
  const int64_t entries = round_up(bank.bank_size, kPanelMultiple);
  if (p.coarse && (shared_bank || shares.parts > 1)) {
    const int64_t banks = shared_bank ? 1 : batch;
    packed = pack_coarse(p, banks, coarse_keys, query);
    p.coarse_keys = coarse_keys.data();
  } else if (shared_bank) {
    packed = new_output("packed keys", query, {entries, bank.width}, ScalarType::Float);
    float* const panels = packed->mutable_data_ptr<float>();
    run_row_tasks(entries, kPanelMultiple, [&](int64_t first, int64_t count) {
      chosen.select_pack(p, panels, first, count);
    });
    p.key_panels = panels;
  }
  if (shares.parts > 1) {
    read_in_parts(p, state, batch, shares.examples);
  } else {
    run_row_tasks(batch, shares.examples,
                  [&](int64_t first, int64_t count) { chosen.select_fwd(p, state, first, count); });
  }
  return {outputs.weights, outputs.ponder, outputs.indices, outputs.counts};
}

namespace {

struct CpuTapeSelectGradients {
  Tensor dquery;       // (batch, key_dim), float32 whatever the dtype of the query
  Tensor dread_keys;   // (batch, num_tape_tokens, topk, key_dim), float32
  SparseOutput dkeys;  // as keys
};

CpuTapeSelectGradients allocate_gradients(const Tensor& query, const Tensor& keys,
                                          const Tensor& indices) {
  const int64_t batch = query.size(0), key_dim = keys.size(keys.dim() - 1);
  return {.dquery = new_output("dquery", query, {batch, key_dim}, ScalarType::Float),
          .dread_keys =
              new_output("dread_keys", query, {batch, indices.size(1), indices.size(2), key_dim},
                         ScalarType::Float),
          .dkeys = new_sparse_output("dkeys", keys, keys.sizes(), keys.scalar_type())};
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
  const TapeReads reads = tape_reads(keys, indices, counts);
  const std::vector<int32_t> offsets = reads.checked_offsets();
  Segments segments(reads, offsets);
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
  run_tasks(batch, [&](int64_t i) {
    chosen.select_bwd(p, i);
    segments.list(i, [&](int64_t token, int64_t rank) -> Contribution {
      const int64_t read = (i * num_tape_tokens + token) * topk + rank;
      return {.row = read, .read = read, .weight = 1.0f};
    });
  });
  segments.sum({.rows = p.dread_keys,
                .stride_row = p.keys.width,
                .out = gradients.dkeys.tensor.data_ptr(),
                .width = p.keys.width,
                .rows_dtype = DType::kFloat,
                .out_dtype = dtype_of(keys)},
               gradients.dkeys.holds_zeros);
  return {torch::stable::to(gradients.dquery, query.scalar_type()), gradients.dkeys.tensor};
}

}  // namespace
}  // namespace adatape

STABLE_TORCH_LIBRARY_IMPL(adatape_cpu, CPU, m) {
  m.impl("tape_select", ADATAPE_KERNEL("tape_select", &adatape::tape_select));
  m.impl("tape_select_bwd", ADATAPE_KERNEL("tape_select_bwd", &adatape::tape_select_bwd));
}
