// Latent attention before and after the attention itself: queries that meet latents, latents that are cached, results.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "steps.hpp"

namespace {

// Halves of n numbers turn by the table's cos, then sin.
void turn(const float* x, int n, const float* table, float* out) {
  const int half = n / 2;
  for (int j = 0; j < half; ++j) {
    const float x1 = x[j], x2 = x[half + j];
    out[j] = x1 * table[j] - x2 * table[half + j];
    out[half + j] = x2 * table[j] + x1 * table[half + j];
  }
}

// (N, H (nope + rope)) from the normed states: one projection, or through the queries' own latent.
const float* project_queries(qd_context& c, const qd_attention& op, const float* normed, int64_t n) {
  const qd_matrix& projection = op.wqkv[0];
  const int64_t rows = projection.rows;
  float* heads = c.heads.reserve(n * std::max<int64_t>(rows, int64_t(op.n_heads) * op.v_dim));
  if (!op.wq_a.data) {
    linear(c, projection, normed, projection.cols, n, heads, rows, false);
    return heads;
  }
  const int64_t rank = op.wq_a.rows;
  float* low = c.projected.reserve(n * rank);
  linear(c, op.wq_a, normed, op.wq_a.cols, n, low, rank, false);
  norm_rows(c, op.q_a_norm, low, n, rank, low);
  linear(c, projection, low, rank, n, heads, rows, false);
  return heads;
}

}  // namespace

void run_latent_qkv(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = op.wkv_a.cols;
  const int d = op.head_dim, rank = op.kv_rank, rope = op.rope_dim, half = rope / 2, n_heads = op.n_heads;
  const int64_t q_head = op.nope_dim + rope, q_row = n_heads * q_head, row = int64_t(n_heads) * d;
  const float* normed = normed_or_as_is(c, op.norm, b.hidden, n, dim);
  const float* heads = project_queries(c, op, normed, n);
  float* latents = c.latents.reserve(n * d);
  linear(c, op.wkv_a, normed, dim, n, latents, d, false);
  float* queries = c.qkv.reserve(n * row);
  head_linear(c, op.wk_b, n_heads, heads, {q_row, q_head}, n, queries, {row, d});

  c.reserve(&qd_context::Thread::a, rope);
  c.pool.run(n, std::max<int64_t>(1, (1 << 13) / row), [&](int64_t begin, int64_t end, int thread) {
    float* table = c.of_thread[size_t(thread)].a.data();
    int s = int(std::upper_bound(b.starts, b.starts + b.n_sequences + 1, int32_t(begin)) - b.starts) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= b.starts[s + 1]) ++s;
      const int position = b.positions[i];
      for (int j = 0; j < half; ++j) {
        const float angle = float(position) * op.inverse_frequencies[j];
        table[j] = std::cos(angle) * op.rotary_scale, table[half + j] = std::sin(angle) * op.rotary_scale;
      }
      for (int h = 0; h < n_heads; ++h) turn(heads + i * q_row + h * q_head + op.nope_dim, rope, table, queries + i * row + int64_t(h) * d + rank);
      float* latent = latents + i * d;
      c.kernels->norm(op.kv_a_norm, latent, rank, latent);
      turn(latent + rank, rope, table, latent + rank);
      const int32_t block = block_table(op, b, s)[position / QD_BLOCK_TOKENS];
      c.kernels->write_latent(op.kv_format, rank, d, latent, position % QD_BLOCK_TOKENS, op.kv + block * op.kv_stride);
    }
  });
}

void run_latent_out(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, out_row = int64_t(op.n_heads) * op.v_dim;
  float* values = c.heads.reserve(n * out_row);
  head_linear(c, op.wv_b, op.n_heads, c.mixed.data(), {int64_t(op.n_heads) * op.kv_rank, op.kv_rank}, n, values, {out_row, op.v_dim});
  add_projected(c, op, b, values);
}
