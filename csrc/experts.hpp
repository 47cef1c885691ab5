// The experts' kernels: what becomes of the sums of a product before they leave the cache.
#pragma once

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kKeptSums =
    (kKeptRows > kWideRows * kKeptPanels ? kKeptRows : kWideRows * kKeptPanels) * kPanel;  // of one product

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

// A panel of an expert's bias as fp32.
template <class Kind>
static void read_bias(const moesaic_matrix &b, int64_t expert, int64_t column, int64_t width, float *out) {
  for (int64_t c = 0; c < width; ++c) {
    const ElementOf<Kind> *p = element<Kind>(b, expert, column + c);
    store_elements(out + c, load_elements(p, 1), 1);
  }
}

// h = act(x @ w1 + b1) * (x @ w3 + b3) of one panel of a task.
template <class Kind>
static void up_panel(const Up &u, const ProductTask &t, int64_t first, const float *gate, const float *up) {
  using Element = ElementOf<Kind>;
  const int64_t hidden = u.gate.columns, column = t.column + first;
  const int64_t width = least<int64_t>(kPanel, t.columns - first);
  float b1[kPanel], b3[kPanel];
  if (u.b1.data) read_bias<Kind>(u.b1, t.matrix, column, width, b1);
  if (u.b3.data) read_bias<Kind>(u.b3, t.matrix, column, width, b3);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, slot = u.slots[row];
    Element *h = at<Kind>(u.h, row, u.h_stride, column);
    Element *h1 = at<Kind>(u.h1, slot, hidden, column), *h3 = at<Kind>(u.h3, slot, hidden, column);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t here = width - c;
      Reg a = load_f32(gate + r * kPanel + c, here);
      if (u.b1.data) a = add(a, load_f32(b1 + c, here));
      a = rounded_to(h, a);  // as it is saved, so that both passes mean the same function
      if (h1) store_elements(h1 + c, a, here);
      Reg v = activate(u.activation, a);
      if (up) {
        Reg b = load_f32(up + r * kPanel + c, here);
        if (u.b3.data) b = add(b, load_f32(b3 + c, here));
        b = rounded_to(h, b);
        if (h3) store_elements(h3 + c, b, here);
        v = mul(v, b);
      }
      store_elements(h + c, v, here);
    }
    if (column + width == hidden) end_row<Kind>(at<Kind>(u.h, row, u.h_stride, 0), hidden);
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
    for (int64_t c = 0; c < t.columns; c += kPanel) {
      up_panel<Kind>(u, t, c, gate + c * t.rows, gated ? up + c * t.rows : nullptr);
    }
  }
}

// From the gradient of h of one panel of a task, those of h1 and h3, and the panel's part of those of the weights.
template <class Kind>
static void down_panel(const Down &d, const ProductTask &t, int64_t first, const float *sums) {
  using Element = ElementOf<Kind>;
  const int64_t hidden = d.product.columns, column = t.column + first;
  const int64_t width = least<int64_t>(kPanel, t.columns - first);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, slot = d.slots[row];
    const Element *h1 = at<Kind>(d.h1, slot, hidden, column), *h3 = at<Kind>(d.h3, slot, hidden, column);
    Element *dh1 = at<Kind>(d.dh1, row, d.stride, column), *dh3 = at<Kind>(d.dh3, row, d.stride, column);
    Element *h = at<Kind>(d.h, row, d.stride, column);
    const Reg weight = all(d.weights[slot]);
    Reg dot = zero();
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t here = width - c;
      const Activated a = activate_with_slope(d.activation, load_elements(h1 + c, here));
      const Reg up = h3 ? load_elements(h3 + c, here) : all(1.f);
      const Reg value = mul(a.value, up);
      if (h) store_elements(h + c, mul(weight, value), here);
      if (!sums) continue;
      const Reg u = load_f32(sums + r * kPanel + c, here);
      dot = fma(u, rounded_to(h1, value), dot);
      const Reg dh = mul(weight, u);
      if (dh1) store_elements(dh1 + c, mul(mul(dh, up), a.slope), here);
      if (dh3) store_elements(dh3 + c, mul(dh, a.value), here);
    }
    if (d.dots) d.dots[row * ceil_div(hidden, kPanel) + column / kPanel] = total(dot);
    if (column + width < hidden) continue;
    if (dh1) end_row<Kind>(at<Kind>(d.dh1, row, d.stride, 0), hidden);
    if (dh3) end_row<Kind>(at<Kind>(d.dh3, row, d.stride, 0), hidden);
  }
}

template <class Kind>
static void down(const Down &d, Counter &counter, char *scratch) {
  float *sums = reinterpret_cast<float *>(scratch + kProductScratch<Kind>);
  const Product &p = d.product;
  for (int64_t i = counter.next(), after; i < d.num_tasks; i = after) {
    after = counter.next();
    const ProductTask &t = p.tasks[i];
    const ProductTask *next = after < d.num_tasks ? &p.tasks[after] : nullptr;
    const bool has_product = p.num_terms > 0;
    if (has_product) product_task<Kind>(p, t, p, next, sums, scratch);
    for (int64_t c = 0; c < t.columns; c += kPanel) {
      down_panel<Kind>(d, t, c, has_product ? sums + c * t.rows : nullptr);
    }
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
