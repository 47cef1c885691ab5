// The experts' kernels: what becomes of the sums of a product before they leave the cache.
#pragma once

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kKeptSums =
    (kProductRows > kWideRows * kKeptPanels ? kProductRows : kWideRows * kKeptPanels) * kPanel;  // of one product

// Rows of a task are each at another place in memory; they are brought in before they are needed.
INLINE int64_t rows_ahead(int64_t row_bytes) { return row_bytes <= 256 ? 16 : 8; }

template <bool WRITE>
INLINE void bring_row(const void *row, int64_t bytes) {
  if (!row) return;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char *>(row) + b, WRITE);
}

template <class Kind>
INLINE ElementOf<Kind> *at(void *rows, int64_t row, int64_t stride, int64_t column) {
  return rows ? static_cast<ElementOf<Kind> *>(rows) + row * stride + column : nullptr;
}
template <class Kind>
INLINE const ElementOf<Kind> *at(const void *rows, int64_t row, int64_t stride, int64_t column) {
  return rows ? static_cast<const ElementOf<Kind> *>(rows) + row * stride + column : nullptr;
}

// Rows of pairs of elements end with a zero where the elements are odd.
template <class Kind>
INLINE void end_row(ElementOf<Kind> *row, int64_t columns) {
  if (Kind::kStep == 2 && columns % 2) row[columns] = 0;
}

// An expert's bias of a task's columns as fp32.
template <class Kind>
static void read_bias(const moesaic_matrix &b, const ProductTask &t, float *out) {
  for (int64_t c = 0; b.data && c < t.columns; ++c) {
    const ElementOf<Kind> *p = element<Kind>(b, t.matrix, t.column + c);
    store_elements(out + c, load_elements(p, 1), 1);
  }
}

// h = hidden(x @ w1 + b1, x @ w3 + b3) for the rows and columns of a task.
template <class Kind>
static void finish_up(const Up &u, const ProductTask &t, const float *gate, const float *up) {
  using Element = ElementOf<Kind>;
  const int64_t width = u.gate.columns, bytes = t.columns * sizeof(Element), ahead = rows_ahead(bytes);
  float b1[2 * kKeptPanels * kPanel], b3[2 * kKeptPanels * kPanel];
  read_bias<Kind>(u.b1, t, b1);
  read_bias<Kind>(u.b3, t, b3);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, slot = u.slots[row];
    if (r + ahead < t.rows) {
      bring_row<true>(at<Kind>(u.h, row + ahead, u.h_stride, t.column), bytes);
      bring_row<true>(at<Kind>(u.h1, u.slots[row + ahead], width, t.column), bytes);
      bring_row<true>(at<Kind>(u.h3, u.slots[row + ahead], width, t.column), bytes);
    }
    Element *h = at<Kind>(u.h, row, u.h_stride, t.column);
    Element *h1 = at<Kind>(u.h1, slot, width, t.column), *h3 = at<Kind>(u.h3, slot, width, t.column);
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      const int64_t here = t.columns - c, kept = (c / kPanel * t.rows + r) * kPanel + c % kPanel;
      Reg a = load_f32(gate + kept, here);
      if (u.b1.data) a = add(a, load_f32(b1 + c, here));
      a = rounded_to(h, a);  // as it is saved, so that both passes mean the same function
      if (h1) store_elements(h1 + c, a, here);
      Reg b = all(1.f);
      if (up) {
        b = load_f32(up + kept, here);
        if (u.b3.data) b = add(b, load_f32(b3 + c, here));
        b = rounded_to(h, b);
        if (h3) store_elements(h3 + c, b, here);
      }
      store_elements(h + c, hidden(u.activation, a, b), here);
    }
    if (t.column + t.columns == width) end_row<Kind>(at<Kind>(u.h, row, u.h_stride, 0), width);
  }
}

template <class Kind>
static void up(const Up &u, Counter &counter, char *scratch) {
  float *gate = reinterpret_cast<float *>(scratch + kProductScratch<Kind>), *up = gate + kKeptSums;
  const bool gated = u.up.num_terms > 0;
  for (int64_t i = counter.next(), after; i < u.num_tasks; i = after) {
    after = counter.next();
    const ProductTask &t = u.gate.tasks[i];
    const ProductTask *next = after < u.num_tasks ? &u.gate.tasks[after] : nullptr;
    product_task<Kind>(u.gate, t, gated ? u.up : u.gate, gated ? &t : next, gate, scratch);
    if (gated) product_task<Kind>(u.up, t, u.gate, next, up, scratch);
    finish_up<Kind>(u, t, gate, gated ? up : nullptr);
  }
}

// From the gradient of h those of h1 and h3, and the columns' part of those of the weights.
template <class Kind>
static void finish_down(const Down &d, const ProductTask &t, const float *sums) {
  using Element = ElementOf<Kind>;
  const int64_t width = d.product.columns, bytes = t.columns * sizeof(Element), ahead = rows_ahead(bytes);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, slot = d.slots[row];
    if (r + ahead < t.rows) {
      bring_row<false>(at<Kind>(d.h1, d.slots[row + ahead], width, t.column), bytes);
      bring_row<false>(at<Kind>(d.h3, d.slots[row + ahead], width, t.column), bytes);
      bring_row<true>(at<Kind>(d.dh1, row + ahead, d.stride, t.column), bytes);
      bring_row<true>(at<Kind>(d.dh3, row + ahead, d.stride, t.column), bytes);
      bring_row<true>(at<Kind>(d.h, row + ahead, d.stride, t.column), bytes);
    }
    const Element *h1 = at<Kind>(d.h1, slot, width, t.column), *h3 = at<Kind>(d.h3, slot, width, t.column);
    Element *dh1 = at<Kind>(d.dh1, row, d.stride, t.column), *dh3 = at<Kind>(d.dh3, row, d.stride, t.column);
    Element *h = at<Kind>(d.h, row, d.stride, t.column);
    const Reg weight = all(d.weights[slot]);
    for (int64_t panel = 0; panel < t.columns; panel += kPanel) {
      Reg dot = zero();
      for (int64_t c = panel; c < least(t.columns, panel + kPanel); c += kLanes) {
        const int64_t here = t.columns - c;
        const Reg up = h3 ? load_elements(h3 + c, here) : all(1.f);
        const Hidden a = hidden_with_slopes(d.activation, load_elements(h1 + c, here), up);
        if (h) store_elements(h + c, mul(weight, a.value), here);
        if (!sums) continue;
        const Reg u = load_f32(sums + (panel / kPanel * t.rows + r) * kPanel + c % kPanel, here);
        dot = fma(u, rounded_to(h1, a.value), dot);
        const Reg dh = mul(weight, u);
        if (dh1) store_elements(dh1 + c, mul(dh, a.slope1), here);
        if (dh3) store_elements(dh3 + c, mul(dh, a.slope3), here);
      }
      if (d.dots) d.dots[row * ceil_div(width, kPanel) + (t.column + panel) / kPanel] = total(dot);
    }
    if (t.column + t.columns < width) continue;
    if (dh1) end_row<Kind>(at<Kind>(d.dh1, row, d.stride, 0), width);
    if (dh3) end_row<Kind>(at<Kind>(d.dh3, row, d.stride, 0), width);
  }
}

template <class Kind>
static void down(const Down &d, Counter &counter, char *scratch) {
  float *sums = reinterpret_cast<float *>(scratch + kProductScratch<Kind>);
  const Product &p = d.product;
  const bool has_product = p.num_terms > 0;
  for (int64_t i = counter.next(), after; i < d.num_tasks; i = after) {
    after = counter.next();
    const ProductTask &t = p.tasks[i];
    if (has_product) product_task<Kind>(p, t, p, after < d.num_tasks ? &p.tasks[after] : nullptr, sums, scratch);
    finish_down<Kind>(d, t, has_product ? sums : nullptr);
  }
}

template <class Kind>
static void combine(const Combine &m, Counter &counter, char *) {
  using Element = ElementOf<Kind>;
  for (int64_t i = counter.next(); i < m.num_tasks; i = counter.next()) {
    const int64_t first = i * m.tokens_at_once, last = least(m.tokens, first + m.tokens_at_once);
    for (int64_t t = first; t < last; ++t) {
      Element *z = at<Kind>(m.z, t, m.columns, 0);
      for (int64_t c = 0; c < m.columns; c += kPanel) {
        const int64_t width = least<int64_t>(kPanel, m.columns - c);
        Reg sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = zero();
        for (int64_t k = t * m.copies; k < (t + 1) * m.copies; ++k) {
          if (m.positions[k] < 0) continue;
          const Element *y = at<Kind>(m.y, m.positions[k], m.columns, c);
          const Reg weight = all(m.weights ? m.weights[k] : 1.f);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            if (v * kLanes < width) sum[v] = fma(weight, load_elements(y + v * kLanes, width - v * kLanes), sum[v]);
          }
        }
        for (int v = 0; v < kVectors && v * kLanes < width; ++v) {
          store_elements(z + c + v * kLanes, sum[v], width - v * kLanes);
        }
      }
    }
  }
}

template <class Kind>
static void row_sums(const RowSums &s, Counter &counter, char *) {
  constexpr int64_t kRowsAtOnce = 64;  // a long fp32 sum loses digits
  for (int64_t e = counter.next(); e < s.num_tasks; e = counter.next()) {
    for (int64_t c = 0; c < s.columns; c += kLanes) {
      const int64_t here = s.columns - c;
      Reg sum = zero();
      for (int64_t first = s.first_row[e]; first < s.first_row[e + 1]; first += kRowsAtOnce) {
        Reg part = zero();
        for (int64_t r = first; r < least(s.first_row[e + 1], first + kRowsAtOnce); ++r) {
          part = add(part, load_elements(at<Kind>(s.rows, r, s.stride, c), here));
        }
        sum = add(sum, part);
      }
      store_elements(at<Kind>(s.sums, e, s.columns, c), sum, here);
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
