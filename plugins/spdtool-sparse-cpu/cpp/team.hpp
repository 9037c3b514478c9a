// Phases of work, shared by the threads that onnxruntime or the pool provides.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparse_cpu {

// How onnxruntime lends its threads: calls `work(user, i)` for i in [0, count), in any order, on any number of threads.
struct Lender {
  void (*call)(void* context, size_t count, void (*work)(void* user, size_t i), void* user);
  void* context;
};

// A phase begins when every item of the one before is done. `worker` numbers the threads from 0.
struct Phase {
  size_t items;
  std::function<void(size_t item, size_t worker)> work;
};

// Runs phases with one loan of threads for all of them, since a loan for each phase costs more than the phase when a batch is
// a single sentence.
//
// One thread is enough: items are claimed by counting up, and a thread only waits for an item that another thread is
// computing. So nothing hangs when the calls run one after the other, as in a session with one thread, or when some come
// late: they join the phases that remain, or none.
class Team {
 public:
  // Runs the phases on at most `most` threads; returns how many joined while there was work. There is at least one phase,
  // and the last has items. An exception of the work is thrown here when every thread has returned; the remaining work is
  // then skipped.
  static size_t run(const std::vector<Phase>& phases, const Lender& lender, size_t most) {
    Team team(phases);
    lender.call(lender.context, most, [](void* self, size_t) { static_cast<Team*>(self)->join(); }, &team);
    if (team.failed_.load(std::memory_order_relaxed)) std::rethrow_exception(team.failure_);
    return team.joined_.load(std::memory_order_relaxed);
  }

 private:
  struct alignas(64) Counters {
    std::atomic<size_t> claimed{0}, done{0};
  };

  explicit Team(const std::vector<Phase>& phases) : phases_(phases), counters_(phases.size()) {}

  bool over() const { return counters_.back().done.load(std::memory_order_acquire) == phases_.back().items; }

  void join() {
    if (over()) return;
    const size_t worker = joined_.fetch_add(1, std::memory_order_relaxed);
    for (size_t p = 0; p < phases_.size(); p++) {
      const Phase& phase = phases_[p];
      Counters& counters = counters_[p];
      if (counters.done.load(std::memory_order_acquire) == phase.items) continue;
      for (size_t item; (item = counters.claimed.fetch_add(1, std::memory_order_relaxed)) < phase.items;) {
        attempt(phase, item, worker);
        counters.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; counters.done.load(std::memory_order_acquire) < phase.items; spins++) rest(spins);
    }
  }

  // An exception must not escape from a thread of onnxruntime's, and the others wait for this item.
  void attempt(const Phase& phase, size_t item, size_t worker) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      phase.work(item, worker);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
    }
  }

  // Phases last microseconds: spin, and yield the core only when the other thread seems to have lost its own.
  static void rest(int spins) {
    if (spins > 4000) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

  const std::vector<Phase>& phases_;
  std::vector<Counters> counters_;
  std::atomic<size_t> joined_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

// Threads that may join on this machine.
inline size_t most_threads() {
  const size_t cores = std::thread::hardware_concurrency();
  return cores == 0 ? 1 : cores < 64 ? cores : 64;
}

}  // namespace sparse_cpu
