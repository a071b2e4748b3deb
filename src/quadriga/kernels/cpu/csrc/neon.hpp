// simd.hpp's names on 64-bit ARM: sixteen lanes are four registers. QD_NEON has byte products (dotprod), QD_I8MM besides them
// products of unsigned with signed bytes (i8mm) and bf16. Every operation rounds as its x86 namesake does, NaN included.
#pragma once
#include <arm_neon.h>

namespace {

struct vf { float32x4_t a, b, c, d; };
struct vi { int32x4_t a, b, c, d; };
struct vb { uint8x16_t a, b, c, d; };

#define QD_FOUR(type, name, part) \
  QD_INLINE type name(type x, type y) { return {part(x.a, y.a), part(x.b, y.b), part(x.c, y.c), part(x.d, y.d)}; }
#define QD_FOUR_FROM(to, name, from, part) \
  QD_INLINE to name(from x) { return {part(x.a), part(x.b), part(x.c), part(x.d)}; }

QD_INLINE vf load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
QD_INLINE void store(float* p, vf x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d); }
QD_INLINE vi load_int(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
QD_INLINE void store_int(int32_t* p, vi x) { vst1q_s32(p, x.a), vst1q_s32(p + 4, x.b), vst1q_s32(p + 8, x.c), vst1q_s32(p + 12, x.d); }
QD_INLINE vb load_bytes(const void* at) {
  const uint8_t* p = static_cast<const uint8_t*>(at);
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
QD_INLINE void store_bytes(void* at, vb x) {
  uint8_t* p = static_cast<uint8_t*>(at);
  vst1q_u8(p, x.a), vst1q_u8(p + 16, x.b), vst1q_u8(p + 32, x.c), vst1q_u8(p + 48, x.d);
}
QD_INLINE vf all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
QD_INLINE vi all_int(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
QD_INLINE float32x4_t larger_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
QD_INLINE float32x4_t smaller_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
QD_FOUR(vf, operator+, vaddq_f32)
QD_FOUR(vf, operator-, vsubq_f32)
QD_FOUR(vf, operator*, vmulq_f32)
QD_FOUR(vf, operator/, vdivq_f32)
QD_FOUR(vf, vmax, larger_of)
QD_FOUR(vf, vmin, smaller_of)
QD_FOUR(vi, operator+, vaddq_s32)
QD_FOUR(vi, operator|, vorrq_s32)
QD_FOUR(vi, operator&, vandq_s32)
QD_INLINE vf fma(vf x, vf y, vf z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
QD_FOUR_FROM(vf, vabs, vf, vabsq_f32)
QD_FOUR_FROM(vf, nearest, vf, vrndnq_f32)
QD_INLINE float32x4_t greater_part(float32x4_t x, float32x4_t y, float32x4_t yes, float32x4_t no) {
  return vbslq_f32(vcgtq_f32(x, y), yes, no);
}
QD_INLINE vf greater_select(vf x, vf y, vf yes, vf no) {
  return {greater_part(x.a, y.a, yes.a, no.a), greater_part(x.b, y.b, yes.b, no.b), greater_part(x.c, y.c, yes.c, no.c),
          greater_part(x.d, y.d, yes.d, no.d)};
}
// Out of range and NaN give INT_MIN, as x86's instruction does.
QD_INLINE int32x4_t to_int_part(float32x4_t x) {
  const uint32x4_t fits = vcaltq_f32(x, vdupq_n_f32(2147483648.0f));
  return vbslq_s32(fits, vcvtnq_s32_f32(x), vdupq_n_s32(INT32_MIN));
}
QD_FOUR_FROM(vi, to_int, vf, to_int_part)
QD_FOUR_FROM(vf, to_float, vi, vcvtq_f32_s32)
template <int n> QD_INLINE vi shift_left(vi x) { return {vshlq_n_s32(x.a, n), vshlq_n_s32(x.b, n), vshlq_n_s32(x.c, n), vshlq_n_s32(x.d, n)}; }
template <int n> QD_INLINE int32x4_t zeros_from_the_left(int32x4_t x) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), n)); }
template <int n> QD_FOUR_FROM(vi, shift_right, vi, zeros_from_the_left<n>)
QD_FOUR_FROM(vi, as_int, vf, vreinterpretq_s32_f32)
QD_FOUR_FROM(vf, as_float, vi, vreinterpretq_f32_s32)
QD_FOUR_FROM(vi, bytes_as_int, vb, vreinterpretq_s32_u8)
QD_INLINE vf load_half(const uint16_t* p) {
  const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p)), y = vreinterpretq_f16_u16(vld1q_u16(p + 8));
  return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x), vcvt_f32_f16(vget_low_f16(y)), vcvt_high_f32_f16(y)};
}
QD_INLINE void store_half(uint16_t* p, vf x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
  vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
QD_INLINE vi widened(int16x8_t x, int16x8_t y) {
  return {vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x), vmovl_s16(vget_low_s16(y)), vmovl_high_s16(y)};
}
QD_INLINE vf load_int8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  return to_float(widened(vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)));
}
QD_INLINE vi load_uint8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  return widened(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_high_u8(x)));
}
// The tree of _mm512_reduce_add_ps: halves, quarters, pairs, neighbours.
QD_INLINE float sum(vf x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  return vpadds_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)));
}
QD_INLINE float largest(vf x) {
  const float32x4_t q = larger_of(larger_of(x.a, x.c), larger_of(x.b, x.d));
  const float first = vgetq_lane_f32(q, 0) > vgetq_lane_f32(q, 2) ? vgetq_lane_f32(q, 0) : vgetq_lane_f32(q, 2);
  const float second = vgetq_lane_f32(q, 1) > vgetq_lane_f32(q, 3) ? vgetq_lane_f32(q, 1) : vgetq_lane_f32(q, 3);
  return first > second ? first : second;
}
QD_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Bytes -----------------------------------------------------------------------------------------------------------------

constexpr int kNibbleShift = 0;  // nibbles as numbers from 0 to 15
QD_INLINE uint8x16_t low_part(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(15)); }
QD_INLINE uint8x16_t high_part(uint8x16_t x) { return vshrq_n_u8(x, 4); }
QD_INLINE uint8x16_t flipped(uint8x16_t x) { return veorq_u8(x, vdupq_n_u8(128)); }
QD_FOUR_FROM(vb, low_nibbles, vb, low_part)
QD_FOUR_FROM(vb, high_nibbles, vb, high_part)
QD_FOUR_FROM(vb, flip_signs, vb, flipped)
#if QD_I8MM
// acc[lane] += sum over 4 of unsigned weight byte * signed activation byte
QD_INLINE vi dot4(vi acc, vb w, uint32_t a) {
  const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(a));
  return {vusdotq_s32(acc.a, w.a, x), vusdotq_s32(acc.b, w.b, x), vusdotq_s32(acc.c, w.c, x), vusdotq_s32(acc.d, w.d, x)};
}
#else  // 8-bit weights are made signed on the way, and need no zero point then; bytes below 128 are the same either way
QD_INLINE int32x4_t signed_part(int32x4_t acc, uint8x16_t w, int8x16_t a) { return vdotq_s32(acc, vreinterpretq_s8_u8(w), a); }
// acc[lane] += sum over 4 of weight byte * activation byte, both signed
QD_INLINE vi dot4_signed(vi acc, vb w, uint32_t a) {
  const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(a));
  return {signed_part(acc.a, w.a, x), signed_part(acc.b, w.b, x), signed_part(acc.c, w.c, x), signed_part(acc.d, w.d, x)};
}
constexpr bool kSignedBytes = true;
using vq = vb;
using vn = vi;
QD_INLINE vq bytes_line(const void* p) { return flip_signs(load_bytes(p)); }
QD_INLINE vi dot_bytes(vi acc, vq w, uint32_t a) { return dot4_signed(acc, w, a); }
QD_INLINE vn begin_nibbles(vi start) { return start; }
QD_INLINE vn dot_nibbles(vn acc, vb w, uint32_t a) { return dot4_signed(acc, w, a); }
QD_INLINE vi end_nibbles(vn acc, vi) { return acc; }
#endif

// bf16 ------------------------------------------------------------------------------------------------------------------

#if QD_I8MM  // the long products round once each, odd and even, as two fused ones do; bfdot would round otherwise
QD_INLINE float32x4_t dot2_part(float32x4_t acc, uint8x16_t w, bfloat16x8_t a) {
  const bfloat16x8_t x = vreinterpretq_bf16_u8(w);
  return vbfmlalbq_f32(vbfmlaltq_f32(acc, x, a), x, a);
}
QD_INLINE vf dot2(vf acc, vb w, uint32_t a) {
  const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(a));
  return {dot2_part(acc.a, w.a, x), dot2_part(acc.b, w.b, x), dot2_part(acc.c, w.c, x), dot2_part(acc.d, w.d, x)};
}
#else
QD_INLINE float32x4_t dot2_part(float32x4_t acc, uint8x16_t w, float even, float odd) {
  const uint32x4_t x = vreinterpretq_u32_u8(w);
  acc = vfmaq_n_f32(acc, vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))), odd);
  return vfmaq_n_f32(acc, vreinterpretq_f32_u32(vshlq_n_u32(x, 16)), even);
}
QD_INLINE vf dot2(vf acc, vb w, uint32_t a) {
  const float even = bf16_to_float(uint16_t(a)), odd = bf16_to_float(uint16_t(a >> 16));
  return {dot2_part(acc.a, w.a, even, odd), dot2_part(acc.b, w.b, even, odd), dot2_part(acc.c, w.c, even, odd), dot2_part(acc.d, w.d, even, odd)};
}
#endif
QD_INLINE float32x4_t from_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
QD_INLINE vf load_bf16(const uint16_t* p) {
  return {from_bf16(vld1_u16(p)), from_bf16(vld1_u16(p + 4)), from_bf16(vld1_u16(p + 8)), from_bf16(vld1_u16(p + 12))};
}
// Round to nearest even; what is no number stays so.
QD_INLINE uint16x4_t to_bf16(float32x4_t x) {
#if QD_I8MM
  return vreinterpret_u16_bf16(vcvt_bf16_f32(x));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(bits, vdupq_n_u32(64u << 16))), 16);
#endif
}
QD_INLINE void store_bf16(uint16_t* p, vf x) {
  vst1_u16(p, to_bf16(x.a)), vst1_u16(p + 4, to_bf16(x.b)), vst1_u16(p + 8, to_bf16(x.c)), vst1_u16(p + 12, to_bf16(x.d));
}

// Four by four: x[i] lane j becomes x[j] lane i.
QD_INLINE void turn(float32x4_t& w, float32x4_t& x, float32x4_t& y, float32x4_t& z) {
  const float64x2_t p = vreinterpretq_f64_f32(vtrn1q_f32(w, x)), q = vreinterpretq_f64_f32(vtrn2q_f32(w, x));
  const float64x2_t r = vreinterpretq_f64_f32(vtrn1q_f32(y, z)), s = vreinterpretq_f64_f32(vtrn2q_f32(y, z));
  w = vreinterpretq_f32_f64(vtrn1q_f64(p, r)), x = vreinterpretq_f32_f64(vtrn1q_f64(q, s));
  y = vreinterpretq_f32_f64(vtrn2q_f64(p, r)), z = vreinterpretq_f32_f64(vtrn2q_f64(q, s));
}
// x[i] lane j becomes x[j] lane i
QD_INLINE void transpose(vf* x) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    turn(x[i].a, x[i + 1].a, x[i + 2].a, x[i + 3].a), turn(x[i].b, x[i + 1].b, x[i + 2].b, x[i + 3].b);
    turn(x[i].c, x[i + 1].c, x[i + 2].c, x[i + 3].c), turn(x[i].d, x[i + 1].d, x[i + 2].d, x[i + 3].d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // the blocks beside the diagonal change places
    std::swap(x[i].b, x[4 + i].a), std::swap(x[i].c, x[8 + i].a), std::swap(x[i].d, x[12 + i].a);
    std::swap(x[4 + i].c, x[8 + i].b), std::swap(x[4 + i].d, x[12 + i].b), std::swap(x[8 + i].d, x[12 + i].c);
  }
}

// Lanes whose mask is set, as bits.
QD_INLINE uint32_t mask_bits(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  const uint16x8_t low = vcombine_u16(vmovn_u32(a), vmovn_u32(b)), high = vcombine_u16(vmovn_u32(c), vmovn_u32(d));
  const uint8x16_t places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bits = vandq_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high)), places);
  return uint32_t(vaddv_u8(vget_low_u8(bits))) | uint32_t(vaddv_u8(vget_high_u8(bits))) << 8;
}

}  // namespace
