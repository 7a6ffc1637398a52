// Entry points, compiled once per instruction set: FGMP_ISA is its name and the suffix of theirs.
// Everything else is in anonymous namespaces, so that the linker cannot confuse the versions.
#include "gemm.h"
#include "gemv.h"
#include "gemv_bf16.h"
#include "gemv_int8.h"
#include "quantize.h"
#include "unpack.h"
#include "weights.h"

#define FGMP_JOIN(name, isa) fgmp_##name##_##isa
#define FGMP_NAME2(name, isa) FGMP_JOIN(name, isa)
#define FGMP_NAME(name) FGMP_NAME2(name, FGMP_ISA)

extern "C" {

// y = fl32(x w^T * t) + bias. Returns the first row whose planes are corrupt, or -1.
int64_t FGMP_NAME(linear)(const fgmp::Weight *w, const fgmp::Matrix *x, const fgmp::Matrix *y,
                          const float *bias, float t, const fgmp::Team *team) {
  if (x->rows == 0)
    return -1;
  const Epilogue out{*y, bias, t};
#if defined(__AVX512BF16__)
  if (x->is_bf16 && !w->fp8 && x->rows <= kFewTokensBf16)
    return gemv_bf16(*w, *x, out, *team);
  if (x->is_bf16 && x->rows > kFewTokens)
    return gemm<Bf16>(*w, *x, out, *team);
#elif defined(FGMP_INT8)
  if (x->is_bf16 && !w->fp8 && x->rows <= kFewTokensInt8)
    return gemv_int8(*w, *x, out, *team);
#endif
  if (x->rows <= kFewTokens)
    return gemv(*w, *x, out, *team);
  if (!x->is_bf16)
    return gemm<Fp32>(*w, *x, out, *team);
  std::vector<float> wide = widen(*x, x->columns);
  return gemm<Fp32>(*w, {wide.data(), x->rows, x->columns, 0}, out, *team);
}

// Decodes the weight to units of t, (n, k). Returns the first row whose planes are corrupt, or -1.
int64_t FGMP_NAME(unpack)(const fgmp::Weight *w, const fgmp::Matrix *out, const fgmp::Team *team) {
  return unpack(*w, *out, *team);
}

// Writes units in bf16 and flags, one byte per block. Returns -1.
int64_t FGMP_NAME(fake_quantize)(const fgmp::Matrix *x, const fgmp::Site *site, uint16_t *units,
                              uint8_t *is_fp8, const fgmp::Team *team) {
  fake_quantize(*x, *site, units, is_fp8, *team);
  return -1;
}

// Writes codes, one byte per element of whole blocks, and scale bytes. Returns -1.
int64_t FGMP_NAME(quantize)(const fgmp::Matrix *x, const fgmp::Site *site, uint8_t *codes,
                         uint8_t *scale, const fgmp::Team *team) {
  quantize(*x, *site, codes, scale, *team);
  return -1;
}

// Writes S, one number per block. Returns -1.
int64_t FGMP_NAME(scores)(const fgmp::Matrix *x, const fgmp::Site *site, int64_t *out,
                       const fgmp::Team *team) {
  scores(*x, *site, out, *team);
  return -1;
}

// Writes the FP4 scale of least weighted error of each block of a weight. Returns -1.
int64_t FGMP_NAME(search_scales)(const fgmp::Matrix *weight, const float *sensitivity, float t,
                                 uint8_t *scale, const fgmp::Team *team) {
  search_scales(*weight, sensitivity, t, scale, *team);
  return -1;
}

// Writes the score of each block of a weight: its benefit, or the formats' difference. Returns -1.
int64_t FGMP_NAME(weight_scores)(const fgmp::Matrix *weight, const float *sensitivity,
                                 const uint8_t *scale, float t, int64_t benefit, double *scores,
                                 const fgmp::Team *team) {
  weight_scores(*weight, sensitivity, scale, t, benefit, scores, *team);
  return -1;
}

// Rounds a block of columns, in place, with error compensation within it. Returns -1.
int64_t FGMP_NAME(round_columns)(const fgmp::Columns *block, float t, const fgmp::Team *team) {
  round_columns(*block, t, *team);
  return -1;
}
}
