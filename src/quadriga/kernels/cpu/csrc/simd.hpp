// Sixteen lanes of arithmetic, in five instruction sets behind one set of names.
//
//   vf  16 x float32      vi  16 x int32      vb  64 raw bytes
//
// Which one is compiled is chosen by the macros QD_AVX512, QD_AVX2, QD_NEON (of 64-bit ARM, with QD_I8MM too where it is
// there) or none (portable); kernels.cpp is built once for each. Sums are taken in the same order everywhere, so a result
// depends on the instruction set only where it has no fused multiply-add (portable).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if QD_AVX512 || QD_AVX2
#include <immintrin.h>
#endif

#define QD_INLINE static inline __attribute__((always_inline))
#if QD_AVX512 || QD_AVX2 || QD_NEON
#define QD_LARGE QD_INLINE
#else
#define QD_LARGE static __attribute__((noinline, unused))  // plain C++ of 64 bytes is long: written out once, not at every use
#endif

namespace {  // one private copy per instruction set

QD_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float tiny = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; finite numbers beyond 65504 become infinite, as the hardware has it.
QD_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal half: adding 0.5 lets the float unit round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    std::memcpy(&rest, &magnitude, 4);
    return uint16_t(sign | (rest - 0x3f000000));
  }
  rest += 0xfff + ((rest >> 13) & 1);
  return uint16_t(sign | ((rest - 0x38000000) >> 13));
}

QD_INLINE float bf16_to_float(uint16_t b) {
  uint32_t bits = uint32_t(b) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

QD_INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 64);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Two floats as one unit of a bf16 panel, the first in the low half.
QD_INLINE uint32_t bf16_pair(float low, float high) {
  return uint32_t(float_to_bf16(low)) | uint32_t(float_to_bf16(high)) << 16;
}

#if QD_NEON
}  // namespace
#include "neon.hpp"
namespace {

#elif QD_AVX512

struct vf { __m512 v; };
struct vi { __m512i v; };
struct vb { __m512i v; };

QD_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
QD_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
QD_INLINE vi load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
QD_INLINE void store_int(int32_t* p, vi a) { _mm512_storeu_si512(p, a.v); }
QD_INLINE vb load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
QD_INLINE void store_bytes(void* p, vb a) { _mm512_storeu_si512(p, a.v); }
QD_INLINE vf all(float x) { return {_mm512_set1_ps(x)}; }
QD_INLINE vi all_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
QD_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
QD_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
QD_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
QD_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
QD_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QD_INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
QD_INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
QD_INLINE vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
QD_INLINE vf nearest(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
QD_INLINE vf greater_select(vf a, vf b, vf yes, vf no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
QD_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
QD_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
QD_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
QD_INLINE vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
QD_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n> QD_INLINE vi shift_left(vi a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> QD_INLINE vi shift_right(vi a) { return {_mm512_srli_epi32(a.v, n)}; }  // zeros come in
QD_INLINE vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
QD_INLINE vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }
QD_INLINE vi bytes_as_int(vb a) { return {a.v}; }
QD_INLINE vf load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
QD_INLINE void store_half(uint16_t* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QD_INLINE vf load_int8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
QD_INLINE float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
QD_INLINE float largest(vf a) { return _mm512_reduce_max_ps(a.v); }

// acc[lane] += sum over 4 of unsigned weight byte * signed activation byte
QD_INLINE vi dot4(vi acc, vb w, uint32_t a) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(int(a)))}; }
// acc[lane] += sum over 2 of bf16 * bf16
QD_INLINE vf dot2(vf acc, vb w, uint32_t a) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(int(a)))};
}
// High nibbles as they stand (16 n), low nibbles moved up.
constexpr int kNibbleShift = 4;
QD_INLINE vb high_nibbles(vb a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(0xf0)))}; }
QD_INLINE vb low_nibbles(vb a) { return {_mm512_and_si512(_mm512_slli_epi16(a.v, 4), _mm512_set1_epi8(char(0xf0)))}; }
QD_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
QD_INLINE vf load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
QD_INLINE void store_bf16(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
// x[i] lane j becomes x[j] lane i
QD_INLINE void transpose(vf* x) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v), a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(a[i]), q = _mm512_castps_pd(a[i + 1]);
    const __m512d r = _mm512_castps_pd(a[i + 2]), s = _mm512_castps_pd(a[i + 3]);
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r)), b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s)), b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88), a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88), x[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    x[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88), x[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

#elif QD_AVX2

struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
struct vb { __m256i a, b; };

#define QD_BOTH(type, name, intrinsic) \
  QD_INLINE type name(type x, type y) { return {intrinsic(x.a, y.a), intrinsic(x.b, y.b)}; }

QD_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QD_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
QD_INLINE vi load_int(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
QD_INLINE void store_int(int32_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
QD_INLINE vb load_bytes(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
QD_INLINE void store_bytes(void* p, vb x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b); }
QD_INLINE vf all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QD_INLINE vi all_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
QD_BOTH(vf, operator+, _mm256_add_ps)
QD_BOTH(vf, operator-, _mm256_sub_ps)
QD_BOTH(vf, operator*, _mm256_mul_ps)
QD_BOTH(vf, operator/, _mm256_div_ps)
QD_BOTH(vf, vmax, _mm256_max_ps)
QD_BOTH(vf, vmin, _mm256_min_ps)
QD_BOTH(vi, operator+, _mm256_add_epi32)
QD_BOTH(vi, operator|, _mm256_or_si256)
QD_BOTH(vi, operator&, _mm256_and_si256)
QD_INLINE vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
QD_INLINE vf vabs(vf x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
QD_INLINE vf nearest(vf x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
QD_INLINE vf greater_select(vf x, vf y, vf yes, vf no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
QD_INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
QD_INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
template <int n> QD_INLINE vi shift_left(vi x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n> QD_INLINE vi shift_right(vi x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
QD_INLINE vi as_int(vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QD_INLINE vf as_float(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
QD_INLINE vi bytes_as_int(vb x) { return {x.a, x.b}; }
QD_INLINE vf load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
QD_INLINE void store_half(uint16_t* p, vf x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, mode)), _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, mode));
}
QD_INLINE vf load_int8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
// The tree of _mm512_reduce_add_ps: halves, quarters, pairs, neighbours.
QD_INLINE float sum(vf x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
QD_INLINE float largest(vf x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
// gcc 12 regroups integer sums until their terms no longer fit the registers; this keeps every sum where it is.
QD_INLINE __m256i stay(__m256i x) {
  asm("" : "+x"(x));
  return x;
}
// The byte product takes unsigned times signed and saturates at 32767, so weights of 8 bits go in as magnitudes up to
// 128 and lend their sign to the activation: 128 * 127 * 2 fits. They need no zero point then.
constexpr bool kSignedBytes = true;
struct vq { vb magnitude, sign; };
QD_INLINE vq bytes_line(const void* p) {
  const __m256i flip = _mm256_set1_epi8(char(0x80));
  const vb u = load_bytes(p), w = {_mm256_xor_si256(u.a, flip), _mm256_xor_si256(u.b, flip)};
  return {{_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}, w};
}
QD_INLINE __m256i dot_half(__m256i acc, __m256i magnitude, __m256i sign, __m256i a) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, sign));
  return stay(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
QD_INLINE vi dot_bytes(vi acc, vq w, uint32_t a) {
  const __m256i x = _mm256_set1_epi32(int(a));
  return {dot_half(acc.a, w.magnitude.a, w.sign.a, x), dot_half(acc.b, w.magnitude.b, w.sign.b, x)};
}
// Nibbles as numbers from 0 to 15: a group's eight lines fit in 16 bits (15 * 127 * 2 * 8 = 30480) and are widened once.
constexpr int kNibbleShift = 0;
struct vn { __m256i a, b; };
QD_INLINE vn begin_nibbles(vi) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
QD_INLINE vn dot_nibbles(vn acc, vb w, uint32_t a) {
  const __m256i x = _mm256_set1_epi32(int(a));
  return {stay(_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x))), stay(_mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x)))};
}
QD_INLINE vi end_nibbles(vn acc, vi start) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(start.a, _mm256_madd_epi16(acc.a, one)), _mm256_add_epi32(start.b, _mm256_madd_epi16(acc.b, one))};
}
QD_INLINE __m256 dot2_half(__m256 acc, __m256i w, __m256 even, __m256 odd) {
  acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000)))), odd, acc);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), even, acc);
}
QD_INLINE vf dot2(vf acc, vb w, uint32_t a) {
  const __m256 even = _mm256_castsi256_ps(_mm256_set1_epi32(int(a << 16)));
  const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(int(a & 0xffff0000)));
  return {dot2_half(acc.a, w.a, even, odd), dot2_half(acc.b, w.b, even, odd)};
}
QD_INLINE vb low_nibbles(vb x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
QD_INLINE vb high_nibbles(vb x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
QD_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#else  // portable: the compiler's own vectors of 64 bytes, which it cuts to what the processor has

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Units __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
struct vf { Floats v; };
struct vi { Ints v; };
struct vb { Units v; };

#define QD_LANES for (int i = 0; i < 16; ++i)
#define QD_EACH(type, name, expression) \
  QD_INLINE type name(type a, type b) { return {expression}; }

QD_INLINE vf load(const float* p) { vf r; std::memcpy(&r, p, 64); return r; }
QD_INLINE void store(float* p, vf a) { std::memcpy(p, &a, 64); }
QD_INLINE vi load_int(const int32_t* p) { vi r; std::memcpy(&r, p, 64); return r; }
QD_INLINE void store_int(int32_t* p, vi a) { std::memcpy(p, &a, 64); }
QD_INLINE vb load_bytes(const void* p) { vb r; std::memcpy(&r, p, 64); return r; }
QD_INLINE void store_bytes(void* p, vb a) { std::memcpy(p, &a, 64); }
QD_INLINE vf all(float x) { return {x - Floats{}}; }  // not 0 + x, which makes -0 into 0
QD_INLINE vi all_int(int32_t x) { return {Ints{} + x}; }
QD_EACH(vf, operator+, a.v + b.v)
QD_EACH(vf, operator-, a.v - b.v)
QD_EACH(vf, operator*, a.v * b.v)
QD_EACH(vf, operator/, a.v / b.v)
QD_EACH(vf, vmax, a.v > b.v ? a.v : b.v)
QD_EACH(vf, vmin, a.v < b.v ? a.v : b.v)
QD_EACH(vi, operator+, Ints(Units(a.v) + Units(b.v)))
QD_EACH(vi, operator|, a.v | b.v)
QD_EACH(vi, operator&, a.v & b.v)
QD_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
QD_INLINE vf vabs(vf a) { return {Floats(Ints(a.v) & 0x7fffffff)}; }
// Adding 1.5 * 2^23 pushes the fraction out, to the nearest even; from 2^22 on it would lose a bit that counts.
QD_INLINE vf nearest(vf a) {
  const Floats shift = Floats{} + 12582912.0f;
  return {vabs(a).v < 4194304.0f ? (a.v + shift) - shift : a.v};
}
QD_INLINE vf greater_select(vf a, vf b, vf yes, vf no) { return {a.v > b.v ? yes.v : no.v}; }
// Out of range and NaN give INT_MIN, as x86's instruction does; a plain cast would be undefined.
QD_INLINE vi to_int(vf a) {
  const Ints fits = vabs(a).v < 2147483648.0f;
  const Floats whole = fits ? nearest(a).v : Floats{};
  return {fits ? __builtin_convertvector(whole, Ints) : Ints{} + INT32_MIN};
}
QD_INLINE vf to_float(vi a) { return {__builtin_convertvector(a.v, Floats)}; }
template <int n> QD_INLINE vi shift_left(vi a) { return {Ints(Units(a.v) << n)}; }
template <int n> QD_INLINE vi shift_right(vi a) { return {Ints(Units(a.v) >> n)}; }
QD_INLINE vi as_int(vf a) { return {Ints(a.v)}; }
QD_INLINE vf as_float(vi a) { return {Floats(a.v)}; }
QD_INLINE vi bytes_as_int(vb a) { return {Ints(a.v)}; }
QD_INLINE vf load_half(const uint16_t* p) { vf r; QD_LANES r.v[i] = half_to_float(p[i]); return r; }
QD_INLINE void store_half(uint16_t* p, vf a) { QD_LANES p[i] = float_to_half(a.v[i]); }
QD_INLINE vf load_int8(const int8_t* p) { vf r; QD_LANES r.v[i] = float(p[i]); return r; }
QD_INLINE float sum(vf a) {
  float x[16];
  store(x, a);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}
QD_INLINE float largest(vf a) {
  float x[16];
  store(x, a);
  float best = x[0];
  QD_LANES best = x[i] > best ? x[i] : best;
  return best;
}
// Two products of 16 bits in every lane: of bytes 0 and 2, of bytes 1 and 3. 255 * -128 fits.
QD_INLINE Ints byte_products(Units w, int8_t low, int8_t high) {
  const Units both = Units{} + (uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16);
  const Ints p = Ints(Shorts(w & 0x00ff00ffu) * Shorts(both));
  return (Ints(Units(p) << 16) >> 16) + (p >> 16);
}
QD_INLINE vi dot4(vi acc, vb w, uint32_t a) {
  int8_t s[4];
  std::memcpy(s, &a, 4);
  return {acc.v + (byte_products(w.v, s[0], s[2]) + byte_products(w.v >> 8, s[1], s[3]))};
}
QD_INLINE vf dot2(vf acc, vb w, uint32_t a) {
  const float even = bf16_to_float(uint16_t(a)), odd = bf16_to_float(uint16_t(a >> 16));
  return {(acc.v + Floats(w.v & 0xffff0000u) * odd) + Floats(w.v << 16) * even};
}
constexpr int kNibbleShift = 4;
QD_INLINE vb high_nibbles(vb a) { return {a.v & 0xf0f0f0f0u}; }
QD_INLINE vb low_nibbles(vb a) { return {a.v << 4 & 0xf0f0f0f0u}; }
QD_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#endif

#if !QD_AVX2 && (!QD_NEON || QD_I8MM)  // one instruction (or expression) for unsigned weights of any size, which starts from the zero point
constexpr bool kSignedBytes = false;
using vq = vb;
using vn = vi;
QD_INLINE vq bytes_line(const void* p) { return load_bytes(p); }
QD_INLINE vi dot_bytes(vi acc, vq w, uint32_t a) { return dot4(acc, w, a); }
QD_INLINE vn begin_nibbles(vi start) { return start; }
QD_INLINE vn dot_nibbles(vn acc, vb w, uint32_t a) { return dot4(acc, w, a); }
QD_INLINE vi end_nibbles(vn acc, vi) { return acc; }
#endif

#if !QD_AVX512 && !QD_NEON
QD_LARGE void store_bf16(uint16_t* p, vf a) {
  float x[16];
  store(x, a);
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(x[i]);
}
QD_LARGE vf load_bf16(const uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = bf16_to_float(p[i]);
  return load(x);
}
QD_LARGE void transpose(vf* x) {
  float rows[16][16], columns[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], x[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < 16; ++i) x[i] = load(columns[i]);
}
#endif

// acc[lane] += float32 weight * activation; the panel unit holds the activation's bits
QD_INLINE vf dot1(vf acc, vb w, uint32_t a) {
  float x;
  std::memcpy(&x, &a, 4);
  return fma(as_float(bytes_as_int(w)), all(x), acc);
}

// One rounding on every instruction set; `fma` has two where the processor has no such instruction.
QD_INLINE vf fused(vf a, vf b, vf c) {
#if QD_AVX512 || QD_AVX2 || QD_NEON
  return fma(a, b, c);
#else
  vf r;
  QD_LANES r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return r;
#endif
}

// e^x to about 2 units in the last place, 0 below -87. Range reduction by ln 2 in two parts, then a degree-6 Taylor
// polynomial in Horner form on [-0.347, 0.347] (remainder 1.2e-7 relative).
template <vf (*mul_add)(vf, vf, vf)>
QD_LARGE vf exponential_by(vf x) {
  const vf clamped = vmin(vmax(x, all(-87.0f)), all(88.0f));
  const vf n = nearest(clamped * all(1.44269504088896341f));
  vf r = mul_add(n, all(-0.693359375f), clamped);
  r = mul_add(n, all(2.12194440e-4f), r);
  vf p = all(1.0f / 720);
  p = mul_add(p, r, all(1.0f / 120));
  p = mul_add(p, r, all(1.0f / 24));
  p = mul_add(p, r, all(1.0f / 6));
  p = mul_add(p, r, all(0.5f));
  p = mul_add(p, r, all(1.0f));
  p = mul_add(p, r, all(1.0f));
  const vf power = as_float(shift_left<23>(to_int(n) + all_int(127)));
  const vf e = p * power;
  return greater_select(all(-87.0f), x, all(0.0f), e);
}
QD_INLINE vf exponential(vf x) { return exponential_by<fma>(x); }

}  // namespace
