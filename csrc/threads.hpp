// Threads, and memory that each of them keeps.
#pragma once

#include <stdint.h>

namespace moesaic {

// Run `body` on `threads` threads at once. In a process that was forked from one that used threads there is one:
// OpenMP's others did not come along, and waiting for them would never end.
void in_parallel(int threads, void (*body)(void *), void *context);

template <class Body>
void in_parallel(int threads, Body body) {
  in_parallel(threads, [](void *context) { (*static_cast<Body *>(context))(); }, &body);
}

// At least `bytes` of this thread's own memory, aligned to pages; the same at every call. NULL without memory.
char *scratch(int64_t bytes);

}  // namespace moesaic
