// What the entry points share: checked groups, task lists, and kernels run on all threads.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "problem.hpp"
#include "threads.hpp"

namespace moesaic {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of the best instruction set that this build and this machine have; 0 for none.
int best_isa();

// NULL for a number that is none's.
const char *isa_name(int isa);

// Whether this build and this machine have an instruction set.
bool has_isa(int isa);

// NULL where this build or this machine does not have them.
const Kernels *kernels(int dtype, int isa);

// NULL where an instruction set has no tiles, likewise.
const TileKernels *tile_kernels(int isa);

struct Group {
  int64_t first_row, rows, matrix;
};

// The groups that have rows, and the rows that have no group; false where sizes do not fit.
bool read_groups(const moesaic_groups &g, std::vector<Group> &groups, std::vector<Group> &padding);

// How the weights of a product lie: rows of them contiguous, or columns, or neither; or they are decoded.
enum class Layout { kRows, kColumns, kApart, kStored };
Layout layout(const moesaic_weights &w);

// How large a task of a product may be.
struct Limits {
  int64_t wide_panels;
  bool keeps_sums;
};
constexpr Limits kProductLimits = {kWidePanels, false};
constexpr Limits kKeptLimits = {kKeptPanels, true};

std::vector<ProductTask> product_tasks(const std::vector<Group> &groups, const std::vector<Group> &padding,
                                       int64_t columns, const Kernels &k, Layout w, Limits limits, int threads);

std::vector<GradientTask> gradient_tasks(int64_t matrices, int64_t inner, int64_t columns);

// Whether a result of so many bytes is better written around the caches.
bool is_streamed(const void *result, int64_t row_bytes, int64_t bytes);

// Runs a kernel on all threads; each gets scratch memory.
template <class Problem>
int run(void (*kernel)(const Problem &, Counter &, char *), const Problem &problem, int64_t scratch_bytes,
        int threads) {
  if (!problem.num_tasks) return MOESAIC_OK;
  TaskNumbers numbers(problem.num_tasks, threads);
  bool failed = false;
  in_parallel(static_cast<int>(std::min<int64_t>(threads, problem.num_tasks)), [&] {
    char *memory = scratch(scratch_bytes);
    if (memory) {
      Counter counter(numbers);
      kernel(problem, counter, memory);
    } else {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
  });
  // A thread without scratch memory has left its tasks to the others; if no thread had any, tasks are left.
  return failed && numbers.is_left() ? MOESAIC_OUT_OF_MEMORY : MOESAIC_OK;
}

struct Free {
  void operator()(void *p) const { free(p); }
};

// Memory for one call: from the pool where it is large.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;
  ~Workspace() { release(); }
  // Throws bad_alloc without memory.
  char *take(int64_t bytes);
  char *data() const { return data_; }

 private:
  void release();
  char *data_ = nullptr;
  bool pooled_ = false;
};

// Makes the rows of x rows of whole words, in `copy`, if they are not yet; the stride becomes one in words.
void as_words(moesaic_matrix &x, int64_t rows, int64_t inner, const Kernels &k, Workspace &copy, int threads);

}  // namespace moesaic
