// Products of two rows with two tokens at a time (i8mm): a register holds eight columns of rows r and r + 1, another those of
// tokens m and m + 1, and one instruction adds all four sums of eight products. A tile is a grid of such squares,
//
//   square i of pair p:   row 2i token 2p | row 2i token 2p+1 | row 2i+1 token 2p | row 2i+1 token 2p+1
//
// Whole numbers, then the same float operations for each number as elsewhere: the same bits.

namespace {

// Unpacked lines are kept as squares want them: units 2 l and 2 l + 1, row after row.
QD_INLINE uint8x16_t zip_first(uint8x16_t x, uint8x16_t y) { return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y))); }
QD_INLINE uint8x16_t zip_second(uint8x16_t x, uint8x16_t y) { return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y))); }
QD_INLINE void zip_lines(vb x, vb y, vb* w) {
  w[0] = {zip_first(x.a, y.a), zip_second(x.a, y.a), zip_first(x.b, y.b), zip_second(x.b, y.b)};
  w[1] = {zip_first(x.c, y.c), zip_second(x.c, y.c), zip_first(x.d, y.d), zip_second(x.d, y.d)};
}

QD_INLINE int32x4_t add_square(int32x4_t acc, uint8x16_t rows, int8x16_t tokens) { return vusmmlaq_s32(acc, rows, tokens); }

// acc[8 p + i] += lines 2 l and 2 l + 1 of a group.
template <class F, bool wide, int M, int l> QD_INLINE void add_squares(int32x4_t* acc, const uint8_t* lines, const uint32_t* units) {
  vb w[2];
  if constexpr (wide) {
    w[0] = load_bytes(lines + 128 * l), w[1] = load_bytes(lines + 128 * l + 64);
  } else {
    vb plain[2];
    two_lines<F, false, l>(lines, plain);
    zip_lines(plain[0], plain[1], w);
  }
#pragma GCC unroll 6
  for (int p = 0; p < M / 2; ++p) {
    const uint32x2_t even = vld1_u32(units + 2 * l * M + 2 * p), odd = vld1_u32(units + (2 * l + 1) * M + 2 * p);
    const int8x16_t tokens = vreinterpretq_s8_u32(vcombine_u32(vzip1_u32(even, odd), vzip2_u32(even, odd)));
    int32x4_t* to = acc + 8 * p;
    to[0] = add_square(to[0], w[0].a, tokens), to[1] = add_square(to[1], w[0].b, tokens);
    to[2] = add_square(to[2], w[0].c, tokens), to[3] = add_square(to[3], w[0].d, tokens);
    to[4] = add_square(to[4], w[1].a, tokens), to[5] = add_square(to[5], w[1].b, tokens);
    to[6] = add_square(to[6], w[1].c, tokens), to[7] = add_square(to[7], w[1].d, tokens);
  }
}

template <class F, bool wide, int M> QD_INLINE void add_plane(int32x4_t* acc, const uint8_t* lines, const uint32_t* units) {
  add_squares<F, wide, M, 0>(acc, lines, units), add_squares<F, wide, M, 1>(acc, lines, units);
  add_squares<F, wide, M, 2>(acc, lines, units), add_squares<F, wide, M, 3>(acc, lines, units);
}

// As multiply_group has it, with the zero points of each pair of tokens.
template <class F, bool wide, int P, int M> QD_INLINE void multiply_squares(int32x4_t* acc, const uint8_t* lines, const uint32_t* rec) {
#pragma GCC unroll 48
  for (int i = 0; i < 4 * M; ++i) acc[i] = vdupq_n_s32(0);
  if (P == 2) add_plane<F, wide, M>(acc, lines, rec);
#pragma GCC unroll 6
  for (int p = 0; p < M / 2; ++p) {
    const uint32_t* units = rec + (8 * P + 1) * M + 2 * p;
    const int32_t zero[2] = {F::minimum ? 0 : F::zero_point(units[0]), F::minimum ? 0 : F::zero_point(units[1])};
    const int32x4_t both = vcombine_s32(vld1_s32(zero), vld1_s32(zero));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[8 * p + i] = P == 2 ? vaddq_s32(vshlq_n_s32(acc[8 * p + i], 7), both) : both;
  }
  add_plane<F, wide, M>(acc, lines, rec + 8 * (P - 1) * M);
}

QD_INLINE void each_twice(vf x, float32x4_t* out) {  // of rows, as squares have them
  out[0] = vzip1q_f32(x.a, x.a), out[1] = vzip2q_f32(x.a, x.a), out[2] = vzip1q_f32(x.b, x.b), out[3] = vzip2q_f32(x.b, x.b);
  out[4] = vzip1q_f32(x.c, x.c), out[5] = vzip2q_f32(x.c, x.c), out[6] = vzip1q_f32(x.d, x.d), out[7] = vzip2q_f32(x.d, x.d);
}

template <int M, int P, bool minimum>
QD_INLINE void finish_squares(float32x4_t* f, const int32x4_t* acc, vf scale, vf least, const uint32_t* rec) {
  const float* scales = reinterpret_cast<const float*>(rec + 8 * P * M);
  const float* sums = reinterpret_cast<const float*>(rec + (8 * P + 2) * M);
  float32x4_t scale_of[8], least_of[8];
  each_twice(scale, scale_of);
  if (minimum) each_twice(least, least_of);
#pragma GCC unroll 6
  for (int p = 0; p < M / 2; ++p) {
    const float32x4_t step = vcombine_f32(vld1_f32(scales + 2 * p), vld1_f32(scales + 2 * p));
    const float32x4_t total = vcombine_f32(vld1_f32(sums + 2 * p), vld1_f32(sums + 2 * p));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      float32x4_t& to = f[8 * p + i];
      to = vfmaq_f32(to, vmulq_f32(vcvtq_f32_s32(acc[8 * p + i]), scale_of[i]), step);
      if (minimum) to = vfmaq_f32(to, least_of[i], total);
    }
  }
}

// Where a group's lines are, its scale and its minimum.
struct Group {
  const uint8_t* lines;
  vf scale, least;
};
template <class F> QD_INLINE Group packed_group(const uint8_t* tile, int64_t g) {
  const uint8_t* block = tile + g / F::groups * F::block_bytes;
  const int64_t i = g % F::groups;
  prefetch_group<F>(block, i);
  return {block + F::first_line + i * F::group_bytes, F::scale(block, i), F::least(block, i)};
}
template <class F> QD_INLINE Group wide_group(const uint8_t* wide, int64_t g) {
  const uint8_t* lines = wide + g * 64 * (F::minimum ? 10 : 9);
  const float* floats = reinterpret_cast<const float*>(lines + 512);
  return {lines, load(floats), F::minimum ? load(floats + 16) : all(0.0f)};
}

template <class F, bool wide, int P, int M>
QD_INLINE void tile_squares(const uint8_t* tile, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  float32x4_t f[4 * M];
#pragma GCC unroll 48
  for (int i = 0; i < 4 * M; ++i) f[i] = vdupq_n_f32(0.0f);
  const int64_t n = groups_of(cols);
  for (int64_t g = 0; g < n; ++g) {
    const uint32_t* rec = panel + g * group_units(P) * M;
    const Group group = wide ? wide_group<F>(tile, g) : packed_group<F>(tile, g);
    int32x4_t acc[4 * M];
    multiply_squares<F, wide, P, M>(acc, group.lines, rec);
    finish_squares<M, P, F::minimum>(f, acc, group.scale, group.least, rec);
  }
#pragma GCC unroll 6
  for (int p = 0; p < M / 2; ++p)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const float32x4_t x = f[8 * p + 2 * q], y = f[8 * p + 2 * q + 1];
      vst1q_f32(out + 2 * p * stride + 4 * q, vuzp1q_f32(x, y)), vst1q_f32(out + (2 * p + 1) * stride + 4 * q, vuzp2q_f32(x, y));
    }
}

}  // namespace
