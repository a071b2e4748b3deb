#include "pool.hpp"

#include "failure.hpp"
#include "memory.hpp"
#include "system.hpp"

#include <unistd.h>

#include <chrono>
#include <system_error>
#include <utility>

namespace {

constexpr int64_t kMost = (1 << 20) - 1;   // items of a phase that fit a packed range
constexpr uint32_t kPhaseMask = (1u << 24) - 1;
constexpr auto kWorkerSpin = std::chrono::microseconds(60);  // between phases of one step
constexpr auto kCallerSpin = std::chrono::microseconds(15);  // for the last items of a phase

uint64_t pack(uint32_t phase, int64_t first, int64_t end) {
  return uint64_t(phase) << 40 | uint64_t(first) << 20 | uint64_t(end);
}

// True as soon as done() holds, false if it does not within the given time.
template <class Done, class Time>
bool spin(Done done, Time limit) {
  const auto until = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_a_moment();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace

Pool::Pool(int n_threads) : n_threads_(n_threads), process_(getpid()), ranges_(size_t(n_threads)),
                             threads_(new std::vector<std::thread>) {
  threads_->reserve(size_t(n_threads));
  try {
    for (int i = 1; i < n_threads; ++i) {
      if (must_fail()) throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
      threads_->emplace_back([this, i] { worker(i); });
    }
  } catch (const std::system_error& error) {
    const int started = int(threads_->size()) + 1;
    stop();
    throw Failure(QD_STATUS_NO_THREAD, "of %d threads only %d could be started: %s", n_threads, started, error.code().message().c_str());
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  if (getpid() != process_) {  // the threads stayed with the parent: there is nobody to wait for
    threads_.release();
    return;
  }
  stop_.store(true);
  phase_.fetch_add(1);
  wake_all(phase_);
  for (auto& thread : *threads_) thread.join();
}

void Pool::keep_exception() {
  if (!failed_.exchange(true)) failure_ = std::current_exception();
}

void Pool::throw_kept() {
  failed_.store(false);
  std::rethrow_exception(std::exchange(failure_, nullptr));
}

// The fields of a phase are written only while no item of the last one is open. A worker that is late reads them torn at
// worst, and then its take() fails: the phase number in the range no longer is the one it came for.
void Pool::start(Function function, void* body, int64_t n, int64_t grain) {
  int64_t scale = 1;  // very long phases are dealt in units of several items
  while ((n + scale - 1) / scale > kMost) scale *= 2;
  const int64_t units = (n + scale - 1) / scale;
  function_.store(function, std::memory_order_relaxed);
  body_.store(body, std::memory_order_relaxed);
  n_.store(n, std::memory_order_relaxed);
  scale_.store(scale, std::memory_order_relaxed);
  grain_.store(grain > scale ? grain / scale : 1, std::memory_order_relaxed);
  left_.store(uint32_t(units), std::memory_order_relaxed);
  const uint32_t phase = (phase_.load(std::memory_order_relaxed) + 1);
  for (int i = 0; i < n_threads_; ++i)
    ranges_[size_t(i)].packed.store(pack(phase & kPhaseMask, units * i / n_threads_, units * (i + 1) / n_threads_),
                                    std::memory_order_release);
  phase_.store(phase, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) wake_all(phase_);
  work(0, phase);
  const auto done = [this] { return left_.load(std::memory_order_acquire) == 0; };
  if (!spin(done, kCallerSpin)) {
    caller_sleeps_.store(1, std::memory_order_seq_cst);
    for (uint32_t left; (left = left_.load(std::memory_order_seq_cst)) != 0;) sleep_while(left_, left);
    caller_sleeps_.store(0, std::memory_order_relaxed);
  }
  if (failed_.load(std::memory_order_relaxed)) throw_kept();
}

bool Pool::take(Range& range, uint32_t phase, bool back, int64_t& begin, int64_t& end) {
  uint64_t seen = range.packed.load(std::memory_order_acquire);
  const int64_t grain = grain_.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t first = int64_t(seen >> 20) & kMost, last = int64_t(seen) & kMost;
    if (uint32_t(seen >> 40) != (phase & kPhaseMask) || first >= last) return false;
    // A quarter of what is left at a time: long streams first, small pieces at the end.
    int64_t count = (last - first) / 4;
    count = count < grain ? grain : count;
    count = count > last - first ? last - first : count;
    begin = back ? last - count : first;
    end = begin + count;
    const uint64_t rest = back ? pack(phase & kPhaseMask, first, begin) : pack(phase & kPhaseMask, end, last);
    if (range.packed.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  }
}

void Pool::work(int thread, uint32_t phase) {
  for (int i = 0; i < n_threads_; ++i) {
    Range& range = ranges_[size_t((thread + i) % n_threads_)];
    int64_t begin, end;
    while (take(range, phase, i != 0, begin, end)) {
      const int64_t scale = scale_.load(std::memory_order_relaxed), n = n_.load(std::memory_order_relaxed);
      const int64_t stop = end * scale < n ? end * scale : n;
      if (!failed_.load(std::memory_order_relaxed)) {  // else the items that are left only count as done
        try {
          function_.load(std::memory_order_relaxed)(body_.load(std::memory_order_relaxed), begin * scale, stop, thread);
        } catch (...) {
          keep_exception();
        }
      }
      const uint32_t count = uint32_t(end - begin);
      if (left_.fetch_sub(count, std::memory_order_seq_cst) == count && caller_sleeps_.load(std::memory_order_seq_cst))
        wake_one(left_);
    }
  }
}

void Pool::worker(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto changed = [&] { return phase_.load(std::memory_order_acquire) != seen; };
    if (!spin(changed, kWorkerSpin)) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      while (!changed()) sleep_while(phase_, seen);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    seen = phase_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    work(thread, seen);
  }
}
