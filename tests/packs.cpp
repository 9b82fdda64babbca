// Every function of a Pack against the same one of a float, element by element: equal to the last bit.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu/pack.h"
#include "../csrc/math/numeric.h"

namespace {

using namespace deepfast;
using namespace deepfast::cpu;

constexpr int kWide = kWidth<Pack>;

void require(bool equal, const char* what, double a, double b, double c) {
  if (equal) return;
  std::printf("%s of %a, %a, %a differs\n", what, a, b, c);
  std::exit(1);
}

// What rounding, saturation and comparisons turn on, and a million others, of every exponent.
std::vector<float> values() {
  std::vector<float> found;
  for (const uint32_t at : {0x00000000u, 0x00800000u, 0x33000000u, 0x38800000u, 0x3f800000u, 0x477fe000u, 0x477ff000u,
                            0x5f7fffffu, 0x7f7f0000u, 0x7f7f8000u, 0x7f7fffffu, 0x7f800000u, 0x7fc00000u}) {
    for (int64_t near = -3; near <= 3; ++near) {
      const uint32_t bits = static_cast<uint32_t>(at + near) & 0x7fffffffu;
      found.push_back(from_bits(bits));
      found.push_back(from_bits(bits | 0x80000000u));
    }
  }
  uint32_t bits = 1;
  for (int i = 0; i < 1 << 20; ++i) found.push_back(from_bits(bits = bits * 1664525u + 1013904223u));
  while (found.size() % kWide) found.push_back(0.0f);
  return found;
}

// Of a NaN, which one it is depends on the order of operands, which is the compiler's.
bool same(float a, float b) { return to_bits(a) == to_bits(b) || (a != a && b != b); }

template <class Formula>
void check(const char* what, const std::vector<float>& x, const Formula& formula) {
  const size_t n = x.size();
  for (size_t i = 0; i < n; i += kWide) {
    const float *a = &x[i], *b = &x[(i * 7 + 16) % n / kWide * kWide], *c = &x[(i * 13 + 64) % n / kWide * kWide];
    float got[kWide];
    store(formula(load(a, Pack()), load(b, Pack()), load(c, Pack())), got);
    for (int k = 0; k < kWide; ++k) require(same(got[k], formula(a[k], b[k], c[k])), what, a[k], b[k], c[k]);
  }
}

template <class Round>
void check_rounding(const char* what, const std::vector<float>& x, const Round& round, uint16_t (*expected)(float)) {
  for (size_t i = 0; i < x.size(); i += kWide) {
    uint16_t got[kWide];
    store(round(load(&x[i], Pack())), got);
    for (int k = 0; k < kWide; ++k) require(got[k] == expected(x[i + k]), what, x[i + k], 0, 0);
  }
}

void check_decoding(const char* what, DType dtype, float (*expected)(uint16_t)) {
  uint16_t halves[kWide];
  for (uint32_t h = 0; h < 1 << 16; h += kWide) {
    float got[kWide];
    for (int k = 0; k < kWide; ++k) halves[k] = static_cast<uint16_t>(h + k);
    store(decode(load(halves, Pack()), dtype), got);
    for (int k = 0; k < kWide; ++k) require(to_bits(got[k]) == to_bits(expected(halves[k])), what, h + k, 0, 0);
  }
}

}  // namespace

int main() {
  const std::vector<float> x = values();
  check("fma", x, [](auto a, auto b, auto c) { return fma(a, b, c); });
  check("+ - *", x, [](auto a, auto b, auto c) { return (a + b) * c - a; });
  check("/", x, [](auto a, auto b, auto) { return a / b; });
  check("sqrt", x, [](auto a, auto, auto) { return sqrt(a); });
  check("magnitude", x, [](auto a, auto, auto) { return magnitude(a); });
  check("larger", x, [](auto a, auto b, auto) { return larger(a, b); });
  check("smaller", x, [](auto a, auto b, auto) { return smaller(a, b); });
  check(">", x, [](auto a, auto b, auto c) { return select(larger(a, b) > b, a, c); });
  check("<=", x, [](auto a, auto b, auto c) { return select(smaller(a, b) <= b, a, c); });
  check("==", x, [](auto a, auto b, auto c) { return select(a == b, b, c); });
  check("!=", x, [](auto a, auto b, auto c) { return select(a != a, b, c); });
  check("cut", x, [](auto a, auto, auto) { return cut(a, Fp16::kLargest); });
  check("squarable", x, [](auto a, auto, auto) { return squarable(a); });
  const auto nearest = [](DType dtype) { return [=](auto a) { return nearest_even(a, dtype); }; };
  const auto weight = [](DType dtype) { return [=](auto a) { return from_master(a, dtype); }; };
  check_rounding("fp16", x, nearest(DType::kFloat16), Fp16::nearest_even);
  check_rounding("bf16", x, nearest(DType::kBFloat16), Bf16::nearest_even);
  check_rounding("a weight's fp16", x, weight(DType::kFloat16), Fp16::from_master);
  check_rounding("a weight's bf16", x, weight(DType::kBFloat16), Bf16::from_master);
  check_decoding("fp16", DType::kFloat16, Fp16::decode);
  check_decoding("bf16", DType::kBFloat16, Bf16::decode);
  std::printf("%d at once\n", kWide);
}
