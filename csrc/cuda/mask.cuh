// The dropout mask on the device; philox.h defines it.
//
// The counter is (block of features, row, row >> 32, stream). Philox multiplies only words 0 and 2, and rows and blocks
// first mix in its second round. The part of the first two of seven rounds that depends on a row alone, or on a block
// alone, is computed once for each instead of once for each pair.
#pragma once

#include "device.cuh"
#include "philox.h"

namespace lowrank_dist {

// A row's and a block's share of the first two rounds.
struct RowShare {
  uint32_t word0;
  uint32_t word2;
  uint32_t word3;
};
struct BlockShare {
  uint32_t word0;
  uint32_t word1;
  uint32_t word2;
};

struct Draws {
  uint32_t words[4];
};

__device__ __forceinline__ uint32_t low_word(uint64_t product) { return static_cast<uint32_t>(product); }
__device__ __forceinline__ uint32_t high_word(uint64_t product) { return static_cast<uint32_t>(product >> 32); }

// The key of the whole launch. Thresholds that drop everything (65536) or nothing (0) never get here.
class MaskKey {
 public:
  __device__ __forceinline__ MaskKey() {}
  __device__ __forceinline__ explicit MaskKey(const MaskArgs& mask)
      : key0_(static_cast<uint32_t>(load_global(mask.key))),
        key1_(static_cast<uint32_t>(load_global(mask.key + 1))),
        stream_(mask.stream),
        threshold_(mask.threshold << 16) {}

  __device__ __forceinline__ RowShare row(int64_t index) const {
    const uint64_t first = wide_product(kPhiloxMultiplier1, high_word(static_cast<uint64_t>(index)));
    const uint64_t second =
        wide_product(kPhiloxMultiplier0, high_word(first) ^ low_word(static_cast<uint64_t>(index)) ^ key0_);
    return {low_word(first), high_word(second) ^ (key1_ + kPhiloxWeyl1), low_word(second)};
  }

  __device__ __forceinline__ BlockShare block(uint32_t index) const {
    const uint64_t first = wide_product(kPhiloxMultiplier0, index);
    const uint64_t second = wide_product(kPhiloxMultiplier1, high_word(first) ^ stream_ ^ key1_);
    return {high_word(second) ^ (key0_ + kPhiloxWeyl0), low_word(second), low_word(first)};
  }

  __device__ __forceinline__ Draws draw(const RowShare& row, const BlockShare& block) const {
    Draws draws{{row.word0 ^ block.word0, block.word1, row.word2 ^ block.word2, row.word3}};
    philox4x32<kPhiloxRounds - 2>(
        draws.words[0], draws.words[1], draws.words[2], draws.words[3], key0_ + 2 * kPhiloxWeyl0,
        key1_ + 2 * kPhiloxWeyl1);
    return draws;
  }

  // A pair of elements, each from `kept` or from `dropped`.
  __device__ __forceinline__ uint32_t select(uint32_t draws, uint32_t kept, uint32_t dropped) const {
    if (draws < threshold_) kept = (kept & 0x0000FFFFu) | (dropped & 0xFFFF0000u);
    if ((draws << 16) < threshold_) kept = (kept & 0xFFFF0000u) | (dropped & 0x0000FFFFu);
    return kept;
  }

  // True if element i of eight is kept.
  __device__ __forceinline__ bool keeps(const Draws& draws, int i) const {
    return (i % 2 == 0 ? draws.words[i / 2] << 16 : draws.words[i / 2]) >= threshold_;
  }

 private:
  uint32_t key0_ = 0;
  uint32_t key1_ = 0;
  uint32_t stream_ = 0;
  uint32_t threshold_ = 0;
};

// Features are not negative, so a shift replaces the signed division.
__device__ __forceinline__ uint32_t block_of(int64_t feature) {
  return static_cast<uint32_t>(static_cast<uint64_t>(feature) / kDrawsPerBlock);
}

// Eight neighbouring features and their draws. kAligned: they are one block; otherwise they may straddle two.
template <bool kAligned>
struct Eight;

template <>
struct Eight<true> {
  BlockShare first;

  __device__ __forceinline__ Eight(const MaskKey& key, int64_t feature)
      : first(key.block(block_of(feature))) {}

  __device__ __forceinline__ Draws draw(const MaskKey& key, const RowShare& row) const { return key.draw(row, first); }
};

template <>
struct Eight<false> {
  BlockShare first;
  BlockShare second;
  int skip;

  __device__ __forceinline__ Eight(const MaskKey& key, int64_t feature)
      : first(key.block(block_of(feature))),
        second(key.block(block_of(feature) + 1)),
        skip(static_cast<int>(feature & (kDrawsPerBlock - 1))) {}

  __device__ __forceinline__ Draws draw(const MaskKey& key, const RowShare& row) const {
    const Draws low = key.draw(row, first);
    if (skip == 0) return low;
    const Draws high = key.draw(row, second);
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = low.words[i];
      words[4 + i] = high.words[i];
    }
    // Shifts by `skip` draws in compile-time steps: a runtime index would put the words into memory.
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = (skip & 4) != 0 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = (skip & 2) != 0 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = (skip & 1) != 0 ? (words[i] >> 16 | words[i + 1] << 16) : words[i];
    return {{words[0], words[1], words[2], words[3]}};
  }
};

}  // namespace lowrank_dist
