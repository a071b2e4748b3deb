// Activations as panels: rounded to whole numbers with a scale for every 32 columns, or as floats, in the order that products
// take them; see layout.hpp.

#include <cfloat>

namespace {

QD_INLINE void bytes_of(vi a, vi b, uint32_t* units) {  // 32 whole numbers within int8 as 8 units
#if QD_AVX512
  _mm_storeu_si128((__m128i*)units, _mm512_cvtepi32_epi8(a.v));
  _mm_storeu_si128((__m128i*)(units + 4), _mm512_cvtepi32_epi8(b.v));
#elif QD_NEON
  const auto narrow = [](vi x) {
    const int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b)), high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
    return vreinterpretq_u32_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  };
  vst1q_u32(units, narrow(a)), vst1q_u32(units + 4, narrow(b));
#else
  int32_t q[32];
  store_int(q, a), store_int(q + 16, b);
  for (int i = 0; i < 8; ++i)
    units[i] = uint32_t(q[4 * i] & 255) | uint32_t(q[4 * i + 1] & 255) << 8 | uint32_t(q[4 * i + 2] & 255) << 16 |
               uint32_t(q[4 * i + 3] & 255) << 24;
#endif
}

// 32 numbers as whole ones with a scale; `stride` units lie between one unit and the next of this token. Where all are so small
// (below 2^-114) that the quotient would be infinite, they are zeros.
template <int P>
QD_INLINE void quantise_group(vf a, vf b, uint32_t* rec, int64_t stride) {
  constexpr float most = P == 1 ? 127.0f : 16256.0f;  // 127 * 128
  const float top = largest(vmax(vabs(a), vabs(b)));
  const float scale = top / most;
  const vf inverse = all(top > most / FLT_MAX ? most / top : 0.0f);
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
  const float first = sum(qa), total = first + sum(qb);  // whole numbers below 2^24: exact
  std::memcpy(rec + 8 * P * stride, &scale, 4);
  rec[(8 * P + 1) * stride] = uint32_t(-128 * int32_t(total));
  const float product = scale * total;
  std::memcpy(rec + (8 * P + 2) * stride, &product, 4);
  rec[(8 * P + 3) * stride] = uint32_t(-128 * int32_t(first));
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
