// Attention to one chunk of cached keys. Keys and values lie as tiles, so scores and weighted sums are the same
// line-times-broadcast products as a matrix tile; every key line is read once for all query rows given.

#include <cfloat>

namespace {

template <bool bf16>
QD_INLINE vf dot(vf acc, vb line, uint32_t unit) {
  return bf16 ? dot2(acc, line, unit) : dot1(acc, line, unit);
}

// scores[row][16 t + lane] for R rows and T consecutive tiles
template <bool bf16, int R, int T>
QD_INLINE void score_block(const uint8_t* const* tiles, const uint32_t* q, int row, int units, float* scores, int64_t stride) {
  vf acc[R * T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) acc[i] = all(0.0f);
  for (int u = 0; u < units; ++u) {
    vb keys[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) keys[t] = load_bytes(tiles[t] + u * 64);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[r * T + t] = dot<bf16>(acc[r * T + t], keys[t], q[r * row + u]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) store(scores + r * stride + 16 * t, acc[r * T + t]);
}

// The first `units` units of rows that are `row` apart.
template <bool bf16, int T>
QD_INLINE void score_rows(const uint8_t* const* tiles, const uint32_t* q, int row, int units, int n_rows, float* scores) {
  int r = 0;
  if constexpr (kWidth > 2) {
    for (; r + 6 <= n_rows; r += 6) score_block<bf16, 6, T>(tiles, q + r * row, row, units, scores + r * QD_KV_CHUNK, QD_KV_CHUNK);
    for (; r + 4 <= n_rows; r += 4) score_block<bf16, 4, T>(tiles, q + r * row, row, units, scores + r * QD_KV_CHUNK, QD_KV_CHUNK);
  }
  for (; r + 2 <= n_rows; r += 2) score_block<bf16, 2, T>(tiles, q + r * row, row, units, scores + r * QD_KV_CHUNK, QD_KV_CHUNK);
  for (; r < n_rows; ++r) score_block<bf16, 1, T>(tiles, q + r * row, row, units, scores + r * QD_KV_CHUNK, QD_KV_CHUNK);
}

// out[row][16 j + lane] += sum over units (a key, or two) of p * value; C columns of 16 dimensions
template <bool bf16, int R, int C>
QD_INLINE void value_block(const uint8_t* const* tiles, int n_tiles, const uint32_t* p, int64_t padded, int column, float* out) {
  constexpr int units = bf16 ? 8 : 16;
  vf acc[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = all(0.0f);
  for (int t = 0; t < n_tiles; ++t) {
    const uint8_t* values = tiles[t] + column * 64;
    for (int u = 0; u < units; ++u) {
      vb line[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) line[c] = load_bytes(values + u * padded * 4 + c * 64);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r * C + c] = dot<bf16>(acc[r * C + c], line[c], p[r * QD_KV_CHUNK + t * units + u]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + r * padded + 16 * (column + c), acc[r * C + c]);
}

template <bool bf16, int R>
QD_INLINE void value_columns(const uint8_t* const* tiles, int n_tiles, const uint32_t* p, int64_t padded, float* out) {
  const int columns = int(padded / 16);
  int c = 0;
  for (; c + 4 <= columns; c += 4) value_block<bf16, R, 4>(tiles, n_tiles, p, padded, c, out);
  for (; c < columns; ++c) value_block<bf16, R, 1>(tiles, n_tiles, p, padded, c, out);
}

// int8 as bf16: every whole number up to 256 is exact.
QD_INLINE void expand_int8(const int8_t* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = float(from[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to[i] = uint16_t(bits >> 16);
  }
}

// The chunk's tiles that any row sees.
struct ChunkTiles {
  int first;  // position of the first one's first key
  int n;
  int seen;  // keys of them that any row sees: the last tile may be full in part
  const uint8_t *keys[QD_KV_CHUNK / 16], *values[QD_KV_CHUNK / 16];
  const float* scales[QD_KV_CHUNK / 16];  // of int8 keys, then of values; of latents, then of the rest of them
};

// The first key that a query at `position` sees.
QD_INLINE int window_start(int window, int position) { return window && position >= window ? position - window + 1 : 0; }

QD_INLINE void find_tiles(const AttendChunk& a, ChunkTiles& tiles) {
  int first = (a.chunk + 1) * QD_KV_CHUNK, last = 0;  // keys [first, last) of the chunk are seen by a row
  for (int r = 0; r < a.n_rows; ++r) {
    const int low = window_start(a.window, a.positions[r]);
    first = low < first ? low : first;
    last = a.positions[r] >= last ? a.positions[r] + 1 : last;
  }
  first = first < a.chunk * QD_KV_CHUNK ? a.chunk * QD_KV_CHUNK : first / 16 * 16;
  last = last > (a.chunk + 1) * QD_KV_CHUNK ? (a.chunk + 1) * QD_KV_CHUNK : last;
  tiles.first = first;
  tiles.seen = last - first;
  tiles.n = (tiles.seen + 15) / 16;
  for (int t = 0; t < tiles.n; ++t) {
    tiles.keys[t] = a.kv + a.table[first / QD_BLOCK_TOKENS + t] * a.block_stride;
    tiles.values[t] = tiles.keys[t] + key_bytes(a.kv_format, a.head_dim);
    tiles.scales[t] = reinterpret_cast<const float*>(tiles.values[t] + (a.rank ? 0 : value_bytes(a.kv_format, a.head_dim)));
  }
}

// Places not written yet hold what the block's last owner left there, and 0 times its NaN would be NaN: the values of a
// tile that is full in part are copied to `clean` with zeros in their stead. Values of int8 are finite, their scales are
// kept from counting in weigh_row.
template <bool bf16>
QD_INLINE void clear_unwritten(const AttendChunk& a, ChunkTiles& tiles, uint8_t* clean) {
  if (a.kv_format == QD_KV_FORMAT_Q8 || tiles.seen % 16 == 0) return;
  const int padded = round_up_16(a.head_dim), written = tiles.seen % 16;
  const int64_t line = int64_t(padded) * 4;  // a key's values, or two keys' of bf16, whose numbers alternate
  const int whole = bf16 ? written / 2 : written, lines = bf16 ? 8 : 16;
  const uint8_t* stored = tiles.values[tiles.n - 1];
  std::memcpy(clean, stored, size_t(whole) * size_t(line));
  std::memset(clean + whole * line, 0, size_t(lines - whole) * size_t(line));
  if (bf16 && written % 2)
    for (int j = 0; j < padded; ++j) std::memcpy(clean + whole * line + j * 4, stored + whole * line + j * 4, 2);
  tiles.values[tiles.n - 1] = clean;
}

// The tiles of latents as values: lane = dimension instead of lane = key. Places not written yet become zeros. Of bf16 a
// line holds two keys' numbers, and of every 32 dimensions the even ones come first: Attend::write puts them in order.
template <bool bf16>
QD_INLINE void latents_as_values(const AttendChunk& a, ChunkTiles& tiles, uint16_t* wide, uint8_t* out) {
  const int rank = a.rank, lines = bf16 ? rank / 2 : rank;
  const vi low = all_int(0xffff), high = all_int(int32_t(0xffff0000));
  for (int t = 0; t < tiles.n; ++t, out += int64_t(rank) * (bf16 ? 32 : 64)) {
    const int written = tiles.seen - 16 * t;
    const uint8_t* keys = tiles.keys[t];
    if (a.kv_format == QD_KV_FORMAT_Q8) {
      expand_int8(reinterpret_cast<const int8_t*>(keys), 16 * rank, wide);
      keys = reinterpret_cast<const uint8_t*>(wide);
    }
    for (int u = 0; u < lines; u += 16) {
      vf x[16];
      for (int i = 0; i < 16; ++i) x[i] = load(reinterpret_cast<const float*>(keys + (u + i) * 64));
      transpose(x);
      for (int k = written; k < 16; ++k) x[k] = all(0.0f);
      if (!bf16) {
        for (int k = 0; k < 16; ++k) store(reinterpret_cast<float*>(out) + k * rank + u, x[k]);
        continue;
      }
      for (int j = 0; j < 8; ++j) {
        const vi one = as_int(x[2 * j]), other = as_int(x[2 * j + 1]);
        int32_t* to = reinterpret_cast<int32_t*>(out) + j * rank + 2 * u;
        store_int(to, (one & low) | shift_left<16>(other));
        store_int(to + 16, shift_right<16>(one) | (other & high));
      }
    }
    tiles.values[t] = out;
  }
}

// `rest`: where scores of what follows a latent go apart, because it has a scale of its own; or NULL.
template <bool bf16>
QD_INLINE void score_tiles(const AttendChunk& a, const ChunkTiles& tiles, const uint32_t* q, int units, uint16_t* wide, float* scores,
                           float* rest) {
  const int d = a.head_dim, first = rest ? a.rank / 2 : units;  // int8 has two numbers a unit, as bf16
  for (int t = 0; t < tiles.n; t += 2) {
    const int both = t + 1 < tiles.n ? 2 : 1;
    if (t + 2 < tiles.n)  // the next two tiles and their values are on their way while these are scored
      for (int64_t b = 0; b < key_bytes(a.kv_format, d); b += 64) {
        prefetch(tiles.keys[t + 2] + b);
        if (t + 3 < tiles.n) prefetch(tiles.keys[t + 3] + b);
      }
    for (int64_t b = 0; b < (a.rank ? 0 : value_bytes(a.kv_format, d)); b += 64) {
      prefetch(tiles.values[t] + b);
      if (both == 2) prefetch(tiles.values[t + 1] + b);
    }
    const uint8_t* now[2] = {tiles.keys[t], both == 2 ? tiles.keys[t + 1] : tiles.keys[t]};
    if (a.kv_format == QD_KV_FORMAT_Q8)
      for (int i = 0; i < both; ++i) {
        expand_int8(reinterpret_cast<const int8_t*>(now[i]), 16 * d, wide + i * 16 * d);
        now[i] = reinterpret_cast<const uint8_t*>(wide + i * 16 * d);
      }
    if (both == 2) score_rows<bf16, 2>(now, q, units, first, a.n_rows, scores + 16 * t);
    else score_rows<bf16, 1>(now, q, units, first, a.n_rows, scores + 16 * t);
    if (!rest) continue;
    for (const uint8_t*& tile : now) tile += first * 64;
    if (both == 2) score_rows<bf16, 2>(now, q + first, units, units - first, a.n_rows, rest + 16 * t);
    else score_rows<bf16, 1>(now, q + first, units, units - first, a.n_rows, rest + 16 * t);
  }
}

// One row's scores, with everything that is done to them, as weights relative to its largest, in the units of the values.
template <bool bf16>
QD_INLINE void weigh_row(const AttendChunk& a, const ChunkTiles& tiles, int r, float* row, const float* rest, uint32_t* out) {
  const int first = tiles.first, low = window_start(a.window, a.positions[r]);
  const bool quantised = a.kv_format == QD_KV_FORMAT_Q8;
  if (a.positions[r] < first || low >= first + tiles.seen) {
    a.max[r] = -INFINITY, a.sum[r] = 0.0f;
    std::memset(out, 0, size_t(tiles.n) * 64);
    return;
  }
  vf top = all(-INFINITY);
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = float(i);
  const vf lane = load(lanes);
  for (int t = 0; t < tiles.n; ++t) {
    vf s = load(row + 16 * t) * all(a.scale);
    if (quantised) s = s * load(tiles.scales[t]);
    if (rest) s = fma(load(rest + 16 * t) * all(a.scale), load(tiles.scales[t] + 16), s);
    if (a.soft_cap > 0) s = all(a.soft_cap) * hyperbolic_tangent(s / all(a.soft_cap));
    const vf key = lane + all(float(first + 16 * t));
    if (a.slopes) s = fma(all(a.slopes[r]), key - all(float(a.positions[r])), s);
    s = greater_select(key, all(float(a.positions[r])), all(-INFINITY), s);
    if (low > first) s = greater_select(all(float(low)), key, all(-INFINITY), s);
    store(row + 16 * t, s);
    top = vmax(top, s);
  }
  const float most = largest(top);
  vf total = all(0.0f);
  for (int t = 0; t < tiles.n; ++t) {
    vf e = exponential(load(row + 16 * t) - all(most));
    if (bf16 && !quantised) {  // the sum is of what is multiplied: weights of bf16 that add up to one
      float rounded[16];
      store(rounded, e);
      for (float& x : rounded) x = bf16_to_float(float_to_bf16(x));
      e = load(rounded);
    }
    total = total + e;
    // Scales of keys not written yet may be anything: their weight is 0 and must stay 0.
    if (quantised) e = greater_select(e, all(0.0f), e * load(tiles.scales[t] + (a.rank ? 0 : 16)), all(0.0f));
    store(row + 16 * t, e);
  }
  a.max[r] = most, a.sum[r] = sum(total);
  if (bf16)
    for (int u = 0; u < 8 * tiles.n; ++u) out[u] = bf16_pair(row[2 * u], row[2 * u + 1]);
  else
    std::memcpy(out, row, size_t(tiles.n) * 64);
}

template <bool bf16>
void attend_chunk(const AttendChunk& a) {
  const int d = a.head_dim, padded = round_up_16(a.rank ? a.rank : d), n_rows = a.n_rows;
  const int units = bf16 ? (d + 1) / 2 : d;
  const bool apart = a.rank && a.kv_format == QD_KV_FORMAT_Q8;
  uint32_t* q = a.scratch;
  float* scores = reinterpret_cast<float*>(q + int64_t(n_rows) * d);
  uint32_t* p = q + int64_t(n_rows) * (d + QD_KV_CHUNK);
  float* rest = reinterpret_cast<float*>(p + int64_t(n_rows) * QD_KV_CHUNK);
  uint16_t* wide_keys = reinterpret_cast<uint16_t*>(rest + int64_t(n_rows) * QD_KV_CHUNK);
  uint16_t* wide_values = wide_keys + 2 * 2 * 16 * d;

  for (int r = 0; r < n_rows; ++r)
    for (int u = 0; u < units; ++u) {
      if (bf16) q[r * units + u] = bf16_pair(a.q[r][2 * u], a.q[r][2 * u + 1]);
      else std::memcpy(q + r * units + u, a.q[r] + u, 4);
    }
  ChunkTiles tiles;
  find_tiles(a, tiles);
  if (!a.rank) clear_unwritten<bf16>(a, tiles, reinterpret_cast<uint8_t*>(wide_values));
  score_tiles<bf16>(a, tiles, q, units, wide_keys, scores, apart ? rest : nullptr);
  for (int r = 0; r < n_rows; ++r)
    weigh_row<bf16>(a, tiles, r, scores + r * QD_KV_CHUNK, apart ? rest + r * QD_KV_CHUNK : nullptr, p + r * QD_KV_CHUNK);
  if (a.rank) latents_as_values<bf16>(a, tiles, wide_keys, reinterpret_cast<uint8_t*>(wide_values));
  else if (a.kv_format == QD_KV_FORMAT_Q8)
    for (int t = 0; t < tiles.n; ++t) {
      expand_int8(reinterpret_cast<const int8_t*>(tiles.values[t]), 16 * padded, wide_values + int64_t(t) * 16 * padded);
      tiles.values[t] = reinterpret_cast<const uint8_t*>(wide_values + int64_t(t) * 16 * padded);
    }
  int r = 0;
  if constexpr (kWidth > 2)
    for (; r + 4 <= n_rows; r += 4) value_columns<bf16, 4>(tiles.values, tiles.n, p + r * QD_KV_CHUNK, padded, a.out + int64_t(r) * padded);
  for (; r + 2 <= n_rows; r += 2) value_columns<bf16, 2>(tiles.values, tiles.n, p + r * QD_KV_CHUNK, padded, a.out + int64_t(r) * padded);
  for (; r < n_rows; ++r) value_columns<bf16, 1>(tiles.values, tiles.n, p + r * QD_KV_CHUNK, padded, a.out + int64_t(r) * padded);
}

void attend(const AttendChunk& a) { a.kv_format == QD_KV_FORMAT_FLOAT32 ? attend_chunk<false>(a) : attend_chunk<true>(a); }

void merge(float* max, float* total, float* out, float max2, float sum2, const float* out2, int padded) {
  if (max2 == -INFINITY) return;
  if (*max == -INFINITY) {
    *max = max2, *total = sum2;
    std::memcpy(out, out2, size_t(padded) * 4);
    return;
  }
  const float most = *max > max2 ? *max : max2;
  float pair[16] = {*max - most, max2 - most};
  vf e = exponential(load(pair));
  store(pair, e);
  *max = most, *total = *total * pair[0] + sum2 * pair[1];
  for (int i = 0; i < padded; i += 16) store(out + i, fma(load(out + i), all(pair[0]), load(out2 + i) * all(pair[1])));
}

QD_INLINE float int8_scale(const float* x, int d) {
  float top = 0.0f;
  for (int i = 0; i < d; ++i) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  return top / 127.0f;
}

// What numbers are multiplied with to become whole ones; they are zeros where it would be infinite.
QD_INLINE float whole_numbers(float scale) { return scale >= FLT_MIN ? 1.0f / scale : 0.0f; }

void write_kv(int kv_format, int d, const float* k, const float* v, int slot, uint8_t* block) {
  const int padded = round_up_16(d);
  uint8_t* values = block + key_bytes(kv_format, d);
  if (kv_format == QD_KV_FORMAT_FLOAT32) {
    for (int i = 0; i < d; ++i) std::memcpy(block + i * 64 + slot * 4, k + i, 4);
    std::memcpy(values + int64_t(slot) * padded * 4, v, size_t(d) * 4);
    return;
  }
  if (kv_format == QD_KV_FORMAT_BFLOAT16) {
    for (int u = 0; u < d / 2; ++u) {
      const uint32_t pair = bf16_pair(k[2 * u], k[2 * u + 1]);
      std::memcpy(block + u * 64 + slot * 4, &pair, 4);
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(values) + int64_t(slot / 2) * padded * 2 + (slot & 1);
    for (int i = 0; i < d; ++i) to[2 * i] = float_to_bf16(v[i]);
    return;
  }
  float* scales = reinterpret_cast<float*>(values + value_bytes(kv_format, d));
  const float ks = int8_scale(k, d), vs = int8_scale(v, d);
  scales[slot] = ks, scales[16 + slot] = vs;
  const float ki = whole_numbers(ks), vi_ = whole_numbers(vs);
  int8_t* keys = reinterpret_cast<int8_t*>(block);
  for (int i = 0; i < d; ++i) keys[(i / 2) * 32 + slot * 2 + (i & 1)] = int8_t(std::nearbyint(k[i] * ki));
  int8_t* to = reinterpret_cast<int8_t*>(values) + int64_t(slot / 2) * padded * 2 + (slot & 1);
  for (int i = 0; i < d; ++i) to[2 * i] = int8_t(std::nearbyint(v[i] * vi_));
}

// The key's half of write_kv, with a scale for the latent and one for what follows it.
void write_latent(int kv_format, int rank, int d, const float* k, int slot, uint8_t* block) {
  if (kv_format == QD_KV_FORMAT_FLOAT32) {
    for (int i = 0; i < d; ++i) std::memcpy(block + i * 64 + slot * 4, k + i, 4);
    return;
  }
  if (kv_format == QD_KV_FORMAT_BFLOAT16) {
    for (int u = 0; u < d / 2; ++u) {
      const uint32_t pair = bf16_pair(k[2 * u], k[2 * u + 1]);
      std::memcpy(block + u * 64 + slot * 4, &pair, 4);
    }
    return;
  }
  float* scales = reinterpret_cast<float*>(block + key_bytes(kv_format, d));
  int8_t* keys = reinterpret_cast<int8_t*>(block);
  const auto part = [&](int first, int last, float* to) {
    *to = int8_scale(k + first, last - first);
    const float inverse = whole_numbers(*to);
    for (int i = first; i < last; ++i) keys[(i / 2) * 32 + slot * 2 + (i & 1)] = int8_t(std::nearbyint(k[i] * inverse));
  };
  part(0, rank, scales + slot);
  part(rank, d, scales + 16 + slot);
}

}  // namespace
