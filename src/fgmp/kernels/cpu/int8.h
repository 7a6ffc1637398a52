// Instructions of gemv_int8.h: vectors of eight numbers, products of nibbles and bytes. One version
// per instruction set that multiplies bytes; FGMP_INT8 is defined where there is one.
#pragma once
#include "block.h"

#if defined(__AVX2__) && !defined(__AVX512BF16__)
#define FGMP_INT8
// VNNI: four products of bytes added to each of eight sums, in one instruction of either encoding.
#if defined(__AVXVNNI__)
#define FGMP_DPBUSD _mm256_dpbusd_avx_epi32
#elif defined(__AVX512VNNI__)
#define FGMP_DPBUSD _mm256_dpbusd_epi32
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
#define FGMP_INT8
#include <arm_neon.h>
#endif

#if defined(FGMP_INT8)
namespace {

constexpr int64_t kChunkBlocks = 4; // blocks in 32 bytes of the plane `low`
constexpr int64_t kPairBlocks = 8;  // blocks of two chunks, whose scales are decoded together
constexpr int kDigitBits = 7;

// One digit of 64 elements of a token, with their signs; even and odd elements are apart.
using Digit = int8_t[2][32];

// Twice the values of E2M1 codes, plus an offset, as bytes.
template <int Offset> constexpr auto kTwice = [] {
  std::array<int8_t, 16> twice{};
  for (int code = 0; code < 16; ++code)
    twice[code] = static_cast<int8_t>(2 * kE2M1[code] + Offset);
  return twice;
}();

#if defined(__AVX2__)

// vpmaddubsw and vpdpbusd take one factor without sign: kOffset is added to twice a weight. A sum
// starts with minus what that adds to it.
constexpr int kOffset = 12;

using F8 = __m256;
using I8 = __m256i;
inline F8 load8(const float *p) { return _mm256_loadu_ps(p); }
inline F8 broadcast8(float x) { return _mm256_set1_ps(x); }
inline F8 multiply8(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
inline F8 muladd8(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
inline F8 to_float(I8 v) { return _mm256_cvtepi32_ps(v); }
inline float sum8(F8 v) { return sum(F16{v, _mm256_setzero_ps()}); }
inline I8 load_bytes(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// Of eight scales in the order 0 1 4 5 2 3 6 7, those of the first and of the last four blocks, each
// twice: there the sums of these blocks stand.
inline F8 spread_low(F8 v) { return _mm256_unpacklo_ps(v, v); }
inline F8 spread_high(F8 v) { return _mm256_unpackhi_ps(v, v); }

// 2^-8 times the scales of eight blocks in that order, by way of fp16; zero for FP8 blocks.
inline F8 decode_scales(const uint8_t *scale) {
  const __m128i order = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7, -1);
  const __m128i codes =
      _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(scale)), order);
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(0x3f80)));
}

// 32 bytes of nibbles as twice their values plus kOffset.
struct Weights {
  __m256i even, odd;
  explicit Weights(const uint8_t *low) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(kTwice<kOffset>.data())));
    const __m256i bytes = load_bytes(low), nibble = _mm256_set1_epi8(15);
    even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
    odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
  }

  // `start` plus sums of products over eight elements each, with one or two digits.
  template <int Digits> I8 dot(const Digit (&digit)[2], const int32_t (&start)[8]) const {
    I8 sum = load_bytes(start);
    if (Digits > 1)
      sum = _mm256_add_epi32(sum, above(digit[1]));
    return with(digit[0], sum);
  }

private:
#if defined(FGMP_DPBUSD)
  I8 with(const Digit &digit, I8 sum) const {
    sum = FGMP_DPBUSD(sum, even, load_bytes(digit[0]));
    return FGMP_DPBUSD(sum, odd, load_bytes(digit[1]));
  }
  I8 above(const Digit &digit) const {
    return _mm256_slli_epi32(with(digit, _mm256_setzero_si256()), kDigitBits);
  }
#else
  I8 with(const Digit &digit, I8 sum) const { return _mm256_add_epi32(sum, scaled(digit, 1)); }
  I8 above(const Digit &digit) const { return scaled(digit, 1 << kDigitBits); }
  I8 scaled(const Digit &digit, int16_t factor) const {
    const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_bytes(digit[0])),
                                           _mm256_maddubs_epi16(odd, load_bytes(digit[1])));
    return _mm256_madd_epi16(fours, _mm256_set1_epi16(factor));
  }
#endif
};

// Adds four FP8 blocks: `low` points to each, `overflow` to the first, `at` are their first columns.
template <int M>
inline void add_four(const std::array<const uint8_t *, 4> &low, const uint8_t *overflow,
                     const std::array<int64_t, 4> &at, const float *const (&plain)[M],
                     F8 (&sums)[M][2]) {
  auto pair = [](const uint8_t *a, const uint8_t *b) {
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(a));
    const __m128 both = _mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64 *>(b));
    return _mm_castps_si128(both);
  };
  // fp16 words of 2^-8 their E4M3 value: `s mmm` gives bits 15 and 7 to 9, `eeee` 10 to 13.
  const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
      0, 0, 1, 1, 2, 2, 3, 3, -0x80, -0x80, -0x7f, -0x7f, -0x7e, -0x7e, -0x7d, -0x7d));
  const __m256i lower = _mm256_set1_epi16(-0x8000);
  const __m256i nibble = _mm256_set1_epi8(15), exponent = _mm256_set1_epi8(0x3c);
  const __m256i sm = _mm256_set_m128i(pair(low[2], low[3]), pair(low[0], low[1]));
  const __m256i e = load_bytes(overflow);
  for (int odd = 0; odd < 2; ++odd) {
    const __m256i index = _mm256_and_si256(odd ? _mm256_srli_epi16(sm, 4) : sm, nibble);
    const __m256i shifted = odd ? _mm256_srli_epi16(e, 2) : _mm256_slli_epi16(e, 2);
    const __m256i high =
        _mm256_or_si256(_mm256_shuffle_epi8(upper, index), _mm256_and_si256(shifted, exponent));
    const __m256i last = _mm256_shuffle_epi8(lower, index);
    const __m256i even_blocks = _mm256_unpacklo_epi8(last, high);
    const __m256i odd_blocks = _mm256_unpackhi_epi8(last, high);
    const __m256 v[4] = {_mm256_cvtph_ps(_mm256_castsi256_si128(even_blocks)),
                         _mm256_cvtph_ps(_mm256_castsi256_si128(odd_blocks)),
                         _mm256_cvtph_ps(_mm256_extracti128_si256(even_blocks, 1)),
                         _mm256_cvtph_ps(_mm256_extracti128_si256(odd_blocks, 1))};
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 4; ++i)
        sums[m][odd] = muladd8(v[i], load8(plain[m] + at[i] + 8 * odd), sums[m][odd]);
  }
}

#else

constexpr int kOffset = 0; // SDOT multiplies signed bytes

struct F8 {
  float32x4_t low, high;
};
struct I8 {
  int32x4_t low, high;
};
inline F8 load8(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline F8 broadcast8(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F8 multiply8(F8 a, F8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline F8 muladd8(F8 a, F8 b, F8 c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline F8 to_float(I8 v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
inline float sum8(F8 v) {
  float lanes[kBlock] = {};
  vst1q_f32(lanes, v.low);
  vst1q_f32(lanes + 4, v.high);
  return sum(load(lanes));
}

// As for AVX2.
inline F8 spread_low(F8 v) { return {vzip1q_f32(v.low, v.low), vzip1q_f32(v.high, v.high)}; }
inline F8 spread_high(F8 v) { return {vzip2q_f32(v.low, v.low), vzip2q_f32(v.high, v.high)}; }

// Two vectors of four numbers from eight fp16 words.
inline F8 from_fp16_words(uint16x8_t words) {
  const float16x8_t half = vreinterpretq_f16_u16(words);
  return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}

inline F8 decode_scales(const uint8_t *scale) {
  static constexpr uint8_t kOrder[8] = {0, 1, 4, 5, 2, 3, 6, 7};
  const uint8x8_t codes = vtbl1_u8(vld1_u8(scale), vld1_u8(kOrder));
  return from_fp16_words(vandq_u16(vshlq_n_u16(vmovl_u8(codes), 7), vdupq_n_u16(0x3f80)));
}

struct Weights {
  int8x16_t even[2], odd[2];
  explicit Weights(const uint8_t *low) {
    const int8x16_t table = vld1q_s8(kTwice<kOffset>.data());
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t bytes = vld1q_u8(low + 16 * i);
      even[i] = vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15)));
      odd[i] = vqtbl1q_s8(table, vshrq_n_u8(bytes, 4));
    }
  }

  template <int Digits> I8 dot(const Digit (&digit)[2], const int32_t (&)[8]) const {
    return {part<Digits>(digit, 0), part<Digits>(digit, 1)};
  }

private:
  template <int Digits> int32x4_t part(const Digit (&digit)[2], int i) const {
    int32x4_t sum = vdupq_n_s32(0);
    for (int d = Digits - 1; d >= 0; --d) {
      sum = vdotq_s32(vshlq_n_s32(sum, kDigitBits), even[i], vld1q_s8(digit[d][0] + 16 * i));
      sum = vdotq_s32(sum, odd[i], vld1q_s8(digit[d][1] + 16 * i));
    }
    return sum;
  }
};

template <int M>
inline void add_four(const std::array<const uint8_t *, 4> &low, const uint8_t *overflow,
                     const std::array<int64_t, 4> &at, const float *const (&plain)[M],
                     F8 (&sums)[M][2]) {
  static constexpr uint8_t kUpper[16] = {0,    0,    1,    1,    2,    2,    3,    3,
                                         0x80, 0x80, 0x81, 0x81, 0x82, 0x82, 0x83, 0x83};
  const uint8x16_t upper = vld1q_u8(kUpper);
  for (int i = 0; i < 4; ++i) {
    const uint8x8_t sm = vld1_u8(low[i]), e = vld1_u8(overflow + i * kHalf);
    for (int odd = 0; odd < 2; ++odd) {
      const uint8x8_t index = odd ? vshr_n_u8(sm, 4) : vand_u8(sm, vdup_n_u8(15));
      const uint8x8_t exponent = odd ? vshr_n_u8(e, 4) : vand_u8(e, vdup_n_u8(15));
      const uint8x8_t high = vorr_u8(vqtbl1_u8(upper, index), vshl_n_u8(exponent, 2));
      const uint16x8_t words = vorrq_u16(vshll_n_u8(high, 8), vmovl_u8(vshl_n_u8(index, 7)));
      const F8 values = from_fp16_words(words);
      for (int m = 0; m < M; ++m)
        sums[m][odd] = muladd8(values, load8(plain[m] + at[i] + 8 * odd), sums[m][odd]);
    }
  }
}

#endif

} // namespace
#endif
