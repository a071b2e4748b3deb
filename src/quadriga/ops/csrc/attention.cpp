#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "steps.hpp"

namespace {

constexpr int kFewQueries = 8;    // up to this many new tokens, a sequence is split by keys, beyond it by queries
constexpr int kQueryBlock = 16;

// One piece of attention: queries [first, first + n) of a sequence, one key/value head, chunks [chunk, end_chunk).
struct Piece {
  int32_t sequence, head, first, n, chunk, end_chunk;
  int64_t partial;  // where its (max, sum, out) rows begin, in rows; -1: it covers all chunks and writes the result
};

struct Rotation {
  const float *cos, *sin;
};

}  // namespace

void run_qkv(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = op.wqkv.cols;
  const int d = op.head_dim, heads = op.n_heads, kv_heads = op.n_kv_heads;
  const int64_t q_dim = int64_t(heads) * d, kv_dim = int64_t(kv_heads) * d, width = q_dim + 2 * kv_dim;
  float* normed = c.normed.get(n * dim);
  norm_rows(c, op.norm, b.hidden, n, dim, normed);
  float* qkv = c.qkv.get(n * width);
  linear(c, op.wqkv, normed, dim, n, qkv, width, false);

  // Sequence of every token, for its block table.
  const int64_t block_bytes = kv_bytes(op.kv_format, d) * kv_heads;
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    float* table = c.of_thread[size_t(thread)].a.get(d);
    int s = int(std::upper_bound(b.starts, b.starts + b.n_sequences + 1, int32_t(begin)) - b.starts) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= b.starts[s + 1]) ++s;
      float* row = qkv + i * width;
      if (op.clip > 0)
        for (int64_t j = 0; j < width; ++j) row[j] = std::min(std::max(row[j], -op.clip), op.clip);
      const int position = b.positions[i];
      if (op.inverse_frequencies) {
        const int half = d / 2;
        for (int j = 0; j < half; ++j) {
          const float angle = float(position) * op.inverse_frequencies[j];
          table[j] = std::cos(angle), table[half + j] = std::sin(angle);
        }
        for (int h = 0; h < heads + kv_heads; ++h) {
          float* x = row + int64_t(h) * d;
          for (int j = 0; j < half; ++j) {
            const float x1 = x[j], x2 = x[half + j];
            x[j] = x1 * table[j] - x2 * table[half + j];
            x[half + j] = x2 * table[j] + x1 * table[half + j];
          }
        }
      }
      const int32_t block = b.tables[b.table_starts[s] + position / QD_BLOCK_TOKENS];
      for (int h = 0; h < kv_heads; ++h)
        c.kernels->write_kv(op.kv_format, d, row + q_dim + int64_t(h) * d, row + q_dim + kv_dim + int64_t(h) * d,
                            position % QD_BLOCK_TOKENS, op.kv + block * block_bytes + h * kv_bytes(op.kv_format, d));
    }
  };
  c.pool.run(n, std::max<int64_t>(1, (1 << 13) / width), body);
}

void run_attend(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int d = op.head_dim, padded = round_up_16(d), group = op.n_heads / op.n_kv_heads;
  const int64_t q_dim = int64_t(op.n_heads) * d, width = q_dim + 2 * int64_t(op.n_kv_heads) * d;
  const int64_t head_bytes = kv_bytes(op.kv_format, d);
  float* out = c.mixed.get(int64_t(b.n_tokens) * q_dim);
  const float* qkv = c.qkv.get(0);

  std::vector<Piece> pieces, merges;
  int64_t rows = 0;
  for (int s = 0; s < b.n_sequences; ++s) {
    const int first = b.starts[s], n = b.starts[s + 1] - first;
    if (!n) continue;
    const int chunks = b.positions[first + n - 1] / QD_KV_CHUNK + 1;
    for (int h = 0; h < op.n_kv_heads; ++h) {
      if (n > kFewQueries) {
        for (int q = 0; q < n; q += kQueryBlock) {
          const int count = std::min(kQueryBlock, n - q);
          pieces.push_back({s, h, first + q, count, 0, b.positions[first + q + count - 1] / QD_KV_CHUNK + 1, -1});
        }
      } else if (chunks == 1) {
        pieces.push_back({s, h, first, n, 0, 1, -1});
      } else {
        merges.push_back({s, h, first, n, 0, chunks, rows});
        for (int k = 0; k < chunks; ++k, rows += int64_t(n) * group) pieces.push_back({s, h, first, n, k, k + 1, rows});
      }
    }
  }
  // Long pieces first: the last ones to be taken should be short.
  if (b.n_tokens > kFewQueries)
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& z) { return a.end_chunk - a.chunk > z.end_chunk - z.chunk; });
  float* partial = c.partial.get(rows * (padded + 2));

  c.pool.run(int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    auto& mine = c.of_thread[size_t(thread)];
    const int most = kQueryBlock * group;
    float* kept = mine.a.get(int64_t(most) * 2 * (padded + 2));
    float* fresh = kept + int64_t(most) * (padded + 2);
    uint32_t* units = mine.units.get(attend_scratch(most, d));
    std::vector<const float*> q(static_cast<size_t>(most));
    std::vector<int32_t> positions(static_cast<size_t>(most));
    std::vector<float> slopes(static_cast<size_t>(most));
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[size_t(i)];
      const int n_rows = piece.n * group;
      for (int t = 0; t < piece.n; ++t)
        for (int g = 0; g < group; ++g) {
          const int head = piece.head * group + g;
          const size_t r = size_t(t * group + g);
          q[r] = qkv + (piece.first + t) * width + int64_t(head) * d;
          positions[r] = b.positions[piece.first + t];
          if (op.alibi_slopes) slopes[r] = op.alibi_slopes[head];
        }
      AttendChunk a{op.kv + piece.head * head_bytes, head_bytes * op.n_kv_heads, b.tables + b.table_starts[piece.sequence], 0,
                    op.kv_format, d, n_rows, q.data(), positions.data(), op.alibi_slopes ? slopes.data() : nullptr,
                    op.score_scale, op.soft_cap, nullptr, nullptr, nullptr, units};
      float* rows_of = piece.partial >= 0 ? partial + piece.partial * (padded + 2) : kept;
      for (int k = piece.chunk; k < piece.end_chunk; ++k) {
        float* to = k == piece.chunk ? rows_of : fresh;
        a.chunk = k, a.max = to, a.sum = to + n_rows, a.out = to + 2 * n_rows;
        c.kernels->attend(a);
        if (to == fresh)
          for (int r = 0; r < n_rows; ++r)
            c.kernels->merge(rows_of + r, rows_of + n_rows + r, rows_of + 2 * n_rows + int64_t(r) * padded, fresh[r], fresh[n_rows + r],
                             fresh + 2 * n_rows + int64_t(r) * padded, padded);
      }
      if (piece.partial >= 0) continue;
      for (int r = 0; r < n_rows; ++r) {
        float* to = out + (piece.first + r / group) * q_dim + int64_t(piece.head * group + r % group) * d;
        const float factor = 1.0f / kept[n_rows + r];
        const float* from = kept + 2 * n_rows + int64_t(r) * padded;
        for (int j = 0; j < d; ++j) to[j] = from[j] * factor;
      }
    }
  });
  c.pool.run(int64_t(merges.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& m = merges[size_t(i)];
      const int n_rows = m.n * group;
      float* base = partial + m.partial * (padded + 2);
      for (int k = 1; k < m.end_chunk; ++k) {
        float* next = base + int64_t(k) * n_rows * (padded + 2);
        for (int r = 0; r < n_rows; ++r)
          c.kernels->merge(base + r, base + n_rows + r, base + 2 * n_rows + int64_t(r) * padded, next[r], next[n_rows + r],
                           next + 2 * n_rows + int64_t(r) * padded, padded);
      }
      for (int r = 0; r < n_rows; ++r) {
        float* to = out + (m.first + r / group) * q_dim + int64_t(m.head * group + r % group) * d;
        const float factor = 1.0f / base[n_rows + r];
        const float* from = base + 2 * n_rows + int64_t(r) * padded;
        for (int j = 0; j < d; ++j) to[j] = from[j] * factor;
      }
    }
  });
}

void run_attention_out(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = op.wo.rows, q_dim = op.wo.cols;
  const float* mixed = c.mixed.get(0);
  if (!op.post_norm.weight) return linear(c, op.wo, mixed, q_dim, n, b.hidden, dim, true);
  float* projected = c.projected.get(n * dim);
  linear(c, op.wo, mixed, q_dim, n, projected, dim, false);
  norm_rows(c, op.post_norm, projected, n, dim, projected);
  for (int64_t i = 0; i < n * dim; ++i) b.hidden[i] += projected[i];
}
