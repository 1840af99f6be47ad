// How the threads of a block take turns. Under ThreadSanitizer they are threads of the system;
// otherwise they are fibers, each of which runs until it has to wait.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <barrier>
#include <semaphore>
#include <thread>
#elif !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

using Prepare = std::function<void(uint64_t block)>;
using SetPlace = std::function<void(unsigned thread)>;

#if defined(__SANITIZE_THREAD__)

class SystemThreads {
 public:
  explicit SystemThreads(unsigned threads) : semaphores_(threads) {}

  unsigned current() const { return current_; }

  // Gives the lock back and waits for resume(). It does not take the lock again, because that would
  // order the thread after all that others have done meanwhile, and hide races with them from
  // ThreadSanitizer.
  void suspend(unsigned thread, std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    semaphores_[thread].go.acquire();
  }
  void resume(unsigned thread) { semaphores_[thread].go.release(); }

  // Runs `body` in all threads for each block, after prepare(block) and set_place(thread).
  void run(uint64_t blocks, const Prepare& prepare, const SetPlace& set_place,
           const std::function<void()>& body) {
    uint64_t next = 0;
    std::barrier block_starts(std::ssize(semaphores_), [&]() noexcept {
      if (next < blocks) prepare(next++);
    });
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < semaphores_.size(); ++i) {
      threads.emplace_back([&, i] {
        current_ = i;
        for (uint64_t block = 0; block < blocks; ++block) {
          block_starts.arrive_and_wait();
          set_place(i);
          body();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  struct Semaphore {
    std::binary_semaphore go{0};
  };
  std::vector<Semaphore> semaphores_;
  static inline thread_local unsigned current_ = 0;
};

using Turns = SystemThreads;

#else

#if defined(__x86_64__)

// Pushes the registers that a call preserves, saves the stack pointer in *from, and goes on with
// the stack `to`.
extern "C" void cuda_host_switch_stack(void** from, void* to);
asm(R"(
.text
.type cuda_host_switch_stack, @function
cuda_host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// A fiber's stack while another one runs.
struct StackContext {
  void* stack_pointer;

  void start_at(void (*entry)(), std::byte* stack, size_t size) {
    constexpr size_t kRegisters = 6;
    // On top lies what `entry` would return to, which it never does. Its address is no multiple of
    // 16, as after a call.
    void** top = reinterpret_cast<void**>(stack + size) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = std::fill_n(top - kRegisters, kRegisters, nullptr) - kRegisters;
  }
  void switch_to(StackContext& other) {
    cuda_host_switch_stack(&stack_pointer, other.stack_pointer);
  }
};

using Context = StackContext;

#else

// The same for processors other than x86-64, by the C library.
struct LibraryContext {
  ucontext_t state;

  void start_at(void (*entry)(), std::byte* stack, size_t size) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = size;
    makecontext(&state, entry, 0);
  }
  void switch_to(LibraryContext& other) { swapcontext(&state, &other.state); }
};

using Context = LibraryContext;

#endif

// The memory of the fibers' stacks, which is kept from launch to launch.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t{256} << 10;
  // An access to the bytes below a stack ends the process; their number is a multiple of the page
  // size.
  static constexpr size_t kGuard = size_t{64} << 10;

  std::byte* of(unsigned thread) {
    while (stacks_.size() <= thread) {
      void* const memory = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) std::abort();
      stacks_.push_back(static_cast<std::byte*>(memory) + kGuard);
    }
    return stacks_[thread];
  }

 private:
  std::vector<std::byte*> stacks_;
};

class Fibers {
 public:
  explicit Fibers(unsigned threads) : fibers_(threads) {}

  unsigned current() const { return current_; }

  // Gives the lock back and waits for resume(). It does not take the lock again, because that would
  // order the thread after all that others have done meanwhile, and hide races with them from
  // ThreadSanitizer.
  void suspend(unsigned thread, std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    fibers_[thread].state = Fiber::kWaiting;
    leave_fiber(fibers_[thread]);
  }
  void resume(unsigned thread) { fibers_[thread].state = Fiber::kReady; }

  // Runs `body` in all threads for each block, after prepare(block) and set_place(thread).
  void run(uint64_t blocks, const Prepare& prepare, const SetPlace& set_place,
           const std::function<void()>& body) {
    static Stacks stacks;
    running_ = this;
    body_ = &body;
    for (uint64_t block = 0; block < blocks; ++block) {
      prepare(block);
      unfinished_ = fibers_.size();
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        fibers_[i].state = Fiber::kReady;
        fibers_[i].stack = stacks.of(i);
        fibers_[i].context.start_at(&Fibers::entry, fibers_[i].stack, Stacks::kBytes);
      }
      // The fibers run in one order and then in the other, so that what needs a barrier and has
      // none goes wrong in one of them.
      for (bool upwards = true; unfinished_ > 0; upwards = !upwards) {
        for (size_t i = 0; i < fibers_.size(); ++i) {
          current_ = upwards ? i : fibers_.size() - 1 - i;
          if (fibers_[current_].state != Fiber::kReady) continue;
          set_place(current_);
          enter_fiber(fibers_[current_]);
        }
      }
    }
  }

 private:
  struct Fiber {
    enum { kReady, kWaiting, kFinished } state;
    std::byte* stack;
    Context context;
    void* fake_stack;
  };

  static void entry() {
    Fibers& turns = *running_;
    finish_switch(nullptr, &turns.host_stack_, &turns.host_stack_bytes_);
    (*turns.body_)();
    Fiber& fiber = turns.fibers_[turns.current_];
    fiber.state = Fiber::kFinished;
    --turns.unfinished_;
    turns.leave_fiber(fiber);
  }

  void enter_fiber(Fiber& fiber) {
    start_switch(&host_fake_stack_, fiber.stack, Stacks::kBytes);
    host_.switch_to(fiber.context);
    finish_switch(host_fake_stack_, nullptr, nullptr);
  }
  void leave_fiber(Fiber& fiber) {
    start_switch(fiber.state == Fiber::kFinished ? nullptr : &fiber.fake_stack, host_stack_,
                 host_stack_bytes_);
    fiber.context.switch_to(host_);
    finish_switch(fiber.fake_stack, &host_stack_, &host_stack_bytes_);
  }

  // These two tell AddressSanitizer which stack is in use.
  static void start_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                           [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
  }
  static void finish_switch([[maybe_unused]] void* fake_stack,
                            [[maybe_unused]] const void** old_bottom,
                            [[maybe_unused]] size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
#endif
  }

  std::vector<Fiber> fibers_;
  size_t unfinished_ = 0;
  unsigned current_ = 0;
  const std::function<void()>* body_ = nullptr;
  Context host_;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  static inline Fibers* running_ = nullptr;
};

using Turns = Fibers;

#endif

}  // namespace cuda_host
