// A training step's work between its matrix products, shared out to threads by rows; see training.inl.
#include <algorithm>
#include <cstring>

#include "context.hpp"

namespace {

constexpr int64_t kSerialNumbers = 1 << 15;  // below this, waking threads costs more than they save

int64_t grain(int64_t numbers_of_row) { return std::max<int64_t>(1, kSerialNumbers / std::max<int64_t>(1, numbers_of_row)); }

int64_t bytes_of(int32_t dtype) { return dtype == QD_FORMAT_BFLOAT16 ? 2 : 4; }

}  // namespace

extern "C" {

QD_EXPORT int32_t qd_gather_rows(qd_context* context, const uint8_t* x, int64_t row_bytes, const int64_t* index, int64_t n,
                                 uint8_t* out, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(n, grain(row_bytes / 4), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(out + i * row_bytes, x + index[i] * row_bytes, size_t(row_bytes));
    });
  });
}

QD_EXPORT int32_t qd_sum_rows(qd_context* context, int32_t dtype, const uint8_t* rows, const int64_t* home, int64_t n,
                              int64_t k, int64_t d, uint8_t* out, qd_message* why) {
  const int64_t size = d * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(n, grain(k * d), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) c.kernels->sum_rows(dtype, rows, home + i * k, k, d, out + i * size);
    });
  });
}

QD_EXPORT int32_t qd_hidden(qd_context* context, int32_t dtype, int32_t activation, const uint8_t* gate, const uint8_t* up,
                            const float* weights, int64_t n, int64_t f, uint8_t* hidden, qd_message* why) {
  const int64_t size = f * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(n, grain(f), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        c.kernels->hidden(dtype, activation, gate + i * size, up ? up + i * size : nullptr, weights[i], f, hidden + i * size);
    });
  });
}

QD_EXPORT int32_t qd_hidden_back(qd_context* context, int32_t dtype, int32_t activation, const uint8_t* gate,
                                 const uint8_t* up, const float* weights, int64_t n, int64_t f, uint8_t* dh, uint8_t* hidden,
                                 uint8_t* du, float* d_weights, qd_message* why) {
  const int64_t size = f * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(n, grain(f), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        d_weights[i] = c.kernels->hidden_back(dtype, activation, gate + i * size, up ? up + i * size : nullptr, weights[i], f,
                                              dh + i * size, hidden + i * size, du ? du + i * size : nullptr);
    });
  });
}

QD_EXPORT int32_t qd_attention_softmax(qd_context* context, int32_t dtype, uint8_t* scores, const int64_t* lows,
                                       int64_t offset, int64_t n_kv_heads, int64_t n_queries, int64_t group, int64_t keys,
                                       const float* slopes, qd_message* why) {
  const int64_t size = keys * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.reserve(&qd_context::Thread::a, keys + 16);
    c.pool.run(n_kv_heads * n_queries, grain(keys * group), [&](int64_t begin, int64_t end, int t) {
      float* work = c.of_thread[size_t(t)].a.data();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i % n_queries, head = i / n_queries * group, low = lows[query], high = offset + query + 1;
        for (int64_t g = 0; g < group; ++g) {
          const float slope = slopes ? slopes[head + g] : 0.0f;
          c.kernels->masked_softmax(dtype, scores + (i * group + g) * size, low, high, keys, slope,
                                    slope * float(low - offset - query), work);
        }
      }
    });
  });
}

QD_EXPORT int32_t qd_attention_softmax_back(qd_context* context, int32_t dtype, const uint8_t* p, uint8_t* dp,
                                            const int64_t* lows, int64_t offset, int64_t n_kv_heads, int64_t n_queries,
                                            int64_t group, int64_t keys, qd_message* why) {
  const int64_t size = keys * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(n_kv_heads * n_queries, grain(keys * group), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i % n_queries;
        for (int64_t row = i * group; row < (i + 1) * group; ++row)
          c.kernels->softmax_back(dtype, p + row * size, lows[query], offset + query + 1, keys, dp + row * size);
      }
    });
  });
}

QD_EXPORT int32_t qd_cross_entropy(qd_context* context, int32_t dtype, uint8_t* logits, const int64_t* targets, int64_t n,
                                   int64_t v, float logit_scale, int32_t gradient, float* losses, qd_message* why) {
  const int64_t size = v * bytes_of(dtype);
  return in_turn(context, why, [&](qd_context& c) {
    c.reserve(&qd_context::Thread::a, v + 16);
    c.pool.run(n, 1, [&](int64_t begin, int64_t end, int t) {
      float* work = c.of_thread[size_t(t)].a.data();
      for (int64_t i = begin; i < end; ++i)
        losses[i] = c.kernels->cross_entropy(dtype, logits + i * size, targets[i], v, logit_scale, gradient != 0, work);
    });
  });
}

}  // extern "C"
