// A lane moves, masks and multiplies eight neighbouring 16-bit elements at a time: 16 bytes, one block of draws.
//
// A product may sum over k in any order that both operands share. So a lane feeds the tensor cores with elements that
// are neighbours in memory, and nothing is rearranged on the way.
#pragma once

#include "device.cuh"

namespace lowrank_dist {

// Only the first `count` of the eight are read, the others are zero. kAligned: the address is a multiple of 16 and
// count is 0 or 8.
template <bool kAligned, typename Half>
__device__ __forceinline__ uint4 load_eight(const Half* from, int64_t count) {
  if constexpr (kAligned) {
    return count > 0 ? load_global(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? load_global(from + 2 * i).bits : 0;
      const uint32_t high = 2 * i + 1 < count ? load_global(from + 2 * i + 1).bits : 0;
      words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The same into shared memory: 16 bytes at `to` that belong to this lane alone, so no barrier is needed between the
// copy and its use.
template <bool kAligned, typename Half>
__device__ __forceinline__ void fetch_eight(Shared to, const Half* from, int64_t count) {
  if constexpr (kAligned) {
    copy16_async(to, from, count > 0 ? 16 : 0);
  } else {
    store_shared(to, load_eight<false>(from, count));
  }
}

// The memory for a warp's copies: kStages stages of kVectors vectors, 16 bytes for each lane. Several stages keep
// copies in flight without registers.
template <int kStages, int kVectors>
class Stages {
 public:
  static constexpr int kBytes = kStages * kVectors * kWarp * 16;

  __device__ __forceinline__ Stages(Shared memory, int warp, int lane)
      : memory_(memory + warp * kBytes + lane * 16) {}

  __device__ __forceinline__ Shared at(int stage, int vector) const {
    return memory_ + (stage * kVectors + vector) * kWarp * 16;
  }

 private:
  Shared memory_;
};

__device__ __forceinline__ int next_stage(int stage, int stages) { return stage + 1 == stages ? 0 : stage + 1; }

// True if rows of this matrix can be read eight elements at a time, starting at any multiple of eight.
inline bool in_eights(const void* data, int64_t ld, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0 && columns % 8 == 0;
}

}  // namespace lowrank_dist
