// Recurrent layers: their states lie in numbered slots, read before a sequence's tokens of the pass and written after them.
#include <algorithm>

#include "steps.hpp"

namespace {

constexpr int64_t kChannels = 64;          // that a thread takes at once
constexpr int64_t kSerialNumbers = 1 << 14;  // below this, waking threads costs more than they save

// The slot's state, or NULL for a sequence that begins here.
float* slot(float* state, int64_t numbers, int32_t number) { return number < 0 ? nullptr : state + number * numbers; }

}  // namespace

void run_short_conv(qd_context& c, const qd_short_conv& op, const qd_batch& b) {
  if (!b.before || !b.after || op.n_taps < 2 || op.n_taps > kMostTaps)
    throw Failure(QD_STATUS_BAD_ARGUMENT, "a recurrent layer needs slots and 2 to 16 taps, got %d", op.n_taps);
  const int64_t n = b.n_tokens, dim = op.w_in.cols, width = op.w_out.cols, numbers = (op.n_taps - 1) * width;
  float* normed = c.normed.reserve(n * dim);
  norm_rows(c, op.norm, b.hidden, n, dim, normed);
  float* rows = c.qkv.reserve(n * 3 * width);
  linear(c, op.w_in, normed, dim, n, rows, 3 * width, false);
  float* mixed = c.mixed.reserve(n * width);
  const int64_t parts = (width + kChannels - 1) / kChannels, items = parts * b.n_sequences;
  c.pool.run(items, std::max<int64_t>(1, kSerialNumbers * items / (n * width)), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / parts, first = i % parts * kChannels, start = b.starts[s];
      c.kernels->short_conv({rows + start * 3 * width, b.starts[s + 1] - start, width, first,
                             std::min(first + kChannels, width), op.taps, op.n_taps, slot(op.state, numbers, b.before[s]),
                             slot(op.state, numbers, b.after[s]), mixed + start * width});
    }
  });
  add_branch(c, op.w_out, nullptr, op.post_norm, op.residual_scale, mixed, b);
}
