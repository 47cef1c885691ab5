// gw[e] = x^T @ grad over the rows of e: a task is a tile of one matrix, a block of rows at a time.
//
// Both operands are packed: rows become words (pairs of rows, in bf16). The tile of x is laid out row after row as wide
// as the task, so that a strip of it is read at a stride, and grad in panels.
#pragma once

namespace moesaic::MOESAIC_ISA {

template <class Kind>
static void zero_tile(const Gradient &g, const GradientTask &t, int64_t size) {
  for (int64_t r = t.row; r < t.row + t.rows; ++r) {
    char *out = static_cast<char *>(g.gw) + ((t.matrix * g.inner + r) * g.columns + t.column) * size;
    __builtin_memset(out, 0, t.columns * size);
  }
}

template <class Kind>
static void gradient_tile(const Gradient &g, const GradientTask &t, char *packed_x, char *packed_grad, float *sums) {
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  constexpr int64_t kRows = kGradientWords<Kind> * Kind::kStep;
  const int64_t *rows = g.rows + g.first_row[t.matrix];
  const int64_t num_rows = g.first_row[t.matrix + 1] - g.first_row[t.matrix];
  const int64_t x_stride = ceil_div(t.rows, kLanes) * kLanes * kWord;
  const int64_t panels = ceil_div(t.columns, kPanel);
  const Strips strips(t.rows);
  Ahead nothing;
  Tile tile;
  tile.row_step = x_stride;
  tile.ahead = tile.ahead_rows = &nothing;
  for (int64_t first = 0; first < num_rows; first += kRows) {
    const int64_t n = least(kRows, num_rows - first);
    tile.words = ceil_div(n, Kind::kStep);
    pack_rows<Kind>(g.x, rows + first, 0, n, t.row, t.rows, packed_x, x_stride);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = t.column + panel * kPanel;
      const int64_t width = least<int64_t>(kPanel, t.columns - panel * kPanel);
      pack_rows<Kind>(g.grad, rows + first, 0, n, column, width, packed_grad, kPanelBytes);
      tile.panel = packed_grad;
      tile.result = {nullptr, first == 0, first + n == num_rows, nullptr, g.columns * kSize, width, kSize == 2,
                     g.stream && width == kPanel};
      for (int64_t s = 0; s < strips.count; ++s) {
        const int64_t r = strips.begin(s);
        const int height = static_cast<int>(strips.begin(s + 1) - r);
        for (int i = 0; i < height; ++i) tile.rows[i] = packed_x + (r + i) * kWord;
        tile.result.y =
            static_cast<char *>(g.gw) + ((t.matrix * g.inner + t.row + r) * g.columns + column) * kSize;
        tile.result.sums = sums + (panel * kGradientRows + r) * kPanel;
        multiply_packed<Kind>(height, width, tile);
      }
    }
  }
}

template <class Kind>
static void gradient(const Gradient &g, Counter &counter, char *scratch) {
  char *packed_x = scratch;
  char *packed_grad = packed_x + kGradientWords<Kind> * kGradientRows * kWord;
  float *sums = reinterpret_cast<float *>(packed_grad + kGradientWords<Kind> * kPanelBytes);
  for (int64_t i = counter.next(); i < g.num_tasks; i = counter.next()) {
    const GradientTask &t = g.tasks[i];
    if (g.first_row[t.matrix + 1] == g.first_row[t.matrix]) {
      zero_tile<Kind>(g, t, sizeof(ElementOf<Kind>));
    } else {
      gradient_tile<Kind>(g, t, packed_x, packed_grad, sums);
    }
  }
  _mm_sfence();  // lines written around the caches are seen by whoever waits for this thread
}

}  // namespace moesaic::MOESAIC_ISA
