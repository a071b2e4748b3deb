// One row of logits to one token: see qd_sampling. The vocabulary is never sorted.
//
//   logits [-> copy with penalties, moves, -inf where nothing may be chosen] -> weights e^((x - best) / T), sums of blocks
//   of 256 -> the cut (least weight that stays, and how many of that very weight) -> one draw from what stays, by id
//
// Weights are the same bits on every instruction set (`fused`), sums are doubles in an order that only the vocabulary
// decides, so a token depends neither on the batch, nor on the threads, nor on the processor.
#include <cfloat>
#include <functional>

namespace {

#if QD_AVX512
struct vd { __m512d a, b; };  // sixteen doubles
QD_INLINE vd no_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
QD_INLINE vd add(vd s, vf x) {
  return {_mm512_add_pd(s.a, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v))),
          _mm512_add_pd(s.b, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)))};
}
QD_INLINE void store_doubles(double* p, vd s) { _mm512_storeu_pd(p, s.a), _mm512_storeu_pd(p + 8, s.b); }
// Lanes where a > b (a >= b) as bits.
QD_INLINE uint32_t greater_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
QD_INLINE uint32_t at_least_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
// The lanes whose bit is set, one after the other; up to 16 numbers are written. How many they are.
QD_INLINE int64_t press(float* out, vf x, uint32_t bits) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(__mmask16(bits), x.v));
  return __builtin_popcount(bits);
}
#else
#if QD_AVX2
struct vd { __m256d v[4]; };
QD_INLINE vd no_doubles() { return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}}; }
QD_INLINE vd add(vd s, vf x) {
  return {{_mm256_add_pd(s.v[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x.a))),
           _mm256_add_pd(s.v[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1))),
           _mm256_add_pd(s.v[2], _mm256_cvtps_pd(_mm256_castps256_ps128(x.b))),
           _mm256_add_pd(s.v[3], _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)))}};
}
QD_INLINE uint32_t greater_bits(vf a, vf b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))) << 8;
}
QD_INLINE uint32_t at_least_bits(vf a, vf b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GE_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GE_OQ))) << 8;
}
#elif QD_NEON
struct vd { float64x2_t v[8]; };
QD_INLINE vd no_doubles() { return {}; }
QD_INLINE vd add(vd s, vf x) {
  return {{vaddq_f64(s.v[0], vcvt_f64_f32(vget_low_f32(x.a))), vaddq_f64(s.v[1], vcvt_high_f64_f32(x.a)),
           vaddq_f64(s.v[2], vcvt_f64_f32(vget_low_f32(x.b))), vaddq_f64(s.v[3], vcvt_high_f64_f32(x.b)),
           vaddq_f64(s.v[4], vcvt_f64_f32(vget_low_f32(x.c))), vaddq_f64(s.v[5], vcvt_high_f64_f32(x.c)),
           vaddq_f64(s.v[6], vcvt_f64_f32(vget_low_f32(x.d))), vaddq_f64(s.v[7], vcvt_high_f64_f32(x.d))}};
}
QD_INLINE uint32_t greater_bits(vf a, vf b) {
  return mask_bits(vcgtq_f32(a.a, b.a), vcgtq_f32(a.b, b.b), vcgtq_f32(a.c, b.c), vcgtq_f32(a.d, b.d));
}
QD_INLINE uint32_t at_least_bits(vf a, vf b) {
  return mask_bits(vcgeq_f32(a.a, b.a), vcgeq_f32(a.b, b.b), vcgeq_f32(a.c, b.c), vcgeq_f32(a.d, b.d));
}
#else
struct vd { double v[16]; };
QD_INLINE vd no_doubles() { return {}; }
QD_INLINE vd add(vd s, vf x) {
  QD_LANES s.v[i] += double(x.v[i]);
  return s;
}
QD_INLINE uint32_t greater_bits(vf a, vf b) {
  uint32_t bits = 0;
  QD_LANES bits |= uint32_t(a.v[i] > b.v[i]) << i;
  return bits;
}
QD_INLINE uint32_t at_least_bits(vf a, vf b) {
  uint32_t bits = 0;
  QD_LANES bits |= uint32_t(a.v[i] >= b.v[i]) << i;
  return bits;
}
#endif
QD_INLINE void store_doubles(double* p, vd s) { std::memcpy(p, &s, sizeof s); }
QD_INLINE int64_t press(float* out, vf x, uint32_t bits) {
  float lanes[16];
  store(lanes, x);
  int64_t n = 0;
  for (; bits; bits &= bits - 1) out[n++] = lanes[__builtin_ctz(bits)];
  return n;
}
#endif

double sum_doubles(vd s) {
  double x[16];
  store_doubles(x, s);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// A row's weights, its blocks, and room for two selections.
struct Weights {
  int64_t v, blocks;
  float *w, *logs;           // (256 blocks,) with zeros behind the last token; their logarithms, where they are asked for
  float *some, *others;      // (256 blocks + 16,) selections
  float* most;               // (blocks,) the largest of each block
  double* sums;              // (blocks,)
  int32_t* repeats;          // (n_history,) see dry.inl

  Weights(int64_t n_tokens, float* scratch) : v(n_tokens), blocks((n_tokens + kSampleBlock - 1) / kSampleBlock) {
    const int64_t room = blocks * kSampleBlock + 16;
    w = scratch, logs = w + room, some = logs + room, others = some + room;
    sums = reinterpret_cast<double*>(others + room);  // room is a multiple of 16
    most = reinterpret_cast<float*>(sums + blocks);
    repeats = reinterpret_cast<int32_t*>(most + blocks);
  }
};

// What stays: weights above `least`, and the first `n_equal` of those that are it.
struct Cut {
  float least = 0.0f;
  int64_t n_equal = INT64_MAX;
};

QD_INLINE float bounded(float x) { return x < -FLT_MAX ? -FLT_MAX : x > FLT_MAX ? FLT_MAX : x; }

#include "dry.inl"

// The logits under penalties and moves, within what float32 holds, and -inf wherever nothing may be chosen.
void adjust(const qd_sampling& s, int64_t v, bool early, Weights& all_of) {
  float* x = all_of.w;
  std::memcpy(x, s.logits, size_t(v) * 4);
  const float repetition = float(s.repetition_penalty);
  for (int32_t j = 0; j < s.n_said; ++j) {
    float& cell = x[s.said[j]];
    if (repetition != 1.0f) cell = bounded(cell > 0 ? cell / repetition : cell * repetition);
    if (s.counts[j] && (s.presence_penalty != 0 || s.frequency_penalty != 0)) {
      const float penalty = float(std::fma(s.frequency_penalty, double(s.counts[j]), s.presence_penalty));
      cell = bounded(cell - penalty);
    }
  }
  if (s.n_history) discourage(s, x, all_of.repeats, reinterpret_cast<int32_t*>(all_of.others));
  for (int32_t j = 0; j < s.n_moved; ++j) x[s.moved[j]] = bounded(x[s.moved[j]] + s.moves[j]);
  if (s.allowed)
    for (int64_t i = 0; i < v; ++i) x[i] = s.allowed[i] ? x[i] : -INFINITY;
  for (int32_t j = 0; j < s.n_unused; ++j) x[s.unused[j]] = -INFINITY;
  for (int32_t j = 0; early && j < s.n_early; ++j) x[s.early[j]] = -INFINITY;
}

// The first of the largest numbers; -1 where all are -inf.
int64_t first_largest(const float* x, int64_t n) {
  float most = -INFINITY;
  int64_t place = -1;
  for (int64_t block = 0; block < n; block += kSampleBlock) {
    vf top = all(-INFINITY);
    const int64_t end = std::min<int64_t>(block + kSampleBlock, n);
    for (int64_t i = block; i < end; i += 16) top = vmax(top, load_part(x + i, n - i, -INFINITY));
    const float highest = largest(top);
    if (highest > most) most = highest, place = block;
  }
  if (place >= 0)
    while (x[place] != most) ++place;
  return place;
}

void sum_block(Weights& all_of, int64_t block) {
  const float* w = all_of.w + block * kSampleBlock;
  vd total = no_doubles();
  vf top = all(0.0f);
  for (int i = 0; i < kSampleBlock; i += 16) total = add(total, load(w + i)), top = vmax(top, load(w + i));
  all_of.sums[block] = sum_doubles(total), all_of.most[block] = largest(top);
}

double sum_of_all(const Weights& all_of) {
  double total = 0;
  for (int64_t block = 0; block < all_of.blocks; ++block) total += all_of.sums[block];
  return total;
}

// x may be the weights' own memory.
void weigh(Weights& all_of, const float* x, float best, float inverse, bool logs) {
  for (int64_t block = 0; block < all_of.blocks; ++block) {
    vd total = no_doubles();
    vf top = all(0.0f);
    for (int64_t i = block * kSampleBlock; i < (block + 1) * kSampleBlock; i += 16) {
      const vf value = i < all_of.v ? load_part(x + i, all_of.v - i, -INFINITY) : all(-INFINITY);
      const vf log = (value - all(best)) * all(inverse), w = exponential_by<fused>(log);
      store(all_of.w + i, w);
      if (logs) store(all_of.logs + i, log);
      total = add(total, w), top = vmax(top, w);
    }
    all_of.sums[block] = sum_doubles(total), all_of.most[block] = largest(top);
  }
}

// Tokens that are never chosen weigh nothing.
void drop(Weights& all_of, const int32_t* ids, int32_t n) {
  for (int32_t j = 0; j < n; ++j) all_of.w[ids[j]] = 0.0f;
  for (int32_t j = 0; j < n; ++j)
    if (!j || ids[j] / kSampleBlock != ids[j - 1] / kSampleBlock) sum_block(all_of, ids[j] / kSampleBlock);
}

// Weights of at least `least`, and above 0, by id; how many.
int64_t gather(const Weights& all_of, float least, float* out) {
  int64_t n = 0;
  for (int64_t block = 0; block < all_of.blocks; ++block) {
    if (all_of.most[block] < least) continue;
    const float* w = all_of.w + block * kSampleBlock;
    for (int i = 0; i < kSampleBlock; i += 16) {
      const vf x = load(w + i);
      const uint32_t bits = at_least_bits(x, all(least)) & greater_bits(x, all(0.0f));
      if (bits) n += press(out + n, x, bits);
    }
  }
  return n;
}

// What is counted on the way down from the largest weight: tokens, or their weights.
struct Count {
  static double of(double, int64_t n) { return double(n); }
};
struct Mass {
  static double of(double sum, int64_t) { return sum; }
};

// The weight at which the largest ones, taken one by one, reach `target`, and how many equal ones that takes. Values
// that are known to be above, or below, leave the selection, in parts about a pivot. Nothing is reached: the end of all.
template <class Measure>
Cut reach(float* values, float* others, int64_t n, double target) {
  double before = 0;  // measured of what is above the selection
  while (n) {
    float sample[9];
    for (int i = 0; i < 9; ++i) sample[i] = values[(2 * i + 1) * n / 18];
    std::nth_element(sample, sample + 4, sample + 9);
    const float pivot = sample[4];
    int64_t above = 0, below = 0;
    vd mass = no_doubles();
    for (int64_t i = 0; i < n; i += 16) {
      const vf x = load_part(values + i, n - i, 0.0f);  // in place: what is written has been read
      const uint32_t over = greater_bits(x, all(pivot)), under = greater_bits(all(pivot), x) & (n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1);
      mass = add(mass, greater_select(x, all(pivot), x, all(0.0f)));
      if (under) below += press(others + below, x, under);
      if (over) above += press(values + above, x, over);
    }
    const int64_t equal = n - above - below;
    const double upper = before + Measure::of(sum_doubles(mass), above), one = Measure::of(pivot, 1);
    if (upper >= target) {
      n = above;
    } else if (upper + one * double(equal) >= target) {
      int64_t taken = std::max<int64_t>(1, int64_t((target - upper) / one));
      while (taken > 1 && upper + one * double(taken - 1) >= target) --taken;
      while (upper + one * double(taken) < target) ++taken;
      return {pivot, taken};
    } else {
      before = upper + one * double(equal);
      std::swap(values, others);
      n = below;
    }
  }
  return {};
}

// A weight below which none of the k largest lies: the k-th largest of the blocks' largest, or 0.
float floor_of_top(Weights& all_of, int64_t k) {
  if (k > all_of.blocks) return 0.0f;
  std::memcpy(all_of.some, all_of.most, size_t(all_of.blocks) * 4);
  std::nth_element(all_of.some, all_of.some + k - 1, all_of.some + all_of.blocks, std::greater<float>());
  return all_of.some[k - 1];
}

Cut cut_of_top_k(const qd_sampling& s, Weights& all_of) {
  if (s.top_k <= 0 || s.top_k >= all_of.v) return {};
  const int64_t n = gather(all_of, floor_of_top(all_of, s.top_k), all_of.some);
  return s.top_k <= n ? reach<Count>(all_of.some, all_of.others, n, double(s.top_k)) : Cut();
}

// After the cut of top-k.
Cut cut_of(const qd_sampling& s, Weights& all_of, Cut cut) {
  if (s.top_p < 1) {
    double total = 0;
    float least = cut.least;
    if (cut.n_equal == INT64_MAX) {
      total = sum_of_all(all_of);
      // All weights below this have less than (1 - top_p) of the sum together. The margins are far beyond what sums lose.
      least = float(std::max(0.0, 0.999 * (1.0 - s.top_p) - 1e-9) * total / double(all_of.v));
    }
    int64_t n = gather(all_of, least, all_of.some);
    if (cut.n_equal != INT64_MAX) {
      int64_t left = cut.n_equal, kept = 0;  // of equal ones as many as top-k leaves
      for (int64_t i = 0; i < n; ++i)
        if (all_of.some[i] != least || left-- > 0) total += double(all_of.some[kept++] = all_of.some[i]);
      n = kept;
    }
    const Cut reached = reach<Mass>(all_of.some, all_of.others, n, s.top_p * total);
    if (reached.n_equal != INT64_MAX) cut = reached;
  }
  const float enough = float(s.min_p) * *std::max_element(all_of.most, all_of.most + all_of.blocks);
  if (enough > cut.least) cut = {enough, INT64_MAX};
  return cut;
}

// What does not stay weighs nothing; of whole blocks that only the sum tells, unless `clean`.
void apply(Weights& all_of, Cut cut, bool clean) {
  for (int64_t block = 0; block < all_of.blocks; ++block) {
    if (all_of.most[block] < cut.least) {
      all_of.sums[block] = 0;
      if (clean) std::memset(all_of.w + block * kSampleBlock, 0, kSampleBlock * 4);
      continue;
    }
    float* w = all_of.w + block * kSampleBlock;
    vd total = no_doubles();
    for (int i = 0; i < kSampleBlock; i += 16) {
      const vf x = load(w + i);
      uint32_t equal = at_least_bits(x, all(cut.least)) & ~greater_bits(x, all(cut.least));
      store(w + i, greater_select(all(cut.least), x, all(0.0f), x));
      for (; equal; equal &= equal - 1)
        if (cut.n_equal-- <= 0) w[i + __builtin_ctz(equal)] = 0.0f;
      total = add(total, load(w + i));
    }
    all_of.sums[block] = sum_doubles(total);
  }
}

#include "typical.inl"

// The token in whose part of the summed weights the place `at`, in [0, 1), lies; one of weight 0 never.
int32_t pick(const Weights& all_of, double at) {
  const double place = at * sum_of_all(all_of);
  double before = 0, end = 0;
  int64_t block = -1;
  for (int64_t b = 0; b < all_of.blocks; ++b) {  // where rounding leaves none beyond the place, the last of any weight
    if (all_of.sums[b] > 0) before = end, block = b, end += all_of.sums[b];
    if (end > place) break;
  }
  int64_t token = -1;
  for (int64_t i = block * kSampleBlock; i < (block + 1) * kSampleBlock; ++i) {
    if (all_of.w[i] <= 0) continue;
    token = i, before += double(all_of.w[i]);
    if (before > place) break;
  }
  return int32_t(token);
}

// Philox4x64-10 (Salmon et al. 2011), the first of the four numbers of key (seed, 0) and counter (position + 1, 0, 0, 0),
// which is NumPy's first for this key and counter, in [0, 1) with 53 bits. `second`: the second one.
double draw(int64_t seed, int64_t position, double* second) {
  uint64_t c[4] = {uint64_t(position) + 1, 0, 0, 0}, key[2] = {uint64_t(seed), 0};
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 p = (unsigned __int128)0xD2E7470EE14C6C93u * c[0], q = (unsigned __int128)0xCA5A826395121157u * c[2];
    const uint64_t next[4] = {uint64_t(q >> 64) ^ c[1] ^ key[0], uint64_t(q), uint64_t(p >> 64) ^ c[3] ^ key[1], uint64_t(p)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B97F4A7C15u, key[1] += 0xBB67AE8584CAA73Bu;
  }
  *second = double(c[1] >> 11) * 0x1p-53;
  return double(c[0] >> 11) * 0x1p-53;
}

// The most probable tokens of the untouched logits, without those that no token stands for.
void list_top(const qd_sampling& s, Weights& all_of, qd_sampled* out) {
  const int64_t v = all_of.v, n = std::min<int64_t>(s.n_top, v - s.n_unused);
  const float* x = s.logits;
  if (s.n_unused) {
    std::memcpy(all_of.w, x, size_t(v) * 4), x = all_of.w;
    for (int32_t j = 0; j < s.n_unused; ++j) all_of.w[s.unused[j]] = -INFINITY;
  }
  for (int64_t block = 0; block < all_of.blocks; ++block) {
    vf top = all(-INFINITY);
    for (int64_t i = block * kSampleBlock; i < std::min(v, (block + 1) * kSampleBlock); i += 16) top = vmax(top, load_part(x + i, v - i, -INFINITY));
    all_of.most[block] = largest(top);
  }
  float least = -FLT_MAX;
  if (n <= all_of.blocks) {
    std::memcpy(all_of.some, all_of.most, size_t(all_of.blocks) * 4);
    std::nth_element(all_of.some, all_of.some + n - 1, all_of.some + all_of.blocks, std::greater<float>());
    least = all_of.some[n - 1];
  }
  int32_t* ids = reinterpret_cast<int32_t*>(all_of.others);
  int64_t found = 0;
  for (int64_t block = 0; block < all_of.blocks; ++block) {
    if (all_of.most[block] < least) continue;
    for (int64_t i = block * kSampleBlock; i < std::min(v, (block + 1) * kSampleBlock); ++i)
      if (x[i] >= least) ids[found++] = int32_t(i);
  }
  out->n_top = int32_t(std::min(n, found));
  std::partial_sort(ids, ids + out->n_top, ids + found, [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  for (int32_t j = 0; j < out->n_top; ++j) s.top_ids[j] = ids[j], s.top_logits[j] = s.logits[ids[j]];
}

bool contains(const int32_t* ids, int32_t n, int32_t id) { return std::find(ids, ids + n, id) != ids + n; }

void sample(const qd_sampling& s, int64_t v, float* scratch, qd_sampled* out) {
  Weights all_of(v, scratch);
  int32_t token;
  row_stats(s.logits, v, &token, &out->log_sum);
  out->token = -1, out->n_top = 0, out->logit = 0;
  if (!std::isfinite(out->log_sum)) return;
  if (s.n_top > 0) list_top(s, all_of, out);
  const bool as_they_are = !s.n_said && !s.n_history && !s.n_moved && !s.allowed;
  const bool first = as_they_are && !contains(s.unused, s.n_unused, token) && !contains(s.early, s.n_early, token);
  const float* x = s.logits;
  if (!first) {
    adjust(s, v, true, all_of);
    int64_t best = first_largest(all_of.w, v);
    if (best < 0 && s.allowed && s.n_early) adjust(s, v, false, all_of), best = first_largest(all_of.w, v);
    token = int32_t(best), x = all_of.w;
  }
  if (token >= 0 && s.temperature > 0) {
    weigh(all_of, x, x[token], float(1.0 / s.temperature), s.typical_p < 1);
    if (first) drop(all_of, s.unused, s.n_unused), drop(all_of, s.early, s.n_early);
    Cut cut = cut_of_top_k(s, all_of);
    if (s.typical_p < 1) {
      if (cut.least > 0) apply(all_of, cut, true);
      keep_typical(all_of, s.typical_p);
      cut = {};
    }
    cut = cut_of(s, all_of, cut);
    double second;
    const double at = draw(s.seed, s.position, &second);
    if (cut.least > 0) apply(all_of, cut, second < s.xtc_probability);
    if (second < s.xtc_probability) drop_best(all_of, s.xtc_threshold);
    token = pick(all_of, at);
  }
  out->token = token;
  if (token >= 0) out->logit = s.logits[token];
}

}  // namespace
