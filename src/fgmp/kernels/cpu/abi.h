// Structs that Python fills in. library.py mirrors them with ctypes, and a test compares the sizes.
// Sizes count elements, and every pointer is to a contiguous array.
#pragma once
#include <cstdint>

namespace fgmp {

constexpr int64_t kBlock = 16;     // values in a block along K
constexpr int64_t kHalf = 8;       // bytes per block in the planes `low` and `overflow`
constexpr uint8_t kFp8Flag = 0x80; // this bit of a scale byte marks an FP8 block
constexpr float kFp8Factor = 6;    // an FP8 element decodes to 6 * e4m3 * t

// Planes of a weight (n, k) (docs/format.md, section 2). kp is k rounded up to whole blocks.
struct Weight {
  const uint8_t *low;      // (n, kp / 2), null in mode fp8
  const uint8_t *scale;    // (n, kp / 16), null in mode fp8
  const uint8_t *overflow; // (n_fp8, 8), null unless mixed
  const int32_t *row_ptr;  // (n + 1), null unless mixed
  const uint8_t *fp8;      // (n, kp), null unless mode fp8
  int64_t n, k, n_fp8;

  int64_t blocks() const { return (k + kBlock - 1) / kBlock; }
};
static_assert(sizeof(Weight) == 64, "library.py mirrors it");

// Matrix of fp32 or bf16 numbers, row-major.
struct Matrix {
  void *data;
  int64_t rows, columns;
  int64_t is_bf16;
};
static_assert(sizeof(Matrix) == 32, "library.py mirrors it");

// Constants of an activation site (docs/numerics.md, sections 3 to 5). `rule` is a Rule of
// quantize.h.
struct Site {
  const uint8_t *sensitivity; // (k), E4M3 codes
  int64_t threshold;
  float r;
  int32_t rule;
};
static_assert(sizeof(Site) == 24, "library.py mirrors it");

// One block of columns of a weight, rounded with error compensation within the block.
struct Columns {
  float *values;         // (rows, count): in, columns before rounding; out, decoded values
  const float *spread;   // (count, count), upper triangular
  const uint8_t *scale;  // (rows)
  const uint8_t *is_fp8; // (rows)
  uint8_t *fp4, *fp8;    // (rows, 16) codes
  float *errors;         // (rows, count): rounding errors over the diagonal of `spread`
  int64_t rows, count;
};
static_assert(sizeof(Columns) == 72, "library.py mirrors it");

// Thread pool of the caller: PyTorch's OpenMP runtime, whose functions Python looks up, so that no
// second pool competes for the cores. `start` has the signature of GOMP_parallel.
struct Team {
  void (*start)(void (*)(void *), void *, unsigned, unsigned);
  int (*member)();
  int (*size)();
  int64_t threads;

  // Calls body(member, size) on every thread of the team and waits for all of them.
  template <class Body> void run(Body &&body) const {
    if (threads <= 1)
      return body(0, 1);
    struct Call {
      Body &body;
      const Team &team;
    } call{body, *this};
    start(
        [](void *p) {
          auto *c = static_cast<Call *>(p);
          c->body(c->team.member(), c->team.size());
        },
        &call, static_cast<unsigned>(threads), 0);
  }
};
static_assert(sizeof(Team) == 32, "library.py mirrors it");

} // namespace fgmp
