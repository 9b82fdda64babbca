// Every function of a Pack against the same one of a float, element by element: equal to the last bit.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu/int8.h"
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

// A weight and its remainder: every weight beside many remainders, and what many values leave beside them.
template <class Master, class Half>
void check_split(const char* what, const std::vector<float>& x, DType dtype) {
  uint16_t halves[kWide], remainders[kWide], got[kWide];
  uint32_t random = 1;
  for (uint32_t h = 0; h < 1 << 20; h += kWide) {
    float decoded[kWide];
    for (int k = 0; k < kWide; ++k) {
      halves[k] = static_cast<uint16_t>(h + k);
      remainders[k] = static_cast<uint16_t>((random = random * 1664525u + 1013904223u) >> 16);
    }
    store(decode_split(load(halves, Pack()), load(remainders, Pack()), dtype), decoded);
    for (int k = 0; k < kWide; ++k) {
      require(same(decoded[k], Master::decode(halves[k], remainders[k])), what, halves[k], remainders[k], decoded[k]);
    }
  }
  for (size_t i = 0; i < x.size(); i += kWide) {
    const auto wide = load(&x[i], Pack());
    store(remainder(wide, from_master(wide, dtype), dtype), got);
    for (int k = 0; k < kWide; ++k) {
      const float one = x[i + k];
      require(got[k] == static_cast<uint16_t>(Master::remainder(one, Half::from_master(one))), what, one, got[k], 0);
    }
  }
}

template <class Half>
void check_chance(const char* what, const std::vector<float>& x, DType dtype) {
  const Noise noise = Noise::of(3, 7);
  for (size_t i = 0; i < x.size(); i += kWide) {
    uint16_t got[kWide];
    const uint32_t first = static_cast<uint32_t>(i * 2654435761u);
    store(stochastic(load(&x[i], Pack()), noise, first, dtype), got);
    for (int k = 0; k < kWide; ++k) {
      const uint32_t chance = noise.bits(first + static_cast<uint32_t>(k)) >> 16;
      require(got[k] == Half::stochastic(x[i + k], chance), what, x[i + k], chance, got[k]);
    }
  }
}

// Groups of values of every size, in 8 bits and back.
template <bool kSigned>
void check_groups(const char* what, const std::vector<float>& x) {
  const Dither dither = Dither::of(3, 7, 1);
  alignas(64) float values[kGroup], decoded[kGroup];
  for (size_t i = 0; i + kGroup <= x.size(); i += kGroup) {
    uint8_t codes[kGroup];
    uint16_t word;
    uint32_t greatest = 0, negated = 0;
    const float scale = i % 3 ? 1.0f : 0x1p-60f;
    for (int k = 0; k < kGroup; ++k) {
      // A few of any size; else within some octaves of each other, as moments are.
      const float near = from_bits((to_bits(x[i]) & 0x7f800000u) ^ (to_bits(x[i + k]) & 0x83ffffffu));
      values[k] = (i % 5 ? near : x[i + k]) * scale;
      if (!kSigned) values[k] = magnitude(values[k]);
      const uint32_t size = to_bits(magnitude(values[k]));
      greatest = greater(greatest, size);
      negated = greater(negated, 0u - size);
    }
    const Groups groups = {codes, &word};
    groups.encode_from<kSigned>(values, 1, dither, static_cast<uint32_t>(i));
    require(word == Int8<kSigned>::word_of(greatest, negated), what, greatest, negated, word);
    const auto form = Int8<kSigned>::of(word);
    groups.decode_to<kSigned>(decoded, 1);
    for (int k = 0; k < kGroup; ++k) {
      require(codes[k] == form.encode(values[k], dither.bits(static_cast<uint32_t>(i + k))), what, values[k], word, k);
      require(to_bits(decoded[k]) == to_bits(form.decode(codes[k])), what, codes[k], word, decoded[k]);
    }
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
  check_split<SplitFp16, Fp16>("a split fp16", x, DType::kFloat16);
  check_split<SplitBf16, Bf16>("a split bf16", x, DType::kBFloat16);
  check_chance<Fp16>("fp16 by chance", x, DType::kFloat16);
  check_chance<Bf16>("bf16 by chance", x, DType::kBFloat16);
  check_groups<true>("a signed group", x);
  check_groups<false>("a group that is never negative", x);
  std::printf("%d at once\n", kWide);
}
