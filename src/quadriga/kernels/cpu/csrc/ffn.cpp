// The whole feed-forward half of a layer: norm, router (router.cpp), grouping by expert, gate and up, activation, down, weighted sum.
// A dense network is one expert that every token visits with weight 1, and so is what a mixture shares: it comes last.
//
//   tokens sorted by expert -> panels of at most max_width tokens -> gate/up tiles -> hidden panels -> down tiles
//
// The hidden activations never exist as a matrix: the 32 rows of a task are exactly one quantisation group of the panel
// that the down projection reads. A token's experts are added in the order of their ids, whatever else is in the batch.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "router.hpp"
#include "steps.hpp"
#include "store.hpp"

namespace {

struct Panel {
  int64_t first;  // index of its first token in the sorted list
  int width;
};

struct Active {
  int expert;
  int64_t first, n;          // its tokens in the sorted list
  int64_t panel, n_panels;   // its panels
  int64_t in_offset, gate_offset, hidden_offset;  // units at its first token; gate and up of one kind share a panel
  PanelKind in_kind, gate_kind, hidden_kind;
  qd_matrix gate, up, down;
  int activation;
  bool gated;
  const float *gate_bias, *up_bias, *down_bias;  // NULL: none
};

struct Plan {
  std::vector<int32_t> token;   // (slots,) sorted by expert
  std::vector<float> weight;    // (slots,)
  std::vector<Panel> panels;
  std::vector<Active> active;
  int64_t in_units = 0, hidden_units = 0;
};

constexpr int kDownTiles = 8;     // output tiles a task sums up at once: a run of as many tiles of each expert
constexpr int kStreamBlocks = 8;  // blocks of 32 rows of up, then of gate, read in one run

// Another expert at work: its panels, and where its activations will lie.
void add(const qd_context& c, Plan& plan, Active a) {
  const int64_t width = c.kernels->max_width;
  a.panel = int64_t(plan.panels.size());
  a.in_offset = a.gate_offset = plan.in_units, a.hidden_offset = plan.hidden_units;
  a.in_kind = a.gate_kind = panel_kind(a.up.format, c.int16), a.hidden_kind = panel_kind(a.down.format, c.int16);
  if (a.gated) a.gate_kind = panel_kind(a.gate.format, c.int16);
  for (int64_t t = 0; t < a.n; t += width) plan.panels.push_back({a.first + t, int(std::min(width, a.n - t))});
  a.n_panels = int64_t(plan.panels.size()) - a.panel;
  plan.in_units += a.n * panel_units(a.in_kind, a.up.cols);
  if (a.gate_kind != a.in_kind) a.gate_offset = plan.in_units, plan.in_units += a.n * panel_units(a.gate_kind, a.up.cols);
  plan.hidden_units += a.n * panel_units(a.hidden_kind, a.down.cols);
  plan.active.push_back(a);
}

int64_t padded(int64_t rows) { return tiles_of(rows) * kTile; }

// shared: (n,) what the shared network's output weighs for each token, or NULL where there is none.
Plan make_plan(qd_context& c, const qd_ffn& op, int64_t n, const int32_t* ids, const float* weights, const float* shared) {
  Plan plan;
  const int k = op.router.data ? op.top_k : 1, n_experts = op.router.data ? op.n_experts : 1;
  plan.token.resize(size_t(n * (k + (shared ? 1 : 0))));
  plan.weight.resize(plan.token.size());
  std::vector<int64_t> begin(size_t(n_experts) + 1, 0);
  if (op.router.data) {
    for (int64_t i = 0; i < n * k; ++i) ++begin[size_t(ids[i]) + 1];
  } else {
    begin[1] = n;
  }
  for (int e = 0; e < n_experts; ++e) {
    if (op.load) op.load[e] += begin[size_t(e) + 1];
    begin[size_t(e) + 1] += begin[size_t(e)];
  }
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t at = next[op.router.data ? size_t(ids[i]) : 0]++;
    plan.token[size_t(at)] = int32_t(i / k);
    plan.weight[size_t(at)] = op.router.data ? weights[i] : 1.0f;
  }
  const int64_t f = padded(op.up[0].rows), d = padded(op.down[0].rows);
  for (int e = 0; e < n_experts; ++e) {
    const int64_t first = begin[size_t(e)], count = begin[size_t(e) + 1] - first;
    if (!count || !op.up[e].data) continue;
    Active a{};
    a.expert = e, a.first = first, a.n = count, a.activation = op.activation;
    a.up = op.up[e], a.down = op.down[e];
    a.gated = op.gate != nullptr;
    if (a.gated) a.gate = op.gate[e];
    if (op.up_bias) a.gate_bias = op.gate_bias + e * f, a.up_bias = op.up_bias + e * f, a.down_bias = op.down_bias + e * d;
    add(c, plan, a);
  }
  if (shared) {
    for (int64_t i = 0; i < n; ++i) plan.token[size_t(n * k + i)] = int32_t(i), plan.weight[size_t(n * k + i)] = shared[i];
    Active a{};
    a.expert = n_experts, a.first = n * k, a.n = n, a.activation = op.shared_activation, a.gated = op.shared_gate.data != nullptr;
    a.gate = op.shared_gate, a.up = op.shared_up, a.down = op.shared_down;
    add(c, plan, a);
  }
  return plan;
}

// Tokens that are worth unpacking nibbles for, once instead of for each panel.
bool many(const qd_context& c, int64_t n) { return n > 2 * c.kernels->max_width; }

// Tiles of one matrix, times all panels of one expert: packed for few tokens, widened once for all full panels of many.
struct Tiles {
  const Kernels& kernels;
  const qd_matrix& m;
  bool int16;
  int64_t bytes;
  const uint8_t* wide = nullptr;
  int64_t first_wide = 0, wide_bytes = 0;

  Tiles(const qd_context& c, const qd_matrix& matrix) : kernels(*c.kernels), m(matrix), int16(c.int16), bytes(tile_bytes(matrix.format, matrix.cols)) {}
  void widen(uint8_t* memory, int64_t first, int64_t n) {
    if (!wide_group_bytes(m.format)) return;
    wide = memory, first_wide = first, wide_bytes = groups_of(m.cols) * wide_group_bytes(m.format);
    for (int64_t t = 0; t < n; ++t) kernels.widen(m.format, m.data + (first + t) * bytes, m.cols, memory + t * wide_bytes);
  }
  void times(int64_t tile, const uint32_t* panel, int width, float* out) const {
    if (wide && width == kernels.max_width) kernels.tile_wide(m.format, int16, wide + (tile - first_wide) * wide_bytes, m.cols, panel, out, kTile);
    else kernels.tile(m.format, int16, m.data + tile * bytes, m.cols, panel, width, out, kTile);
  }
};

// x (width, 16) += the bias of its 16 rows.
void add_bias(const Kernels& kernels, float* x, int width, const float* bias) {
  for (int m = 0; m < width; ++m) kernels.add_scaled(x + m * kTile, bias, 1.0f, kTile);
}

// Rows [32 block, 32 (block + count)) of gate and up for every token of an expert, into its hidden panels. Few tokens:
// memory is the limit, and it is fastest in long runs, so all tiles of up are read before those of gate.
void hidden_blocks(const qd_context& c, const Plan& plan, const Active& a, int64_t block, int64_t count,
                   const uint32_t* in, uint32_t* hidden, const qd_context::Thread& mine) {
  const Kernels& kernels = *c.kernels;
  const int64_t in_units = panel_units(a.in_kind, a.up.cols), gate_units = panel_units(a.gate_kind, a.up.cols);
  const int64_t out_units = panel_units(a.hidden_kind, a.down.cols);
  const int64_t first = 2 * block, n_tiles = std::min<int64_t>(2 * count, tiles_of(a.up.rows) - first);
  Tiles up(c, a.up), gate(c, a.gated ? a.gate : a.up);
  if (many(c, a.n)) {
    const int64_t bytes = n_tiles * groups_of(a.up.cols) * wide_group_bytes(a.up.format);
    uint8_t* wide = mine.wide.data();
    up.widen(wide, first, n_tiles);
    if (a.gated) gate.widen(wide + bytes, first, n_tiles);
  }
  alignas(64) float g[2 * kStreamBlocks][kMaxWidth * kTile], u[2 * kStreamBlocks][kMaxWidth * kTile], row[kMaxWidth * 32];
  for (int64_t p = a.panel; p < a.panel + a.n_panels; ++p) {
    const Panel& panel = plan.panels[size_t(p)];
    const uint32_t* x = in + a.in_offset + (panel.first - a.first) * in_units;
    const uint32_t* gate_x = in + a.gate_offset + (panel.first - a.first) * gate_units;
    uint32_t* to = hidden + a.hidden_offset + (panel.first - a.first) * out_units;
    for (int64_t t = 0; t < n_tiles; ++t) up.times(first + t, x, panel.width, u[t]);
    for (int64_t t = 0; a.gated && t < n_tiles; ++t) gate.times(first + t, gate_x, panel.width, g[t]);
    for (int64_t t = 0; t < n_tiles; ++t) {
      if (a.up_bias) {
        add_bias(kernels, u[t], panel.width, a.up_bias + (first + t) * kTile);
        add_bias(kernels, g[t], panel.width, a.gate_bias + (first + t) * kTile);
      }
      kernels.activate(a.activation, a.gated ? g[t] : nullptr, u[t], int64_t(panel.width) * kTile, u[t]);
      for (int m = 0; m < panel.width; ++m) std::memcpy(row + 32 * m + kTile * (t % 2), u[t] + kTile * m, kTile * 4);
      if (t % 2 == 0 && t + 1 < n_tiles) continue;
      if (t % 2 == 0)
        for (int m = 0; m < panel.width; ++m) std::memset(row + 32 * m + kTile, 0, kTile * 4);
      kernels.fill_group(a.hidden_kind, row, panel.width, block + t / 2, to, a.down.cols);
    }
    const int64_t last = block + (n_tiles + 1) / 2;  // the second half of a last pair of groups
    if (is_integer(a.hidden_kind) && 32 * last >= a.down.cols && last < groups_of(a.down.cols)) {
      std::memset(row, 0, sizeof row);
      kernels.fill_group(a.hidden_kind, row, panel.width, last, to, a.down.cols);
    }
  }
}

// Room in every thread for what hidden_blocks and down_tiles unpack and sum up.
void reserve_threads(qd_context& c, const Plan& plan, int64_t n) {
  int64_t wide = 0;
  for (const Active& a : plan.active)
    if (many(c, a.n))  // hidden_blocks: two tiles each of up and gate; down_tiles: its tiles of down
      wide = std::max({wide, 4 * groups_of(a.up.cols) * kMostWideGroup, kDownTiles / 2 * groups_of(a.down.cols) * kMostWideGroup});
  c.reserve(&qd_context::Thread::wide, wide);
  c.reserve(&qd_context::Thread::b, n * kTile * kDownTiles);
}

// Every token's panel for each of its experts. One token has the same panel for all of them.
const uint32_t* make_panels(qd_context& c, Plan& plan, const float* x, int64_t n, int64_t d) {
  const Kernels& kernels = *c.kernels;
  uint32_t* in = c.panels.reserve(plan.in_units);
  const bool shared = n == 1;
  if (plan.active.empty()) return in;  // all experts of these tokens are somebody else's
  c.pool.run(shared ? 1 : int64_t(plan.panels.size()), std::max<int64_t>(1, (1 << 15) / (d * kernels.max_width)),
             [&](int64_t begin, int64_t end, int) {
               const float* rows[kMaxWidth];
               size_t e = 0;
               for (int64_t p = begin; p < end; ++p) {
                 while (p >= plan.active[e].panel + plan.active[e].n_panels) ++e;
                 const Active& a = plan.active[e];
                 const Panel& panel = plan.panels[size_t(p)];
                 for (int m = 0; m < panel.width; ++m) rows[m] = x + plan.token[size_t(panel.first + m)] * d;
                 kernels.make_panel(a.in_kind, rows, panel.width, d,
                                    in + a.in_offset + (panel.first - a.first) * panel_units(a.in_kind, d));
                 if (a.gate_kind != a.in_kind)
                   kernels.make_panel(a.gate_kind, rows, panel.width, d,
                                      in + a.gate_offset + (panel.first - a.first) * panel_units(a.gate_kind, d));
               }
             });
  if (shared) {
    const Active& made = plan.active[0];
    const auto share = [&](PanelKind kind, int64_t& offset) {
      if (kind == made.in_kind) offset = made.in_offset;
      else if (kind == made.gate_kind) offset = made.gate_offset;
      else kernels.make_panel(kind, &x, 1, d, in + offset);
    };
    for (size_t e = 1; e < plan.active.size(); ++e) {
      Active& a = plan.active[e];
      share(a.in_kind, a.in_offset);
      if (a.gate_kind == a.in_kind) a.gate_offset = a.in_offset;
      else share(a.gate_kind, a.gate_offset);
    }
  }
  return in;
}

// Gate and up, 32 rows a task. The shared network, of another width, comes after the routed experts.
const uint32_t* gate_and_up(qd_context& c, const qd_ffn& op, const Plan& plan, const uint32_t* in) {
  const int64_t blocks = (op.up[0].rows + 31) / 32, n_active = int64_t(plan.active.size());
  const int64_t routed = n_active - (op.shared_up.data ? 1 : 0), more = op.shared_up.data ? (op.shared_up.rows + 31) / 32 : 0;
  uint32_t* hidden = c.hidden_panels.reserve(plan.hidden_units);
  c.pool.run(routed * blocks + more, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t expert = std::min(i / blocks, routed), block = i - expert * blocks;
      const Active& a = plan.active[size_t(expert)];
      const int64_t run = many(c, a.n) ? 1 : kStreamBlocks;
      count = std::min({run, end - i, (expert < routed ? blocks : more) - block});
      hidden_blocks(c, plan, a, block, count, in, hidden, c.of_thread[size_t(thread)]);
    }
  });
  return hidden;
}

// sum (count, n, 16) = output rows [16 from, 16 (from + count)) of all tokens, the experts added in the order of their ids.
void down_tiles(const qd_context& c, const Plan& plan, int64_t from, int64_t count, int64_t n, const uint32_t* hidden,
                float* sum, uint8_t* wide) {
  alignas(64) float y[kMaxWidth * kTile];
  std::memset(sum, 0, size_t(n * kTile * count) * 4);
  for (const Active& a : plan.active) {
    Tiles down(c, a.down);
    const int64_t units = panel_units(a.hidden_kind, a.down.cols);
    if (many(c, a.n)) down.widen(wide, from, count);
    for (int64_t p = a.panel; p < a.panel + a.n_panels; ++p) {
      const Panel& panel = plan.panels[size_t(p)];
      const uint32_t* units_of = hidden + a.hidden_offset + (panel.first - a.first) * units;
      for (int64_t t = 0; t < count; ++t) {
        down.times(from + t, units_of, panel.width, y);
        if (a.down_bias) add_bias(*c.kernels, y, panel.width, a.down_bias + (from + t) * kTile);
        for (int m = 0; m < panel.width; ++m) {
          const size_t slot = size_t(panel.first + m);
          c.kernels->add_scaled(sum + (t * n + plan.token[slot]) * kTile, y + m * kTile, plan.weight[slot], kTile);
        }
      }
    }
  }
}

// Down: every task owns some output rows of all tokens. With `add`, out += instead.
void down(qd_context& c, const Plan& plan, const uint32_t* hidden, int64_t n, int64_t out_rows, float* out, bool add) {
  c.pool.run(tiles_of(out_rows), 1, [&](int64_t begin, int64_t end, int thread) {
    const auto& mine = c.of_thread[size_t(thread)];
    const int64_t run = many(c, n) ? kDownTiles / 2 : kDownTiles;
    float* sum = mine.b.data();
    for (int64_t from = begin; from < end; from += run) {
      const int64_t count = std::min<int64_t>(run, end - from);
      down_tiles(c, plan, from, count, n, hidden, sum, mine.wide.data());
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = (from + t) * kTile, rows = std::min<int64_t>(kTile, out_rows - row);
        for (int64_t i = 0; i < n; ++i) {
          float* to = out + i * out_rows + row;
          const float* total = sum + (t * n + i) * kTile;
          if (!add) std::memcpy(to, total, size_t(rows) * 4);
          else
            for (int64_t r = 0; r < rows; ++r) to[r] += total[r];
        }
      }
    }
  });
}

// Where the chosen experts lie that are on disk; they stay in memory as long as what is returned.
qd_store::Pinned bring(const qd_ffn& op, Plan& plan) {
  std::vector<int32_t> wanted;
  for (const Active& a : plan.active)
    if (a.expert < op.n_experts) wanted.push_back(a.expert);  // the shared network is in memory
  qd_store::Pinned pinned = op.store->acquire(op.layer, wanted);
  for (size_t i = 0; i < wanted.size(); ++i) {
    Active& a = plan.active[i];
    const uint8_t* const* part = pinned.parts(i);
    a.gate.data = op.gate ? *part++ : nullptr;
    a.up.data = part[0], a.down.data = part[1];
  }
  return pinned;
}

// What the tokens' experts make of x, into out (n, D), or added to it. `shared` as in make_plan.
void visit(qd_context& c, const qd_ffn& op, const float* x, int64_t n, const int32_t* ids, const float* weights,
           const float* shared, float* out, bool add) {
  Plan plan = make_plan(c, op, n, ids, weights, shared);
  qd_store::Pinned pinned;
  if (op.store) pinned = bring(op, plan);
  reserve_threads(c, plan, n);
  const uint32_t* hidden = gate_and_up(c, op, plan, make_panels(c, plan, x, n, op.up[0].cols));
  down(c, plan, hidden, n, op.down[0].rows, out, add);
}

// Where the router's decisions lie: with the layer's statistics, or here.
struct Decisions {
  Decisions(const qd_ffn& op, int64_t n) : ids(op.ids), weights(op.weights) {
    if (!op.router.data) return;
    if (!ids) own_ids.resize(size_t(n * op.top_k)), ids = own_ids.data();
    if (!weights) own_weights.resize(size_t(n * op.top_k)), weights = own_weights.data();
  }

  std::vector<int32_t> own_ids;
  std::vector<float> own_weights;
  int32_t* ids;
  float* weights;
};

// The shared network of a mixture as a dense network of its own.
qd_ffn alone(const qd_ffn& op) {
  qd_ffn dense{};
  dense.gate = op.shared_gate.data ? &op.shared_gate : nullptr, dense.up = &op.shared_up, dense.down = &op.shared_down;
  dense.n_experts = dense.top_k = 1, dense.activation = op.shared_activation;
  return dense;
}

// out (n, D) = norm(experts) + norm(shared), of experts that read the residual stream itself.
void run_apart(qd_context& c, const qd_ffn& op, const qd_batch& b, float* out) {
  const int64_t n = b.n_tokens, d = op.up[0].cols;
  const Decisions to(op, n);
  float* x = c.normed.reserve(n * d);
  norm_rows(c, op.router_norm, b.hidden, n, d, x);
  route(c, op, x, n, d, {to.ids, to.weights, op.logits, nullptr});
  qd_ffn experts = op;
  experts.shared_up.data = nullptr;
  norm_rows(c, op.expert_norm, b.hidden, n, d, x);
  visit(c, experts, x, n, to.ids, to.weights, nullptr, out, false);
  norm_rows(c, op.expert_post_norm, out, n, d, out);
  float* shared = c.mixed.reserve(n * d);
  norm_rows(c, op.norm, b.hidden, n, d, x);
  visit(c, alone(op), x, n, nullptr, nullptr, nullptr, shared, false);
  norm_rows(c, op.shared_post_norm, shared, n, d, shared);
  for (int64_t i = 0; i < n * d; ++i) out[i] += shared[i];
}

void scale_stream(const qd_ffn& op, const qd_batch& b, int64_t numbers) {
  if (op.stream_scale == 1.0f) return;
  for (int64_t i = 0; i < numbers; ++i) b.hidden[i] *= op.stream_scale;
}

}  // namespace

void run_ffn(qd_context& c, const qd_ffn& op, const qd_batch& b) {
  const int64_t n = b.n_tokens, d = op.up[0].cols, out_rows = op.down[0].rows;
  float* out = nullptr;
  if (op.expert_norm.weight) {
    if (b.branches) throw Failure(QD_STATUS_BAD_ARGUMENT, "experts apart have norms before their sum, and %d ranks parts of it", b.n_branches);
    run_apart(c, op, b, out = c.projected.reserve(n * out_rows));
  } else {
    const float* x = normed_or_as_is(c, op.norm, b.hidden, n, d);
    const Decisions to(op, n);
    std::vector<float> shared;
    if (op.router.data && op.shared_up.data) shared.resize(size_t(n));
    float* weighs = shared.empty() ? nullptr : shared.data();
    if (op.router.data) route(c, op, x, n, d, {to.ids, to.weights, op.logits, weighs});
    if (float* own = own_branch(b, out_rows)) return visit(c, op, x, n, to.ids, to.weights, weighs, own, false);
    const bool direct = !op.post_norm.weight && op.residual_scale == 1;
    out = direct ? b.hidden : c.projected.reserve(n * out_rows);
    visit(c, op, x, n, to.ids, to.weights, weighs, out, direct);
    if (direct) return scale_stream(op, b, n * out_rows);
  }
  if (op.post_norm.weight) norm_rows(c, op.post_norm, out, n, out_rows, out);
  for (int64_t i = 0; i < n * out_rows; ++i) b.hidden[i] += op.residual_scale * out[i];
  scale_stream(op, b, n * out_rows);
}
