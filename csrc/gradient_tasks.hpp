// The tasks of the weight gradient, each a block of rows at a time.
#pragma once

#include "amx_gradient.hpp"
#include "gradient.hpp"

namespace moesaic::MOESAIC_ISA {

template <class Kind>
static void gradient(const Gradient &g, Counter &counter, char *memory) {
  constexpr int64_t kRows = kGradientWords<Kind> * Kind::kStep;
  GradientScratch scratch;
  TilesOf<Kind> tiles;
  scratch.x = memory;
  scratch.grad = memory + kGradientWords<Kind> * kGradientRows * kWord;
  scratch.sums = reinterpret_cast<float *>(scratch.grad + kGradientWords<Kind> * kPanelBytes);
  // A task is claimed one ahead, so that its rows can be brought in.
  for (int64_t i = counter.next(), next; i < g.num_tasks; i = next) {
    next = counter.next();
    const GradientTask &t = g.tasks[i];
    const int64_t rows = g.first_row[t.matrix + 1] - g.first_row[t.matrix];
    if (!rows && !g.adds) zero_tile<Kind>(g, t);
    for (int64_t first = 0; first < rows; first += kRows) {
      RowBlock after;
      if (first + kRows < rows) {
        after = {&t, first + kRows};
      } else if (next < g.num_tasks) {
        after = {&g.tasks[next], 0};
      }
      if constexpr (kHasTiles<Kind>) {
        if (rows > kFewTileRows) {
          tile_gradient_block<Kind>(tiles, g, {&t, first}, after, memory);
          continue;
        }
      }
      gradient_block<Kind>(g, {&t, first}, after, scratch);
    }
  }
  _mm_sfence();  // lines written around the caches are seen by whoever waits for this thread
}

}  // namespace moesaic::MOESAIC_ISA
