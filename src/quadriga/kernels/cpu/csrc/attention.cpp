#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "steps.hpp"

namespace {

constexpr int kFewQueries = 8;    // up to this many new tokens, a sequence is split by keys, beyond it by queries
constexpr int kQueryBlock = 16;
constexpr int kLatentGroup = 32;  // heads that share one reading of a latent, at most

// One piece of attention: queries [first, first + n) of a sequence, one key/value head, chunks [chunk, end_chunk).
struct Piece {
  int32_t sequence, head, first, n, chunk, end_chunk;
  int64_t partial;  // where its (max, sum, out) rows begin, in rows; -1: it covers all chunks and writes the result
};

struct Division {
  std::vector<Piece> pieces, merges;
  int64_t rows = 0;  // of partial results
};

// Query heads share keys in groups: those of a key/value head, or, where all heads have one latent, as many as divide the
// work among threads without reading and transposing the latents too often.
struct Groups {
  explicit Groups(const qd_attention& op)
      : n(op.kv_rank ? (op.n_heads + kLatentGroup - 1) / kLatentGroup : op.n_kv_heads), heads(op.n_heads), size((heads + n - 1) / n),
        queries(op.kv_rank ? std::max(1, kQueryBlock * 16 / size) : kQueryBlock) {}
  int of(int group) const { return std::min(size, heads - group * size); }  // heads of it

  int n, heads, size, queries;  // queries: of a piece of many
};

// The chunk of the first key that a query at `position` sees.
int first_chunk(const qd_attention& op, int position) {
  return op.window && position >= op.window ? (position - op.window + 1) / QD_KV_CHUNK : 0;
}

Division divide(const qd_attention& op, const qd_batch& b, const Groups& groups) {
  Division all;
  for (int s = 0; s < b.n_sequences; ++s) {
    const int first = b.starts[s], n = b.starts[s + 1] - first;
    if (!n) continue;
    const int begin = first_chunk(op, b.positions[first]), chunks = b.positions[first + n - 1] / QD_KV_CHUNK + 1;
    for (int h = 0; h < groups.n; ++h) {
      if (n > kFewQueries) {
        for (int q = 0; q < n; q += groups.queries) {
          const int count = std::min(groups.queries, n - q);
          all.pieces.push_back({s, h, first + q, count, first_chunk(op, b.positions[first + q]),
                                b.positions[first + q + count - 1] / QD_KV_CHUNK + 1, -1});
        }
      } else if (chunks == begin + 1) {
        all.pieces.push_back({s, h, first, n, begin, chunks, -1});
      } else {
        all.merges.push_back({s, h, first, n, begin, chunks, all.rows});
        for (int k = begin; k < chunks; ++k, all.rows += int64_t(n) * groups.of(h)) all.pieces.push_back({s, h, first, n, k, k + 1, all.rows});
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

// One layer's attention in one pass.
struct Attend {
  qd_context& c;
  const qd_attention& op;
  const qd_batch& b;
  const Groups& groups;
  int d = op.head_dim, v_dim = op.kv_rank ? op.kv_rank : d, padded = round_up_16(v_dim);
  int most = std::max(kFewQueries, groups.queries) * groups.size;
  int64_t out_dim = int64_t(op.n_heads) * v_dim;
  int64_t gate = int64_t(op.n_heads) * d + (op.kv_rank ? 0 : 2 * int64_t(op.n_kv_heads) * d);  // where gates begin
  int64_t width = gate + (op.output_gate ? out_dim : 0);
  int64_t head_bytes = op.kv_rank ? 0 : kv_bytes(op.kv_format, d);  // of what a group of heads has for itself
  float *out = nullptr, *partial = nullptr;  // (N, H v_dim); rows of (max, sum, out)

  void reserve(int64_t partial_rows) {
    out = c.mixed.reserve(int64_t(b.n_tokens) * out_dim);
    partial = c.partial.reserve(partial_rows * (padded + 2));
    c.reserve(&qd_context::Thread::a, int64_t(most) * 2 * (padded + 2));
    c.reserve(&qd_context::Thread::b, most);
    c.reserve(&qd_context::Thread::units, attend_scratch(most, d));
    c.reserve(&qd_context::Thread::rows, most);
    c.reserve(&qd_context::Thread::positions, most);
  }

  void piece(const Piece& piece, const qd_context::Thread& mine) const {
    const int group = groups.of(piece.head), n_rows = piece.n * group;
    const float** q = mine.rows.data();
    int32_t* positions = mine.positions.data();
    float* slopes = mine.b.data();
    for (int t = 0; t < piece.n; ++t)
      for (int g = 0; g < group; ++g) {
        const int head = piece.head * groups.size + g, r = t * group + g;
        q[r] = c.qkv.data() + (piece.first + t) * width + int64_t(head) * d;
        positions[r] = b.positions[piece.first + t];
        if (op.alibi_slopes) slopes[r] = op.alibi_slopes[head];
      }
    AttendChunk a{op.kv + piece.head * head_bytes, op.kv_stride, block_table(op, b, piece.sequence), 0,
                  op.kv_format, d, n_rows, q, positions, op.alibi_slopes ? slopes : nullptr,
                  op.score_scale, op.soft_cap, op.window, op.kv_rank, nullptr, nullptr, nullptr, mine.units.data()};
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
    const int n_rows = m.n * groups.of(m.head);
    float* first = partial + m.partial * (padded + 2);
    const Rows all(first, n_rows, padded);
    for (int k = 1; k < m.end_chunk - m.chunk; ++k) all.merge(*c.kernels, Rows(first + int64_t(k) * n_rows * (padded + 2), n_rows, padded));
    write(m, all);
  }

  void write(const Piece& piece, const Rows& rows) const {
    const int group = groups.of(piece.head);
    for (int r = 0; r < rows.n; ++r) {
      const int head = piece.head * groups.size + r % group;
      float* to = out + (piece.first + r / group) * out_dim + int64_t(head) * v_dim;
      const float factor = share(rows.max[r], rows.sum[r], op.sinks ? op.sinks + head : nullptr);
      const float* from = rows.out + int64_t(r) * padded;
      // Of latents of bf16 the even dimensions of every 32 come first: see latents_as_values.
      if (op.kv_rank && op.kv_format != QD_KV_FORMAT_FLOAT32)
        for (int j = 0; j < v_dim; ++j) to[j] = from[j / 32 * 32 + j % 2 * 16 + j % 32 / 2] * factor;
      else
        for (int j = 0; j < v_dim; ++j) to[j] = from[j] * factor;
      if (op.output_gate)
        c.kernels->times_sigmoid(to, c.qkv.data() + (piece.first + r / group) * width + gate + (to - out) % out_dim, d);
    }
  }
};

// q and k of every token are normed, rotated and stored; the table of cos and sin is a thread's own.
struct Prepare {
  const Kernels& kernels;
  const qd_attention& op;
  int d = op.head_dim, heads = op.n_heads + op.n_kv_heads;
  int64_t q_dim = int64_t(op.n_heads) * d, kv_dim = int64_t(op.n_kv_heads) * d;
  int64_t width = q_dim + 2 * kv_dim + (op.output_gate ? q_dim : 0);

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

  // Each head's v; behind all that k still needs of its projection, before k's own norm.
  void values(float* row) const {
    float* v = row + q_dim + kv_dim;
    if (op.keys_as_values) std::memcpy(v, row + q_dim, size_t(kv_dim) * 4);
    for (int64_t j = 0; op.v_norm.weight && j < kv_dim; j += d) kernels.norm(op.v_norm, v + j, d, v + j);
  }

  void operator()(float* row, int position, float* table) const {
    if (op.qkv_bias)
      for (int64_t j = 0; j < width; ++j) row[j] += op.qkv_bias[j];
    values(row);
    if (!op.norm_after_rotation) norm(row);
    if (op.clip > 0)
      for (int64_t j = 0; j < q_dim + 2 * kv_dim; ++j) row[j] = std::min(std::max(row[j], -op.clip), op.clip);
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
  c.reserve(&qd_context::Thread::a, d);
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    float* turns = c.of_thread[size_t(thread)].a.data();
    int s = int(std::upper_bound(b.starts, b.starts + b.n_sequences + 1, int32_t(begin)) - b.starts) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= b.starts[s + 1]) ++s;
      float* row = qkv + i * width;
      const int position = b.positions[i];
      prepare(row, position, turns);
      const int32_t block = block_table(op, b, s)[position / QD_BLOCK_TOKENS];
      for (int h = 0; h < kv_heads; ++h)
        c.kernels->write_kv(op.kv_format, d, row + q_dim + int64_t(h) * d, row + q_dim + kv_dim + int64_t(h) * d,
                            position % QD_BLOCK_TOKENS, op.kv + block * op.kv_stride + h * kv_bytes(op.kv_format, d));
    }
  };
  c.pool.run(n, std::max<int64_t>(1, (1 << 13) / width), body);
}

void run_attend(qd_context& c, const qd_attention& op, const qd_batch& b) {
  const Groups groups(op);
  const Division division = divide(op, b, groups);
  Attend layer{c, op, b, groups};
  layer.reserve(division.rows);
  c.pool.run(int64_t(division.pieces.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) layer.piece(division.pieces[size_t(i)], c.of_thread[size_t(thread)]);
  });
  c.pool.run(int64_t(division.merges.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) layer.merge(division.merges[size_t(i)]);
  });
}

void run_attention_out(qd_context& c, const qd_attention& op, const qd_batch& b) { add_projected(c, op, b, c.mixed.data()); }

void add_projected(qd_context& c, const qd_attention& op, const qd_batch& b, const float* mixed) {
  add_branch(c, op.wo, op.out_bias, op.post_norm, op.residual_scale, mixed, b);
}
