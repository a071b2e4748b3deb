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

// acc += units 2 l and 2 l + 1 of packed lines times one plane of M tokens.
template <class F, int M, int l>
QD_INLINE void multiply_pair(vi* acc, const uint8_t* lines, const uint32_t* units) {
  vb w[2];
  F::template pair<l>(lines, w);
  each<M>([&](int m) { acc[m] = dot_two(acc[m], w, units[2 * l * M + m], units[(2 * l + 1) * M + m]); });
}

// f += 16 columns, run h of two.
template <class F, int P, int M, int h>
QD_INLINE void add_half(vf* f, const uint8_t* block, int64_t i, const uint32_t* units) {
  const Tail tail(units, P, M);
  const uint8_t* lines = block + F::first_line + i * F::group_bytes;
  const auto sum = [&](int m) { return h ? tail.sum(m) - tail.first_sum(m) : tail.first_sum(m); };
  vi acc[M];
  each_plane<P, M>(acc, [&](int m) { return F::zero ? sum(m) / 128 * F::zero : 0; }, [&](int p) {
    multiply_pair<F, M, 2 * h>(acc, lines, units + 8 * p * M), multiply_pair<F, M, 2 * h + 1>(acc, lines, units + 8 * p * M);
  });
  finish_half<M, F::minimum>(f, acc, F::scale(block, 2 * i + h), F::least(block, 2 * i + h), tail, sum);
}

// A tile of blocks whose numbers are put together of parts.
template <class F, int P, int M>
void tile_runs(const uint8_t* tile, int64_t cols, const uint32_t* panel, int64_t, float* out, int64_t stride) {
  sum_groups<F, P, M>(tile, cols, panel, M, out, stride, [](vf* f, const uint8_t* block, int64_t i, const uint32_t* units) {
    if constexpr (F::runs == 2) {
      add_half<F, P, M, 0>(f, block, i, units), add_half<F, P, M, 1>(f, block, i, units);
    } else {
      const uint8_t* lines = block + F::first_line + i * F::group_bytes;
      vi acc[M];
      const Tail tail(units, P, M);
      each_plane<P, M>(acc, [&](int m) { return F::zero ? tail.sum(m) / 128 * F::zero : 0; }, [&](int p) {
        const uint32_t* plane = units + 8 * p * M;
        multiply_pair<F, M, 0>(acc, lines, plane), multiply_pair<F, M, 1>(acc, lines, plane);
        multiply_pair<F, M, 2>(acc, lines, plane), multiply_pair<F, M, 3>(acc, lines, plane);
      });
      finish_group<M, F::minimum>(f, acc, F::scale(block, i), F::least(block, i), tail);
    }
  });
}

}  // namespace
