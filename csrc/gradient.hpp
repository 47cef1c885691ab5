// gw[e] = x^T @ grad over the rows of e: a task is a tile of one matrix, a block of rows at a time.
//
// Both operands are packed: rows become words (pairs of rows, in bf16). The tile of x is laid out row after row as wide
// as the task, so that a strip of it is read at a stride, and grad in panels. While tiles multiply, the rows that are
// packed next are brought in.
#pragma once

#include "pack.hpp"

namespace moesaic::MOESAIC_ISA {

template <class Kind>
static void zero_tile(const Gradient &g, const GradientTask &t) {
  const int64_t size = g.gw_dtype == MOESAIC_BF16 ? 2 : 4;
  for (int64_t r = t.row; r < t.row + t.rows; ++r) {
    char *out = static_cast<char *>(g.gw) + ((t.matrix * g.inner + r) * g.columns + t.column) * size;
    __builtin_memset(out, 0, t.columns * size);
  }
}

// A block of the rows of a task's matrix.
struct RowBlock {
  const GradientTask *task = nullptr;
  int64_t first = 0;
};

template <class Kind>
INLINE int64_t rows_in(const Gradient &g, const RowBlock &b) {
  return least(kGradientWords<Kind> * Kind::kStep,
               g.first_row[b.task->matrix + 1] - g.first_row[b.task->matrix] - b.first);
}

// Where the block's rows of an operand lie.
template <class Kind>
static Ahead rows_region(const Gradient &g, const moesaic_matrix &m, const int64_t *numbers, const RowBlock &b,
                         int64_t column, int64_t columns) {
  const int64_t n = b.task ? rows_in<Kind>(g, b) : 0;
  if (n <= 0 || m.column_stride != 1) return {};
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  const int64_t first = g.first_row[b.task->matrix] + b.first;
  return Ahead::region(element<Kind>(m, numbers ? 0 : first, column), n, columns * kSize, m.row_stride * kSize,
                       numbers ? numbers + first : nullptr);
}

struct GradientScratch {
  char *x, *grad;
  float *sums;
};

// `next` is the block that comes after this one.
template <class Kind>
static void gradient_block(const Gradient &g, const RowBlock &b, const RowBlock &next, const GradientScratch &scratch) {
  const bool is_bf16 = g.gw_dtype == MOESAIC_BF16;
  const int64_t size = is_bf16 ? 2 : 4;
  const GradientTask &t = *b.task;
  const int64_t row = g.first_row[t.matrix] + b.first;
  const int64_t n = rows_in<Kind>(g, b);
  const bool last = row + n == g.first_row[t.matrix + 1];
  const int64_t x_stride = ceil_div(t.rows, kLanes) * kLanes * kWord;
  const int64_t panels = ceil_div(t.columns, kPanel);
  const Strips strips(t.rows);
  Ahead ahead_x, ahead_grad;
  if (next.task) {
    ahead_x = rows_region<Kind>(g, g.x, g.x_rows, next, next.task->row, next.task->rows);
    ahead_grad = rows_region<Kind>(g, g.grad, g.grad_rows, next, next.task->column, next.task->columns);
  }
  Tile tile;
  tile.row_step = x_stride;
  tile.ahead = &ahead_x;
  tile.ahead_rows = &ahead_grad;
  tile.words = ceil_div(n, Kind::kStep);
  const int64_t bursts = panels * strips.count * (tile.words / kUnroll);
  ahead_x.spread(bursts);
  ahead_grad.spread(bursts);
  pack_rows<Kind>(g.x, g.x_rows ? g.x_rows + row : nullptr, row, n, t.row, t.rows, scratch.x, x_stride);
  auto pack = [&](int64_t panel, char *packed) {
    const int64_t column = t.column + panel * kPanel, width = least<int64_t>(kPanel, t.columns - panel * kPanel);
    pack_rows<Kind>(g.grad, g.grad_rows ? g.grad_rows + row : nullptr, row, n, column, width, packed, kPanelBytes);
  };
  auto meet = [&](int64_t panel, const char *packed, int64_t s) {
    const int64_t column = t.column + panel * kPanel, width = least<int64_t>(kPanel, t.columns - panel * kPanel);
    const int64_t r = strips.begin(s);
    const int height = static_cast<int>(strips.begin(s + 1) - r);
    for (int i = 0; i < height; ++i) tile.rows[i] = scratch.x + (r + i) * kWord;
    tile.panel = packed;
    tile.result = {.sums = scratch.sums + (panel * kGradientRows + r) * kPanel,
                   .first = b.first == 0,
                   .last = last,
                   .y = static_cast<char *>(g.gw) + ((t.matrix * g.inner + t.row + r) * g.columns + column) * size,
                   .row_bytes = g.columns * size,
                   .columns = width,
                   .is_bf16 = is_bf16,
                   .around_caches = g.stream && width == kPanel,
                   .adds = g.adds};
    multiply_packed<Kind>(height, width, tile);
  };
  const int64_t packed_bytes = tile.words * kPanelBytes;
  if (panels * tile.words <= kGradientWords<Kind>) {
    // Of few rows all panels have room, and the result is the most of what passes: it is written as it lies.
    for (int64_t panel = 0; panel < panels; ++panel) pack(panel, scratch.grad + panel * packed_bytes);
    for (int64_t s = 0; s < strips.count; ++s) {
      for (int64_t panel = 0; panel < panels; ++panel) meet(panel, scratch.grad + panel * packed_bytes, s);
    }
    return;
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    pack(panel, scratch.grad);
    for (int64_t s = 0; s < strips.count; ++s) meet(panel, scratch.grad, s);
  }
}

}  // namespace moesaic::MOESAIC_ISA
