// One tile of 16 rows times a panel, for every format and width. The order of operations for one output number is the
// same at every width and for packed and widened tiles, so a token's result does not depend on its neighbours.

namespace {

constexpr int kWidth = 4;   // tokens of a panel, four registers each
constexpr int kAhead = 4608;  // bytes of prefetch: measured 38 % faster than 1152 B on streamed weights (see docs)

// Where the lines, scales and minima of 32 columns, the i-th group of a block, are; scales undo what `dot` makes of numbers.
enum NumberKind { kBytes, kNibbles, kCodes, kUnevenCodes };
struct Q8 {
  static constexpr NumberKind numbers = kBytes;
  static constexpr bool minimum = false;
  static constexpr int64_t groups = 2, block_bytes = 1088, first_line = 64, group_bytes = 512;
  static int32_t zero_point(uint32_t unit) { return kSignedBytes ? 0 : int32_t(unit); }
  static vf scale(const uint8_t* block, int64_t i) { return load_half(reinterpret_cast<const uint16_t*>(block) + 16 * i); }
  static vf least(const uint8_t*, int64_t) { return all(0.0f); }
};
constexpr float kNibbleFactor = 1.0f / (1 << kNibbleShift);
struct Q4 : Q8 {
  static constexpr NumberKind numbers = kNibbles;
  static constexpr int64_t block_bytes = 576, group_bytes = 256;
  static int32_t zero_point(uint32_t unit) { return int32_t(unit) >> (4 - kNibbleShift); }  // exact
  static vf scale(const uint8_t* block, int64_t i) { return Q8::scale(block, i) * all(kNibbleFactor); }
};
struct Q4M : Q4 {
  static constexpr bool minimum = true;
  static constexpr int64_t block_bytes = 640, first_line = 128;
  static vf least(const uint8_t* block, int64_t i) { return Q8::scale(block, i + 2); }
};
struct MX4 : Q4 {  // twice the number, and where the product wants unsigned bytes 16 more
  static constexpr NumberKind numbers = kCodes;
  static int32_t zero_point(uint32_t unit) { return kSignedBytes ? 0 : int32_t(unit) >> 3; }  // exact
  static vf scale(const uint8_t* block, int64_t i) { return Q8::scale(block, i); }
};
struct IQ4NL : MX4 {
  static constexpr NumberKind numbers = kUnevenCodes;
  static int32_t zero_point(uint32_t unit) { return Q8::zero_point(unit); }
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

}  // namespace
#include "lines_neon.inl"
namespace {
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

template <class F>
QD_INLINE void prefetch_group(const uint8_t* block, int64_t i) {
  constexpr int64_t share = F::block_bytes / F::groups;
  for (int64_t j = 0; j < share; j += 64) prefetch(block + i * share + kAhead + j);
}

#if QD_I8MM
}  // namespace
#include "grid.inl"
namespace {
#endif

template <class F, int P, int M>
void tile_int(const uint8_t* tile, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
#if QD_I8MM
  if constexpr (M % 2 == 0 && M >= 4) return tile_squares<F, false, P, M>(tile, cols, panel, out, stride);
#endif
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    prefetch_group<F>(block, i);
    vi acc[M];
    multiply_group<F, false, P, M>(acc, block + F::first_line + i * F::group_bytes, panel + g * group_units(P) * M);
    finish_group<M, P, F::minimum>(f, acc, F::scale(block, i), F::least(block, i), panel + g * group_units(P) * M);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <class F, int P, int M>
void tile_widened(const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
#if QD_I8MM
  if constexpr (M % 2 == 0) return tile_squares<F, true, P, M>(wide, cols, panel, out, stride);
#endif
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* lines = wide + g * 64 * (F::minimum ? 10 : 9);
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

}  // namespace
