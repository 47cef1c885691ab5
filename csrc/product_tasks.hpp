// The tasks of a product, each done in the way that suits its rows and the layout of its weights.
#pragma once

namespace moesaic::MOESAIC_ISA {

template <class Kind>
static void zero_rows(const Product &p, const ProductTask &t) {
  const int64_t y_size = p.y_dtype == MOESAIC_BF16 ? 2 : 4;
  __builtin_memset(static_cast<char *>(p.y) + t.first_row * p.columns * y_size, 0, t.rows * p.columns * y_size);
}

template <class Kind>
static void product(const Product &p, Counter &counter, char *scratch) {
  char *packed = scratch;
  float *sums = reinterpret_cast<float *>(scratch + kProductWords<Kind> * kPanelBytes);
  // A task is claimed one ahead, so that its panel can be brought in.
  for (int64_t i = counter.next(), next; i < p.num_tasks; i = next) {
    next = counter.next();
    const ProductTask &t = p.tasks[i];
    if (t.matrix < 0) {
      zero_rows<Kind>(p, t);
    } else if (takes_dots(p, t)) {
      switch (t.rows) {
        case 1: dots<Kind, 1>(p, t); break;
        case 2: dots<Kind, 2>(p, t); break;
        case 3: dots<Kind, 3>(p, t); break;
        default: dots<Kind, 4>(p, t);
      }
    } else if (takes_turn<Kind>(p, t)) {
      turned_product<Kind>(p, t, next < p.num_tasks ? &p.tasks[next] : nullptr, scratch);
    } else {
      const int64_t blocks = num_blocks<Kind>(p, t);
      for (int64_t b = 0; b < blocks; ++b) {
        Ahead ahead;
        if (b + 1 < blocks) {
          ahead = weight_region<Kind>(p, t, b + 1);
        } else if (next < p.num_tasks) {
          ahead = weight_region<Kind>(p, p.tasks[next], 0);
        }
        multiply_block<Kind>(p, t, b, ahead, packed, sums);
      }
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
