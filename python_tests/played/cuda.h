// CUDA C++ on a CPU: its words, and a launch that plays a grid, for any compiler.  It stands where csrc/launch.h stands
// for nvcc.
//
// Blocks run one after the other.  The threads of a block run one after the other too, until one waits for others (a
// barrier, a shuffle): that one is left where it is, on a stack of its own, and the next begins.  Their order changes
// from block to block, so that a result which hangs on it differs from the CPU's.  What a card would leave undefined is
// an error here: threads at different barriers, a shuffle with a thread that has left or is not in the mask, a grid
// that no card takes.  What cannot be seen: races between threads that do not wait, ptxas, streams, time.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(threads)
#define __shared__ static
#define __syncthreads() (::played::wait_for_block(__LINE__))
#define __shfl_down_sync(mask, value, delta, width) (::played::shuffle_down(__LINE__, mask, value, delta, width))
#define __match_any_sync(mask, value) (::played::match_any(__LINE__, mask, value))
#define __popc(bits) __builtin_popcount(bits)
#define __ffs(bits) __builtin_ffs(bits)
#define threadIdx (::played::now->thread)
#define blockIdx (::played::now->block)
#define blockDim (::played::now->threads)
#define gridDim (::played::now->blocks)

namespace played {

constexpr unsigned warp_size = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Thread {
  Index thread, block, threads, blocks;
  // How often it has waited, and where it does or did last.
  uint64_t barriers = 0, exchanges = 0;
  int barrier = 0, exchange = 0;
  std::array<uint64_t, 2> offered{};  // what it gives in this exchange with its warp and in the one before
  bool done = false;
};

// A stack on which threads run, one after the other, until one of them waits.
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool ended = false;
};

inline Thread* now;  // the thread that runs
inline std::vector<Thread> block_threads;
inline ucontext_t scheduler;
inline Fiber* running;
inline bool moved;  // something has happened since the scheduler looked last

// Leaves the thread until what it waits for may have come.
inline void leave() {
  Thread* const me = now;
  swapcontext(&running->context, &scheduler);
  now = me;
}

inline void wait_for_block(int line) {
  const uint64_t mine = ++now->barriers;
  now->barrier = line;
  moved = true;
  for (;;) {
    bool all = true;
    for (const Thread& other : block_threads) {
      if (other.barriers == mine && other.barrier != line)
        throw std::runtime_error("threads wait at different barriers");
      all = all && (other.done || other.barriers >= mine);
    }
    if (all) return;
    leave();
  }
}

// The numbers that all threads of the mask offer, by their place in the warp.
inline std::array<uint64_t, warp_size> exchange(int line, unsigned mask, uint64_t value) {
  const unsigned lane = now->thread.x % warp_size, first = now->thread.x - lane;
  if (!(mask >> lane & 1)) throw std::runtime_error("a thread is not in its own mask");
  const uint64_t mine = ++now->exchanges;
  now->exchange = line;
  now->offered[mine % 2] = value;
  moved = true;
  std::array<uint64_t, warp_size> all{};
  for (bool complete = false; !complete;) {
    complete = true;
    for (unsigned other = 0; other < warp_size; ++other) {
      if (!(mask >> other & 1)) continue;
      const Thread& thread = block_threads.at(first + other);
      if (thread.done && thread.exchanges < mine) throw std::runtime_error("an exchange with a thread that has left");
      if (thread.exchanges == mine && thread.exchange != line)
        throw std::runtime_error("threads at different exchanges");
      complete = complete && thread.exchanges >= mine;
      all[other] = thread.offered[mine % 2];
    }
    if (!complete) leave();
  }
  return all;
}

template <class T>
T shuffle_down(int line, unsigned mask, T value, unsigned delta, int width) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const unsigned lane = now->thread.x % warp_size, from = lane + delta;
  const auto all = exchange(line, mask, bits);
  if (from / width != lane / width) return value;  // from beyond the segment: the thread's own
  if (!(mask >> from & 1)) throw std::runtime_error("a shuffle from a thread that is not in the mask");
  std::memcpy(&value, &all[from], sizeof(T));
  return value;
}

// The threads of the mask that offer the same number.
inline unsigned match_any(int line, unsigned mask, unsigned long long value) {
  const auto all = exchange(line, mask, value);
  unsigned same = 0;
  for (unsigned other = 0; other < warp_size; ++other)
    if ((mask >> other & 1) && all[other] == value) same |= 1u << other;
  return same;
}

// Plays a grid of blocks.
class Grid {
 public:
  Grid(unsigned blocks, unsigned threads, std::function<void()> body) : body_(std::move(body)) {
    for (unsigned block = 0; block < blocks; ++block) play(block, blocks, threads);
  }

 private:
  void play(unsigned block, unsigned blocks, unsigned threads) {
    block_threads.assign(threads, {});
    order_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      order_[i] = (37 * i + block) % threads;  // 37 shares no factor with a number of threads
      block_threads[i].thread.x = i;
      block_threads[i].block.x = block;
      block_threads[i].threads.x = threads;
      block_threads[i].blocks.x = blocks;
    }
    next_ = 0;
    std::vector<std::unique_ptr<Fiber>> live, left;
    for (unsigned sweep = block; next_ < threads || !live.empty(); ++sweep) {
      moved = false;
      if (next_ < threads) live.push_back(fresh());
      for (size_t i = 0; i < live.size(); ++i) {
        running = live[sweep % 2 ? live.size() - 1 - i : i].get();
        swapcontext(&scheduler, &running->context);
        if (failure_) std::rethrow_exception(failure_);
      }
      if (!moved) throw std::runtime_error("the threads of a block wait for each other");
      for (auto& fiber : live) (fiber->ended ? spare_ : left).push_back(std::move(fiber));
      live.swap(left);
      left.clear();
    }
  }

  std::unique_ptr<Fiber> fresh() {
    std::unique_ptr<Fiber> fiber;
    if (spare_.empty()) {
      fiber = std::make_unique<Fiber>();
    } else {
      fiber = std::move(spare_.back());
      spare_.pop_back();
    }
    fiber->ended = false;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = &scheduler;
    playing = this;
    makecontext(&fiber->context, run_threads, 0);
    return fiber;
  }

  static void run_threads() {
    Grid& grid = *playing;
    try {
      while (grid.next_ < grid.order_.size()) {
        Thread* const me = now = &block_threads[grid.order_[grid.next_++]];
        grid.body_();
        me->done = moved = true;
      }
    } catch (...) {
      grid.failure_ = std::current_exception();
    }
    running->ended = true;
  }

  inline static Grid* playing;
  std::function<void()> body_;
  std::vector<unsigned> order_;
  unsigned next_ = 0;  // in order_: the threads before it have begun
  std::vector<std::unique_ptr<Fiber>> spare_;
  std::exception_ptr failure_;
};

}  // namespace played

inline unsigned long long atomicAdd(unsigned long long* number, unsigned long long amount) {
  const unsigned long long before = *number;
  *number += amount;
  return before;
}

namespace pacd {

// A small card, so that a grid-stride loop takes many strides over few items.
constexpr int64_t multiprocessors = 1;

template <class Kernel, class... Rest>
void launch(void (*play)(Kernel, Rest...), int64_t blocks, int threads, const torch::stable::Tensor&,
            const Kernel& kernel, std::type_identity_t<Rest>... rest) {
  if (blocks < 1 || blocks > 0x7FFFFFFF || threads < 1 || threads > 1024)
    throw std::runtime_error("no card takes this grid");
  static_assert(sizeof(Kernel) + (sizeof(Rest) + ... + 0) <= 4000, "parameters of a kernel");
  played::Grid(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { play(kernel, rest...); });
}

}  // namespace pacd
