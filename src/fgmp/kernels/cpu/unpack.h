// Decodes a whole weight, for callers with their own matrix product and for tests.
#pragma once
#include "gemv.h"

namespace {

inline int64_t unpack(const Weight &w, const Matrix &out, const Team &team) {
  Fault fault;
  team.run([&](int member, int size) {
    const Share rows = share(w.n, kRowGrain, member, size);
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      const bool sound = decode_row(w, n, 0, w.blocks(), [&](int64_t g, F16 values) {
        float wide[kBlock];
        store(wide, values);
        const int64_t at = n * w.k + g * kBlock, count = std::min(kBlock, w.k - g * kBlock);
        for (int64_t i = 0; i < count; ++i) {
          if (out.is_bf16)
            static_cast<uint16_t *>(out.data)[at + i] = to_bf16(wide[i]);
          else
            static_cast<float *>(out.data)[at + i] = wide[i];
        }
      });
      if (!sound)
        fault.report(n);
    }
  });
  return fault.row();
}

} // namespace
