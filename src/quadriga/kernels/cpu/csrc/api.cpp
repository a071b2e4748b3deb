// The exported functions but those of training.cpp: they check, convert and share out; what computes is elsewhere.
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "steps.hpp"
#include "store.hpp"
#include "system.hpp"

namespace {

// NULL: not compiled in, or this processor lacks its instructions.
const Kernels* table_of(int isa) {
  if (!has_instructions(isa)) return nullptr;
  switch (isa) {
    case QD_ISA_PORTABLE: return portable_kernels();
#if defined(__x86_64__)
    case QD_ISA_AVX2: return avx2_kernels();
    case QD_ISA_AVX512: return avx512_kernels();
#elif defined(__aarch64__)
    case QD_ISA_NEON: return neon_kernels();
    case QD_ISA_I8MM: return i8mm_kernels();
#endif
    default: return nullptr;
  }
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void check(bool good, const char* what, long long got) {
  if (!good) throw Failure(QD_STATUS_BAD_ARGUMENT, "%s, got %lld", what, got);
}

void check_format(int32_t format) { check(format >= 0 && format <= QD_FORMAT_IQ4XS, "format must be one of qd_format", format); }

void check_stored(int32_t stored, const uint8_t* codebook) {
  check(stored >= 0 && stored <= QD_STORED_IQ3_S, "stored must be one of qd_stored", stored);
  check(codebook || stored < QD_STORED_IQ1_S, "this format needs its codebook", stored);
}

// body(tile, thread) for every tile of a matrix; it answers 1 + a row that cannot be packed, or 0. The first such row, or -1.
template <class Body>
int64_t pack_tiles(qd_context& c, int64_t rows, Body&& body) {
  std::atomic<int64_t> bad{rows};
  c.pool.run(tiles_of(rows), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t found = body(tile, thread);
      int64_t first = bad;
      while (found && found - 1 < first && !bad.compare_exchange_weak(first, found - 1)) {}
    }
  });
  return bad < rows ? bad.load() : -1;
}

bool latent(const qd_step& step) { return static_cast<const qd_attention*>(step.op)->kv_rank > 0; }

void run_step(qd_context& c, const qd_step& step, const qd_batch& batch) {
  switch (step.kind) {
    case QD_OP_EMBED: return run_embed(c, *static_cast<const qd_embed*>(step.op), batch);
    case QD_OP_QKV: return (latent(step) ? run_latent_qkv : run_qkv)(c, *static_cast<const qd_attention*>(step.op), batch);
    case QD_OP_ATTEND: return run_attend(c, *static_cast<const qd_attention*>(step.op), batch);
    case QD_OP_ATTN_OUT:
      return (latent(step) ? run_latent_out : run_attention_out)(c, *static_cast<const qd_attention*>(step.op), batch);
    case QD_OP_FFN: return run_ffn(c, *static_cast<const qd_ffn*>(step.op), batch);
    case QD_OP_SHORT_CONV: return run_short_conv(c, *static_cast<const qd_short_conv*>(step.op), batch);
    case QD_OP_DELTA_NET: return run_delta_net(c, *static_cast<const qd_delta_net*>(step.op), batch);
    case QD_OP_MAMBA2: return run_mamba2(c, *static_cast<const qd_mamba2*>(step.op), batch);
    case QD_OP_MERGE: return run_merge(c, *static_cast<const qd_merge*>(step.op), batch);
    case QD_OP_HEAD: return run_head(c, *static_cast<const qd_head*>(step.op), batch);
    default: check(false, "a step must be one of qd_op", step.kind);
  }
}

}  // namespace

extern "C" {

QD_EXPORT const char* qd_header_sha256(void) { return QD_HEADER_SHA256; }

QD_EXPORT const qd_field* qd_fields(void) {
  static const qd_field table[] = {
#include "fields.inl"
      {nullptr, 0, 0}};
  return table;
}

QD_EXPORT int32_t qd_has_isa(int32_t isa, int32_t* has, qd_message* why) {
  return guarded(why, [&] { *has = table_of(isa) != nullptr; });
}

QD_EXPORT int32_t qd_create(int32_t n_threads, int32_t isa, qd_context** context, qd_message* why) {
  return guarded(why, [&] {
    check(n_threads > 0 && n_threads <= QD_MOST_THREADS, "threads must be from 1 to 1024", n_threads);
    static_assert(QD_MOST_THREADS == 1024, "as the message says");
    const Kernels* table = table_of(isa);
    if (!table) throw Failure(QD_STATUS_NO_INSTRUCTIONS, "this processor lacks instructions of the kernels asked for");
    *context = new qd_context(n_threads, table);
  });
}

QD_EXPORT int32_t qd_destroy(qd_context* context, qd_message* why) {
  return guarded(why, [&] { delete context; });
}

QD_EXPORT int32_t qd_set_int16(qd_context* context, int32_t int16, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) { c.int16 = int16; });
}

QD_EXPORT int32_t qd_packed_bytes(int32_t format, int64_t rows, int64_t cols, int64_t* bytes, qd_message* why) {
  return guarded(why, [&] {
    check_format(format);
    *bytes = tiles_of(rows) * tile_bytes(format, cols);
  });
}

QD_EXPORT int32_t qd_kv_bytes(int32_t kv_format, int32_t head_dim, int64_t* bytes, qd_message* why) {
  return guarded(why, [&] {
    check(kv_format >= 0 && kv_format <= QD_KV_FORMAT_Q8, "kv_format must be one of qd_kv_format", kv_format);
    *bytes = kv_bytes(kv_format, head_dim);
  });
}

QD_EXPORT int32_t qd_latent_bytes(int32_t kv_format, int32_t rank, int32_t rope_dim, int64_t* bytes, qd_message* why) {
  return guarded(why, [&] {
    check(kv_format >= 0 && kv_format <= QD_KV_FORMAT_Q8, "kv_format must be one of qd_kv_format", kv_format);
    check(rank > 0 && rank % 32 == 0, "a latent's rank must be a multiple of 32", rank);
    check(rope_dim > 0 && rope_dim % 2 == 0, "rope_dim must be even", rope_dim);
    *bytes = latent_bytes(kv_format, rank + rope_dim);
  });
}

QD_EXPORT int32_t qd_pack(qd_context* context, int32_t source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols,
                          int32_t format, uint8_t* out, const float* importance, int64_t* bad_row, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check_format(format);
    check(source >= 0 && source <= QD_SOURCE_Q5_1, "source must be one of qd_source", source);
    if (source_format(source) < 0) check(format < QD_FORMAT_IQ4NL, "this format is made of its own blocks", format);
    else check(format == source_format(source), "blocks are copied into their own format only", format);
    const int64_t bytes = tile_bytes(format, cols);
    *bad_row = pack_tiles(c, rows, [&](int64_t tile, int) {
      return c.kernels->pack(source, in, row_bytes, rows, cols, tile, format, out + tile * bytes, importance);
    });
  });
}

QD_EXPORT int32_t qd_pack_stored(qd_context* context, int32_t stored, const uint8_t* in, int64_t row_bytes, int64_t rows,
                                 int64_t cols, const uint8_t* codebook, int32_t format, uint8_t* out, const float* importance,
                                 int64_t* bad_row, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check_format(format);
    check_stored(stored, codebook);
    const int64_t blocks = cols / block_shape(stored).count, bytes = tile_bytes(format, cols);
    if (format == block_format(stored)) {
      check(row_bytes >= blocks_of(cols) * block_shape(stored).bytes, "rows must be whole blocks", cols);
      *bad_row = pack_tiles(c, rows, [&](int64_t tile, int) {
        const int64_t first = kTile * tile, n_rows = rows - first < kTile ? rows - first : kTile;
        const int64_t found = c.kernels->pack_blocks(stored, in + first * row_bytes, row_bytes, int(n_rows), cols, out + tile * bytes);
        return found + (found ? first : 0);
      });
      return;
    }
    check(format < QD_FORMAT_IQ4NL, "this format is made of its own blocks", format);
    check(cols == blocks * block_shape(stored).count, "columns must be whole blocks", cols);
    const int8_t* book = reinterpret_cast<const int8_t*>(codebook);
    c.reserve(&qd_context::Thread::a, kTile * cols);
    c.reserve(&qd_context::Thread::wide, kTile * cols / 32 * 34);
    *bad_row = pack_tiles(c, rows, [&](int64_t tile, int thread) {
      const int64_t first = kTile * tile, n_rows = rows - first < kTile ? rows - first : kTile, q8_row = cols / 32 * 34;
      uint8_t* q8 = c.of_thread[size_t(thread)].wide.data();  // one tile's numbers never leave the cache
      int64_t exact = 0;
      while (format == QD_FORMAT_Q8 && exact < n_rows &&
             c.kernels->to_q8_0(stored, in + (first + exact) * row_bytes, blocks, q8 + exact * q8_row)) ++exact;
      int64_t found = 0;
      if (exact == n_rows) {
        found = c.kernels->pack(QD_SOURCE_Q8_0, q8, q8_row, n_rows, cols, 0, format, out + tile * bytes, nullptr);
      } else {
        float* numbers = c.of_thread[size_t(thread)].a.data();
        for (int64_t r = 0; r < n_rows; ++r) c.kernels->dequantize(stored, in + (first + r) * row_bytes, blocks, book, numbers + r * cols);
        found = c.kernels->pack(QD_SOURCE_FLOAT32, numbers, 4 * cols, n_rows, cols, 0, format, out + tile * bytes, importance);
      }
      return found ? first + found : 0;
    });
  });
}

QD_EXPORT int32_t qd_unpack(qd_context* context, int32_t format, const uint8_t* packed, int64_t cols, int64_t first, int64_t n,
                            float* out, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check_format(format);
    c.pool.run(n, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) c.kernels->unpack_row(format, packed, cols, first + i, out + i * cols);
    });
  });
}

QD_EXPORT int32_t qd_dequantize(qd_context* context, int32_t stored, const uint8_t* blocks, int64_t n,
                                const uint8_t* codebook, float* out, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check_stored(stored, codebook);
    const BlockShape shape = block_shape(stored);
    const int64_t piece = 8192 / shape.count;  // blocks a thread takes at once
    c.pool.run((n + piece - 1) / piece, 1, [&](int64_t begin, int64_t end, int) {
      const int64_t first = begin * piece, last = end * piece < n ? end * piece : n;
      c.kernels->dequantize(stored, blocks + first * shape.bytes, last - first, reinterpret_cast<const int8_t*>(codebook),
                            out + first * shape.count);
    });
  });
}

QD_EXPORT int32_t qd_find_scales(qd_context* context, const qd_search* search, qd_message* why) {
  return guarded(why, [&] {
    const Kernels& kernels = *open_context(context).kernels;
    const qd_search& s = *search;
    check(s.length == 32 || (s.length == 16 && !s.codebook), "sub-blocks must have 16 or 32 numbers", s.length);
    check(s.per_block == 1 || s.per_block == 8 || s.per_block == 16, "sub-blocks of a block must be 1, 8 or 16", s.per_block);
    check(s.n >= 0 && s.n % s.per_block == 0, "sub-blocks must make whole blocks", s.n);
    kernels.search(s);
  });
}

QD_EXPORT int32_t qd_run(qd_context* context, const qd_step* steps, int32_t n_steps, const qd_batch* batch, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    for (const qd_step* step = steps; step < steps + n_steps; ++step) run_step(c, *step, *batch);
  });
}

QD_EXPORT int32_t qd_linear(qd_context* context, const qd_matrix* matrix, const float* x, int64_t n, float* out,
                            qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) { linear(c, *matrix, x, matrix->cols, n, out, matrix->rows, false); });
}

QD_EXPORT int32_t qd_norm_rows(qd_context* context, const qd_norm* norm, const float* x, int64_t n, int64_t d, float* out,
                               qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) { norm_rows(c, *norm, x, n, d, out); });
}

QD_EXPORT int32_t qd_row_stats(qd_context* context, const float* logits, int64_t r, int64_t v, int32_t* best, float* log_sum,
                               qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    c.pool.run(r, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) c.kernels->row_stats(logits + i * v, v, best + i, log_sum + i);
    });
  });
}

QD_EXPORT int32_t qd_sample(qd_context* context, qd_sampling** rows, int64_t n, int64_t v, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check(v > 0 && v <= INT32_MAX, "a vocabulary has from 1 to 2^31 - 1 tokens", v);
    int64_t n_history = 0;
    for (int64_t i = 0; i < n; ++i) n_history = rows[i]->n_history > n_history ? rows[i]->n_history : n_history;
    c.reserve(&qd_context::Thread::a, sample_scratch(v, n_history));
    c.pool.run(n, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) c.kernels->sample(*rows[i], v, c.of_thread[size_t(thread)].a.data(), &rows[i]->chosen);
    });
  });
}

QD_EXPORT int32_t qd_read_bandwidth(qd_context* context, const uint8_t* data, int64_t bytes, int32_t repeats, double* rate,
                                    qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    std::atomic<uint64_t> total{0};
    const int64_t piece = 1 << 18;
    const double start = seconds();
    for (int i = 0; i < repeats; ++i)
      c.pool.run(bytes / piece, 4, [&](int64_t begin, int64_t end, int) {
        total += c.kernels->read(data + begin * piece, (end - begin) * piece);
      });
    const double spent = seconds() - start;
    *rate = total == 1 ? 0.0 : double(bytes / piece * piece) * repeats / spent;
  });
}

QD_EXPORT int32_t qd_peak(qd_context* context, int32_t format, int64_t iterations, double* rate, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    check_format(format);
    std::atomic<int64_t> sink{0};
    const int lanes = format >= QD_FORMAT_Q8 ? 64 : format == QD_FORMAT_BFLOAT16 ? 32 : 16;
    const int64_t pieces = 16 * int64_t(c.pool.size());
    const double start = seconds();
    c.pool.run(pieces, 1, [&](int64_t begin, int64_t end, int) {
      sink += int64_t(c.kernels->peak(format, iterations * (end - begin)));
    });
    *rate = 2.0 * lanes * kPeakLines * double(iterations) * double(pieces) / (seconds() - start);
  });
}

QD_EXPORT int32_t qd_store_create(int32_t n_layers, int32_t n_experts, int32_t n_parts, const int32_t* files,
                                  const int64_t* offsets, const int64_t* sizes, int64_t budget, int32_t n_readers,
                                  qd_store** store, qd_message* why) {
  return guarded(why, [&] {
    check(n_layers > 0 && n_experts > 0 && n_parts > 0, "layers, experts and parts must be at least 1", n_experts);
    check(n_readers > 0 && n_readers <= QD_MOST_THREADS, "readers must be from 1 to 1024", n_readers);
    std::vector<Extent> extents(size_t(n_layers) * size_t(n_experts) * size_t(n_parts));
    for (size_t i = 0; i < extents.size(); ++i) extents[i] = {files[i], offsets[i], sizes[i]};
    *store = new qd_store(n_layers, n_experts, n_parts, std::move(extents), budget, n_readers);
  });
}

QD_EXPORT int32_t qd_store_destroy(qd_store* store, qd_message* why) {
  return guarded(why, [&] {
    if (store && !store->is_of_a_parent()) delete store;
  });
}

QD_EXPORT int32_t qd_store_stats(const qd_store* store, qd_store_counts* counts, qd_message* why) {
  return guarded(why, [&] {
    if (!store) throw Failure(QD_STATUS_BAD_ARGUMENT, "the store is none: it was closed");
    *counts = store->counts();
  });
}

QD_EXPORT int32_t qd_watch_allocations(int64_t fail_at, qd_allocations* seen, qd_message* why) {
  return guarded(why, [&] { *seen = watch_allocations(fail_at); });
}

QD_EXPORT int32_t qd_throw_in_phase(qd_context* context, qd_message* why) {
  return in_turn(context, why, [&](qd_context& c) {
    const int n = c.pool.size();
    std::atomic<bool> thrown{false};
    c.pool.run(4 * n, 1, [&](int64_t, int64_t, int thread) {
      while (n > 1 && thread == 0 && !thrown) std::this_thread::yield();
      if (n > 1 && thread == 0) return;
      thrown = true;
      throw Failure(QD_STATUS_FAILED, "thread %d of %d threw, as it was asked to", thread, n);
    });
  });
}

}  // extern "C"
