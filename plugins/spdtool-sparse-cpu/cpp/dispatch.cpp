// Chooses the compiled kernels that this machine can run. Itself compiled for the oldest machine.
#include <cstdlib>
#include <cstring>

#include "int8.hpp"
#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sparse_cpu {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;
extern const Int8Kernels int8_kernels_avx512_vnni, int8_kernels_avx512, int8_kernels_avx_vnni, int8_kernels_avx2,
    int8_kernels_baseline;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Int8Kernels int8_kernels_neon_i8mm, int8_kernels_neon_dotprod, int8_kernels_neon;
#else
extern const Kernels kernels_baseline;
extern const Int8Kernels int8_kernels_baseline;
#endif
#if defined(SPARSE_CPU_EMULATED)
extern const Int8Kernels int8_kernels_emulated;
#endif

namespace {

struct Choice {
  const char* name;  // for SPDTOOL_SPARSE_CPU_ISA
  bool (*runs)();
  const Kernels* floats;
  const Int8Kernels* integers;
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx_vnni() {  // of which not every compiler knows the name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// The best first.
const Choice kChoices[] = {
    {"avx512_vnni", has_avx512_vnni, &kernels_avx512, &int8_kernels_avx512_vnni},
    {"avx512", has_avx512, &kernels_avx512, &int8_kernels_avx512},
    {"avx_vnni", has_avx_vnni, &kernels_avx2, &int8_kernels_avx_vnni},
    {"avx2", has_avx2, &kernels_avx2, &int8_kernels_avx2},
    {"baseline", always, &kernels_baseline, &int8_kernels_baseline},
#if defined(SPARSE_CPU_EMULATED)  // for tests: never the best
    {"emulated", has_avx2, &kernels_avx2, &int8_kernels_emulated},
    {"baseline", always, &kernels_baseline, &int8_kernels_baseline},
#endif
};
#elif defined(__aarch64__)
#if defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_I8MM of the kernel; not every C library knows their names.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

const Choice kChoices[] = {
    {"neon_i8mm", has_i8mm, &kernels_neon, &int8_kernels_neon_i8mm},
    {"neon_dotprod", has_dotprod, &kernels_neon, &int8_kernels_neon_dotprod},
    {"neon", always, &kernels_neon, &int8_kernels_neon},
};
#else
const Choice kChoices[] = {{"baseline", always, &kernels_baseline, &int8_kernels_baseline}};
#endif

// The first choice that this machine can run; with SPDTOOL_SPARSE_CPU_ISA, from the one of that name on.
const Choice& best_choice() {
  const char* forced = std::getenv("SPDTOOL_SPARSE_CPU_ISA");
  const Choice* first = kChoices;
  for (const Choice& choice : kChoices)
    if (forced != nullptr && first == kChoices && std::strcmp(forced, choice.name) == 0) first = &choice;
  while (!first->runs()) first++;
  return *first;
}

}  // namespace

const Kernels& best_kernels() { return *best_choice().floats; }
const Int8Kernels& best_int8_kernels() { return *best_choice().integers; }

}  // namespace sparse_cpu
