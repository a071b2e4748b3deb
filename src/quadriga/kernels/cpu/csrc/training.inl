// What lies between the matrix products of a training step, one pass over memory each. Numbers are float32 or bfloat16
// (T = float or uint16_t); arithmetic is float32. NaN and infinities come out as NaN, so that a bad step is seen.

namespace {

QD_INLINE vf get(const float* p) { return load(p); }
QD_INLINE vf get(const uint16_t* p) { return load_bf16(p); }
QD_INLINE void put(float* p, vf x) { store(p, x); }
QD_INLINE void put(uint16_t* p, vf x) { store_bf16(p, x); }

// Loops over n numbers: whole vectors where they lie, then a last part through a padded copy.
template <class T>
QD_INLINE vf get_part(const T* p, int64_t n) {
  if (n >= 16) return get(p);
  T part[16] = {};
  std::memcpy(part, p, size_t(n) * sizeof(T));
  return get(part);
}
template <class T>
QD_INLINE void put_part(T* p, int64_t n, vf x) {
  if (n >= 16) return put(p, x);
  T part[16];
  put(part, x);
  std::memcpy(p, part, size_t(n) * sizeof(T));
}

QD_LARGE vf activation_slope(int activation, vf x) {
  const vf one = all(1.0f), half = all(0.5f);
  switch (activation) {
    case QD_ACTIVATION_SILU: {
      const vf s = sigmoid(x);
      return s * fma(x, one - s, one);
    }
    case QD_ACTIVATION_GELU: {
      const vf density = all(0.39894228040143268f) * exponential(all(-0.5f) * x * x);
      return fma(x, density, half * (one + error_function(x * all(0.70710678118654752f))));
    }
    case QD_ACTIVATION_GELU_TANH: {
      const vf root = all(0.79788456080286536f), square = x * x;
      const vf t = hyperbolic_tangent(root * fma(all(0.044715f) * square, x, x));
      const vf inner = root * fma(all(3 * 0.044715f), square, one);
      return half * (one + t) + half * x * (one - t * t) * inner;
    }
    case QD_ACTIVATION_RELU2: return all(2.0f) * vmax(all(0.0f), x);
    default: return greater_select(x, all(0.0f), one, all(0.0f));
  }
}

// Slopes of QD_ACTIVATION_CLAMPED_GLU; beyond the limits nothing moves, at them it does, as in torch.
QD_LARGE vf clamped_gate_slope(vf gate, vf up) {
  const vf one = all(1.0f), g = vmin(all(kClamp), gate), s = sigmoid(all(kClampedSlope) * g);
  const vf u = vmin(all(kClamp), vmax(all(-kClamp), up));
  return greater_select(gate, all(kClamp), all(0.0f), (u + one) * (s * fma(all(kClampedSlope) * g, one - s, one)));
}

QD_LARGE vf clamped_up_slope(vf gate, vf up) {
  const vf g = vmin(all(kClamp), gate);
  return greater_select(vabs(up), all(kClamp), all(0.0f), g * sigmoid(all(kClampedSlope) * g));
}

// Without up (NULL) the network is not gated: what up would be is 1.
template <class T>
void hidden_row(int activation, const T* gate, const T* up, float weight, int64_t f, T* hidden) {
  const vf w = all(weight);
  for (int64_t i = 0; i < f; i += 16) {
    const vf g = get_part(gate + i, f - i);
    const vf h = up ? gated_unit(activation, g, get_part(up + i, f - i)) : activation_of(activation, g);
    put_part(hidden + i, f - i, h * w);
  }
}

// dh, the gradient of the weighted hidden row, becomes that of the gate.
template <class T>
float hidden_back_row(int activation, const T* gate, const T* up, float weight, int64_t f, T* dh, T* hidden, T* du) {
  const vf w = all(weight);
  vf d_weight = all(0.0f);
  for (int64_t i = 0; i < f; i += 16) {
    const int64_t n = f - i;
    const vf g = get_part(gate + i, n), u = up ? get_part(up + i, n) : all(1.0f), d = get_part(dh + i, n);
    const vf weighted = d * w;
    if (activation == QD_ACTIVATION_CLAMPED_GLU) {
      const vf plain = gated_unit(activation, g, u);
      d_weight = fma(d, plain, d_weight);
      put_part(hidden + i, n, plain * w);
      put_part(du + i, n, clamped_up_slope(g, u) * weighted);
      put_part(dh + i, n, clamped_gate_slope(g, u) * weighted);
      continue;
    }
    const vf act = activation_of(activation, g), plain = act * u;
    d_weight = fma(d, plain, d_weight);
    put_part(hidden + i, n, plain * w);
    if (du) put_part(du + i, n, act * weighted);
    put_part(dh + i, n, activation_slope(activation, g) * u * weighted);
  }
  return sum(d_weight);
}

template <class T>
void sum_rows_row(const T* rows, const int64_t* home, int64_t k, int64_t d, T* out) {
  for (int64_t i = 0; i < d; i += 16) {
    vf total = get_part(rows + home[0] * d + i, d - i);
    for (int64_t j = 1; j < k; ++j) total = total + get_part(rows + home[j] * d + i, d - i);
    put_part(out + i, d - i, total);
  }
}

// exp(x - max) of [0, n) into `work`, with their sum; NaN for a row that holds NaN or an infinity.
template <class T>
float exponentials(const T* x, float scale, float slope, float first_bias, int64_t n, float* work, float* most) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = float(i);
  const vf factor = all(scale), steps = load(lanes) * all(slope);
  vf top = all(-INFINITY), poison = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    vf value = get_part(x + i, n - i) * factor;
    poison = fma(value, all(0.0f), poison);
    if (slope != 0.0f) value = value + steps + all(first_bias + slope * float(i));
    if (n - i < 16) {
      float part[16];
      store(part, value);
      for (int64_t j = n - i; j < 16; ++j) part[j] = -INFINITY;
      value = load(part);
    }
    top = vmax(top, value);
    store(work + i, value);
  }
  *most = largest(top);
  const vf highest = all(*most);
  vf total = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const vf e = exponential(load(work + i) - highest);
    total = total + e;
    store(work + i, e);
  }
  return sum(total) + sum(poison);
}

template <class T>
void softmax_row(T* row, int64_t low, int64_t high, int64_t keys, float slope, float first_bias, float* work) {
  float most;
  const float total = exponentials(row + low, 1.0f, slope, first_bias, high - low, work, &most);
  const vf factor = all(1.0f / total);
  std::memset(row, 0, size_t(low) * sizeof(T));
  for (int64_t i = low; i < high; i += 16) put_part(row + i, high - i, load(work + i - low) * factor);
  std::memset(row + high, 0, size_t(keys - high) * sizeof(T));
}

template <class T>
void softmax_back_row(const T* p, int64_t low, int64_t high, int64_t keys, T* dp) {
  vf dot = all(0.0f);
  for (int64_t i = low; i < high; i += 16) dot = fma(get_part(p + i, high - i), get_part(dp + i, high - i), dot);
  const vf mean = all(sum(dot));
  std::memset(dp, 0, size_t(low) * sizeof(T));
  for (int64_t i = low; i < high; i += 16)
    put_part(dp + i, high - i, get_part(p + i, high - i) * (get_part(dp + i, high - i) - mean));
  std::memset(dp + high, 0, size_t(keys - high) * sizeof(T));
}

QD_INLINE float plain(float x) { return x; }
QD_INLINE float plain(uint16_t x) { return bf16_to_float(x); }
QD_INLINE void assign(float* to, float x) { *to = x; }
QD_INLINE void assign(uint16_t* to, float x) { *to = float_to_bf16(x); }

template <class T>
float cross_entropy_row(T* logits, int64_t target, int64_t v, float scale, bool gradient, float* work) {
  const float wanted = plain(logits[target]) * scale;
  float most;
  const float total = exponentials(logits, scale, 0.0f, 0.0f, v, work, &most);
  if (gradient) {
    const vf factor = all(1.0f / total);
    for (int64_t i = 0; i < v; i += 16) put_part(logits + i, v - i, load(work + i) * factor);
    assign(logits + target, work[target] / total - 1.0f);
  }
  return most + std::log(total) - wanted;
}

// The rows' pointers are of the dtype's numbers.
void hidden_any(int dtype, int activation, const void* gate, const void* up, float weight, int64_t f, void* hidden) {
  if (dtype == QD_FORMAT_BFLOAT16)
    return hidden_row(activation, (const uint16_t*)gate, (const uint16_t*)up, weight, f, (uint16_t*)hidden);
  hidden_row(activation, (const float*)gate, (const float*)up, weight, f, (float*)hidden);
}

float hidden_back_any(int dtype, int activation, const void* gate, const void* up, float weight, int64_t f, void* dh,
                      void* hidden, void* du) {
  if (dtype == QD_FORMAT_BFLOAT16)
    return hidden_back_row(activation, (const uint16_t*)gate, (const uint16_t*)up, weight, f, (uint16_t*)dh,
                           (uint16_t*)hidden, (uint16_t*)du);
  return hidden_back_row(activation, (const float*)gate, (const float*)up, weight, f, (float*)dh, (float*)hidden, (float*)du);
}

void sum_rows_any(int dtype, const void* rows, const int64_t* home, int64_t k, int64_t d, void* out) {
  if (dtype == QD_FORMAT_BFLOAT16) return sum_rows_row((const uint16_t*)rows, home, k, d, (uint16_t*)out);
  sum_rows_row((const float*)rows, home, k, d, (float*)out);
}

void softmax_any(int dtype, void* row, int64_t low, int64_t high, int64_t keys, float slope, float first_bias, float* work) {
  if (dtype == QD_FORMAT_BFLOAT16) return softmax_row((uint16_t*)row, low, high, keys, slope, first_bias, work);
  softmax_row((float*)row, low, high, keys, slope, first_bias, work);
}

void softmax_back_any(int dtype, const void* p, int64_t low, int64_t high, int64_t keys, void* dp) {
  if (dtype == QD_FORMAT_BFLOAT16) return softmax_back_row((const uint16_t*)p, low, high, keys, (uint16_t*)dp);
  softmax_back_row((const float*)p, low, high, keys, (float*)dp);
}

float cross_entropy_any(int dtype, void* logits, int64_t target, int64_t v, float scale, bool gradient, float* work) {
  if (dtype == QD_FORMAT_BFLOAT16) return cross_entropy_row((uint16_t*)logits, target, v, scale, gradient, work);
  return cross_entropy_row((float*)logits, target, v, scale, gradient, work);
}

}  // namespace
