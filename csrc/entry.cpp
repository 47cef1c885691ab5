// The C entry points: checks, task lists, and the choice of kernels.
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "problem.hpp"
#include "threads.hpp"

namespace moesaic {
namespace {

constexpr int64_t kTasksPerThread = 4;   // so that no thread is left with the last large task
constexpr int64_t kSmallestSplit = 48;   // rows; fewer would be packed for too little
constexpr int64_t kStreamedBytes = 8 << 20;  // results that fit in a cache are better left there

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? MOESAIC_ISA_AVX512_BF16 : MOESAIC_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MOESAIC_ISA_AVX2;
#endif
  return MOESAIC_ISA_NONE;
}

const Kernels *kernels(int dtype, int isa) {
  static const int best = best_isa();
  if (isa > best || (dtype != MOESAIC_F32 && dtype != MOESAIC_BF16)) return nullptr;
  const bool f32 = dtype == MOESAIC_F32;
  switch (isa) {
    case MOESAIC_ISA_AVX2: return f32 ? &avx2::f32 : &avx2::bf16;
    case MOESAIC_ISA_AVX512: return f32 ? &avx512::f32 : &avx512::bf16;
    case MOESAIC_ISA_AVX512_BF16: return f32 ? &avx512_bf16::f32 : &avx512_bf16::bf16;
    default: return nullptr;
  }
}

struct Group {
  int64_t first_row, rows, matrix;
};

// The groups that have rows; false where sizes do not fit.
bool read_groups(const moesaic_groups &g, std::vector<Group> &groups, std::vector<Group> &padding) {
  const int64_t capacity = g.blocks ? g.rows / g.blocks : g.rows;
  if (!g.blocks && g.rows) padding.push_back({0, g.rows, -1});
  for (int64_t b = 0; b < g.blocks; ++b) {
    int64_t used = 0;
    for (int64_t i = 0; i < g.groups; ++i) {
      const int64_t size = g.sizes[b * g.groups + i];
      const int64_t matrix = g.shared ? i : b * g.groups + i;
      if (size < 0 || size > capacity - used || (size && matrix >= g.matrices)) return false;
      if (size) groups.push_back({b * capacity + used, size, matrix});
      used += size;
    }
    if (used < capacity) padding.push_back({b * capacity + used, capacity - used, -1});
  }
  return true;
}

// How a product is cut. The order of a sum, and with it the bits of the result, follows from the size of the group alone;
// where tasks begin also from the number of threads.
std::vector<ProductTask> product_tasks(const std::vector<Group> &groups, const std::vector<Group> &padding,
                                       int64_t columns, const Kernels &k, const moesaic_matrix &w, int threads) {
  const int64_t panel = k.panel, panels = ceil_div(columns, panel);
  int64_t most_rows = kProductRows, most_panels = kWidePanels;
  const bool in_rows = w.column_stride == 1, in_columns = !in_rows && w.row_stride == 1;
  auto is_wide = [&](const Group &g) { return (in_rows || (in_columns && g.rows > kFewRows)) && g.rows <= kWideRows; };
  auto words = [&](const Group &g) {
    if (!in_rows || !is_wide(g)) return k.block_words;
    return g.rows <= k.height ? kOneTileWords : kWideWords;
  };
  auto count = [&] {
    int64_t n = 0;
    for (const Group &g : groups) n += ceil_div(g.rows, most_rows) * (is_wide(g) ? ceil_div(panels, most_panels) : panels);
    return n;
  };
  while (threads > 1 && most_rows >= 2 * kSmallestSplit && count() < kTasksPerThread * threads) {
    if (most_panels > 1) {
      most_panels /= 2;
    } else {
      most_rows /= 2;
    }
  }
  std::vector<ProductTask> tasks;
  tasks.reserve(count() + padding.size());
  for (const Group &g : groups) {
    const int64_t parts = ceil_div(g.rows, most_rows);
    const int64_t width = (is_wide(g) ? most_panels : 1) * panel;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * g.rows / parts, end = (part + 1) * g.rows / parts;
      for (int64_t c = 0; c < columns; c += width) {
        tasks.push_back({g.first_row + begin, end - begin, g.matrix, c, std::min(width, columns - c),
                         words(g)});
      }
    }
  }
  for (const Group &g : padding) {
    for (int64_t r = 0; r < g.rows; r += kProductRows) {
      tasks.push_back({g.first_row + r, std::min(kProductRows, g.rows - r), -1, 0, columns, 0});
    }
  }
  return tasks;
}

std::vector<GradientTask> gradient_tasks(int64_t matrices, int64_t inner, int64_t columns) {
  const int64_t parts = ceil_div(inner, kGradientRows), wide = ceil_div(columns, kGradientColumns);
  std::vector<GradientTask> tasks;
  tasks.reserve(matrices * parts * wide);
  for (int64_t m = 0; m < matrices; ++m) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = i * inner / parts, end = (i + 1) * inner / parts;
      for (int64_t c = 0; c < columns; c += kGradientColumns) {
        tasks.push_back({m, begin, end - begin, c, std::min(kGradientColumns, columns - c)});
      }
    }
  }
  return tasks;
}

// Run a kernel on all threads; each gets scratch memory.
template <class Problem>
int run(void (*kernel)(const Problem &, Counter &, char *), const Problem &problem, int64_t scratch_bytes,
        int threads) {
  Counter counter;
  bool failed = false;
  in_parallel(static_cast<int>(std::min<int64_t>(threads, problem.num_tasks)), [&] {
    char *memory = scratch(scratch_bytes);
    if (memory) {
      kernel(problem, counter, memory);
    } else {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
  });
  // A thread without scratch memory has left its tasks to the others; if no thread had any, tasks are left.
  return failed && counter.next() < problem.num_tasks ? MOESAIC_OUT_OF_MEMORY : MOESAIC_OK;
}

struct Free {
  void operator()(void *p) const { free(p); }
};

// x as rows of whole words, where it lies if it is that already.
bool words_in_place(const moesaic_matrix &x, int64_t inner, const Kernels &k) {
  return x.column_stride == 1 && !k.widens && inner % k.step == 0 && x.row_stride % k.step == 0;
}

int grouped_mm(const moesaic_groups &groups, moesaic_matrix x, const moesaic_matrix &w, int64_t w_stride, void *y,
               int64_t inner, int64_t columns, int y_dtype, const Kernels &k, int threads) {
  std::vector<Group> filled, padding;
  if (!read_groups(groups, filled, padding)) return MOESAIC_BAD_GROUPS;
  if (!columns) return MOESAIC_OK;
  if (!inner) {
    padding.assign(1, {0, groups.rows, -1});
    filled.clear();
  }
  std::unique_ptr<char, Free> copy;
  if (!filled.empty()) {
    if (words_in_place(x, inner, k)) {
      x.row_stride /= k.step;
    } else {
      const int64_t words = ceil_div(inner, k.step);
      copy.reset(static_cast<char *>(malloc(groups.rows * words * 4)));
      if (!copy) return MOESAIC_OUT_OF_MEMORY;
      Counter counter;
      in_parallel(threads, [&] {
        for (int64_t i = counter.next(); i < static_cast<int64_t>(filled.size()); i = counter.next()) {
          for (int64_t r = filled[i].first_row; r < filled[i].first_row + filled[i].rows; ++r) {
            k.words(x, r, inner, copy.get() + r * words * 4);
          }
        }
      });
      x = {copy.get(), words, 1};
    }
  }
  const auto tasks = product_tasks(filled, padding, columns, k, w, threads);
  const Product problem{x, w, w_stride, y, inner, columns, y_dtype, tasks.data(), static_cast<int64_t>(tasks.size())};
  return run(k.product, problem, k.scratch_bytes, threads);
}

int weight_grad(const moesaic_groups &groups, const moesaic_matrix &x, const moesaic_matrix &grad, void *gw,
                int64_t inner, int64_t columns, int dtype, const Kernels &k, int threads) {
  std::vector<Group> filled, padding;
  if (!read_groups(groups, filled, padding)) return MOESAIC_BAD_GROUPS;
  if (!inner || !columns) return MOESAIC_OK;
  std::vector<int64_t> first(groups.matrices + 1, 0);
  for (const Group &g : filled) first[g.matrix + 1] += g.rows;
  for (int64_t m = 0; m < groups.matrices; ++m) first[m + 1] += first[m];
  std::vector<int64_t> rows(first[groups.matrices]), at(first.begin(), first.end() - 1);
  for (const Group &g : filled) {
    for (int64_t r = 0; r < g.rows; ++r) rows[at[g.matrix]++] = g.first_row + r;
  }
  const auto tasks = gradient_tasks(groups.matrices, inner, columns);
  const int64_t size = dtype == MOESAIC_BF16 ? 2 : 4;
  const bool stream = reinterpret_cast<uintptr_t>(gw) % 64 == 0 && columns * size % 64 == 0 &&
                      groups.matrices * inner * columns * size >= kStreamedBytes;
  const Gradient problem{x, grad, gw, inner, columns, rows.data(), first.data(), tasks.data(),
                         static_cast<int64_t>(tasks.size()), stream};
  return run(k.gradient, problem, k.scratch_bytes, threads);
}

}  // namespace
}  // namespace moesaic

extern "C" {

int moesaic_cpu_abi(void) { return MOESAIC_CPU_ABI; }

int moesaic_cpu_isa(void) { return moesaic::best_isa(); }

int moesaic_cpu_grouped_mm(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix w, int64_t w_stride, void *y,
                           int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  if (!k || (y_dtype != MOESAIC_F32 && y_dtype != MOESAIC_BF16)) return MOESAIC_BAD_ARGUMENT;
  return moesaic::grouped_mm(*groups, x, w, w_stride, y, inner, columns, y_dtype, *k, threads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_weight_grad(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix grad, void *gw,
                            int64_t inner, int64_t columns, int dtype, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  return moesaic::weight_grad(*groups, x, grad, gw, inner, columns, dtype, *k, threads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

double moesaic_cpu_spin(int64_t rounds, int dtype, int isa) {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  return k ? k->spin(rounds) : 0;
}
}
