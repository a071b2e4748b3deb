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
  static constexpr bool nibbles = false, codes = false, minimum = false;
  static constexpr int64_t pair_bytes = 1088, first_line = 64, group_bytes = 512;
  static constexpr float factor = 1.0f;
  static int32_t zero_point(uint32_t unit) { return kSignedBytes ? 0 : int32_t(unit); }
};
struct Nibbles {  // 2^kNibbleShift times the number
  static constexpr bool nibbles = true, codes = false;
  static constexpr float factor = 1.0f / (1 << kNibbleShift);
  static int32_t zero_point(uint32_t unit) { return int32_t(unit) >> (4 - kNibbleShift); }  // exact
};
struct Q4 : Nibbles {
  static constexpr bool minimum = false;
  static constexpr int64_t pair_bytes = 576, first_line = 64, group_bytes = 256;
};
struct Q4M : Nibbles {
  static constexpr bool minimum = true;
  static constexpr int64_t pair_bytes = 640, first_line = 128, group_bytes = 256;
};

struct MX4 {  // twice the number, and where the product wants unsigned bytes 16 more
  static constexpr bool nibbles = false, codes = true, minimum = false;
  static constexpr int64_t pair_bytes = 576, first_line = 64, group_bytes = 256;
  static constexpr float factor = 1.0f;
  static int32_t zero_point(uint32_t unit) { return kSignedBytes ? 0 : int32_t(unit) >> 3; }  // exact
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
QD_INLINE void nibble_line(vn* part, vb w, const uint32_t* units) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) part[m] = dot_nibbles(part[m], w, units[m]);
}

// start(m) + a group's eight lines times one plane of token m's activations; `wide`: nibbles are bytes already.
template <class F, bool wide, int M, class Start>
QD_INLINE void multiply_lines(vi* acc, const uint8_t* lines, const uint32_t* units, Start start) {
  if (F::codes) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) acc[m] = start(m);
#pragma GCC unroll kUnroll
    for (int l = 0; l < 4; ++l) {
      const vb both = load_bytes(lines + 64 * l);
      const vq low = low_codes(both), high = high_codes(both);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[m] = dot_bytes(dot_bytes(acc[m], low, units[2 * l * M + m]), high, units[(2 * l + 1) * M + m]);
    }
    return;
  }
  if (!F::nibbles) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) acc[m] = start(m);
#pragma GCC unroll kUnroll
    for (int l = 0; l < 8; ++l) {
      const vq w = bytes_line(lines + 64 * l);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[m] = dot_bytes(acc[m], w, units[l * M + m]);
    }
    return;
  }
  vn part[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) part[m] = begin_nibbles(start(m));
  if (wide) {
#pragma GCC unroll kUnroll
    for (int l = 0; l < 8; ++l) nibble_line<M>(part, load_bytes(lines + 64 * l), units + l * M);
  } else {
#pragma GCC unroll kUnroll
    for (int l = 0; l < 4; ++l) {
      const vb both = load_bytes(lines + 64 * l);
      nibble_line<M>(part, low_nibbles(both), units + 2 * l * M);
      nibble_line<M>(part, high_nibbles(both), units + (2 * l + 1) * M);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = end_nibbles(part[m], start(m));
}

// -128 times the sum of the activations undoes that weights are stored unsigned (with a minimum there is no such shift).
// Of two planes the high bytes count 128 times; the zero point is of both together.
template <class F, bool wide, int P, int M>
QD_INLINE void multiply_group(vi* acc, const uint8_t* lines, const uint32_t* rec) {
  const auto zero_point = [rec](int m) { return all_int(F::minimum ? 0 : F::zero_point(rec[(8 * P + 1) * M + m])); };
  if (P == 1) return multiply_lines<F, wide, M>(acc, lines, rec, zero_point);
  multiply_lines<F, wide, M>(acc, lines, rec, [](int) { return all_int(0); });
  vi high[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) high[m] = shift_left<7>(acc[m]) + zero_point(m);
  multiply_lines<F, wide, M>(acc, lines, rec + 8 * M, [&high](int m) { return high[m]; });
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
    multiply_group<F, false, P, M>(acc, lines, rec);
    vf scale = load_half(reinterpret_cast<const uint16_t*>(pair) + 16 * (g & 1));
    if (F::nibbles) scale = scale * all(F::factor);
    const vf min = F::minimum ? load_half(reinterpret_cast<const uint16_t*>(pair) + 32 + 16 * (g & 1)) : all(0.0f);
    finish_group<M, P, F::minimum>(f, acc, scale, min, rec);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <class F, int P, int M>
void tile_widened(const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* lines = wide + g * (F::minimum ? kWideGroupM : kWideGroup);
    const uint32_t* rec = panel + g * group_units(P) * M;
    vi acc[M];
    multiply_group<F, true, P, M>(acc, lines, rec);
    const vf scale = load(reinterpret_cast<const float*>(lines + 512));
    const vf min = F::minimum ? load(reinterpret_cast<const float*>(lines + 576)) : all(0.0f);
    finish_group<M, P, F::minimum>(f, acc, scale, min, rec);
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
#define QD_PEAK_CHAINS 12
#else
constexpr int kWidth = 6;
#define QD_PEAK_CHAINS 3
#endif

#define QD_WIDTHS_4(f) f(1), f(2), f(3), f(4)
#if QD_AVX512
#define QD_WIDTHS(f) QD_WIDTHS_4(f), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12)
#else
#define QD_WIDTHS(f) QD_WIDTHS_4(f), f(5), f(6)
#endif

#define QD_F32_TILE(m) tile_float<false, m>
#define QD_BF16_TILE(m) tile_float<true, m>
#define QD_Q8_TILE(m) tile_int<Q8, 1, m>
#define QD_Q4_TILE(m) tile_int<Q4, 1, m>
#define QD_Q4M_TILE(m) tile_int<Q4M, 1, m>
#define QD_MX4_TILE(m) tile_int<MX4, 1, m>
#define QD_Q8_FINE(m) tile_int<Q8, 2, m>
#define QD_Q4_FINE(m) tile_int<Q4, 2, m>
#define QD_Q4M_FINE(m) tile_int<Q4M, 2, m>
#define QD_MX4_FINE(m) tile_int<MX4, 2, m>
#define QD_WIDE_TILE(m) tile_widened<Q4, 1, m>
#define QD_WIDEM_TILE(m) tile_widened<Q4M, 1, m>
#define QD_WIDE_FINE(m) tile_widened<Q4, 2, m>
#define QD_WIDEM_FINE(m) tile_widened<Q4M, 2, m>

const TileFunction kTiles[10][kWidth] = {{QD_WIDTHS(QD_F32_TILE)}, {QD_WIDTHS(QD_BF16_TILE)}, {QD_WIDTHS(QD_Q8_TILE)},
                                         {QD_WIDTHS(QD_Q4_TILE)},  {QD_WIDTHS(QD_Q4M_TILE)},  {QD_WIDTHS(QD_MX4_TILE)},
                                         {QD_WIDTHS(QD_Q8_FINE)},  {QD_WIDTHS(QD_Q4_FINE)},   {QD_WIDTHS(QD_Q4M_FINE)},
                                         {QD_WIDTHS(QD_MX4_FINE)}};
const TileFunction kWideTiles[4][kWidth] = {{QD_WIDTHS(QD_WIDE_TILE)}, {QD_WIDTHS(QD_WIDEM_TILE)},
                                            {QD_WIDTHS(QD_WIDE_FINE)}, {QD_WIDTHS(QD_WIDEM_FINE)}};

void tile_any(int format, bool fine, const uint8_t* tile, int64_t cols, const uint32_t* panel, int width, float* out,
              int64_t stride) {
  const int row = fine && format >= QD_FORMAT_Q8 ? format + 4 : format;
  kTiles[row][width - 1](tile, cols, panel, out, stride);
}

void tile_wide_any(int format, bool fine, const uint8_t* wide, int64_t cols, const uint32_t* panel, int width, float* out,
                   int64_t stride) {
  kWideTiles[(format == QD_FORMAT_Q4M) + 2 * fine][width - 1](wide, cols, panel, out, stride);
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
  format == QD_FORMAT_Q4M ? widen_as<Q4M>(tile, cols, wide) : widen_as<Q4>(tile, cols, wide);
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
