// The vectors of the instruction set that a file is compiled for: MOESAIC_ISA is its name, MOESAIC_VECTOR its header.
#pragma once

#if !defined(MOESAIC_ISA) || !defined(MOESAIC_VECTOR)
#error "define MOESAIC_ISA and MOESAIC_VECTOR first, as the files isa_*.cpp do"
#endif

#include MOESAIC_VECTOR
