// Weights of few bits as bytes: codes of four bits looked up, bits put together, and their products with bytes of activations;
// in the instruction sets of simd.hpp.
#pragma once
#include "layout.hpp"
#include "simd.hpp"

namespace {

#if QD_AVX512

// Codes of four bits as bytes: C::zero + their numbers.
template <class C> QD_INLINE vb code_bytes(__m512i n) {
  const __m128i numbers = _mm_add_epi8(_mm_loadu_si128((const __m128i*)C::numbers), _mm_set1_epi8(char(C::zero)));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(numbers), _mm512_and_si512(n, _mm512_set1_epi8(15)))};
}
template <class C> QD_INLINE vb low_codes(vb a) { return code_bytes<C>(a.v); }
template <class C> QD_INLINE vb high_codes(vb a) { return code_bytes<C>(_mm512_srli_epi16(a.v, 4)); }
// Bits of bytes moved, those of the neighbours too: mask what comes of it.
template <int n> QD_INLINE vb move_bits(vb a) { return {n >= 0 ? _mm512_slli_epi16(a.v, n & 15) : _mm512_srli_epi16(a.v, -n & 15)}; }
QD_INLINE vb only(vb a, uint8_t bits) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(bits)))}; }
QD_INLINE vb with_bits(vb a, vb b, uint8_t bits) {  // a | (b & bits)
  return {_mm512_ternarylogic_epi32(a.v, b.v, _mm512_set1_epi8(char(bits)), 0xf8)};
}
QD_INLINE vi load_uint8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }

#elif QD_AVX2

template <int n> QD_INLINE vb move_bits(vb x) {
  return n >= 0 ? vb{_mm256_slli_epi16(x.a, n & 15), _mm256_slli_epi16(x.b, n & 15)}
                : vb{_mm256_srli_epi16(x.a, -n & 15), _mm256_srli_epi16(x.b, -n & 15)};
}
QD_INLINE vb only(vb x, uint8_t bits) {
  const __m256i mask = _mm256_set1_epi8(char(bits));
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
QD_INLINE vb with_bits(vb x, vb y, uint8_t bits) {
  const vb chosen = only(y, bits);
  return {_mm256_or_si256(x.a, chosen.a), _mm256_or_si256(x.b, chosen.b)};
}
QD_INLINE vi load_uint8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
// Two units of weights up to 63: their sums fit in 16 bits (63 * 127 * 4 = 32004) and are widened together.
QD_INLINE __m256i dot_two_half(__m256i acc, __m256i w0, __m256i w1, __m256i a0, __m256i a1) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, a0), _mm256_maddubs_epi16(w1, a1));
  return stay(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
QD_INLINE vi dot_two(vi acc, const vb* w, uint32_t a0, uint32_t a1) {
  const __m256i x0 = _mm256_set1_epi32(int(a0)), x1 = _mm256_set1_epi32(int(a1));
  return {dot_two_half(acc.a, w[0].a, w[1].a, x0, x1), dot_two_half(acc.b, w[0].b, w[1].b, x0, x1)};
}
// Codes of four bits as their numbers.
template <class C> QD_INLINE vq code_bytes(vb n) {
  const __m256i numbers = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)C::numbers));
  const vb w = {_mm256_shuffle_epi8(numbers, n.a), _mm256_shuffle_epi8(numbers, n.b)};
  return {{_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}, w};
}
// A group's eight lines of E2M1's fit in 16 bits as well: 12 * 127 * 2 * 8 = 24384.
QD_INLINE __m256i dot_code_half(__m256i acc, __m256i magnitude, __m256i sign, __m256i a) {
  return stay(_mm256_add_epi16(acc, _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, sign))));
}
QD_INLINE vn dot_codes(vn acc, vq w, uint32_t a) {
  const __m256i x = _mm256_set1_epi32(int(a));
  return {dot_code_half(acc.a, w.magnitude.a, w.sign.a, x), dot_code_half(acc.b, w.magnitude.b, w.sign.b, x)};
}
template <class C> QD_INLINE vq low_codes(vb x) { return code_bytes<C>(low_nibbles(x)); }
template <class C> QD_INLINE vq high_codes(vb x) { return code_bytes<C>(high_nibbles(x)); }
QD_INLINE vb bytes_of_codes(vq w) {  // for bytes_line
  const __m256i flip = _mm256_set1_epi8(char(0x80));
  return {_mm256_xor_si256(w.sign.a, flip), _mm256_xor_si256(w.sign.b, flip)};
}

#elif QD_NEON

// Codes of four bits as bytes: their numbers, or C::zero + their numbers where products want unsigned bytes.
template <class C> QD_INLINE vb code_bytes(vb n) {
  const uint8x16_t numbers = vaddq_u8(vreinterpretq_u8_s8(vld1q_s8(C::numbers)), vdupq_n_u8(kSignedBytes ? 0 : C::zero));
  return {vqtbl1q_u8(numbers, n.a), vqtbl1q_u8(numbers, n.b), vqtbl1q_u8(numbers, n.c), vqtbl1q_u8(numbers, n.d)};
}
template <class C> QD_INLINE vb low_codes(vb x) { return code_bytes<C>(low_nibbles(x)); }
template <class C> QD_INLINE vb high_codes(vb x) { return code_bytes<C>(high_nibbles(x)); }
template <int n> QD_INLINE uint8x16_t moved(uint8x16_t x) {
  if constexpr (n >= 0) return vshlq_n_u8(x, n);
  else return vshrq_n_u8(x, -n);
}
template <int n> QD_FOUR_FROM(vb, move_bits, vb, moved<n>)
QD_INLINE vb only(vb x, uint8_t bits) {
  const uint8x16_t mask = vdupq_n_u8(bits);
  return {vandq_u8(x.a, mask), vandq_u8(x.b, mask), vandq_u8(x.c, mask), vandq_u8(x.d, mask)};
}
QD_INLINE vb with_bits(vb x, vb y, uint8_t bits) {  // x has none of them yet
  const uint8x16_t mask = vdupq_n_u8(bits);
  return {vbslq_u8(mask, y.a, x.a), vbslq_u8(mask, y.b, x.b), vbslq_u8(mask, y.c, x.c), vbslq_u8(mask, y.d, x.d)};
}
QD_INLINE vb bytes_of_codes(vq w) { return kSignedBytes ? flip_signs(w) : w; }  // for bytes_line

#else

template <class C> QD_INLINE vb code_bytes(Units n) {
  uint8_t bytes[64];
  std::memcpy(bytes, &n, 64);
  for (uint8_t& byte : bytes) byte = uint8_t(C::zero + C::numbers[byte & 15]);
  std::memcpy(&n, bytes, 64);
  return {n};
}
template <class C> QD_INLINE vb low_codes(vb a) { return code_bytes<C>(a.v); }
template <class C> QD_INLINE vb high_codes(vb a) { return code_bytes<C>(a.v >> 4); }
template <int n> QD_INLINE vb move_bits(vb a) { return {n >= 0 ? a.v << (n & 31) : a.v >> (-n & 31)}; }
QD_INLINE vb only(vb a, uint8_t bits) { return {a.v & bits * 0x01010101u}; }
QD_INLINE vb with_bits(vb a, vb b, uint8_t bits) { return {a.v | only(b, bits).v}; }
QD_INLINE vi load_uint8(const uint8_t* p) { vi r; QD_LANES r.v[i] = p[i]; return r; }

#endif

#if !QD_AVX2 && !QD_NEON
QD_INLINE vn dot_codes(vn acc, vq w, uint32_t a) { return dot4(acc, w, a); }
QD_INLINE vb bytes_of_codes(vq w) { return w; }
QD_INLINE vi dot_two(vi acc, const vb* w, uint32_t a0, uint32_t a1) { return dot4(dot4(acc, w[0], a0), w[1], a1); }
#endif

}  // namespace
