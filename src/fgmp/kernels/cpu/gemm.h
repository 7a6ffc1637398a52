// Linear for many tokens: rows of the weight are decoded to a scratch tile and multiplied from
// there.
//
// Tokens are the vector lanes. A word is four bytes along K, one fp32 number or two bf16 numbers,
// so both types share everything but the instruction that multiplies and adds. A tile is kTileRows
// rows by one panel of K. It is decoded once for up to kChunkTokens tokens and stays in the L2
// cache. The inner loop holds 24 vectors of sums in registers (12 half vectors on AVX2).
//
// Every output adds its products in the order of K, whatever the number of threads.
#pragma once
#include "gemv.h"

namespace {

constexpr int64_t kTileRows = 48;
constexpr int64_t kPanelWords = 512;
constexpr int64_t kLineWords = kPanelWords + 16; // rows of a tile in different sets of the L1 cache
constexpr int64_t kRowsAhead = 8;
constexpr int64_t kChunkTokens = 512;
constexpr int64_t kLanes = 16;

#if defined(__AVX512BF16__)
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return 24 / vectors; }
#else
constexpr int kMaxVectors = 1;
constexpr int rows_for(int) { return 6; }
#endif

struct Fp32 {
  using Number = float;
  static constexpr int64_t kPerWord = 1;
  static void put(uint32_t *words, F16 values) { store(reinterpret_cast<float *>(words), values); }
  static uint32_t word(const float *x) {
    uint32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits;
  }
  static F16 muladd(const uint32_t *weight, const uint32_t *tokens, F16 sum) {
    float w;
    std::memcpy(&w, weight, sizeof w);
    return ::muladd(broadcast(w), load(reinterpret_cast<const float *>(tokens)), sum);
  }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using Number = uint16_t;
  static constexpr int64_t kPerWord = 2;
  static void put(uint32_t *words, F16 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(words), (__m256i)_mm512_cvtneps_pbh(values));
  }
  static uint32_t word(const uint16_t *x) { return x[0] | static_cast<uint32_t>(x[1]) << 16; }
  static F16 muladd(const uint32_t *weight, const uint32_t *tokens, F16 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*weight)),
                            (__m512bh)_mm512_loadu_si512(tokens));
  }
};
#endif

// Tokens transposed to (groups, words, lanes of the group), zero beyond the last token and beyond
// k. The last group has only as many vectors of lanes as it needs.
template <class Op> class Turned {
public:
  using Number = typename Op::Number;

  Turned(const Matrix &x, int64_t first, int64_t count, int64_t words, const Team &team)
      : words(words), count(count), data(groups() * words * kGroup) {
    team.run([&](int member, int size) {
      const Share part = share(words, kLanes, member, size);
      for (int64_t m = 0; m < count; ++m)
        turn(static_cast<const Number *>(x.data) + (first + m) * x.columns, x.columns, m, part);
    });
  }

  static constexpr int64_t kGroup = kMaxVectors * kLanes;
  int64_t groups() const { return (count + kGroup - 1) / kGroup; }
  int vectors(int64_t group) const {
    const int64_t left = count - group * kGroup;
    return static_cast<int>(left >= kGroup ? kMaxVectors : (left + kLanes - 1) / kLanes);
  }
  int64_t lanes(int64_t group) const { return vectors(group) * kLanes; }
  const uint32_t *at(int64_t group, int64_t word) const {
    return data.data() + group * words * kGroup + word * lanes(group);
  }

private:
  void turn(const Number *row, int64_t columns, int64_t m, Share part) {
    const int64_t group = m / kGroup, step = lanes(group);
    uint32_t *lane = data.data() + group * words * kGroup + m % kGroup;
    const int64_t whole = std::min(part.end, columns / Op::kPerWord);
    for (int64_t i = part.begin; i < whole; ++i)
      lane[i * step] = Op::word(row + i * Op::kPerWord);
    if (whole < part.end && whole * Op::kPerWord < columns) {
      Number last[Op::kPerWord] = {row[whole * Op::kPerWord]};
      lane[whole * step] = Op::word(last);
    }
  }

  int64_t words, count;
  std::vector<uint32_t> data;
};

// Computes sums (rows, stride) += weight (rows, kLineWords) * tokens, for a few rows and 16 V
// tokens.
template <class Op, int V>
inline void multiply(const uint32_t *weight, const uint32_t *tokens, int64_t words, float *sums,
                     int64_t stride) {
  constexpr int R = rows_for(V);
  F16 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = load(sums + r * stride + v * kLanes);
  for (int64_t i = 0; i < words; ++i)
#pragma GCC unroll 24 // keeps the sums in registers
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Op::muladd(weight + r * kLineWords + i, tokens + (i * V + v) * kLanes, sum[r][v]);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(sums + r * stride + v * kLanes, sum[r][v]);
}

template <class Op, int V>
inline void multiply_tile(const uint32_t *weight, const uint32_t *tokens, int64_t words,
                          float *sums, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; r += rows_for(V))
    multiply<Op, V>(weight + r * kLineWords, tokens, words, sums + r * stride, stride);
}

template <class Op>
void gemm_rows(const Weight &w, const Turned<Op> &x, int64_t first, int64_t count, Share rows,
               const Epilogue &out, Fault &fault) {
  constexpr int64_t kGroup = Turned<Op>::kGroup, kBlockWords = kBlock / Op::kPerWord;
  const int64_t blocks = w.blocks(), stride = x.groups() * kGroup;
  std::vector<uint32_t> weight(kTileRows * kLineWords);
  std::vector<float> sums(kTileRows * stride);
  for (int64_t top = rows.begin; top < rows.end; top += kTileRows) {
    const int64_t height = std::min(kTileRows, rows.end - top);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t begin = 0; begin < blocks; begin += kPanelWords / kBlockWords) {
      const int64_t end = std::min(begin + kPanelWords / kBlockWords, blocks);
      for (int64_t r = 0; r < height; ++r) {
        uint32_t *line = weight.data() + r * kLineWords;
        prefetch_row(w, std::min(top + r + kRowsAhead, w.n - 1), begin, end);
        const bool sound = decode_row(w, top + r, begin, end, [&](int64_t g, F16 values) {
          Op::put(line + (g - begin) * kBlockWords, values);
        });
        if (!sound)
          fault.report(top + r);
      }
      const int64_t words = (end - begin) * kBlockWords;
      for (int64_t group = 0; group < x.groups(); ++group) {
        const uint32_t *tokens = x.at(group, begin * kBlockWords);
        float *sum = sums.data() + group * kGroup;
        switch (x.vectors(group)) {
#if defined(__AVX512BF16__)
        case 4: multiply_tile<Op, 4>(weight.data(), tokens, words, sum, stride); break;
        case 3: multiply_tile<Op, 3>(weight.data(), tokens, words, sum, stride); break;
        case 2: multiply_tile<Op, 2>(weight.data(), tokens, words, sum, stride); break;
#endif
        default: multiply_tile<Op, 1>(weight.data(), tokens, words, sum, stride);
        }
      }
    }
    for (int64_t m = 0; m < count; ++m)
      for (int64_t r = 0; r < height; ++r)
        out.put(first + m, top + r, sums[r * stride + m]);
  }
}

template <class Op>
int64_t gemm(const Weight &w, const Matrix &x, const Epilogue &out, const Team &team) {
  Fault fault;
  const int64_t words = w.blocks() * kBlock / Op::kPerWord;
  for (int64_t first = 0; first < x.rows; first += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, x.rows - first);
    const Turned<Op> turned(x, first, count, words, team);
    team.run([&](int member, int size) {
      gemm_rows<Op>(w, turned, first, count, share(w.n, kTileRows, member, size), out, fault);
    });
  }
  return fault.row();
}

} // namespace
