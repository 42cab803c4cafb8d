// The dropout mask in the form of thin_kernels.h: 16-bit all-ones where an element is kept. See philox.h.
#pragma once

#include "philox.h"
#include "thin_elements.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the draws of a block are read as the halves of its words");

namespace lowrank_dist {
namespace {

// The low halves of a's 64-bit lanes times b. The callers leave arbitrary bits in the high halves.
LOWRANK_LOCAL U64 multiply_low(U64 a, uint32_t b) {
#if LOWRANK_LEVEL >= 4
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LOWRANK_LEVEL == 3
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * static_cast<uint64_t>(b);
#endif
}

constexpr int kBlockLanes = kBytes / 8;  // Philox blocks drawn together, one in each 64-bit lane
constexpr int kKeepRow = static_cast<int>(kPanel) + kDrawsPerBlock * kBlockLanes;

#if LOWRANK_LEVEL >= 4
constexpr U64 kCount = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr I64 kLow = {0, 8, 1, 9, 2, 10, 3, 11}, kHigh = {4, 12, 5, 13, 6, 14, 7, 15};
#elif LOWRANK_LEVEL == 3
constexpr U64 kCount = {0, 1, 2, 3};
constexpr I64 kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7};
#else
constexpr U64 kCount = {0, 1};
constexpr I64 kLow = {0, 2}, kHigh = {1, 3};
#endif

LOWRANK_LOCAL void keep_blocks(int16_t* keep, uint64_t first_block, uint64_t row, const ThinMask& mask) {
  const U64 zero = {};
  U64 c0 = kCount + first_block, c1 = zero + (row & 0xffffffff), c2 = zero + (row >> 32), c3 = zero + mask.stream;
  uint32_t k0 = mask.seed, k1 = mask.step;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U64 product0 = multiply_low(c0, kPhiloxMultiplier0), product1 = multiply_low(c2, kPhiloxMultiplier1);
    c0 = product1 >> 32 ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = product1;
    c2 = product0 >> 32 ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const U64 first = (c0 & 0xffffffff) | c1 << 32, second = (c2 & 0xffffffff) | c3 << 32;
  const uint16_t threshold = static_cast<uint16_t>(mask.threshold);
  const U16 low = (U16)__builtin_shuffle(first, second, (U64)kLow),
            high = (U16)__builtin_shuffle(first, second, (U64)kHigh);
  store_as(keep, low >= threshold);
  store_as(keep + kBytes / 2, high >= threshold);
}

// Draws one row's panel into `buffer` [kKeepRow]; returns the position of its first feature there.
LOWRANK_LOCAL const int16_t* keep_row(
    int16_t* buffer, const ThinMask& mask, int64_t t, int64_t column, int64_t columns) {
  if (mask.threshold > 0xffff) {
    std::memset(buffer, 0, sizeof(int16_t) * kPanel);
    return buffer;
  }
  const uint64_t feature = static_cast<uint64_t>(mask.feature_offset + column);
  const int skip = static_cast<int>(feature % kDrawsPerBlock);
  constexpr int kStep = kDrawsPerBlock * kBlockLanes;
  for (int64_t done = 0; done < columns + skip; done += kStep) {
    keep_blocks(buffer + done, (feature + done) / kDrawsPerBlock, static_cast<uint64_t>(mask.rows[t]), mask);
  }
  return buffer + skip;
}

// A vector of sums with zero where the element is dropped.
template <typename E>
LOWRANK_LOCAL typename E::Vector select(typename E::Vector v, const int16_t* keep) {
  using Mask = typename E::SumMask;
  return (typename E::Vector)((Mask)v & __builtin_convertvector(load_as<typename E::SumKeep>(keep), Mask));
}

}  // namespace
}  // namespace lowrank_dist
