// Activations of the experts, hidden rows and their derivatives, on vectors of fp32: within two units of the last place,
// with NaN and infinity where the same formula in torch has them.
#pragma once

#include "moesaic_cpu.h"
#include "vector.hpp"

namespace moesaic::MOESAIC_ISA {

INLINE Reg polynomial(Reg x, const float *coefficients, int count) {
  Reg sum = all(coefficients[count - 1]);
  for (int i = count - 2; i >= 0; --i) sum = fma(sum, x, all(coefficients[i]));
  return sum;
}

INLINE Reg exponential(Reg x) {
  constexpr float kTaylor[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                               8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  // Beyond these the result is 0 or infinite.
  x = smaller(all(89.f), larger(all(-104.f), x));
  const Reg n = nearest(mul(x, all(1.44269504088896341f)));
  // ln 2 in two parts, the first of so few digits that its multiples are exact.
  Reg r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  const Reg tail = fma(mul(r, r), polynomial(r, kTaylor, 6), r);
  return times_power_of_2(add(tail, all(1.f)), n);
}

INLINE Reg sigmoid(Reg x) { return div(all(1.f), add(all(1.f), exponential(sub(zero(), x)))); }

// The distribution function of the normal distribution, and its density.
struct Normal {
  Reg below, density;
};

INLINE Normal normal(Reg x) {
  // Near 0: 1/2 + x p(x^2). Further out the tail, which is the density times a function of 1 / (2 + |x|).
  constexpr float kNear[] = {0.3989422917f, -0.0664903596f, 9.973322972e-3f, -1.18632999e-3f, 1.13486371e-4f, -7.6542074e-6f};
  constexpr float kTail[] = {4.25391988e-7f, 0.398917466f, 0.798329771f, 1.19743311f, 0.669960558f,
                             -0.0555905327f, -21.1652527f, 46.8604927f,  -32.0389328f};
  const Reg a = smaller(all(20.f), magnitude(x));
  // exp(-a^2 / 2), with what the square loses in rounding.
  const Reg square = mul(a, a), lost = fma(a, a, sub(zero(), square));
  const Reg e = exponential(mul(square, all(-0.5f)));
  const Reg bell = fma(mul(e, lost), all(-0.5f), e);
  const Reg tail = mul(bell, polynomial(div(all(1.f), add(a, all(2.f))), kTail, 9));
  const Reg far = where_at_most(x, zero(), tail, sub(all(1.f), tail));
  const Reg near = fma(x, polynomial(square, kNear, 6), all(0.5f));
  return {where_at_most(a, all(1.f), near, far), mul(bell, all(0.39894228040143268f))};
}

struct Tanh {
  Reg gate, rest, slope;  // sigmoid(2 u(x)), 1 less that, and the derivative of 2 u
};

INLINE Tanh gelu_tanh(Reg x) {
  const Reg square = mul(x, x);
  constexpr float kScale = 1.59576912160573f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  const Reg u = mul(mul(x, all(kScale)), fma(square, all(kCubic), all(1.f)));
  const Reg e = exponential(sub(zero(), u)), gate = div(all(1.f), add(all(1.f), e));
  // Near 1 the difference has no digits, and the derivative multiplies it by a large number.
  const Reg rest = where_at_most(u, zero(), sub(all(1.f), gate), mul(e, gate));
  return {gate, rest, fma(square, all(3 * kScale * kCubic), all(kScale))};
}

INLINE Reg activate(int activation, Reg x) {
  switch (activation) {
    case MOESAIC_SILU: return div(x, add(all(1.f), exponential(sub(zero(), x))));
    case MOESAIC_GELU: return mul(x, normal(x).below);
    case MOESAIC_GELU_TANH: return mul(x, gelu_tanh(x).gate);
    case MOESAIC_RELU: return larger(zero(), x);
    default: {
      const Reg positive = larger(zero(), x);
      return mul(positive, positive);
    }
  }
}

struct Activated {
  Reg value, slope;
};

INLINE Activated activate_with_slope(int activation, Reg x) {
  const Reg one = all(1.f);
  switch (activation) {
    case MOESAIC_SILU: {
      const Reg s = sigmoid(x);
      return {mul(x, s), mul(s, fma(x, sub(one, s), one))};
    }
    case MOESAIC_GELU: {
      const Normal n = normal(x);
      return {mul(x, n.below), fma(x, n.density, n.below)};
    }
    case MOESAIC_GELU_TANH: {
      const Tanh t = gelu_tanh(x);
      return {mul(x, t.gate), fma(mul(mul(x, t.gate), t.rest), t.slope, t.gate)};
    }
    case MOESAIC_RELU: return {larger(zero(), x), where_at_most(x, zero(), zero(), one)};
    default: {
      const Reg positive = larger(zero(), x);
      return {mul(positive, positive), add(positive, positive)};
    }
  }
}

// gpt-oss: (clamp(up, -7, 7) + 1) g sigmoid(1.702 g), g = min(gate, 7).
constexpr float kLimit = 7.f, kAlpha = 1.702f;
INLINE Reg clamped_gate(Reg gate) { return smaller(all(kLimit), gate); }
INLINE Reg clamped_up(Reg up) { return add(larger(all(-kLimit), smaller(all(kLimit), up)), all(1.f)); }

// Whether experts of so many projections can have an activation.
static bool has_activation(int activation, int num_projections) {
  if (activation == MOESAIC_CLAMPED_SWIGLU && num_projections != 2) return false;
  return activation >= 0 && activation < MOESAIC_NUM_ACTIVATIONS;
}

// The hidden row, from what the projections gave; with one of them `up` is 1.
INLINE Reg hidden(int activation, Reg gate, Reg up) {
  if (activation == MOESAIC_CLAMPED_SWIGLU) {
    const Reg g = clamped_gate(gate);
    return mul(clamped_up(up), mul(g, sigmoid(mul(g, all(kAlpha)))));
  }
  return mul(activate(activation, gate), up);
}

struct Hidden {
  Reg value, gate_slope, up_slope;
};

// With the derivatives. Those of a clamped value are torch's: 1 on the bound, 0 beyond it and of a NaN.
INLINE Hidden hidden_with_slopes(int activation, Reg gate, Reg up) {
  if (activation == MOESAIC_CLAMPED_SWIGLU) {
    const Reg g = clamped_gate(gate), u = clamped_up(up), s = sigmoid(mul(g, all(kAlpha))), a = mul(g, s);
    const Reg slope = mul(mul(u, s), fma(mul(g, all(kAlpha)), sub(all(1.f), s), all(1.f)));
    return {.value = mul(u, a),
            .gate_slope = where_at_most(gate, all(kLimit), slope, zero()),
            .up_slope = where_at_most(magnitude(up), all(kLimit), a, zero())};
  }
  const Activated a = activate_with_slope(activation, gate);
  return {.value = mul(a.value, up), .gate_slope = mul(a.slope, up), .up_slope = a.value};
}

}  // namespace moesaic::MOESAIC_ISA
