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

struct Division {
  std::vector<Piece> pieces, merges;
  int64_t rows = 0;  // of partial results
};

// The chunk of the first key that a query at `position` sees.
int first_chunk(const qd_attention& op, int position) {
  return op.window && position >= op.window ? (position - op.window + 1) / QD_KV_CHUNK : 0;
}

Division divide(const qd_attention& op, const qd_batch& b) {
  const int group = op.n_heads / op.n_kv_heads;
  Division all;
  for (int s = 0; s < b.n_sequences; ++s) {
    const int first = b.starts[s], n = b.starts[s + 1] - first;
    if (!n) continue;
    const int begin = first_chunk(op, b.positions[first]), chunks = b.positions[first + n - 1] / QD_KV_CHUNK + 1;
    for (int h = 0; h < op.n_kv_heads; ++h) {
      if (n > kFewQueries) {
        for (int q = 0; q < n; q += kQueryBlock) {
          const int count = std::min(kQueryBlock, n - q);
          all.pieces.push_back({s, h, first + q, count, first_chunk(op, b.positions[first + q]),
                                b.positions[first + q + count - 1] / QD_KV_CHUNK + 1, -1});
        }
      } else if (chunks == begin + 1) {
        all.pieces.push_back({s, h, first, n, begin, chunks, -1});
      } else {
        all.merges.push_back({s, h, first, n, begin, chunks, all.rows});
        for (int k = begin; k < chunks; ++k, all.rows += int64_t(n) * group) all.pieces.push_back({s, h, first, n, k, k + 1, all.rows});
      }
    }
  }
  // Long pieces first: the last ones to be taken should be short.
  if (b.n_tokens > kFewQueries)
    std::stable_sort(all.pieces.begin(), all.pieces.end(),
                     [](const Piece& a, const Piece& z) { return a.end_chunk - a.chunk > z.end_chunk - z.chunk; });
  return all;
}

// Some rows' (max, sum, out), one array after the other.
struct Rows {
  Rows(float* memory, int n, int padded) : max(memory), sum(memory + n), out(memory + 2 * n), n(n), padded(padded) {}

  void merge(const Kernels& kernels, const Rows& other) const {
    for (int r = 0; r < n; ++r)
      kernels.merge(max + r, sum + r, out + int64_t(r) * padded, other.max[r], other.sum[r], other.out + int64_t(r) * padded, padded);
  }

  float *max, *sum, *out;
  int n, padded;
};

// What a row's weighted sum is divided by, as a factor: its weights' sum, and the sink's weight where there is one.
float share(float max, float sum, const float* sink) {
  if (!sink) return 1.0f / sum;
  const float most = std::max(max, *sink), own = std::exp(max - most);
  return own / (sum * own + std::exp(*sink - most));
}

// The blocks of a sequence in a layer.
const int32_t* table(const qd_attention& op, const qd_batch& b, int sequence) {
  return b.tables + op.cache_group * b.table_size + b.table_starts[sequence];
}

// One layer's attention in one pass.
struct Attend {
  qd_context& c;
  const qd_attention& op;
  const qd_batch& b;
  int d = op.head_dim, padded = round_up_16(d), group = op.n_heads / op.n_kv_heads, most = kQueryBlock * group;
  int64_t q_dim = int64_t(op.n_heads) * d, width = q_dim + 2 * int64_t(op.n_kv_heads) * d;
  int64_t head_bytes = kv_bytes(op.kv_format, d);
  float *out = nullptr, *partial = nullptr;  // (N, q_dim); rows of (max, sum, out)

  void reserve(int64_t partial_rows) {
    out = c.mixed.reserve(int64_t(b.n_tokens) * q_dim);
    partial = c.partial.reserve(partial_rows * (padded + 2));
    c.reserve(&qd_context::Thread::a, int64_t(most) * 2 * (padded + 2));
    c.reserve(&qd_context::Thread::b, most);
    c.reserve(&qd_context::Thread::units, attend_scratch(most, d));
    c.reserve(&qd_context::Thread::rows, most);
    c.reserve(&qd_context::Thread::positions, most);
  }

  void piece(const Piece& piece, const qd_context::Thread& mine) const {
    const int n_rows = piece.n * group;
    const float** q = mine.rows.data();
    int32_t* positions = mine.positions.data();
    float* slopes = mine.b.data();
    for (int t = 0; t < piece.n; ++t)
      for (int g = 0; g < group; ++g) {
        const int head = piece.head * group + g, r = t * group + g;
        q[r] = c.qkv.data() + (piece.first + t) * width + int64_t(head) * d;
        positions[r] = b.positions[piece.first + t];
        if (op.alibi_slopes) slopes[r] = op.alibi_slopes[head];
      }
    AttendChunk a{op.kv + piece.head * head_bytes, head_bytes * op.n_kv_heads, table(op, b, piece.sequence), 0,
                  op.kv_format, d, n_rows, q, positions, op.alibi_slopes ? slopes : nullptr,
                  op.score_scale, op.soft_cap, op.window, nullptr, nullptr, nullptr, mine.units.data()};
    const bool whole = piece.partial < 0;
    const Rows kept(whole ? mine.a.data() : partial + piece.partial * (padded + 2), n_rows, padded);
    const Rows fresh(mine.a.data() + int64_t(most) * (padded + 2), n_rows, padded);
    for (int k = piece.chunk; k < piece.end_chunk; ++k) {
      const Rows& to = k == piece.chunk ? kept : fresh;
      a.chunk = k, a.max = to.max, a.sum = to.sum, a.out = to.out;
      c.kernels->attend(a);
      if (k != piece.chunk) kept.merge(*c.kernels, fresh);
    }
    if (whole) write(piece, kept);
  }

  // The chunks of a sequence that was split by keys, in their order.
  void merge(const Piece& m) const {
    const int n_rows = m.n * group;
    float* first = partial + m.partial * (padded + 2);
    const Rows all(first, n_rows, padded);
    for (int k = 1; k < m.end_chunk - m.chunk; ++k) all.merge(*c.kernels, Rows(first + int64_t(k) * n_rows * (padded + 2), n_rows, padded));
    write(m, all);
  }

  void write(const Piece& piece, const Rows& rows) const {
    for (int r = 0; r < rows.n; ++r) {
      float* to = out + (piece.first + r / group) * q_dim + int64_t(piece.head * group + r % group) * d;
      const float factor = share(rows.max[r], rows.sum[r], op.sinks ? op.sinks + piece.head * group + r % group : nullptr);
      const float* from = rows.out + int64_t(r) * padded;
      for (int j = 0; j < d; ++j) to[j] = from[j] * factor;
    }
  }
};

// q and k of every token are normed, rotated and stored; the table of cos and sin is a thread's own.
struct Prepare {
  const Kernels& kernels;
  const qd_attention& op;
  int d = op.head_dim, heads = op.n_heads + op.n_kv_heads;
  int64_t q_dim = int64_t(op.n_heads) * d, kv_dim = int64_t(op.n_kv_heads) * d, width = q_dim + 2 * kv_dim;

  void norm(float* row) const {
    if (!op.q_norm.weight) return;
    const auto normed = [&](const qd_norm& norm, float* x, int64_t dim, int64_t together) {
      for (int64_t j = 0; j < dim; j += together) kernels.norm(norm, x + j, together, x + j);
    };
    normed(op.q_norm, row, q_dim, op.q_norm_width);
    normed(op.k_norm, row + q_dim, kv_dim, op.k_norm_width);
  }

  void rotate(float* row, int position, float* table) const {
    if (!op.inverse_frequencies) return;
    const int half = op.rotary_dim / 2;
    for (int j = 0; j < half; ++j) {
      const float angle = float(position) * op.inverse_frequencies[j];
      table[j] = std::cos(angle) * op.rotary_scale, table[half + j] = std::sin(angle) * op.rotary_scale;
    }
    for (int h = 0; h < heads; ++h) {
      float* x = row + int64_t(h) * d;
      for (int j = 0; j < half; ++j) {
        const float x1 = x[j], x2 = x[half + j];
        x[j] = x1 * table[j] - x2 * table[half + j];
        x[half + j] = x2 * table[j] + x1 * table[half + j];
      }
    }
  }

  void operator()(float* row, int position, float* table) const {
    if (op.qkv_bias)
      for (int64_t j = 0; j < width; ++j) row[j] += op.qkv_bias[j];
    if (!op.norm_after_rotation) norm(row);
    if (op.clip > 0)
      for (int64_t j = 0; j < width; ++j) row[j] = std::min(std::max(row[j], -op.clip), op.clip);
    rotate(row, position, table);
    if (op.norm_after_rotation) norm(row);
  }
};

}  // namespace

void run_qkv(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = op.wqkv[0].cols;
  const int d = op.head_dim, kv_heads = op.n_kv_heads;
  const Prepare prepare{*c.kernels, op};
  const int64_t q_dim = prepare.q_dim, kv_dim = prepare.kv_dim, width = prepare.width;
  const float* normed = normed_or_as_is(c, op.norm, b.hidden, n, dim);
  float* qkv = c.qkv.reserve(n * width);
  int64_t first = 0;
  for (const qd_matrix* part = op.wqkv; part < op.wqkv + op.n_wqkv; first += part++->rows)
    linear(c, *part, normed, dim, n, qkv + first, width, false);

  // Sequence of every token, for its block table.
  const int64_t block_bytes = kv_bytes(op.kv_format, d) * kv_heads;
  c.reserve(&qd_context::Thread::a, d);
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    float* turns = c.of_thread[size_t(thread)].a.data();
    int s = int(std::upper_bound(b.starts, b.starts + b.n_sequences + 1, int32_t(begin)) - b.starts) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= b.starts[s + 1]) ++s;
      float* row = qkv + i * width;
      const int position = b.positions[i];
      prepare(row, position, turns);
      const int32_t block = table(op, b, s)[position / QD_BLOCK_TOKENS];
      for (int h = 0; h < kv_heads; ++h)
        c.kernels->write_kv(op.kv_format, d, row + q_dim + int64_t(h) * d, row + q_dim + kv_dim + int64_t(h) * d,
                            position % QD_BLOCK_TOKENS, op.kv + block * block_bytes + h * kv_bytes(op.kv_format, d));
    }
  };
  c.pool.run(n, std::max<int64_t>(1, (1 << 13) / width), body);
}

void run_attend(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const Division division = divide(op, b);
  Attend layer{c, op, b};
  layer.reserve(division.rows);
  c.pool.run(int64_t(division.pieces.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) layer.piece(division.pieces[size_t(i)], c.of_thread[size_t(thread)]);
  });
  c.pool.run(int64_t(division.merges.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) layer.merge(division.merges[size_t(i)]);
  });
}

void run_attention_out(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, dim = op.wo.rows, q_dim = op.wo.cols;
  const float* mixed = c.mixed.data();
  if (!op.post_norm.weight && !op.out_bias && op.residual_scale == 1)
    return linear(c, op.wo, mixed, q_dim, n, b.hidden, dim, true);
  float* projected = c.projected.reserve(n * dim);
  linear(c, op.wo, mixed, q_dim, n, projected, dim, false);
  if (op.out_bias)
    for (int64_t i = 0; i < n * dim; ++i) projected[i] += op.out_bias[i % dim];
  if (op.post_norm.weight) norm_rows(c, op.post_norm, projected, n, dim, projected);
  for (int64_t i = 0; i < n * dim; ++i) b.hidden[i] += op.residual_scale * projected[i];
}
