// Adaptive tape reading from a bank that examples share: the formulas stand in
// adatape_kernels/reference.py.
//
// A token needs the query that the one before has left, and only the end of a launch makes all
// multiprocessors wait for one another on every card. So each tape token takes two launches. In the
// first a block scores one tile of the bank for kExamplesOfTile examples, and lists its best
// entries for each of them: 10,000 entries are 40 tiles, and with 64 examples 320 blocks. In the
// second a block merges the lists of one example, and moves its query. A key is read from shared
// memory once for all examples of a block, so that multiply-adds are what takes the time: 3.3
// GFLOP, or 49 µs of an H200, for 256 examples, 10,000 entries of 64 features and ten tape tokens.
// Tensor cores would take 10 µs of bfloat16, with queries in three parts.

#pragma once

#include "tape_select_fwd.cuh"

namespace adatape::cuda {

constexpr int kExamplesOfTile = 8;

// On 12.0 scoring keys of 16 bits needs two registers more than a second block would leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kSelectTileBlocks = 1;
#else
constexpr int kSelectTileBlocks = kSelectBlocks;
#endif

// Rows of examples that do not exist follow the batch's, up to a multiple of kExamplesOfTile.
struct CudaTapeSelectTilesParams {
  CudaTapeSelectParams read;
  float* queries;       // (examples, features), zeros behind key_dim
  unsigned* unread;     // (examples, words)
  int64_t* left;        // (examples,): entries that can be read while the example reads, then -1
  float* halting;       // (examples,)
  OrderedEntry* lists;  // (examples, tiles, topk), best first
  int64_t groups;       // of kExamplesOfTile examples
  int64_t tiles;        // each has as many entries as a block has threads
  bool queries_shared;  // whether the queries of a group are copied to shared memory
};

// Makes the state of an example before its first tape token, and results without any.
template <class T>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    tape_select_prepare_kernel(CudaTapeSelectTilesParams p) {
  const CudaTapeSelectParams& read = p.read;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const TapeSelectSizes sizes(read.key_dim, read.bank_size, sizeof(T), blockDim.x);
  const int64_t i = blockIdx.x;
  const bool exists = i < read.batch;
  const T* const query = static_cast<const T*>(read.query) + i * read.stride_query;
  for (int64_t d = threadIdx.x; d < sizes.features; d += blockDim.x) {
    p.queries[i * sizes.features + d] = exists && d < read.key_dim ? to_float(query[d]) : 0.0f;
  }
  const int64_t valid = !exists          ? 0
                        : read.bank_lens ? clamp(read.bank_lens[i], 0, read.bank_size)
                                         : read.bank_size;
  int64_t left = 0;
  for (int64_t word = 0; word < sizes.words; ++word) {
    const int64_t entry = word * kWarpSize + lane;
    const bool can_read =
        entry < valid && !(read.read_mask && read.read_mask[i * read.bank_size + entry]);
    const unsigned bits = __ballot_sync(kFullMask, can_read);
    if (lane == 0 && word % warps == warp) p.unread[i * sizes.words + word] = bits;
    left += __popc(bits);
  }
  if (threadIdx.x == 0) {
    p.left[i] = exists && 0.0f < read.halt_threshold && left >= read.topk ? left : -1;
    p.halting[i] = 0.0f;
  }
  if (!exists) return;
  const int64_t results = int64_t{read.num_tape_tokens} * read.topk;
  for (int64_t r = threadIdx.x; r < results; r += blockDim.x) {
    read.indices[i * results + r] = -1;
    read.weights[i * results + r] = 0.0f;
  }
  if (threadIdx.x == 0) read.ponder[i] = 0.0f, read.counts[i] = 0;
}

// What the threads of a block exchange, in static shared memory.
struct TapeSelectTileShared {
  OrderedEntry lists[kExamplesOfTile][kSelectWarps * kMaxTopk];  // each warp's best
  unsigned unread[kExamplesOfTile * kSelectWarps];               // of the tile
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kSelectThreads, kSelectTileBlocks)
    tape_select_tile_kernel(CudaTapeSelectTilesParams p) {
  __shared__ TapeSelectTileShared exchanged;
  const CudaTapeSelectParams& read = p.read;
  const int threads = blockDim.x, warps = threads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t tile = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int64_t first = group * kExamplesOfTile, start = tile * threads;
  bool anyone_reads = false;
  for (int e = 0; e < kExamplesOfTile; ++e) anyone_reads |= p.left[first + e] >= 0;
  if (!anyone_reads) return;

  const int64_t entries = read.bank_size - start < threads ? read.bank_size - start : threads;
  const TapeSelectSizes sizes(read.key_dim, entries, sizeof(T), threads);
  const int64_t words = (read.bank_size + kWarpSize - 1) / kWarpSize;
  for (int n = threadIdx.x; n < kExamplesOfTile * sizes.words; n += threads) {
    const int64_t e = n / sizes.words, word = n % sizes.words;
    exchanged.unread[n] = p.unread[(first + e) * words + start / kWarpSize + word];
  }
  const float* queries = p.queries + first * sizes.features;
  char* tiles = dynamic_shared();
  if (p.queries_shared) {
    float* const copied = reinterpret_cast<float*>(tiles);
    tiles += kExamplesOfTile * sizes.features * sizeof(float);
    for (int64_t n = threadIdx.x; n < kExamplesOfTile * sizes.features; n += threads) {
      copied[n] = queries[n];
    }
    queries = copied;
  }
  __syncthreads();

  const TileSpace<T> space{
      .sizes = sizes, .bank_size = entries, .threads = threads, .tiles = tiles};
  OrderedEntry best[kExamplesOfTile];
#pragma unroll
  for (int e = 0; e < kExamplesOfTile; ++e) best[e] = kNoEntryYet;
  const T* const keys = static_cast<const T*>(read.keys) + start * read.stride_entry;
  find_best<T, Aligned>(read, space, keys, queries, exchanged.unread, false, best);
#pragma unroll
  for (int e = 0; e < kExamplesOfTile; ++e) {
    if (lane < read.topk) exchanged.lists[e][warp * read.topk + lane] = best[e];
  }
  __syncthreads();

  for (int e = warp; e < kExamplesOfTile; e += warps) {
    OrderedEntry merged = kNoEntryYet;
    merge_lists(merged, exchanged.lists[e], warps * read.topk, read.topk);
    // Local entries become the bank's.
    if (merged.order != kUnreadable) merged.entry += static_cast<int>(start);
    if (lane < read.topk) p.lists[((first + e) * p.tiles + tile) * read.topk + lane] = merged;
  }
}

// What the threads of a block exchange, in static shared memory.
struct TapeSelectMergeShared {
  int chosen[kMaxTopk];
  float weights[kMaxTopk];
};

template <class T>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    tape_select_merge_kernel(CudaTapeSelectTilesParams p) {
  __shared__ TapeSelectMergeShared exchanged;
  const CudaTapeSelectParams& read = p.read;
  const int lane = threadIdx.x % kWarpSize;
  const TapeSelectSizes sizes(read.key_dim, read.bank_size, sizeof(T), blockDim.x);
  const int64_t i = blockIdx.x, left = p.left[i];
  if (left < 0) return;
  // Every thread has read what the first warp changes.
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    OrderedEntry best = kNoEntryYet;
    merge_lists(best, p.lists + i * p.tiles * read.topk, p.tiles * read.topk, read.topk);
    const float weight = softmax(score_of(best.order) * read.scale, read.topk);
    const float most = __shfl_sync(kFullMask, weight, 0);
    const float cost = 1.0f - (read.entropy ? warp_sum(weight * weight) : most);
    const int count = read.counts[i];
    if (lane < read.topk) {
      const int64_t out = (i * read.num_tape_tokens + count) * read.topk + lane;
      read.indices[out] = exchanged.chosen[lane] = best.entry;
      read.weights[out] = exchanged.weights[lane] = weight;
      atomicAnd(&p.unread[i * sizes.words + best.entry / kWarpSize],
                ~(1u << best.entry % kWarpSize));
    }
    __syncwarp();
    if (lane == 0) {
      const float halting = p.halting[i] + most;
      const bool reads_on = halting < read.halt_threshold && left - read.topk >= read.topk;
      p.halting[i] = halting;
      read.ponder[i] += cost;
      read.counts[i] = count + 1;
      p.left[i] = reads_on ? left - read.topk : -1;
    }
  }
  __syncthreads();
  const T* const keys = static_cast<const T*>(read.keys);
  for (int64_t d = threadIdx.x; d < read.key_dim; d += blockDim.x) {
    float merged = 0.0f;
#pragma unroll 4
    for (int j = 0; j < read.topk; ++j) {
      const int64_t entry = exchanged.chosen[j];
      merged += exchanged.weights[j] * to_float(keys[entry * read.stride_entry + d]);
    }
    float& q = p.queries[i * sizes.features + d];
    q = read.average_query ? (q + merged) * 0.5f : merged;
  }
}

}  // namespace adatape::cuda
