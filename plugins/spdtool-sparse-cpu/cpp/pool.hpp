// Threads of our own, for calls that do not come from onnxruntime.
#pragma once

#include <cstddef>

#include "team.hpp"

namespace sparse_cpu {

// Lends the calling thread and up to `threads` - 1 others, which are started when they are first needed and then wait, asleep,
// for the next loan. While one caller has them, others work alone. A forked child starts threads of its own.
class Pool {
 public:
  explicit Pool(size_t threads) : threads_(threads) {}

  operator Lender() { return {lend, this}; }

 private:
  static void lend(void* self, size_t count, void (*work)(void* user, size_t i), void* user);

  size_t threads_;
};

}  // namespace sparse_cpu
