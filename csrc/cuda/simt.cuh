// fp32 and fp64: one tiled product for all three operators, in full precision (no TF32).
//
// C[M,N] = Σ_k left[m,k]·right[k,n] by tiles of 64 x 64 in registers, with 32 values of k per step in shared memory.
#pragma once

#include "mask.cuh"
#include "split.cuh"

namespace lowrank_dist {

enum class Simt { kDown, kExpand, kGradA };

constexpr int kSimtTile = 64;
constexpr int kSimtStep = 32;
constexpr int kSimtThreads = 256;
constexpr int kSimtPitch = kSimtTile + 4;

// Rows of memory, at an element stride of ld. masked: element (t, k) counts only where it is kept.
template <typename T>
struct SimtOperand {
  const T* data;
  int64_t ld;
  bool masked;
};

template <typename T>
struct SimtProblem {
  SimtOperand<T> left;
  SimtOperand<T> right;
  T* out;
  int64_t ld_out;
  // Not null: the sums of part s go to parts[s, M, N] instead.
  T* parts;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t split;
  MaskArgs mask;
  // True if kExpand adds to the existing output.
  bool accumulate = false;
};

template <typename T>
struct alignas(16) SimtFour {
  T values[4];
};
template <typename T>
struct alignas(2 * sizeof(T)) SimtTwo {
  T values[2];
};

// Columns column .. column + 7 of a row. Zero from `columns` on, in rows past the end, and where dropped.
template <typename T>
__device__ __forceinline__ void simt_load_eight(
    T (&values)[8], const SimtOperand<T>& from, int64_t row, int64_t rows, int64_t column, int64_t columns,
    const MaskKey& key, const MaskArgs& mask) {
  const bool inside = row < rows && column < columns;
  const T* address = from.data + row * from.ld + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = inside && column + i < columns ? load_global(address + i) : T(0);
  if (from.masked && inside) {
    const Draws draws =
        Eight<false>(key, mask.feature_offset + column).draw(key, key.row(load_global(mask.rows + row)));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!key.keeps(draws, i)) values[i] = T(0);
    }
  }
}

template <typename T, Simt kOperator>
__global__ __launch_bounds__(kSimtThreads) void simt_product(const SimtProblem<T> p) {
  const Shared left = shared_memory();
  const Shared right = left + kSimtStep * kSimtPitch * static_cast<int>(sizeof(T));
  const auto at = [](Shared tile, int k, int i) { return tile + (k * kSimtPitch + i) * static_cast<int>(sizeof(T)); };
  const int thread = threadIdx.x;
  const int64_t tiles_n = ceil_divide(p.n, kSimtTile);
  const int64_t first_m = blockIdx.x / tiles_n * kSimtTile;
  const int64_t first_n = blockIdx.x % tiles_n * kSimtTile;
  const int64_t begin = blockIdx.z * p.split;
  const int64_t end = begin + p.split < p.k ? begin + p.split : p.k;
  MaskKey key;
  if (p.mask.threshold != 0) key = MaskKey(p.mask);

  // Memory rows run along the tile (k across rows) or along k; a thread always loads eight neighbours.
  const auto load = [&](Shared tile, const SimtOperand<T>& from, bool along_k, int64_t first, int64_t count,
                        int64_t k) {
    T values[8];
    if (along_k) {
      const int row = thread / 4;
      const int column = thread % 4 * 8;
      simt_load_eight(values, from, first + row, count, k + column, end, key, p.mask);
#pragma unroll
      for (int i = 0; i < 8; ++i) store_shared(at(tile, column + i, row), values[i]);
    } else {
      const int row = thread / 8;
      const int column = thread % 8 * 8;
      simt_load_eight(values, from, k + row, end, first + column, count, key, p.mask);
#pragma unroll
      for (int i = 0; i < 8; ++i) store_shared(at(tile, row, column + i), values[i]);
    }
  };

  const int row = thread / 8 * 2;
  const int column = thread % 8 * 8;
  T sums[2][8] = {};
  for (int64_t k = begin; k < end; k += kSimtStep) {
    load(left, p.left, kOperator != Simt::kGradA, first_m, p.m, k);
    load(right, p.right, kOperator == Simt::kDown, first_n, p.n, k);
    synchronize_block();
    // A sum of partial sums: its error grows with the number of steps, not with the number of terms in a step.
    T part[2][8] = {};
#pragma unroll 8
    for (int i = 0; i < kSimtStep; ++i) {
      const auto l = load_shared<SimtTwo<T>>(at(left, i, row));
      const auto r0 = load_shared<SimtFour<T>>(at(right, i, column));
      const auto r1 = load_shared<SimtFour<T>>(at(right, i, column + 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        part[0][j] += l.values[0] * r0.values[j];
        part[1][j] += l.values[1] * r0.values[j];
        part[0][4 + j] += l.values[0] * r1.values[j];
        part[1][4 + j] += l.values[1] * r1.values[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[0][j] += part[0][j];
      sums[1][j] += part[1][j];
    }
    synchronize_block();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t m = first_m + row + i;
    const int64_t n = first_n + column;
    if (m >= p.m || n >= p.n) continue;
    const bool masked = kOperator == Simt::kExpand && p.mask.threshold != 0;
    Draws draws{};
    if (masked) draws = Eight<false>(key, p.mask.feature_offset + n).draw(key, key.row(load_global(p.mask.rows + m)));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (n + j >= p.n) continue;
      T* const to =
          p.parts != nullptr ? p.parts + (blockIdx.z * p.m + m) * p.n + n + j : p.out + m * p.ld_out + n + j;
      if constexpr (kOperator == Simt::kExpand) {
        const bool kept = !masked || key.keeps(draws, j);
        if (kept || !p.accumulate) store_global(to, (p.accumulate ? load_own(to) : T(0)) + (kept ? sums[i][j] : T(0)));
      } else {
        store_global(to, sums[i][j]);
      }
    }
  }
}

// The product, and the sum of its parts where there are several.
template <Simt kOperator, typename T>
int launch_simt(const SimtProblem<T>& p, int64_t parts, CUstream_st* stream) {
  const int64_t tiles = ceil_divide(p.m, kSimtTile) * ceil_divide(p.n, kSimtTile);
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(parts));
  const size_t shared_bytes = 2 * kSimtStep * kSimtPitch * sizeof(T);
  const int code = launch(simt_product<T, kOperator>, grid, kSimtThreads, shared_bytes, stream, p);
  if (code != 0 || p.parts == nullptr) return code;
  return launch_sum_parts(static_cast<const T*>(p.parts), p.out, p.ld_out, p.m, p.n, parts, stream);
}

}  // namespace lowrank_dist
