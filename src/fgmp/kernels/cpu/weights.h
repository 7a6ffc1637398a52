// Quantizes blocks of weights, offline: the scale search, block scores, and the column loop of
// error compensation (fgmp.assign.scale_search, impact and compensate are the definitions).
//
// Each step rounds as the definition does, in its order: sums over a block add halves to halves.
#pragma once
#include "quantize.h"

namespace {

constexpr double kSlack = 1 + 1e-9;            // scale_search._SLACK
constexpr double kQuotientError = 1e-6;        // scale_search._QUOTIENT_ERROR
constexpr double kFlushed = 0.25;              // quotients below it round to zero
constexpr double kLargestFp4 = 6;

// Sum of 16 numbers by halving; overwrites them.
inline double sum_by_halves(double (&v)[kBlock]) {
  for (int width = kBlock / 2; width; width /= 2)
    for (int i = 0; i < width; ++i)
      v[i] += v[i + width];
  return v[0];
}

// Magnitudes of one block of a weight and their sensitivities; zeros beyond the last column.
struct WeightBlock {
  float magnitude[kBlock];
  double wide[kBlock], sensitivity[kBlock];
};

inline WeightBlock read_weights(const float *weight, const float *sensitivity, int64_t count) {
  WeightBlock block{};
  for (int64_t i = 0; i < std::min(count, kBlock); ++i) {
    block.magnitude[i] = std::fabs(weight[i]);
    block.wide[i] = block.magnitude[i];
    block.sensitivity[i] = sensitivity[i];
  }
  return block;
}

inline F16 fp4_magnitudes(F16 magnitude, int scale, float t) {
  return round_e2m1(divide(magnitude, broadcast(kE4M3[scale] * t)));
}

inline F16 fp8_magnitudes(F16 magnitude, float t) {
  return round_e4m3(divide(magnitude, broadcast(t * kFp8Factor)));
}

// E(s) of a block.
inline double search_error(const WeightBlock &block, int scale, float t) {
  float rounded[kBlock];
  store(rounded, fp4_magnitudes(load(block.magnitude), scale, t));
  const double step = static_cast<double>(kE4M3[scale]) * t;
  double terms[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const double difference = rounded[i] * step - block.wide[i];
    terms[i] = difference * difference * block.sensitivity[i];
  }
  return sum_by_halves(terms);
}

// Lower bound of E(s) that rises in the direction of search.
inline double search_bound(const WeightBlock &block, int scale, float t, int direction) {
  const double step = static_cast<double>(kE4M3[scale]) * t;
  const double clipped = kLargestFp4 * step, flushed = kFlushed * step * (1 - kQuotientError);
  double terms[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const double over = std::max(block.wide[i] - clipped, 0.0);
    const double under = block.wide[i] >= flushed ? 0.0 : block.wide[i];
    const double lost = direction < 0 ? over : under;
    terms[i] = lost * lost * block.sensitivity[i];
  }
  return sum_by_halves(terms);
}

// Code of the scale of least error; ties go to the larger scale.
inline int best_scale(WeightBlock &block, float t) {
  bool sensitive = false;
  for (int i = 0; i < kBlock; ++i)
    sensitive |= block.sensitivity[i] > 0 && block.wide[i] != 0;
  if (!sensitive)
    std::fill_n(block.sensitivity, kBlock, 1.0);
  const F16 magnitude = load(block.magnitude);
  const int nearest = code_of(largest(fp8_magnitudes(magnitude, t)));
  const int start = std::min(std::max(nearest, kScaleMinCode), kScaleMaxCode);
  int best = start;
  double least = search_error(block, start, t);
  for (int direction : {-1, 1})
    for (int code = start + direction; code >= kScaleMinCode && code <= kScaleMaxCode;
         code += direction) {
      if (search_bound(block, code, t, direction) > least * kSlack)
        break;
      const double error = search_error(block, code, t);
      if (direction < 0 ? error < least : error <= least)
        best = code, least = error;
    }
  return largest(fp4_magnitudes(magnitude, best, t)) > 0 ? best : kScaleMinCode;
}

// Calls use(g, block) for every block of the rows of a weight (n, k), g counting all blocks.
template <class Use>
void each_block(const Matrix &weight, const float *sensitivity, const Team &team, Use &&use) {
  const int64_t k = weight.columns, blocks = (k + kBlock - 1) / kBlock;
  const float *values = static_cast<const float *>(weight.data);
  team.run([&](int member, int size) {
    const Share part = share(weight.rows * blocks, 64, member, size);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t column = i % blocks * kBlock, at = i / blocks * k + column;
      WeightBlock block = read_weights(values + at, sensitivity + at, k - column);
      use(i, block);
    }
  });
}

// Scale codes of least weighted error (rows, blocks).
inline void search_scales(const Matrix &weight, const float *sensitivity, float t, uint8_t *scale,
                          const Team &team) {
  each_block(weight, sensitivity, team, [&](int64_t g, WeightBlock &block) {
    scale[g] = static_cast<uint8_t>(best_scale(block, t));
  });
}

// Scores of blocks (rows, blocks): what FP8 takes away of the error, or how far the formats differ.
inline void weight_scores(const Matrix &weight, const float *sensitivity, const uint8_t *scale,
                          float t, bool benefit, double *scores, const Team &team) {
  each_block(weight, sensitivity, team, [&](int64_t g, WeightBlock &block) {
    const F16 magnitude = load(block.magnitude);
    float fp4[kBlock], fp8[kBlock];
    store(fp4, multiply(fp4_magnitudes(magnitude, scale[g], t), broadcast(kE4M3[scale[g]])));
    store(fp8, multiply(fp8_magnitudes(magnitude, t), broadcast(kFp8Factor)));
    double terms[kBlock];
    const double wide_t = t;
    for (int i = 0; i < kBlock; ++i) {
      const double error4 = fp4[i] * wide_t - block.wide[i];
      const double error8 = fp8[i] * wide_t - block.wide[i];
      const double apart = static_cast<double>(fp4[i] - fp8[i]) * wide_t;
      terms[i] = (benefit ? error4 * error4 - error8 * error8 : apart * apart) *
                 block.sensitivity[i];
    }
    const double total = sum_by_halves(terms);
    scores[g] = benefit && total < 0 ? 0 : total;
  });
}

// E2M1 code of a magnitude on its grid.
inline int fp4_code_of(float magnitude) {
  const float twice = 2 * magnitude; // 0 1 2 3 4 6 8 12
  return static_cast<int>(twice < 4 ? twice : twice < 8 ? 2 + twice / 2 : 4 + twice / 4);
}

// `a` in lanes where all bits of `mask` are set, `b` where all bits of `other` are.
inline F16 choose_bits(F16 mask, F16 other, F16 a, F16 b) {
  return or_bits(and_bits(mask, a), and_bits(other, b));
}

// Rounds column after column; lanes are rows, since each row is rounded by itself.
inline void round_columns(const Columns &block, float t, const Team &team) {
  const int64_t count = block.count;
  const F16 t16 = broadcast(t), magnitudes = broadcast(float_of(0x7fffffff));
  team.run([&](int member, int size) {
    const Share part = share(block.rows, kBlock, member, size);
    for (int64_t row = part.begin; row < part.end; row += kBlock) {
      const int64_t lanes = std::min(kBlock, part.end - row);
      float column[kBlock][kBlock] = {}, fp4[kBlock][kBlock], fp8[kBlock][kBlock];
      float value[kBlock][kBlock], error[kBlock][kBlock], before[kBlock][kBlock];
      float scale[kBlock] = {}, wide[kBlock] = {}, narrow[kBlock] = {};
      for (int64_t i = 0; i < lanes; ++i) {
        for (int64_t j = 0; j < count; ++j)
          column[j][i] = block.values[(row + i) * count + j];
        scale[i] = kE4M3[block.scale[row + i]];
        wide[i] = float_of(block.is_fp8[row + i] ? 0xffffffff : 0);
        narrow[i] = float_of(block.is_fp8[row + i] ? 0 : 0xffffffff);
      }
      for (int64_t i = lanes; i < kBlock; ++i)
        scale[i] = 1;
      const F16 s = load(scale), is_fp8 = load(wide), is_fp4 = load(narrow);
      F16 left[kBlock];
      for (int64_t j = 0; j < count; ++j)
        left[j] = load(column[j]);
      for (int64_t j = 0; j < count; ++j) {
        const F16 magnitude = and_bits(left[j], magnitudes);
        const F16 sign = and_bits(left[j], broadcast(-0.0f));
        const F16 four = round_e2m1(divide(magnitude, multiply(s, t16)));
        const F16 eight = fp8_magnitudes(magnitude, t);
        const F16 units = choose_bits(is_fp8, is_fp4, multiply(eight, broadcast(kFp8Factor)),
                                      multiply(four, s));
        const F16 rounded = or_bits(multiply(units, t16), sign);
        const F16 wrong = divide(subtract(left[j], rounded),
                                 broadcast(block.spread[j * count + j]));
        for (int64_t i = j + 1; i < count; ++i)
          left[i] = subtract(left[i], multiply(wrong, broadcast(block.spread[j * count + i])));
        store(before[j], left[j]);
        store(fp4[j], four);
        store(fp8[j], eight);
        store(value[j], rounded);
        store(error[j], wrong);
      }
      for (int64_t i = 0; i < lanes; ++i)
        for (int64_t j = 0; j < count; ++j) {
          const int64_t at = (row + i) * count + j, code = (row + i) * kBlock + j;
          const bool negative = before[j][i] < 0;
          block.values[at] = value[j][i];
          block.errors[at] = error[j][i];
          block.fp4[code] = static_cast<uint8_t>(fp4_code_of(fp4[j][i]) | (negative ? 0x08 : 0));
          block.fp8[code] = static_cast<uint8_t>(code_of(fp8[j][i]) | (negative ? 0x80 : 0));
        }
    }
  });
}

} // namespace
