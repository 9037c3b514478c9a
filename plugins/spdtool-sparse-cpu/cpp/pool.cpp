#include "pool.hpp"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace sparse_cpu {
namespace {

// The work of one caller, claimed call by call.
struct Job {
  size_t count;
  void (*work)(void* user, size_t i);
  void* user;
  size_t helpers;  // that may still join
  std::atomic<size_t> next{0};

  void take() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(user, i);
  }
};

// The threads, and the job that they help with. Never destroyed: its threads outlive `main`.
class Threads {
 public:
  // Returns false if another caller uses the threads.
  bool help(Job& job) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < job.helpers; started_++) std::thread([this] { wait(); }).detach();
      job_ = &job;
    }
    wake_.notify_all();
    job.take();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    gone_.wait(lock, [&] { return helping_ == 0; });
    lock.unlock();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != nullptr && job_->helpers > 0; });
      Job& job = *job_;
      job.helpers--;
      helping_++;
      lock.unlock();
      job.take();
      lock.lock();
      if (--helping_ == 0) gone_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, gone_;
  Job* job_ = nullptr;
  size_t started_ = 0, helping_ = 0;
};

std::atomic<Threads*> of_process{nullptr};

// A forked child has none of its parent's threads, and perhaps a mutex that one of them locked: it starts a new pool.
Threads& threads() {
#if !defined(_WIN32)
  static const int watched = pthread_atfork(nullptr, nullptr, [] { of_process.store(nullptr); });
  (void)watched;
#endif
  Threads* found = of_process.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  Threads* const made = new Threads;
  if (of_process.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void Pool::lend(void* self, size_t count, void (*work)(void* user, size_t i), void* user) {
  const size_t most = static_cast<const Pool*>(self)->threads_;
  Job job{count, work, user, std::min(most, count) - 1, {}};
  if (most < 2 || count < 2 || !threads().help(job)) job.take();
}

}  // namespace sparse_cpu
