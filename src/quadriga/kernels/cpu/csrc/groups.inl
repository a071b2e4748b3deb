// Tiles of the rarer formats as plain bytes: 256 columns at a time, in the nearest cache, for more than a few tokens; or a whole
// tile at once for many panels. Products are compiled once for each kind of bytes, not for each format.

namespace {

// An unpacked group: eight lines of bytes, then float32 lines: a scale for each of its runs, a minimum for each.
constexpr int kRun = 8;  // groups that are multiplied at once: a block of 256 columns
struct Run {
  const uint8_t* lines[kRun];  // of each group
  const float* floats;         // of the first; `stride` numbers to the next
  int64_t stride;
  int zero;  // how much too large every byte is, where kDotSmall takes them
  const uint8_t* ahead;  // what will be wanted later, `ahead_bytes` for each group: fetched between products, not in one burst
  int64_t ahead_bytes;
};

enum Dot { kDotBytes, kDotSmall };  // which product takes such bytes
template <Dot dot_, int runs_, bool minimum_>
struct Kind {
  static constexpr Dot dot = dot_;
  static constexpr int runs = runs_;
  static constexpr bool minimum = minimum_;
};
using Bytes = Kind<kDotBytes, 1, false>;
using Halves = Kind<kDotSmall, 2, false>;
using HalvesLeast = Kind<kDotSmall, 2, true>;
using Small = Kind<kDotSmall, 1, false>;
using SmallLeast = Kind<kDotSmall, 1, true>;

#if QD_AVX512 || QD_AVX2
constexpr int kUnroll = 8;  // written out: in a loop gcc 12 copies every sum before and after each product
#else
constexpr int kUnroll = 1;
#endif

// acc += n lines of bytes times one plane of M tokens, of `width` in the panel.
template <Dot dot, int M, int n>
QD_INLINE void multiply_lines(vi* acc, const uint8_t* lines, const uint32_t* units, int64_t width) {
  if constexpr (dot == kDotSmall) {
#pragma GCC unroll kUnroll
    for (int l = 0; l < n; l += 2) {
      const vb w[2] = {load_bytes(lines + 64 * l), load_bytes(lines + 64 * l + 64)};
      each<M>([&](int m) { acc[m] = dot_two(acc[m], w, units[l * width + m], units[(l + 1) * width + m]); });
    }
  } else {
#pragma GCC unroll kUnroll
    for (int l = 0; l < n; ++l) {
      const vq w = bytes_line(lines + 64 * l);
      each<M>([&](int m) { acc[m] = dot_bytes(acc[m], w, units[l * width + m]); });
    }
  }
}

// out (M, 16) += the first n groups of a run times their part of a panel: of all its tokens, or where there are two planes of M
// beside others.
template <class K, int P, int M>
void add_groups(const Run& run, int n, const uint32_t* panel, int64_t panel_width, float* out, int64_t stride) {
  const int64_t width = P == 1 ? M : panel_width;
  vf f[M];
  each<M>([&](int m) { f[m] = load(out + m * stride); });
  for (int g = 0; g < n; ++g) {
    const uint32_t* units = panel + g * group_units(P) * width;
    const Tail tail(units, P, width);
    const float* floats = run.floats + g * run.stride;
    for (int64_t j = 0; j < run.ahead_bytes; j += 64) prefetch(run.ahead + g * run.ahead_bytes + j);
    vi acc[M];
    if constexpr (K::runs == 1) {
      const auto zero = [&](int m) { return K::dot == kDotSmall ? tail.sum(m) / 128 * run.zero : Q8::zero_point(uint32_t(tail.sum(m))); };
      each_plane<P, M>(acc, [&](int m) { return K::minimum ? 0 : zero(m); },
                       [&](int p) { multiply_lines<K::dot, M, 8>(acc, run.lines[g], units + 8 * p * width, width); });
      finish_group<M, K::minimum>(f, acc, load(floats), K::minimum ? load(floats + 16) : all(0.0f), tail);
    } else {
#pragma GCC unroll 1
      for (int h = 0; h < 2; ++h) {
        const auto sum = [&](int m) { return h ? tail.sum(m) - tail.first_sum(m) : tail.first_sum(m); };
        each_plane<P, M>(acc, [&](int m) { return K::minimum ? 0 : sum(m) / 128 * run.zero; }, [&](int p) {
          multiply_lines<K::dot, M, 4>(acc, run.lines[g] + 256 * h, units + (8 * p + 4 * h) * width, width);
        });
        const vf least = K::minimum ? load(floats + 16 * (2 + h)) : all(0.0f);
        finish_half<M, K::minimum>(f, acc, load(floats + 16 * h), least, tail, sum);
      }
    }
  }
  each<M>([&](int m) { store(out + m * stride, f[m]); });
}

// Groups [first, first + n) of a tile of uneven codes as records of wide_group_bytes.
template <class F>
void unpack_codes(const uint8_t* tile, int64_t first, int64_t n, int64_t record, uint8_t* to) {
  for (int64_t g = first; g < first + n; ++g, to += record) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    for (int l = 0; l < 4; ++l) {
      const vb both = load_bytes(block + F::first_line + i * F::group_bytes + 64 * l);
      uint8_t* line = to + 128 * l;
      store_bytes(line, bytes_of_codes(low_codes<Uneven>(both))), store_bytes(line + 64, bytes_of_codes(high_codes<Uneven>(both)));
    }
    store(reinterpret_cast<float*>(to + 512), F::scale(block, i));
  }
}

// The same where numbers are put together of parts.
template <class F>
void unpack_runs(const uint8_t* tile, int64_t first, int64_t n, int64_t record, uint8_t* to) {
  for (int64_t g = first; g < first + n; ++g, to += record) {
    const uint8_t* block = tile + g / F::groups * F::block_bytes;
    const int64_t i = g % F::groups;
    const uint8_t* lines = block + F::first_line + i * F::group_bytes;
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
