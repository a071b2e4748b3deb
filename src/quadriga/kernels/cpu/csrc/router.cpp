// From a token to its experts: a float32 product, scores, the best of them, their weights.
#include "router.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t kDealtRouter = 1 << 18;  // bytes of a router that are worth a hand-off

// Of every group of neighbours the two best scores are added up, or the best one counts; outside the best groups nothing
// can be chosen.
void limit_to_groups(const qd_ffn& op, const Kernels& kernels, float* choice) {
  const int size = op.n_experts / op.n_groups;
  alignas(64) float worth[QD_MOST_EXPERTS];
  int32_t best[QD_MOST_EXPERTS];
  bool open[QD_MOST_EXPERTS] = {};
  for (int g = 0; g < op.n_groups; ++g) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      second = std::max(second, std::min(first, choice[e]));
      first = std::max(first, choice[e]);
    }
    worth[g] = op.group_by_best ? first : first + second;
  }
  kernels.top_k(worth, op.n_groups, op.top_k_groups, best);
  for (int j = 0; j < op.top_k_groups; ++j) open[best[j]] = true;
  for (int e = 0; e < op.n_experts; ++e)
    if (!open[e / size]) choice[e] = -INFINITY;
}

// SparseMixer (Liu et al. 2023, as Phi-3.5-MoE runs it): the two best logits, each weighed by a softmax over itself and
// those near it, the second without the first.
void mix_sparsely(const qd_ffn& op, const Kernels& kernels, const float* logits, float* scratch, int32_t* ids, float* weights) {
  std::memcpy(scratch, logits, size_t(op.n_experts) * 4);
  kernels.top_k(scratch, op.n_experts, op.top_k, ids);
  for (int j = 0; j < op.top_k; ++j) {
    const float best = logits[ids[j]];
    float total = 0.0f;
    for (int e = 0; e < op.n_experts; ++e) {
      const bool before = std::find(ids, ids + j, e) != ids + j;
      if (!before && !(best - logits[e] > op.near * std::max(std::fabs(logits[e]), best))) total += std::exp(logits[e] - best);
    }
    weights[j] = 1.0f / total;
  }
}

// Scores of all experts, the k to be visited (equal ones: the lower id first), their weights under norm and aggregate.
// `kept` gets the logits; `choice` is scratch.
void choose(const qd_ffn& op, const Kernels& kernels, float* logits, float* choice, int32_t* ids, float* weights, float* kept) {
  const int n_experts = op.n_experts, k = op.top_k;
  for (int e = 0; op.router_bias && e < n_experts; ++e) logits[e] += op.router_bias[e];
  if (kept) std::memcpy(kept, logits, size_t(n_experts) * 4);
  if (op.score == QD_SCORE_SPARSE_MIXER) return mix_sparsely(op, kernels, logits, choice, ids, weights);
  kernels.scores(op.score, logits, n_experts);
  for (int e = 0; e < n_experts; ++e) choice[e] = op.correction ? logits[e] + op.correction[e] : logits[e];
  if (op.n_groups > 1) limit_to_groups(op, kernels, choice);
  kernels.top_k(choice, n_experts, k, ids);
  for (int j = 0; j < k; ++j) weights[j] = logits[ids[j]];
  float total = 0.0f;
  if (op.normalize_p > 0) {
    for (int j = 0; j < k; ++j) total += op.normalize_p == 1.0f ? weights[j] : std::pow(weights[j], op.normalize_p);
    const float norm = op.normalize_p == 1.0f ? total : std::pow(total, 1.0f / op.normalize_p);
    const float factor = 1.0f / std::max(norm + op.normalize_eps, op.normalize_min);
    for (int j = 0; j < k; ++j) weights[j] *= factor;
  }
  if (op.routed_scale != 1)
    for (int j = 0; j < k; ++j) weights[j] *= op.routed_scale;
  for (int j = 0; op.expert_scale && j < k; ++j) weights[j] *= op.expert_scale[ids[j]];
  if (op.aggregate == QD_AGGREGATE_VOTE) {
    for (int j = 0; j < k; ++j) weights[j] = 1.0f / float(k);
  } else if (op.aggregate == QD_AGGREGATE_FUSE) {
    float before = 0.0f, after = 0.0f;
    for (int j = 0; j < k; ++j) before += weights[j], weights[j] *= std::exp(op.fuse[ids[j]]), after += weights[j];
    for (int j = 0; j < k; ++j) weights[j] *= before / after;
  }
}

// The router's tiles, and last the row that weighs the shared network, if there is one.
struct Router {
  const qd_context& c;
  const qd_ffn& op;
  int64_t d, experts = tiles_of(op.n_experts), tiles = experts + (op.shared_weight.data ? 1 : 0), stride = tiles * kTile;
  int64_t bytes = tile_bytes(QD_FORMAT_FLOAT32, d);

  // logits (count, stride) of some tiles
  void multiply(const uint32_t* panel, int count, int64_t begin, int64_t end, float* logits) const {
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* tile = t < experts ? op.router.data + t * bytes : op.shared_weight.data;
      c.kernels->tile(QD_FORMAT_FLOAT32, false, tile, d, panel, count, logits + t * kTile, stride);
    }
  }

  // for tokens first to first + count - 1
  void decide(int64_t first, int count, float* logits, float* scratch, const Routing& to) const {
    for (int64_t i = first; i < first + count; ++i, logits += stride) {
      choose(op, *c.kernels, logits, scratch, to.ids + i * op.top_k, to.weights + i * op.top_k, to.logits ? to.logits + i * op.n_experts : nullptr);
      if (!to.shared) continue;
      to.shared[i] = op.shared_weight.data ? logits[experts * kTile] : 1.0f;
      if (op.shared_weight.data) c.kernels->scores(QD_SCORE_SIGMOID, to.shared + i, 1);
    }
  }
};

}  // namespace

void route(qd_context& c, const qd_ffn& op, const float* x, int64_t n, int64_t d, const Routing& to) {
  const Router router{c, op, d};
  const int64_t width = c.kernels->max_width;
  c.reserve(&qd_context::Thread::units, width * d);
  c.reserve(&qd_context::Thread::a, (width + 1) * router.stride);
  const auto panel_of = [&](int64_t first, int count, uint32_t* panel) {
    const float* rows[kMaxWidth];
    for (int i = 0; i < count; ++i) rows[i] = x + (first + i) * d;
    c.kernels->make_panel(kPanelF32, rows, count, d, panel);
  };
  if (n <= width && router.tiles * router.bytes >= kDealtRouter) {  // few tokens: the reading of the router is shared out
    const auto& mine = c.of_thread[0];
    float* logits = mine.a.data();
    panel_of(0, int(n), mine.units.data());
    c.pool.run(router.tiles, 1, [&](int64_t begin, int64_t end, int) { router.multiply(mine.units.data(), int(n), begin, end, logits); });
    return router.decide(0, int(n), logits, logits + width * router.stride, to);
  }
  c.pool.run((n + width - 1) / width, n > width ? 1 : 2, [&](int64_t begin, int64_t end, int thread) {
    const auto& mine = c.of_thread[size_t(thread)];
    float* logits = mine.a.data();
    for (int64_t t = begin; t < end; ++t) {
      const int count = int(std::min(width, n - t * width));
      panel_of(t * width, count, mine.units.data());
      router.multiply(mine.units.data(), count, 0, router.tiles, logits);
      router.decide(t * width, count, logits, logits + width * router.stride, to);
    }
  });
}
