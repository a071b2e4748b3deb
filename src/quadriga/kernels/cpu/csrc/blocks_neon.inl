// GGUF's blocks of 256 columns, and those of five bits, as tiles of 16 rows: where their parts lie, their products. The drawing
// is in layout.hpp. A number is put together of a line of nibbles, of two bits and of one, those that its format has, two units of
// four columns at a time; scales are multiplied by their block's d first, which is exact in float32.

namespace {

// What the lines of a group hold; crumbs and bits: how far up their part of a number stands, -1: there are none.
template <bool nibbles_, int crumbs_, int bits_, int runs_, bool minimum_>
struct Block {
  static constexpr bool nibbles = nibbles_, minimum = minimum_, both = minimum_ && runs_ == 2;
  static constexpr int crumbs = crumbs_, bits = bits_, runs = runs_;  // runs of columns with a scale, of 32
  static constexpr int64_t groups = 8, group_bytes = 64 * (4 * nibbles + 2 * (crumbs >= 0) + (bits >= 0));
  static constexpr int64_t scales_at = 64, minima_at = 64 + 128 * runs;  // `both`: four bits each in one byte
  static constexpr int64_t first_line = minima_at + (minimum && !both ? 128 : 0), block_bytes = first_line + 8 * group_bytes;

  static vf half(const uint8_t* block, int which) { return load_half(reinterpret_cast<const uint16_t*>(block) + 16 * which); }
  static vf numbers_at(const uint8_t* block, int64_t at) { return load_int8(reinterpret_cast<const int8_t*>(block + at)); }
  static vf scale(const uint8_t* block, int64_t i) {  // of run i of the block
    if (both) return half(block, 0) * to_float(load_uint8(block + scales_at + 16 * i) & all_int(15));
    return half(block, 0) * numbers_at(block, scales_at + 16 * i);
  }
  static vf least(const uint8_t* block, int64_t i) {  // stored as numbers from -63 to 0
    if (!minimum) return all(0.0f);
    if (both) return half(block, 1) * all(-1.0f / 16) * to_float(load_uint8(block + scales_at + 16 * i) & all_int(240));
    return half(block, 1) * numbers_at(block, minima_at + 16 * i);
  }

  // Units 2 l and 2 l + 1 of a group.
  template <int l> QD_INLINE void pair(const uint8_t* lines, vb* w) {
    vb two{}, four{};
    if (nibbles) {
      const vb x = load_bytes(lines + 64 * l);
      two = only(x, 15), four = only(move_bits<-4>(x), 15);
    }
    if (crumbs >= 0) {
      constexpr int up = crumbs - 4 * (l % 2);
      const vb x = load_bytes(lines + 256 * nibbles + 64 * (l / 2));
      two = with_bits(two, move_bits<up>(x), uint8_t(3 << crumbs)), four = with_bits(four, move_bits<up - 2>(x), uint8_t(3 << crumbs));
    }
    if (bits >= 0) {
      constexpr int up = bits - 2 * l;
      const vb x = load_bytes(lines + 256 * nibbles + 128 * (crumbs >= 0));
      two = with_bits(two, move_bits<up>(x), uint8_t(1 << bits)), four = with_bits(four, move_bits<up - 1>(x), uint8_t(1 << bits));
    }
    w[0] = two, w[1] = four;
  }
};

struct Q2K : Block<false, 0, -1, 2, true> { static constexpr int zero = 0; };
struct Q3K : Block<false, 0, 2, 2, false> { static constexpr int zero = 4; };
struct Q5K : Block<true, -1, 4, 1, true> { static constexpr int zero = 0; };
struct Q6K : Block<true, 4, -1, 2, false> { static constexpr int zero = 32; };
struct Q4K : Block<true, -1, -1, 1, true> {
  static constexpr NumberKind numbers = kNibbles;
  static constexpr int zero = 0;
  static int32_t zero_point(uint32_t) { return 0; }
  static vf scale(const uint8_t* block, int64_t i) { return half(block, 0) * all(kNibbleFactor) * numbers_at(block, scales_at + 16 * i); }
};
struct IQ4XS : Block<true, -1, -1, 1, false> {
  static constexpr NumberKind numbers = kUnevenCodes;
  static constexpr int zero = 0;
  static int32_t zero_point(uint32_t unit) { return Q8::zero_point(unit); }
};

// Of 64 columns: float16 scales and, where numbers have a minimum, minima, before the lines of two groups.
template <bool minimum_> struct Fives : Block<true, -1, 4, 1, minimum_> {
  static constexpr int zero = minimum_ ? 0 : 16;
  static constexpr int64_t groups = 2, first_line = minimum_ ? 128 : 64, block_bytes = first_line + 2 * Fives::group_bytes;
  static vf scale(const uint8_t* block, int64_t i) { return Q8::scale(block, i); }
  static vf least(const uint8_t* block, int64_t i) { return minimum_ ? Q8::scale(block, i + 2) : all(0.0f); }
};
struct Q5 : Fives<false> {};
struct Q5M : Fives<true> {};

// acc += units 2 l and 2 l + 1 times both planes: exact, in any order.
template <class F, bool wide, int P, int M, int l>
QD_INLINE void multiply_pair(vi* acc, const uint8_t* lines, const uint32_t* rec) {
  vb w[2];
  if (wide) w[0] = load_bytes(lines + 128 * l), w[1] = load_bytes(lines + 128 * l + 64);
  else F::template pair<l>(lines, w);
  add_pair<P, M>(acc, w, rec + 2 * l * M);
}

// f += 32 columns. scales(h), least(h): of run h.
template <class F, bool wide, int P, int M, class Scales, class Least>
QD_INLINE void add_runs(vf* f, const uint8_t* lines, const uint32_t* rec, Scales scales, Least least) {
  vi acc[M];
  const int32_t* all_of = reinterpret_cast<const int32_t*>(rec + (8 * P + 1) * M);
  const int32_t* first_of = reinterpret_cast<const int32_t*>(rec + (8 * P + 3) * M);
  if (F::runs == 1) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) acc[m] = all_int(F::zero ? all_of[m] / 128 * F::zero : 0);
    multiply_pair<F, wide, P, M, 0>(acc, lines, rec), multiply_pair<F, wide, P, M, 1>(acc, lines, rec);
    multiply_pair<F, wide, P, M, 2>(acc, lines, rec), multiply_pair<F, wide, P, M, 3>(acc, lines, rec);
    return finish_group<M, P, F::minimum>(f, acc, scales(0), least(0), rec);
  }
  const float* steps = reinterpret_cast<const float*>(rec + 8 * P * M);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    int32_t sums[M];  // -128 times the activations' sum
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      sums[m] = h ? all_of[m] - first_of[m] : first_of[m];
      acc[m] = all_int(F::zero ? sums[m] / 128 * F::zero : 0);
    }
    if (h == 0) multiply_pair<F, wide, P, M, 0>(acc, lines, rec), multiply_pair<F, wide, P, M, 1>(acc, lines, rec);
    else multiply_pair<F, wide, P, M, 2>(acc, lines, rec), multiply_pair<F, wide, P, M, 3>(acc, lines, rec);
    const vf scale = scales(h), low = least(h);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      f[m] = fma(to_float(acc[m]) * scale, all(steps[m]), f[m]);
      if (F::minimum) f[m] = fma(low, all(float(sums[m]) * (-1.0f / 128) * steps[m]), f[m]);
    }
  }
}

template <class F, int P, int M>
void tile_runs(const uint8_t* tile, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    prefetch_group<F>(block, i);
    add_runs<F, false, P, M>(
        f, block + F::first_line + i * F::group_bytes, panel + g * group_units(P) * M,
        [&](int h) { return F::scale(block, F::runs * i + h); }, [&](int h) { return F::least(block, F::runs * i + h); });
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <class F> constexpr int64_t wide_bytes = 64 * (8 + F::runs * (1 + F::minimum));

template <class F, int P, int M>
void tile_widened_runs(const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out, int64_t stride) {
  vf f[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) f[m] = all(0.0f);
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* lines = wide + g * wide_bytes<F>;
    const float* floats = reinterpret_cast<const float*>(lines + 512);
    add_runs<F, true, P, M>(
        f, lines, panel + g * group_units(P) * M, [&](int h) { return load(floats + 16 * h); },
        [&](int h) { return F::minimum ? load(floats + 16 * (F::runs + h)) : all(0.0f); });
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(out + m * stride, f[m]);
}

template <class F>
void widen_runs(const uint8_t* tile, int64_t cols, uint8_t* wide) {
  const int64_t groups = groups_of(cols);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    const uint8_t* lines = block + F::first_line + i * F::group_bytes;
    uint8_t* to = wide + g * wide_bytes<F>;
    vb w[8];
    F::template pair<0>(lines, w), F::template pair<1>(lines, w + 2), F::template pair<2>(lines, w + 4), F::template pair<3>(lines, w + 6);
    for (int u = 0; u < 8; ++u) store_bytes(to + 64 * u, w[u]);
    float* floats = reinterpret_cast<float*>(to + 512);
    for (int h = 0; h < F::runs; ++h) {
      store(floats + 16 * h, F::scale(block, i * F::runs + h));
      if (F::minimum) store(floats + 16 * (F::runs + h), F::least(block, i * F::runs + h));
    }
  }
}

}  // namespace
