// GGUF's block formats as float32. A block's whole numbers come first, as bytes, in the order of the weights; then a scale
// (and a minimum) for each run of 16 or 32 of them is multiplied in. Layouts are stated in quant/blocks.py and
// quant/codebook_blocks.py, and the results are theirs to the bit: every product of a scale and a number is exact in
// float32, so that it does not matter where a compiler fuses it with the minimum's subtraction.

namespace {

struct Numbers {
  alignas(64) int8_t q[256];
  float scale[16], minimum[16];
};

QD_INLINE uint16_t u16_at(const uint8_t* p) { uint16_t x; std::memcpy(&x, p, 2); return x; }
QD_INLINE uint32_t u32_at(const uint8_t* p) { uint32_t x; std::memcpy(&x, p, 4); return x; }
QD_INLINE float half_at(const uint8_t* p) {
#if QD_AVX2 || QD_AVX512
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(u16_at(p))));
#elif QD_NEON
  __fp16 x;
  std::memcpy(&x, p, 2);
  return float(x);
#else
  return half_to_float(u16_at(p));
#endif
}

template <int n> struct ByteVector { typedef uint8_t type __attribute__((vector_size(n))); };

// The runs of a block: low nibbles of `run` bytes, then their high ones.
template <int run, int n> QD_INLINE void nibble_runs(const uint8_t* in, int8_t* q) {
  using Bytes = typename ByteVector<run < 16 ? run : 16>::type;  // said outright: compilers find it in some loops only
  for (int g = 0; g < n; ++g)
    for (int i = 0; i < run; i += sizeof(Bytes)) {
      Bytes x;
      std::memcpy(&x, in + run * g + i, sizeof x);
      const Bytes low = x & 15, high = x >> 4;
      std::memcpy(q + 2 * run * g + i, &low, sizeof x);
      std::memcpy(q + 2 * run * g + run + i, &high, sizeof x);
    }
}

QD_INLINE void crumb_runs(const uint8_t* in, int8_t* q) {  // of each 32 bytes four runs of 32, lowest bits first
  for (int g = 0; g < 2; ++g)
    for (int s = 0; s < 4; ++s)
      for (int i = 0; i < 32; ++i) q[128 * g + 32 * s + i] = int8_t(in[32 * g + i] >> (2 * s) & 3);
}

constexpr uint64_t kOnes = 0x0101010101010101u;

// Bit i of `bits` as byte i: 0xff or 0.
QD_INLINE uint64_t byte_mask(uint32_t bits) {
  const uint64_t chosen = bits * kOnes & 0x8040201008040201u;
  return (((chosen + 0x7f * kOnes) | chosen) >> 7 & kOnes) * 0xff;
}

QD_INLINE void add_fifth_bits(const uint8_t* high, int8_t* q) {  // 32 numbers
  for (int g = 0; g < 4; ++g) {
    uint64_t eight;
    std::memcpy(&eight, q + 8 * g, 8);
    eight |= byte_mask(high[g]) & 16 * kOnes;
    std::memcpy(q + 8 * g, &eight, 8);
  }
}

template <int n> QD_INLINE void subtract(int8_t* q, int8_t zero) {
  for (int i = 0; i < n; ++i) q[i] = int8_t(q[i] - zero);
}

// 32 numbers ----------------------------------------------------------------------------------------------------------

QD_INLINE void read_q8_0(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b);
  std::memcpy(n.q, b + 2, 32);
}

QD_INLINE void read_q4_0(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b);
  nibble_runs<16, 1>(b + 2, n.q);
  subtract<32>(n.q, 8);
}

QD_INLINE void read_q4_1(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b), n.minimum[0] = -half_at(b + 2);
  nibble_runs<16, 1>(b + 4, n.q);
}

QD_INLINE void read_q5_0(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b);
  nibble_runs<16, 1>(b + 6, n.q);
  add_fifth_bits(b + 2, n.q);
  subtract<32>(n.q, 16);
}

QD_INLINE void read_q5_1(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b), n.minimum[0] = -half_at(b + 2);
  nibble_runs<16, 1>(b + 8, n.q);
  add_fifth_bits(b + 4, n.q);
}

// 256 numbers ---------------------------------------------------------------------------------------------------------

QD_INLINE void read_q2_k(const uint8_t* b, const int8_t*, Numbers& n) {
  const float d = half_at(b + 80), dmin = half_at(b + 82);
  for (int i = 0; i < 16; ++i) n.scale[i] = d * float(b[i] & 15), n.minimum[i] = dmin * float(b[i] >> 4);
  crumb_runs(b + 16, n.q);
}

QD_INLINE int scale_of_q3_k(const uint8_t* b, int i) {
  const uint8_t* s = b + 96;
  const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4, high = s[8 + i % 4] >> (2 * (i / 4)) & 3;
  return (low | high << 4) - 32;
}

QD_INLINE void read_q3_k(const uint8_t* b, const int8_t*, Numbers& n) {
  const float d = half_at(b + 108);
  for (int i = 0; i < 16; ++i) n.scale[i] = d * float(scale_of_q3_k(b, i));
  crumb_runs(b + 32, n.q);
  for (int s8 = 0; s8 < 8; ++s8)
    for (int i = 0; i < 32; ++i) n.q[32 * s8 + i] = int8_t(n.q[32 * s8 + i] - (~b[i] >> s8 & 1) * 4);
}

// Of q4_k and q5_k: two numbers of six bits for each of eight runs, in twelve bytes.
QD_INLINE int scale_of_q4_k(const uint8_t* b, int i) { return i < 4 ? b[4 + i] & 63 : (b[8 + i] & 15) | b[i] >> 6 << 4; }
QD_INLINE int minimum_of_q4_k(const uint8_t* b, int i) { return i < 4 ? b[8 + i] & 63 : b[8 + i] >> 4 | b[4 + i] >> 6 << 4; }

QD_INLINE void scales_and_minima(const uint8_t* b, Numbers& n) {
  const float d = half_at(b), dmin = half_at(b + 2);
  for (int i = 0; i < 8; ++i) n.scale[i] = d * float(scale_of_q4_k(b, i)), n.minimum[i] = dmin * float(minimum_of_q4_k(b, i));
}

QD_INLINE void read_q4_k(const uint8_t* b, const int8_t*, Numbers& n) {
  scales_and_minima(b, n);
  nibble_runs<32, 4>(b + 16, n.q);
}

QD_INLINE void add_fifth_bit_planes(const uint8_t* high, int8_t* q) {  // bit r of every byte is of run r
  for (int r = 0; r < 8; ++r)
    for (int i = 0; i < 32; ++i) q[32 * r + i] = int8_t(q[32 * r + i] | (high[i] >> r & 1) << 4);
}

QD_INLINE void read_q5_k(const uint8_t* b, const int8_t*, Numbers& n) {
  scales_and_minima(b, n);
  nibble_runs<32, 4>(b + 48, n.q);
  add_fifth_bit_planes(b + 16, n.q);
}

template <int zero = 0> QD_INLINE void six_bits(const uint8_t* b, int8_t* q) {
  for (int g = 0; g < 2; ++g, q += 128) {
    const uint8_t *low = b + 64 * g, *high = b + 128 + 32 * g;
    for (int i = 0; i < 32; ++i) {
      q[i] = int8_t((low[i] & 15) + (high[i] & 3) * 16 - zero);
      q[32 + i] = int8_t((low[32 + i] & 15) + (high[i] >> 2 & 3) * 16 - zero);
      q[64 + i] = int8_t((low[i] >> 4) + (high[i] >> 4 & 3) * 16 - zero);
      q[96 + i] = int8_t((low[32 + i] >> 4) + (high[i] >> 6) * 16 - zero);
    }
  }
}

QD_INLINE void read_q6_k(const uint8_t* b, const int8_t*, Numbers& n) {
  const float d = half_at(b + 208);
  for (int i = 0; i < 16; ++i) n.scale[i] = d * float(int8_t(b[192 + i]));
  six_bits<32>(b, n.q);
}

QD_INLINE void read_q8_k(const uint8_t* b, const int8_t*, Numbers& n) {
  std::memcpy(n.scale, b, 4);
  for (int i = 1; i < 8; ++i) n.scale[i] = n.scale[0];
  std::memcpy(n.q, b + 4, 256);
}

// Ternary -------------------------------------------------------------------------------------------------------------

template <int bytes, int digits> QD_INLINE void trit_runs(const uint8_t* in, int8_t* q) {
  constexpr uint8_t powers[] = {1, 3, 9, 27, 81};
  for (int k = 0; k < digits; ++k)
    for (int i = 0; i < bytes; ++i) q[bytes * k + i] = int8_t((uint8_t(in[i] * powers[k]) * 3 >> 8) - 1);
}

QD_INLINE void one_scale(float d, Numbers& n) {
  for (int i = 0; i < 8; ++i) n.scale[i] = d;
}

QD_INLINE void read_tq1_0(const uint8_t* b, const int8_t*, Numbers& n) {
  one_scale(half_at(b + 52), n);
  trit_runs<32, 5>(b, n.q);
  trit_runs<16, 5>(b + 32, n.q + 160);
  trit_runs<4, 4>(b + 48, n.q + 240);
}

QD_INLINE void read_tq2_0(const uint8_t* b, const int8_t*, Numbers& n) {
  one_scale(half_at(b + 64), n);
  crumb_runs(b, n.q);
  subtract<256>(n.q, 1);
}

// Sixteen values ------------------------------------------------------------------------------------------------------


template <int n> QD_INLINE void look_up(const int8_t* table, int8_t* q) {
#if QD_AVX2 || QD_AVX512  // sixteen at a time: as they were stored, so that the processor forwards them
  const __m128i values = _mm_loadu_si128((const __m128i*)table);
  for (int i = 0; i < n; i += 16)
    _mm_store_si128((__m128i*)(q + i), _mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)(q + i))));
#elif QD_NEON
  const int8x16_t values = vld1q_s8(table);
  for (int i = 0; i < n; i += 16) vst1q_s8(q + i, vqtbl1q_s8(values, vreinterpretq_u8_s8(vld1q_s8(q + i))));
#else
  for (int i = 0; i < n; ++i) q[i] = table[q[i]];
#endif
}

QD_INLINE void read_iq4_nl(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = half_at(b);
  nibble_runs<16, 1>(b + 2, n.q);
  look_up<32>(kUneven, n.q);
}

QD_INLINE int scale_of_iq4_xs(const uint8_t* b, int i) {
  return ((b[4 + i / 2] >> (4 * (i % 2)) & 15) | (u16_at(b + 2) >> (2 * i) & 3) << 4) - 32;
}

QD_INLINE void read_iq4_xs(const uint8_t* b, const int8_t*, Numbers& n) {
  const float d = half_at(b);
  for (int i = 0; i < 8; ++i) n.scale[i] = d * float(scale_of_iq4_xs(b, i));
  nibble_runs<16, 8>(b + 8, n.q);
  look_up<256>(kUneven, n.q);
}

QD_INLINE float float_of(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }

QD_INLINE void read_mxfp4(const uint8_t* b, const int8_t*, Numbers& n) {
  n.scale[0] = float_of(b[0] < 2 ? 0x200000u << b[0] : uint32_t(b[0] - 1) << 23);  // half of 2^(e - 127)
  nibble_runs<16, 1>(b + 1, n.q);
  look_up<32>(kE2M1, n.q);
}

QD_INLINE void read_nvfp4(const uint8_t* b, const int8_t*, Numbers& n) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t exponent = b[i] >> 3 & 15, steps = (b[i] & 7) + (exponent ? 8 : 0);
    const float step = float_of(((exponent ? exponent : 1) + 116) << 23);  // half of 2^(e - 7) / 8
    n.scale[i] = b[i] == 0x7f ? 0.0f : float(steps) * step;
  }
  nibble_runs<8, 4>(b + 4, n.q);
  look_up<64>(kE2M1, n.q);
}

// Codebooks -----------------------------------------------------------------------------------------------------------

QD_INLINE uint32_t even_signs(uint32_t seven) { return seven | uint32_t(__builtin_parity(seven)) << 7; }

// Eight numbers above 0, and minus them where a bit is set: no byte of -x = ~x + 1 carries into the next.
QD_INLINE void put_signed(uint64_t numbers, uint32_t signs, int8_t* q) {
  const uint64_t mask = byte_mask(signs), out = (numbers ^ mask) + (mask & kOnes);
  std::memcpy(q, &out, 8);
}

QD_INLINE uint64_t eight(const int8_t* book, uint32_t index) { uint64_t x; std::memcpy(&x, book + 8 * index, 8); return x; }

QD_INLINE uint64_t two_fours(const int8_t* book, uint32_t first, uint32_t second) {
  uint32_t a, b;
  std::memcpy(&a, book + 4 * first, 4), std::memcpy(&b, book + 4 * second, 4);
  return a | uint64_t(b) << 32;
}

QD_INLINE float half_steps(float d, uint32_t s, float factor) { return d * (float(s) + 0.5f) * factor; }
QD_INLINE float odd_steps(float d, uint32_t s) { return d * float(2 * s + 1); }

QD_INLINE void read_iq2_xxs(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* index = b + 2 + 8 * g;
    const uint32_t rest = u32_at(index + 4);
    n.scale[g] = half_steps(d, rest >> 28, 0.25f);
    for (int k = 0; k < 4; ++k) put_signed(eight(book, index[k]), even_signs(rest >> (7 * k) & 127), n.q + 32 * g + 8 * k);
  }
}

QD_INLINE void read_iq2_xs(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int i = 0; i < 16; ++i) n.scale[i] = half_steps(d, b[66 + i / 2] >> (4 * (i % 2)) & 15, 0.25f);
  for (int k = 0; k < 32; ++k) {
    const uint32_t word = u16_at(b + 2 + 2 * k);
    put_signed(eight(book, word & 511), even_signs(word >> 9), n.q + 8 * k);
  }
}

QD_INLINE void read_iq2_s(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int i = 0; i < 16; ++i) n.scale[i] = half_steps(d, b[74 + i / 2] >> (4 * (i % 2)) & 15, 0.25f);
  for (int k = 0; k < 32; ++k) {
    const uint32_t high = b[66 + k / 4] >> (2 * (k % 4)) & 3;
    put_signed(eight(book, b[2 + k] | high << 8), b[34 + k], n.q + 8 * k);
  }
}

QD_INLINE void read_iq3_xxs(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t rest = u32_at(b + 66 + 4 * g);
    const uint8_t* index = b + 2 + 8 * g;
    n.scale[g] = half_steps(d, rest >> 28, 0.5f);
    for (int k = 0; k < 4; ++k)
      put_signed(two_fours(book, index[2 * k], index[2 * k + 1]), even_signs(rest >> (7 * k) & 127), n.q + 32 * g + 8 * k);
  }
}

QD_INLINE void read_iq3_s(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) n.scale[g] = odd_steps(d, b[106 + g / 2] >> (4 * (g % 2)) & 15);
  for (int k = 0; k < 32; ++k) {
    const uint32_t high = b[66 + k / 4] >> (2 * (k % 4));
    put_signed(two_fours(book, b[2 + 2 * k] | (high & 1) << 8, b[3 + 2 * k] | (high & 2) << 7), b[74 + k], n.q + 8 * k);
  }
}

// Vectors of -1, 0, 1, moved by an eighth: eight times that in bytes, and an eighth of the scale.
QD_INLINE void put_shifted(const int8_t* vector, bool minus, int8_t* q) {
  typename ByteVector<8>::type x;
  std::memcpy(&x, vector, 8);
  const uint8_t shift = minus ? 255 : 1;
  x = (x << 3) + shift;
  std::memcpy(q, &x, 8);
}

QD_INLINE void read_iq1_s(const uint8_t* b, const int8_t* book, Numbers& n) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t word = u16_at(b + 34 + 2 * g);
    n.scale[g] = odd_steps(d, word >> 12 & 7) * 0.125f;
    for (int k = 0; k < 4; ++k)
      put_shifted(book + 8 * (b[2 + 4 * g + k] | (word >> (3 * k) & 7) << 8), word >> 15, n.q + 32 * g + 8 * k);
  }
}

QD_INLINE void read_iq1_m(const uint8_t* b, const int8_t* book, Numbers& n) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= uint32_t(u16_at(b + 48 + 2 * i) >> 12) << (4 * i);
  const float d = half_to_float(uint16_t(bits));
  for (int i = 0; i < 16; ++i) n.scale[i] = odd_steps(d, u16_at(b + 48 + i / 4 * 2) >> (3 * (i % 4)) & 7) * 0.125f;
  for (int k = 0; k < 32; ++k) {
    const uint32_t high = b[32 + k / 2] >> (4 * (k % 2)) & 15;
    put_shifted(book + 8 * (b[k] | (high & 7) << 8), high >> 3, n.q + 8 * k);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// n blocks, whose numbers share a scale in runs.
template <int stored, auto read, int run, bool minima = false>
void blocks_to_float(const uint8_t* in, int64_t n, const int8_t* book, float* out) {
  constexpr int count = block_shape(stored).count, size = block_shape(stored).bytes;
  Numbers numbers;
  for (int64_t i = 0; i < n; ++i, in += size, out += count) {
    read(in, book, numbers);
#pragma GCC unroll 16
    for (int j = 0; j < count; j += 16) {
      vf x = all(numbers.scale[j / run]) * load_int8(numbers.q + j);
      if (minima) x = x - all(numbers.minimum[j / run]);
      store(out + j, x);
    }
  }
}

void dequantize(int stored, const uint8_t* in, int64_t n, const int8_t* book, float* out) {
  switch (stored) {
    case QD_STORED_Q4_0: return blocks_to_float<QD_STORED_Q4_0, read_q4_0, 32>(in, n, book, out);
    case QD_STORED_Q4_1: return blocks_to_float<QD_STORED_Q4_1, read_q4_1, 32, true>(in, n, book, out);
    case QD_STORED_Q5_0: return blocks_to_float<QD_STORED_Q5_0, read_q5_0, 32>(in, n, book, out);
    case QD_STORED_Q5_1: return blocks_to_float<QD_STORED_Q5_1, read_q5_1, 32, true>(in, n, book, out);
    case QD_STORED_Q8_0: return blocks_to_float<QD_STORED_Q8_0, read_q8_0, 32>(in, n, book, out);
    case QD_STORED_Q2_K: return blocks_to_float<QD_STORED_Q2_K, read_q2_k, 16, true>(in, n, book, out);
    case QD_STORED_Q3_K: return blocks_to_float<QD_STORED_Q3_K, read_q3_k, 16>(in, n, book, out);
    case QD_STORED_Q4_K: return blocks_to_float<QD_STORED_Q4_K, read_q4_k, 32, true>(in, n, book, out);
    case QD_STORED_Q5_K: return blocks_to_float<QD_STORED_Q5_K, read_q5_k, 32, true>(in, n, book, out);
    case QD_STORED_Q6_K: return blocks_to_float<QD_STORED_Q6_K, read_q6_k, 16>(in, n, book, out);
    case QD_STORED_Q8_K: return blocks_to_float<QD_STORED_Q8_K, read_q8_k, 32>(in, n, book, out);
    case QD_STORED_IQ1_S: return blocks_to_float<QD_STORED_IQ1_S, read_iq1_s, 32>(in, n, book, out);
    case QD_STORED_IQ1_M: return blocks_to_float<QD_STORED_IQ1_M, read_iq1_m, 16>(in, n, book, out);
    case QD_STORED_IQ2_XXS: return blocks_to_float<QD_STORED_IQ2_XXS, read_iq2_xxs, 32>(in, n, book, out);
    case QD_STORED_IQ2_XS: return blocks_to_float<QD_STORED_IQ2_XS, read_iq2_xs, 16>(in, n, book, out);
    case QD_STORED_IQ2_S: return blocks_to_float<QD_STORED_IQ2_S, read_iq2_s, 16>(in, n, book, out);
    case QD_STORED_IQ3_XXS: return blocks_to_float<QD_STORED_IQ3_XXS, read_iq3_xxs, 32>(in, n, book, out);
    case QD_STORED_IQ3_S: return blocks_to_float<QD_STORED_IQ3_S, read_iq3_s, 32>(in, n, book, out);
    case QD_STORED_IQ4_NL: return blocks_to_float<QD_STORED_IQ4_NL, read_iq4_nl, 32>(in, n, book, out);
    case QD_STORED_IQ4_XS: return blocks_to_float<QD_STORED_IQ4_XS, read_iq4_xs, 32>(in, n, book, out);
    case QD_STORED_TQ1_0: return blocks_to_float<QD_STORED_TQ1_0, read_tq1_0, 32>(in, n, book, out);
    case QD_STORED_TQ2_0: return blocks_to_float<QD_STORED_TQ2_0, read_tq2_0, 32>(in, n, book, out);
    case QD_STORED_MXFP4: return blocks_to_float<QD_STORED_MXFP4, read_mxfp4, 32>(in, n, book, out);
    case QD_STORED_NVFP4: return blocks_to_float<QD_STORED_NVFP4, read_nvfp4, 16>(in, n, book, out);
  }
}

// The same numbers as blocks of q8_0, where its float16 scale holds theirs.
template <int stored, auto read> bool blocks_to_q8_0(const uint8_t* in, int64_t n, uint8_t* out) {
  Numbers numbers;
  for (int64_t i = 0; i < n; ++i, in += block_shape(stored).bytes) {
    read(in, nullptr, numbers);
    for (int j = 0; j < block_shape(stored).count / 32; ++j, out += 34) {
      const uint16_t half = float_to_half(numbers.scale[j]);
      if (half_to_float(half) != numbers.scale[j] || (half & 0x7c00) == 0x7c00) return false;
      std::memcpy(out, &half, 2);
      std::memcpy(out + 2, numbers.q + 32 * j, 32);
    }
  }
  return true;
}

bool to_q8_0(int stored, const uint8_t* in, int64_t n, uint8_t* out) {
  switch (stored) {
    case QD_STORED_Q4_0: return blocks_to_q8_0<QD_STORED_Q4_0, read_q4_0>(in, n, out);
    case QD_STORED_Q5_0: return blocks_to_q8_0<QD_STORED_Q5_0, read_q5_0>(in, n, out);
    case QD_STORED_IQ4_NL: return blocks_to_q8_0<QD_STORED_IQ4_NL, read_iq4_nl>(in, n, out);
    case QD_STORED_TQ1_0: return blocks_to_q8_0<QD_STORED_TQ1_0, read_tq1_0>(in, n, out);
    case QD_STORED_TQ2_0: return blocks_to_q8_0<QD_STORED_TQ2_0, read_tq2_0>(in, n, out);
    case QD_STORED_MXFP4: return blocks_to_q8_0<QD_STORED_MXFP4, read_mxfp4>(in, n, out);
    default: return false;
  }
}

}  // namespace
