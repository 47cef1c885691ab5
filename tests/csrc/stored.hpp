// Weights of 8 and 4 bits between unreadable pages, of numbers that every type holds.
#pragma once

#include "operands.hpp"

namespace {

struct StoredOperand {
  int format = MOESAIC_PLAIN;
  int64_t inner = 0, columns = 0;
  int64_t row_bytes = 0, stride = 0, scale_row = 0, scale_stride = 0;
  std::unique_ptr<Guarded> data = nullptr, scales = nullptr;
  std::vector<float> values = {};

  float at(int64_t m, int64_t r, int64_t c) const { return values[(m * inner + r) * columns + c]; }

  // Or the transposed matrices, as the backward pass multiplies by them.
  moesaic_weights weights(bool transposed = false) const {
    moesaic_weights w = {};
    w.matrix = {data->data(), transposed ? row_bytes : 0, transposed ? 0 : row_bytes};
    w.stride = stride;
    w.scales = {scales->data(), scale_stride, scale_row, format};
    return w;
  }
};

int64_t block_of(int format) { return format == MOESAIC_NF4 ? 64 : format == MOESAIC_MXFP4 ? 32 : 1; }

// A number, and its code: of NF4 those that are whole, of the others any, or -1, 0 and 1 (`units`).
struct Coded {
  int code;
  float value;
};

Coded draw_code(int format, bool units) {
  if (format == MOESAIC_NF4) {
    const Coded known[] = {{0, -1.f}, {7, 0.f}, {15, 1.f}};
    return known[draw(0, 2)];
  }
  if (format == MOESAIC_INT8) {
    const int v = static_cast<int>(units ? draw(-1, 1) : draw(-128, 127));
    return {v & 255, static_cast<float>(v)};
  }
  const float magnitudes[] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
  const int magnitude = static_cast<int>(units ? 2 * draw(0, 1) : draw(0, 7)), sign = static_cast<int>(draw(0, 1));
  return {magnitude + 8 * sign, sign ? -magnitudes[magnitude] : magnitudes[magnitude]};
}

// Matrices [inner, columns], each stored column by column. `inner` is a multiple of the format's block.
StoredOperand stored(int64_t matrices, int64_t inner, int64_t columns, int format, bool units = false) {
  StoredOperand s;
  s.format = format;
  s.inner = inner;
  s.columns = columns;
  const int64_t numbers_in_byte = format == MOESAIC_INT8 ? 1 : 2, gap = draw(0, 2) ? 0 : draw(1, 5);
  const int64_t blocks = format == MOESAIC_INT8 ? 1 : inner / block_of(format);
  const int64_t scale_bytes = format == MOESAIC_MXFP4 ? 1 : 4;
  s.row_bytes = inner / numbers_in_byte + gap;
  s.stride = columns * s.row_bytes + gap;
  s.scale_row = blocks + gap;
  s.scale_stride = columns * s.scale_row + gap;
  const bool any = matrices && inner && columns;
  const int64_t last = (matrices - 1) * s.stride + (columns - 1) * s.row_bytes + inner / numbers_in_byte;
  const int64_t last_scale = (matrices - 1) * s.scale_stride + (columns - 1) * s.scale_row + blocks;
  s.data = std::make_unique<Guarded>(any ? last : 0, draw(0, 1));
  s.scales = std::make_unique<Guarded>(any ? last_scale * scale_bytes : 0, draw(0, 1));
  s.values.resize(matrices * inner * columns);
  for (int64_t m = 0; any && m < matrices; ++m) {
    for (int64_t c = 0; c < columns; ++c) {
      auto *row = reinterpret_cast<uint8_t *>(s.data->data()) + m * s.stride + c * s.row_bytes;
      const int64_t scales_at = m * s.scale_stride + c * s.scale_row;
      for (int64_t b = 0; b < blocks; ++b) {
        const int exponent = static_cast<int>(units ? 0 : draw(-1, 1));
        const float scale = exponent < 0 ? .5f : exponent ? 2.f : 1.f;
        if (format == MOESAIC_MXFP4) {
          s.scales->data()[scales_at + b] = static_cast<char>(127 + exponent);
        } else {
          put(s.scales->data(), scales_at + b, scale, MOESAIC_F32);
        }
        const int64_t size = inner / blocks;
        for (int64_t k = b * size; k < (b + 1) * size; ++k) {
          const Coded number = draw_code(format, units);
          s.values[(m * inner + k) * columns + c] = number.value * scale;
          if (format == MOESAIC_INT8) {
            row[k] = static_cast<uint8_t>(number.code);
          } else {
            // Of NF4 the first is in the high half.
            const int shift = (k % 2 == 0) == (format == MOESAIC_NF4) ? 4 : 0;
            row[k / 2] = static_cast<uint8_t>((row[k / 2] & (shift ? 15 : 240)) | number.code << shift);
          }
        }
      }
    }
  }
  return s;
}

bool one_quantized_problem(int isa) {
  const int dtype = static_cast<int>(draw(0, 1)), y_dtype = draw(0, 3) ? dtype : MOESAIC_F32;
  const int format = static_cast<int>(draw(MOESAIC_INT8, MOESAIC_MXFP4)), threads = static_cast<int>(draw(1, 3));
  const bool transposed = draw(0, 1);
  const std::vector<int64_t> dims = {1, 2, 15, 16, 17, 33, 63, 64, 65, 130, 191, 289};
  const int64_t inner = format == MOESAIC_INT8 ? pick({1, 3, 16, 31, 33, 64, 127, 200, 2050})
                                               : block_of(format) * pick({1, 2, 3, 4, 5, 7, 9, 33});
  const int64_t columns = pick(dims), groups = draw(1, 4);
  std::vector<int64_t> sizes(groups), matrix_of;
  for (int64_t g = 0; g < groups; ++g) {
    sizes[g] = inner * columns > 40000 ? draw(0, 6) : pick({0, 1, 2, 3, 4, 5, 7, 13, 64});
    matrix_of.insert(matrix_of.end(), sizes[g], g);
  }
  matrix_of.insert(matrix_of.end(), draw(0, 2), -1);
  const int64_t rows = static_cast<int64_t>(matrix_of.size());
  const moesaic_groups layout = {
      .sizes = sizes.data(), .blocks = 1, .groups = groups, .rows = rows, .matrices = groups, .shared = 0};
  const StoredOperand w = stored(groups, inner, columns, format);
  const int64_t summed = transposed ? columns : inner, wide = transposed ? inner : columns;
  const Operand x = operand(1, rows, summed, dtype);
  const Guarded y(rows * wide * (y_dtype == MOESAIC_BF16 ? 2 : 4), draw(0, 1));
  const moesaic_weights given = w.weights(transposed);
  bool right = moesaic_cpu_quantized_mm(&layout, x.matrix, &given, y.data(), summed, wide, dtype, y_dtype, isa, threads) ==
               MOESAIC_OK;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < wide; ++c) {
      float sum = 0;
      for (int64_t k = 0; matrix_of[r] >= 0 && k < summed; ++k) {
        sum += x.at(0, r, k) * (transposed ? w.at(matrix_of[r], c, k) : w.at(matrix_of[r], k, c));
      }
      right = right && same(y.data(), r * wide + c, sum, y_dtype, "quantized_mm");
    }
  }
  if (!right) {
    fprintf(stderr, "isa %d dtype %d y %d format %d inner %lld columns %lld rows %lld transposed %d threads %d\n", isa, dtype,
            y_dtype, format, static_cast<long long>(inner), static_cast<long long>(columns), static_cast<long long>(rows),
            transposed, threads);
  }
  return right;
}

}  // namespace
