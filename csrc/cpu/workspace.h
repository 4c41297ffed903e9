// Scratch memory that is kept between calls: fresh memory would cause page faults in every training
// step.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace dk {

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Thread-safe and bounded: it keeps at most kKept bytes of free buffers. If no free buffer is large
// enough, the largest one is freed and replaced. Calls that run at the same time have separate
// buffers.
class WorkspacePool {
 public:
  static constexpr int64_t kKept = int64_t(256) << 20;

  Buffer acquire(int64_t bytes) {
    Buffer outgrown;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      int best = -1, largest = -1;
      for (int i = 0; i < int(free_.size()); ++i) {
        const int64_t size = free_[i].bytes;
        if (size >= bytes && (best < 0 || size < free_[best].bytes)) best = i;
        if (largest < 0 || size > free_[largest].bytes) largest = i;
      }
      const int taken = best >= 0 ? best : largest;
      if (taken >= 0) {
        outgrown = free_[taken];
        free_.erase(free_.begin() + taken);
        kept_ -= outgrown.bytes;
      }
    }
    if (outgrown.bytes >= bytes && outgrown.data) return outgrown;
    std::free(outgrown.data);
    return allocate(bytes);
  }

  void release(Buffer buffer) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (kept_ + buffer.bytes <= kKept) {
        free_.push_back(buffer);
        kept_ += buffer.bytes;
        return;
      }
    }
    std::free(buffer.data);
  }

 private:
  static Buffer allocate(int64_t bytes) {
    constexpr int64_t kSmallPage = 4096, kHugePage = int64_t(2) << 20;
    const int64_t page = bytes >= kHugePage / 2 ? kHugePage : kSmallPage;
    const int64_t rounded = (bytes + page - 1) / page * page;
    void* data = std::aligned_alloc(size_t(page), size_t(rounded));
    if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Gathers read memory at random: huge pages cause fewer TLB misses. Works without them, too.
    if (page == kHugePage) madvise(data, size_t(rounded), MADV_HUGEPAGE);
#endif
    return {data, rounded};
  }

  std::mutex mutex_;
  std::vector<Buffer> free_;
  int64_t kept_ = 0;
};

inline WorkspacePool workspace_pool;

// Tests fill every workspace with NaN (all bits set), to detect kernels that read uninitialised
// memory.
inline bool poison_workspaces = false;

// The workspace of one call.
class Workspace {
 public:
  ~Workspace() {
    if (buffer_.data) workspace_pool.release(buffer_);
  }
  static void* get(void* self, int64_t bytes) {
    Buffer& buffer = static_cast<Workspace*>(self)->buffer_;
    buffer = workspace_pool.acquire(bytes);
    if (poison_workspaces) memset(buffer.data, 0xff, size_t(buffer.bytes));
    return buffer.data;
  }

 private:
  Buffer buffer_;
};

}  // namespace dk
