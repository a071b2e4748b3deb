// One tile of 16 rows times a panel, for every format and width. The order of operations for one output number is the
// same at every width and for packed and widened tiles, so a token's result does not depend on its neighbours.

namespace {

#if QD_AVX512 || QD_AVX2
constexpr int kUnroll = 8;  // lines of a group, written out
#else
constexpr int kUnroll = 1;  // plain C++ would be four times as long to compile and no faster
#endif
constexpr int kAhead = 4608;  // bytes of prefetch: measured 38 % faster than 1152 B on streamed weights (see docs)

// Where a group's lines, scales and minima are.
struct Q8 {
  static constexpr bool nibbles = false, minimum = false;
  static constexpr int64_t pair_bytes = 1088, first_line = 64, group_bytes = 512;
  static constexpr float factor = 1.0f;
};
struct Q4 {
  static constexpr bool nibbles = true, minimum = false;
  static constexpr int64_t pair_bytes = 576, first_line = 64, group_bytes = 256;
  static constexpr float factor = 1.0f / 16;  // nibbles stay in the high half of their byte: 16 n
};
struct Q4M {
  static constexpr bool nibbles = true, minimum = true;
  static constexpr int64_t pair_bytes = 640, first_line = 128, group_bytes = 256;
  static constexpr float factor = 1.0f / 16;
};

template <int M, int P, bool minimum>
QD_INLINE void finish_group(vf* f, const vi* acc, vf scale, vf min, const uint32_t* rec) {
  const float* scales = reinterpret_cast<const float*>(rec + 8 * P * M);
  const float* sums = reinterpret_cast<const float*>(rec + (8 * P + 2) * M);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    f[m] = fma(to_float(acc[m]) * scale, all(scales[m]), f[m]);
    if (minimum) f[m] = fma(min, all(sums[m]), f[m]);
  }
}

template <int M>
QD_INLINE void zero_group(vi* acc) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = all_int(0);
}

template <int M, int P, bool minimum>
QD_INLINE void start_group(vi* acc, const uint32_t* rec) {
  if (minimum) return zero_group<M>(acc);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = all_int(int32_t(rec[(8 * P + 1) * M + m]));
}

// After the high bytes: they count 128 times; the zero point is of both planes together.
template <int M, bool minimum>
QD_INLINE void between_planes(vi* acc, const uint32_t* rec) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    acc[m] = shift_left<7>(acc[m]);
    if (!minimum) acc[m] = acc[m] + all_int(int32_t(rec[17 * M + m]));
  }
}

template <int M>
QD_INLINE void line(vi* acc, vb w, const uint32_t* units) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], w, units[m]);
}

template <class F, int P, int M>
void tile_int(const uint8_t* tile, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* pair = tile + g / 2 * F::pair_bytes;
    const uint8_t* lines = pair + F::first_line + (g & 1) * F::group_bytes;
    const uint32_t* rec = panel + g * group_units(P) * M;
    for (int i = 0; i < F::group_bytes + (F::first_line / 2); i += 64) prefetch(lines + kAhead + i);
    vi acc[M];
    if (P == 1) start_group<M, P, F::minimum>(acc, rec);
    else zero_group<M>(acc);
#pragma GCC unroll kUnroll
    for (int p = 0; p < P; ++p) {
      const uint32_t* units = rec + 8 * p * M;
      if (F::nibbles) {
#pragma GCC unroll kUnroll
        for (int l = 0; l < 4; ++l) {
          const vb both = load_bytes(lines + 64 * l);
          line<M>(acc, low_nibbles(both), units + 2 * l * M);
          line<M>(acc, high_nibbles(both), units + (2 * l + 1) * M);
        }
      } else {
#pragma GCC unroll kUnroll
        for (int l = 0; l < 8; ++l) line<M>(acc, load_bytes(lines + 64 * l), units + l * M);
      }
      if (P == 2 && p == 0) between_planes<M, F::minimum>(acc, rec);
    }
    vf scale = load_half(reinterpret_cast<const uint16_t*>(pair) + 16 * (g & 1));
    if (F::nibbles) scale = scale * all(F::factor);
    const vf min = F::minimum ? load_half(reinterpret_cast<const uint16_t*>(pair) + 32 + 16 * (g & 1)) : all(0.0f);
    finish_group<M, P, F::minimum>(f, acc, scale, min, rec);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <bool minimum, int P, int M>
void tile_widened(const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* lines = wide + g * (minimum ? kWideGroupM : kWideGroup);
    const uint32_t* rec = panel + g * group_units(P) * M;
    vi acc[M];
    if (P == 1) start_group<M, P, minimum>(acc, rec);
    else zero_group<M>(acc);
#pragma GCC unroll kUnroll
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll kUnroll
      for (int l = 0; l < 8; ++l) line<M>(acc, load_bytes(lines + 64 * l), rec + (8 * p + l) * M);
      if (P == 2 && p == 0) between_planes<M, minimum>(acc, rec);
    }
    const vf scale = load(reinterpret_cast<const float*>(lines + 512));
    const vf min = minimum ? load(reinterpret_cast<const float*>(lines + 576)) : all(0.0f);
    finish_group<M, P, minimum>(f, acc, scale, min, rec);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <bool bf16, int M>
void tile_float(const uint8_t* tile, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t units = bf16 ? (cols + 1) / 2 : cols;
  for (int64_t u = 0; u < units; ++u) {
    prefetch(tile + u * 64 + kAhead);
    const vb w = load_bytes(tile + u * 64);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) f[m] = bf16 ? dot2(f[m], w, panel[u * M + m]) : dot1(f[m], w, panel[u * M + m]);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

using TileFunction = void (*)(const uint8_t*, int64_t, const uint32_t*, float*, int64_t);

#if QD_AVX512
constexpr int kWidth = 12;
#else
constexpr int kWidth = 4;
#endif

#define QD_WIDTHS_4(f) f(1), f(2), f(3), f(4)
#if QD_AVX512
#define QD_WIDTHS(f) QD_WIDTHS_4(f), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12)
#else
#define QD_WIDTHS(f) QD_WIDTHS_4(f)
#endif

#define QD_F32_TILE(m) tile_float<false, m>
#define QD_BF16_TILE(m) tile_float<true, m>
#define QD_Q8_TILE(m) tile_int<Q8, 1, m>
#define QD_Q4_TILE(m) tile_int<Q4, 1, m>
#define QD_Q4M_TILE(m) tile_int<Q4M, 1, m>
#define QD_Q8_FINE(m) tile_int<Q8, 2, m>
#define QD_Q4_FINE(m) tile_int<Q4, 2, m>
#define QD_Q4M_FINE(m) tile_int<Q4M, 2, m>
#define QD_WIDE_TILE(m) tile_widened<false, 1, m>
#define QD_WIDEM_TILE(m) tile_widened<true, 1, m>
#define QD_WIDE_FINE(m) tile_widened<false, 2, m>
#define QD_WIDEM_FINE(m) tile_widened<true, 2, m>

const TileFunction kTiles[8][kWidth] = {{QD_WIDTHS(QD_F32_TILE)}, {QD_WIDTHS(QD_BF16_TILE)}, {QD_WIDTHS(QD_Q8_TILE)},
                                        {QD_WIDTHS(QD_Q4_TILE)},  {QD_WIDTHS(QD_Q4M_TILE)},  {QD_WIDTHS(QD_Q8_FINE)},
                                        {QD_WIDTHS(QD_Q4_FINE)},  {QD_WIDTHS(QD_Q4M_FINE)}};
const TileFunction kWideTiles[4][kWidth] = {{QD_WIDTHS(QD_WIDE_TILE)}, {QD_WIDTHS(QD_WIDEM_TILE)},
                                            {QD_WIDTHS(QD_WIDE_FINE)}, {QD_WIDTHS(QD_WIDEM_FINE)}};

void tile_any(int format, bool fine, const uint8_t* tile, int64_t cols, const uint32_t* panel, int width, float* out,
              int64_t stride) {
  const int row = fine && format >= QD_Q8 ? format + 3 : format;
  kTiles[row][width - 1](tile, cols, panel, out, stride);
}

void tile_wide_any(int format, bool fine, const uint8_t* wide, int64_t cols, const uint32_t* panel, int width, float* out,
                   int64_t stride) {
  kWideTiles[(format == QD_Q4M) + 2 * fine][width - 1](wide, cols, panel, out, stride);
}

template <class F>
void widen_as(const uint8_t* tile, int64_t cols, uint8_t* wide) {
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* pair = tile + g / 2 * F::pair_bytes;
    const uint8_t* lines = pair + F::first_line + (g & 1) * F::group_bytes;
    uint8_t* to = wide + g * (F::minimum ? kWideGroupM : kWideGroup);
    for (int l = 0; l < 4; ++l) {
      const vb both = load_bytes(lines + 64 * l);
      store_bytes(to + 128 * l, low_nibbles(both));
      store_bytes(to + 128 * l + 64, high_nibbles(both));
    }
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(pair) + 16 * (g & 1);
    store(reinterpret_cast<float*>(to + 512), load_half(halves) * all(F::factor));
    if (F::minimum) store(reinterpret_cast<float*>(to + 576), load_half(halves + 32));
  }
}

void widen_any(int format, const uint8_t* tile, int64_t cols, uint8_t* wide) {
  format == QD_Q4M ? widen_as<Q4M>(tile, cols, wide) : widen_as<Q4>(tile, cols, wide);
}

// Activations ---------------------------------------------------------------------------------------------------------

QD_INLINE void bytes_of(vi a, vi b, uint32_t* units) {  // 32 whole numbers within int8 as 8 units
#if QD_AVX512
  _mm_storeu_si128((__m128i*)units, _mm512_cvtepi32_epi8(a.v));
  _mm_storeu_si128((__m128i*)(units + 4), _mm512_cvtepi32_epi8(b.v));
#else
  int32_t q[32];
  store_int(q, a), store_int(q + 16, b);
  for (int i = 0; i < 8; ++i)
    units[i] = uint32_t(q[4 * i] & 255) | uint32_t(q[4 * i + 1] & 255) << 8 | uint32_t(q[4 * i + 2] & 255) << 16 |
               uint32_t(q[4 * i + 3] & 255) << 24;
#endif
}

// 32 numbers as whole ones with a scale; `stride` units lie between one unit and the next of this token.
template <int P>
QD_INLINE void quantise_group(vf a, vf b, uint32_t* rec, int64_t stride) {
  constexpr float most = P == 1 ? 127.0f : 16256.0f;  // 127 * 128
  const float top = largest(vmax(vabs(a), vabs(b)));
  const float scale = top / most;
  const vf inverse = all(top > 0.0f ? most / top : 0.0f);
  const vf qa = nearest(a * inverse), qb = nearest(b * inverse);
  uint32_t units[16];
  if (P == 1) {
    bytes_of(to_int(qa), to_int(qb), units);
  } else {
    const vf ha = nearest(qa * all(1.0f / 128)), hb = nearest(qb * all(1.0f / 128));
    bytes_of(to_int(ha), to_int(hb), units);
    bytes_of(to_int(qa - ha * all(128.0f)), to_int(qb - hb * all(128.0f)), units + 8);
  }
  for (int i = 0; i < 8 * P; ++i) rec[i * stride] = units[i];
  const float total = sum(qa + qb);  // whole numbers below 2^24: exact
  std::memcpy(rec + 8 * P * stride, &scale, 4);
  rec[(8 * P + 1) * stride] = uint32_t(-128 * int32_t(total));
  const float product = scale * total;
  std::memcpy(rec + (8 * P + 2) * stride, &product, 4);
}

QD_INLINE void integer_group(PanelKind kind, const float* row, int64_t group, int width, int m, uint32_t* panel) {
  uint32_t* rec = panel + group * group_units(planes_of(kind)) * width + m;
  if (kind == kPanelInt8) quantise_group<1>(load(row), load(row + 16), rec, width);
  else quantise_group<2>(load(row), load(row + 16), rec, width);
}

void fill_group(PanelKind kind, const float* x, int width, int64_t group, uint32_t* panel, int64_t cols) {
  const int64_t left = cols - 32 * group, n = left < 32 ? left : 32;
  for (int m = 0; m < width; ++m) {
    const float* row = x + 32 * m;
    if (is_integer(kind)) {
      integer_group(kind, row, group, width, m, panel);
    } else if (kind == kPanelBf16) {
      for (int64_t c = 0; c < n; c += 2)
        panel[(16 * group + c / 2) * width + m] = bf16_pair(row[c], c + 1 < n ? row[c + 1] : 0.0f);
    } else {
      for (int64_t c = 0; c < n; ++c) std::memcpy(panel + (32 * group + c) * width + m, row + c, 4);
    }
  }
}

void make_panel(PanelKind kind, const float* const* x, int width, int64_t cols, uint32_t* panel) {
  const int64_t groups = is_integer(kind) ? groups_of(cols) : (cols + 31) / 32;
  float part[32];
  for (int m = 0; m < width; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t left = cols - 32 * g;
      const float* row = x[m] + 32 * g;
      if (left < 32) {
        std::memset(part, 0, sizeof part);
        if (left > 0) std::memcpy(part, row, size_t(left) * 4);
        row = part;
      }
      if (is_integer(kind)) {
        integer_group(kind, row, g, width, m, panel);
      } else if (kind == kPanelBf16) {
        for (int64_t c = 0; c < 32 && c < left; c += 2) panel[(16 * g + c / 2) * width + m] = bf16_pair(row[c], row[c + 1]);
      } else {
        for (int64_t c = 0; c < 32 && c < left; ++c) std::memcpy(panel + (32 * g + c) * width + m, row + c, 4);
      }
    }
  }
}

}  // namespace
