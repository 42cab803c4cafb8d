// Philox4x32: a counter-based generator, whose random numbers depend only on where they are used.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Ten rounds are the paper's
// default; seven are the fewest that pass BigCrush. No library header is used here: nvcc compiles it for the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOWRANK_INLINE __host__ __device__ __forceinline__
#else
#define LOWRANK_INLINE inline __attribute__((always_inline))
#endif

namespace lowrank_dist {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
// The constants that each round adds to the key.
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

LOWRANK_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // From the expression below nvcc makes a 64-bit product with additions of zero, which its assembler keeps.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// One block of four 32-bit words, in place: counter (c0, c1, c2, c3) → output, under the key (k0, k1).
template <int Rounds = kPhiloxRounds>
LOWRANK_INLINE void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < Rounds; ++round) {
    const uint64_t product0 = wide_product(kPhiloxMultiplier0, c0);
    const uint64_t product1 = wide_product(kPhiloxMultiplier1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}

// The dropout mask (lowrank_dist/ops/mask.py): an element draws from block (f >> 3, row, stream) with f its global
// feature. The block's four words are eight 16-bit draws, and f & 7 selects the element's own.
constexpr int kDrawsPerBlock = 8;

}  // namespace lowrank_dist
