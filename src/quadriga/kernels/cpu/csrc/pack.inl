// Packing and unpacking. Lanes are rows, so the search for scales runs on sixteen blocks at once and needs no sums
// across lanes; a line of four quantised columns is then already in its place.

namespace {

constexpr float kLargestHalf = 65504.0f;

QD_INLINE float read_float(int source, const uint8_t* row, int64_t c) {
  if (source == QD_SOURCE_FLOAT32) {
    float x;
    std::memcpy(&x, row + 4 * c, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, row + 2 * c, 2);
  return source == QD_SOURCE_BFLOAT16 ? bf16_to_float(bits) : half_to_float(bits);
}

// x[c] = column first + c of the tile's rows, zeros beyond the matrix
QD_INLINE void load_columns(int source, const uint8_t* in, int64_t row_bytes, int n_rows, int64_t first, int64_t n, vf* x) {
  if (n == 32 && n_rows == 16) {
#pragma GCC unroll 2
    for (int half = 0; half < 32; half += 16) {
      for (int r = 0; r < 16; ++r) {
        const uint8_t* row = in + r * row_bytes;
        if (source == QD_SOURCE_FLOAT32) x[half + r] = load(reinterpret_cast<const float*>(row) + first + half);
        else if (source == QD_SOURCE_BFLOAT16) x[half + r] = load_bf16(reinterpret_cast<const uint16_t*>(row) + first + half);
        else x[half + r] = load_half(reinterpret_cast<const uint16_t*>(row) + first + half);
      }
      transpose(x + half);
    }
    return;
  }
  alignas(64) float columns[32 * 16] = {};
  for (int r = 0; r < n_rows; ++r)
    for (int64_t c = 0; c < n; ++c) columns[16 * c + r] = read_float(source, in + r * row_bytes, first + c);
  for (int c = 0; c < 32; ++c) x[c] = load(columns + 16 * c);
}

QD_INLINE vf clip(vf x, float low, float high) { return vmin(vmax(x, all(low)), all(high)); }

QD_INLINE vf inverse_of(vf x) { return greater_select(vabs(x), all(0.0f), all(1.0f) / x, all(0.0f)); }

// The scale as it will be stored, and what the rounding to float16 made of it.
QD_INLINE vf stored_half(uint16_t* to, vf x) {
  store_half(to, x);
  return load_half(to);
}

QD_INLINE vi join4(const vi* q) {  // four columns of bytes 0..255 as one line
  return q[0] | shift_left<8>(q[1]) | shift_left<16>(q[2]) | shift_left<24>(q[3]);
}

void store_nibbles(const vi* q, uint8_t* lines) {
  for (int l = 0; l < 4; ++l) store_int(reinterpret_cast<int32_t*>(lines + 64 * l), join4(q + 8 * l) | shift_left<4>(join4(q + 8 * l + 4)));
}

// Multiples of (largest magnitude, with its sign) tried as 1 / scale: the whole range of -8..7 with either end on the
// largest value, and less than the range, where clipping the largest pays. Found on normal and Laplace weights.
constexpr float kTries[] = {-8.0f, -8.6f, -8.3f, -7.7f, -7.4f, -7.1f, -6.8f, -6.5f, -6.1f, -5.6f, 7.4f, 7.1f, 6.7f, 6.3f};

void quantise_q4(const vf* x, const float* weight, uint16_t* half, uint8_t* lines) {
  vf top = all(0.0f), magnitude = all(0.0f);
  for (int c = 0; c < 32; ++c) {
    const vf size = vabs(x[c]);
    top = greater_select(size, magnitude, x[c], top);
    magnitude = vmax(size, magnitude);
  }
  const vf unit = inverse_of(top);
  vf best_score = all(-1.0f), best_scale = all(0.0f);
  for (float ratio : kTries) {
    const vf inverse = unit * all(ratio);
    vf product = all(0.0f), square = all(0.0f);
    for (int c = 0; c < 32; ++c) {
      const vf q = clip(nearest(x[c] * inverse), -8.0f, 7.0f);
      const vf wq = q * (weight ? all(weight[c]) : x[c] * x[c]);
      product = fma(x[c], wq, product);
      square = fma(q, wq, square);
    }
    const vf scale = product * inverse_of(square), score = product * scale;  // error falls by exactly this much
    best_scale = greater_select(score, best_score, scale, best_scale);
    best_score = vmax(score, best_score);
  }
  const vf inverse = inverse_of(stored_half(half, best_scale));
  vi q[32];
  for (int c = 0; c < 32; ++c) q[c] = to_int(clip(nearest(x[c] * inverse), -8.0f, 7.0f) + all(8.0f));
  store_nibbles(q, lines);
}

void quantise_q4m(const vf* x, const float* weight, uint16_t* half, uint16_t* half_min, uint8_t* lines) {
  vf low = x[0], high = x[0], weights = all(0.0f), total = all(0.0f);
  for (int c = 0; c < 32; ++c) {
    low = vmin(low, x[c]), high = vmax(high, x[c]);
    const float w = weight ? weight[c] : 1.0f;
    weights = weights + all(w);
    total = fma(all(w), x[c], total);
  }
  const vf range = inverse_of(high - low);
  vf best_error = all(INFINITY), best_scale = (high - low) * all(1.0f / 15), best_min = low;
  for (int step = 0; step < 10; ++step) {
    const vf inverse = range * all(14.0f + 0.3f * float(step));
    vf q1 = all(0.0f), q2 = all(0.0f), xq = all(0.0f);
    for (int c = 0; c < 32; ++c) {
      const vf q = clip(nearest((x[c] - low) * inverse), 0.0f, 15.0f);
      const vf wq = weight ? q * all(weight[c]) : q;
      q1 = q1 + wq, q2 = fma(q, wq, q2), xq = fma(x[c], wq, xq);
    }
    // Least squares for (scale, minimum) given the q; the error without its constant part.
    const vf inverse_det = inverse_of(weights * q2 - q1 * q1);
    const vf scale = (weights * xq - total * q1) * inverse_det, min = (q2 * total - q1 * xq) * inverse_det;
    const vf error = scale * scale * q2 + min * min * weights + all(2.0f) * (scale * min * q1 - scale * xq - min * total);
    const vf usable = greater_select(scale, all(0.0f), error, all(INFINITY));
    best_scale = greater_select(best_error, usable, scale, best_scale);
    best_min = greater_select(best_error, usable, min, best_min);
    best_error = vmin(best_error, usable);
  }
  const vf inverse = inverse_of(stored_half(half, best_scale)), min = stored_half(half_min, best_min);
  vi q[32];
  for (int c = 0; c < 32; ++c) q[c] = to_int(clip(nearest((x[c] - min) * inverse), 0.0f, 15.0f));
  store_nibbles(q, lines);
}

void quantise_q8(const vf* x, uint16_t* half, uint8_t* lines) {
  vf magnitude = all(0.0f);
  for (int c = 0; c < 32; ++c) magnitude = vmax(magnitude, vabs(x[c]));
  const vf inverse = inverse_of(stored_half(half, magnitude * all(1.0f / 127)));
  vi q[32];
  for (int c = 0; c < 32; ++c) q[c] = to_int(clip(nearest(x[c] * inverse), -127.0f, 127.0f) + all(128.0f));
  for (int l = 0; l < 8; ++l) store_int(reinterpret_cast<int32_t*>(lines + 64 * l), join4(q + 4 * l));
}

// The power of two that brings the largest number to 4..8 (OCP Microscaling Formats v1.0, 6.3), of which half is the step:
// numbers of MXFP4 come over as they are. A largest number beyond all of float16's powers is refused by first_bad.
void quantise_mx4(const vf* x, uint16_t* half, uint8_t* lines) {
  vf magnitude = all(0.0f);
  for (int c = 0; c < 32; ++c) magnitude = vmax(magnitude, vabs(x[c]));
  alignas(64) float steps[16];
  store(steps, magnitude);
  for (float& step : steps) {
    int exponent = 0;
    std::frexp(step, &exponent);
    step = exponent - 4 > 15 ? INFINITY : std::ldexp(1.0f, exponent - 4 < -24 ? -24 : exponent - 4);
  }
  const vf inverse = inverse_of(stored_half(half, load(steps)));
  vi q[32];
  for (int c = 0; c < 32; ++c) {
    const vf v = vabs(x[c]) * inverse;
    const vf coarse = greater_select(all(8.0f), v, all(2.0f) * nearest(v * all(0.5f)), all(4.0f) * nearest(v * all(0.25f)));
    const vf k = vmin(greater_select(all(4.0f), v, nearest(v), coarse), all(12.0f));
    const vf upper = greater_select(k, all(7.0f), greater_select(k, all(9.0f), all(7.0f), all(6.0f)), all(5.0f));
    const vf n = greater_select(k, all(4.5f), upper, k);
    q[c] = to_int(greater_select(all(0.0f), x[c], n + all(8.0f), n));
  }
  store_nibbles(q, lines);
}

// 1 + the first row of a group that has a number, a scale or a minimum which is not finite, or 0. x: NULL for blocks as they are.
int first_bad(const vf* x, const uint16_t* scale, const uint16_t* min, int n_rows) {
  vf poison = all(0.0f);
  for (int c = 0; x && c < 32; ++c) poison = fma(x[c], all(0.0f), poison);
  poison = fma(load_half(scale), all(0.0f), poison);
  if (min) poison = fma(load_half(min), all(0.0f), poison);
  alignas(64) float lanes[16];
  store(lanes, poison);
  for (int r = 0; r < n_rows; ++r)
    if (!(lanes[r] == 0.0f)) return r + 1;
  return 0;
}

constexpr int kSourceBytes[] = {34, 18, 20, 18, 18, 22, 24};  // of a block, from QD_SOURCE_Q8_0 on

// Where in a pair of groups of 32 columns the lines of the first begin, how many bytes of them a group has, and whether minima
// stand before them.
QD_INLINE bool has_minimum(int format) { return format == QD_FORMAT_Q4M || format == QD_FORMAT_Q5M; }
QD_INLINE int64_t first_line_of(int format) { return has_minimum(format) ? 128 : 64; }
QD_INLINE int64_t group_bytes_of(int format) { return (tile_bytes(format, 64) - first_line_of(format)) / 2; }

// Blocks as they are: bits move, no number changes.
void copy_fives(const uint8_t* high, const uint8_t* nibbles, int r, uint8_t* lines) {
  int8_t q[32];
  uint32_t words[8];
  nibble_runs<16, 1>(nibbles, q);
  add_fifth_bits(high, q);
  std::memcpy(words, q, 32);
  put_group<Q5>(words, lines + 4 * r);
}

void copy_block(int source, const uint8_t* block, int r, uint16_t* half, uint16_t* half_min, uint8_t* lines) {
  std::memcpy(half + r, block, 2);
  if (half_min) std::memcpy(half_min + r, block + 2, 2);
  if (source == QD_SOURCE_Q5_0) return copy_fives(block + 2, block + 6, r, lines);
  if (source == QD_SOURCE_Q5_1) return copy_fives(block + 4, block + 8, r, lines);
  if (source == QD_SOURCE_Q8_0) {
    for (int c = 0; c < 32; ++c) lines[(c / 4) * 64 + 4 * r + c % 4] = uint8_t(block[2 + c] ^ 0x80);
    return;
  }
  const uint8_t* packed = block + (source == QD_SOURCE_Q4_1 ? 4 : 2);
  uint8_t n[32];
  const int stride = source == QD_SOURCE_MX4 ? 2 : 1, high = source == QD_SOURCE_MX4 ? 1 : 16;
  for (int i = 0; i < 16; ++i) n[stride * i] = packed[i] & 15, n[stride * i + high] = packed[i] >> 4;
  for (int l = 0; l < 4; ++l)
    for (int b = 0; b < 4; ++b) lines[64 * l + 4 * r + b] = uint8_t(n[8 * l + b] | n[8 * l + 4 + b] << 4);
}

int64_t pack_tile(int source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols, int64_t tile, int format,
                  uint8_t* out, const float* importance) {
  const int n_rows = int(rows - 16 * tile < 16 ? rows - 16 * tile : 16);
  const uint8_t* from = static_cast<const uint8_t*>(in) + 16 * tile * row_bytes;
  if (format == QD_FORMAT_FLOAT32 || format == QD_FORMAT_BFLOAT16) {
    vf x[32];
    for (int64_t first = 0; first < cols; first += 32) {
      const int64_t n = cols - first < 32 ? cols - first : 32;
      load_columns(source, from, row_bytes, n_rows, first, n, x);
      if (format == QD_FORMAT_FLOAT32) {
        for (int64_t c = 0; c < n; ++c) store(reinterpret_cast<float*>(out + 64 * (first + c)), x[c]);
        continue;
      }
      for (int64_t c = 0; c < n; c += 2) {
        alignas(64) float a[16], b[16];
        alignas(64) uint32_t line[16];
        store(a, x[c]), store(b, c + 1 < 32 ? x[c + 1] : all(0.0f));
        for (int i = 0; i < 16; ++i) line[i] = bf16_pair(a[i], b[i]);
        std::memcpy(out + 32 * (first + c), line, 64);
      }
    }
    return 0;
  }
  std::memset(out, 0, size_t(tile_bytes(format, cols)));
  const int64_t pair_bytes = tile_bytes(format, 64);
  const int64_t first_line = first_line_of(format), group_bytes = group_bytes_of(format);
  for (int64_t g = 0; 32 * g < cols; ++g) {
    uint8_t* pair = out + g / 2 * pair_bytes;
    uint8_t* lines = pair + first_line + (g & 1) * group_bytes;
    uint16_t* half = reinterpret_cast<uint16_t*>(pair) + 16 * (g & 1);
    uint16_t* half_min = has_minimum(format) ? half + 32 : nullptr;
    if (source >= QD_SOURCE_Q8_0) {
      const int64_t block = kSourceBytes[source - QD_SOURCE_Q8_0];
      for (int r = 0; r < n_rows; ++r) copy_block(source, from + r * row_bytes + g * block, r, half, half_min, lines);
      if (const int bad = first_bad(nullptr, half, half_min, n_rows)) return 16 * tile + bad;
      continue;
    }
    vf x[32];
    load_columns(source, from, row_bytes, n_rows, 32 * g, cols - 32 * g < 32 ? cols - 32 * g : 32, x);
    float weight[32] = {};
    if (importance)
      for (int64_t c = 0; c < 32 && 32 * g + c < cols; ++c) weight[c] = importance[32 * g + c];
    switch (format) {
      case QD_FORMAT_Q8: quantise_q8(x, half, lines); break;
      case QD_FORMAT_Q4: quantise_q4(x, importance ? weight : nullptr, half, lines); break;
      case QD_FORMAT_MX4: quantise_mx4(x, half, lines); break;
      default: quantise_q4m(x, importance ? weight : nullptr, half, half_min, lines);
    }
    if (const int bad = first_bad(x, half, half_min, n_rows)) return 16 * tile + bad;
  }
  return 0;
}

// At most n of a group's 32 numbers; min: NULL where there is none, for -0 + 0 is another number than -0.
void unpack_fives(const uint8_t* lines, float scale, const float* min, int64_t n, float* out) {
  uint32_t words[8];
  int8_t q[32];
  get_group<Q5>(lines, words);
  std::memcpy(q, words, 32);
  for (int64_t c = 0; c < 32 && c < n; ++c) out[c] = min ? float(q[c]) * scale + *min : float(q[c] - Q5::zero) * scale;
}

void unpack_row(int format, const uint8_t* packed, int64_t cols, int64_t row, float* out) {
  const uint8_t* tile = packed + row / 16 * tile_bytes(format, cols);
  const int r = int(row % 16);
  if (unpack_blocks(format, tile, cols, r, out)) return;
  if (format == QD_FORMAT_FLOAT32) {
    for (int64_t c = 0; c < cols; ++c) std::memcpy(out + c, tile + 64 * c + 4 * r, 4);
    return;
  }
  if (format == QD_FORMAT_BFLOAT16) {
    for (int64_t c = 0; c < cols; ++c) {
      uint16_t bits;
      std::memcpy(&bits, tile + 64 * (c / 2) + 4 * r + 2 * (c & 1), 2);
      out[c] = bf16_to_float(bits);
    }
    return;
  }
  const int64_t pair_bytes = tile_bytes(format, 64);
  const int64_t first_line = first_line_of(format), group_bytes = group_bytes_of(format);
  for (int64_t g = 0; 32 * g < cols; ++g) {
    const uint8_t* pair = tile + g / 2 * pair_bytes;
    const uint8_t* lines = pair + first_line + (g & 1) * group_bytes;
    uint16_t half[2] = {};
    std::memcpy(half, pair + 32 * (g & 1) + 2 * r, 2);
    if (has_minimum(format)) std::memcpy(half + 1, pair + 64 + 32 * (g & 1) + 2 * r, 2);
    const float scale = half_to_float(half[0]), min = half_to_float(half[1]);
    if (format == QD_FORMAT_Q5 || format == QD_FORMAT_Q5M) {
      unpack_fives(lines + 4 * r, scale, has_minimum(format) ? &min : nullptr, cols - 32 * g, out + 32 * g);
      continue;
    }
    for (int64_t c = 0; c < 32 && 32 * g + c < cols; ++c) {
      if (format == QD_FORMAT_Q8) {
        out[32 * g + c] = float(int(lines[(c / 4) * 64 + 4 * r + c % 4]) - 128) * scale;
        continue;
      }
      const uint8_t byte = lines[(c / 8) * 64 + 4 * r + c % 4];
      const int n = c % 8 < 4 ? byte & 15 : byte >> 4;
      out[32 * g + c] = format == QD_FORMAT_MX4    ? float(kE2M1[n]) * scale
                        : format == QD_FORMAT_IQ4NL ? float(kUneven[n]) * scale
                        : format == QD_FORMAT_Q4 ? float(n - 8) * scale
                                                 : float(n) * scale + min;
    }
  }
}

// Lines of products in registers: kPeakLines an iteration, in as many independent chains as hide how long one takes. What they are
// multiplied with is a constant of the loop, and sums stay in registers: with either in memory AVX-512 showed 0.6 of its peak.
enum PeakKind { kPeakF32, kPeakBf16, kPeakBytes, kPeakNibbles };
template <PeakKind kind> double peak_as(int64_t iterations) {
#if QD_AVX512
  constexpr int chains = 12;
#else
  constexpr int chains = kind < kPeakBytes ? 4 : 3;
#endif
  constexpr int deep = kPeakLines / chains;
  vi ints[chains];
  vf floats[chains];
  each<chains>([&](int m) { ints[m] = all_int(m), floats[m] = all(float(m)); });
  alignas(64) uint8_t bytes[64];
  uint32_t units[kPeakLines];
  for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i & 1);
  for (int i = 0; i < kPeakLines; ++i) units[i] = uint32_t(i % 2) * 0x01010101u;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+m"(bytes), "+m"(units));  // may have changed: no product is known from before
    const vb w = load_bytes(bytes);
    const vq q = bytes_line(bytes);
    vn part[chains];
    each<chains>([&](int m) { part[m] = begin_nibbles(ints[m]); });
    each<deep>([&](int j) {
      each<chains>([&](int m) {
        const uint32_t a = units[j * chains + m];
        if constexpr (kind == kPeakBytes) ints[m] = dot_bytes(ints[m], q, a);
        else if constexpr (kind == kPeakBf16) floats[m] = dot2(floats[m], w, a);
        else if constexpr (kind == kPeakF32) floats[m] = dot1(floats[m], w, a);
        else part[m] = dot_nibbles(part[m], w, a);
      });
    });
    if (kind == kPeakNibbles) each<chains>([&](int m) { ints[m] = end_nibbles(part[m], ints[m]); });
  }
  vf total = all(0.0f);
  each<chains>([&](int m) { total = total + floats[m] + to_float(ints[m]); });
  return double(sum(total));
}

double peak_of(int format, int64_t iterations) {
  switch (format) {
    case QD_FORMAT_FLOAT32: return peak_as<kPeakF32>(iterations);
    case QD_FORMAT_BFLOAT16: return peak_as<kPeakBf16>(iterations);
    case QD_FORMAT_Q4:
    case QD_FORMAT_Q4M:
    case QD_FORMAT_Q4K: return peak_as<kPeakNibbles>(iterations);
    default: return peak_as<kPeakBytes>(iterations);
  }
}

uint64_t read_all(const uint8_t* data, int64_t bytes) {
  vi a = all_int(0), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 256; j += 64) prefetch(data + i + j + kAhead);
    a = a + load_int(reinterpret_cast<const int32_t*>(data + i)), b = b + load_int(reinterpret_cast<const int32_t*>(data + i + 64));
    c = c + load_int(reinterpret_cast<const int32_t*>(data + i + 128)), d = d + load_int(reinterpret_cast<const int32_t*>(data + i + 192));
  }
  alignas(64) int32_t lanes[16];
  store_int(lanes, (a + b) + (c + d));
  uint64_t out = 0;
  for (int32_t lane : lanes) out += uint32_t(lane);
  return out;
}

}  // namespace
