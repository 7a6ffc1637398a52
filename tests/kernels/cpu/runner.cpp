// Runs kernels of one instruction set on operands from standard input, for processors that have no
// Python here. Input: int64 n, k, m, n_fp8, threshold, rule; float r; then the planes low, scale,
// row_ptr and overflow (the last two if n_fp8 is not negative), tokens in bf16, fp32 activations and
// sensitivities. Output: the linear in fp32, then units and flags of the activations.
#include "kernels.cpp"
#include <cstdio>
#include <cstdlib>

template <class T> std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count))
    std::exit(1);
  return values;
}

template <class T> void write(const std::vector<T> &values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main() {
  const auto facts = read<int64_t>(6);
  const int64_t n = facts[0], k = facts[1], m = facts[2], n_fp8 = facts[3];
  const float r = read<float>(1)[0];
  const int64_t blocks = (k + 15) / 16;
  auto low = read<uint8_t>(n * blocks * 8), scale = read<uint8_t>(n * blocks);
  auto row_ptr = read<int32_t>(n_fp8 < 0 ? 0 : n + 1);
  auto overflow = read<uint8_t>(n_fp8 < 0 ? 0 : n_fp8 * 8);
  auto tokens = read<uint16_t>(m * k);
  auto x = read<float>(m * k);
  auto sensitivity = read<uint8_t>(k);
  const bool mixed = n_fp8 >= 0;
  const fgmp::Weight w{low.data(), scale.data(), mixed ? overflow.data() : nullptr,
                       mixed ? row_ptr.data() : nullptr, nullptr, n, k, mixed ? n_fp8 : 0};
  std::vector<float> y(m * n);
  const fgmp::Team team{nullptr, nullptr, nullptr, 1};
  const fgmp::Matrix in{tokens.data(), m, k, 1}, out{y.data(), m, n, 0}, wide{x.data(), m, k, 0};
  if (FGMP_NAME(linear)(&w, &in, &out, nullptr, 1.0f, &team) != -1)
    return 2;
  write(y);
  const fgmp::Site site{sensitivity.data(), facts[4], r, static_cast<int32_t>(facts[5])};
  std::vector<uint16_t> units(m * k);
  std::vector<uint8_t> flags(m * blocks);
  FGMP_NAME(fake_quantize)(&wide, &site, units.data(), flags.data(), &team);
  write(units);
  write(flags);
}
