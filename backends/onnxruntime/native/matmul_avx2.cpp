// The kernels with AVX2: a tile is two registers of eight columns.

#include "matmul.h"

#ifdef LWC_X86

#include <cstring>
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lwc {
namespace {

constexpr int kDecodeTiles = 2, kMany = 4, kSome = 2;

struct Codes {
  __m256i left, right;
};
struct Ints {
  __m256i left, right;
};
struct Floats {
  __m256 left, right;
};

// vpmaddubsw adds two products in 16 bits and saturates: 2 * 255 * 127 does not fit, 2 * 128 * 127
// does. So codes of 8 bits are taken less 128, and their sign goes to x.
template <int BITS>
constexpr int32_t shift_of() {
  return BITS == 8 ? 128 : 0;
}

inline __m256i load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Codes load_codes(const uint8_t* from) { return {load(from), load(from + 32)}; }
inline void store(uint8_t* to, Codes codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes.left);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), codes.right);
}

template <int COUNT>
inline __m256i moved(__m256i codes) {
  if constexpr (COUNT == 0) return codes;
  if constexpr (COUNT > 0) return _mm256_srli_epi16(codes, COUNT);
  return _mm256_slli_epi16(codes, COUNT < 0 ? -COUNT : 0);
}
template <int COUNT>
inline Codes shifted(Codes codes) {
  return {moved<COUNT>(codes.left), moved<COUNT>(codes.right)};
}
template <int MASK>
inline Codes masked(Codes codes) {
  const __m256i mask = _mm256_set1_epi8(MASK);
  return {_mm256_and_si256(codes.left, mask), _mm256_and_si256(codes.right, mask)};
}
inline Codes merged(Codes codes, Codes others) {
  return {_mm256_or_si256(codes.left, others.left), _mm256_or_si256(codes.right, others.right)};
}

template <int BITS>
inline __m256i added(__m256i sums, __m256i codes, __m256i x) {
  __m256i pairs;
  if constexpr (BITS == 8) {
    const __m256i less = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(x, less));
  } else {
    pairs = _mm256_maddubs_epi16(codes, x);
  }
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int BITS>
inline void dot(Ints& sums, Codes codes, uint32_t x) {
  const __m256i given = _mm256_set1_epi32(static_cast<int32_t>(x));
  sums.left = added<BITS>(sums.left, codes.left, given);
  sums.right = added<BITS>(sums.right, codes.right, given);
}

inline Ints ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints minus(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.left, b.left), _mm256_sub_epi32(a.right, b.right)};
}
inline Ints load_bytes(const uint8_t* from, int32_t less) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const Ints wide = {_mm256_cvtepu8_epi32(bytes),
                     _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
  return minus(wide, ints(less));
}
inline Ints times(Ints a, int32_t factor) {
  const __m256i wide = _mm256_set1_epi32(factor);
  return {_mm256_mullo_epi32(a.left, wide), _mm256_mullo_epi32(a.right, wide)};
}

inline Floats floats(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats to_floats(Ints a) {
  return {_mm256_cvtepi32_ps(a.left), _mm256_cvtepi32_ps(a.right)};
}
inline Floats load_floats(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline Floats load_half(const uint16_t* from) {
  const auto* const at = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
inline Floats scaled(Floats a, float factor) {
  const __m256 wide = _mm256_set1_ps(factor);
  return {_mm256_mul_ps(a.left, wide), _mm256_mul_ps(a.right, wide)};
}
inline Floats fused(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.left, b.left, c.left), _mm256_fmadd_ps(a.right, b.right, c.right)};
}
inline void store(float* to, Floats a) {
  _mm256_storeu_ps(to, a.left);
  _mm256_storeu_ps(to + 8, a.right);
}

}  // namespace

#define NAME kAvx2
#define LABEL "avx2"
#include "matmul.inc"

}  // namespace lwc

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
