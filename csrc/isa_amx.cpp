#define MOESAIC_ISA amx
#define MOESAIC_VECTOR "vector_avx512.hpp"
#define MOESAIC_TILES "amx_tiles.hpp"
#include "kernels.hpp"
