// Decodes one block of a packed weight to 16 fp32 numbers, in units of t. No other file decodes
// nibbles to fp32. There is one version of these functions per instruction set:
//
//   decode_fp4(low, s)         e2m1 * s
//   decode_fp8(low, overflow)  6 * e4m3, from nibbles `s mmm` and `eeee`
//   decode_fp8(codes)          6 * e4m3, from bytes
//
// All results are exact: they have at most six significant bits. E4M3 is converted through IEEE
// fp16, which has wider fields in the same order. Shifted into place, a code is an fp16 number of
// 2^-8 times its value, also where it is subnormal.
#pragma once
#include "abi.h"
#include <array>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {
using namespace fgmp;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// F16 is a vector of 16 fp32 numbers, one block. `minimum` and `maximum` return b where a is NaN.
#if defined(__AVX512BF16__)

using F16 = __m512;
inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 broadcast(float x) { return _mm512_set1_ps(x); }
inline F16 load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, F16 v) { _mm512_storeu_ps(p, v); }
inline F16 muladd(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 subtract(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 multiply(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 divide(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 minimum(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 maximum(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 and_bits(F16 a, F16 b) { return _mm512_and_ps(a, b); }
inline F16 or_bits(F16 a, F16 b) { return _mm512_or_ps(a, b); }

#elif defined(__AVX2__)

struct F16 {
  __m256 low, high;
};
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, F16 v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline F16 muladd(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F16 add(F16 a, F16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline F16 subtract(F16 a, F16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline F16 multiply(F16 a, F16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline F16 divide(F16 a, F16 b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline F16 minimum(F16 a, F16 b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline F16 maximum(F16 a, F16 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline F16 and_bits(F16 a, F16 b) {
  return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)};
}
inline F16 or_bits(F16 a, F16 b) {
  return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)};
}

#else

struct F16 {
  float lane[16];
};
inline F16 zero() { return {}; }
inline F16 broadcast(float x) {
  F16 v;
  for (float &lane : v.lane)
    lane = x;
  return v;
}
inline F16 load(const float *p) {
  F16 v;
  std::memcpy(v.lane, p, sizeof v.lane);
  return v;
}
inline void store(float *p, F16 v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline F16 muladd(F16 a, F16 b, F16 c) {
  for (int i = 0; i < 16; ++i)
    c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
template <class Op> inline F16 each(F16 a, F16 b, Op &&op) {
  for (int i = 0; i < 16; ++i)
    a.lane[i] = op(a.lane[i], b.lane[i]);
  return a;
}
inline F16 add(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a + b; });
}
inline F16 subtract(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a - b; });
}
inline F16 multiply(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a * b; });
}
inline F16 divide(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a / b; });
}
inline F16 minimum(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a < b ? a : b; });
}
inline F16 maximum(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return a > b ? a : b; });
}
inline F16 and_bits(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return float_of(bits_of(a) & bits_of(b)); });
}
inline F16 or_bits(F16 a, F16 b) {
  return each(a, b, [](float a, float b) { return float_of(bits_of(a) | bits_of(b)); });
}

#endif

// Sum of 16 lanes by halving, in the same order on every machine.
inline float sum(F16 v) {
#if defined(__AVX2__)
#if defined(__AVX512BF16__)
  const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
#else
  const __m256 low = v.low, high = v.high;
#endif
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i)
      v.lane[i] += v.lane[i + width];
  return v.lane[0];
#endif
}

// Whether 16 magnitudes are neither infinite nor NaN.
inline bool finite(F16 v) {
#if defined(__AVX512BF16__)
  return !_mm512_cmp_ps_mask(v, broadcast(float_of(0x7f800000)), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  const __m256 infinity = _mm256_set1_ps(float_of(0x7f800000));
  const __m256 low = _mm256_cmp_ps(v.low, infinity, _CMP_NLT_UQ);
  return !_mm256_movemask_ps(_mm256_or_ps(low, _mm256_cmp_ps(v.high, infinity, _CMP_NLT_UQ)));
#else
  uint32_t most = 0;
  for (float lane : v.lane)
    most = bits_of(lane) > most ? bits_of(lane) : most;
  return most < 0x7f800000;
#endif
}

// The largest of 16 numbers, none of them NaN.
inline float largest(F16 v) {
#if defined(__AVX2__)
#if defined(__AVX512BF16__)
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
  const __m256 eight = _mm256_max_ps(v.low, v.high);
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float most = v.lane[0];
  for (float lane : v.lane)
    most = lane > most ? lane : most;
  return most;
#endif
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Rounds to nearest even; a NaN becomes the quiet NaN of its sign.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return static_cast<uint16_t>(bits >> 16 & 0x8000) | 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rounds 16 numbers to bf16 numbers, as to_bf16 does; a NaN stays one.
inline F16 round_bf16(F16 v) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  auto half = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32(-0x10000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(cut), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  };
  return {half(v.low), half(v.high)};
#else
  float lanes[16];
  store(lanes, v);
  for (float &lane : lanes)
    lane = from_bf16(to_bf16(lane));
  return load(lanes);
#endif
}

// Load 16 bf16 numbers as fp32, and store fp32 numbers of at most eight significant bits as bf16.
inline F16 load_bf16(const uint16_t *p) {
#if defined(__AVX2__)
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
#if defined(__AVX512BF16__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
#else
  auto half = [](__m128i w) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16));
  };
  return {half(_mm256_castsi256_si128(words)), half(_mm256_extracti128_si256(words, 1))};
#endif
#else
  F16 v;
  for (int i = 0; i < 16; ++i)
    v.lane[i] = from_bf16(p[i]);
  return v;
#endif
}

inline void store_bf16(uint16_t *p, F16 v) {
#if defined(__AVX512BF16__)
  const __m512i words = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(words));
#elif defined(__AVX2__)
  const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(v.low), 16);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(v.high), 16);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), words);
#else
  for (int i = 0; i < 16; ++i)
    p[i] = static_cast<uint16_t>(bits_of(v.lane[i]) >> 16);
#endif
}

constexpr float kE2M1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// Magnitudes of E4M3 by code, for block scales and sensitivities. Neither contains 0x7f, NaN.
constexpr auto kE4M3 = [] {
  std::array<float, 128> values{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    float value = static_cast<float>(exponent ? 8 + mantissa : mantissa) * 0x1p-9f;
    for (int i = 1; i < exponent; ++i)
      value *= 2;
    values[code] = value;
  }
  return values;
}();
inline float decode_e4m3(uint8_t code) { return kE4M3[code & 0x7f]; }

#if defined(__AVX512VBMI__)

// Moves nibble j of the quadword at p to the low bits of 32-bit lane j; other bits remain above it.
inline __m512i nibbles(const uint8_t *p) {
  const __m512i where = _mm512_set_epi64(0x3c3c3c3c38383838, 0x3434343430303030, 0x2c2c2c2c28282828,
                                         0x2424242420202020, 0x1c1c1c1c18181818, 0x1414141410101010,
                                         0x0c0c0c0c08080808, 0x0404040400000000);
  int64_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_multishift_epi64_epi8(where, _mm512_set1_epi64(bits));
}

inline F16 decode_fp4(const uint8_t *low, float s) {
  const __m512 values = _mm512_set_ps(-6, -4, -3, -2, -1.5f, -1, -0.5f, -0.0f, 6, 4, 3, 2, 1.5f, 1,
                                      0.5f, 0);
  return _mm512_mul_ps(_mm512_permutexvar_ps(nibbles(low), values), _mm512_set1_ps(s));
}

// The 16 elements of an FP8 block as fp16 words of 2^-8 times their value.
inline __m256i fp16_words(const uint8_t *low, const uint8_t *overflow) {
  // Table indexed by `s mmm`: s at bit 15, mmm at bits 7 to 9.
  const __m512i parts = _mm512_set_epi16(
      -0x7c80, -0x7d00, -0x7d80, -0x7e00, -0x7e80, -0x7f00, -0x7f80, -0x8000, 0x380, 0x300, 0x280,
      0x200, 0x180, 0x100, 0x80, 0, -0x7c80, -0x7d00, -0x7d80, -0x7e00, -0x7e80, -0x7f00, -0x7f80,
      -0x8000, 0x380, 0x300, 0x280, 0x200, 0x180, 0x100, 0x80, 0);
  const __m256i low_at = _mm256_set_epi64x(0x3c3c383834343030, 0x2c2c282824242020,
                                           0x1c1c181814141010, 0x0c0c080804040000);
  // The exponent goes to bits 10 to 13, which are bits 2 to 5 of the upper byte: the upper byte is
  // taken two bits below the nibble.
  const __m256i high_at = _mm256_set_epi64x(0x3a00360032002e00, 0x2a00260022001e00,
                                            0x1a00160012000e00, 0x0a00060002003e00);
  int64_t a, b;
  std::memcpy(&a, low, sizeof a);
  std::memcpy(&b, overflow, sizeof b);
  __m256i sm = _mm256_multishift_epi64_epi8(low_at, _mm256_set1_epi64x(a));
  sm = _mm256_permutexvar_epi16(sm, _mm512_castsi512_si256(parts));
  __m256i e = _mm256_multishift_epi64_epi8(high_at, _mm256_set1_epi64x(b));
  return _mm256_ternarylogic_epi32(sm, e, _mm256_set1_epi16(0x3c00), 0xf8); // sm | (e & 0x3c00)
}

inline F16 decode_fp8(const uint8_t *low, const uint8_t *overflow) {
  return _mm512_mul_ps(_mm512_cvtph_ps(fp16_words(low, overflow)),
                            _mm512_set1_ps(256 * kFp8Factor));
}

inline F16 decode_fp8(const uint8_t *codes) {
  __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
  __m256i sign = _mm256_slli_epi16(c, 8), magnitude = _mm256_slli_epi16(c, 7);
  __m256i half = _mm256_or_si256(_mm256_and_si256(sign, _mm256_set1_epi16(-0x8000)),
                                 _mm256_and_si256(magnitude, _mm256_set1_epi16(0x3f80)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256 * kFp8Factor));
}

#elif defined(__AVX2__)

// The 16 nibbles of the eight bytes at p, in order, one per byte.
inline __m128i nibbles(const uint8_t *p) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  __m128i both = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
  return _mm_and_si128(both, _mm_set1_epi8(15));
}

inline F16 decode_fp4(const uint8_t *low, float s) {
  // Upper and lower byte of E2M1's values as bf16, which is the upper half of fp32.
  const __m128i upper = _mm_setr_epi8(0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41,
                                      -0x41, -0x41, -0x40, -0x40, -0x40, -0x40);
  const __m128i lower = _mm_setr_epi8(0x00, 0x00, -0x80, -0x40, 0x00, 0x40, -0x80, -0x40, 0x00, 0x00,
                                      -0x80, -0x40, 0x00, 0x40, -0x80, -0x40);
  const __m128i n = nibbles(low);
  const __m128i hi = _mm_shuffle_epi8(upper, n), lo = _mm_shuffle_epi8(lower, n);
  const __m256 scale = _mm256_set1_ps(s);
  auto half = [&](__m128i words) {
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), scale);
  };
  return {half(_mm_unpacklo_epi8(lo, hi)), half(_mm_unpackhi_epi8(lo, hi))};
}

// Numbers from fp16 words, whose bytes come in two vectors.
inline F16 from_fp16(__m128i low_bytes, __m128i high_bytes) {
  return {_mm256_cvtph_ps(_mm_unpacklo_epi8(low_bytes, high_bytes)),
          _mm256_cvtph_ps(_mm_unpackhi_epi8(low_bytes, high_bytes))};
}

// `s mmm` gives bits 15 and 7 to 9 of an fp16 word of 2^-8 times the value, `eeee` bits 10 to 13.
inline F16 decode_fp8(const uint8_t *low, const uint8_t *overflow) {
  const __m128i upper = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, -0x80, -0x80, -0x7f, -0x7f, -0x7e,
                                      -0x7e, -0x7d, -0x7d);
  const __m128i lower =
      _mm_setr_epi8(0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80);
  const __m128i sm = nibbles(low), e = _mm_slli_epi16(nibbles(overflow), 2);
  const __m128i high = _mm_or_si128(_mm_shuffle_epi8(upper, sm), e);
  return multiply(from_fp16(_mm_shuffle_epi8(lower, sm), high), broadcast(256 * kFp8Factor));
}

inline F16 decode_fp8(const uint8_t *codes) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
  const __m128i magnitude = _mm_and_si128(_mm_srli_epi16(c, 1), _mm_set1_epi8(0x3f));
  const __m128i sign = _mm_and_si128(c, _mm_set1_epi8(-0x80));
  const __m128i last = _mm_slli_epi16(_mm_and_si128(c, _mm_set1_epi8(1)), 7);
  return multiply(from_fp16(last, _mm_or_si128(sign, magnitude)), broadcast(256 * kFp8Factor));
}

#else

inline F16 decode_fp4(const uint8_t *low, float s) {
  F16 v;
  for (int i = 0; i < kHalf; ++i) {
    v.lane[2 * i] = kE2M1[low[i] & 15] * s;
    v.lane[2 * i + 1] = kE2M1[low[i] >> 4] * s;
  }
  return v;
}

inline F16 decode_fp8(const uint8_t *codes) {
  F16 v;
  for (int i = 0; i < kBlock; ++i) {
    const float magnitude = decode_e4m3(codes[i]) * kFp8Factor;
    v.lane[i] = codes[i] & 0x80 ? -magnitude : magnitude;
  }
  return v;
}

inline F16 decode_fp8(const uint8_t *low, const uint8_t *overflow) {
  uint8_t codes[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const int sm = low[i / 2] >> (i % 2 * 4) & 15, e = overflow[i / 2] >> (i % 2 * 4) & 15;
    codes[i] = static_cast<uint8_t>((sm & 8) << 4 | e << 3 | (sm & 7));
  }
  return decode_fp8(codes);
}

#endif

constexpr int64_t kLine = 64;      // bytes of a cache line
constexpr int64_t kSegment = 1024; // blocks searched for FP8 blocks at a time

// Writes the positions of the FP8 blocks among `count` scale bytes, at most kSegment, in ascending
// order, and returns their number. It has no branch on a single flag, which a processor could not
// predict.
struct Positions {
  uint16_t at[kSegment + 64];
};
inline int64_t flagged(const uint8_t *scale, int64_t count, Positions &positions) {
  int64_t found = 0;
#if defined(__AVX512VBMI2__)
  alignas(64) static constexpr auto kBytes = [] {
    std::array<uint8_t, 64> bytes{};
    for (int i = 0; i < 64; ++i)
      bytes[i] = static_cast<uint8_t>(i);
    return bytes;
  }();
  const __m512i bytes = _mm512_load_si512(kBytes.data());
  for (int64_t g = 0; g < count; g += 64) {
    const __mmask64 here = count - g >= 64 ? ~0ull : (1ull << (count - g)) - 1;
    const __mmask64 flags = _mm512_movepi8_mask(_mm512_maskz_loadu_epi8(here, scale + g));
    const __m512i packed = _mm512_maskz_compress_epi8(flags, bytes);
    const __m512i base = _mm512_set1_epi16(static_cast<int16_t>(g));
    auto widen_half = [&](__m256i half, int64_t at) {
      const __m512i numbers = _mm512_add_epi16(_mm512_cvtepu8_epi16(half), base);
      _mm512_storeu_si512(positions.at + found + at, numbers);
    };
    widen_half(_mm512_castsi512_si256(packed), 0);
    widen_half(_mm512_extracti64x4_epi64(packed, 1), 32);
    found += __builtin_popcountll(flags);
  }
#elif defined(__AVX2__)
  // The indices of the bits that are set in a byte, in order.
  static constexpr auto kBits = [] {
    std::array<std::array<uint8_t, 8>, 256> bits{};
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0, next = 0; i < 8; ++i)
        if (byte >> i & 1)
          bits[byte][next++] = static_cast<uint8_t>(i);
    return bits;
  }();
  int64_t g = 0;
  const __m128i eight = _mm_set1_epi16(8);
  __m128i base = _mm_setzero_si128();
  auto add = [&](uint32_t flags) { // of eight blocks
    const __m128i set = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kBits[flags].data()));
    const __m128i numbers = _mm_add_epi16(_mm_cvtepu8_epi16(set), base);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(positions.at + found), numbers);
    found += __builtin_popcount(flags);
    base = _mm_add_epi16(base, eight);
  };
  for (; g + 32 <= count; g += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(scale + g));
    const auto flags = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    for (int i = 0; i < 32; i += 8)
      add(flags >> i & 255);
  }
  for (; g < count; g += 8) {
    uint32_t flags = 0;
    for (int64_t i = 0; i < 8 && g + i < count; ++i)
      flags |= static_cast<uint32_t>(scale[g + i] >> 7) << i;
    add(flags);
  }
#else
  for (int64_t g = 0; g < count; ++g) {
    positions.at[found] = static_cast<uint16_t>(g);
    found += scale[g] >> 7;
  }
#endif
  return found;
}

// Number of FP8 blocks among `count` scale bytes.
inline int64_t count_flags(const uint8_t *scale, int64_t count) {
  int64_t found = 0;
  for (int64_t g = 0; g < count; ++g)
    found += scale[g] >> 7;
  return found;
}

// Prefetches blocks [begin, end) of row n: the rows of a tile lie too far apart for the hardware
// prefetcher.
inline void prefetch_row(const Weight &w, int64_t n, int64_t begin, int64_t end) {
  auto ask = [](const uint8_t *first, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine)
      __builtin_prefetch(first + i);
  };
  if (w.fp8)
    return ask(w.fp8 + (n * w.blocks() + begin) * kBlock, (end - begin) * kBlock);
  ask(w.low + (n * w.blocks() + begin) * kHalf, (end - begin) * kHalf);
  ask(w.scale + n * w.blocks() + begin, end - begin);
}

// Calls use(g, values) for blocks [begin, end) of row n, for an FP8 block twice. The first pass
// decodes all blocks as FP4; an FP8 block gives zeros there, since its scale byte decodes to zero.
// The second pass decodes the FP8 blocks. The long loop thus has no branch. Returns false where the
// planes contradict each other: where `row_ptr` does not count the flags of `scale`, `overflow`
// would be read out of bounds.
template <class Use>
inline bool decode_row(const Weight &w, int64_t n, int64_t begin, int64_t end, Use &&use) {
  const int64_t blocks = w.blocks();
  if (w.fp8) {
    for (int64_t g = begin; g < end; ++g)
      use(g, decode_fp8(w.fp8 + (n * blocks + g) * kBlock));
    return true;
  }
  const uint8_t *low = w.low + n * blocks * kHalf, *scale = w.scale + n * blocks;
  int64_t next = w.row_ptr ? w.row_ptr[n] + count_flags(scale, begin) : 0;
  for (int64_t top = begin; top < end; top += kSegment) {
    const int64_t count = end - top < kSegment ? end - top : kSegment;
    for (int64_t g = top; g < top + count; ++g)
      use(g, decode_fp4(low + g * kHalf, decode_e4m3(scale[g])));
    Positions positions;
    const int64_t found = flagged(scale + top, count, positions);
    if (next < 0 || next + found > w.n_fp8)
      return false;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t g = top + positions.at[i];
      use(g, decode_fp8(low + g * kHalf, w.overflow + next++ * kHalf));
    }
  }
  return end < blocks || !w.row_ptr || next == w.row_ptr[n + 1];
}

// Range of `count` items that one member of a team processes, in multiples of `grain`.
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t count, int64_t grain, int member, int size) {
  int64_t grains = (count + grain - 1) / grain;
  int64_t begin = grains * member / size * grain, end = grains * (member + 1) / size * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

} // namespace
