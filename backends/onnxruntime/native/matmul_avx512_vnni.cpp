// The kernels with AVX-512 and VNNI: a tile is one register.

#include "matmul.h"

#ifdef LWC_X86

#include <cstring>
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

namespace lwc {
namespace {

constexpr int kDecodeTiles = 4, kMany = 12, kSome = 6;

using Codes = __m512i;
using Ints = __m512i;
using Floats = __m512;

template <int BITS>
constexpr int32_t shift_of() {
  return 0;
}

inline Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store(uint8_t* to, Codes codes) { _mm512_storeu_si512(to, codes); }

template <int COUNT>
inline Codes shifted(Codes codes) {
  if constexpr (COUNT == 0) return codes;
  if constexpr (COUNT > 0) return _mm512_srli_epi16(codes, COUNT);
  return _mm512_slli_epi16(codes, COUNT < 0 ? -COUNT : 0);
}
template <int MASK>
inline Codes masked(Codes codes) {
  return _mm512_and_si512(codes, _mm512_set1_epi8(MASK));
}
inline Codes merged(Codes codes, Codes others) { return _mm512_or_si512(codes, others); }

// As an instruction: GCC copies the sums of the intrinsic to and from memory in every step.
template <int BITS>
inline void dot(Ints& sums, Codes codes, uint32_t x) {
  const __m512i given = _mm512_set1_epi32(static_cast<int32_t>(x));
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(given));
}

inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints load_bytes(const uint8_t* from, int32_t less) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), ints(less));
}
inline Ints times(Ints a, int32_t factor) { return _mm512_mullo_epi32(a, ints(factor)); }
inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }

inline Floats floats(float value) { return _mm512_set1_ps(value); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats scaled(Floats a, float factor) { return _mm512_mul_ps(a, floats(factor)); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }

}  // namespace

#define NAME kAvx512Vnni
#define LABEL "avx512-vnni"
#include "matmul.inc"

}  // namespace lwc

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
