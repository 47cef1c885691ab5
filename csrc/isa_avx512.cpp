#define MOESAIC_ISA avx512
#include "vector_avx512.hpp"
#include "kernels.hpp"
