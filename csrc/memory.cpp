#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsebreg {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[slot_count];

constexpr size_t HUGE_PAGE = size_t(2) << 20;

}  // namespace

void* scratch_bytes(Slot slot, size_t bytes) {
  Buffer& b = buffers[slot];
  if (bytes <= b.size) return b.data;
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();  // what follows would overflow
  std::free(b.data);
  b.data = nullptr;
  b.size = 0;
  const size_t align = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
  const size_t size = (bytes + bytes / 8 + align - 1) / align * align;
  void* p = nullptr;
  if (posix_memalign(&p, align, size) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (align == HUGE_PAGE) madvise(p, size, MADV_HUGEPAGE);
#endif
  b.data = p;
  b.size = size;
  return p;
}

int team_member() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

size_t release_scratch() {
  size_t total = 0;
  for (Buffer& b : buffers) {
    total += b.size;
    std::free(b.data);
    b.data = nullptr;
    b.size = 0;
  }
  return total;
}

}  // namespace sparsebreg
