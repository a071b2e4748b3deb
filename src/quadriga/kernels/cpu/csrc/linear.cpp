#include <algorithm>
#include <cmath>
#include <cstring>

#include "steps.hpp"

namespace {

constexpr int64_t kSerialNumbers = 1 << 14;  // below this, waking threads costs more than they save
constexpr int kRowTiles = 4;                 // tiles that share one pass over the panels

}  // namespace

void norm_rows(qd_context& c, const qd_norm& spec, const float* x, int64_t n, int64_t d, float* out) {
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) c.kernels->norm(spec, x + i * d, d, out + i * d);
  };
  c.pool.run(n, std::max<int64_t>(1, kSerialNumbers / d), body);
}

const float* normed_or_as_is(qd_context& c, const qd_norm& spec, const float* x, int64_t n, int64_t d) {
  if (!spec.weight) return x;
  float* normed = c.normed.reserve(n * d);
  norm_rows(c, spec, x, n, d, normed);
  return normed;
}

// Panels of consecutive rows of x. Few rows: the caller makes them at once, the threads would take longer to wake.
static const uint32_t* make_panels(qd_context& c, PanelKind kind, const float* x, int64_t stride, int64_t n, int64_t cols) {
  const int64_t width = c.kernels->max_width, units = panel_units(kind, cols);
  uint32_t* panels = c.panels.reserve(n * units);
  c.pool.run((n + width - 1) / width, std::max<int64_t>(1, kSerialNumbers / (cols * width)),
             [&](int64_t begin, int64_t end, int) {
               const float* rows[kMaxWidth];
               for (int64_t t = begin; t < end; ++t) {
                 const int64_t first = t * width;
                 const int count = int(std::min(width, n - first));
                 for (int i = 0; i < count; ++i) rows[i] = x + (first + i) * stride;
                 c.kernels->make_panel(kind, rows, count, cols, panels + first * units);
               }
             });
  return panels;
}

void linear(qd_context& c, const qd_matrix& m, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride,
            bool add) {
  const PanelKind kind = panel_kind(m.format, c.int16);
  const uint32_t* panels = make_panels(c, kind, x, x_stride, n, m.cols);
  const int64_t units = panel_units(kind, m.cols), width = c.kernels->max_width, bytes = tile_bytes(m.format, m.cols);
  const bool widen = wide_group_bytes(m.format) && n > 2 * width;
  const int64_t wide_bytes = groups_of(m.cols) * wide_group_bytes(m.format);
  if (widen) c.reserve(&qd_context::Thread::wide, wide_bytes * kRowTiles);
  c.pool.run(tiles_of(m.rows), n > width ? kRowTiles : 1, [&](int64_t begin, int64_t end, int thread) {
    alignas(64) float part[kMaxWidth * kTile];
    uint8_t* wide = c.of_thread[size_t(thread)].wide.data();
    for (int64_t block = begin; block < end; block += kRowTiles) {
      const int64_t stop = std::min<int64_t>(block + kRowTiles, end);
      if (widen)
        for (int64_t t = block; t < stop; ++t) c.kernels->widen(m.format, m.data + t * bytes, m.cols, wide + (t - block) * wide_bytes);
      for (int64_t first = 0; first < n; first += width) {
        const int count = int(std::min(width, n - first));
        for (int64_t t = block; t < stop; ++t) {
          const int64_t rows = std::min<int64_t>(kTile, m.rows - t * kTile);
          float* to = out + first * out_stride + t * kTile;
          const bool direct = rows == kTile && !add;
          float* result = direct ? to : part;
          const int64_t stride = direct ? out_stride : kTile;
          if (widen && count == width) c.kernels->tile_wide(m.format, c.int16, wide + (t - block) * wide_bytes, m.cols, panels + first * units, result, stride);
          else c.kernels->tile(m.format, c.int16, m.data + t * bytes, m.cols, panels + first * units, count, result, stride);
          if (direct) continue;
          for (int i = 0; i < count; ++i)
            for (int64_t r = 0; r < rows; ++r) {
              float& cell = to[i * out_stride + r];
              cell = add ? cell + part[i * kTile + r] : part[i * kTile + r];
            }
        }
      }
    }
  });
}

void add_branch(qd_context& c, const qd_matrix& w, const float* bias, const qd_norm& post_norm, float scale, const float* mixed,
                const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = w.rows, width = w.cols;
  if (float* own = own_branch(b, dim)) return linear(c, w, mixed, width, n, own, dim, false);
  if (!post_norm.weight && !bias && scale == 1) return linear(c, w, mixed, width, n, b.hidden, dim, true);
  float* projected = c.projected.reserve(n * dim);
  linear(c, w, mixed, width, n, projected, dim, false);
  if (bias)
    for (int64_t i = 0; i < n * dim; ++i) projected[i] += bias[i % dim];
  if (post_norm.weight) norm_rows(c, post_norm, projected, n, dim, projected);
  for (int64_t i = 0; i < n * dim; ++i) b.hidden[i] += scale * projected[i];
}

void run_merge(qd_context& c, const qd_merge& op, const qd_batch& b) {
  if (!b.branches || b.n_branches < 1) throw Failure(QD_STATUS_BAD_ARGUMENT, "a merge needs branches, got %d", b.n_branches);
  const int64_t n = b.n_tokens, dim = op.d_model, all = n * dim;
  float* sum = c.projected.reserve(all);
  c.pool.run(n, std::max<int64_t>(1, kSerialNumbers / dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * dim; i < end * dim; ++i) {
      float total = b.branches[i];
      for (int64_t r = 1; r < b.n_branches; ++r) total += b.branches[r * all + i];
      sum[i] = op.bias ? total + op.bias[i % dim] : total;
    }
    for (int64_t t = begin; op.post_norm.weight && t < end; ++t) c.kernels->norm(op.post_norm, sum + t * dim, dim, sum + t * dim);
    for (int64_t i = begin * dim; i < end * dim; ++i) b.hidden[i] = (b.hidden[i] + op.residual_scale * sum[i]) * op.stream_scale;
  });
}

void head_linear(qd_context& c, const qd_matrix& m, int n_heads, const float* x, HeadStrides of_x, int64_t n, float* out,
                 HeadStrides of_out) {
  const PanelKind kind = panel_kind(m.format, c.int16);
  const int64_t width = c.kernels->max_width, units = panel_units(kind, m.cols), bytes = tile_bytes(m.format, m.cols);
  const int64_t blocks = (n + width - 1) / width, tiles = m.rows / n_heads / kTile;
  uint32_t* panels = c.panels.reserve(n_heads * n * units);
  c.pool.run(n_heads * blocks, std::max<int64_t>(1, kSerialNumbers / (m.cols * width)), [&](int64_t begin, int64_t end, int) {
    const float* rows[kMaxWidth];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t head = t / blocks, first = t % blocks * width;
      const int count = int(std::min(width, n - first));
      for (int i = 0; i < count; ++i) rows[i] = x + (first + i) * of_x.row + head * of_x.head;
      c.kernels->make_panel(kind, rows, count, m.cols, panels + (head * n + first) * units);
    }
  });
  c.pool.run(n_heads * tiles, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = 0; first < n; first += width)
      for (int64_t t = begin; t < end; ++t) {
        const int64_t head = t / tiles;
        const int count = int(std::min(width, n - first));
        c.kernels->tile(m.format, c.int16, m.data + t * bytes, m.cols, panels + (head * n + first) * units, count,
                        out + first * of_out.row + head * of_out.head + t % tiles * kTile, of_out.row);
      }
  });
}

void run_embed(qd_context& c, const qd_embed& op, const qd_batch& b) {
  const int64_t d = op.table.cols;
  c.pool.run(b.n_tokens, std::max<int64_t>(1, kSerialNumbers / d), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = b.hidden + i * d;
      c.kernels->unpack_row(op.table.format, op.table.data, d, b.tokens[i], row);
      if (op.scale != 1.0f)
        for (int64_t j = 0; j < d; ++j) row[j] *= op.scale;
    }
  });
}

void run_head(qd_context& c, const qd_head& op, const qd_batch& b) {
  if (!b.n_rows) return;
  const int64_t d = op.weight.cols, v = op.weight.rows;
  float* normed = c.normed.reserve(b.n_rows * d);
  for (int64_t i = 0; i < b.n_rows; ++i)
    c.kernels->norm(op.norm, b.hidden + b.rows[i] * d, d, normed + i * d);
  linear(c, op.weight, normed, d, b.n_rows, b.logits, v, false);
  if (op.bias)
    for (int64_t i = 0; i < b.n_rows * v; ++i) b.logits[i] += op.bias[i % v];
  if (op.logit_scale != 1.0f)
    for (int64_t i = 0; i < b.n_rows * v; ++i) b.logits[i] *= op.logit_scale;
  if (op.logit_cap > 0)
    c.pool.run(b.n_rows * v, 1 << 14, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) b.logits[i] = op.logit_cap * std::tanh(b.logits[i] / op.logit_cap);
    });
}
