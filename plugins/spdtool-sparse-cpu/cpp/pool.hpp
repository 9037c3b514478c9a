// A thread pool, for calls that do not come from onnxruntime.
#pragma once

#include <cstddef>

#include "team.hpp"

namespace sparse_cpu {

// Runs work on the calling thread and up to `threads` - 1 others. These are started when they are first needed, and sleep
// between calls. While one caller uses them, other callers work alone. A forked child starts new threads.
class Pool {
 public:
  explicit Pool(size_t threads) : threads_(threads) {}

  operator Lender() { return {lend, this}; }

 private:
  static void lend(void* self, size_t count, void (*work)(void* user, size_t i), void* user);

  size_t threads_;
};

}  // namespace sparse_cpu
