#include "pool.h"

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsebreg {
namespace {

constexpr size_t BLOCK = size_t(2) << 20;    // a huge page
constexpr size_t PIECE = size_t(64) << 10;   // sizes below a block are rounded up to this
constexpr size_t SMALL = size_t(128) << 10;  // what is smaller is reused by the C library

struct Pool {
  std::mutex lock;
  std::multimap<size_t, void*> blocks;
  size_t held = 0;
  size_t limit = size_t(2) << 30;
};

// Never destroyed: tensors may outlive static destructors at interpreter exit.
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

void* pool_take(size_t bytes, size_t* size) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();  // rounding up would overflow
  void* block = nullptr;
  if (bytes < SMALL) {
    *size = 0;
    if (posix_memalign(&block, 64, bytes == 0 ? 64 : bytes) != 0) throw std::bad_alloc();
    return block;
  }
  const size_t step = bytes < BLOCK ? PIECE : BLOCK;
  const size_t want = (bytes + step - 1) / step * step;
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> guard(p.lock);
    const auto found = p.blocks.lower_bound(want);
    // A block a little too large is better than a new one.
    if (found != p.blocks.end() && found->first <= want + want / 4) {
      block = found->second;
      *size = found->first;
      p.held -= found->first;
      p.blocks.erase(found);
      return block;
    }
  }
  if (posix_memalign(&block, step == BLOCK ? BLOCK : 4096, want) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (step == BLOCK) madvise(block, want, MADV_HUGEPAGE);
#endif
  *size = want;
  return block;
}

void pool_give(void* block, size_t size) {
  if (size == 0) return std::free(block);
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> guard(p.lock);
    if (p.held + size <= p.limit) {
      p.blocks.emplace_hint(p.blocks.lower_bound(size), size, block);  // of equal ones the last is taken first: warm
      p.held += size;
      return;
    }
  }
  std::free(block);
}

size_t pool_release() {
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  const size_t total = p.held;
  for (const auto& entry : p.blocks) std::free(entry.second);
  p.blocks.clear();
  p.held = 0;
  return total;
}

size_t pool_limit(size_t bytes) {
  Pool& p = pool();
  size_t before;
  {
    std::lock_guard<std::mutex> guard(p.lock);
    before = p.limit;
    p.limit = bytes;
  }
  if (pool_held() > bytes) pool_release();
  return before;
}

size_t pool_held() {
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  return p.held;
}

}  // namespace sparsebreg
