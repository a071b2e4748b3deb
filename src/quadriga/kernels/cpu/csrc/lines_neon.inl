// matmul.inl's inner products on 64-bit ARM: one load brings four activations, of which each product takes one by its place
// in the register. Sums of whole numbers: the same as anywhere, in any order.
#include <utility>

namespace {

// acc += a line times the activation at `place` of these units. Up to three units behind it are read: a group's record goes on.
template <int place> QD_INLINE vi dot_place(vi acc, vb w, const uint32_t* units) {
  const int8x16_t x = vreinterpretq_s8_u32(vld1q_u32(units + place / 4 * 4));
#if QD_I8MM
#define QD_PART(part) vusdotq_laneq_s32(acc.part, w.part, x, place % 4)
#else
#define QD_PART(part) vdotq_laneq_s32(acc.part, vreinterpretq_s8_u8(w.part), x, place % 4)
#endif
  return {QD_PART(a), QD_PART(b), QD_PART(c), QD_PART(d)};
#undef QD_PART
}

// acc[m] += the group's line `unit` times token m's activations.
template <int unit, int M, int... m> QD_INLINE void add_line(vi* acc, vb w, const uint32_t* units, std::integer_sequence<int, m...>) {
  ((acc[m] = dot_place<unit * M + m>(acc[m], w, units)), ...);
}
template <int unit, int M> QD_INLINE void add_line(vi* acc, vb w, const uint32_t* units) {
  add_line<unit, M>(acc, w, units, std::make_integer_sequence<int, M>());
}

#if QD_I8MM  // unpacked lines lie as grid.inl wants them: of four rows, a register of two and another of two
QD_INLINE uint8x16_t unzip_first(uint8x16_t x, uint8x16_t y) { return vreinterpretq_u8_u32(vuzp1q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y))); }
QD_INLINE uint8x16_t unzip_second(uint8x16_t x, uint8x16_t y) { return vreinterpretq_u8_u32(vuzp2q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y))); }
QD_INLINE void unzipped_lines(const uint8_t* lines, vb* w) {
  const vb x = load_bytes(lines), y = load_bytes(lines + 64);
  w[0] = {unzip_first(x.a, x.b), unzip_first(x.c, x.d), unzip_first(y.a, y.b), unzip_first(y.c, y.d)};
  w[1] = {unzip_second(x.a, x.b), unzip_second(x.c, x.d), unzip_second(y.a, y.b), unzip_second(y.c, y.d)};
}
constexpr bool kZipped = true;
#else
QD_INLINE void unzipped_lines(const uint8_t* lines, vb* w) { w[0] = load_bytes(lines), w[1] = load_bytes(lines + 64); }
constexpr bool kZipped = false;
#endif

// Lines 2 l and 2 l + 1 of a group.
template <class F, bool wide, int l> QD_INLINE void two_lines(const uint8_t* lines, vb* w) {
  if constexpr (wide && (kZipped || F::numbers == kNibbles)) {
    unzipped_lines(lines + 128 * l, w);
  } else if constexpr (F::numbers == kBytes) {
    w[0] = bytes_line(lines + 128 * l), w[1] = bytes_line(lines + 128 * l + 64);
  } else {
    const vb both = load_bytes(lines + 64 * l);
    if constexpr (F::numbers == kNibbles) w[0] = low_nibbles(both), w[1] = high_nibbles(both);
    else if constexpr (F::numbers == kCodes) w[0] = low_codes<E2M1>(both), w[1] = high_codes<E2M1>(both);
    else w[0] = low_codes<Uneven>(both), w[1] = high_codes<Uneven>(both);
  }
}

template <class F, bool wide, int M, int l> QD_INLINE void add_two_lines(vi* acc, const uint8_t* lines, const uint32_t* units) {
  vb w[2];
  two_lines<F, wide, l>(lines, w);
  add_line<2 * l, M>(acc, w[0], units), add_line<2 * l + 1, M>(acc, w[1], units);
}

// start(m) + a group's eight lines times one plane of token m's activations; `wide`: nibbles are bytes already.
template <class F, bool wide, int M, class Start>
QD_INLINE void multiply_lines(vi* acc, const uint8_t* lines, const uint32_t* units, Start start) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = start(m);
  add_two_lines<F, wide, M, 0>(acc, lines, units), add_two_lines<F, wide, M, 1>(acc, lines, units);
  add_two_lines<F, wide, M, 2>(acc, lines, units), add_two_lines<F, wide, M, 3>(acc, lines, units);
}

// acc += two lines times both planes of M tokens, whose first units these are.
template <int P, int M> QD_INLINE void add_pair(vi* acc, const vb* w, const uint32_t* units) {
  if constexpr (P == 2) {
    vi high[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) high[m] = all_int(0);
    add_line<0, M>(high, w[0], units), add_line<1, M>(high, w[1], units);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) acc[m] = acc[m] + shift_left<7>(high[m]);
  }
  units += 8 * (P - 1) * M;
  add_line<0, M>(acc, w[0], units), add_line<1, M>(acc, w[1], units);
}

}  // namespace
