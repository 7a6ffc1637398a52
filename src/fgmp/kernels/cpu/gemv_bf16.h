// Linear for few bf16 tokens on AVX-512: vdpbf16ps multiplies, and reading the weight is the limit.
//
// A row is read in three passes over one panel of K, whose tokens stay in the L1 cache. One pass
// finds the FP8 blocks, by the sign bits of the scale bytes. One multiplies all blocks as FP4,
// without a branch: an FP8 block's scale decodes to zero. One multiplies the FP8 blocks.
//
//   FP4: 64 bytes hold 8 blocks. They are 32 words of four nibbles. Shifted by 0, 4, 8 and 12 bits,
//        the words index a table of bf16 numbers. vdpbf16ps adds four times 32 products onto 16
//        lanes, two lanes per block, which are then multiplied by the block's scale. The tokens are
//        reordered to match: nibble c of word i is multiplied by element 4 i + c.
//   FP8: the 16 elements of a block become bf16 words, mantissas by table and exponents by a shift.
//        vdpbf16ps adds their products in pairs. Subnormal elements have a table of their own.
//
// Scales as fp16 words, and FP8 values as bf16 words, are 2^-8 times their value; the last step
// multiplies by 2^8.
#pragma once
#include "gemv.h"

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kChunk = 128;         // elements in one 64-byte load of the plane `low`
constexpr int64_t kChunkBlocks = 8;     // blocks in such a load
constexpr int64_t kPanelNumbers = 4096; // tokens times elements that the L1 cache holds
constexpr int64_t kPanelLeast = 2048;   // smallest number of elements for which panels save time
constexpr int64_t kPanelRows = 64;
constexpr int64_t kFewTokensBf16 = 12; // with more tokens, gemm.h is faster: it decodes once for all
static_assert(kPanelNumbers / kBlock <= kSegment, "positions of a panel are listed at once");

// Some tokens in the orders of the two passes: reordered ("dealt") for FP4, plain for FP8.
struct Few {
  const uint16_t *dealt, *plain;
  int64_t kp;

  const uint16_t *fp4(int64_t m, int64_t chunk) const { return dealt + m * kp + chunk * kChunk; }
  const uint16_t *fp8(int64_t m, int64_t block) const { return plain + m * kp + block * kBlock; }
};

// All tokens in both orders, zero beyond k.
class Tokens {
public:
  Tokens(const Matrix &x, int64_t blocks)
      : kp((blocks + kChunkBlocks - 1) / kChunkBlocks * kChunk), dealt(x.rows * kp),
        plain(x.rows * kp) {
    const auto *source = static_cast<const uint16_t *>(x.data);
    for (int64_t m = 0; m < x.rows; ++m)
      for (int64_t at = 0; at < kp; at += kChunk)
        deal(source + m * x.columns + at, x.columns - at, m * kp + at);
  }

  Few from(int64_t m) const { return {dealt.data() + m * kp, plain.data() + m * kp, kp}; }

private:
  // Moves word 4 i + c of a chunk to position i of its part c.
  void deal(const uint16_t *source, int64_t left, int64_t at) {
    __m512i words[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t here = std::min(std::max(left - 32 * i, int64_t{0}), int64_t{32});
      const auto mask = static_cast<__mmask32>((int64_t{1} << here) - 1);
      words[i] = _mm512_maskz_loadu_epi16(mask, source + 32 * i);
      _mm512_storeu_si512(plain.data() + at + 32 * i, words[i]);
    }
    const __m512i fours = _mm512_set_epi16(124, 120, 116, 112, 108, 104, 100, 96, 92, 88, 84, 80, 76,
                                           72, 68, 64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16,
                                           12, 8, 4, 0); // vpermt2w uses the low six bits
    for (int16_t c = 0; c < 4; ++c) {
      const __m512i from = _mm512_add_epi16(fours, _mm512_set1_epi16(c));
      const __m512i low = _mm512_permutex2var_epi16(words[0], from, words[1]);
      const __m512i high = _mm512_permutex2var_epi16(words[2], from, words[3]);
      const __m512i both = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
      _mm512_storeu_si512(dealt.data() + at + 32 * c, both);
    }
  }

  int64_t kp;
  std::vector<uint16_t> dealt, plain;
};

inline __m512i bf16_table() {
  alignas(64) uint16_t table[32]; // the values twice, since vpermw uses five bits of an index
  for (int i = 0; i < 32; ++i)
    table[i] = to_bf16(kE2M1[i & 15]);
  return _mm512_load_si512(table);
}

template <int M> struct Accumulator {
  __m512 fp4[M];
  __m256 even[M], odd[M];
  int64_t next; // index of the row's next FP8 block

  void clear(int64_t first) {
    for (int m = 0; m < M; ++m) {
      fp4[m] = _mm512_setzero_ps();
      even[m] = odd[m] = _mm256_setzero_ps();
    }
    next = first;
  }

  float total(int m) const {
    const __m512 fp8 = _mm512_zextps256_ps512(_mm256_add_ps(even[m], odd[m]));
    return sum(_mm512_add_ps(fp4[m], fp8));
  }
};

// Adds one chunk; `here` masks the blocks that exist.
template <int M>
inline void add_fp4_chunk(const uint8_t *low, const uint8_t *scale, __mmask8 here, int64_t chunk,
                          const Few &x, __m512i table, Accumulator<M> &sum) {
  const __m512i first = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i words = _mm512_maskz_loadu_epi64(here, low);
  const __m128i bytes = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(here, scale));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16(0x3f80));
  const __m512 s = _mm512_permutexvar_ps(first, _mm512_castps256_ps512(_mm256_cvtph_ps(half)));
  const auto w0 = (__m512bh)_mm512_permutexvar_epi16(words, table);
  const auto w1 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
  const auto w2 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
  const auto w3 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
  for (int m = 0; m < M; ++m) {
    const uint16_t *a = x.fp4(m, chunk);
    __m512 p = _mm512_dpbf16_ps(_mm512_setzero_ps(), w0, (__m512bh)_mm512_loadu_si512(a));
    p = _mm512_dpbf16_ps(p, w1, (__m512bh)_mm512_loadu_si512(a + 32));
    p = _mm512_dpbf16_ps(p, w2, (__m512bh)_mm512_loadu_si512(a + 64));
    p = _mm512_dpbf16_ps(p, w3, (__m512bh)_mm512_loadu_si512(a + 96));
    sum.fp4[m] = _mm512_fmadd_ps(p, s, sum.fp4[m]);
  }
}

// Adds chunks [begin, end) of one row; `low` and `scale` point to the row.
template <int M>
inline void add_fp4(const uint8_t *low, const uint8_t *scale, int64_t blocks, int64_t begin,
                    int64_t end, int64_t ahead, const Few &x, __m512i table, Accumulator<M> &sum) {
  const int64_t whole = std::min(end, blocks / kChunkBlocks);
  for (int64_t chunk = begin; chunk < whole; ++chunk) {
    const int64_t g = chunk * kChunkBlocks;
    // To the L2 cache: L1 has too few outstanding misses to use the memory's bandwidth.
    _mm_prefetch(low + g * kHalf + ahead, _MM_HINT_T1);
    add_fp4_chunk<M>(low + g * kHalf, scale + g, 0xff, chunk, x, table, sum);
  }
  if (whole < end) {
    const int64_t g = whole * kChunkBlocks;
    const auto here = static_cast<__mmask8>((1 << (blocks - g)) - 1);
    add_fp4_chunk<M>(low + g * kHalf, scale + g, here, whole, x, table, sum);
  }
}

// Control bytes of vpmultishiftqb that move nibble j to bits 7 to 10 of word j.
constexpr auto kExponentAt = [] {
  std::array<int64_t, 4> control{};
  for (int j = 0; j < 16; ++j) {
    const int64_t byte0 = (4 * j - 7) & 63, byte1 = (4 * j + 1) & 63;
    control[j / 4] |= (byte0 | byte1 << 8) << (j % 4 * 16);
  }
  return control;
}();

// Table of 2^-8 * 6 * (1 + m / 8) * 2^-7 for exponent 0, or of 2^-8 * 6 * (m / 8) * 2^-6 if
// subnormal.
inline __m512i mantissa_table(bool subnormal) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const float m = static_cast<float>(i & 7) / 8;
    const float value = 0x1p-8f * kFp8Factor * (subnormal ? m * 0x1p-6f : (1 + m) * 0x1p-7f);
    table[i] = to_bf16(i & 8 ? -value : value);
  }
  return _mm512_load_si512(table);
}

// The elements of an FP8 block as bf16 words of 2^-8 * 6 times their E4M3 value. For normal numbers
// the exponent is added to an entry of a table of mantissas; subnormal ones have a table of their
// own.
inline __m256bh bf16_words(const uint8_t *low, const uint8_t *overflow, __m512i normal,
                           __m512i subnormal) {
  const __m256i low_at = _mm256_set_epi64x(0x3c3c383834343030, 0x2c2c282824242020,
                                           0x1c1c181814141010, 0x0c0c080804040000);
  // The exponent goes to bits 7 to 10 of a word: byte 0 is taken seven bits below the nibble, byte
  // 1 one bit above its start.
  const __m256i high_at = _mm256_set_epi64x(kExponentAt[3], kExponentAt[2], kExponentAt[1],
                                            kExponentAt[0]);
  int64_t a, b;
  std::memcpy(&a, low, sizeof a);
  std::memcpy(&b, overflow, sizeof b);
  const __m256i sm = _mm256_multishift_epi64_epi8(low_at, _mm256_set1_epi64x(a));
  const __m256i e = _mm256_and_si256(_mm256_multishift_epi64_epi8(high_at, _mm256_set1_epi64x(b)),
                                     _mm256_set1_epi16(0x0780));
  const __mmask16 zero = _mm256_testn_epi16_mask(e, e);
  const __m256i v = _mm256_add_epi16(_mm256_permutexvar_epi16(sm, _mm512_castsi512_si256(normal)), e);
  return (__m256bh)_mm256_mask_permutexvar_epi16(v, zero, sm, _mm512_castsi512_si256(subnormal));
}

template <int M>
inline void add_fp8_block(const uint8_t *low, const uint8_t *overflow, int64_t g, const Few &x,
                          __m512i normal, __m512i subnormal, __m256 (&sum)[M]) {
  const __m256bh v = bf16_words(low + g * kHalf, overflow, normal, subnormal);
  for (int m = 0; m < M; ++m)
    sum[m] = _mm256_dpbf16_ps(
        sum[m], v, (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x.fp8(m, g))));
}

// Adds the FP8 blocks at `offset` + `positions`, alternately to two chains of additions.
template <int M>
inline void add_fp8(const uint8_t *low, const uint8_t *overflow, const uint16_t *positions,
                    int64_t count, int64_t offset, const Few &x, __m512i normal,
                    __m512i subnormal, Accumulator<M> &sum) {
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    add_fp8_block<M>(low, overflow + i * kHalf, offset + positions[i], x, normal, subnormal, sum.even);
    add_fp8_block<M>(low, overflow + (i + 1) * kHalf, offset + positions[i + 1], x, normal, subnormal,
                     sum.odd);
  }
  if (i < count)
    add_fp8_block<M>(low, overflow + i * kHalf, offset + positions[i], x, normal, subnormal, sum.even);
}

// Multiplies M tokens by at most kPanelRows rows.
template <int M>
void gemv_bf16_rows(const Weight &w, const Few &x, Share rows, const Epilogue &out, Fault &fault) {
  const int64_t blocks = w.blocks(), chunks = (blocks + kChunkBlocks - 1) / kChunkBlocks;
  const int64_t panel = std::max(kPanelNumbers / M, kPanelLeast) / kChunk;
  const __m512i table = bf16_table();
  const __m512i normal = mantissa_table(false), subnormal = mantissa_table(true);
  Positions positions;
  alignas(64) Accumulator<M> sums[kPanelRows];
  for (int64_t n = rows.begin; n < rows.end; ++n)
    sums[n - rows.begin].clear(w.row_ptr ? w.row_ptr[n] : 0);
  for (int64_t begin = 0; begin < chunks; begin += panel) {
    const int64_t end = std::min(begin + panel, chunks);
    const int64_t g = begin * kChunkBlocks, count = std::min(end * kChunkBlocks, blocks) - g;
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const uint8_t *low = w.low + n * blocks * kHalf, *scale = w.scale + n * blocks;
      Accumulator<M> sum = sums[n - rows.begin];
      for (int64_t b = 0; b < count; b += kLine)
        _mm_prefetch(scale + blocks + g + b, _MM_HINT_T0);
      add_fp4<M>(low, scale, blocks, begin, end, 2 * blocks * kHalf, x, table, sum);
      if (w.row_ptr) {
        const int64_t found = flagged(scale + g, count, positions);
        if (sum.next < 0 || sum.next + found > w.n_fp8) {
          fault.report(n);
        } else {
          for (int64_t b = 0; b < found * kHalf; b += kLine)
            _mm_prefetch(w.overflow + (sum.next + found) * kHalf + b, _MM_HINT_T0);
          add_fp8<M>(low, w.overflow + sum.next * kHalf, positions.at, found, g, x, normal, subnormal,
                     sum);
        }
        sum.next += found;
      }
      sums[n - rows.begin] = sum;
    }
  }
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    const Accumulator<M> &sum = sums[n - rows.begin];
    if (w.row_ptr && sum.next != w.row_ptr[n + 1])
      fault.report(n);
    for (int m = 0; m < M; ++m)
      out.put(m, n, 256 * sum.total(m));
  }
}

// Multiplies rows in tiles that fit in the L2 cache, by four tokens at a time: the sums of more
// tokens would not fit in registers.
inline int64_t gemv_bf16(const Weight &w, const Matrix &x, const Epilogue &out, const Team &team) {
  using Rows = void (*)(const Weight &, const Few &, Share, const Epilogue &, Fault &);
  constexpr int64_t kTogether = 4;
  static constexpr Rows kRows[kTogether] = {gemv_bf16_rows<1>, gemv_bf16_rows<2>, gemv_bf16_rows<3>,
                                            gemv_bf16_rows<4>};
  const Tokens tokens(x, w.blocks());
  Fault fault;
  team.run([&](int member, int size) {
    const Share part = share(w.n, kRowGrain, member, size);
    for (int64_t top = part.begin; top < part.end; top += kPanelRows) {
      const Share rows{top, std::min(top + kPanelRows, part.end)};
      for (int64_t m = 0; m < x.rows; m += kTogether)
        kRows[std::min(kTogether, x.rows - m) - 1](w, tokens.from(m), rows, out.from(m), fault);
    }
  });
  return fault.row();
}

} // namespace
#endif
