// Linux sleeps on a futex and reads the processor's flags from the kernel; elsewhere (macOS) threads sleep on a condition
// variable, and the flags come from sysctl. QD_NO_FUTEX compiles the condition variables on Linux too: a test runs them.
#include "system.hpp"

#include <sys/mman.h>

#include "quadriga.h"

#if defined(__linux__) && !QD_NO_FUTEX
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <condition_variable>
#include <mutex>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__linux__) && !QD_NO_FUTEX

namespace {
void futex(std::atomic<uint32_t>& word, int what, uint32_t number) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), what, number, nullptr, nullptr, 0);
}
}  // namespace

void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) { futex(word, FUTEX_WAIT_PRIVATE, seen); }
void wake_one(std::atomic<uint32_t>& word) { futex(word, FUTEX_WAKE_PRIVATE, 1); }
void wake_all(std::atomic<uint32_t>& word) { futex(word, FUTEX_WAKE_PRIVATE, INT_MAX); }

#else

namespace {

// Words share rooms: who is woken for another's word looks at its own and sleeps again.
struct Room {
  std::mutex mutex;
  std::condition_variable changed;
};

Room& room_of(const void* word) {
  static Room rooms[64];
  return rooms[reinterpret_cast<uintptr_t>(word) / 64 % 64];
}

}  // namespace

// The waker takes the mutex between its change and its call, so that no change falls between a look and the sleep after it.
void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
  Room& room = room_of(&word);
  std::unique_lock lock(room.mutex);
  if (word.load(std::memory_order_seq_cst) == seen) room.changed.wait(lock);
}

void wake_all(std::atomic<uint32_t>& word) {
  Room& room = room_of(&word);
  { std::lock_guard lock(room.mutex); }
  room.changed.notify_all();
}

void wake_one(std::atomic<uint32_t>& word) { wake_all(word); }

#endif

void pause_a_moment() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // some tens of cycles; `yield` is none on most cores
#endif
}

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

#if defined(__x86_64__)

bool has_instructions(int isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == QD_ISA_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return isa == QD_ISA_PORTABLE || (isa == QD_ISA_AVX2 && avx2);
}

#elif defined(__aarch64__) && defined(__linux__)

bool has_instructions(int isa) {
  const bool neon = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  const unsigned long more = getauxval(AT_HWCAP2);
  return isa == QD_ISA_PORTABLE || (isa == QD_ISA_NEON && neon) ||
         (isa == QD_ISA_I8MM && neon && (more & HWCAP2_I8MM) && (more & HWCAP2_BF16));
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {
bool has(const char* feature) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value;
}
}  // namespace

bool has_instructions(int isa) {
  const bool neon = has("hw.optional.arm.FEAT_DotProd");
  return isa == QD_ISA_PORTABLE || (isa == QD_ISA_NEON && neon) ||
         (isa == QD_ISA_I8MM && neon && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16"));
}

#else

bool has_instructions(int isa) { return isa == QD_ISA_PORTABLE; }

#endif
