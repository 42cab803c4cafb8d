// down: out[T,R] = (m ⊙ x)[T,K] · a[R,K]ᵀ, x read once.
//
// Half precision: a warp multiplies 32 rows of x with all ranks, 32 features per step. x goes from global memory to the
// lane that masks and multiplies it. The warps of a block share 64 rows, so that `a` comes from L2 once for all of
// them, and split the features; their sums are added in the order of the warps. The product is outᵀ = a·xᵀ: the tensor
// cores' right operand takes eight neighbouring features as they lie in registers, while the left one would need moves.
#include "half.cuh"
#include "mask.cuh"
#include "simt.cuh"
#include "split.cuh"

namespace lowrank_dist {
namespace {

constexpr int kRowsPerWarp = 32;
constexpr int kRowGroups = 2;
constexpr int kRowsPerBlock = kRowsPerWarp * kRowGroups;
constexpr int kStep = 32;
// Features that one step of all of a block's warps covers at most.
constexpr int kQuantum = 256;
constexpr int kMostRanks = 64;
// The cost of a second launch (about 2.5 microseconds on an H200), in features of one block's share.
constexpr int kSplitPenalty = 640;

struct Problem {
  const void* x;
  int64_t ld_x;
  const void* a;
  int64_t ld_a;
  void* out;
  int64_t ld_out;
  float* parts;
  int64_t tokens;
  int64_t features;
  int64_t ranks;
  int64_t split;
  MaskArgs mask;
  unsigned rank_blocks;
};

// For kTiles tiles of 16 ranks: many warps where the sums leave enough registers, deeper stages where they do not.
template <int kTiles, bool kAligned>
struct Shape {
  static constexpr int kFeatureGroups = !kAligned ? 4 : kTiles <= 2 ? 8 : 6;
  static constexpr int kStages = 24 / kFeatureGroups;
  static constexpr int kWarps = kRowGroups * kFeatureGroups;
  static constexpr int kThreads = kWarps * kWarp;
  using Pipe = Stages<kStages, 4>;
  static constexpr int kSums = 4 * kTiles * 4;
  static constexpr int kReductionBytes = kSums * kThreads * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes =
      kWarps * Pipe::kBytes > kReductionBytes ? kWarps * Pipe::kBytes : kReductionBytes;
};

template <typename Half, int kTiles, bool kMasked, bool kAligned>
__global__ __launch_bounds__(Shape<kTiles, kAligned>::kThreads) void down_half(const Problem p) {
  using S = Shape<kTiles, kAligned>;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int q = lane % 4;
  const int row_group = warp % kRowGroups;
  const int feature_group = warp / kRowGroups;
  // Blocks that differ only in their ranks run side by side: one of them reads x from memory, the others from L2.
  const int64_t block_row = static_cast<int64_t>(blockIdx.x / p.rank_blocks) * kRowsPerBlock;
  const int64_t first_row = block_row + row_group * kRowsPerWarp;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.x % p.rank_blocks) * (16 * kTiles);
  const int64_t begin = blockIdx.z * p.split;
  const int64_t end = begin + p.split < p.features ? begin + p.split : p.features;
  const typename S::Pipe pipe(shared_memory(), warp, lane);

  // Rows and ranks past the end repeat the last one: read but not written.
  const Half* x[4];
  RowShare rows[4];
  MaskKey key;
  if constexpr (kMasked) key = MaskKey(p.mask);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + 8 * i + g < p.tokens ? first_row + 8 * i + g : p.tokens - 1;
    x[i] = static_cast<const Half*>(p.x) + row * p.ld_x + 8 * q;
    if constexpr (kMasked) rows[i] = key.row(load_global(p.mask.rows + row));
  }
  const Half* a[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t rank = first_rank + 16 * m + 8 * h + g;
      a[m][h] = static_cast<const Half*>(p.a) + (rank < p.ranks ? rank : p.ranks - 1) * p.ld_a + 8 * q;
    }
  }

  // Pointers advance and every bound counts steps, so that a step computes few addresses.
  constexpr int kStride = kStep * S::kFeatureGroups;
  const int64_t first_feature = begin + kStep * feature_group;
  const int steps = first_feature < end ? static_cast<int>(ceil_divide(end - first_feature, kStride)) : 0;
  const int64_t count = end - first_feature - 8 * q;
  const int lane_steps = count > 0 ? static_cast<int>(ceil_divide(count, kStride)) : 0;
  // The number of valid features among the eight of this lane's step.
  const auto left = [&](int step) -> int64_t {
    if constexpr (kAligned) return step < lane_steps ? 8 : 0;
    return count - static_cast<int64_t>(step) * kStride;
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] += first_feature;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    a[m][0] += first_feature;
    a[m][1] += first_feature;
  }
  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fetch_eight<kAligned>(pipe.at(stage, i), x[i], left(step));
        x[i] += kStride;
      }
    }
    copy_commit();
  };

  float sums[4][kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) fetch(step, step);
  int stage = 0;
  int free_stage = S::kStages - 1;
  int64_t feature = p.mask.feature_offset + first_feature + 8 * q;
  for (int step = 0; step < steps; ++step) {
    fetch(step + S::kStages - 1, free_stage);
    free_stage = stage;
    uint4 ranks[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ranks[m][h] = load_eight<kAligned>(a[m][h], left(step));
        a[m][h] += kStride;
      }
    }
    copy_wait<S::kStages - 1>();
    uint4 values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = load_shared<uint4>(pipe.at(stage, i));
    if constexpr (kMasked) {
      const Eight<kAligned> eight(key, feature);
      feature += kStride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Draws draws = eight.draw(key, rows[i]);
        values[i].x = key.select(draws.words[0], values[i].x, 0);
        values[i].y = key.select(draws.words[1], values[i].y, 0);
        values[i].z = key.select(draws.words[2], values[i].z, 0);
        values[i].w = key.select(draws.words[3], values[i].w, 0);
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const uint4& upper = ranks[m][0];
      const uint4& lower = ranks[m][1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mma(Half{}, sums[i][m], upper.x, lower.x, upper.y, lower.y, values[i].x, values[i].y);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mma(Half{}, sums[i][m], upper.z, lower.z, upper.w, lower.w, values[i].z, values[i].w);
      }
    }
    stage = next_stage(stage, S::kStages);
  }

  // [feature group][sum][thread of the group]: no two lanes use the same bank, in writing or in reading.
  constexpr int kGroup = kRowGroups * kWarp;
  const auto at = [&](int group, int sum, int thread) {
    return shared_memory() + ((group * S::kSums + sum) * kGroup + thread) * static_cast<int>(sizeof(float));
  };
  synchronize_block();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        store_shared(at(feature_group, (i * kTiles + m) * 4 + c, threadIdx.x % kGroup), sums[i][m][c]);
      }
    }
  }
  synchronize_block();
  for (int index = threadIdx.x; index < S::kSums * kGroup; index += S::kThreads) {
    const int sum = index / kGroup;
    const int thread = index % kGroup;
    float total = load_shared<float>(at(0, sum, thread));
#pragma unroll
    for (int group = 1; group < S::kFeatureGroups; ++group) total += load_shared<float>(at(group, sum, thread));
    const int i = sum / (4 * kTiles);
    const int m = sum / 4 % kTiles;
    const int c = sum % 4;
    const int64_t row = block_row + thread / kWarp * kRowsPerWarp + 8 * i + 2 * (thread % 4) + c % 2;
    const int64_t rank = first_rank + 16 * m + 8 * (c / 2) + thread % kWarp / 4;
    if (row >= p.tokens || rank >= p.ranks) continue;
    if (p.parts != nullptr) {
      store_global(p.parts + (blockIdx.z * p.tokens + row) * p.ranks + rank, total);
    } else {
      Half rounded;
      round_to(rounded, total);
      store_global(static_cast<Half*>(p.out) + row * p.ld_out + rank, rounded);
    }
  }
}

template <typename Half, int kTiles, bool kMasked, bool kAligned>
int launch_half(Problem p, int64_t parts, CUstream_st* stream) {
  using S = Shape<kTiles, kAligned>;
  p.rank_blocks = static_cast<unsigned>(ceil_divide(p.ranks, 16 * kTiles));
  const dim3 grid(
      static_cast<unsigned>(ceil_divide(p.tokens, kRowsPerBlock)) * p.rank_blocks, 1, static_cast<unsigned>(parts));
  return launch(down_half<Half, kTiles, kMasked, kAligned>, grid, S::kThreads, S::kSharedBytes, stream, p);
}

template <typename Half, bool kMasked>
int launch_half_masked(const Problem& p, bool aligned, int64_t parts, CUstream_st* stream) {
  if (!aligned) return launch_half<Half, 2, kMasked, false>(p, parts, stream);
  if (p.ranks <= 16) return launch_half<Half, 1, kMasked, true>(p, parts, stream);
  if (p.ranks <= 32) return launch_half<Half, 2, kMasked, true>(p, parts, stream);
  if (p.ranks <= 48) return launch_half<Half, 3, kMasked, true>(p, parts, stream);
  return launch_half<Half, 4, kMasked, true>(p, parts, stream);
}

Split split_of(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  const bool half = dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
  const int64_t rows = half ? kRowsPerBlock : kSimtTile;
  const int64_t tiles = ceil_divide(tokens, rows) * ceil_divide(ranks, half ? kMostRanks : kSimtTile);
  return choose_split(tiles, features, (half ? 1 : 2) * multiprocessors, kQuantum, kSplitPenalty);
}

template <typename Half>
int down_in_half(
    Matrix out, ConstMatrix x, ConstMatrix a, MaskArgs mask, Split split, float* workspace, CUstream_st* stream) {
  const Problem p{
      x.data, x.ld, a.data, a.ld, out.data, out.ld, split.count > 1 ? workspace : nullptr,
      x.rows, x.columns, a.rows, split.length, mask, 0};
  const bool aligned = in_eights(x.data, x.ld, x.columns) && in_eights(a.data, a.ld, a.columns) &&
                       (mask.threshold == 0 || mask.feature_offset % kDrawsPerBlock == 0);
  const int code = mask.threshold == 0 ? launch_half_masked<Half, false>(p, aligned, split.count, stream)
                                       : launch_half_masked<Half, true>(p, aligned, split.count, stream);
  if (code != 0 || p.parts == nullptr) return code;
  return launch_sum_parts(
      static_cast<const float*>(p.parts), static_cast<Half*>(out.data), out.ld, x.rows, a.rows, split.count, stream);
}

template <typename T>
int down_in_full(
    Matrix out, ConstMatrix x, ConstMatrix a, MaskArgs mask, Split split, T* workspace, CUstream_st* stream) {
  const SimtProblem<T> p{
      {static_cast<const T*>(x.data), x.ld, mask.threshold != 0},
      {static_cast<const T*>(a.data), a.ld, false},
      static_cast<T*>(out.data), out.ld, split.count > 1 ? workspace : nullptr,
      x.rows, a.rows, x.columns, split.length, mask};
  return launch_simt<Simt::kDown>(p, split.count, stream);
}

}  // namespace

size_t down_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  const Split split = split_of(dtype, tokens, features, ranks, multiprocessors);
  if (split.count == 1) return 0;
  const size_t bytes = dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(split.count * tokens * ranks) * bytes;
}

int launch_down(
    Dtype dtype, Matrix out, ConstMatrix x, ConstMatrix a, MaskArgs mask, void* workspace, int multiprocessors,
    CUstream_st* stream) {
  if (x.rows == 0 || a.rows == 0) return 0;
  if (mask.threshold >= 65536) {
    // Everything is dropped: a sum over no features.
    x.columns = a.columns = 0;
    mask.threshold = 0;
  }
  const Split split = split_of(dtype, x.rows, x.columns, a.rows, multiprocessors);
  switch (dtype) {
    case Dtype::kFloat64:
      return down_in_full(out, x, a, mask, split, static_cast<double*>(workspace), stream);
    case Dtype::kFloat32:
      return down_in_full(out, x, a, mask, split, static_cast<float*>(workspace), stream);
    case Dtype::kBFloat16:
      return down_in_half<BFloat16>(out, x, a, mask, split, static_cast<float*>(workspace), stream);
    default:
      return down_in_half<Float16>(out, x, a, mask, split, static_cast<float*>(workspace), stream);
  }
}

}  // namespace lowrank_dist
