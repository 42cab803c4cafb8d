// thin.h for x86-64-v3: AVX2, FMA and F16C.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,popcnt")
#define LOWRANK_THIN thin_v3
#define LOWRANK_LEVEL 3
#include "thin_kernels.h"
#endif
