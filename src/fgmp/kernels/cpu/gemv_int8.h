// Linear for few bf16 tokens on AVX2 and on ARM with dot products: FP4 blocks are multiplied in
// integers, without rounding.
//
// The 16 activations of a block, in units of t, are small integers times one number: FP4 codes times
// their scale, FP8 values times the power of two of their last bit. Twice an E2M1 value is an
// integer, too. Instructions multiply bytes; larger integers are split in digits of 7 bits. The sum
// over a block, times its two scales, is exact in fp32, and is rounded only where it is added to the
// sums of other blocks. What two digits leave of tiny elements beside large ones is added in fp32.
//
//   FP4: 32 bytes hold 4 blocks, a chunk. Their low and high nibbles, the elements of even and odd
//        index, become bytes by a table. Tokens are reordered to match. Two of 8 lanes belong to a
//        block. An FP8 block's scale byte decodes to zero here.
//   FP8: a second pass visits the FP8 blocks alone, four at a time, in fp32.
//
// A row is read in panels of K whose tokens stay in the L1 cache. Every token has its own sums in
// their own order, so its result does not depend on its batch. int8.h has the instructions.
#pragma once
#include "gemv.h"
#include "int8.h"
#include <cmath>

#if defined(FGMP_INT8)
namespace {

constexpr int64_t kPanelPairs = 32;   // pairs of chunks times tokens that the L1 cache holds
constexpr int64_t kPanelRows = 64;
constexpr int64_t kFewTokensInt8 = 8; // with more tokens, products in fp32 are faster
constexpr int kScaleAt[kPairBlocks] = {0, 1, 4, 5, 2, 3, 6, 7}; // see spread_low

// 64 elements of a token.
struct alignas(32) Chunk {
  Digit digit[2];
  int32_t start[8]; // -kOffset times the sum of each eight elements
};

// What two digits leave of an element.
struct Rest {
  int64_t column;
  float value;
};

// One token, for both passes.
class Token {
public:
  // Elements of `row`, zero from `columns` to the end of the last of `pairs` pairs of chunks.
  Token(const uint16_t *row, int64_t columns, int64_t pairs)
      : chunks(2 * pairs), scales(pairs * kPairBlocks), plain(pairs * kPairBlocks * kBlock) {
    for (int64_t g = 0; exact && g < pairs * kPairBlocks; ++g) {
      const int64_t left = std::min(columns - g * kBlock, kBlock);
      if (left <= 0)
        break;
      float block[kBlock] = {};
      for (int64_t i = 0; i < left; ++i)
        block[i] = from_bf16(row[g * kBlock + i]);
      exact = put(g, block);
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
  bool put(int64_t g, const float *block) {
    float magnitude[kBlock], most = 0;
    bool bounded = true;
    for (int i = 0; i < kBlock; ++i) {
      magnitude[i] = std::fabs(block[i]);
      plain[g * kBlock + i % 2 * 8 + i / 2] = block[i];
      bounded &= magnitude[i] <= 0x1p60f; // so is no NaN
      most = magnitude[i] > most ? magnitude[i] : most;
    }
    if (!bounded || (most < 0x1p-60f && most != 0)) // powers of two stay normal
      return false;
    // A digit and one bit more, for a common factor may still be divided out.
    int32_t integers[kBlock];
    float step = to_integers(magnitude, most, kDigitBits + 1, integers);
    const int32_t factor = step > 0 ? divide_out(integers) : 1;
    if (factor > 1)
      return write(g, block, integers, 1, step * static_cast<float>(factor));
    // FP8 values are multiples of 6.
    float third[kBlock];
    bool thrice = true;
    for (int i = 0; i < kBlock; ++i) {
      third[i] = magnitude[i] / 3;
      thrice &= third[i] * 3 == magnitude[i];
    }
    for (int count : {2, 3}) {
      step = to_integers(thrice ? third : magnitude, thrice ? most / 3 : most, count * kDigitBits,
                         integers);
      if (step > 0)
        return write(g, block, integers, count, thrice ? 3 * step : step);
    }
    return false;
  }

  // Finds integers below 2^bits and a power of two whose products they are, and returns the latter;
  // 0 if there are none.
  static float to_integers(const float *magnitude, float most, int bits, int32_t *out) {
    const uint32_t exponent = most == 0 ? 127 : bits_of(most) >> 23;
    const uint32_t power = 254 - exponent + static_cast<uint32_t>(bits) - 1;
    const float factor = float_of(power << 23);
    bool exact = true;
    for (int i = 0; i < kBlock; ++i) {
      const float scaled = magnitude[i] * factor;
      out[i] = static_cast<int32_t>(scaled);
      exact &= static_cast<float>(out[i]) == scaled;
    }
    return exact ? float_of((254 - power) << 23) : 0;
  }

  // Divides 16 integers below 256 by a common factor above 1, and returns it, or 1. FP4 codes times
  // a scale have a factor of the scale, which is 2 or an odd number below 16. An odd p divides n if
  // and only if n times the inverse of p modulo 2^16 is at most 65535 / p; it is the quotient then.
  static int32_t divide_out(int32_t *integers) {
    int32_t any = 0;
    for (int i = 0; i < kBlock; ++i)
      any |= integers[i];
    if (!(any & 1)) {
      for (int i = 0; i < kBlock; ++i)
        integers[i] >>= 1;
      return 2;
    }
    for (const uint32_t prime : {3u, 5u, 7u, 11u, 13u}) {
      uint32_t inverse = prime; // right to 3 bits, then 6, 12, 24
      for (int i = 0; i < 3; ++i)
        inverse *= 2 - prime * inverse;
      uint16_t quotient[kBlock];
      bool divides = true;
      for (int i = 0; i < kBlock; ++i) {
        quotient[i] = static_cast<uint16_t>(static_cast<uint32_t>(integers[i]) * inverse);
        divides &= quotient[i] <= 65535 / prime;
      }
      if (!divides)
        continue;
      for (int i = 0; i < kBlock; ++i)
        integers[i] = quotient[i];
      return static_cast<int32_t>(prime);
    }
    return 1;
  }

  // Stores the digits of a block and its scale, for which each integer counts.
  bool write(int64_t g, const float *block, const int32_t *integers, int count, float scale) {
    Chunk &chunk = chunks[g / kChunkBlocks];
    const int64_t b = g % kChunkBlocks;
    const int used = std::min(count, 2), below = kDigitBits * (count - used);
    constexpr int32_t kMask = (1 << kDigitBits) - 1;
    int32_t sign[kBlock], sums[2] = {0, 0};
    for (int i = 0; i < kBlock; ++i)
      sign[i] = block[i] < 0 ? -1 : 1;
    if (below)
      for (int i = 0; i < kBlock; ++i)
        if (const int32_t rest = integers[i] & ((1 << below) - 1))
          rests.push_back({g * kBlock + i, static_cast<float>(sign[i] * rest) * scale});
    for (int d = 0; d < used; ++d)
      for (int i = 0; i < kBlock; ++i)
        chunk.digit[d][i % 2][b * kHalf + i / 2] = static_cast<int8_t>(
            sign[i] * (integers[i] >> (below + kDigitBits * d) & kMask));
    for (int i = 0; i < kBlock; ++i)
      sums[i / 8] += sign[i] * (integers[i] >> below);
    chunk.start[2 * b] = -kOffset * sums[0];
    chunk.start[2 * b + 1] = -kOffset * sums[1];
    digits = std::max(digits, used);
    // Half of twice a weight; 2^8 for the weight's scale, see decode_scales.
    scales[g / kPairBlocks * kPairBlocks + kScaleAt[g % kPairBlocks]] =
        128 * scale * static_cast<float>(1 << below);
    return true;
  }
};

template <int M> struct Sums {
  F8 fp4[M];
  F8 fp8[M][2]; // 2^-8 / 6 times its value; even and odd elements
  int64_t next; // index of the row's next FP8 block

  void clear(int64_t first) {
    for (int m = 0; m < M; ++m)
      fp4[m] = fp8[m][0] = fp8[m][1] = broadcast8(0);
    next = first;
  }

  float total(int m) const {
    const F8 scale = broadcast8(256 * kFp8Factor);
    return sum8(muladd8(fp8[m][1], scale, muladd8(fp8[m][0], scale, fp4[m])));
  }
};

// M tokens that are multiplied together; `row` are their rows of the output.
template <int M> struct Tokens {
  const Chunk *chunks[M];
  const float *scales[M], *plain[M];
  const std::vector<Rest> *rests[M];
  int64_t row[M];
};

// Adds the FP4 blocks of two chunks, `Digits` of each token; `low` and `scale` point to the first of
// eight blocks.
template <int M, int Digits>
inline void add_pair(const uint8_t *low, const uint8_t *scale, int64_t pair, const Tokens<M> &x,
                     F8 (&sums)[M]) {
  const F8 s = decode_scales(scale);
  for (int half = 0; half < 2; ++half) {
    const Weights weights(low + half * 32);
    for (int m = 0; m < M; ++m) {
      const Chunk &chunk = x.chunks[m][2 * pair + half];
      const I8 dot = weights.dot<Digits>(chunk.digit, chunk.start);
      const F8 both = multiply8(s, load8(x.scales[m] + pair * kPairBlocks));
      const F8 factor = half ? spread_high(both) : spread_low(both);
      sums[m] = muladd8(to_float(dot), factor, sums[m]);
    }
  }
}

// Adds the FP4 blocks of pairs [begin, end) of one row; `low` and `scale` point to the row.
template <int M, int Digits>
inline void add_fp4(const uint8_t *low, const uint8_t *scale, int64_t blocks, int64_t begin,
                    int64_t end, const Tokens<M> &x, Sums<M> &sums) {
  F8 sum[M]; // in registers
  for (int m = 0; m < M; ++m)
    sum[m] = sums.fp4[m];
  const int64_t whole = std::min(end, blocks / kPairBlocks);
  for (int64_t pair = begin; pair < whole; ++pair) {
    const int64_t g = pair * kPairBlocks;
    __builtin_prefetch(low + (g + 2 * blocks) * kHalf, 0, 2);
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
    add_four<M>(four, overflow + i * kHalf, at, x.plain, sums.fp8);
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
    add_four<M>(four, last, at, x.plain, sums.fp8);
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
