// Memory for large results. A fresh page costs the kernel more time than most products spend on filling it; here
// results lie on huge pages, and what autograd has let go of is used again.
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "moesaic_cpu.h"

namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Region {
  void *data;
  int64_t bytes;
};

class Pool {
 public:
  void *take(int64_t wanted) {
    const int64_t bytes = std::max<int64_t>(1, (wanted + kHugePage - 1) / kHugePage) * kHugePage;
    std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that does; one much larger is kept for larger results.
    auto best = idle_.end();
    for (auto i = idle_.begin(); i != idle_.end(); ++i) {
      if (i->bytes >= bytes && i->bytes <= bytes + bytes / 4 && (best == idle_.end() || i->bytes < best->bytes)) {
        best = i;
      }
    }
    Region region;
    if (best != idle_.end()) {
      region = *best;
      lent_.emplace(region.data, region.bytes);
      idle_.erase(best);
      idle_bytes_ -= region.bytes;
    } else {
      region = map(bytes);
      if (!region.data) return nullptr;
      try {
        lent_.emplace(region.data, region.bytes);
      } catch (...) {
        munmap(region.data, region.bytes);
        throw;
      }
    }
    lent_bytes_ += region.bytes;
    return region.data;
  }

  void give(void *data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lent_.find(data);
    if (found == lent_.end()) return;
    const Region region{data, found->second};
    lent_.erase(found);
    lent_bytes_ -= region.bytes;
    try {
      idle_.push_back(region);
      idle_bytes_ += region.bytes;
    } catch (const std::bad_alloc &) {
      munmap(region.data, region.bytes);
    }
    trim();
  }

  void limit(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim();
  }

  void state(int64_t *lent, int64_t *idle) {
    std::lock_guard<std::mutex> lock(mutex_);
    *lent = lent_bytes_;
    *idle = idle_bytes_;
  }

  std::mutex &mutex() { return mutex_; }

 private:
  static Region map(int64_t bytes) {
    void *whole = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return {nullptr, 0};
    const auto start = reinterpret_cast<uintptr_t>(whole);
    const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(whole, aligned - start);
    const uintptr_t end = start + bytes + kHugePage;
    if (end > aligned + bytes) munmap(reinterpret_cast<void *>(aligned + bytes), end - aligned - bytes);
    madvise(reinterpret_cast<void *>(aligned), bytes, MADV_HUGEPAGE);
    return {reinterpret_cast<void *>(aligned), bytes};
  }

  // Gives the longest idle back to the system.
  void trim() {
    while (idle_bytes_ > limit_) {
      munmap(idle_.front().data, idle_.front().bytes);
      idle_bytes_ -= idle_.front().bytes;
      idle_.erase(idle_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Region> idle_;
  std::unordered_map<void *, int64_t> lent_;
  int64_t idle_bytes_ = 0, lent_bytes_ = 0, limit_ = 0;
};

// Never destroyed: tensors may outlive everything that is.
Pool &pool() {
  static Pool *const the_pool = [] {
    Pool *p = new Pool;
    // A fork while another thread holds the mutex would leave the child's locked for good.
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
    return p;
  }();
  return *the_pool;
}

// DLPack, version 0.x: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};

constexpr int kMaxDims = 3;

struct Lent {
  DLManagedTensor managed;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

}  // namespace

extern "C" {

void *moesaic_pool_take(int64_t bytes) try {
  return pool().take(bytes);
} catch (const std::bad_alloc &) {
  return nullptr;
}

void moesaic_pool_give(void *data) { pool().give(data); }

void moesaic_pool_limit(int64_t limit) { pool().limit(limit); }

void moesaic_pool_state(int64_t *lent, int64_t *idle) { pool().state(lent, idle); }

void *moesaic_pool_tensor(const int64_t *shape, int ndim, int dtype) {
  if (ndim < 1 || ndim > kMaxDims) return nullptr;
  int64_t elements = 1;
  for (int i = 0; i < ndim; ++i) elements *= shape[i];
  Lent *lent = new (std::nothrow) Lent{};
  if (!lent) return nullptr;
  void *data = moesaic_pool_take(elements * (dtype == MOESAIC_BF16 ? 2 : 4));
  if (!data) {
    delete lent;
    return nullptr;
  }
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    lent->shape[i] = shape[i];
    lent->strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  DLTensor &t = lent->managed.tensor;
  t.data = data;
  t.device = {1, 0};
  t.ndim = ndim;
  t.dtype = {static_cast<uint8_t>(dtype == MOESAIC_BF16 ? 4 : 2), static_cast<uint8_t>(dtype == MOESAIC_BF16 ? 16 : 32),
             1};
  t.shape = lent->shape;
  t.strides = lent->strides;
  lent->managed.context = lent;
  lent->managed.deleter = [](DLManagedTensor *self) {
    moesaic_pool_give(self->tensor.data);
    delete static_cast<Lent *>(self->context);
  };
  return &lent->managed;
}
}
