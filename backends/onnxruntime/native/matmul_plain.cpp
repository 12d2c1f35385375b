// The kernels in plain C++, for any processor: what the others must agree with.

#include "matmul.h"

#include <cstring>

namespace lwc {
namespace {

constexpr int kDecodeTiles = 2, kMany = 4, kSome = 4;  // tiles and rows of a block

struct Codes {
  uint8_t at[64];
};
struct Ints {
  int32_t at[kTile];
};
struct Floats {
  float at[kTile];
};

template <int BITS>
constexpr int32_t shift_of() {
  return 0;
}

inline Codes load_codes(const uint8_t* from) {
  Codes codes;
  memcpy(codes.at, from, 64);
  return codes;
}
inline void store(uint8_t* to, const Codes& codes) { memcpy(to, codes.at, 64); }

// Right by COUNT, or left where it is negative; bits may come over from the neighbour in each two.
template <int COUNT>
inline Codes shifted(Codes codes) {
  for (uint8_t& byte : codes.at)
    byte = COUNT >= 0 ? byte >> (COUNT >= 0 ? COUNT : 0) : byte << (COUNT < 0 ? -COUNT : 0);
  return codes;
}
template <int MASK>
inline Codes masked(Codes codes) {
  for (uint8_t& byte : codes.at) byte &= MASK;
  return codes;
}
inline Codes merged(Codes codes, const Codes& others) {
  for (int i = 0; i < 64; ++i) codes.at[i] |= others.at[i];
  return codes;
}

// Adds, for each column, its four codes times the four bytes of x.
template <int BITS>
inline void dot(Ints& sums, const Codes& codes, uint32_t x) {
  int8_t given[4];
  memcpy(given, &x, 4);
  for (int i = 0; i < 64; ++i) sums.at[i / 4] += codes.at[i] * given[i % 4];
}

inline Ints ints(int32_t value) {
  Ints result;
  for (int32_t& each : result.at) each = value;
  return result;
}
inline Ints no_ints() { return ints(0); }
inline Ints load_bytes(const uint8_t* from, int32_t less) {
  Ints result;
  for (int i = 0; i < kTile; ++i) result.at[i] = from[i] - less;
  return result;
}
inline Ints times(Ints a, int32_t factor) {
  for (int32_t& each : a.at) each *= factor;
  return a;
}
inline Ints minus(Ints a, const Ints& b) {
  for (int i = 0; i < kTile; ++i) a.at[i] -= b.at[i];
  return a;
}

inline Floats floats(float value) {
  Floats result;
  for (float& each : result.at) each = value;
  return result;
}
inline Floats to_floats(const Ints& a) {
  Floats result;
  for (int i = 0; i < kTile; ++i) result.at[i] = static_cast<float>(a.at[i]);
  return result;
}
inline Floats load_floats(const float* from) {
  Floats result;
  memcpy(result.at, from, sizeof(result.at));
  return result;
}
inline float half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  uint32_t wide = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  float value;
  memcpy(&value, &wide, 4);
  if (exponent != 0) return value;
  value = static_cast<float>(fraction) * 5.9604645e-8f;  // 2^-24
  return sign ? -value : value;
}
inline Floats load_half(const uint16_t* from) {
  Floats result;
  for (int i = 0; i < kTile; ++i) result.at[i] = half(from[i]);
  return result;
}
inline Floats scaled(Floats a, float factor) {
  for (float& each : a.at) each *= factor;
  return a;
}
inline Floats fused(const Floats& a, const Floats& b, Floats c) {
  for (int i = 0; i < kTile; ++i) c.at[i] += a.at[i] * b.at[i];
  return c;
}
inline void store(float* to, const Floats& a) { memcpy(to, a.at, sizeof(a.at)); }

}  // namespace

#define NAME kPlain
#define LABEL "plain"
#include "matmul.inc"

}  // namespace lwc
