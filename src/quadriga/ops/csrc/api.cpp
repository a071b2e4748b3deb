#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>

#include "steps.hpp"
#include "store.hpp"

namespace {

const Kernels* table_of(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == QD_ISA_AVX512) return avx512 ? avx512_kernels() : nullptr;
  if (isa == QD_ISA_AVX2) return avx2 ? avx2_kernels() : nullptr;
#endif
  return isa == QD_PORTABLE ? portable_kernels() : nullptr;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

#if !defined(__x86_64__)
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif

extern "C" {

QD_EXPORT int32_t qd_abi(void) {
  return QD_ABI * 100000 + int32_t(sizeof(qd_attention) + sizeof(qd_ffn) + sizeof(qd_head) + sizeof(qd_batch) + sizeof(qd_embed));
}

QD_EXPORT int32_t qd_best_isa(void) { return table_of(QD_ISA_AVX512) ? QD_ISA_AVX512 : table_of(QD_ISA_AVX2) ? QD_ISA_AVX2 : QD_PORTABLE; }

QD_EXPORT qd_context* qd_create(int32_t n_threads, int32_t isa) {
  const Kernels* table = table_of(isa);
  return table && n_threads > 0 ? new qd_context(n_threads, table) : nullptr;
}

QD_EXPORT void qd_destroy(qd_context* c) { delete c; }
QD_EXPORT void qd_set_fine(qd_context* c, int32_t fine) { c->fine = fine; }
QD_EXPORT int32_t qd_threads(const qd_context* c) { return c->pool.size(); }

QD_EXPORT int64_t qd_packed_bytes(int32_t format, int64_t rows, int64_t cols) { return tiles_of(rows) * tile_bytes(format, cols); }
QD_EXPORT int64_t qd_kv_bytes(int32_t kv_format, int32_t head_dim) { return kv_bytes(kv_format, head_dim); }

QD_EXPORT int64_t qd_pack(qd_context* c, int32_t source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols,
                          int32_t format, uint8_t* out, const float* importance) {
  std::atomic<int64_t> bad{0};
  const int64_t bytes = tile_bytes(format, cols);
  c->pool.run(tiles_of(rows), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      if (const int64_t row = c->kernels->pack(source, in, row_bytes, rows, cols, t, format, out + t * bytes, importance)) bad = row;
  });
  return bad;
}

QD_EXPORT void qd_unpack(qd_context* c, int32_t format, const uint8_t* packed, int64_t, int64_t cols, int64_t first, int64_t n,
                         float* out) {
  c->pool.run(n, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) c->kernels->unpack_row(format, packed, cols, first + i, out + i * cols);
  });
}

QD_EXPORT int32_t qd_run(qd_context* c, const qd_step* steps, int32_t n_steps, const qd_batch* batch) {
  try {
    for (const qd_step* step = steps; step < steps + n_steps; ++step) {
      switch (step->kind) {
        case QD_OP_EMBED: run_embed(*c, *static_cast<const qd_embed*>(step->op), *batch); break;
        case QD_OP_QKV: run_qkv(*c, *static_cast<const qd_attention*>(step->op), *batch); break;
        case QD_OP_ATTEND: run_attend(*c, *static_cast<const qd_attention*>(step->op), *batch); break;
        case QD_OP_ATTN_OUT: run_attention_out(*c, *static_cast<const qd_attention*>(step->op), *batch); break;
        case QD_OP_FFN: run_ffn(*c, *static_cast<const qd_ffn*>(step->op), *batch); break;
        case QD_OP_HEAD: run_head(*c, *static_cast<const qd_head*>(step->op), *batch); break;
        default: return 1;
      }
    }
  } catch (const std::exception&) {
    return 2;  // memory
  }
  return 0;
}

QD_EXPORT void qd_linear(qd_context* c, const qd_matrix* m, const float* x, int64_t n, float* out) {
  linear(*c, *m, x, m->cols, n, out, m->rows, false);
}

QD_EXPORT void qd_norm_rows(qd_context* c, const qd_norm* spec, const float* x, int64_t n, int64_t d, float* out) {
  norm_rows(*c, *spec, x, n, d, out);
}

QD_EXPORT void qd_row_stats(qd_context* c, const float* logits, int64_t r, int64_t v, int32_t* best, float* log_sum) {
  c->pool.run(r, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) c->kernels->row_stats(logits + i * v, v, best + i, log_sum + i);
  });
}

QD_EXPORT double qd_read_bandwidth(qd_context* c, const uint8_t* data, int64_t bytes, int32_t repeats) {
  std::atomic<uint64_t> total{0};
  const int64_t piece = 1 << 18;
  const double start = seconds();
  for (int i = 0; i < repeats; ++i)
    c->pool.run(bytes / piece, 4, [&](int64_t begin, int64_t end, int) { total += c->kernels->read(data + begin * piece, (end - begin) * piece); });
  const double spent = seconds() - start;
  return total == 1 ? 0.0 : double(bytes / piece * piece) * repeats / spent;
}

QD_EXPORT double qd_peak(qd_context* c, int32_t format, int64_t iterations) {
  std::atomic<int64_t> sink{0};
  const int lanes = format >= QD_Q8 ? 64 : format == QD_BF16 ? 32 : 16;
  const int64_t pieces = 16 * int64_t(c->pool.size());
  const double start = seconds();
  c->pool.run(pieces, 1, [&](int64_t begin, int64_t end, int) { sink += int64_t(c->kernels->peak(format, iterations * (end - begin))); });
  return 2.0 * lanes * kPeakLines * double(iterations) * double(pieces) / (seconds() - start);
}

QD_EXPORT qd_store* qd_store_create(int32_t n_layers, int32_t n_experts, int32_t n_parts, const int32_t* files, const int64_t* offsets,
                                    const int64_t* sizes, int64_t budget, int32_t n_readers) {
  std::vector<Extent> extents(size_t(n_layers) * size_t(n_experts) * size_t(n_parts));
  for (size_t i = 0; i < extents.size(); ++i) extents[i] = {files[i], offsets[i], sizes[i]};
  return new qd_store(n_layers, n_experts, n_parts, std::move(extents), budget, n_readers);
}

QD_EXPORT void qd_store_destroy(qd_store* store) { delete store; }

QD_EXPORT void qd_store_stats(const qd_store* store, int64_t out[5]) {
  out[0] = store->hits, out[1] = store->misses, out[2] = store->bytes_read, out[3] = store->held(), out[4] = store->failed;
}

}  // extern "C"
