// What follows where the operating system gives or refuses the permission to use tiles, on a processor that is said to
// have them: `tile_permission yes` or `tile_permission no`. The answer is asked for once.
#include <cpuid.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <iterator>

#include "../../csrc/tasks.hpp"

namespace {

bool is_given;
int times_asked;

int says_all(unsigned, unsigned, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}

long answer(long number, long request, long feature) {
  constexpr long kRequest = 0x1023, kTileData = 18;
  if (number != SYS_arch_prctl || request != kRequest || feature != kTileData) return -1;
  ++times_asked;
  return is_given ? 0 : -1;
}

}  // namespace

#define __get_cpuid_count says_all
#define __builtin_cpu_supports(feature) 1
#define syscall answer
#define MOESAIC_WITH_AMX
#include "../../csrc/instruction_sets.cpp"

namespace moesaic {
namespace avx2 { extern const Kernels f32{}, bf16{}; }
namespace avx512 { extern const Kernels f32{}, bf16{}; }
namespace avx512_bf16 { extern const Kernels f32{}, bf16{}; }
namespace amx { extern const TileKernels tiled{}; }
namespace amx_emulated { extern const TileKernels tiled{}; }
}  // namespace moesaic

int main(int, char **argv) {
  using namespace moesaic;
  is_given = !strcmp(argv[1], "yes");
  int amx = 1;
  while (strcmp(isa_name(amx), "amx")) ++amx;
  bool right = best_isa() == amx - 1 && times_asked == 0;  // nobody gets tiles without asking
  for (int i = 0; i < 2; ++i) {
    right &= has_isa(amx) == is_given;
    right &= (kernels(MOESAIC_BF16, amx) == &amx::tiled.bf16) == is_given;
    right &= (tile_kernels(amx) == &amx::tiled) == is_given;
    right &= is_given || (!kernels(MOESAIC_BF16, amx) && !kernels(MOESAIC_F32, amx) && !tile_kernels(amx));
  }
  right &= times_asked == 1 && has_isa(best_isa()) && kernels(MOESAIC_BF16, best_isa()) == &avx512_bf16::bf16;
  puts(right ? "ok" : "wrong");
  return !right;
}
