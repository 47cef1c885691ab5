#include "threads.hpp"

#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>

namespace moesaic {
namespace {

std::atomic<bool> used_threads{false};
std::atomic<bool> threads_were_lost{false};

void in_child() {
  if (used_threads) threads_were_lost = true;
}

const int registered = pthread_atfork(nullptr, nullptr, in_child);

constexpr int64_t kHugePage = 2 << 20;

struct Scratch {
  char *data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { free(data); }
};

thread_local Scratch own;

}  // namespace

void in_parallel(int threads, void (*body)(void *), void *context) {
  if (threads <= 1 || threads_were_lost) {
    body(context);
    return;
  }
  used_threads = true;
#pragma omp parallel num_threads(threads)
  body(context);
}

char *scratch(int64_t bytes) {
  if (own.bytes >= bytes) return own.data;
  free(own.data);
  own.bytes = 0;
  const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  own.data = static_cast<char *>(aligned_alloc(kHugePage, whole));
  if (!own.data) return nullptr;
  madvise(own.data, whole, MADV_HUGEPAGE);
  own.bytes = whole;
  return own.data;
}

}  // namespace moesaic
