// Included before kernels.cpp, gives a processor without VNNI the intrinsic of AVX-VNNI.
#pragma once
#include <immintrin.h>
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

// For each of eight lanes, `sum` plus four products of unsigned bytes of `a` and signed bytes of `b`.
inline __m256i emulated_dpbusd(__m256i sum, __m256i a, __m256i b) {
  alignas(32) int sums[8];
  alignas(32) unsigned char unsigned_bytes[32];
  alignas(32) signed char signed_bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i *>(sums), sum);
  _mm256_store_si256(reinterpret_cast<__m256i *>(unsigned_bytes), a);
  _mm256_store_si256(reinterpret_cast<__m256i *>(signed_bytes), b);
  for (int i = 0; i < 32; ++i)
    sums[i / 4] += unsigned_bytes[i] * signed_bytes[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i *>(sums));
}
