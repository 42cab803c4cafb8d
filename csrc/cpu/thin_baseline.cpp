// thin.h for the compiler's default instruction set: SSE2 on x86-64, NEON on 64-bit Arm.
#define LOWRANK_THIN thin_baseline
#define LOWRANK_LEVEL 0
#include "thin_kernels.h"
