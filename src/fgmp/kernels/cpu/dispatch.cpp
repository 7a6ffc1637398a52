// Reports the widest instruction set in this library that the processor supports.
#include <cstdint>

extern "C" {

// 0: portable; 1: AVX2; 2: AVX-512 with the extensions of Zen 4 and Sapphire Rapids.
int32_t fgmp_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bf16");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}
}
