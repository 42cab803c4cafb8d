// thin.h for x86-64-v4: AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target( \
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,popcnt,prefer-vector-width=512")
// The intrinsics use undefined operands themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define LOWRANK_THIN thin_v4
#define LOWRANK_LEVEL 4
#include "thin_kernels.h"
#endif
