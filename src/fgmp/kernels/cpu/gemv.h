// Linear for few tokens: every weight is read once, decoded, and multiplied by all tokens.
//
// y[m][n] = sum_k x[m][k] * w[n][k] in units of t, accumulated in fp32. One thread computes a row,
// and its order of additions is fixed, so the result does not depend on the number of threads.
//
// This version takes fp32 numbers block by block. gemv_bf16.h is the AVX-512 version for bf16.
#pragma once
#include "block.h"
#include <algorithm>
#include <atomic>
#include <vector>

namespace {

constexpr int64_t kFewTokens = 8;
constexpr int64_t kRowGrain = 16;

// First row whose planes contradict each other, or -1; any thread may report one.
class Fault {
public:
  void report(int64_t row) {
    int64_t seen = first.load();
    while ((seen < 0 || row < seen) && !first.compare_exchange_weak(seen, row)) {
    }
  }
  int64_t row() const { return first.load(); }

private:
  std::atomic<int64_t> first{-1};
};

// Scales a sum, adds the bias and writes the output: y = fl32(a * t) + bias.
struct Epilogue {
  Matrix y;
  const float *bias;
  float t;

  // The epilogue for outputs from token m on.
  Epilogue from(int64_t m) const {
    Epilogue rest = *this;
    rest.y.data = static_cast<char *>(y.data) + m * y.columns * (y.is_bf16 ? 2 : 4);
    return rest;
  }

  void put(int64_t m, int64_t n, float a) const {
    float value = a * t;
    if (bias)
      value += bias[n];
    int64_t at = m * y.columns + n;
    if (y.is_bf16)
      static_cast<uint16_t *>(y.data)[at] = to_bf16(value);
    else
      static_cast<float *>(y.data)[at] = value;
  }
};

// Converts tokens to fp32 (M, kp), zero beyond k.
inline std::vector<float> widen(const Matrix &x, int64_t kp) {
  std::vector<float> wide(x.rows * kp);
  for (int64_t m = 0; m < x.rows; ++m) {
    float *out = wide.data() + m * kp;
    const int64_t first = m * x.columns;
    if (!x.is_bf16) {
      std::memcpy(out, static_cast<const float *>(x.data) + first, x.columns * sizeof *out);
      continue;
    }
    const uint16_t *row = static_cast<const uint16_t *>(x.data) + first;
    int64_t i = 0;
    for (; i + kBlock <= x.columns; i += kBlock)
      store(out + i, load_bf16(row + i));
    for (; i < x.columns; ++i)
      out[i] = from_bf16(row[i]);
  }
  return wide;
}

template <int M>
void gemv_rows(const Weight &w, const float *x, Share rows, const Epilogue &out, Fault &fault) {
  const int64_t blocks = w.blocks(), kp = blocks * kBlock;
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    F16 sums[2][M]; // two independent chains hide the latency of additions
    for (int m = 0; m < M; ++m)
      sums[0][m] = sums[1][m] = zero();
    const bool sound = decode_row(w, n, 0, blocks, [&](int64_t g, F16 values) {
      for (int m = 0; m < M; ++m)
        sums[g % 2][m] = muladd(values, load(x + m * kp + g * kBlock), sums[g % 2][m]);
    });
    if (!sound)
      fault.report(n);
    for (int m = 0; m < M; ++m)
      out.put(m, n, sum(add(sums[0][m], sums[1][m])));
  }
}

inline int64_t gemv(const Weight &w, const Matrix &x, const Epilogue &out, const Team &team) {
  using Rows = void (*)(const Weight &, const float *, Share, const Epilogue &, Fault &);
  static constexpr Rows kRows[kFewTokens] = {gemv_rows<1>, gemv_rows<2>, gemv_rows<3>, gemv_rows<4>,
                                             gemv_rows<5>, gemv_rows<6>, gemv_rows<7>, gemv_rows<8>};
  const std::vector<float> wide = widen(x, w.blocks() * kBlock);
  Fault fault;
  team.run([&](int member, int size) {
    kRows[x.rows - 1](w, wide.data(), share(w.n, kRowGrain, member, size), out, fault);
  });
  return fault.row();
}

} // namespace
