// The kernel tables that this machine can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace dk {

// Best last; base runs everywhere.
inline std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables{&kernels_base};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2) tables.push_back(&kernels_avx2);
  if (avx512) tables.push_back(&kernels_avx512);
#elif defined(__aarch64__)
  tables.push_back(&kernels_neon);  // every aarch64 CPU has NEON
#endif
  return tables;
}

}  // namespace dk
