// Recurrent layers, token by token: what a sequence's rows become does not depend on how they were cut.

namespace {

// gated: c * conv(b * x); otherwise silu(conv(x) + bias).
template <bool gated>
void conv(const ConvPart& p) {
  const int kept = p.n_taps - 1;
  for (int64_t c = p.first; c < p.end; c += 16) {
    const int64_t m = p.end - c;
    vf past[kMostTaps], taps[kMostTaps];  // the oldest first
    for (int j = 0; j < kept; ++j) past[j] = p.before ? load_part(p.before + j * p.width + c, m, 0.0f) : all(0.0f);
    for (int j = 0; j <= kept; ++j) taps[j] = load_part(p.taps + j * p.width + c, m, 0.0f);
    for (int64_t t = 0; t < p.n; ++t) {
      const float* row = p.rows + t * p.stride + c;
      past[kept] = load_part(row, m, 0.0f);
      if (gated) past[kept] = past[kept] * load_part(row + 2 * p.width, m, 0.0f);
      vf sum = taps[0] * past[0];
      for (int j = 1; j <= kept; ++j) sum = fma(taps[j], past[j], sum);
      if (!gated && p.bias) sum = sum + load_part(p.bias + c, m, 0.0f);
      const vf made = gated ? sum * load_part(row + p.width, m, 0.0f) : sum * sigmoid(sum);
      store_part(p.out + t * p.width + c, m, made);
      for (int j = 0; j < kept; ++j) past[j] = past[j + 1];
    }
    for (int j = 0; j < kept; ++j) store_part(p.after + j * p.width + c, m, past[j]);
  }
}

void unit(float* x, int64_t d, float scale) {
  vf squares = all(0.0f);
  for (int64_t i = 0; i < d; i += 16) {
    const vf part = load_part(x + i, d - i, 0.0f);
    squares = fma(part, part, squares);
  }
  const vf factor = all(scale / std::sqrt(sum(squares) + 1e-6f));
  for (int64_t i = 0; i < d; i += 16) store_part(x + i, d - i, load_part(x + i, d - i, 0.0f) * factor);
}

// Row i of a part's state, `vectors` times 16 columns of it; the last may be a part.
template <int vectors>
struct DeltaRows {
  const DeltaPart& p;
  int64_t width(int x) const { return x == vectors - 1 ? p.columns - 16 * (vectors - 1) : 16; }
  vf read(const float* row, int x) const { return load_part(row + 16 * x, width(x), 0.0f); }
  void write(float* row, int x, vf value) const { store_part(row + 16 * x, width(x), value); }
};

// One token: state = decay state + k change, out = state q; and next = state k of the token after it, so that the state is
// read and written once a token. `last`: the state goes to p.after.
template <int vectors, bool last>
QD_INLINE void delta_token(const DeltaPart& p, int64_t t, const vf* change, vf* next) {
  const DeltaRows<vectors> rows{p};
  const float *q = p.q + t * p.stride, *k = p.k + t * p.stride, *k_next = last ? k : k + p.stride;
  const vf decay = all(p.decay[t * p.gate_stride]);
  vf out[vectors];
  for (int x = 0; x < vectors; ++x) out[x] = next[x] = all(0.0f);
  for (int i = 0; i < p.k_dim; ++i)
    for (int x = 0; x < vectors; ++x) {
      float* place = p.room + 16 * (vectors * i + x);
      const vf state = fma(all(k[i]), change[x], load(place) * decay);
      if (last) rows.write(p.after + int64_t(i) * p.v_dim, x, state);
      else store(place, state), next[x] = fma(state, all(k_next[i]), next[x]);
      out[x] = fma(state, all(q[i]), out[x]);
    }
  for (int x = 0; x < vectors; ++x) rows.write(p.out + t * p.out_stride, x, out[x]);
}

// Columns do not know of one another, so some of them go through all tokens in p.room, in the nearest cache.
template <int vectors>
void delta_columns(const DeltaPart& p) {
  const DeltaRows<vectors> rows{p};
  vf seen[vectors];  // state k
  for (int x = 0; x < vectors; ++x) seen[x] = all(0.0f);
  for (int i = 0; i < p.k_dim; ++i)
    for (int x = 0; x < vectors; ++x) {
      const vf state = p.before ? rows.read(p.before + int64_t(i) * p.v_dim, x) : all(0.0f);
      store(p.room + 16 * (vectors * i + x), state);
      seen[x] = fma(state, all(p.k[i]), seen[x]);
    }
  for (int64_t t = 0; t < p.n; ++t) {
    const vf decay = all(p.decay[t * p.gate_stride]), beta = all(p.beta[t * p.gate_stride]);
    vf change[vectors];
    for (int x = 0; x < vectors; ++x) change[x] = (rows.read(p.v + t * p.stride, x) - decay * seen[x]) * beta;
    if (t + 1 < p.n) delta_token<vectors, false>(p, t, change, seen);
    else delta_token<vectors, true>(p, t, change, seen);
  }
}

void delta_rule(const DeltaPart& p) {
  if (p.columns > 16) delta_columns<2>(p);
  else delta_columns<1>(p);
}

// Tokens [t, t + tokens) of `vectors` times 16 columns. A row of the state is read and written once for all of them; every
// number is made by the same operations in the same order, however many there are.
template <int vectors, int tokens>
void state_tokens(const StatePart& p, int64_t t) {
  const int64_t last = p.columns - 16 * (vectors - 1);
  const auto at = [&](int x) { return x == vectors - 1 ? last : int64_t(16); };
  const float* from = t || !p.before ? p.after : p.before;
  vf written[tokens][vectors], out[tokens][vectors], decay[tokens];
  for (int j = 0; j < tokens; ++j) {
    const vf step = all(p.step[(t + j) * p.gate_stride]);
    decay[j] = all(p.decay[(t + j) * p.gate_stride]);
    for (int x = 0; x < vectors; ++x) {
      written[j][x] = load_part(p.x + (t + j) * p.stride + 16 * x, at(x), 0.0f) * step;
      out[j][x] = all(0.0f);
    }
  }
  for (int i = 0; i < p.state_dim; ++i)
    for (int x = 0; x < vectors; ++x) {
      const int64_t place = int64_t(i) * p.head_dim + 16 * x;
      vf state = load_part(from + place, at(x), 0.0f);
      for (int j = 0; j < tokens; ++j) {
        const int64_t row = (t + j) * p.stride + i;
        state = fma(all(p.b[row]), written[j][x], state * decay[j]);
        out[j][x] = fma(state, all(p.c[row]), out[j][x]);
      }
      store_part(p.after + place, at(x), state);
    }
  for (int j = 0; j < tokens; ++j)
    for (int x = 0; x < vectors; ++x) {
      const vf own = load_part(p.x + (t + j) * p.stride + 16 * x, at(x), 0.0f);
      store_part(p.out + (t + j) * p.out_stride + 16 * x, at(x), fma(all(p.skip), own, out[j][x]));
    }
}

template <int vectors>
void state_columns(const StatePart& p) {
  if (!p.before)
    for (int i = 0; i < p.state_dim; ++i) std::memset(p.after + int64_t(i) * p.head_dim, 0, size_t(p.columns) * 4);
  int64_t t = 0;
  for (; t + 2 <= p.n; t += 2) state_tokens<vectors, 2>(p, t);
  if (t < p.n) state_tokens<vectors, 1>(p, t);
}

void state_space(const StatePart& p) {
  switch ((p.columns + 15) / 16) {
    case 1: return state_columns<1>(p);
    case 2: return state_columns<2>(p);
    case 3: return state_columns<3>(p);
    default: return state_columns<4>(p);
  }
}

void gated_norm(const qd_norm& spec, const float* x, const float* gate, int64_t d, float* out) {
  norm(spec, x, d, out);
  for (int64_t i = 0; i < d; i += 16) {
    const vf z = load_part(gate + i, d - i, 0.0f);
    store_part(out + i, d - i, load_part(out + i, d - i, 0.0f) * (z * sigmoid(z)));
  }
}

void times_silu(float* x, const float* gate, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const vf z = load_part(gate + i, n - i, 0.0f);
    store_part(x + i, n - i, load_part(x + i, n - i, 0.0f) * (z * sigmoid(z)));
  }
}

void times_sigmoid(float* x, const float* gate, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    store_part(x + i, n - i, load_part(x + i, n - i, 0.0f) * sigmoid(load_part(gate + i, n - i, 0.0f)));
}

}  // namespace
