// GGUF's blocks of 256 numbers into tiles and out of them: bits move, no number changes. See blocks.inl and layout.hpp.

namespace {

// A block as the tiles store it: whole numbers from 0, scales, minima (0 or less), d and dmin.
struct StoredBlock {
  alignas(64) int8_t q[256];
  int8_t scale[16], least[16];
  uint8_t d[2], dmin[2];
};

template <int d_at, int dmin_at = -1> QD_INLINE void take_halves(const uint8_t* b, StoredBlock& s) {
  std::memcpy(s.d, b + d_at, 2);
  if (dmin_at >= 0) std::memcpy(s.dmin, b + dmin_at, 2);
}

QD_INLINE void take_scales_and_minima(const uint8_t* b, StoredBlock& s) {
  take_halves<0, 2>(b, s);
  for (int i = 0; i < 8; ++i) s.scale[i] = int8_t(scale_of_q4_k(b, i)), s.least[i] = int8_t(-minimum_of_q4_k(b, i));
}

QD_INLINE void take(Q2K, const uint8_t* b, StoredBlock& s) {
  take_halves<80, 82>(b, s);
  crumb_runs(b + 16, s.q);
  std::memcpy(s.scale, b, 16);
}
QD_INLINE void take(Q3K, const uint8_t* b, StoredBlock& s) {
  take_halves<108>(b, s);
  for (int i = 0; i < 16; ++i) s.scale[i] = int8_t(scale_of_q3_k(b, i));
  crumb_runs(b + 32, s.q);
  for (int r = 0; r < 8; ++r)
    for (int i = 0; i < 32; ++i) s.q[32 * r + i] = int8_t(s.q[32 * r + i] | (b[i] >> r & 1) << 2);
}
QD_INLINE void take(Q4K, const uint8_t* b, StoredBlock& s) {
  take_scales_and_minima(b, s);
  nibble_runs<32, 4>(b + 16, s.q);
}
QD_INLINE void take(Q5K, const uint8_t* b, StoredBlock& s) {
  take_scales_and_minima(b, s);
  nibble_runs<32, 4>(b + 48, s.q);
  add_fifth_bit_planes(b + 16, s.q);
}
QD_INLINE void take(Q6K, const uint8_t* b, StoredBlock& s) {
  take_halves<208>(b, s);
  std::memcpy(s.scale, b + 192, 16);
  six_bits(b, s.q);
}
QD_INLINE void take(IQ4XS, const uint8_t* b, StoredBlock& s) {
  take_halves<0>(b, s);
  for (int i = 0; i < 8; ++i) s.scale[i] = int8_t(scale_of_iq4_xs(b, i));
  nibble_runs<16, 8>(b + 8, s.q);
}

QD_INLINE bool is_finite_half(const uint8_t* half) { return (half[1] & 0x7c) != 0x7c; }

// Eight units of four columns of one row as that row's words of a group's lines, 64 bytes from one to the next.
template <class F> QD_INLINE void put_group(const uint32_t* w, uint8_t* lines) {
  const auto put = [&](uint32_t word) { std::memcpy(lines, &word, 4), lines += 64; };
  constexpr int crumbs = F::crumbs > 0 ? F::crumbs : 0, bits = F::bits > 0 ? F::bits : 0;
  if (F::nibbles)
    for (int l = 0; l < 4; ++l) put((w[2 * l] & 0x0f0f0f0fu) | (w[2 * l + 1] & 0x0f0f0f0fu) << 4);
  if (F::crumbs >= 0)
    for (int l = 0; l < 2; ++l) {
      uint32_t word = 0;
      for (int u = 0; u < 4; ++u) word |= (w[4 * l + u] >> crumbs & 0x03030303u) << (2 * u);
      put(word);
    }
  if (F::bits >= 0) {
    uint32_t word = 0;
    for (int u = 0; u < 8; ++u) word |= (w[u] >> bits & 0x01010101u) << u;
    put(word);
  }
}

// Its inverse.
template <class F> QD_INLINE void get_group(const uint8_t* lines, uint32_t* w) {
  const auto word = [&] { uint32_t x; std::memcpy(&x, lines, 4), lines += 64; return x; };
  std::memset(w, 0, 32);
  constexpr int crumbs = F::crumbs > 0 ? F::crumbs : 0, bits = F::bits > 0 ? F::bits : 0;
  for (int l = 0; F::nibbles && l < 4; ++l) {
    const uint32_t x = word();
    w[2 * l] = x & 0x0f0f0f0fu, w[2 * l + 1] = x >> 4 & 0x0f0f0f0fu;
  }
  for (int l = 0; F::crumbs >= 0 && l < 2; ++l) {
    const uint32_t x = word();
    for (int u = 0; u < 4; ++u) w[4 * l + u] |= (x >> (2 * u) & 0x03030303u) << crumbs;
  }
  if (F::bits >= 0) {
    const uint32_t x = word();
    for (int u = 0; u < 8; ++u) w[u] |= (x >> u & 0x01010101u) << bits;
  }
}

// One tile of n_rows rows, `row_bytes` apart; 1 + the first row whose d or dmin is no number, or 0.
template <class F, int block_bytes>
int64_t pack_blocks_as(const uint8_t* in, int64_t row_bytes, int n_rows, int64_t cols, uint8_t* out) {
  const int64_t blocks = blocks_of(cols);
  std::memset(out, 0, size_t(blocks * F::block_bytes));
  int64_t bad = 0;
  StoredBlock s{};
  for (int64_t j = 0; j < blocks; ++j, in += block_bytes, out += F::block_bytes)
    for (int r = 0; r < n_rows; ++r) {
      take(F(), in + r * row_bytes, s);
      if (!(is_finite_half(s.d) && is_finite_half(s.dmin)) && (!bad || r + 1 < bad)) bad = r + 1;
      std::memcpy(out + 2 * r, s.d, 2);
      if (F::minimum) std::memcpy(out + 32 + 2 * r, s.dmin, 2);
      for (int i = 0; i < 8 * F::runs; ++i) out[F::scales_at + 16 * i + r] = uint8_t(s.scale[i]);
      for (int i = 0; F::minimum && !F::both && i < 8; ++i) out[F::minima_at + 16 * i + r] = uint8_t(s.least[i]);
      uint32_t words[64];
      std::memcpy(words, s.q, 256);
      for (int g = 0; g < 8; ++g) put_group<F>(words + 8 * g, out + F::first_line + g * F::group_bytes + 4 * r);
    }
  return bad;
}

int64_t pack_blocks(int stored, const uint8_t* in, int64_t row_bytes, int n_rows, int64_t cols, uint8_t* out) {
  switch (stored) {
#define QD_PACK(name, F) case name: return pack_blocks_as<F, block_shape(name).bytes>(in, row_bytes, n_rows, cols, out)
    QD_PACK(QD_STORED_Q2_K, Q2K);
    QD_PACK(QD_STORED_Q3_K, Q3K);
    QD_PACK(QD_STORED_Q4_K, Q4K);
    QD_PACK(QD_STORED_Q5_K, Q5K);
    QD_PACK(QD_STORED_Q6_K, Q6K);
    default: QD_PACK(QD_STORED_IQ4_XS, IQ4XS);
  }
}

template <class F, bool uneven = false>
void unpack_blocks_row(const uint8_t* tile, int64_t cols, int r, float* out) {
  for (int64_t g = 0; 32 * g < cols; ++g) {
    const uint8_t* block = tile + g / 8 * F::block_bytes;
    const int i = int(g % 8);
    uint32_t words[8];
    int8_t q[32];
    get_group<F>(block + F::first_line + i * F::group_bytes + 4 * r, words);
    std::memcpy(q, words, 32);
    const float d = half_at(block + 2 * r), dmin = F::minimum ? half_at(block + 32 + 2 * r) : 0.0f;
    for (int c = 0; c < 32 && 32 * g + c < cols; ++c) {
      const int run = F::runs * i + c * F::runs / 32;
      const uint8_t stored = block[F::scales_at + 16 * run + r];
      const float scale = d * float(F::both ? stored & 15 : int(int8_t(stored)));
      const int m = !F::minimum ? 0 : F::both ? stored >> 4 : -int(int8_t(block[F::minima_at + 16 * run + r]));
      const float number = float(uneven ? int(kUneven[q[c]]) : q[c] - F::zero);
      out[32 * g + c] = F::minimum ? scale * number - dmin * float(m) : scale * number;
    }
  }
}

bool unpack_blocks(int format, const uint8_t* tile, int64_t cols, int r, float* out) {
  switch (format) {
    case QD_FORMAT_Q2K: return unpack_blocks_row<Q2K>(tile, cols, r, out), true;
    case QD_FORMAT_Q3K: return unpack_blocks_row<Q3K>(tile, cols, r, out), true;
    case QD_FORMAT_Q4K: return unpack_blocks_row<Q4K>(tile, cols, r, out), true;
    case QD_FORMAT_Q5K: return unpack_blocks_row<Q5K>(tile, cols, r, out), true;
    case QD_FORMAT_Q6K: return unpack_blocks_row<Q6K>(tile, cols, r, out), true;
    case QD_FORMAT_IQ4XS: return unpack_blocks_row<IQ4XS, true>(tile, cols, r, out), true;
    default: return false;
  }
}

}  // namespace
