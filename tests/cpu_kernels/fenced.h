// Arrays that end at the end of their memory, to detect kernels that read or write past them: with
// the address sanitizer, or else with a protected page behind the array. The thread sanitizer would
// take long over pages.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

template <class T>
using Array = std::vector<T>;

#else

template <class T>
struct FencedAllocator {
  using value_type = T;
  FencedAllocator() = default;
  template <class U>
  FencedAllocator(const FencedAllocator<U>&) {}

  T* allocate(size_t count) {
    const size_t inner = pages(count);
    void* memory =
        mmap(nullptr, inner + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    char* end = static_cast<char*>(memory) + inner;
    if (mprotect(end, page(), PROT_NONE)) throw std::bad_alloc();
    return reinterpret_cast<T*>(end) - count;
  }
  void deallocate(T* data, size_t count) {
    munmap(reinterpret_cast<char*>(data + count) - pages(count), pages(count) + page());
  }
  bool operator==(const FencedAllocator&) const { return true; }
  bool operator!=(const FencedAllocator&) const { return false; }

 private:
  static size_t page() {
    static const size_t size = size_t(sysconf(_SC_PAGESIZE));
    return size;
  }
  static size_t pages(size_t count) { return (count * sizeof(T) + page() - 1) / page() * page(); }
};

template <class T>
using Array = std::vector<T, FencedAllocator<T> >;

#endif
