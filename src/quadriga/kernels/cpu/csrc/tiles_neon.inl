// The products of every format at every width as tables, and the unpacking of tiles for many tokens.

namespace {

using TileFunction = void (*)(const uint8_t*, int64_t, const uint32_t*, float*, int64_t);

#define QD_WIDTHS(f) f(1), f(2), f(3), f(4)

#define QD_F32_TILE(m) tile_float<false, m>
#define QD_BF16_TILE(m) tile_float<true, m>

// A row of `kTiles`: one format beside activations of P planes.
template <class F, int P> struct Row {
#define QD_TILE(m) tile_int<F, P, m>
#define QD_RUN_TILE(m) tile_runs<F, P, m>
  static constexpr TileFunction groups[kWidth] = {QD_WIDTHS(QD_TILE)};
  static constexpr TileFunction runs[kWidth] = {QD_WIDTHS(QD_RUN_TILE)};
#define QD_WIDE_TILE(m) tile_widened<F, P, m>
#define QD_WIDE_RUN_TILE(m) tile_widened_runs<F, P, m>
  static constexpr TileFunction wide_groups[kWidth] = {QD_WIDTHS(QD_WIDE_TILE)};
  static constexpr TileFunction wide_runs[kWidth] = {QD_WIDTHS(QD_WIDE_RUN_TILE)};
};

#define QD_ALL_ROWS(P)                                                                                               \
  Row<Q8, P>::groups, Row<Q4, P>::groups, Row<Q4M, P>::groups, Row<MX4, P>::groups, Row<IQ4NL, P>::groups,           \
      Row<Q5, P>::runs, Row<Q5M, P>::runs,                                                                           \
      Row<Q2K, P>::runs, Row<Q3K, P>::runs, Row<Q4K, P>::groups, Row<Q5K, P>::runs, Row<Q6K, P>::runs, Row<IQ4XS, P>::groups
#define QD_ALL_WIDE_ROWS(P)                                                                                          \
  nullptr, Row<Q4, P>::wide_groups, Row<Q4M, P>::wide_groups, nullptr, Row<Q8, P>::wide_groups, Row<Q5, P>::wide_runs,  \
      Row<Q5M, P>::wide_runs, Row<Q2K, P>::wide_runs,                                                                \
      Row<Q3K, P>::wide_runs, Row<Q4M, P>::wide_groups, Row<Q5K, P>::wide_runs, Row<Q6K, P>::wide_runs, Row<Q8, P>::wide_groups

constexpr int kQuantised = QD_FORMAT_IQ4XS - QD_FORMAT_Q8 + 1;
const TileFunction kFloatTiles[2][kWidth] = {{QD_WIDTHS(QD_F32_TILE)}, {QD_WIDTHS(QD_BF16_TILE)}};
const TileFunction* const kTiles[2][kQuantised] = {{QD_ALL_ROWS(1)}, {QD_ALL_ROWS(2)}};
const TileFunction* const kWideTiles[2][kQuantised] = {{QD_ALL_WIDE_ROWS(1)}, {QD_ALL_WIDE_ROWS(2)}};

void tile_any(int format, bool int16, const uint8_t* tile, int64_t cols, const uint32_t* panel, int width, float* out,
              int64_t stride) {
  const TileFunction* row = format < QD_FORMAT_Q8 ? kFloatTiles[format] : kTiles[int16][format - QD_FORMAT_Q8];
  row[width - 1](tile, cols, panel, out, stride);
}

void tile_wide_any(int format, bool int16, const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  kWideTiles[int16][format - QD_FORMAT_Q8][kWidth - 1](wide, cols, panel, out, stride);
}

QD_INLINE void widen_line(vb low, vb high, uint8_t* to) {
#if QD_I8MM
  vb w[2];
  zip_lines(low, high, w);
  store_bytes(to, w[0]), store_bytes(to + 64, w[1]);
#else
  store_bytes(to, low), store_bytes(to + 64, high);
#endif
}

template <class F>
void widen_as(const uint8_t* tile, int64_t cols, uint8_t* wide) {
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    uint8_t* to = wide + g * 64 * (F::minimum ? 10 : 9);
    for (int l = 0; l < 4; ++l) {
      const vb both = load_bytes(block + F::first_line + i * F::group_bytes + 64 * l);
      if (F::numbers == kNibbles) widen_line(low_nibbles(both), high_nibbles(both), to + 128 * l);
      else widen_line(bytes_of_codes(low_codes<Uneven>(both)), bytes_of_codes(high_codes<Uneven>(both)), to + 128 * l);
    }
    store(reinterpret_cast<float*>(to + 512), F::scale(block, i));
    if (F::minimum) store(reinterpret_cast<float*>(to + 576), F::least(block, i));
  }
}

void widen_any(int format, const uint8_t* tile, int64_t cols, uint8_t* wide) {
  switch (format) {
    case QD_FORMAT_Q4: return widen_as<Q4>(tile, cols, wide);
    case QD_FORMAT_Q4M: return widen_as<Q4M>(tile, cols, wide);
    case QD_FORMAT_IQ4NL: return widen_as<IQ4NL>(tile, cols, wide);
    case QD_FORMAT_Q5: return widen_runs<Q5>(tile, cols, wide);
    case QD_FORMAT_Q5M: return widen_runs<Q5M>(tile, cols, wide);
    case QD_FORMAT_Q2K: return widen_runs<Q2K>(tile, cols, wide);
    case QD_FORMAT_Q3K: return widen_runs<Q3K>(tile, cols, wide);
    case QD_FORMAT_Q4K: return widen_as<Q4K>(tile, cols, wide);
    case QD_FORMAT_Q5K: return widen_runs<Q5K>(tile, cols, wide);
    case QD_FORMAT_Q6K: return widen_runs<Q6K>(tile, cols, wide);
    case QD_FORMAT_IQ4XS: return widen_as<IQ4XS>(tile, cols, wide);
  }
}

}  // namespace
