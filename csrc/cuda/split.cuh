// Where there are too few tiles to fill the device, the sum itself is split over blocks; a second kernel adds the
// parts.
#pragma once

#include "device.cuh"

namespace lowrank_dist {

// A long sum, cut into `count` parts of `length` each (the last may be shorter).
struct Split {
  int64_t count;
  int64_t length;
};

// The cheapest cut, a function of the shapes alone. Time is the number of waves of blocks times the length of a part.
// `slots` blocks run at a time; `penalty` is the cost of the second kernel, in units of the length.
inline Split choose_split(int64_t tiles, int64_t length, int64_t slots, int64_t quantum, int64_t penalty) {
  constexpr int64_t kMostParts = 64;
  Split best{1, ceil_divide(length, quantum) * quantum};
  int64_t best_cost = ceil_divide(tiles, slots) * best.length;
  for (int64_t count = 2; count <= kMostParts; ++count) {
    const int64_t part = ceil_divide(ceil_divide(length, count), quantum) * quantum;
    const int64_t parts = part > 0 ? ceil_divide(length, part) : 0;
    if (parts < 2) break;
    const int64_t cost = ceil_divide(tiles * parts, slots) * part + penalty;
    if (cost < best_cost) {
      best = {parts, part};
      best_cost = cost;
    }
  }
  return best;
}

constexpr int kSumThreads = 256;

// out[i,j] = Σ_s parts[s,i,j], in the order of s.
template <typename T, typename Sum>
__global__ __launch_bounds__(kSumThreads) void sum_parts(
    const Sum* parts, T* out, int64_t ld, int64_t rows, int64_t columns, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= rows * columns) return;
  Sum sum = load_global(parts + index);
#pragma unroll 4
  for (int64_t s = 1; s < count; ++s) sum += load_global(parts + s * rows * columns + index);
  T rounded;
  round_to(rounded, sum);
  store_global(out + index / columns * ld + index % columns, rounded);
}

template <typename T, typename Sum>
int launch_sum_parts(
    const Sum* parts, T* out, int64_t ld, int64_t rows, int64_t columns, int64_t count, CUstream_st* stream) {
  const auto blocks = static_cast<unsigned>(ceil_divide(rows * columns, kSumThreads));
  return launch(sum_parts<T, Sum>, dim3(blocks), kSumThreads, 0, stream, parts, out, ld, rows, columns, count);
}

}  // namespace lowrank_dist
