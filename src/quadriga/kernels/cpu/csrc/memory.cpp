#include "memory.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

namespace {

constexpr int64_t kNever = -1, kIdle = -2;

std::atomic<bool> watched{false};
std::atomic<int64_t> fail_at{kNever}, made{0}, failed{0}, elsewhere{0};
std::atomic<std::thread::id> watcher{};

bool counted() noexcept {
  if (std::this_thread::get_id() != watcher.load()) elsewhere.fetch_add(1);
  if (made.fetch_add(1) != fail_at.load()) return false;
  failed.fetch_add(1);
  return true;
}

void* plain_memory(size_t bytes) {
  void* memory = must_fail() ? nullptr : std::malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

bool must_fail() noexcept { return watched.load(std::memory_order_relaxed) && counted(); }

void* aligned_memory(size_t bytes, size_t alignment) {
  void* memory = must_fail() ? nullptr : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

qd_allocations watch_allocations(int64_t number) {
  watched.store(false);
  const qd_allocations seen{made.exchange(0), failed.exchange(0), elsewhere.exchange(0)};
  fail_at.store(number);
  watcher.store(std::this_thread::get_id());
  watched.store(number != kIdle);
  return seen;
}

// The library's own; exports.map keeps them inside.
void* operator new(size_t bytes) { return plain_memory(bytes); }
void* operator new[](size_t bytes) { return plain_memory(bytes); }
void* operator new(size_t bytes, std::align_val_t alignment) { return aligned_memory(bytes, size_t(alignment)); }
void* operator new[](size_t bytes, std::align_val_t alignment) { return aligned_memory(bytes, size_t(alignment)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return must_fail() ? nullptr : std::malloc(bytes ? bytes : 1); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
