// Recurrent layers: their states lie in numbered slots, read before a sequence's tokens of the pass and written after them.
#include <algorithm>
#include <cmath>

#include "steps.hpp"

namespace {

constexpr int64_t kChannels = 64;          // that a thread takes at once
constexpr int64_t kSerialNumbers = 1 << 14;  // below this, waking threads costs more than they save
constexpr int64_t kGateCost = 64;            // of a head's gates, in numbers: three exponentials and a logarithm

// The slot's state, or NULL for a sequence that begins here.
float* slot(float* state, int64_t numbers, int32_t number) { return number < 0 ? nullptr : state + number * numbers; }

void check_recurrent(const qd_batch& b, int32_t n_taps) {
  if (!b.before || !b.after || n_taps < 2 || n_taps > kMostTaps)
    throw Failure(QD_STATUS_BAD_ARGUMENT, "a recurrent layer needs slots and 2 to 16 taps, got %d", n_taps);
}

// Items a thread takes at once: enough for their numbers to be worth waking it.
int64_t grain_of(int64_t items, int64_t numbers) { return std::max<int64_t>(1, kSerialNumbers * items / numbers); }

// A convolution over every sequence's tokens, from a slot into a slot of `numbers`. whole: of the pass, its sequences'
// tokens one after the other; what is a sequence's own is filled in here.
void run_conv(qd_context& c, const qd_batch& b, void (*conv)(const ConvPart&), const ConvPart& whole, float* state, int64_t numbers) {
  const int64_t width = whole.width, parts = (width + kChannels - 1) / kChannels, items = parts * b.n_sequences;
  c.pool.run(items, grain_of(items, b.n_tokens * width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / parts, start = b.starts[s];
      ConvPart part = whole;
      part.rows += start * part.stride, part.out += start * width, part.n = b.starts[s + 1] - start;
      part.first = i % parts * kChannels, part.end = std::min(part.first + kChannels, width);
      part.before = slot(state, numbers, b.before[s]), part.after = slot(state, numbers, b.after[s]);
      conv(part);
    }
  });
}

// The whole pass for `run_conv`.
ConvPart conv_of(const float* rows, int64_t stride, int64_t width, const float* taps, const float* bias, int n_taps, float* out) {
  return {rows, 0, width, stride, 0, width, taps, bias, n_taps, nullptr, nullptr, out};
}

// One layer's gated delta rule in one pass.
struct Delta {
  qd_context& c;
  const qd_delta_net& op;
  const qd_batch& b;
  int64_t n = b.n_tokens, q_dim = int64_t(op.n_k_heads) * op.k_dim, v_dim = int64_t(op.n_v_heads) * op.v_dim;
  int64_t width = 2 * q_dim + v_dim, stride = width + v_dim;  // convolved; with z
  int64_t kept = (op.n_taps - 1) * width, numbers = kept + op.n_v_heads * int64_t(op.k_dim) * op.v_dim;  // of a slot
  float *rows = nullptr, *gates = nullptr, *mixed = nullptr, *out = nullptr;  // (n, stride), (n, 2 H), (n, width), (n, v_dim)

  void project() {
    const int64_t dim = op.w_in.cols, heads = op.n_v_heads;
    float* normed = c.normed.reserve(n * dim);
    norm_rows(c, op.norm, b.hidden, n, dim, normed);
    rows = c.qkv.reserve(n * stride);
    linear(c, op.w_in, normed, dim, n, rows, stride, false);
    gates = c.router.reserve(n * 2 * heads);
    linear(c, op.w_ba, normed, dim, n, gates, 2 * heads, false);
    c.pool.run(n, grain_of(n, n * heads * kGateCost), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float *beta = gates + i * 2 * heads, *decay = beta + heads;
        for (int64_t h = 0; h < heads; ++h) {
          const float x = decay[h] + op.dt[h], soft = x > 20.0f ? x : std::log1p(std::exp(x));
          beta[h] = 1.0f / (1.0f + std::exp(-beta[h]));
          decay[h] = std::exp(-op.rate[h] * soft);
        }
      }
    });
  }

  void convolve() {
    mixed = c.partial.reserve(n * width);
    run_conv(c, b, c.kernels->silu_conv, conv_of(rows, stride, width, op.taps, nullptr, op.n_taps, mixed), op.state, numbers);
    const int64_t heads = 2 * op.n_k_heads;
    const float scale = 1.0f / std::sqrt(float(op.k_dim));
    c.pool.run(n, grain_of(n, n * 2 * q_dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < heads; ++h)
          c.kernels->unit(mixed + i * width + h * op.k_dim, op.k_dim, h < op.n_k_heads ? scale : 1.0f);
    });
  }

  void remember() {
    out = c.mixed.reserve(n * v_dim);
    const int64_t parts = (op.v_dim + kDeltaColumns - 1) / kDeltaColumns, items = parts * op.n_v_heads * b.n_sequences;
    c.reserve(&qd_context::Thread::a, kDeltaColumns * int64_t(op.k_dim));
    c.pool.run(items, grain_of(items, n * v_dim * op.k_dim), [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / (parts * op.n_v_heads), h = i / parts % op.n_v_heads, first = i % parts * kDeltaColumns;
        const int64_t start = b.starts[s], group = op.tiled ? h % op.n_k_heads : h / (op.n_v_heads / op.n_k_heads);
        const int64_t place = kept + h * op.k_dim * op.v_dim + first;
        const float *row = mixed + start * width, *gate = gates + start * 2 * op.n_v_heads + h;
        const float* before = slot(op.state, numbers, b.before[s]);
        c.kernels->delta_rule({row + group * op.k_dim, row + q_dim + group * op.k_dim, row + 2 * q_dim + h * op.v_dim + first,
                               width, gate + op.n_v_heads, gate, 2 * op.n_v_heads, b.starts[s + 1] - start, op.k_dim, op.v_dim,
                               int(std::min<int64_t>(kDeltaColumns, op.v_dim - first)), before ? before + place : nullptr,
                               slot(op.state, numbers, b.after[s]) + place, out + start * v_dim + h * op.v_dim + first, v_dim,
                               c.of_thread[size_t(thread)].a.data()});
      }
    });
  }

  void gate() {
    c.pool.run(n, grain_of(n, n * v_dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < op.n_v_heads; ++h) {
          float* x = out + i * v_dim + h * op.v_dim;
          c.kernels->gated_norm(op.head_norm, x, rows + i * stride + width + h * op.v_dim, op.v_dim, x);
        }
    });
  }
};

// One Mamba-2 layer in one pass.
struct Mamba {
  qd_context& c;
  const qd_mamba2& op;
  const qd_batch& b;
  int64_t n = b.n_tokens, heads = op.n_heads, inner = heads * op.head_dim, group = int64_t(op.n_groups) * op.state_dim;
  int64_t width = inner + 2 * group, stride = inner + width;  // convolved; with z
  int64_t kept = (op.n_taps - 1) * width, numbers = kept + inner * op.state_dim;  // of a slot
  float *rows = nullptr, *gates = nullptr, *mixed = nullptr, *out = nullptr;  // (n, stride), (n, 2 H), (n, width), (n, inner)

  void project() {
    const int64_t dim = op.w_in.cols;
    float* normed = c.normed.reserve(n * dim);
    norm_rows(c, op.norm, b.hidden, n, dim, normed);
    rows = c.qkv.reserve(n * stride);
    linear(c, op.w_in, normed, dim, n, rows, stride, false);
    gates = c.router.reserve(n * 2 * heads);
    linear(c, op.w_dt, normed, dim, n, gates, 2 * heads, false);
    c.pool.run(n, grain_of(n, n * heads * 32), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float *step = gates + i * 2 * heads, *decay = step + heads;
        for (int64_t h = 0; h < heads; ++h) {
          const float x = step[h] + op.dt[h];
          step[h] = x > 20.0f ? x : std::log1p(std::exp(x));
          decay[h] = std::exp(-op.rate[h] * step[h]);
        }
      }
    });
  }

  void convolve() {
    mixed = c.partial.reserve(n * width);
    run_conv(c, b, c.kernels->silu_conv, conv_of(rows + inner, stride, width, op.taps, op.conv_bias, op.n_taps, mixed),
               op.state, numbers);
  }

  void remember() {
    out = c.mixed.reserve(n * inner);
    const int64_t parts = (op.head_dim + kStateColumns - 1) / kStateColumns, items = parts * heads * b.n_sequences;
    c.pool.run(items, grain_of(items, n * inner * op.state_dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / (parts * heads), h = i / parts % heads, first = i % parts * kStateColumns;
        const int64_t start = b.starts[s], of_group = h / (heads / op.n_groups) * op.state_dim;
        const int64_t place = kept + h * op.state_dim * op.head_dim + first, column = h * op.head_dim + first;
        const float *row = mixed + start * width, *gate = gates + start * 2 * heads + h;
        const float* before = slot(op.state, numbers, b.before[s]);
        c.kernels->state_space({row + column, row + inner + of_group, row + inner + group + of_group, width, gate + heads, gate,
                                op.skip[h], 2 * heads, b.starts[s + 1] - start, op.state_dim, op.head_dim,
                                int(std::min<int64_t>(kStateColumns, op.head_dim - first)), before ? before + place : nullptr,
                                slot(op.state, numbers, b.after[s]) + place, out + start * inner + column, inner});
      }
    });
  }

  void gate() {
    const int64_t d = inner / op.n_groups;
    c.pool.run(n, grain_of(n, n * inner), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        c.kernels->times_silu(out + i * inner, rows + i * stride, inner);
        for (int g = 0; g < op.n_groups; ++g) {
          qd_norm norm = op.group_norm;
          norm.weight += g * d;
          c.kernels->norm(norm, out + i * inner + g * d, d, out + i * inner + g * d);
        }
      }
    });
  }
};

template <class Layer, class Op> void run_layer(qd_context& c, const Op& op, const qd_batch& b) {
  check_recurrent(b, op.n_taps);
  Layer layer{c, op, b};
  layer.project();
  layer.convolve();
  layer.remember();
  layer.gate();
  add_branch(c, op.w_out, nullptr, op.post_norm, op.residual_scale, layer.out, b);
}

}  // namespace

void run_delta_net(qd_context& c, const qd_delta_net& op, const qd_batch& b) { run_layer<Delta>(c, op, b); }

void run_mamba2(qd_context& c, const qd_mamba2& op, const qd_batch& b) { run_layer<Mamba>(c, op, b); }

void run_short_conv(qd_context& c, const qd_short_conv& op, const qd_batch& b) {
  check_recurrent(b, op.n_taps);
  const int64_t n = b.n_tokens, dim = op.w_in.cols, width = op.w_out.cols, numbers = (op.n_taps - 1) * width;
  float* normed = c.normed.reserve(n * dim);
  norm_rows(c, op.norm, b.hidden, n, dim, normed);
  float* rows = c.qkv.reserve(n * 3 * width);
  linear(c, op.w_in, normed, dim, n, rows, 3 * width, false);
  float* mixed = c.mixed.reserve(n * width);
  run_conv(c, b, c.kernels->short_conv, conv_of(rows, 3 * width, width, op.taps, nullptr, op.n_taps, mixed), op.state, numbers);
  add_branch(c, op.w_out, nullptr, op.post_norm, op.residual_scale, mixed, b);
}
