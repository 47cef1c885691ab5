// AMX's tiles: 16 rows of 64 bytes each, by their instructions. `amx_emulated.hpp` has the same interface.
//
// Written as assembly, since the intrinsics take the number of a tile as text only, which no template can give them.
#pragma once

#include <stdint.h>

namespace moesaic::MOESAIC_ISA {

// All eight tiles in their full size, for as long as this lives. Whoever else uses tiles in this thread brings a
// configuration of their own.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;

  template <int T>
  __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows are `stride` bytes apart.
  template <int T>
  __attribute__((always_inline)) void load(const void *rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  __attribute__((always_inline)) void store(void *rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(T) : "memory");
  }
  // SUMS[m][n] += the sum over k of A[m][k] B[k][n], where k counts pairs of bf16.
  template <int SUMS, int A, int B>
  __attribute__((always_inline)) void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};

}  // namespace moesaic::MOESAIC_ISA
