// One tile of 16 rows times a panel, straight from the packed lines: of a few tokens, and of any number in the formats that most
// models have; groups.inl has the rest. The order of operations for one output number is the same at every width, so a token's result does not depend on its neighbours.

namespace {

#if QD_AVX512 || QD_AVX2
constexpr int kFew = 2;  // tokens that are multiplied straight from packed lines
#else
constexpr int kFew = 0;  // plain C++ is bound by its arithmetic
#endif
#if QD_AVX512
constexpr int kWidth = 12;  // tokens of a panel: as many sums as the registers hold
#elif QD_AVX2
constexpr int kWidth = 6;
#else
constexpr int kWidth = 2;
#endif
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

// What follows the units of a group in a panel of `width` tokens: scales, -128 times the sums of the activations, scaled sums,
// -128 times the sums of the first 16.
struct Tail {
  const uint32_t* at;
  int64_t width;
  Tail(const uint32_t* group, int planes, int64_t panel_width) : at(group + 8 * planes * panel_width), width(panel_width) {}
  float step(int m) const { return reinterpret_cast<const float*>(at)[m]; }
  vf scale(int m) const { return all(step(m)); }
  int32_t sum(int m) const { return int32_t(at[width + m]); }
  vf scaled_sum(int m) const { return all(reinterpret_cast<const float*>(at)[2 * width + m]); }
  int32_t first_sum(int m) const { return int32_t(at[3 * width + m]); }
};

// acc = zero(m) + multiply(acc, plane) of all P planes: of two, the high bytes count 128 times. Exact in any order.
template <int P, int M, class Zero, class Multiply>
QD_INLINE void each_plane(vi* acc, Zero zero, Multiply multiply) {
  each<M>([&](int m) { acc[m] = all_int(P == 1 ? zero(m) : 0); });
  multiply(0);
  if (P == 1) return;
  each<M>([&](int m) { acc[m] = shift_left<7>(acc[m]) + all_int(zero(m)); });
  multiply(1);
}

template <int M, bool minimum>
QD_INLINE void finish_group(vf* f, const vi* acc, vf scale, vf least, Tail tail) {
  each<M>([&](int m) {
    f[m] = fma(to_float(acc[m]) * scale, tail.scale(m), f[m]);
    if (minimum) f[m] = fma(least, tail.scaled_sum(m), f[m]);
  });
}

// The same for 16 columns whose activations add up to sum(m) / -128.
template <int M, bool minimum, class Sum>
QD_INLINE void finish_half(vf* f, const vi* acc, vf scale, vf least, Tail tail, Sum sum) {
  each<M>([&](int m) {
    f[m] = fma(to_float(acc[m]) * scale, tail.scale(m), f[m]);
    if (minimum) f[m] = fma(least, all(float(sum(m)) * (-1.0f / 128) * tail.step(m)), f[m]);
  });
}

// acc += a group's packed lines times one plane of M tokens.
template <class F, int M>
QD_INLINE void multiply_packed(vi* acc, const uint8_t* lines, const uint32_t* units, int64_t width) {
  vn part[M];
  each<M>([&](int m) { part[m] = begin_nibbles(acc[m]); });
#pragma GCC unroll 8
  for (int l = 0; l < (F::numbers == kBytes ? 8 : 4); ++l) {
    if constexpr (F::numbers == kBytes) {
      const vq w = bytes_line(lines + 64 * l);
      each<M>([&](int m) { acc[m] = dot_bytes(acc[m], w, units[l * width + m]); });
      continue;
    }
    const vb both = load_bytes(lines + 64 * l);
    const uint32_t *first = units + 2 * l * width, *second = first + width;
    if constexpr (F::numbers == kUnevenCodes) {
      const vq low = low_codes<Uneven>(both), high = high_codes<Uneven>(both);
      each<M>([&](int m) { acc[m] = dot_bytes(dot_bytes(acc[m], low, first[m]), high, second[m]); });
    } else if constexpr (F::numbers == kCodes) {
      const vq low = low_codes<E2M1>(both), high = high_codes<E2M1>(both);
      each<M>([&](int m) { part[m] = dot_codes(dot_codes(part[m], low, first[m]), high, second[m]); });
    } else {
      const vb low = low_nibbles(both), high = high_nibbles(both);
      each<M>([&](int m) { part[m] = dot_nibbles(dot_nibbles(part[m], low, first[m]), high, second[m]); });
    }
  }
  if (F::numbers == kNibbles || F::numbers == kCodes) each<M>([&](int m) { acc[m] = end_nibbles(part[m], acc[m]); });
}

template <class F>
QD_INLINE void prefetch_group(const uint8_t* block, int64_t i) {
  constexpr int64_t share = F::block_bytes / F::groups;
  for (int64_t j = 0; j < share; j += 64) prefetch(block + i * share + kAhead + j);
}

// add(f, block, i, units): a tile's groups one after the other; group i of a block times its part of the panel.
template <class F, int P, int M, class Add>
QD_INLINE void sum_groups(const uint8_t* tile, int64_t cols, const uint32_t* panel, int64_t width, float* out, int64_t stride, Add add) {
  vf f[M];
  each<M>([&](int m) { f[m] = all(0.0f); });
  const int64_t groups = groups_of(cols), units = group_units(P) * width;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    prefetch_group<F>(block, g % F::groups);
    add(f, block, g % F::groups, panel + g * units);
  }
  each<M>([&](int m) { store(out + m * stride, f[m]); });
}

// M tokens of a panel: all of it, or where there are two planes of some beside others.
template <class F, int P, int M>
void tile_groups(const uint8_t* tile, int64_t cols, const uint32_t* panel, int64_t panel_width, float* out, int64_t stride) {
  const int64_t width = P == 1 ? M : panel_width;
  sum_groups<F, P, M>(tile, cols, panel, width, out, stride, [width](vf* f, const uint8_t* block, int64_t i, const uint32_t* units) {
    const Tail tail(units, P, width);
    vi acc[M];
    each_plane<P, M>(acc, [&](int m) { return F::minimum ? 0 : F::zero_point(uint32_t(tail.sum(m))); },
                     [&](int p) { multiply_packed<F, M>(acc, block + F::first_line + i * F::group_bytes, units + 8 * p * width, width); });
    finish_group<M, F::minimum>(f, acc, F::scale(block, i), F::least(block, i), tail);
  });
}

template <bool bf16, int M>
void tile_float(const uint8_t* tile, int64_t cols, const uint32_t* panel, int64_t, float* out, int64_t stride) {
  vf f[M];
  each<M>([&](int m) { f[m] = all(0.0f); });
  const int64_t units = bf16 ? (cols + 1) / 2 : cols;
  for (int64_t u = 0; u < units; ++u) {
    prefetch(tile + u * 64 + kAhead);
    const vb w = load_bytes(tile + u * 64);
    each<M>([&](int m) { f[m] = bf16 ? dot2(f[m], w, panel[u * M + m]) : dot1(f[m], w, panel[u * M + m]); });
  }
  each<M>([&](int m) { store(out + m * stride, f[m]); });
}

}  // namespace
