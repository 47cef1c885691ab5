// AMX's tiles in ordinary memory, bit for bit what the instructions do, for tests on any processor.
//
// Intel's manual (Software Developer's Manual, volume 2, TDPBF16PS) has for every element of the sums two chains of fused
// multiply-adds, one of the first and one of the second element of each pair, that begin with 0. Their sum is added to
// what the element held. Every step rounds to nearest even, takes denormals for 0 and leaves none.
#pragma once

#include <string.h>

#include "vector.hpp"

namespace moesaic::MOESAIC_ISA {

class Tiles {
 public:
  template <int T>
  void zero() {
    memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  // Rows are `stride` bytes apart.
  template <int T>
  void load(const void *rows, int64_t stride) {
    for (int64_t r = 0; r < kSide; ++r) memcpy(tiles_[T][r], static_cast<const char *>(rows) + r * stride, 64);
  }
  template <int T>
  void store(void *rows, int64_t stride) const {
    for (int64_t r = 0; r < kSide; ++r) memcpy(static_cast<char *>(rows) + r * stride, tiles_[T][r], 64);
  }
  // SUMS[m][n] += the sum over k of A[m][k] B[k][n], where k counts pairs of bf16.
  template <int SUMS, int A, int B>
  void add_product() {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40, kNoTraps = 0x1f80;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(kNoTraps | kFlushToZero | kDenormalsAreZero);
    multiply(tiles_[SUMS], tiles_[A], tiles_[B]);
    _mm_setcsr(before);
  }

 private:
  static constexpr int kSide = 16;
  using Tile = uint32_t[kSide][kSide];

  INLINE float first(uint32_t pair) { return as_float(pair << 16); }
  INLINE float second(uint32_t pair) { return as_float(pair & 0xffff0000u); }
  INLINE float as_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
  }

  // Not inlined: no step of it may leave the lines between which rounding is set.
  __attribute__((noinline)) static void multiply(Tile &sums, const Tile &a, const Tile &b) {
    float firsts_of_b[kSide][kSide], seconds_of_b[kSide][kSide];
    for (int k = 0; k < kSide; ++k) {
      for (int n = 0; n < kSide; ++n) {
        firsts_of_b[k][n] = first(b[k][n]);
        seconds_of_b[k][n] = second(b[k][n]);
      }
    }
    for (int m = 0; m < kSide; ++m) {
      for (int n = 0; n < kSide; n += kLanes) {
        Reg firsts = all(0.f), seconds = all(0.f);
        for (int k = 0; k < kSide; ++k) {
          firsts = fma(all(first(a[m][k])), MOESAIC_ISA::load(&firsts_of_b[k][n]), firsts);
          seconds = fma(all(second(a[m][k])), MOESAIC_ISA::load(&seconds_of_b[k][n]), seconds);
        }
        uint32_t *sum = &sums[m][n];
        MOESAIC_ISA::store(sum, add(MOESAIC_ISA::load(sum), add(firsts, seconds)));
      }
    }
  }

  alignas(64) Tile tiles_[8];
};

}  // namespace moesaic::MOESAIC_ISA
