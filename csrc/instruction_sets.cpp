// The instruction sets that there are kernels for.
#include <iterator>

#include "tasks.hpp"

namespace moesaic {

namespace avx2 { extern const Kernels f32, bf16; }
namespace avx512 { extern const Kernels f32, bf16; }
namespace avx512_bf16 { extern const Kernels f32, bf16; }

namespace {

struct InstructionSet {
  const char *name;
  bool (*is_here)();
  const Kernels *f32, *bf16;
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// From worst to best: a processor that has one has those above it. They are numbered from 1 on; 0 is none of them.
constexpr InstructionSet kInstructionSets[] = {
    {.name = "avx2", .is_here = has_avx2, .f32 = &avx2::f32, .bf16 = &avx2::bf16},
    {.name = "avx512", .is_here = has_avx512, .f32 = &avx512::f32, .bf16 = &avx512::bf16},
    {.name = "avx512_bf16", .is_here = has_avx512_bf16, .f32 = &avx512_bf16::f32, .bf16 = &avx512_bf16::bf16},
};

// NULL for a number that is none's.
const InstructionSet *instruction_set(int isa) {
  return isa >= 1 && isa <= static_cast<int>(std::size(kInstructionSets)) ? &kInstructionSets[isa - 1] : nullptr;
}

}  // namespace

int best_isa() {
  __builtin_cpu_init();
  int best = 0;
  while (const InstructionSet *next = instruction_set(best + 1)) {
    if (!next->is_here()) break;
    ++best;
  }
  return best;
}

const char *isa_name(int isa) {
  const InstructionSet *set = instruction_set(isa);
  return set ? set->name : nullptr;
}

const Kernels *kernels(int dtype, int isa) {
  static const int best = best_isa();
  const InstructionSet *set = instruction_set(isa);
  if (!set || isa > best) return nullptr;
  switch (dtype) {
    case MOESAIC_F32: return set->f32;
    case MOESAIC_BF16: return set->bf16;
    default: return nullptr;
  }
}

}  // namespace moesaic
