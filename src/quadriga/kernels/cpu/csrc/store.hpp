// Experts on disk, the recently used ones in memory.
//
// The cache has slots of one expert each, as many as the budget holds. acquire() brings all experts that a layer's
// tokens chose: those in memory are used as they are, the others are read by several threads at once into the slots
// that this layer used longest ago. They stay as long as what acquire() returned. An acquire that fails, for want of
// memory or because a file was cut short, leaves the cache as if it had not been asked.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "quadriga.h"

struct Extent {
  int fd;
  int64_t offset, bytes;
};

struct qd_store {
  // Experts of one layer that are in memory and stay there.
  class Pinned {
   public:
    Pinned() = default;
    Pinned(Pinned&& other) noexcept { *this = std::move(other); }
    Pinned& operator=(Pinned&& other) noexcept {
      std::swap(store_, other.store_), std::swap(slots_, other.slots_), std::swap(parts_, other.parts_);
      return *this;
    }
    ~Pinned() {
      if (store_) store_->unpin(slots_);
    }
    // The parts of the i-th expert that was asked for.
    const uint8_t* const* parts(size_t i) const { return parts_.data() + i * size_t(store_->n_parts_); }

   private:
    friend struct qd_store;
    Pinned(qd_store& store, size_t n) : store_(&store), parts_(n * size_t(store.n_parts_)) { slots_.reserve(n); }
    qd_store* store_ = nullptr;
    std::vector<int> slots_;
    std::vector<const uint8_t*> parts_;
  };

  qd_store(int n_layers, int n_experts, int n_parts, std::vector<Extent> extents, int64_t budget, int n_readers);
  ~qd_store();
  qd_store(const qd_store&) = delete;
  qd_store& operator=(const qd_store&) = delete;

  Pinned acquire(int layer, const std::vector<int32_t>& experts);
  qd_store_counts counts() const;
  // True in a fork of the process that made it, which has none of its readers. It must not be destroyed there: its
  // condition variables would wait for them.
  bool is_of_a_parent() const;

 private:
  struct Slot {
    int64_t key = -1;
    uint8_t* memory = nullptr;
    int pins = 0;
    std::list<int>::iterator place;
  };
  struct Reading {  // of one acquire
    int64_t left = 0;
    bool failed = false;
  };
  struct Job {
    Extent extent;
    uint8_t* to;
    Reading* of;
  };

  void reader();
  void stop();
  int victim(int layer) const;  // the slot to give up; never a pinned one; -1: all are pinned
  int claim(int64_t key);
  void forget(int slot);
  void pin(int slot, Pinned&);
  void unpin(const std::vector<int>& slots);
  void queue(int slot, Reading&);

  int n_experts_, n_parts_;
  std::vector<Extent> extents_;
  int64_t slot_bytes_ = 0;
  std::vector<Slot> slots_;
  std::vector<int> held_of_;  // slots that hold an expert of this layer
  int share_ = 0;             // that every layer with experts may hold
  std::list<int> by_use_;  // slots, least recently used first
  std::unordered_map<int64_t, int> slot_of_;

  std::mutex acquiring_;  // one acquire at a time: nobody finds an expert that is still being read
  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job> jobs_;
  int64_t hits_ = 0, misses_ = 0, bytes_read_ = 0;
  bool stop_ = false;
  int process_;
  std::vector<std::thread> readers_;
};
