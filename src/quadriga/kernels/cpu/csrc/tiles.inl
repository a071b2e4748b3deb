// Which product takes a format at a width.

namespace {

using Direct = void (*)(const uint8_t* tile, int64_t cols, const uint32_t* panel, int64_t width, float* out, int64_t stride);
using OfBytes = void (*)(const Run&, int n, const uint32_t* panel, int64_t width, float* out, int64_t stride);
using Unpack = void (*)(const uint8_t* tile, int64_t first, int64_t n, int64_t record, uint8_t* to);

#if QD_AVX512
#define QD_UP_TO_6(f) f(1), f(2), f(3), f(4), f(5), f(6)
#define QD_WIDTHS(f) QD_UP_TO_6(f), f(7), f(8), f(9), f(10), f(11), f(12)
#elif QD_AVX2
#define QD_UP_TO_6(f) f(1), f(2), f(3), f(4), f(5), f(6)
#define QD_WIDTHS(f) QD_UP_TO_6(f)
#else
#define QD_UP_TO_6(f) f(1), f(2)
#define QD_WIDTHS(f) QD_UP_TO_6(f)
#endif
constexpr int kMostTwice = kWidth < 6 ? kWidth : 6;  // tokens of two planes: a wider panel is multiplied in two parts

#define QD_F32_TILE(m) tile_float<false, m>
#define QD_BF16_TILE(m) tile_float<true, m>
const Direct kFloatTiles[2][kWidth] = {{QD_WIDTHS(QD_F32_TILE)}, {QD_WIDTHS(QD_BF16_TILE)}};

// Products by width, of one plane and of two.
#define QD_ONE_PLANE(m) tile_groups<F, 1, m>
#define QD_TWO_PLANES(m) tile_groups<F, 2, m>
template <class F> constexpr Direct kOnePlane[] = {QD_WIDTHS(QD_ONE_PLANE)};
template <class F> constexpr Direct kTwoPlanes[] = {QD_UP_TO_6(QD_TWO_PLANES)};
#define QD_BYTES_ONE_PLANE(m) bytes_product<K, 1, m>()
#define QD_BYTES_TWO_PLANES(m) bytes_product<K, 2, m>()
template <class K, int P, int M> constexpr OfBytes bytes_product() {
  if constexpr (M > kFew) return add_groups<K, P, M>;
  else return nullptr;
}
template <class K> constexpr OfBytes kBytesOnePlane[] = {QD_WIDTHS(QD_BYTES_ONE_PLANE)};
template <class K> constexpr OfBytes kBytesTwoPlanes[] = {QD_UP_TO_6(QD_BYTES_TWO_PLANES)};
static_assert(kWidth == kMostTwice || kWidth == 2 * kMostTwice, "a full panel is one part or two equal ones");

struct Format {
  int most_direct[2];        // [planes - 1] tokens of a panel that are multiplied straight from packed lines, at most
  const Direct* direct[2];   // [planes - 1][width - 1]
  const OfBytes* bytes[2];   // likewise, of unpacked groups
  Unpack unpack;             // NULL: never
  int zero;                  // see Run
  int64_t share;             // packed bytes of a group
};

template <class F> constexpr Format direct() { return {{kWidth, kWidth}, {kOnePlane<F>, kTwoPlanes<F>}, {}, nullptr, 0, 0}; }
#if QD_AVX512 || QD_AVX2
template <class F> constexpr Direct kFewOnePlane[] = {tile_groups<F, 1, 1>, tile_groups<F, 1, 2>};
template <class F> constexpr Direct kFewTwoPlanes[] = {tile_groups<F, 2, 1>, tile_groups<F, 2, 2>};
template <class F> constexpr Direct kRunsOnePlane[] = {tile_runs<F, 1, 1>, tile_runs<F, 1, 2>};
template <class F> constexpr Direct kRunsTwoPlanes[] = {tile_runs<F, 2, 1>, tile_runs<F, 2, 2>};
#define QD_RUNS_ONE_PLANE(m) tile_runs<F, 1, m>
#define QD_RUNS_TWO_PLANES(m) tile_runs<F, 2, m>
constexpr int kFive = kWidth, kFiveTwice = kMostTwice;  // a nibble and a bit are put together quicker than they go through memory
template <class F> constexpr Direct kFiveOnePlane[] = {QD_WIDTHS(QD_RUNS_ONE_PLANE)};
template <class F> constexpr Direct kFiveTwoPlanes[] = {QD_UP_TO_6(QD_RUNS_TWO_PLANES)};
#else
constexpr int kFive = kFew, kFiveTwice = kFew;
template <class F> constexpr Direct kFiveOnePlane[1] = {};
template <class F> constexpr Direct kFiveTwoPlanes[1] = {};
template <class F> constexpr Direct kFewOnePlane[1] = {};
template <class F> constexpr Direct kFewTwoPlanes[1] = {};
template <class F> constexpr Direct kRunsOnePlane[1] = {};
template <class F> constexpr Direct kRunsTwoPlanes[1] = {};
#endif
// K: what it is when unpacked.
template <class F, class K> constexpr Format of_codes() {
  return {{kFew, kFew}, {kFewOnePlane<F>, kFewTwoPlanes<F>}, {kBytesOnePlane<K>, kBytesTwoPlanes<K>}, unpack_codes<F>, 0, F::block_bytes / F::groups};
}
template <class F, class K> constexpr Format of_runs() {
  return {{kFew, kFew}, {kRunsOnePlane<F>, kRunsTwoPlanes<F>}, {kBytesOnePlane<K>, kBytesTwoPlanes<K>}, unpack_runs<F>, F::zero, F::block_bytes / F::groups};
}

template <class F, class K> constexpr Format of_five() {
  return {{kFive, kFiveTwice}, {kFiveOnePlane<F>, kFiveTwoPlanes<F>}, {kBytesOnePlane<K>, kBytesTwoPlanes<K>}, unpack_runs<F>, F::zero, F::block_bytes / F::groups};
}

const Format kFormats[] = {  // from QD_FORMAT_Q8 on
    direct<Q8>(), direct<Q4>(), direct<Q4M>(), direct<MX4>(), of_codes<IQ4NL, Bytes>(), of_five<Q5, Small>(), of_five<Q5M, SmallLeast>(),
    of_runs<Q2K, HalvesLeast>(), of_runs<Q3K, Halves>(), direct<Q4K>(), of_runs<Q5K, SmallLeast>(), of_runs<Q6K, Halves>(), of_codes<IQ4XS, Bytes>()};
static_assert(sizeof kFormats / sizeof *kFormats == QD_FORMAT_IQ4XS - QD_FORMAT_Q8 + 1, "a row for each quantised format");

// product(first token, how many) for a whole panel.
template <class Product>
QD_INLINE void in_parts(int planes, int width, Product product) {
  if (planes == 1 || width <= kMostTwice) return product(0, width);
  const int half = (width + 1) / 2;
  product(0, half), product(half, width - half);
}

// out = a tile's groups, kRun at a time, which run_of(run, first, n) finds, times a panel.
template <class RunOf>
void sum_runs(const OfBytes* products, Run run, int64_t cols, const uint32_t* panel, int planes, int width, float* out, int64_t stride, RunOf run_of) {
  alignas(64) float sums[kWidth * kTile] = {};  // close together, which rows of out are not
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; g += kRun, run.ahead += kRun * run.ahead_bytes) {
    const int n = int(groups - g < kRun ? groups - g : kRun);
    run_of(run, g, n);
    const uint32_t* units = panel + g * group_units(planes) * width;
    in_parts(planes, width, [&](int first, int count) { products[count - 1](run, n, units + first, width, sums + first * kTile, kTile); });
  }
  for (int m = 0; m < width; ++m) store(out + m * stride, load(sums + m * kTile));
}

void tile_any(int kind, bool int16, const uint8_t* tile, int64_t cols, const uint32_t* panel, int width, float* out, int64_t stride) {
  const int planes = int16 ? 2 : 1;
  if (kind < QD_FORMAT_Q8) return kFloatTiles[kind][width - 1](tile, cols, panel, width, out, stride);
  const Format& format = kFormats[kind - QD_FORMAT_Q8];
  if (width <= format.most_direct[planes - 1])
    return in_parts(planes, width, [&](int first, int count) {
      format.direct[planes - 1][count - 1](tile, cols, panel + first, width, out + first * stride, stride);
    });
  alignas(64) uint8_t room[kRun * kMostWideGroup];
  const int64_t record = wide_group_bytes(kind);
  Run run{};
  run.zero = format.zero, run.ahead = tile + kAhead, run.ahead_bytes = format.share;
  run.floats = reinterpret_cast<const float*>(room + 512), run.stride = record / 4;
  for (int i = 0; i < kRun; ++i) run.lines[i] = room + i * record;
  sum_runs(format.bytes[planes - 1], run, cols, panel, planes, width, out, stride,
           [&](Run&, int64_t first, int n) { format.unpack(tile, first, n, record, room); });
}

void widen_any(int kind, const uint8_t* tile, int64_t cols, uint8_t* wide) {
  kFormats[kind - QD_FORMAT_Q8].unpack(tile, 0, groups_of(cols), wide_group_bytes(kind), wide);
}

void tile_wide_any(int kind, bool int16, const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  const int64_t record = wide_group_bytes(kind);
  const int planes = int16 ? 2 : 1;
  const Format& format = kFormats[kind - QD_FORMAT_Q8];
  Run run{};
  run.zero = format.zero, run.stride = record / 4;
  sum_runs(format.bytes[planes - 1], run, cols, panel, planes, kWidth, out, stride, [&](Run& now, int64_t first, int n) {
    now.floats = reinterpret_cast<const float*>(wide + first * record + 512);
    for (int i = 0; i < n; ++i) now.lines[i] = wide + (first + i) * record;
  });
}

}  // namespace
