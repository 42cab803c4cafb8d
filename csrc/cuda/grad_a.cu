// grad_a: out[R,K] = u[T,R]ᵀ · (m ⊙ x)[T,K], x read once; two stages over the rows.
//
// Half precision: the warps of a block take different rows of the same 64 features, 16 rows per step, and all (at most
// 64) ranks; their sums are added in the order of the warps. A lane loads eight features of four rows and pairs the
// rows.
#include "half.cuh"
#include "mask.cuh"
#include "simt.cuh"
#include "split.cuh"

namespace lowrank_dist {
namespace {

constexpr int kFeatures = 64;
constexpr int kRowsPerStep = 16;
constexpr int kMostRanks = 64;
// Warps that add the sums of all warps and write them.
constexpr int kWriters = 8;
constexpr int kStages = 4;
// The cost of a second launch (about 2.5 microseconds on an H200), in rows of one block's share.
constexpr int kSplitPenalty = 640;

using Pipe = Stages<kStages, 4>;

// For kTiles tiles of 16 ranks: as many warps as the registers for their sums allow.
template <int kTiles>
struct Shape {
  static constexpr int kWarps = kTiles == 2 ? 12 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = kTiles == 1 ? 2 : 1;
  // Rows that one step of all warps covers.
  static constexpr int kQuantum = kWarps * kRowsPerStep;
};

struct Problem {
  const void* u;
  int64_t ld_u;
  const void* x;
  int64_t ld_x;
  // [R, K] of part 0; the next part lies R·K elements on.
  float* out;
  int64_t ld_out;
  int64_t tokens;
  int64_t features;
  int64_t ranks;
  int64_t split;
  unsigned rank_blocks;
  bool out_in_fours;
  MaskArgs mask;
};

// Blocks of 16 ranks; lane g holds ranks 2g and 2g + 1 of each.
template <typename Half, int kTiles, bool kMasked, bool kAligned>
__global__ __launch_bounds__(Shape<kTiles>::kThreads, Shape<kTiles>::kBlocks) void grad_a_half(
    const Problem p) {
  constexpr int kWarps = Shape<kTiles>::kWarps;
  constexpr int kQuantum = Shape<kTiles>::kQuantum;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int q = lane % 4;
  // Blocks that differ only in their ranks run side by side: one of them reads x from memory, the others from L2.
  const int64_t block_feature = static_cast<int64_t>(blockIdx.x / p.rank_blocks) * kFeatures;
  const int64_t feature = block_feature + 8 * g;
  const int64_t count = p.features - feature;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.x % p.rank_blocks) * kMostRanks;
  const int64_t begin = blockIdx.y * p.split;
  const int64_t end = begin + p.split < p.tokens ? begin + p.split : p.tokens;
  const Half* const x = static_cast<const Half*>(p.x) + feature;
  const Half* const u = static_cast<const Half*>(p.u) + first_rank + 2 * g;
  const int64_t ranks = p.ranks - first_rank - 2 * g;
  const Pipe pipe(shared_memory(), warp, lane);
  const int64_t first_row = begin + warp * kRowsPerStep;
  const int64_t lane_row = first_row + 4 * q;
  const int steps = first_row < end ? static_cast<int>(ceil_divide(end - first_row, kQuantum)) : 0;
  // Steps in which this lane has a row; only the last of them may end within its four rows.
  const int lane_steps = lane_row < end ? static_cast<int>(ceil_divide(end - lane_row, kQuantum)) : 0;
  const int last_rows = static_cast<int>(end - lane_row - static_cast<int64_t>(lane_steps - 1) * kQuantum);
  const auto rows_of = [&](int step) { return step < lane_steps - 1 ? 4 : step == lane_steps - 1 ? last_rows : 0; };

  const Half* x_row = x + lane_row * p.ld_x;
  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
      const int rows = rows_of(step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fetch_eight<kAligned>(pipe.at(stage, i), x_row + i * p.ld_x, i < rows ? count : 0);
      }
      x_row += kQuantum * p.ld_x;
    }
    copy_commit();
  };
  // Pairs of ranks. Pairs past the end repeat the last one: they are multiplied but not written.
  struct Pairs {
    uint32_t words[4][kTiles];
  };
  int rank_of[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) rank_of[m] = static_cast<int>(16 * m < ranks ? 16 * m : ranks - 2);
  const Half* u_row = u + lane_row * p.ld_u;
  const auto load_pairs = [&](int step) {
    Pairs pairs = {};
    const int rows = rows_of(step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Half* const pair = u_row + i * p.ld_u;
      if (i >= rows) continue;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if constexpr (kAligned) {
          pairs.words[i][m] = load_global(reinterpret_cast<const uint32_t*>(pair + rank_of[m]));
        } else {
          const uint32_t low = 16 * m < ranks ? load_global(pair + 16 * m).bits : 0;
          const uint32_t high = 16 * m + 1 < ranks ? load_global(pair + 16 * m + 1).bits : 0;
          pairs.words[i][m] = low | high << 16;
        }
      }
    }
    u_row += kQuantum * p.ld_u;
    return pairs;
  };

  MaskKey key;
  if constexpr (kMasked) key = MaskKey(p.mask);
  const Eight<kAligned> eight(key, p.mask.feature_offset + feature);
  float sums[kTiles][8][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step, step);
  const int64_t* names = p.mask.rows + lane_row;
  int stage = 0;
  int free_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    fetch(step + kStages - 1, free_stage);
    free_stage = stage;
    const Pairs pairs = load_pairs(step);
    RowShare shares[4] = {};
    if constexpr (kMasked) {
      const int rows = rows_of(step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < rows) shares[i] = key.row(load_global(names + i));
      }
      names += kQuantum;
    }
    copy_wait<kStages - 1>();
    uint32_t values[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto value = load_shared<uint4>(pipe.at(stage, i));
      values[i][0] = value.x;
      values[i][1] = value.y;
      values[i][2] = value.z;
      values[i][3] = value.w;
      if constexpr (kMasked) {
        const Draws draws = eight.draw(key, shares[i]);
#pragma unroll
        for (int w = 0; w < 4; ++w) values[i][w] = key.select(draws.words[w], values[i][w], 0);
      }
    }
    uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      left[m][0] = permute<0x5410>(pairs.words[0][m], pairs.words[1][m]);
      left[m][1] = permute<0x7632>(pairs.words[0][m], pairs.words[1][m]);
      left[m][2] = permute<0x5410>(pairs.words[2][m], pairs.words[3][m]);
      left[m][3] = permute<0x7632>(pairs.words[2][m], pairs.words[3][m]);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t even0 = permute<0x5410>(values[0][w], values[1][w]);
      const uint32_t even1 = permute<0x5410>(values[2][w], values[3][w]);
      const uint32_t odd0 = permute<0x7632>(values[0][w], values[1][w]);
      const uint32_t odd1 = permute<0x7632>(values[2][w], values[3][w]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma(Half{}, sums[m][2 * w], left[m][0], left[m][1], left[m][2], left[m][3], even0, even1);
        mma(Half{}, sums[m][2 * w + 1], left[m][0], left[m][1], left[m][2], left[m][3], odd0, odd1);
      }
    }
    stage = next_stage(stage, kStages);
  }

  // One tile of ranks at a time, [warp][half of the sum's rank and feature][feature of eight][lane]: no two lanes use
  // the same bank. A thread then adds and writes four neighbouring features.
  const auto at = [&](int of_warp, int half, int j, int of_lane) {
    return shared_memory() + (((of_warp * 4 + half) * 8 + j) * kWarp + of_lane) * static_cast<int>(sizeof(float));
  };
  float* const out = p.out + blockIdx.y * p.ranks * p.features;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    synchronize_block();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) store_shared(at(warp, c, j, lane), sums[m][j][c]);
    }
    synchronize_block();
    if (warp >= kWriters) continue;
    const int half = warp / 2;
    const int first = warp % 2 * 4;
    float totals[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      totals[j] = load_shared<float>(at(0, half, first + j, lane));
#pragma unroll
      for (int w = 1; w < kWarps; ++w) totals[j] += load_shared<float>(at(w, half, first + j, lane));
    }
    const int64_t rank = first_rank + 16 * m + 2 * g + half / 2;
    const int64_t column = block_feature + 8 * (2 * q + half % 2) + first;
    if (rank >= p.ranks) continue;
    float* const to = out + rank * p.ld_out + column;
    if (p.out_in_fours && column + 4 <= p.features) {
      store_global(reinterpret_cast<float4*>(to), make_float4(totals[0], totals[1], totals[2], totals[3]));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < p.features) store_global(to + j, totals[j]);
      }
    }
  }
}

template <typename Half, int kTiles, bool kMasked, bool kAligned>
int launch_half(const Problem& p, int64_t parts, CUstream_st* stream) {
  const dim3 grid(
      static_cast<unsigned>(ceil_divide(p.features, kFeatures)) * p.rank_blocks, static_cast<unsigned>(parts));
  // Shared memory for the stages; the warps' sums need no more.
  static_assert(Pipe::kBytes >= 32 * kWarp * sizeof(float), "the sums of a warp do not fit into its stages");
  using S = Shape<kTiles>;
  return launch(
      grad_a_half<Half, kTiles, kMasked, kAligned>, grid, S::kThreads, S::kWarps * Pipe::kBytes, stream, p);
}

template <typename Half, bool kMasked>
int launch_half_masked(const Problem& p, bool aligned, int64_t parts, CUstream_st* stream) {
  if (!aligned) return launch_half<Half, 4, kMasked, false>(p, parts, stream);
  if (p.ranks <= 16) return launch_half<Half, 1, kMasked, true>(p, parts, stream);
  if (p.ranks <= 32) return launch_half<Half, 2, kMasked, true>(p, parts, stream);
  if (p.ranks <= 48) return launch_half<Half, 3, kMasked, true>(p, parts, stream);
  return launch_half<Half, 4, kMasked, true>(p, parts, stream);
}

Split split_of(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) {
    const int64_t tiles = ceil_divide(features, kFeatures) * ceil_divide(ranks, kMostRanks);
    const auto choose = [&](auto shape) {
      return choose_split(tiles, tokens, shape.kBlocks * multiprocessors, shape.kQuantum, kSplitPenalty);
    };
    return ranks <= 16 ? choose(Shape<1>{}) : ranks <= 32 ? choose(Shape<2>{}) : choose(Shape<4>{});
  }
  const int64_t tiles = ceil_divide(features, kSimtTile) * ceil_divide(ranks, kSimtTile);
  return choose_split(tiles, tokens, 2 * multiprocessors, kSimtStep, kSplitPenalty);
}

template <typename Half>
int grad_a_in_half(
    Matrix out, ConstMatrix u, ConstMatrix x, MaskArgs mask, Split split, float* workspace, CUstream_st* stream) {
  const bool in_parts = split.count > 1;
  float* const to = in_parts ? workspace : static_cast<float*>(out.data);
  const int64_t ld = in_parts ? x.columns : out.ld;
  const bool out_in_fours = reinterpret_cast<uintptr_t>(to) % 16 == 0 && ld % 4 == 0;
  const Problem p{
      u.data, u.ld, x.data, x.ld, to, ld, x.rows, x.columns, u.columns, split.length,
      static_cast<unsigned>(ceil_divide(u.columns, kMostRanks)), out_in_fours, mask};
  const bool aligned = in_eights(x.data, x.ld, x.columns) && reinterpret_cast<uintptr_t>(u.data) % 4 == 0 &&
                       u.ld % 2 == 0 && u.columns % 2 == 0 &&
                       (mask.threshold == 0 || mask.feature_offset % kDrawsPerBlock == 0);
  const int code = mask.threshold == 0 ? launch_half_masked<Half, false>(p, aligned, split.count, stream)
                                       : launch_half_masked<Half, true>(p, aligned, split.count, stream);
  if (code != 0 || !in_parts) return code;
  return launch_sum_parts(
      static_cast<const float*>(workspace), static_cast<float*>(out.data), out.ld, out.rows, out.columns, split.count,
      stream);
}

template <typename T>
int grad_a_in_full(
    Matrix out, ConstMatrix u, ConstMatrix x, MaskArgs mask, Split split, T* workspace, CUstream_st* stream) {
  const SimtProblem<T> p{
      {static_cast<const T*>(u.data), u.ld, false},
      {static_cast<const T*>(x.data), x.ld, mask.threshold != 0},
      static_cast<T*>(out.data), out.ld, split.count > 1 ? workspace : nullptr,
      u.columns, x.columns, x.rows, split.length, mask};
  return launch_simt<Simt::kGradA>(p, split.count, stream);
}

}  // namespace

size_t grad_a_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  const Split split = split_of(dtype, tokens, features, ranks, multiprocessors);
  if (split.count == 1) return 0;
  const size_t bytes = dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(split.count * features * ranks) * bytes;
}

int launch_grad_a(
    Dtype dtype, Matrix out, ConstMatrix u, ConstMatrix x, MaskArgs mask, void* workspace, int multiprocessors,
    CUstream_st* stream) {
  if (out.rows == 0 || out.columns == 0) return 0;
  if (mask.threshold >= 65536) {
    // Everything is dropped: a sum over no rows.
    u.rows = x.rows = 0;
    mask.threshold = 0;
  }
  const Split split = split_of(dtype, x.rows, x.columns, u.columns, multiprocessors);
  switch (dtype) {
    case Dtype::kFloat64:
      return grad_a_in_full(out, u, x, mask, split, static_cast<double*>(workspace), stream);
    case Dtype::kFloat32:
      return grad_a_in_full(out, u, x, mask, split, static_cast<float*>(workspace), stream);
    case Dtype::kBFloat16:
      return grad_a_in_half<BFloat16>(out, u, x, mask, split, static_cast<float*>(workspace), stream);
    default:
      return grad_a_in_half<Float16>(out, u, x, mask, split, static_cast<float*>(workspace), stream);
  }
}

}  // namespace lowrank_dist
