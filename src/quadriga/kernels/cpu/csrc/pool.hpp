// A persistent pool of threads, the caller one of them.
//
// A phase is n items. Every thread owns a contiguous range of them (so it streams through memory) and takes from its
// front; when its range is empty it takes from the back of the others'. A phase is over when all *items* are done, not
// when all threads have shown up: a thread that the system does not run costs nothing, the running ones take its share.
// Waiting spins for a few microseconds and then sleeps in the kernel, which lets a preempted thread move to this core.
//
// What a body throws, on any thread, ends the phase early and is thrown by run().
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

class Pool {
 public:
  explicit Pool(int n_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return n_threads_; }

  // body(begin, end, thread) for disjoint ranges that cover [0, n), `grain` items at least at a time.
  template <class Body>
  void run(int64_t n, int64_t grain, Body&& body) {
    if (n <= 0) return;
    if (n_threads_ == 1 || n <= grain) return body(int64_t(0), n, 0);
    using Plain = std::remove_reference_t<Body>;
    start([](void* self, int64_t begin, int64_t end, int thread) { (*static_cast<Plain*>(self))(begin, end, thread); },
          const_cast<void*>(static_cast<const void*>(&body)), n, grain);
  }

 private:
  using Function = void (*)(void*, int64_t, int64_t, int);
  struct alignas(64) Range {
    std::atomic<uint64_t> packed{0};  // phase (24 bits) | first (20) | end (20)
  };

  void start(Function, void* body, int64_t n, int64_t grain);
  void stop();
  void work(int thread, uint32_t phase);
  void keep_exception();
  void throw_kept();
  bool take(Range&, uint32_t phase, bool back, int64_t& begin, int64_t& end);
  void worker(int thread);

  int n_threads_;
  int process_;  // whose threads they are: a fork has none of them
  std::vector<Range> ranges_;
  std::unique_ptr<std::vector<std::thread>> threads_;
  std::atomic<Function> function_{nullptr};
  std::atomic<void*> body_{nullptr};
  std::atomic<int64_t> grain_{1}, scale_{1}, n_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<uint32_t> left_{0};  // items not done
  std::atomic<uint32_t> sleepers_{0}, caller_sleeps_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};  // in this phase
  std::exception_ptr failure_;       // the first; written before its item counts as done, read when all are
};
