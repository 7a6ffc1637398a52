// Quantizes activations block by block (docs/numerics.md, sections 3 to 5).
//
// Reproduces the definition in formats/activation.py bit for bit, on the vectors of block.h. It
// works on magnitudes and puts the sign of x back at the end. No multiply-add is fused.
//
// Errors and scores are sums of 16 squares. An fp32 estimate has a relative error below 2^-19 in
// any order of additions; where that cannot decide, integers do.
#pragma once
#include "block.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

enum Rule : int32_t { kDifference = 0, kBenefit = 1, kSearch = 2 }; // a rule, or a rule | kSearch

constexpr float kScaleMax = 448;
constexpr int kScaleMaxCode = 0x7e, kScaleMinCode = 0x01;
constexpr float kUnit = 1024;             // decoded values are multiples of t / kUnit
constexpr float kUnitMax = 2688;          // the largest decoded value over t
constexpr float kSensitivityUnit = 512;   // sensitivities are multiples of 1 / kSensitivityUnit
constexpr double kEstimateBand = 0x1p-18; // twice the relative error of an estimate
constexpr int kSearchOffsets[4] = {5, 4, 0, -1}; // candidate scale codes, descending
constexpr int64_t kAllFp8 = -1; // the only threshold that needs a case of its own, since S < 2^60

// Rounds magnitudes to a minifloat's grid, to nearest even, saturating. `smallest` is the smallest
// normal number, `fraction` the number of mantissa bits, `most` the largest value. Adding 2^23
// steps of the grid makes the addition round to a step; where the sum overflows, the difference is
// NaN and the minimum returns `most`.
inline F16 round_to(F16 magnitude, float smallest, int fraction, float most) {
  const F16 exponent = and_bits(magnitude, broadcast(float_of(0x7f800000)));
  const F16 power = maximum(exponent, broadcast(smallest));
  const F16 steps = multiply(power, broadcast(static_cast<float>(1 << (23 - fraction))));
  return minimum(subtract(add(magnitude, steps), steps), broadcast(most));
}

inline F16 round_e4m3(F16 magnitude) { return round_to(magnitude, 0x1p-6f, 3, kScaleMax); }
inline F16 round_e2m1(F16 magnitude) { return round_to(magnitude, 1, 1, 6); }

// E4M3 code of a non-negative value on E4M3's grid.
inline int code_of(float value) {
  const int normal = static_cast<int>(bits_of(value) >> 20) - (120 << 3);
  return value < 0x1p-6f ? static_cast<int>(value * 512) : normal;
}

// Intermediate values of a block, magnitudes in units of t. Both formats have the sign of x.
struct Block {
  F16 u;      // |x| r, zero where x is not finite
  F16 target; // v: 6 u rounded to multiples of 1 / kUnit
  F16 fp8, fp4;
  float scale;
  float fp4_error; // estimate of the weighted error from `target`; only where scales are searched
  bool finite;
};

struct Sensitivity {
  float unit[kBlock];       // g_int, zero beyond k
  float estimating[kBlock]; // g_int kUnit^2
};

inline double sum_of_squares(F16 a, F16 b, const Sensitivity &g) {
  const F16 d = subtract(a, b);
  return sum(multiply(multiply(d, d), load(g.estimating)));
}

// The same sum in integers: d is a multiple of 1 / kUnit, and the sum is below 2^60.
inline int64_t exact_sum_of_squares(F16 a, F16 b, const Sensitivity &g) {
  float difference[kBlock];
  store(difference, subtract(a, b));
  int64_t total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const auto d = static_cast<int64_t>(difference[i] * kUnit);
    total += d * d * static_cast<int64_t>(g.unit[i]);
  }
  return total;
}

// Decoded FP4 values for 6 u / s. The quotient is rounded to fp32 before it is rounded to E2M1; no
// case exists where this changes the code (docs/numerics.md, section 3).
inline F16 round_fp4(F16 u, float scale) {
  const F16 s = broadcast(scale);
  return multiply(round_e2m1(divide(multiply(u, broadcast(kFp8Factor)), s)), s);
}

// Returns `a` if `first`, else `b`, without a branch.
inline F16 choose(bool first, F16 a, F16 b) {
  const uint32_t mask = 0u - first;
  return or_bits(and_bits(a, broadcast(float_of(mask))), and_bits(b, broadcast(float_of(~mask))));
}

// Sums of four vectors.
inline void sum_each(const F16 (&v)[4], float (&sums)[4]) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  auto pairs = [](F16 a, F16 b) {
    return _mm256_hadd_ps(_mm256_add_ps(a.low, a.high), _mm256_add_ps(b.low, b.high));
  };
  const __m256 halves = _mm256_hadd_ps(pairs(v[0], v[1]), pairs(v[2], v[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i)
    sums[i] = sum(v[i]);
#endif
}

// Chooses the candidate scale of least weighted error; ties go to the larger scale.
inline void search_scale(Block &block, int nearest, const Sensitivity &g) {
  int codes[4];
  F16 tried[4], squares[4];
  for (int i = 0; i < 4; ++i) {
    codes[i] = std::min(std::max(nearest + kSearchOffsets[i], kScaleMinCode), kScaleMaxCode);
    tried[i] = round_fp4(block.u, kE4M3[codes[i]]);
    const F16 d = subtract(tried[i], block.target);
    squares[i] = multiply(multiply(d, d), load(g.estimating));
  }
  float errors[4];
  sum_each(squares, errors);
  // Estimates within twice the band of the least need integers; others are larger in integers, too.
  const float least = std::min(std::min(errors[0], errors[1]), std::min(errors[2], errors[3]));
  const float near = least * static_cast<float>(1 + 2 * kEstimateBand);
  const int candidates = (errors[0] <= near) | (errors[1] <= near) << 1 | (errors[2] <= near) << 2 |
                         (errors[3] <= near) << 3;
  int chosen = __builtin_ctz(static_cast<unsigned>(candidates));
  if (__builtin_expect((candidates & (candidates - 1)) != 0, false)) {
    int64_t exact = INT64_MAX;
    for (int i = 0; i < 4; ++i)
      if (candidates >> i & 1) {
        const int64_t error = exact_sum_of_squares(tried[i], block.target, g);
        chosen = error < exact ? i : chosen;
        exact = std::min(error, exact);
      }
  }
  block.fp4 = tried[chosen];
  block.fp4_error = errors[chosen];
  block.scale = kE4M3[codes[chosen]];
}

// Whether the block is FP8: S > T. A processor could not predict a branch on that, so in the common
// case the result of a comparison is used as a number.
inline bool decide(const Block &block, const Site &site, const Sensitivity &g) {
  const bool benefit = site.rule & kBenefit, known = benefit && site.rule & kSearch;
  const F16 other = benefit ? block.target : block.fp8;
  const double worse = known ? block.fp4_error : sum_of_squares(block.fp4, other, g);
  const double better = benefit ? sum_of_squares(block.fp8, other, g) : 0;
  const double above = worse - better - static_cast<double>(site.threshold);
  bool fp8 = above > 0;
  if (__builtin_expect(std::fabs(above) <= (worse + better) * kEstimateBand, false)) {
    const int64_t less = benefit ? exact_sum_of_squares(block.fp8, other, g) : 0;
    fp8 = exact_sum_of_squares(block.fp4, other, g) - less > site.threshold;
  }
  if (__builtin_expect(!block.finite || site.threshold == kAllFp8, false))
    fp8 = true;
  return fp8;
}

// Score S of a block; the largest int64 for a block that is not finite.
inline int64_t score(const Block &block, const Site &site, const Sensitivity &g) {
  if (!block.finite)
    return INT64_MAX;
  if (!(site.rule & kBenefit))
    return exact_sum_of_squares(block.fp4, block.fp8, g);
  return std::max<int64_t>(0, exact_sum_of_squares(block.fp4, block.target, g) -
                                  exact_sum_of_squares(block.fp8, block.target, g));
}

// Quantizes one block `x`, bf16 values in fp32, in both formats.
inline Block quantize_block(F16 x, const Site &site, const Sensitivity &g) {
  Block block;
  F16 magnitude = and_bits(x, broadcast(float_of(0x7fffffff)));
  block.finite = finite(magnitude);
  if (!block.finite) {
    float lanes[kBlock];
    store(lanes, magnitude);
    for (float &lane : lanes)
      lane = std::isfinite(lane) ? lane : 0;
    magnitude = load(lanes);
  }
  block.u = multiply(magnitude, broadcast(site.r));
  block.fp8 = multiply(round_e4m3(block.u), broadcast(kFp8Factor));
  // Rounding is monotone: the largest rounded magnitude is the largest magnitude, rounded.
  block.scale = std::max(largest(block.fp8) / kFp8Factor, 0x1p-9f);
  if (site.rule & (kBenefit | kSearch)) {
    const F16 v = multiply(block.u, broadcast(kFp8Factor * kUnit)), whole = broadcast(0x1p23f);
    const F16 integer = subtract(add(minimum(v, broadcast(kUnitMax * kUnit)), whole), whole);
    block.target = multiply(integer, broadcast(1 / kUnit));
  }
  if (site.rule & kSearch)
    search_scale(block, code_of(block.scale), g);
  else
    block.fp4 = round_fp4(block.u, block.scale);
  return block;
}

// Reads 16 elements of row m from column `at` as bf16 values in fp32, zero beyond the last column.
inline F16 read_block(const Matrix &x, int64_t m, int64_t at) {
  const int64_t from = m * x.columns + at, left = x.columns - at;
  uint16_t narrow[kBlock] = {};
  if (x.is_bf16) {
    const uint16_t *source = static_cast<const uint16_t *>(x.data) + from;
    if (left >= kBlock)
      return load_bf16(source);
    std::memcpy(narrow, source, left * sizeof *source);
  } else {
    const float *source = static_cast<const float *>(x.data) + from;
    if (left >= kBlock)
      return round_bf16(load(source));
    for (int64_t i = 0; i < std::min(left, kBlock); ++i)
      narrow[i] = to_bf16(source[i]);
  }
  return load_bf16(narrow);
}

// Decodes the sensitivities of all blocks of a site, once per call.
inline std::vector<Sensitivity> sensitivities(const Site &site, int64_t k) {
  std::vector<Sensitivity> all((k + kBlock - 1) / kBlock);
  for (int64_t i = 0; i < k; ++i) {
    const float unit = decode_e4m3(site.sensitivity[i]) * kSensitivityUnit;
    all[i / kBlock].unit[i % kBlock] = unit;
    all[i / kBlock].estimating[i % kBlock] = unit * (kUnit * kUnit);
  }
  return all;
}

// Calls use(m, g, x, block, sensitivity) for every block of the tokens x, distributed over the
// team.
template <class Use>
void quantize_tokens(const Matrix &x, const Site &site, const Team &team, Use &&use) {
  const std::vector<Sensitivity> weights = sensitivities(site, x.columns);
  const auto blocks = static_cast<int64_t>(weights.size());
  team.run([&](int member, int size) {
    const Share part = share(x.rows * blocks, 64, member, size);
    int64_t m = part.begin / blocks, g = part.begin % blocks;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const F16 values = read_block(x, m, g * kBlock);
      const Block block = quantize_block(values, site, weights[g]);
      use(m, g, values, block, weights[g]);
      if (++g == blocks)
        g = 0, ++m;
    }
  });
}

// Writes decoded values as bf16 (rows, k) and flags (rows, blocks).
inline void fake_quantize(const Matrix &x, const Site &site, uint16_t *units, uint8_t *is_fp8,
                          const Team &team) {
  const int64_t blocks = (x.columns + kBlock - 1) / kBlock;
  quantize_tokens(x, site, team, [&](int64_t m, int64_t g, F16 values, const Block &block,
                                     const Sensitivity &weights) {
    const bool fp8 = decide(block, site, weights);
    const int64_t at = m * x.columns + g * kBlock, left = x.columns - g * kBlock;
    const F16 sign = and_bits(values, broadcast(-0.0f));
    const F16 units16 = or_bits(choose(fp8, block.fp8, block.fp4), sign);
    is_fp8[m * blocks + g] = fp8;
    if (block.finite && left >= kBlock)
      return store_bf16(units + at, units16);
    uint16_t narrow[kBlock];
    float lanes[kBlock];
    store_bf16(narrow, units16);
    store(lanes, values);
    for (int64_t i = 0; i < std::min(left, kBlock); ++i)
      units[at + i] = std::isfinite(lanes[i]) ? narrow[i] : 0x7fc0;
  });
}

// Writes codes (rows, blocks, 16) and scale bytes (rows, blocks), 0x80 where the block is FP8.
inline void quantize(const Matrix &x, const Site &site, uint8_t *codes, uint8_t *scale,
                     const Team &team) {
  const int64_t blocks = (x.columns + kBlock - 1) / kBlock;
  quantize_tokens(x, site, team, [&](int64_t m, int64_t g, F16 values, const Block &block,
                                     const Sensitivity &weights) {
    const bool fp8 = decide(block, site, weights);
    uint8_t *out = codes + (m * blocks + g) * kBlock;
    float lanes[kBlock], magnitudes[kBlock];
    store(lanes, values);
    store(magnitudes, fp8 ? block.fp8 : block.fp4);
    int any = 0;
    for (int i = 0; i < kBlock; ++i) {
      const bool finite = std::isfinite(lanes[i]), negative = finite && lanes[i] < 0;
      int code = finite ? code_of(magnitudes[i] / kFp8Factor) : 0x7f;
      if (!fp8) {
        const float twice = 2 * magnitudes[i] / block.scale; // 0 1 2 3 4 6 8 12
        code = static_cast<int>(twice < 4 ? twice : twice < 8 ? 2 + twice / 2 : 4 + twice / 4);
      }
      any |= code;
      out[i] = static_cast<uint8_t>(code | (negative ? (fp8 ? 0x80 : 0x08) : 0));
    }
    const int fp4_scale = any ? code_of(block.scale) : kScaleMinCode;
    scale[m * blocks + g] = fp8 ? kFp8Flag : static_cast<uint8_t>(fp4_scale);
  });
}

// Writes S of every block (rows, blocks).
inline void scores(const Matrix &x, const Site &site, int64_t *out, const Team &team) {
  const int64_t blocks = (x.columns + kBlock - 1) / kBlock;
  quantize_tokens(x, site, team, [&](int64_t m, int64_t g, F16, const Block &block,
                                     const Sensitivity &weights) {
    out[m * blocks + g] = score(block, site, weights);
  });
}

} // namespace
