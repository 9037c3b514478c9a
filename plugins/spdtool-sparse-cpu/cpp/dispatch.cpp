// Chooses the compiled kernels that this machine can run. Itself compiled for the oldest machine.
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

namespace sparse_cpu {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;

namespace {
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
}  // namespace

const Kernels& best_kernels() {
  const char* forced = std::getenv("SPDTOOL_SPARSE_CPU_ISA");
  const auto wanted = [&](const char* name) { return forced != nullptr && std::strcmp(forced, name) == 0; };
  const bool lesser = wanted("avx2") || wanted("baseline");  // anything else leaves the choice to the machine
  if (has_avx512() && !lesser) return kernels_avx512;
  if (has_avx2() && !wanted("baseline")) return kernels_avx2;
  return kernels_baseline;
}
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
const Kernels& best_kernels() { return kernels_neon; }
#else
extern const Kernels kernels_baseline;
const Kernels& best_kernels() { return kernels_baseline; }
#endif

}  // namespace sparse_cpu
