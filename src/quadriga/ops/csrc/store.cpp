#include "store.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace {
constexpr int64_t kPiece = 4 << 20;  // bytes of one read: several are under way at once
int64_t whole_lines(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }
}  // namespace

qd_store::qd_store(int n_layers, int n_experts, int n_parts, std::vector<Extent> extents, int64_t budget, int n_readers)
    : n_experts_(n_experts), n_parts_(n_parts), extents_(std::move(extents)), held_of_(size_t(n_layers), 0) {
  for (size_t i = 0; i < extents_.size(); i += size_t(n_parts)) {
    int64_t bytes = 0;
    for (int p = 0; p < n_parts; ++p) bytes += whole_lines(extents_[i + size_t(p)].bytes);
    slot_bytes_ = std::max(slot_bytes_, bytes);
  }
  // At least one whole layer: a long prompt may visit all its experts.
  const int64_t most = int64_t(n_layers) * n_experts;
  const int64_t count = std::min(most, std::max<int64_t>(n_experts, budget / slot_bytes_));
  slots_.resize(size_t(count));
  share_ = int(count / n_layers);
  for (int i = 0; i < int(count); ++i) slots_[size_t(i)].place = by_use_.insert(by_use_.end(), i);
  for (int i = 0; i < n_readers; ++i) readers_.emplace_back([this] { reader(); });
}

qd_store::~qd_store() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (auto& thread : readers_) thread.join();
  for (auto& slot : slots_)
    if (slot.memory) munmap(slot.memory, size_t(slot_bytes_));
}

int64_t qd_store::held() const {
  std::lock_guard lock(mutex_);
  return std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.memory != nullptr; }) * slot_bytes_;
}

// Layers are visited in a circle, so the least recently used expert of all would be the one that is needed next: a cache
// smaller than one token's experts would never hit. Every layer has a share instead, and gives up its own.
int qd_store::victim(int layer) const {
  int of_own = -1, of_rich = -1, of_any = -1;
  for (int s : by_use_) {
    const Slot& slot = slots_[size_t(s)];
    if (slot.key < 0) return s;
    if (slot.pinned) continue;
    const int owner = int(slot.key / n_experts_);
    of_any = s;  // the most recent one is needed last
    if (of_own < 0 && owner == layer) of_own = s;
    if (of_rich < 0 && held_of_[size_t(owner)] > share_) of_rich = s;
  }
  if (held_of_[size_t(layer)] >= share_ && of_own >= 0) return of_own;
  return of_rich >= 0 ? of_rich : of_any;
}

std::vector<std::vector<const uint8_t*>> qd_store::acquire(int layer, const std::vector<int32_t>& experts) {
  std::vector<std::vector<const uint8_t*>> result(experts.size());
  std::unique_lock lock(mutex_);
  // What is here is pinned first, so that a missing expert does not push out one that is needed beside it.
  std::vector<int> at(experts.size(), -1);
  for (size_t i = 0; i < experts.size(); ++i) {
    const auto found = slot_of_.find(int64_t(layer) * n_experts_ + experts[i]);
    if (found == slot_of_.end()) continue;
    at[i] = found->second;
    slots_[size_t(at[i])].pinned = true;
    pinned_.push_back(at[i]);
    by_use_.splice(by_use_.end(), by_use_, slots_[size_t(at[i])].place);
    ++hits;
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    if (at[i] < 0) {
      at[i] = victim(layer);
      Slot& slot = slots_[size_t(at[i])];
      if (slot.key >= 0) slot_of_.erase(slot.key), --held_of_[size_t(slot.key / n_experts_)];
      ++held_of_[size_t(layer)];
      if (!slot.memory) {
        void* memory = mmap(nullptr, size_t(slot_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        madvise(memory, size_t(slot_bytes_), MADV_HUGEPAGE);
        slot.memory = static_cast<uint8_t*>(memory);
      }
      slot.key = int64_t(layer) * n_experts_ + experts[i];
      slot_of_[slot.key] = at[i];
      slot.pinned = true;
      pinned_.push_back(at[i]);
      by_use_.splice(by_use_.end(), by_use_, slot.place);
      ++misses;
      uint8_t* to = slot.memory;
      for (int p = 0; p < n_parts_; ++p) {
        const Extent& extent = extents_[size_t(slot.key * n_parts_ + p)];
        for (int64_t done = 0; done < extent.bytes; done += kPiece, ++pending_)
          jobs_.push_back({{extent.fd, extent.offset + done, std::min(kPiece, extent.bytes - done)}, to + done});
        to += whole_lines(extent.bytes);
      }
    }
    const uint8_t* part = slots_[size_t(at[i])].memory;
    for (int p = 0; p < n_parts_; ++p) {
      result[i].push_back(part);
      part += whole_lines(extents_[size_t((int64_t(layer) * n_experts_ + experts[i]) * n_parts_ + p)].bytes);
    }
  }
  if (pending_) {
    work_.notify_all();
    done_.wait(lock, [&] { return pending_ == 0; });
  }
  return result;
}

void qd_store::release() {
  std::lock_guard lock(mutex_);
  for (int s : pinned_) slots_[size_t(s)].pinned = false;
  pinned_.clear();
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
      if (got <= 0) {  // a file that was cut short: zeros, and the engine is told
        failed = true;
        std::memset(job.to + done, 0, size_t(job.extent.bytes - done));
        break;
      }
      done += got;
    }
    bytes_read += done;
    lock.lock();
    if (--pending_ == 0) done_.notify_all();
  }
}
