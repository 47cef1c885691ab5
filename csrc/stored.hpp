// Weights of 8 and 4 bits as they are stored: output by output, each with its numbers along the dim that the forward pass
// sums.
#pragma once

#include "product.hpp"

namespace moesaic::MOESAIC_ISA {

// One matrix. Strides are in bytes from output to output, and in scales.
struct Stored {
  const uint8_t *data;
  const void *scales;
  int64_t row_bytes, scale_row;
  int format;
  bool sums_outputs;

  Stored(const Term &t, int64_t matrix)
      : data(static_cast<const uint8_t *>(t.w.data) + matrix * t.w_stride),
        scales(static_cast<const char *>(t.scales.data) +
               matrix * t.scales.stride * (t.scales.format == MOESAIC_MXFP4 ? 1 : 4)),
        row_bytes(t.w.row_stride ? t.w.row_stride : t.w.column_stride),
        scale_row(t.scales.row_stride),
        format(t.scales.format),
        sums_outputs(t.w.row_stride != 0) {}
};

// What the codes of 4 bits mean: see ops/quantized/formats.py.
alignas(64) constexpr float kNF4[16] = {-1.0f,
                                        -0.6961928009986877f,
                                        -0.5250730514526367f,
                                        -0.39491748809814453f,
                                        -0.28444138169288635f,
                                        -0.18477343022823334f,
                                        -0.09105003625154495f,
                                        0.0f,
                                        0.07958029955625534f,
                                        0.16093020141124725f,
                                        0.24611230194568634f,
                                        0.33791524171829224f,
                                        0.44070982933044434f,
                                        0.5626170039176941f,
                                        0.7229568362236023f,
                                        1.0f};
alignas(64) constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
constexpr int64_t kNF4Block = 64, kMXFP4Block = 32;

// A power of two of type E8M0; 255 is NaN.
INLINE float power_of_two(uint8_t e) {
  const uint32_t bits = e == 255 ? 0x7fc00000u : e ? uint32_t{e} << 23 : 0x00400000u;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace moesaic::MOESAIC_ISA
