#include "store.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>

#include "failure.hpp"
#include "memory.hpp"
#include "system.hpp"

namespace {
constexpr int64_t kPiece = 4 << 20;  // bytes of one read: several are under way at once
int64_t whole_lines(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }
}  // namespace

qd_store::qd_store(int n_layers, int n_experts, int n_parts, std::vector<Extent> extents, int64_t budget, int n_readers)
    : n_experts_(n_experts), n_parts_(n_parts), extents_(std::move(extents)), held_of_(size_t(n_layers), 0),
      process_(getpid()) {
  int64_t n_mixtures = 0;  // layers that have experts; those of the others are of no bytes
  for (size_t i = 0; i < extents_.size(); i += size_t(n_parts)) {
    int64_t bytes = 0;
    for (int p = 0; p < n_parts; ++p) bytes += whole_lines(extents_[i + size_t(p)].bytes);
    slot_bytes_ = std::max(slot_bytes_, bytes);
    if (bytes && i % size_t(n_experts * n_parts) == 0) ++n_mixtures;
  }
  // At least one whole layer: a long prompt may visit all its experts.
  const int64_t most = n_mixtures * n_experts;
  const int64_t count = std::min(most, std::max<int64_t>(n_experts, budget / slot_bytes_));
  slots_.resize(size_t(count));
  share_ = int(count / std::max<int64_t>(1, n_mixtures));
  for (int i = 0; i < int(count); ++i) slots_[size_t(i)].place = by_use_.insert(by_use_.end(), i);
  readers_.reserve(size_t(n_readers));
  try {
    for (int i = 0; i < n_readers; ++i) {
      if (must_fail()) throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
      readers_.emplace_back([this] { reader(); });
    }
  } catch (const std::system_error& error) {
    const int started = int(readers_.size());
    stop();
    throw Failure(QD_STATUS_NO_THREAD, "of %d reading threads only %d could be started: %s", n_readers, started, error.code().message().c_str());
  } catch (...) {
    stop();
    throw;
  }
}

qd_store::~qd_store() {
  stop();
  for (auto& slot : slots_)
    if (slot.memory) munmap(slot.memory, size_t(slot_bytes_));
}

bool qd_store::is_of_a_parent() const { return getpid() != process_; }

void qd_store::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (auto& thread : readers_) thread.join();
}

qd_store_counts qd_store::counts() const {
  std::lock_guard lock(mutex_);
  const auto held = std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.memory != nullptr; });
  return {hits_, misses_, bytes_read_, held * slot_bytes_};
}

// Layers are visited in a circle, so the least recently used expert of all would be the one that is needed next: a cache
// smaller than one token's experts would never hit. Every layer has a share instead, and gives up its own.
int qd_store::victim(int layer) const {
  int of_own = -1, of_rich = -1, of_any = -1;
  for (int s : by_use_) {
    const Slot& slot = slots_[size_t(s)];
    if (slot.key < 0) return s;
    if (slot.pins) continue;
    const int owner = int(slot.key / n_experts_);
    of_any = s;  // the most recent one is needed last
    if (of_own < 0 && owner == layer) of_own = s;
    if (of_rich < 0 && held_of_[size_t(owner)] > share_) of_rich = s;
  }
  if (held_of_[size_t(layer)] >= share_ && of_own >= 0) return of_own;
  return of_rich >= 0 ? of_rich : of_any;
}

// An empty slot for an expert, with memory. What throws, throws before anything has changed but the victim's end.
int qd_store::claim(int64_t key) {
  const int layer = int(key / n_experts_), s = victim(layer);
  if (s < 0) throw Failure(QD_STATUS_OUT_OF_MEMORY, "every expert in memory is in use: several models share their store");
  Slot& slot = slots_[size_t(s)];
  if (slot.key >= 0) forget(s);
  if (!slot.memory) {
    void* memory = must_fail() ? MAP_FAILED
                               : mmap(nullptr, size_t(slot_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    prefer_large_pages(memory, size_t(slot_bytes_));
    slot.memory = static_cast<uint8_t*>(memory);
  }
  slot_of_.emplace(key, s);
  slot.key = key;
  ++held_of_[size_t(layer)];
  return s;
}

void qd_store::forget(int s) {
  Slot& slot = slots_[size_t(s)];
  slot_of_.erase(slot.key);
  --held_of_[size_t(slot.key / n_experts_)];
  slot.key = -1;
}

void qd_store::pin(int s, Pinned& pinned) {
  Slot& slot = slots_[size_t(s)];
  ++slot.pins;
  pinned.slots_.push_back(s);  // there is room
  by_use_.splice(by_use_.end(), by_use_, slot.place);
}

void qd_store::unpin(const std::vector<int>& slots) {
  std::lock_guard lock(mutex_);
  for (int s : slots) --slots_[size_t(s)].pins;
}

void qd_store::queue(int s, Reading& reading) {
  const Slot& slot = slots_[size_t(s)];
  uint8_t* to = slot.memory;
  for (int p = 0; p < n_parts_; ++p) {
    const Extent& extent = extents_[size_t(slot.key * n_parts_ + p)];
    for (int64_t done = 0; done < extent.bytes; done += kPiece, ++reading.left)
      jobs_.push_back({{extent.fd, extent.offset + done, std::min(kPiece, extent.bytes - done)}, to + done, &reading});
    to += whole_lines(extent.bytes);
  }
}

qd_store::Pinned qd_store::acquire(int layer, const std::vector<int32_t>& experts) {
  if (is_of_a_parent()) throw Failure(QD_STATUS_FAILED, "experts on disk cannot be read in a fork of the process that opened them");
  std::lock_guard acquiring(acquiring_);
  Pinned pinned(*this, experts.size());
  std::vector<int> at(experts.size(), -1), fresh;
  fresh.reserve(experts.size());
  Reading reading;
  std::unique_lock lock(mutex_);
  const auto wait = [&] {
    if (!reading.left) return;
    work_.notify_all();
    done_.wait(lock, [&] { return reading.left == 0; });
  };
  // What is here is pinned first, so that a missing expert does not push out one that is needed beside it.
  for (size_t i = 0; i < experts.size(); ++i) {
    const auto found = slot_of_.find(int64_t(layer) * n_experts_ + experts[i]);
    if (found == slot_of_.end()) continue;
    pin(at[i] = found->second, pinned);
    ++hits_;
  }
  try {
    for (size_t i = 0; i < experts.size(); ++i) {
      if (at[i] >= 0) continue;
      fresh.push_back(at[i] = claim(int64_t(layer) * n_experts_ + experts[i]));
      pin(at[i], pinned);
      queue(at[i], reading);
      ++misses_;
    }
    wait();
    if (reading.failed) throw Failure(QD_STATUS_READ_FAILED, "an expert could not be read from disk: the files were cut short or removed");
  } catch (...) {
    wait();  // for what was queued before
    for (int s : fresh) forget(s);
    throw;
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    const uint8_t* part = slots_[size_t(at[i])].memory;
    for (int p = 0; p < n_parts_; ++p) {
      pinned.parts_[i * size_t(n_parts_) + size_t(p)] = part;
      part += whole_lines(extents_[size_t((int64_t(layer) * n_experts_ + experts[i]) * n_parts_ + p)].bytes);
    }
  }
  return pinned;
}

void qd_store::reader() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    int64_t done = 0;
    while (done < job.extent.bytes) {
      const ssize_t got = pread(job.extent.fd, job.to + done, size_t(job.extent.bytes - done), job.extent.offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;  // a file that was cut short
      done += got;
    }
    lock.lock();
    bytes_read_ += done;
    if (done < job.extent.bytes) job.of->failed = true;
    if (--job.of->left == 0) done_.notify_all();
  }
}
