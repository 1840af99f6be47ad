// Adaptive tape reading: the formulas stand in adatape_kernels/reference.py.
//
// A block reads all tape tokens of one example that has a bank of its own. (Where examples share
// one, see tape_select_tiles.cuh.) A bank that fits into shared memory is copied there once. Of a
// larger one the keys pass through shared memory for each token, tile by tile: tiles are copied
// asynchronously while one is scored, and every second pass begins at the end, with what the pass
// before has left in the L2 cache. A thread scores one entry of a tile, in one chain of
// multiply-adds over the key's features, so that equal rows get equal bits wherever they stand.
// Each warp keeps the best of the entries that it has scored in its registers, the j-th best in
// lane j.
//
// A token needs the query that the one before has left, so a block's time is the chain of its
// steps. Of a bank that stays, a thread scores kTilesAtOnce entries at a time, whose multiply-adds
// do not wait for one another; the best entries are found by the hardware's reductions over a warp,
// two for each; and the rows that are merged come out of shared memory.

#pragma once

#include "../device.cuh"
#include "../ptx.cuh"
#include "top_entries.cuh"

namespace adatape::cuda {

// Strides are in elements.
struct CudaTapeSelectParams {
  const void* query;         // (batch, key_dim)
  int64_t stride_query;      // from an example's query to the next
  const void* keys;          // (bank_size, key_dim) shared, or (batch, bank_size, key_dim)
  int64_t stride_example;    // from an example's bank to the next; 0 for a shared bank
  int64_t stride_entry;      // from an entry of the bank to the next
  const bool* read_mask;     // (batch, bank_size) or null; true where not to be read
  const int64_t* bank_lens;  // (batch,) or null; entries from there on are not read
  float* weights;            // (batch, num_tape_tokens, topk)
  float* ponder;             // (batch,)
  int32_t* indices;          // (batch, num_tape_tokens, topk)
  int32_t* counts;           // (batch,)
  char* workspaces;          // one for each block, or null where it lies in shared memory
  int64_t batch;
  int64_t bank_size;
  int64_t key_dim;
  int32_t num_tape_tokens;
  int32_t topk;
  float halt_threshold;
  float scale;         // of the scores, one over the root of key_dim
  bool average_query;  // whether the next query is the mean of query and merged keys
  bool entropy;        // whether the ponder loss is the entropy, else the top-1 loss
  bool resident;       // whether the whole bank stays in shared memory; only an example's own does
};

constexpr int kSelectThreads = 256;  // a block has no more; for a small bank it is one warp
constexpr int kSelectWarps = kSelectThreads / kWarpSize;
constexpr int kSelectRegisters = 128;  // a thread takes no more
constexpr int kSelectBlocks = blocks_at_once(kSelectThreads, kSelectRegisters);
constexpr int kMaxTopk = kWarpSize;

// A tile holds so many bytes of each of its keys at a time.
constexpr int kChunkBytes = 64;
constexpr int kChunkAccesses = kChunkBytes / kAccessBytes;
constexpr int kStages = 3;       // while one tile is scored, two are under way
constexpr int kTilesAtOnce = 4;  // of a bank that stays in shared memory

// The sizes of what a block has in memory; host and device compute the same.
struct TapeSelectSizes {
  int64_t features;  // of a query, rounded up to whole chunks
  int64_t chunks;    // of a key
  int64_t tiles;     // of a bank; each has as many entries as the block has threads
  int64_t words;     // in which every entry of a bank has a bit

  __host__ __device__ TapeSelectSizes(int64_t key_dim, int64_t bank_size, int element_bytes,
                                      int threads)
      : features(0),
        chunks((key_dim * element_bytes + kChunkBytes - 1) / kChunkBytes),
        tiles((bank_size + threads - 1) / threads),
        words((bank_size + kWarpSize - 1) / kWarpSize) {
    features = chunks * (kChunkBytes / element_bytes);
  }
  // Returns the bytes of a query and of the unread entries' bits.
  __host__ __device__ int64_t workspace_bytes() const {
    const int64_t bytes = features * int64_t{sizeof(float)} + words * int64_t{sizeof(unsigned)};
    return (bytes + kAccessBytes - 1) / kAccessBytes * kAccessBytes;
  }
  // Returns the bytes of shared memory that tiles take: the whole bank, or one tile for each stage.
  __host__ __device__ int64_t tile_bytes(int threads, bool resident, int64_t bank_size) const {
    return resident ? bank_size * chunks * kChunkBytes : int64_t{kStages} * threads * kChunkBytes;
  }
};

// Returns where in a tile the access number `access` of an entry's chunk lies. Neighbouring threads
// read the same access of neighbouring entries, and find them in different banks of the memory.
__device__ inline int64_t place_in_tile(int entry, int access) {
  return (int64_t{entry} * kChunkAccesses + (access ^ (entry / 2 % kChunkAccesses))) * kAccessBytes;
}

// Starts to copy one chunk of each of `entries` keys, from `feature` on; zeros arrive behind a
// key's end.
template <class T, bool Aligned>
__device__ void copy_chunk(const CudaTapeSelectParams& p, const T* keys, int64_t first, int entries,
                           int64_t feature, char* tile) {
  constexpr int kPack = Pack<T>::kSize;
  for (int i = threadIdx.x; i < entries * kChunkAccesses; i += blockDim.x) {
    const int entry = i / kChunkAccesses, access = i % kChunkAccesses;
    const int64_t d = feature + access * kPack;
    const T* const key = keys + (first + entry) * p.stride_entry;
    char* const to = tile + place_in_tile(entry, access);
    if (Aligned && d < p.key_dim) {
      copy_async(to, key + d);
    } else {
      *reinterpret_cast<Pack<T>*>(to) = load_pack<false>(key, d, p.key_dim);
    }
  }
  close_group();
}

// Where the chunks of a bank's tiles lie in shared memory. A piece is one chunk of one tile.
template <class T>
struct TileSpace {
  static constexpr int64_t kFeatures = kChunkBytes / int64_t{sizeof(T)};  // of a chunk

  const TapeSelectSizes& sizes;
  int64_t bank_size;
  int threads;
  char* tiles;

  __device__ int entries_of(int64_t tile) const {
    const int64_t left = bank_size - tile * threads;
    return static_cast<int>(left < threads ? left : threads);
  }
  // Returns the place of a piece of a bank that stays.
  __device__ char* piece(int64_t tile, int64_t chunk) const {
    return tiles + (tile * threads * sizes.chunks + chunk * entries_of(tile)) * kChunkBytes;
  }
  // Returns the place of the piece that passes through as number `item`.
  __device__ char* stage(int64_t item) const {
    return tiles + item % kStages * threads * kChunkBytes;
  }
  // Returns one feature of an entry of a bank that stays.
  __device__ float feature(int64_t entry, int64_t d) const {
    const int within = static_cast<int>(d % kFeatures);
    const char* const access =
        piece(entry / threads, d / kFeatures) +
        place_in_tile(static_cast<int>(entry % threads), within / Pack<T>::kSize);
    return to_float(reinterpret_cast<const T*>(access)[within % Pack<T>::kSize]);
  }
};

// Adds the products of `key`, which begins at feature `d` of the query `q`, to a score.
template <class T>
__device__ __forceinline__ void add_products(const Pack<T>& key, const float* q, int64_t d,
                                             int64_t features, float& score) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; i += Pack<float>::kSize) {
    const auto some = load_pack<true>(q, d + i, features);
#pragma unroll
    for (int n = 0; n < Pack<float>::kSize; ++n) {
      score = fmaf(some.x[n], to_float(key.x[i + n]), score);
    }
  }
}

// Returns the entry with the order of its score, which is kUnreadable where it is not to be read.
__device__ inline OrderedEntry candidate(float score, int64_t entry, int64_t bank_size,
                                         const unsigned* unread) {
  const bool readable =
      entry < bank_size && (unread[entry / kWarpSize] >> entry % kWarpSize & 1) != 0;
  return {readable ? order_of(score) : kUnreadable, static_cast<int>(entry)};
}

// Copies a whole bank to shared memory.
template <class T, bool Aligned>
__device__ void copy_bank(const CudaTapeSelectParams& p, const TileSpace<T>& space, const T* keys) {
  for (int64_t tile = 0; tile < space.sizes.tiles; ++tile) {
    for (int64_t chunk = 0; chunk < space.sizes.chunks; ++chunk) {
      copy_chunk<T, Aligned>(p, keys, tile * space.threads, space.entries_of(tile),
                             chunk * space.kFeatures, space.piece(tile, chunk));
    }
  }
  wait_for_copies();
  __syncthreads();
}

// Passes over a bank in shared memory, for one tape token, and leaves each warp's best entries in
// `best`.
template <class T>
__device__ void find_best_resident(const CudaTapeSelectParams& p, const TileSpace<T>& space,
                                   const float* query, const unsigned* unread, OrderedEntry& best) {
  const int mine = threadIdx.x;
  for (int64_t first = 0; first < space.sizes.tiles; first += kTilesAtOnce) {
    float scores[kTilesAtOnce] = {};
    for (int64_t chunk = 0; chunk < space.sizes.chunks; ++chunk) {
      const char* pieces[kTilesAtOnce];
#pragma unroll
      for (int n = 0; n < kTilesAtOnce; ++n) {
        const bool exists = (first + n) * space.threads + mine < p.bank_size;
        pieces[n] = exists ? space.piece(first + n, chunk) : nullptr;
      }
// More accesses at once would take more registers than there are, here and below.
#pragma unroll 1
      for (int access = 0; access < kChunkAccesses; ++access) {
        const int64_t d = chunk * space.kFeatures + access * Pack<T>::kSize;
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
          if (!pieces[n]) continue;
          const auto key =
              *reinterpret_cast<const Pack<T>*>(pieces[n] + place_in_tile(mine, access));
          add_products(key, query, d, space.sizes.features, scores[n]);
        }
      }
    }
    OrderedEntry found[kTilesAtOnce];
#pragma unroll
    for (int n = 0; n < kTilesAtOnce; ++n) {
      found[n] = candidate(scores[n], (first + n) * space.threads + mine, p.bank_size, unread);
    }
    keep_best(best, found, p.topk);
  }
}

// Does the same for the tape tokens of several examples while the bank passes through shared
// memory, from its end if `backwards`.
template <class T, bool Aligned, int Examples>
__device__ void find_best(const CudaTapeSelectParams& p, const TileSpace<T>& space, const T* keys,
                          const float* queries, const unsigned* unread, bool backwards,
                          OrderedEntry (&best)[Examples]) {
  const TapeSelectSizes& sizes = space.sizes;
  const int64_t items = sizes.tiles * sizes.chunks;
  const auto tile_of = [&](int64_t item) {
    const int64_t turn = item / sizes.chunks;
    return backwards ? sizes.tiles - 1 - turn : turn;
  };
  // An empty group stands for an item that does not exist, so that the last ones are waited for.
  const auto copy = [&](int64_t item) {
    const int64_t tile = item < items ? tile_of(item) : 0;
    const int entries = item < items ? space.entries_of(tile) : 0;
    copy_chunk<T, Aligned>(p, keys, tile * space.threads, entries,
                           item % sizes.chunks * space.kFeatures, space.stage(item));
  };

  float scores[Examples] = {};
  for (int64_t item = 0; item + 1 < kStages; ++item) copy(item);
  for (int64_t item = 0; item < items; ++item) {
    wait_for_all_but<kStages - 2>();
    // What is copied next overwrites what all threads have read by now.
    __syncthreads();
    copy(item + kStages - 1);
    const int64_t tile = tile_of(item), chunk = item % sizes.chunks;
    const int mine = threadIdx.x;
    if (mine < space.entries_of(tile)) {
      const char* const from = space.stage(item);
#pragma unroll 1
      for (int access = 0; access < kChunkAccesses; ++access) {
        const auto key = *reinterpret_cast<const Pack<T>*>(from + place_in_tile(mine, access));
        const int64_t d = chunk * space.kFeatures + access * Pack<T>::kSize;
#pragma unroll
        for (int e = 0; e < Examples; ++e) {
          add_products(key, queries + e * sizes.features, d, sizes.features, scores[e]);
        }
      }
    }
    if (chunk + 1 == sizes.chunks) {
      const int64_t entry = tile * space.threads + mine;
#pragma unroll
      for (int e = 0; e < Examples; ++e) {
        OrderedEntry found[] = {
            candidate(scores[e], entry, space.bank_size, unread + e * sizes.words)};
        keep_best(best[e], found, p.topk);
        scores[e] = 0.0f;
      }
    }
  }
  __syncthreads();
}

// How far the reading of an example has come; it is alike in all lanes of the warp that keeps it.
struct ReadingProgress {
  float halting = 0.0f;  // the sum of the largest weights
  float ponder = 0.0f;   // the ponder loss
  int count = 0;         // tape tokens that have been read
  int64_t left = 0;      // entries that can still be read

  __device__ bool reads_on(const CudaTapeSelectParams& p) const {
    return halting < p.halt_threshold && left >= p.topk && count < p.num_tape_tokens;
  }
};

// What the threads of a block exchange, in static shared memory.
struct TapeSelectShared {
  OrderedEntry lists[kSelectWarps * kMaxTopk];  // each warp's best, one after another
  int chosen[kMaxTopk];
  float chosen_weights[kMaxTopk];
  bool reading;
};

// A block reads for an example that has a bank of its own.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    tape_select_kernel(CudaTapeSelectParams p) {
  __shared__ TapeSelectShared exchanged;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int threads = blockDim.x, warps = threads / kWarpSize;
  const TapeSelectSizes sizes(p.key_dim, p.bank_size, sizeof(T), threads);
  const int64_t workspace = sizes.workspace_bytes();
  const int64_t i = blockIdx.x;
  char* const own = p.workspaces ? p.workspaces + i * workspace : dynamic_shared();
  char* const tiles = dynamic_shared() + (p.workspaces ? 0 : workspace);
  float* const q = reinterpret_cast<float*>(own);                            // (features,)
  unsigned* const unread = reinterpret_cast<unsigned*>(q + sizes.features);  // (words,)
  const T* const keys = static_cast<const T*>(p.keys) + i * p.stride_example;
  const T* const query = static_cast<const T*>(p.query) + i * p.stride_query;

  for (int64_t d = threadIdx.x; d < sizes.features; d += threads) {
    q[d] = d < p.key_dim ? to_float(query[d]) : 0.0f;
  }
  // The first warp keeps the progress; the others know how it begins.
  ReadingProgress progress;
  const int64_t valid = p.bank_lens ? clamp(p.bank_lens[i], 0, p.bank_size) : p.bank_size;
  for (int64_t word = 0; word < sizes.words; ++word) {
    const int64_t entry = word * kWarpSize + lane;
    const bool can_read = entry < valid && !(p.read_mask && p.read_mask[i * p.bank_size + entry]);
    const unsigned bits = __ballot_sync(kFullMask, can_read);
    if (lane == 0 && word % warps == warp) unread[word] = bits;
    progress.left += __popc(bits);
  }
  if (threadIdx.x == 0) exchanged.reading = progress.reads_on(p);
  __syncthreads();

  const TileSpace<T> space{
      .sizes = sizes, .bank_size = p.bank_size, .threads = threads, .tiles = tiles};
  if (exchanged.reading && p.resident) copy_bank<T, Aligned>(p, space, keys);
  bool backwards = false;
  while (exchanged.reading) {
    OrderedEntry best[] = {kNoEntryYet};
    if (p.resident) {
      find_best_resident(p, space, q, unread, best[0]);
    } else {
      find_best<T, Aligned>(p, space, keys, q, unread, backwards, best);
      backwards = !backwards;
    }
    if (lane < p.topk) exchanged.lists[warp * p.topk + lane] = best[0];
    __syncthreads();

    if (warp == 0) {
      OrderedEntry merged = kNoEntryYet;
      merge_lists(merged, exchanged.lists, warps * p.topk, p.topk);
      const float weight = softmax(score_of(merged.order) * p.scale, p.topk);
      const float most = __shfl_sync(kFullMask, weight, 0);
      const int64_t out = (i * p.num_tape_tokens + progress.count) * p.topk + lane;
      if (lane < p.topk) {
        p.indices[out] = exchanged.chosen[lane] = merged.entry;
        p.weights[out] = exchanged.chosen_weights[lane] = weight;
        atomicAnd(&unread[merged.entry / kWarpSize], ~(1u << merged.entry % kWarpSize));
      }
      progress.ponder += 1.0f - (p.entropy ? warp_sum(weight * weight) : most);
      progress.halting += most;
      progress.left -= p.topk;
      ++progress.count;
      if (lane == 0) exchanged.reading = progress.reads_on(p);
    }
    __syncthreads();

    for (int64_t d = threadIdx.x; d < p.key_dim; d += threads) {
      float merged = 0.0f;
#pragma unroll 4
      for (int j = 0; j < p.topk; ++j) {
        const int64_t entry = exchanged.chosen[j];
        const float feature =
            p.resident ? space.feature(entry, d) : to_float(keys[entry * p.stride_entry + d]);
        merged += exchanged.chosen_weights[j] * feature;
      }
      q[d] = p.average_query ? (q[d] + merged) * 0.5f : merged;
    }
    __syncthreads();
  }

  if (warp != 0) return;
  const int64_t results = int64_t{p.num_tape_tokens} * p.topk;
  for (int64_t r = int64_t{progress.count} * p.topk + lane; r < results; r += kWarpSize) {
    p.indices[i * results + r] = -1;
    p.weights[i * results + r] = 0.0f;
  }
  if (lane == 0) p.ponder[i] = progress.ponder, p.counts[i] = progress.count;
}

}  // namespace adatape::cuda
