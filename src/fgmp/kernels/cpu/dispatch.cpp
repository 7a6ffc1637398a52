// Reports the instruction sets in this library that the processor supports.
#include <cstdint>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern "C" {

// One bit per instruction set, in the order of INSTRUCTION_SETS in library.py.
int32_t fgmp_instruction_sets() {
  const int32_t portable = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  // With the extensions of Zen 4 and Sapphire Rapids.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bf16");
  const bool avxvnni = __builtin_cpu_supports("avxvnni");
  const bool avx512vnni =
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
  return portable |
         (avx2 ? 2 | (avxvnni ? 4 : 0) | (avx512vnni ? 8 : 0) | (avx512 ? 16 : 0) : 0);
#elif defined(__aarch64__) && defined(__APPLE__)
  return portable | 32; // all of Apple's have dot products
#elif defined(__aarch64__) && defined(__linux__)
  return portable | (getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? 32 : 0);
#else
  return portable;
#endif
}
}
