// Experts on disk, the recently used ones in memory.
//
// The cache has slots of one expert each, as many as the budget holds. acquire() brings all experts that a layer's
// tokens chose: those in memory are used as they are, the others are read by several threads at once into the slots
// that this layer used longest ago. The experts of one acquire stay until release().
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

struct Extent {
  int fd;
  int64_t offset, bytes;
};

struct qd_store {
  qd_store(int n_layers, int n_experts, int n_parts, std::vector<Extent> extents, int64_t budget, int n_readers);
  ~qd_store();
  qd_store(const qd_store&) = delete;
  qd_store& operator=(const qd_store&) = delete;

  // One vector of part pointers for every wanted expert, in their order.
  std::vector<std::vector<const uint8_t*>> acquire(int layer, const std::vector<int32_t>& experts);
  void release();

  std::atomic<int64_t> hits{0}, misses{0}, bytes_read{0};
  std::atomic<bool> failed{false};
  int64_t held() const;

 private:
  struct Slot {
    int64_t key = -1;
    uint8_t* memory = nullptr;
    bool pinned = false;
    std::list<int>::iterator place;
  };
  struct Job {
    Extent extent;
    uint8_t* to;
  };

  void reader();
  int victim(int layer) const;  // the slot to give up; never a pinned one

  int n_experts_, n_parts_;
  std::vector<Extent> extents_;
  int64_t slot_bytes_ = 0;
  std::vector<Slot> slots_;
  std::vector<int> held_of_;  // slots that hold an expert of this layer
  int share_ = 0;             // that every layer may hold
  std::list<int> by_use_;  // slots, least recently used first
  std::unordered_map<int64_t, int> slot_of_;
  std::vector<int> pinned_;

  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job> jobs_;
  int64_t pending_ = 0;
  bool stop_ = false;
  std::vector<std::thread> readers_;
};
