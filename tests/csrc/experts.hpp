// Random problems for the experts' entry points, against a loop over copies of tokens.
//
// With relu every value is a small number that both types hold, or is rounded at the same places: results have the bits
// of the loop's. Of the other activations it is only asked that they write all of their results and nothing else.
#pragma once

#include <algorithm>
#include <cmath>

#include "operands.hpp"
#include "stored.hpp"

namespace {

float rounded(float v, int dtype) {
  char bits[4];
  put(bits, 0, v, dtype);
  return get(bits, 0, dtype);
}

// Matrices of experts, plain or stored in a format.
struct Matrices {
  Operand plain;
  StoredOperand stored;

  float at(int64_t m, int64_t r, int64_t c) const { return stored.format ? stored.at(m, r, c) : plain.at(m, r, c); }
  moesaic_weights given() const {
    return stored.format ? stored.weights() : moesaic_weights{plain.matrix, plain.stride, {}};
  }
};

Matrices draw_matrices(int64_t experts, int64_t inner, int64_t columns, int dtype, int format) {
  Matrices m;
  if (format) {
    m.stored = stored(experts, inner, columns, format, true);
  } else {
    m.plain = operand(experts, inner, columns, dtype, 1);
  }
  return m;
}

struct ExpertsProblem {
  int64_t T, K, E, D, F;
  int dtype, activation, format;
  bool gated, biased;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  Operand x, b1, b3, b2, grad;
  Matrices w1, w3, w2;

  bool here(int64_t slot) const { return ids[slot] >= 0 && ids[slot] < E; }
};

ExpertsProblem draw_experts() {
  ExpertsProblem p;
  const std::vector<int64_t> dims = {1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 97, 130, 200};
  p.T = pick({0, 1, 2, 3, 5, 8, 13, 70, 220});
  p.K = draw(1, 4);
  p.E = draw(1, 6);
  p.D = pick(dims);
  p.F = pick(dims);
  if (p.T > 20) p.D = pick({1, 17, 33}), p.F = pick({2, 16, 65});
  if (p.T <= 20 && !draw(0, 15)) p.D = 1100, p.F = pick({1, 17});  // a bias's gradient in more than one task
  p.format = static_cast<int>(draw(0, 2) ? int64_t{MOESAIC_PLAIN} : draw(MOESAIC_INT8, MOESAIC_MXFP4));
  if (block_of(p.format) > 1) p.D = 64 * draw(1, 3), p.F = 64 * draw(1, p.T > 20 ? 1 : 3);
  p.dtype = static_cast<int>(draw(0, 1));
  p.activation = draw(0, 1) ? MOESAIC_RELU : static_cast<int>(draw(0, MOESAIC_NUM_ACTIVATIONS - 1));
  p.gated = draw(0, 3) || p.activation == MOESAIC_CLAMPED_SWIGLU;
  p.biased = draw(0, 1);
  const int64_t kind = draw(0, 3);
  for (int64_t s = 0; s < p.T * p.K; ++s) {
    p.ids.push_back(kind == 0 ? 0 : kind == 1 ? draw(-1, p.E) : draw(0, p.E - 1));
    p.weights.push_back(std::ldexp(1.f, static_cast<int>(draw(-1, 1))));
  }
  p.x = operand(1, p.T, p.D, p.dtype, 1);
  p.w1 = draw_matrices(p.E, p.D, p.F, p.dtype, p.format);
  p.w3 = draw_matrices(p.E, p.D, p.F, p.dtype, p.format);
  p.w2 = draw_matrices(p.E, p.F, p.D, p.dtype, p.format);
  p.b1 = operand(1, p.E, p.F, p.dtype, 2);
  p.b3 = operand(1, p.E, p.F, p.dtype, 2);
  p.b2 = operand(1, p.E, p.D, p.dtype, 2);
  for (int64_t e = 0; e < p.E; ++e) {
    if (std::find(p.ids.begin(), p.ids.end(), e) != p.ids.end()) continue;
    // No token goes to this expert, so no result may be of its biases.
    for (const Operand *b : {&p.b1, &p.b3, &p.b2}) {
      for (int64_t c = 0; c < (b == &p.b2 ? p.D : p.F); ++c) b->set(0, e, c, NAN);
    }
  }
  p.grad = operand(1, p.T, p.D, p.dtype, 1);
  return p;
}

// What each result is by the loop, in the order of the arguments.
struct ExpertsResults {
  std::vector<float> z, h1, h3, gx, gweights, gw1, gw3, gw2, gb1, gb3, gb2;
};

ExpertsResults by_loop(const ExpertsProblem &p) {
  ExpertsResults r;
  r.z.assign(p.T * p.D, 0.f), r.gx = r.z;
  r.h1.assign(p.T * p.K * p.F, 0.f), r.h3 = r.h1;
  r.gweights.assign(p.T * p.K, 0.f);
  r.gw1.assign(p.E * p.D * p.F, 0.f), r.gw3 = r.gw1, r.gw2 = r.gw1;
  r.gb1.assign(p.E * p.F, 0.f), r.gb3 = r.gb1;
  r.gb2.assign(p.E * p.D, 0.f);
  auto round = [&](float v) { return rounded(v, p.dtype); };
  std::vector<float> a(p.F), weighted(p.F), dh1(p.F), dh3(p.F);
  for (int64_t s = 0; s < p.T * p.K; ++s) {
    if (!p.here(s)) continue;
    const int64_t t = s / p.K, e = p.ids[s];
    const float w = p.weights[s];
    for (int64_t f = 0; f < p.F; ++f) {
      float h1 = p.biased ? p.b1.at(0, e, f) : 0, h3 = p.biased ? p.b3.at(0, e, f) : 0, u = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        h1 += p.x.at(0, t, d) * p.w1.at(e, d, f);
        h3 += p.x.at(0, t, d) * p.w3.at(e, d, f);
        u += p.grad.at(0, t, d) * p.w2.at(e, f, d);
      }
      h1 = r.h1[s * p.F + f] = round(h1);
      h3 = r.h3[s * p.F + f] = round(h3);
      const float up = p.gated ? h3 : 1, relu = h1 > 0 ? h1 : 0;
      a[f] = round(relu * up);
      weighted[f] = round(w * (relu * up));
      r.gweights[s] += u * a[f];
      dh1[f] = h1 > 0 ? round(w * u * up) : 0;
      dh3[f] = round(w * u * relu);
      r.gb1[e * p.F + f] += dh1[f];
      r.gb3[e * p.F + f] += dh3[f];
    }
    for (int64_t d = 0; d < p.D; ++d) {
      float y = 0, gx = 0;
      for (int64_t f = 0; f < p.F; ++f) {
        y += a[f] * p.w2.at(e, f, d);
        gx += dh1[f] * p.w1.at(e, d, f) + (p.gated ? dh3[f] * p.w3.at(e, d, f) : 0);
        r.gw1[(e * p.D + d) * p.F + f] += p.x.at(0, t, d) * dh1[f];
        r.gw3[(e * p.D + d) * p.F + f] += p.x.at(0, t, d) * dh3[f];
        r.gw2[(e * p.F + f) * p.D + d] += weighted[f] * p.grad.at(0, t, d);
      }
      const float b2 = p.biased ? p.b2.at(0, e, d) : 0, grad = p.grad.at(0, t, d);
      r.z[t * p.D + d] += w * (round(y) + b2);
      r.gweights[s] += grad * b2;
      r.gb2[e * p.D + d] += w * grad;
      r.gx[t * p.D + d] += round(gx);
    }
  }
  return r;
}

// Where results of projections are kept, if not one copy after the other.
struct Lines {
  std::vector<int64_t> of_copy;  // -1 for a copy that is not here
  int64_t number;
};

Lines draw_lines(const ExpertsProblem &p) {
  Lines lines = {std::vector<int64_t>(p.T * p.K, -1), draw(0, 3)};
  for (int64_t s = 0; s < p.T * p.K; ++s) lines.number += p.here(s);
  std::vector<int64_t> order(lines.number);
  for (int64_t l = 0; l < lines.number; ++l) {
    const int64_t other = draw(0, l);
    order[l] = order[other];
    order[other] = l;
  }
  for (int64_t s = 0, here = 0; s < p.T * p.K; ++s) {
    if (p.here(s)) lines.of_copy[s] = order[here++];
  }
  return lines;
}

// Rows of copies as they lie on lines, zeros on the others.
std::vector<float> on_lines(const std::vector<float> &rows, const Lines &lines, int64_t columns) {
  std::vector<float> found(lines.number * columns, 0.f);
  for (size_t s = 0; s < lines.of_copy.size(); ++s) {
    for (int64_t c = 0; lines.of_copy[s] >= 0 && c < columns; ++c) {
      found[lines.of_copy[s] * columns + c] = rows[s * columns + c];
    }
  }
  return found;
}

std::vector<float> transposed_matrices(const std::vector<float> &matrices, int64_t experts, int64_t rows, int64_t columns) {
  std::vector<float> transposed(matrices.size());
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        transposed[(e * columns + c) * rows + r] = matrices[(e * rows + r) * columns + c];
      }
    }
  }
  return transposed;
}

bool compare(const ExpertsProblem &p, const Guarded *ours, const std::vector<float> &expected, int dtype,
             const char *what) {
  bool right = true;
  for (size_t i = 0; ours && right && i < expected.size(); ++i) {
    if (p.activation == MOESAIC_RELU) {
      right = same(ours->data(), static_cast<int64_t>(i), expected[i], dtype, what);
    } else {
      right = std::isfinite(get(ours->data(), static_cast<int64_t>(i), dtype));
    }
  }
  return right;
}

bool one_experts_problem(int isa) {
  const ExpertsProblem p = draw_experts();
  ExpertsResults expected = by_loop(p);
  const bool has_lines = draw(0, 1) && p.T * p.K;
  Lines lines;
  if (has_lines) {
    lines = draw_lines(p);
    expected.h1 = on_lines(expected.h1, lines, p.F);
    expected.h3 = on_lines(expected.h3, lines, p.F);
  }
  const int threads = static_cast<int>(draw(1, 3));
  auto projection = [&](const Matrices &w, const Operand &b) {
    return moesaic_projection{.w = w.given(), .b = p.biased ? b.matrix : moesaic_matrix{}};
  };
  const moesaic_routing routing = {.ids = p.ids.data(),
                                   .weights = p.weights.data(),
                                   .tokens = p.T,
                                   .copies = p.K,
                                   .lines = has_lines ? lines.of_copy.data() : nullptr,
                                   .num_lines = has_lines ? lines.number : 0};
  const moesaic_experts experts = {
      .projections = {projection(p.w1, p.b1), p.gated ? projection(p.w3, p.b3) : moesaic_projection{}},
      .down = projection(p.w2, p.b2),
      .experts = p.E,
      .dim = p.D,
      .hidden = p.F,
      .num_projections = p.gated ? 2 : 1,
      .activation = p.activation,
      .dtype = p.dtype};
  auto result = [&](size_t elements, int dtype, bool wanted) {
    const int64_t bytes = static_cast<int64_t>(elements) * (dtype == MOESAIC_BF16 ? 2 : 4);
    return wanted ? std::make_unique<Guarded>(bytes, draw(0, 1)) : nullptr;
  };
  auto data = [](const std::unique_ptr<Guarded> &g) { return g ? g->data() : nullptr; };
  const bool save = draw(0, 3);
  const auto z = result(expected.z.size(), p.dtype, true), h1 = result(expected.h1.size(), p.dtype, save),
             h3 = result(expected.h3.size(), p.dtype, save && p.gated);
  void *const pre[] = {data(h1), data(h3)};
  bool right = moesaic_cpu_experts(&routing, &experts, p.x.matrix, data(z), pre, isa, threads) == MOESAIC_OK;
  right = right && compare(p, z.get(), expected.z, p.dtype, "z") && compare(p, h1.get(), expected.h1, p.dtype, "h1") &&
          compare(p, h3.get(), expected.h3, p.dtype, "h3");
  if (save && right) {
    auto wanted = [&] { return draw(0, 3) > 0; };
    const auto gx = result(expected.gx.size(), p.dtype, wanted()),
               gweights = result(expected.gweights.size(), MOESAIC_F32, wanted());
    // A projection's matrices [experts, rows, columns] and their gradients.
    struct OfProjection {
      const char *name;
      const std::vector<float> &w, &b;
      int64_t rows, columns;
      bool is_there;
      std::unique_ptr<Guarded> got_w = nullptr, got_b = nullptr;
      moesaic_projection_grads grads = {};
    } of[] = {{"first projection", expected.gw1, expected.gb1, p.D, p.F, true},
              {"second projection", expected.gw3, expected.gb3, p.D, p.F, p.gated},
              {"down projection", expected.gw2, expected.gb2, p.F, p.D, true}};
    for (OfProjection &g : of) {
      const bool adds = draw(0, 1);
      g.got_w = result(g.w.size(), adds ? MOESAIC_F32 : p.dtype, g.is_there && !p.format && wanted());
      g.got_b = result(g.b.size(), p.dtype, g.is_there && wanted());
      if (adds && g.got_w) memset(g.got_w->data(), 0, g.got_w->bytes());
      g.grads = {.w = data(g.got_w), .b = data(g.got_b), .transposed = draw(0, 1) > 0, .adds = adds};
    }
    const moesaic_experts_grads grads = {.x = data(gx),
                                         .weights = reinterpret_cast<float *>(data(gweights)),
                                         .projections = {of[0].grads, of[1].grads},
                                         .down = of[2].grads};
    right = moesaic_cpu_experts_backward(&routing, &experts, p.x.matrix, p.grad.matrix, pre, &grads, isa, threads) ==
            MOESAIC_OK;
    right = right && compare(p, gx.get(), expected.gx, p.dtype, "gx") &&
            compare(p, gweights.get(), expected.gweights, MOESAIC_F32, "gweights");
    for (const OfProjection &g : of) {
      const auto w = g.grads.transposed ? transposed_matrices(g.w, p.E, g.rows, g.columns) : g.w;
      right = right && compare(p, g.got_w.get(), w, g.grads.adds ? MOESAIC_F32 : p.dtype, g.name) &&
              compare(p, g.got_b.get(), g.b, p.dtype, g.name);
    }
  }
  if (!right) {
    fprintf(stderr, "isa %d dtype %d format %d activation %d T %lld K %lld E %lld D %lld F %lld gated %d biased %d threads %d\n", isa,
            p.dtype, p.format, p.activation, static_cast<long long>(p.T), static_cast<long long>(p.K), static_cast<long long>(p.E),
            static_cast<long long>(p.D), static_cast<long long>(p.F), p.gated, p.biased, threads);
  }
  return right;
}

}  // namespace
