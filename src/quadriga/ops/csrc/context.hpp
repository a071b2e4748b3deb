// What a forward pass works with: threads, kernels, and scratch memory that only ever grows.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

#define QD_EXPORT __attribute__((visibility("default")))

// Aligned memory that keeps its size between steps; contents are not kept when it grows.
template <class T>
class Scratch {
 public:
  T* get(int64_t n) {
    if (n > size_) {
      std::free(data_);
      const size_t bytes = (size_t(n) * sizeof(T) + 4095) / 4096 * 4096;
      data_ = static_cast<T*>(std::aligned_alloc(4096, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = int64_t(bytes / sizeof(T));
    }
    return data_;
  }
  Scratch() = default;
  Scratch(Scratch&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Tokens [first, first + width) of a list, and where their panel begins.
struct PanelOf {
  int64_t first;
  int width;
  int64_t offset;  // units
};

struct qd_context {
  qd_context(int threads, const Kernels* table) : pool(threads), kernels(table), of_thread(size_t(threads)) {}

  Pool pool;
  const Kernels* kernels;
  bool fine = false;  // activations of quantised matrices in 15 bits instead of 8
  Scratch<float> normed, qkv, mixed, projected, router, partial;
  Scratch<uint32_t> panels, hidden_panels;
  std::vector<PanelOf> tiles;
  struct Thread {
    Scratch<float> a, b, c;
    Scratch<uint32_t> units;
    Scratch<uint8_t> wide;
  };
  std::vector<Thread> of_thread;
};
