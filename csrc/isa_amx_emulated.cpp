#define MOESAIC_ISA amx_emulated
#define MOESAIC_VECTOR "vector_avx512.hpp"
#define MOESAIC_TILES "amx_emulated.hpp"
#include "kernels.hpp"
