#include "tasks.hpp"

#include <new>
#include <numeric>

namespace moesaic {
namespace {

constexpr int64_t kTasksPerThread = 4;   // so that no thread is left with the last large task
constexpr int64_t kSmallestSplit = 48;   // rows; fewer would be packed for too little
constexpr int64_t kStreamedBytes = 8 << 20;  // results that fit in a cache are better left there
constexpr int64_t kPooledBytes = 1 << 20;
constexpr int64_t kRowsAtOnce = 64;

}  // namespace

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

Layout layout(const moesaic_weights &w) {
  if (w.scales.format != MOESAIC_PLAIN) return Layout::kStored;
  return w.matrix.column_stride == 1 ? Layout::kRows : w.matrix.row_stride == 1 ? Layout::kColumns : Layout::kApart;
}

// How a product is cut. The order of a sum, and with it the bits of the result, follows from the size of the group alone;
// where tasks begin also from the number of threads.
std::vector<ProductTask> product_tasks(const std::vector<Group> &groups, const std::vector<Group> &padding,
                                       int64_t columns, const Kernels &k, Layout w, Limits limits, int threads) {
  const int64_t panel = k.panel, panels = ceil_div(columns, panel);
  int64_t most_rows = kProductRows, most_panels = limits.wide_panels;
  const int64_t placed_panels = (limits.keeps_sums ? k.kept_columns : kPlacedColumns) / panel;
  const bool in_rows = w == Layout::kRows, in_columns = w == Layout::kColumns;
  auto on_tiles = [&](const Group &g) { return k.has_tiles && w != Layout::kStored && g.rows > k.height; };
  auto is_placed = [&](const Group &g) { return (in_rows || in_columns) && g.rows <= k.height; };
  auto is_wide = [&](const Group &g) { return on_tiles(g) || ((in_rows || in_columns) && g.rows <= kWideRows); };
  auto words = [&](const Group &g) { return in_rows && is_wide(g) && !on_tiles(g) ? k.wide_words : k.block_words; };
  // Where weights are read in several places, long pieces are the fastest. So only groups that are left over when all
  // threads have as many as each other are cut, and these so that all threads have as many pieces.
  const int64_t left_over = groups.size() % threads, shared_from = groups.size() - left_over;
  const int64_t pieces = left_over ? threads / std::gcd<int64_t>(threads, left_over) : 1;
  auto width = [&](const Group &g) {
    if (!panels) return int64_t{1};
    if (is_placed(g)) {
      const int64_t tasks = ceil_div(panels, placed_panels);
      const bool is_shared = &g - groups.data() >= shared_from;
      return ceil_div(panels, is_shared ? std::max(tasks, pieces) : tasks);
    }
    return is_wide(g) ? most_panels : int64_t{1};
  };
  auto parts = [&](const Group &g) {
    return ceil_div(g.rows, on_tiles(g) ? std::min(most_rows, kTileTaskRows) : most_rows);
  };
  auto count = [&] {
    int64_t n = 0;
    for (const Group &g : groups) n += parts(g) * ceil_div(panels, width(g));
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
    const int64_t rows_in_parts = parts(g), step = width(g) * panel, steps = ceil_div(columns, step);
    for (int64_t i = 0; i < rows_in_parts * steps; ++i) {
      // On tiles all rows meet some columns before the next ones, which then are in the cache.
      const int64_t part = on_tiles(g) ? i % rows_in_parts : i / steps;
      const int64_t c = (on_tiles(g) ? i / rows_in_parts : i % steps) * step;
      const int64_t begin = part * g.rows / rows_in_parts, end = (part + 1) * g.rows / rows_in_parts;
      tasks.push_back({.first_row = g.first_row + begin,
                       .rows = end - begin,
                       .matrix = g.matrix,
                       .column = c,
                       .columns = std::min(step, columns - c),
                       .block_words = words(g)});
    }
  }
  for (const Group &g : padding) {
    for (int64_t r = 0; r < g.rows; r += kProductRows) {
      tasks.push_back({.first_row = g.first_row + r,
                       .rows = std::min(kProductRows, g.rows - r),
                       .matrix = -1,
                       .column = 0,
                       .columns = columns,
                       .block_words = 0});
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
        tasks.push_back({.matrix = m,
                         .row = begin,
                         .rows = end - begin,
                         .column = c,
                         .columns = std::min(kGradientColumns, columns - c)});
      }
    }
  }
  return tasks;
}

bool is_streamed(const void *result, int64_t row_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(result) % 64 == 0 && row_bytes % 64 == 0 && bytes >= kStreamedBytes;
}

char *Workspace::take(int64_t bytes) {
  release();
  pooled_ = bytes >= kPooledBytes;
  // Never NULL for no bytes at all.
  data_ = static_cast<char *>(pooled_ ? moesaic_pool_take(bytes) : malloc(std::max<int64_t>(bytes, 1)));
  if (!data_) throw std::bad_alloc();
  return data_;
}

void Workspace::release() {
  if (pooled_) {
    moesaic_pool_give(data_);
  } else {
    free(data_);
  }
  data_ = nullptr;
}

void as_words(moesaic_matrix &x, int64_t rows, int64_t inner, const Kernels &k, Workspace &copy, int threads) {
  if (x.column_stride == 1 && !k.widens && inner % k.step == 0 && x.row_stride % k.step == 0) {
    x.row_stride /= k.step;
    return;
  }
  const int64_t words = ceil_div(inner, k.step), chunks = ceil_div(rows, kRowsAtOnce);
  char *out = copy.take(rows * words * 4);
  TaskNumbers numbers(chunks, threads);
  in_parallel(static_cast<int>(std::min<int64_t>(threads, chunks)), [&] {
    Counter counter(numbers);
    for (int64_t i = counter.next(); i < chunks; i = counter.next()) {
      const int64_t end = std::min(rows, (i + 1) * kRowsAtOnce);
      for (int64_t r = i * kRowsAtOnce; r < end; ++r) k.words(x, r, inner, out + r * words * 4);
    }
  });
  x = {out, words, 1};
}

}  // namespace moesaic
