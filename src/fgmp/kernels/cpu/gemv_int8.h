// Linear for few bf16 tokens on AVX2: FP4 blocks are multiplied in integers, without rounding.
//
// The 16 activations of a block, in units of t, are small integers times one number: FP4 codes times
// their scale, FP8 values times the power of two of their last bit. Twice an E2M1 value is an
// integer, too. vpmaddubsw multiplies bytes, one factor without sign: 12 is added to the weights,
// and 12 times the sum of the activations is subtracted afterwards. Larger integers are split in
// digits of 7 bits. The sum over a block, times its two scales, is exact in fp32, and is rounded only
// where it is added to the sums of other blocks. What two digits leave of tiny elements beside large
// ones is added in fp32.
//
//   FP4: 32 bytes hold 4 blocks, a chunk. Their low and high nibbles, the elements of even and odd
//        index, become bytes by a table. Tokens are reordered to match. Two of 8 lanes belong to a
//        block. An FP8 block's scale byte decodes to zero here.
//   FP8: a second pass visits the FP8 blocks alone, four at a time, in fp32.
//
// A row is read in panels of K whose tokens stay in the L1 cache. Every token has its own sums in
// their own order, so its result does not depend on its batch.
#pragma once
#include "gemv.h"

#if defined(__AVX2__) && !defined(__AVX512BF16__)
namespace {

constexpr int64_t kChunk = 64; // elements in one 32-byte load of the plane `low`
constexpr int64_t kChunkBlocks = 4;
constexpr int64_t kPairBlocks = 8;    // blocks of two chunks, whose scales are decoded together
constexpr int64_t kPanelPairs = 32;   // pairs of chunks times tokens that the L1 cache holds
constexpr int64_t kPanelRows = 64;
constexpr int64_t kFewTokensInt8 = 8; // with more tokens, products in fp32 are faster
constexpr int kDigitBits = 7;
constexpr int kOffset = 12; // added to twice a weight

// One digit of 64 elements, with their signs; even and odd elements are apart.
using Digit = int8_t[2][32];

// 64 elements of a token.
struct alignas(32) Chunk {
  Digit digit[2];
  int32_t excess[8]; // kOffset times the sum of each eight elements
};

// What two digits leave of an element.
struct Rest {
  int64_t column;
  float value;
};

// Scales of a pair of chunks in this order, unpacked with themselves, stand where the sums of their
// blocks do.
constexpr int kScaleAt[kPairBlocks] = {0, 1, 4, 5, 2, 3, 6, 7};

// One token, for both passes.
class Token {
public:
  // Elements of `row`, zero from `columns` to the end of the last of `pairs` pairs of chunks.
  Token(const uint16_t *row, int64_t columns, int64_t pairs)
      : chunks(2 * pairs), scales(pairs * kPairBlocks), plain(pairs * kPairBlocks * kBlock) {
    for (int64_t g = 0; exact && g < pairs * kPairBlocks; ++g) {
      uint16_t block[kBlock] = {};
      const int64_t left = std::min(columns - g * kBlock, kBlock);
      if (left > 0)
        std::memcpy(block, row + g * kBlock, left * sizeof *block);
      exact = put(g, load_bf16(block));
    }
    exact = exact && static_cast<int64_t>(rests.size()) <= std::max(columns / 64, kBlock);
  }

  bool exact = true; // whether two digits and a few rests represent the token
  int digits = 1;
  std::vector<Rest> rests; // by ascending column
  std::vector<Chunk> chunks;
  std::vector<float> scales; // per block, see kScaleAt
  std::vector<float> plain;  // fp32; within a block, even elements come first

private:
  bool put(int64_t g, F16 values) {
    F16 magnitude = and_bits(values, broadcast(float_of(0x7fffffff)));
    if (!finite(magnitude))
      return false;
    const float most = largest(magnitude);
    if (most == 0)
      return true;
    if (most < 0x1p-60f || most > 0x1p60f) // then powers of two below stay normal
      return false;
    split(values, plain.data() + g * kBlock);
    // A digit and one bit more, for a common factor may still be divided out.
    Integers integers;
    float step = to_integers(magnitude, kDigitBits + 1, integers);
    const int32_t factor = step > 0 ? divide_out(integers) : 1;
    if (factor > 1)
      return write(g, values, integers, 1, step * static_cast<float>(factor));
    // FP8 values are multiples of 6.
    const F16 third = divide(magnitude, broadcast(3));
    const bool thrice = equal(multiply(third, broadcast(3)), magnitude);
    if (thrice)
      magnitude = third;
    for (int count : {2, 3}) {
      step = to_integers(magnitude, count * kDigitBits, integers);
      if (step > 0)
        return write(g, values, integers, count, thrice ? 3 * step : step);
    }
    return false;
  }

  struct Integers {
    __m256i low, high; // eight elements each
  };

  static bool equal(F16 a, F16 b) {
    const __m256 low = _mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ);
    return _mm256_movemask_ps(_mm256_and_ps(low, _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))) == 0xff;
  }

  // Finds integers below 2^bits and a power of two whose products they are, and returns the latter;
  // 0 if there are none.
  static float to_integers(F16 magnitude, int bits, Integers &out) {
    const uint32_t exponent = bits_of(largest(magnitude)) >> 23;
    const uint32_t power = 254 - exponent + static_cast<uint32_t>(bits) - 1;
    const F16 scaled = multiply(magnitude, broadcast(float_of(power << 23)));
    out = {_mm256_cvttps_epi32(scaled.low), _mm256_cvttps_epi32(scaled.high)};
    const bool exact = equal(scaled, {_mm256_cvtepi32_ps(out.low), _mm256_cvtepi32_ps(out.high)});
    return exact ? float_of((254 - power) << 23) : 0;
  }

  // Divides 16 integers below 256 by a common factor above 1, and returns it, or 1. FP4 codes times
  // a scale have a factor of the scale, which is 2 or an odd number below 16. An odd p divides n if
  // and only if n times the inverse of p modulo 2^16 is at most 65535 / p; it is the quotient then.
  static int32_t divide_out(Integers &integers) {
    const __m256i words = _mm256_packus_epi32(integers.low, integers.high);
    __m256i quotient = _mm256_srli_epi16(words, 1);
    int32_t factor = 2;
    if (_mm256_movemask_epi8(_mm256_slli_epi16(words, 15))) {
      factor = 1;
      for (const int32_t prime : {3, 5, 7, 11, 13}) {
        int32_t inverse = prime; // right to 3 bits, then 6, 12, 24
        for (int i = 0; i < 3; ++i)
          inverse *= 2 - prime * inverse;
        quotient = _mm256_mullo_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(inverse)));
        const __m256i most = _mm256_set1_epi16(static_cast<int16_t>(65535 / prime));
        const __m256i divides = _mm256_cmpeq_epi16(_mm256_min_epu16(quotient, most), quotient);
        if (_mm256_movemask_epi8(divides) == -1) {
          factor = prime;
          break;
        }
      }
    }
    if (factor > 1) {
      integers.low = _mm256_unpacklo_epi16(quotient, _mm256_setzero_si256());
      integers.high = _mm256_unpackhi_epi16(quotient, _mm256_setzero_si256());
    }
    return factor;
  }

  // Stores the digits of a block and its scale, for which each integer counts.
  bool write(int64_t g, F16 values, Integers magnitude, int count, float scale) {
    const int64_t index = g / kChunkBlocks, b = g % kChunkBlocks;
    const Integers signs{_mm256_or_si256(_mm256_castps_si256(values.low), _mm256_set1_epi32(1)),
                         _mm256_or_si256(_mm256_castps_si256(values.high), _mm256_set1_epi32(1))};
    auto bits = [&](int from, int width) {
      const __m256i mask = _mm256_set1_epi32((1 << width) - 1);
      auto half = [&](__m256i v, __m256i sign) {
        return _mm256_sign_epi32(_mm256_and_si256(_mm256_srli_epi32(v, from), mask), sign);
      };
      return Integers{half(magnitude.low, signs.low), half(magnitude.high, signs.high)};
    };
    Chunk &chunk = chunks[index];
    const int used = std::min(count, 2), below = kDigitBits * (count - used);
    if (below) {
      const Integers rest = bits(0, below);
      alignas(32) int32_t lanes[kBlock];
      _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), rest.low);
      _mm256_store_si256(reinterpret_cast<__m256i *>(lanes + 8), rest.high);
      for (int i = 0; i < kBlock; ++i)
        if (lanes[i])
          rests.push_back({g * kBlock + i, static_cast<float>(lanes[i]) * scale});
      scale *= 1 << kDigitBits;
    }
    for (int d = 0; d < used; ++d)
      write_digit(chunk.digit[d], b, bits(below + kDigitBits * d, kDigitBits));
    write_excess(chunk.excess, b, bits(below, 2 * kDigitBits));
    digits = std::max(digits, used);
    // Half of twice a weight; 2^8 for the weight's scale, see add_pair.
    scales[g / kPairBlocks * kPairBlocks + kScaleAt[g % kPairBlocks]] = 128 * scale;
    return true;
  }

  static void write_digit(Digit &out, int64_t b, Integers digit) {
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(digit.low, digit.high), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i apart = _mm_shuffle_epi8(
        bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out[0] + b * kHalf), apart);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out[1] + b * kHalf), _mm_unpackhi_epi64(apart, apart));
  }

  static void write_excess(int32_t (&out)[8], int64_t b, Integers v) {
    auto total = [](__m256i eight) {
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
      sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
      return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    };
    out[2 * b] = kOffset * total(v.low);
    out[2 * b + 1] = kOffset * total(v.high);
  }

  // Stores elements of even index, then those of odd index.
  static void split(F16 values, float *out) {
    const __m256 even = _mm256_shuffle_ps(values.low, values.high, 0x88);
    const __m256 odd = _mm256_shuffle_ps(values.low, values.high, 0xdd);
    auto ordered = [](__m256 v) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
    };
    _mm256_storeu_ps(out, ordered(even));
    _mm256_storeu_ps(out + 8, ordered(odd));
  }
};

inline __m256i load_bytes(const void *p) {
  return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}

template <int M> struct Sums {
  __m256 fp4[M];
  __m256 fp8[M][2]; // 2^-8 / 6 times its value; even and odd elements
  int64_t next;     // index of the row's next FP8 block

  void clear(int64_t first) {
    for (int m = 0; m < M; ++m)
      fp4[m] = fp8[m][0] = fp8[m][1] = _mm256_setzero_ps();
    next = first;
  }

  float total(int m) const {
    const __m256 scale = _mm256_set1_ps(256 * kFp8Factor);
    return sum(F16{_mm256_fmadd_ps(fp8[m][0], scale, fp4[m]), _mm256_mul_ps(fp8[m][1], scale)});
  }
};

// M tokens that are multiplied together; `row` are their rows of the output.
template <int M> struct Tokens {
  const Chunk *chunks[M];
  const float *scales[M], *plain[M];
  const std::vector<Rest> *rests[M];
  int64_t row[M];
};

// Decodes 32 bytes of nibbles to twice their values plus kOffset, for even and for odd elements.
struct Weights {
  __m256i even, odd;
  explicit Weights(const uint8_t *low) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i bytes = load_bytes(low), nibble = _mm256_set1_epi8(15);
    even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
    odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
  }

  // Sums of products with one digit of a token, over eight elements each and times `weight`.
  __m256i dot(const Digit &digit, int16_t weight) const {
    const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_bytes(digit[0])),
                                           _mm256_maddubs_epi16(odd, load_bytes(digit[1])));
    return _mm256_madd_epi16(fours, _mm256_set1_epi16(weight));
  }
};

// Adds the FP4 blocks of two chunks, `Digits` of each token; `low` and `scale` point to the first of
// eight blocks.
template <int M, int Digits>
inline void add_pair(const uint8_t *low, const uint8_t *scale, int64_t pair, const Tokens<M> &x,
                     __m256 (&sums)[M]) {
  // Scales as fp16 words of 2^-8 their value, in the order of Token::scales.
  const __m128i order = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7, -1);
  const __m128i codes =
      _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(scale)), order);
  const __m256 s = _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(0x3f80)));
  for (int half = 0; half < 2; ++half) {
    const Weights weights(low + half * 32);
    for (int m = 0; m < M; ++m) {
      const Chunk &chunk = x.chunks[m][2 * pair + half];
      __m256i dot = weights.dot(chunk.digit[0], 1);
      if (Digits > 1)
        dot = _mm256_add_epi32(dot, weights.dot(chunk.digit[1], 1 << kDigitBits));
      dot = _mm256_sub_epi32(dot, load_bytes(chunk.excess));
      const __m256 both = _mm256_mul_ps(s, _mm256_loadu_ps(x.scales[m] + pair * kPairBlocks));
      const __m256 factor = half ? _mm256_unpackhi_ps(both, both) : _mm256_unpacklo_ps(both, both);
      sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, sums[m]);
    }
  }
}

// Adds the FP4 blocks of pairs [begin, end) of one row; `low` and `scale` point to the row.
template <int M, int Digits>
inline void add_fp4(const uint8_t *low, const uint8_t *scale, int64_t blocks, int64_t begin,
                    int64_t end, const Tokens<M> &x, Sums<M> &sums) {
  __m256 sum[M]; // in registers
  for (int m = 0; m < M; ++m)
    sum[m] = sums.fp4[m];
  const int64_t whole = std::min(end, blocks / kPairBlocks);
  for (int64_t pair = begin; pair < whole; ++pair) {
    const int64_t g = pair * kPairBlocks;
    _mm_prefetch(reinterpret_cast<const char *>(low + (g + 2 * blocks) * kHalf), _MM_HINT_T1);
    add_pair<M, Digits>(low + g * kHalf, scale + g, pair, x, sum);
  }
  if (whole < end) {
    const int64_t g = whole * kPairBlocks;
    uint8_t last[kPairBlocks * kHalf] = {}, last_scale[kPairBlocks] = {};
    std::memcpy(last, low + g * kHalf, (blocks - g) * kHalf);
    std::memcpy(last_scale, scale + g, blocks - g);
    add_pair<M, Digits>(last, last_scale, whole, x, sum);
  }
  for (int m = 0; m < M; ++m)
    sums.fp4[m] = sum[m];
}

// Product of what two digits leave of a token with the FP4 blocks of a row.
inline float product_of_rests(const uint8_t *low, const uint8_t *scale,
                              const std::vector<Rest> &rests) {
  float sum = 0;
  for (const auto &[column, value] : rests)
    sum += kE2M1[low[column / 2] >> (column % 2 * 4) & 15] * decode_e4m3(scale[column / kBlock]) * value;
  return sum;
}

// Adds four FP8 blocks: `low` points to each, `overflow` to the first, `at` are their first columns.
template <int M>
inline void add_four(const std::array<const uint8_t *, 4> &low, const uint8_t *overflow,
                     const std::array<int64_t, 4> &at, const Tokens<M> &x, Sums<M> &sums) {
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
        sums.fp8[m][odd] = _mm256_fmadd_ps(
            v[i], _mm256_loadu_ps(x.plain[m] + at[i] + 8 * odd), sums.fp8[m][odd]);
  }
}

// Adds the FP8 blocks at `first` + `positions` of a row.
template <int M>
inline void add_fp8(const uint8_t *low, const uint8_t *overflow, const Positions &positions,
                    int64_t count, int64_t first, const Tokens<M> &x, Sums<M> &sums) {
  std::array<const uint8_t *, 4> four;
  std::array<int64_t, 4> at;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int j = 0; j < 4; ++j) {
      const int64_t g = first + positions.at[i + j];
      four[j] = low + g * kHalf;
      at[j] = g * kBlock;
    }
    add_four<M>(four, overflow + i * kHalf, at, x, sums);
  }
  if (i < count) { // codes of zero fill up
    static constexpr uint8_t kZeros[kHalf] = {};
    uint8_t last[4 * kHalf] = {};
    std::memcpy(last, overflow + i * kHalf, (count - i) * kHalf);
    for (int j = 0; j < 4; ++j) {
      const int64_t g = i + j < count ? first + positions.at[i + j] : 0;
      four[j] = i + j < count ? low + g * kHalf : kZeros;
      at[j] = g * kBlock;
    }
    add_four<M>(four, last, at, x, sums);
  }
}

// Multiplies M tokens by at most kPanelRows rows.
template <int M, int Digits>
void gemv_int8_rows(const Weight &w, const Tokens<M> &x, Share rows, const Epilogue &out,
                    Fault &fault) {
  const int64_t blocks = w.blocks(), pairs = (blocks + kPairBlocks - 1) / kPairBlocks;
  const int64_t panel = std::max(kPanelPairs / M, int64_t{8});
  Positions positions;
  Sums<M> sums[kPanelRows];
  for (int64_t n = rows.begin; n < rows.end; ++n)
    sums[n - rows.begin].clear(w.row_ptr ? w.row_ptr[n] : 0);
  for (int64_t begin = 0; begin < pairs; begin += panel) {
    const int64_t end = std::min(begin + panel, pairs);
    const int64_t first = begin * kPairBlocks, count = std::min(end * kPairBlocks, blocks) - first;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const uint8_t *low = w.low + n * blocks * kHalf, *scale = w.scale + n * blocks;
      Sums<M> sum = sums[n - rows.begin];
      add_fp4<M, Digits>(low, scale, blocks, begin, end, x, sum);
      if (w.row_ptr) {
        const int64_t found = flagged(scale + first, count, positions);
        if (sum.next < 0 || sum.next + found > w.n_fp8)
          fault.report(n);
        else
          add_fp8<M>(low, w.overflow + sum.next * kHalf, positions, found, first, x, sum);
        sum.next += found;
      }
      sums[n - rows.begin] = sum;
    }
  }
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    const Sums<M> &sum = sums[n - rows.begin];
    const uint8_t *low = w.low + n * blocks * kHalf, *scale = w.scale + n * blocks;
    if (w.row_ptr && sum.next != w.row_ptr[n + 1])
      fault.report(n);
    for (int m = 0; m < M; ++m)
      out.put(x.row[m], n, sum.total(m) + product_of_rests(low, scale, *x.rests[m]));
  }
}

// Multiplies the M tokens that start at `first`.
template <int M>
void gemv_int8_tokens(const Weight &w, const std::vector<Token> &tokens,
                      const std::vector<int64_t> &row, size_t first, Share rows,
                      const Epilogue &out, Fault &fault) {
  Tokens<M> x;
  int digits = 1; // a digit of zeros changes no sum
  for (int m = 0; m < M; ++m) {
    const Token &token = tokens[first + m];
    x.chunks[m] = token.chunks.data();
    x.scales[m] = token.scales.data();
    x.plain[m] = token.plain.data();
    x.rests[m] = &token.rests;
    x.row[m] = row[first + m];
    digits = std::max(digits, token.digits);
  }
  (digits == 1 ? gemv_int8_rows<M, 1> : gemv_int8_rows<M, 2>)(w, x, rows, out, fault);
}

// A token that integers do not represent, such as one with a NaN, goes to gemv.
inline int64_t gemv_int8(const Weight &w, const Matrix &x, const Epilogue &out, const Team &team) {
  const int64_t pairs = (w.blocks() + kPairBlocks - 1) / kPairBlocks;
  std::vector<Token> tokens;
  std::vector<int64_t> row;
  int64_t corrupt = -1;
  for (int64_t m = 0; m < x.rows; ++m) {
    auto *elements = static_cast<uint16_t *>(x.data) + m * x.columns;
    Token token(elements, x.columns, pairs);
    if (token.exact) {
      tokens.push_back(std::move(token));
      row.push_back(m);
    } else {
      corrupt = gemv(w, {elements, 1, x.columns, 1}, out.from(m), team);
    }
  }
  Fault fault;
  team.run([&](int member, int size) {
    const Share part = share(w.n, kRowGrain, member, size);
    for (int64_t top = part.begin; top < part.end; top += kPanelRows) {
      const Share rows{top, std::min(top + kPanelRows, part.end)};
      size_t m = 0;
      for (; m + 2 <= tokens.size(); m += 2)
        gemv_int8_tokens<2>(w, tokens, row, m, rows, out, fault);
      if (m < tokens.size())
        gemv_int8_tokens<1>(w, tokens, row, m, rows, out, fault);
    }
  });
  return tokens.empty() ? corrupt : fault.row();
}

} // namespace
#endif
