// The instruction sets that there are kernels for.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <iterator>

#include "tasks.hpp"

namespace moesaic {

namespace avx2 { extern const Kernels f32, bf16; }
namespace avx512 { extern const Kernels f32, bf16; }
namespace avx512_bf16 { extern const Kernels f32, bf16; }
namespace amx_emulated { extern const TileKernels tiled; }
#ifdef MOESAIC_WITH_AMX
namespace amx { extern const TileKernels tiled; }
constexpr const TileKernels *kAmx = &amx::tiled;
constexpr bool kWithAmx = true;
#else
constexpr const TileKernels *kAmx = nullptr;  // the assembler that built this does not know its instructions
constexpr bool kWithAmx = false;
#endif

namespace {

struct InstructionSet {
  const char *name;
  bool (*is_here)();
  const Kernels *f32, *bf16;
  const TileKernels *tiled = nullptr;  // in place of bf16
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the registers of tiles if it asks for them. It refuses where a stack for signals is too small.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  constexpr unsigned kBF16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!kWithAmx || !has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kBF16) && (d & kTiles) && may_use_tiles();
}

// From worst to best: a processor that has one has those above it. They are numbered from 1 on; 0 is none of them.
constexpr int kRanked = 3;
constexpr InstructionSet kInstructionSets[] = {
    {.name = "avx2", .is_here = has_avx2, .f32 = &avx2::f32, .bf16 = &avx2::bf16},
    {.name = "avx512", .is_here = has_avx512, .f32 = &avx512::f32, .bf16 = &avx512::bf16},
    {.name = "avx512_bf16", .is_here = has_avx512_bf16, .f32 = &avx512_bf16::f32, .bf16 = &avx512_bf16::bf16},
    // Never chosen by themselves.
    {.name = "amx", .is_here = has_amx, .f32 = &avx512_bf16::f32, .bf16 = nullptr, .tiled = kAmx},
    {.name = "amx_emulated", .is_here = has_avx512, .f32 = &avx512::f32, .bf16 = nullptr, .tiled = &amx_emulated::tiled},
};

// NULL for a number that is none's.
const InstructionSet *instruction_set(int isa) {
  return isa >= 1 && isa <= static_cast<int>(std::size(kInstructionSets)) ? &kInstructionSets[isa - 1] : nullptr;
}

// NULL for one that is not here. Each is asked about once.
const InstructionSet *usable(int isa) {
  enum Answer : int8_t { kNotAsked, kNo, kYes };
  static std::atomic<Answer> answers[std::size(kInstructionSets)];
  const InstructionSet *set = instruction_set(isa);
  if (!set) return nullptr;
  std::atomic<Answer> &answer = answers[isa - 1];
  if (answer == kNotAsked) {
    __builtin_cpu_init();
    answer = set->is_here() ? kYes : kNo;
  }
  return answer == kYes ? set : nullptr;
}

}  // namespace

int best_isa() {
  __builtin_cpu_init();
  int best = 0;
  while (best < kRanked && kInstructionSets[best].is_here()) ++best;
  return best;
}

bool has_isa(int isa) { return usable(isa) != nullptr; }

const char *isa_name(int isa) {
  const InstructionSet *set = instruction_set(isa);
  return set ? set->name : nullptr;
}

const Kernels *kernels(int dtype, int isa) {
  const InstructionSet *set = usable(isa);
  if (!set) return nullptr;
  switch (dtype) {
    case MOESAIC_F32: return set->f32;
    case MOESAIC_BF16: return set->tiled ? &set->tiled->bf16 : set->bf16;
    default: return nullptr;
  }
}

const TileKernels *tile_kernels(int isa) {
  const InstructionSet *set = usable(isa);
  return set ? set->tiled : nullptr;
}

}  // namespace moesaic
