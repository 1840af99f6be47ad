// Runs a grid on the host, as cuda_host.h describes. The rules of barriers and warp collectives
// stand here; threads.h has how the threads of a block take turns.

#include "cuda_host.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "threads.h"

namespace cuda_host {

constinit thread_local const Place* place = nullptr;

namespace {

// Memory that nobody has written holds such bytes, which make a float, a half or a bfloat16 NaN.
constexpr unsigned char kUninitialised = 0xff;
constexpr std::align_val_t kSharedAlignment{128};

// What a thread of the block is doing, or waiting for.
enum class State { kRunning, kAtBarrier, kInCollective, kLeft };

struct BlockThread : Place {
  unsigned rank;  // in its block
  State state;
  Where where;  // the barrier or collective that the thread is in
  // The arguments of the collective that the thread is in; the data lie on its own stack.
  const char* what;
  unsigned mask;
  const void* mine;
  size_t size;
  std::byte* all;

  unsigned lane() const { return rank % kWarpLanes; }
};

struct ThreadBlock {
  ThreadBlock(const char* name, unsigned size) : kernel(name), turns(size), threads(size) {}

  const char* kernel;
  Turns turns;
  std::vector<BlockThread> threads;
  unsigned live = 0;        // threads that have not left
  unsigned at_barrier = 0;  // threads that wait in __syncthreads
  unsigned waiting = 0;     // threads that wait for anything
  std::mutex mutex;         // guards all of this where the threads are those of the system

  BlockThread& self() { return threads[turns.current()]; }

  [[noreturn]] void fail(const BlockThread& thread, const std::string& message) {
    std::fprintf(stderr, "cuda_host: %s, block (%u, %u, %u), thread %u, line %u: %s\n", kernel,
                 thread.block.x, thread.block.y, thread.block.z, thread.rank,
                 static_cast<unsigned>(thread.where.line()), message.c_str());
    std::abort();
  }

  void release(BlockThread& thread) {
    thread.state = State::kRunning;
    --waiting;
    turns.resume(thread.rank);
  }

  // Lets the threads at the barrier go on if all that have not left are there.
  void open_barrier_if_full() {
    if (at_barrier == 0 || at_barrier != live) return;
    at_barrier = 0;
    for (BlockThread& thread : threads) {
      if (thread.state == State::kAtBarrier) release(thread);
    }
  }

  // Ends the process if every thread waits for another.
  void fail_if_stuck() {
    if (live == 0 || waiting != live) return;
    const auto with = [this](State state) {
      return std::find_if(threads.begin(), threads.end(),
                          [state](const BlockThread& t) { return t.state == state; });
    };
    const auto in_collective = with(State::kInCollective), left = with(State::kLeft);
    const std::string others =
        at_barrier              ? ", and " + std::to_string(at_barrier) + " of the block's " +
                                      std::to_string(live) + " wait in __syncthreads"
        : left != threads.end() ? ", and thread " + std::to_string(left->rank) + " has left"
                                : "";
    fail(*in_collective, std::string(in_collective->what) + " of mask " +
                             std::to_string(in_collective->mask) +
                             " waits for lanes that never come" + others);
  }

  void wait(BlockThread& thread, State state, std::unique_lock<std::mutex>& lock) {
    thread.state = state;
    ++waiting;
    fail_if_stuck();
    turns.suspend(thread.rank, lock);
  }

  void barrier(Where where) {
    std::unique_lock lock(mutex);
    BlockThread& mine = self();
    mine.where = where;
    ++at_barrier;
    if (at_barrier < live) return wait(mine, State::kAtBarrier, lock);
    open_barrier_if_full();
  }

  void collective(const char* what, unsigned mask, const void* data, size_t size, void* all,
                  Where where) {
    std::unique_lock lock(mutex);
    BlockThread& mine = self();
    mine.what = what, mine.mask = mask, mine.where = where;
    mine.mine = data, mine.size = size, mine.all = static_cast<std::byte*>(all);
    if (!(mask >> mine.lane() & 1)) fail(mine, std::string(what) + ": its mask leaves itself out");
    BlockThread* const warp = &mine - mine.lane();
    for (unsigned i = 0; i < kWarpLanes; ++i) {
      if ((mask >> i & 1) && i != mine.lane() && warp[i].state != State::kInCollective) {
        return wait(mine, State::kInCollective, lock);
      }
    }
    complete(mine, warp);
  }

  // Gives each lane of the mask what every lane has handed in, once all of them have arrived.
  void complete(BlockThread& last, BlockThread* warp) {
    const size_t size = last.size;
    std::byte all[kWarpLanes * kMostBytesExchanged];
    std::memset(all, kUninitialised, kWarpLanes * size);
    for (unsigned i = 0; i < kWarpLanes; ++i) {
      if (!(last.mask >> i & 1)) continue;
      if (!same_collective(last, warp[i])) {
        fail(last, std::string(last.what) + " of mask " + std::to_string(last.mask) + " meets " +
                       warp[i].what + " of mask " + std::to_string(warp[i].mask) + " in line " +
                       std::to_string(warp[i].where.line()) + " of thread " +
                       std::to_string(warp[i].rank));
      }
      std::memcpy(all + i * size, warp[i].mine, size);
    }
    for (unsigned i = 0; i < kWarpLanes; ++i) {
      if (!(last.mask >> i & 1)) continue;
      std::memcpy(warp[i].all, all, kWarpLanes * size);
      if (&warp[i] != &last) release(warp[i]);
    }
  }

  static bool same_collective(const BlockThread& a, const BlockThread& b) {
    return a.mask == b.mask && a.size == b.size && std::strcmp(a.what, b.what) == 0 &&
           a.where.line() == b.where.line() &&
           std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
  }

  void leave() {
    std::unique_lock lock(mutex);
    self().state = State::kLeft;
    --live;
    open_barrier_if_full();
    fail_if_stuck();
  }
};

ThreadBlock* running = nullptr;

// Whether launches are noted, a line each: name, bytes of dynamic and of static shared memory.
enum class Noting { kOff, kInsteadOfRunning, kAndRunning };
Noting noting = Noting::kOff;
std::string noted;

int64_t most_shared_bytes = 227 << 10;  // as compute capability 9.0 has

}  // namespace

// For tests that ask which kernels a call enters. From here on launches only run if `how` is 0, are
// only noted if it is 1, and are noted and run if it is 2. Returns what was noted before.
extern "C" __attribute__((visibility("default"))) const char* adatape_cuda_host_note_launches(
    int how) {
  static std::string before;
  before = std::exchange(noted, {});
  noting = static_cast<Noting>(how);
  return before.c_str();
}

// For tests that ask what happens on another GPU: from here on a block may have so many bytes of
// shared memory. Returns how many it had before.
extern "C" __attribute__((visibility("default"))) int64_t
adatape_cuda_host_limit_shared(int64_t bytes) {
  return std::exchange(most_shared_bytes, bytes);
}

int64_t shared_limit() { return most_shared_bytes; }

void block_barrier(Where where) { running->barrier(where); }

void exchange_bytes(const char* what, unsigned mask, const void* mine, size_t size, void* all,
                    Where where) {
  running->collective(what, mask, mine, size, all, where);
}

void run(const HostLaunch& launch, const std::function<void()>& kernel) {
  if (noting != Noting::kOff) {
    noted += std::string(launch.kernel_name) + " " + std::to_string(launch.shared_bytes) + " " +
             std::to_string(launch.static_bytes) + "\n";
    if (noting == Noting::kInsteadOfRunning) return;
  }
  const Dim grid = launch.grid;
  const unsigned block_threads = launch.block_threads;
  const size_t shared_bytes = launch.shared_bytes;
  static std::mutex one_grid_at_a_time;
  const std::lock_guard lock(one_grid_at_a_time);
  // The memory has exactly this size, so that AddressSanitizer sees an access behind its end.
  const auto free = [](std::byte* p) { ::operator delete(p, kSharedAlignment); };
  const std::unique_ptr<std::byte, decltype(free)> shared(
      static_cast<std::byte*>(::operator new(shared_bytes, kSharedAlignment)), free);

  ThreadBlock block(launch.kernel_name, block_threads);
  running = &block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto prepare = [&](uint64_t index) {
    std::memset(shared.get(), kUninitialised, shared_bytes);
    const Dim where{static_cast<unsigned>(index % grid.x),
                    static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
    for (unsigned i = 0; i < block_threads; ++i) {
      BlockThread& thread = block.threads[i];
      thread = {};
      static_cast<Place&>(thread) = {.thread = {.x = i, .y = 0, .z = 0},
                                     .block = where,
                                     .block_size = {.x = block_threads},
                                     .grid_size = grid,
                                     .shared = shared.get()};
      thread.rank = i;
    }
    block.live = block_threads;
  };
  block.turns.run(
      blocks, prepare, [&](unsigned rank) { place = &block.threads[rank]; },
      [&] {
        kernel();
        block.leave();
      });
  running = nullptr;
}

}  // namespace cuda_host
