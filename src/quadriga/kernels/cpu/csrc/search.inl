// The search for scales of quant/search.py, which states it; see there for why. Lanes are sixteen sub-blocks that follow
// each other, so an element of all of them is one vector, and sums across lanes are a block's only.

namespace {

template <int length> struct SubBlocks {
  vf x[length], weight[length];
  int per_block;  // 1, 8 or 16
};

QD_INLINE vf clip(vf x, vf low, vf high) { return vmin(vmax(x, low), high); }

struct WholeLevels {
  vf low, high;
  QD_INLINE vf nearest_of(const WholeLevels& l, vf x) { return clip(nearest(x), l.low, l.high); }
};

struct CodebookLevels {
  float values[16], middles[15];
  QD_INLINE vf nearest_of(const CodebookLevels& l, vf x) {
    vf found = all(l.values[0]);
    for (int i = 0; i < 15; ++i) found = greater_select(all(l.middles[i]), x, found, all(l.values[i + 1]));
    return found;
  }
};

QD_INLINE vf less_select(vf a, vf b, vf yes, vf no) { return greater_select(b, a, yes, no); }

// 1 / x, or 0 where that is infinite.
QD_INLINE vf inverse_or_zero(vf x) {
  const vf found = all(1.0f) / x;
  return greater_select(vabs(found), all(3.402823466e38f), all(0.0f), found);
}

QD_INLINE vf as_half_has_it(vf x) {
  uint16_t half[16];
  return stored_half(half, x);
}

// join(a, b) of a block's lanes, in all of them.
template <class Join> QD_INLINE vf of_block(vf x, int per_block, Join&& join) {
  alignas(64) float lanes[16];
  store(lanes, x);
  for (int first = 0; first < 16; first += per_block) {
    float found = lanes[first];
    for (int i = 1; i < per_block; ++i) found = join(found, lanes[first + i]);
    for (int i = 0; i < per_block; ++i) lanes[first + i] = found;
  }
  return load(lanes);
}
QD_INLINE vf block_sum(vf x, int per_block) { return of_block(x, per_block, [](float a, float b) { return a + b; }); }
QD_INLINE vf block_max(vf x, int per_block) { return of_block(x, per_block, [](float a, float b) { return b > a ? b : a; }); }
QD_INLINE vf block_extreme(vf x, int per_block) {
  return of_block(x, per_block, [](float a, float b) { return std::fabs(b) > std::fabs(a) ? b : a; });
}

// n <= 16 sub-blocks; lanes beyond them are zeros of weight one.
template <int length> void load_sub_blocks(const float* x, int n, float rest, vf* to) {
  alignas(64) float whole[16 * length];
  if (n < 16) {
    std::memcpy(whole, x, sizeof(float) * n * length);
    for (int i = n * length; i < 16 * length; ++i) whole[i] = rest;
    x = whole;
  }
  for (int part = 0; part < length; part += 16) {
    for (int row = 0; row < 16; ++row) to[part + row] = load(x + row * length + part);
    transpose(to + part);
  }
}

template <int length> void store_sub_blocks(vf* numbers, int n, float* out) {
  alignas(64) float whole[16 * length];
  for (int part = 0; part < length; part += 16) {
    transpose(numbers + part);
    for (int row = 0; row < 16; ++row) store(whole + row * length + part, numbers[part + row]);
  }
  std::memcpy(out, whole, sizeof(float) * n * length);
}

// sum of weight * (x - (scale * number + offset))^2
template <int length, class Number> QD_INLINE vf error_of(const SubBlocks<length>& s, vf scale, vf offset, Number&& number) {
  vf error = all(0.0f);
  for (int e = 0; e < length; ++e) {
    const vf off = s.x[e] - fma(scale, number(e), offset);
    error = fma(s.weight[e] * off, off, error);
  }
  return error;
}

// The best scale of every sub-block by itself.
template <int length, class Levels> vf free_scales(const SubBlocks<length>& s, const Levels& levels, float first, float last) {
  vf top = s.x[0];
  for (int e = 1; e < length; ++e) top = greater_select(vabs(s.x[e]), vabs(top), s.x[e], top);
  const vf unit = inverse_or_zero(top);
  vf best = all(-1.0f), scale = all(0.0f);
  for (const float end : {first, last})
    for (const float part : {1.06f, 1.0f, 0.94f, 0.88f, 0.82f, 0.75f}) {
      const vf by = unit * all(end * part);
      vf product = all(0.0f), square = all(0.0f);
      for (int e = 0; e < length; ++e) {
        const vf v = Levels::nearest_of(levels, s.x[e] * by), weighted = s.weight[e] * v;
        product = fma(weighted, s.x[e], product), square = fma(weighted, v, square);
      }
      const vf found = product * inverse_or_zero(square), score = found * product;
      scale = greater_select(score, best, found, scale), best = vmax(score, best);
    }
  return scale;
}

template <int length, class Levels>
void search_symmetric(const SubBlocks<length>& s, const Levels& levels, const qd_search& how, vf* d, vf* scales, vf* numbers) {
  const vf least = all(float(how.least)), most = all(float(how.most)), zero = all(0.0f);
  const auto number_under = [&](vf scale) {
    const vf unit = inverse_or_zero(scale);
    return [&s, &levels, unit](int e) { return Levels::nearest_of(levels, s.x[e] * unit); };
  };
  const vf free = free_scales(s, levels, float(how.low), float(how.high));
  const vf first = as_half_has_it(block_extreme(free, s.per_block) / least);
  *d = first;
  *scales = clip(nearest(free * inverse_or_zero(*d)), least, most);
  for (int round = 0; round < 2; ++round) {
    vf xp = zero, pp = zero;
    const auto number = number_under(*d * *scales);
    for (int e = 0; e < length; ++e) {
      const vf product = *scales * number(e), weighted = s.weight[e] * product;
      xp = fma(weighted, s.x[e], xp), pp = fma(weighted, product, pp);
    }
    *d = as_half_has_it(block_sum(xp, s.per_block) * inverse_or_zero(block_sum(pp, s.per_block)));
    vf best = all(INFINITY);
    const vf start = *scales;
    for (const float step : {0.0f, -1.0f, 1.0f}) {
      const vf tried = clip(start + all(step), least, most);
      const vf error = error_of(s, *d * tried, zero, number_under(*d * tried));
      *scales = less_select(error, best, tried, *scales), best = vmin(error, best);
    }
  }
  const auto number = number_under(*d * *scales);
  for (int e = 0; e < length; ++e) numbers[e] = number(e);
  // Beyond float16: for whoever stores it to refuse, not zeros.
  *d = greater_select(all(INFINITY), vabs(first), *d, first);
}

// A sub-block's line: stored = scale * number - minimum.
struct Lines {
  vf scale, minimum;
};

struct Sums {  // of a sub-block's weight, and of weight * x
  vf ones, x;
};

// The best line of every sub-block by itself, both of its parts at least 0.
template <int length> Lines free_lines(const SubBlocks<length>& s, const Sums& sums, float most) {
  const vf zero = all(0.0f);
  vf low = zero, high = s.x[0];
  for (int e = 0; e < length; ++e) low = vmin(low, s.x[e]), high = vmax(high, s.x[e]);
  const vf width = high - low, unit = inverse_or_zero(width);
  vf best = all(INFINITY);
  Lines found = {width / all(most), zero - low};
  for (int i = 0; i < 10; ++i) {
    const vf by = unit * all(most + (float(i) * 0.2f - 1.0f) * (0.25f + most / 20));
    const auto number = [&](int e) { return clip(nearest((s.x[e] - low) * by), zero, all(most)); };
    vf q1 = zero, q2 = zero, xq = zero;
    for (int e = 0; e < length; ++e) {
      const vf q = number(e), weighted = s.weight[e] * q;
      q1 = q1 + weighted, q2 = fma(weighted, q, q2), xq = fma(weighted, s.x[e], xq);
    }
    const vf over = inverse_or_zero(sums.ones * q2 - q1 * q1);
    const vf both = (sums.ones * xq - sums.x * q1) * over, shift = (q2 * sums.x - q1 * xq) * over;
    // A minimum below 0 cannot be stored.
    const vf scale = greater_select(shift, zero, xq * inverse_or_zero(q2), both);
    const vf offset = greater_select(shift, zero, zero, shift);
    const vf error = greater_select(scale, zero, error_of(s, scale, offset, number), all(INFINITY));
    found.scale = less_select(error, best, scale, found.scale);
    found.minimum = less_select(error, best, zero - offset, found.minimum);
    best = vmin(error, best);
  }
  return found;
}

// Least squares of x = d (scale * number) - m minimum over whole blocks, as float16 has it; where there is none, d and m stay.
template <int length>
void solve_units(const SubBlocks<length>& s, const Sums& sums, const Lines& at, const vf* q, vf* d, vf* m) {
  const vf zero = all(0.0f);
  vf q1 = zero, q2 = zero, xq = zero;
  for (int e = 0; e < length; ++e) {
    const vf weighted = s.weight[e] * q[e];
    q1 = q1 + weighted, q2 = fma(weighted, q[e], q2), xq = fma(weighted, s.x[e], xq);
  }
  const auto total = [&](vf x) { return block_sum(x, s.per_block); };
  const vf aa = total(at.scale * at.scale * q2), bb = total(at.minimum * at.minimum * sums.ones);
  const vf ab = total(at.scale * at.minimum * q1), xa = total(at.scale * xq), xb = total(at.minimum * sums.x);
  const vf over = inverse_or_zero(aa * bb - ab * ab);
  const vf found_d = (xa * bb - xb * ab) * over, found_m = (xa * ab - xb * aa) * over;
  const vf alone = xa * inverse_or_zero(aa);  // where no sub-block has a minimum
  const vf without = greater_select(bb, zero, *d, greater_select(alone, zero, alone, *d));
  const auto if_good = [&](vf yes, vf no) { return greater_select(found_d, zero, less_select(found_m, zero, no, yes), no); };
  *d = as_half_has_it(if_good(found_d, without)), *m = as_half_has_it(if_good(found_m, *m));
}

template <int length> void search_affine(const SubBlocks<length>& s, const qd_search& how, vf* d, vf* m, Lines* lines, vf* q) {
  const vf zero = all(0.0f), most_scale = all(float(how.most)), most = all(float(how.high));
  Sums sums = {zero, zero};
  for (int e = 0; e < length; ++e) sums.ones = sums.ones + s.weight[e], sums.x = fma(s.weight[e], s.x[e], sums.x);
  const auto number_under = [&](vf scale, vf minimum) {
    const vf unit = inverse_or_zero(scale);
    return [&s, unit, minimum, zero, most](int e) { return clip(nearest((s.x[e] + minimum) * unit), zero, most); };
  };
  const auto set_numbers = [&] {
    const auto number = number_under(*d * lines->scale, *m * lines->minimum);
    for (int e = 0; e < length; ++e) q[e] = number(e);
  };
  const Lines free = free_lines(s, sums, float(how.high));
  *d = as_half_has_it(block_max(free.scale, s.per_block) / most_scale);
  *m = as_half_has_it(block_max(free.minimum, s.per_block) / most_scale);
  lines->scale = clip(nearest(free.scale * inverse_or_zero(*d)), zero, most_scale);
  lines->minimum = clip(nearest(free.minimum * inverse_or_zero(*m)), zero, most_scale);
  set_numbers();
  for (int round = 0; round < 2; ++round) {
    solve_units(s, sums, *lines, q, d, m);
    vf best = all(INFINITY);
    const Lines start = *lines;
    static constexpr float steps[][2] = {{0, 0}, {-1, 0}, {1, 0}, {0, -1}, {0, 1}, {1, 1}, {-1, -1}};
    for (const auto& step : steps) {
      const vf scale = clip(start.scale + all(step[0]), zero, most_scale);
      const vf minimum = clip(start.minimum + all(step[1]), zero, most_scale);
      const vf error = error_of(s, *d * scale, zero - *m * minimum, number_under(*d * scale, *m * minimum));
      lines->scale = less_select(error, best, scale, lines->scale);
      lines->minimum = less_select(error, best, minimum, lines->minimum);
      best = vmin(error, best);
    }
    set_numbers();
  }
}

// One number of every block of sixteen sub-blocks.
QD_INLINE void store_blocks(vf x, int n, int per_block, float* out) {
  alignas(64) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; i += per_block) *out++ = lanes[i];
}

QD_INLINE void store_some(vf x, int n, float* out) {
  alignas(64) float lanes[16];
  store(lanes, x);
  std::memcpy(out, lanes, sizeof(float) * n);
}

template <int length, class Find> void search_each(const qd_search& how, Find&& find) {
  SubBlocks<length> s;
  vf d, m = all(0.0f), numbers[length];
  s.per_block = how.per_block;
  for (int e = 0; e < length; ++e) s.weight[e] = all(1.0f);
  for (int64_t first = 0; first < how.n; first += 16) {
    const int n = how.n - first < 16 ? int(how.n - first) : 16;
    const int64_t block = first / how.per_block;
    load_sub_blocks<length>(how.x + first * length, n, 0.0f, s.x);
    if (how.weight) load_sub_blocks<length>(how.weight + first * length, n, 1.0f, s.weight);
    Lines lines = {all(0.0f), all(0.0f)};
    find(s, &d, &m, &lines, numbers);
    store_blocks(d, n, how.per_block, how.d + block), store_some(lines.scale, n, how.scales + first);
    if (how.minima) store_blocks(m, n, how.per_block, how.m + block), store_some(lines.minimum, n, how.minima + first);
    store_sub_blocks<length>(numbers, n, how.numbers + first * length);
  }
}

template <int length> void search_length(const qd_search& how) {
  if (how.minima)
    return search_each<length>(how, [&](const SubBlocks<length>& s, vf* d, vf* m, Lines* lines, vf* numbers) {
      search_affine(s, how, d, m, lines, numbers);
    });
  const WholeLevels whole = {all(float(how.low)), all(float(how.high))};
  search_each<length>(how, [&](const SubBlocks<length>& s, vf* d, vf*, Lines* lines, vf* numbers) {
    search_symmetric(s, whole, how, d, &lines->scale, numbers);
  });
}

void search(const qd_search& how) {
  if (!how.codebook) return how.length == 16 ? search_length<16>(how) : search_length<32>(how);
  CodebookLevels levels;
  const int8_t* values = reinterpret_cast<const int8_t*>(how.codebook);
  for (int i = 0; i < 16; ++i) levels.values[i] = values[i];
  for (int i = 0; i < 15; ++i) levels.middles[i] = (levels.values[i] + levels.values[i + 1]) / 2;
  search_each<32>(how, [&](const SubBlocks<32>& s, vf* d, vf*, Lines* lines, vf* numbers) {
    search_symmetric(s, levels, how, d, &lines->scale, numbers);
  });
}

}  // namespace
