// Norms, activations, softmax, choices, sums.
#include <algorithm>

namespace {

// A last part of fewer than 16 numbers goes through a padded copy.
QD_INLINE vf load_part(const float* x, int64_t n, float pad) {
  if (n >= 16) return load(x);
  float part[16];
  for (int i = 0; i < 16; ++i) part[i] = i < n ? x[i] : pad;
  return load(part);
}

QD_INLINE void store_part(float* x, int64_t n, vf value) {
  if (n >= 16) return store(x, value);
  float part[16];
  store(part, value);
  std::memcpy(x, part, size_t(n) * 4);
}

void norm(const qd_norm& spec, const float* x, int64_t d, float* out) {
  float mean = 0.0f;
  if (spec.kind == QD_NORM_KIND_LAYER) {
    vf total = all(0.0f);
    for (int64_t i = 0; i < d; i += 16) total = total + load_part(x + i, d - i, 0.0f);
    mean = sum(total) / float(d);
  }
  vf squares = all(0.0f);
  for (int64_t i = 0; i < d; i += 16) {
    const vf centred = load_part(x + i, d - i, mean) - all(mean);
    squares = fma(centred, centred, squares);
  }
  const vf factor = all(1.0f / std::sqrt(sum(squares) / float(d) + spec.eps));
  for (int64_t i = 0; i < d; i += 16) {
    const vf centred = load_part(x + i, d - i, mean) - all(mean);
    vf normed = centred * factor * load_part(spec.weight + i, d - i, 0.0f);
    if (spec.bias) normed = normed + load_part(spec.bias + i, d - i, 0.0f);
    store_part(out + i, d - i, normed);
  }
}

QD_INLINE vf sigmoid(vf x) { return all(1.0f) / (all(1.0f) + exponential(all(0.0f) - x)); }

QD_INLINE vf hyperbolic_tangent(vf x) {  // absolute error about 1e-7
  return all(1.0f) - all(2.0f) / (exponential(x + x) + all(1.0f));
}

// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
QD_LARGE vf error_function(vf x) {
  const vf size = vabs(x), t = all(1.0f) / fma(all(0.3275911f), size, all(1.0f));
  vf p = all(1.061405429f);
  p = fma(p, t, all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  const vf y = all(1.0f) - p * t * exponential(all(0.0f) - size * size);
  return greater_select(all(0.0f), x, all(0.0f) - y, y);
}

QD_LARGE vf activation_of(int activation, vf x) {
  switch (activation) {
    case QD_ACTIVATION_SILU: return x * sigmoid(x);
    case QD_ACTIVATION_GELU: return x * all(0.5f) * (all(1.0f) + error_function(x * all(0.70710678118654752f)));
    case QD_ACTIVATION_GELU_TANH: {
      const vf inner = all(0.79788456080286536f) * fma(all(0.044715f) * x * x, x, x);
      return x * all(0.5f) * (all(1.0f) + hyperbolic_tangent(inner));
    }
    case QD_ACTIVATION_RELU2: {
      const vf risen = vmax(all(0.0f), x);  // the constant first: NaN stays
      return risen * risen;
    }
    default: return vmax(x, all(0.0f));
  }
}

constexpr float kClamp = 7.0f, kClampedSlope = 1.702f;  // of QD_ACTIVATION_CLAMPED_GLU

// What gate and up make together. The constant comes first in vmin and vmax: they return the second of a pair with NaN.
QD_LARGE vf gated_unit(int activation, vf gate, vf up) {
  if (activation != QD_ACTIVATION_CLAMPED_GLU) return activation_of(activation, gate) * up;
  const vf g = vmin(all(kClamp), gate), u = vmin(all(kClamp), vmax(all(-kClamp), up));
  return (u + all(1.0f)) * (g * sigmoid(all(kClampedSlope) * g));
}

void activate(int activation, const float* gate, const float* up, int64_t n, float* hidden) {
  for (int64_t i = 0; i < n; i += 16) {
    const vf u = load(up + i);
    store(hidden + i, gate ? gated_unit(activation, load(gate + i), u) : activation_of(activation, u));
  }
}

void add_scaled(float* total, const float* x, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(total + i, fma(all(scale), load(x + i), load(total + i)));
}

void softmax(float* x, int64_t n) {
  vf top = all(-INFINITY);
  for (int64_t i = 0; i < n; i += 16) top = vmax(top, load_part(x + i, n - i, -INFINITY));
  const vf most = all(largest(top));
  vf total = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const vf e = exponential(load_part(x + i, n - i, -INFINITY) - most);
    total = total + e;
    store_part(x + i, n - i, e);
  }
  const vf factor = all(1.0f / sum(total));
  for (int64_t i = 0; i < n; i += 16) store_part(x + i, n - i, load_part(x + i, n - i, 0.0f) * factor);
}

void scores(int kind, float* x, int64_t n) {
  if (kind == QD_SCORE_SOFTMAX) return softmax(x, n);
  for (int64_t i = 0; i < n; i += 16) store_part(x + i, n - i, sigmoid(load_part(x + i, n - i, 0.0f)));
}

// The largest of every 16 are kept beside them, so that a round looks at n / 16 + 16 numbers. NaN counts as -infinity;
// where nothing above it is left the lowest free numbers are taken, so that ids are distinct whatever x holds.
void top_k(float* x, int64_t n, int k, int32_t* ids) {
  const int64_t blocks = (n + 15) / 16;
  const vf none = all(-INFINITY);
  float best[QD_MOST_EXPERTS / 16];
  for (int64_t b = 0; b < blocks; ++b) {
    const vf value = load_part(x + 16 * b, n - 16 * b, -INFINITY), number = greater_select(value, none, value, none);
    store(x + 16 * b, number);
    best[b] = largest(number);
  }
  for (int j = 0; j < k; ++j) {
    int64_t block = 0;
    for (int64_t b = 1; b < blocks; ++b)
      if (best[b] > best[block]) block = b;
    if (best[block] == -INFINITY) {
      for (int32_t id = 0; j < k; ++id)
        if (std::find(ids, ids + j, id) == ids + j) ids[j++] = id;
      return;
    }
    int64_t at = 16 * block;
    while (x[at] != best[block]) ++at;
    ids[j] = int32_t(at);
    x[at] = -INFINITY;
    best[block] = largest(load(x + 16 * block));
  }
}

// NaN anywhere makes log_sum NaN, which is how the engine learns of broken weights.
void row_stats(const float* x, int64_t n, int32_t* best, float* log_sum) {
  float most = -INFINITY;
  int64_t place = 0;  // of the first block of 256 that has the most
  for (int64_t block = 0; block < n; block += 256) {
    vf top = all(-INFINITY);
    const int64_t end = std::min<int64_t>(block + 256, n);
    for (int64_t i = block; i < end; i += 16) top = vmax(top, load_part(x + i, n - i, -INFINITY));
    const float highest = largest(top);
    if (highest > most) most = highest, place = block;
  }
  vf total = all(0.0f), poison = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const vf value = load_part(x + i, n - i, -INFINITY);
    total = total + exponential(value - all(most));
    poison = fma(load_part(x + i, n - i, 0.0f), all(0.0f), poison);  // NaN and infinities times 0 are NaN
  }
  *log_sum = most + std::log(sum(total)) + sum(poison);
  *best = 0;
  for (int64_t i = place; i < n; ++i)
    if (x[i] == most) {
      *best = int32_t(i);
      break;
    }
}

}  // namespace
