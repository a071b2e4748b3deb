// What a forward pass works with: threads, kernels, and scratch memory that only ever grows.
#pragma once
#include <cstdlib>
#include <mutex>
#include <vector>

#include "failure.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "pool.hpp"

#define QD_EXPORT __attribute__((visibility("default")))

// Aligned memory that keeps its size between steps; contents are not kept when it grows. It is reserved by the caller
// before a parallel phase; threads at work only use it.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t n) {
    if (n > size_) {
      std::free(data_);
      data_ = nullptr, size_ = 0;  // whatever comes now, the next reserve begins anew
      const size_t bytes = (size_t(n) * sizeof(T) + 4095) / 4096 * 4096;
      data_ = static_cast<T*>(aligned_memory(bytes, 4096));
      size_ = int64_t(bytes / sizeof(T));
    }
    return data_;
  }
  T* data() const { return data_; }
  Scratch() = default;
  Scratch(Scratch&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct qd_context {
  struct Thread {
    Scratch<float> a, b;
    Scratch<uint32_t> units;
    Scratch<uint8_t> wide;
    Scratch<const float*> rows;
    Scratch<int32_t> positions;
  };

  qd_context(int threads, const Kernels* table) : of_thread(size_t(threads)), kernels(table), pool(threads) {}

  // Room in every thread's scratch: none asks for memory while they run.
  template <class T>
  void reserve(Scratch<T> Thread::*scratch, int64_t n) {
    for (Thread& thread : of_thread) (thread.*scratch).reserve(n);
  }

  std::mutex turn;  // a call's: see in_turn
  std::vector<Thread> of_thread;
  const Kernels* kernels;
  bool int16 = false;  // activations of quantised matrices in 15 bits instead of 8
  Scratch<float> normed, qkv, mixed, projected, router, partial;
  Scratch<float> heads, latents;  // of latent attention
  Scratch<uint32_t> panels, hidden_panels;
  Pool pool;  // last: its threads end before what they work with
};

inline qd_context& open_context(qd_context* context) {
  if (!context) throw Failure(QD_STATUS_BAD_ARGUMENT, "the context is none: it was closed");
  return *context;
}

// `guarded`, by one thread at a time: others that have the same context wait for their turn.
template <class Body>
int32_t in_turn(qd_context* context, qd_message* why, Body&& body) noexcept {
  return guarded(why, [&] {
    std::lock_guard lock(open_context(context).turn);
    body(*context);
  });
}
