// expand: out[T,K] += m ⊙ (u[T,R] · a[R,K]), out read and written once, or only written.
//
// Half precision: a warp keeps its 32 features of `a` in registers as fragments and walks down the rows, 32 per step;
// out arrives through the warp's own stages. u and the rows' part of the mask are in shared memory for the whole block.
// More than 64 ranks do not fit into registers: the fragments are then read again in every step, from L1.
#include "half.cuh"
#include "mask.cuh"
#include "simt.cuh"

namespace lowrank_dist {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kFeaturesPerWarp = 32;
constexpr int kFeaturesPerBlock = kWarps * kFeaturesPerWarp;
constexpr int kRowsPerStep = 32;
constexpr int kMostSteps = 4;
constexpr int kStages = 3;
// The k of the tensor cores' instruction: 16 ranks.
constexpr int kRanks = 16;
// Largest bytes of u in shared memory: the rest of it is for the stages, for a second block and for L1.
constexpr int64_t kMostBytesOfU = 32 * 1024;

using Pipe = Stages<kStages, 4>;

struct Problem {
  void* out;
  int64_t ld_out;
  const void* u;
  int64_t ld_u;
  const void* a;
  int64_t ld_a;
  int64_t tokens;
  int64_t features;
  int64_t ranks;
  int64_t row_blocks;
  int rows_per_block;
  bool u_in_eights;
  bool accumulate;
  MaskArgs mask;
};

// Bytes of u in shared memory, for one row.
__host__ __device__ __forceinline__ int bytes_of_u(int64_t ranks) {
  return 2 * kRanks * static_cast<int>(ceil_divide(ranks, kRanks));
}

// Fragments of `a` for ranks first .. first + 15: lane (g, q) holds, of 4 ranks from 4q on, feature 8·(g/2) + 2j + g%2.
template <bool kAligned, typename Half>
__device__ __forceinline__ void load_fragments(
    uint32_t (&fragments)[4][2], const Half* a, int64_t ld, int64_t first, int64_t ranks, int64_t count, int q,
    uint32_t selector) {
  uint4 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t rank = first + 4 * q + i;
    words[i] = load_eight<kAligned>(a + rank * ld, rank < ranks ? count : 0);
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint4& low = words[2 * pair];
    const uint4& high = words[2 * pair + 1];
    fragments[0][pair] = permute(low.x, high.x, selector);
    fragments[1][pair] = permute(low.y, high.y, selector);
    fragments[2][pair] = permute(low.z, high.z, selector);
    fragments[3][pair] = permute(low.w, high.w, selector);
  }
}

// One pair of elements after the sum.
template <typename Half>
__device__ __forceinline__ uint32_t add(uint32_t out, const float* sums) {
  return pack(Half{}, widen_low<Half>(out) + sums[0], widen_high<Half>(out) + sums[1]);
}

// kSteps: tiles of 16 ranks whose fragments of `a` are in registers at a time. kResident: these are all ranks.
template <typename Half, int kSteps, bool kResident, bool kMasked, bool kAligned>
__global__ __launch_bounds__(kThreads, kAligned ? 2 : 1) void expand_half(const Problem p) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int q = lane % 4;
  const int64_t slab = blockIdx.x / p.row_blocks;
  const int64_t first_row = blockIdx.x % p.row_blocks * p.rows_per_block;
  const int64_t left_rows = p.tokens - first_row;
  const int rows = left_rows < p.rows_per_block ? static_cast<int>(left_rows) : p.rows_per_block;
  const int64_t first_feature = slab * kFeaturesPerBlock + warp * kFeaturesPerWarp;
  const int64_t feature = first_feature + 8 * q;
  const int64_t count = p.features - feature;
  const Pipe pipe(shared_memory(), warp, lane);
  const Shared shares = shared_memory() + kWarps * Pipe::kBytes;
  const Shared u = shares + (kMasked ? p.rows_per_block * 16 : 0);
  Half* const out = static_cast<Half*>(p.out) + first_row * p.ld_out + feature;

  const auto fetch = [&](int row, int stage) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + 8 * i + g < rows) {
        // A copy of zero bytes gives zeros.
        fetch_eight<kAligned>(pipe.at(stage, i), out + (row + 8 * i + g) * p.ld_out, p.accumulate ? count : 0);
      }
    }
    copy_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage * kRowsPerStep, stage);

  // u in the layout of its fragments, with zeros up to the next multiple of 16 ranks and of 32 rows: 16 bytes for
  // each tile of 16 x 16 and lane (g, q), which are ranks 4q .. 4q + 3 of rows g and g + 8, the two rows pair by pair.
  const int tiles = bytes_of_u(p.ranks) / (2 * kRanks);
  const int padded_rows = (rows + kRowsPerStep - 1) / kRowsPerStep * kRowsPerStep;
  for (int index = threadIdx.x; index < padded_rows * tiles * 2; index += kThreads) {
    const int row = index / (2 * tiles);
    const int eight = index % (2 * tiles);
    const Half* from = static_cast<const Half*>(p.u) + (first_row + row) * p.ld_u + 8 * eight;
    const int64_t ranks = row < rows ? p.ranks - 8 * eight : 0;
    const uint4 words = p.u_in_eights ? load_eight<true>(from, ranks) : load_eight<false>(from, ranks);
    const Shared to =
        u + (row / 16 * tiles + eight / 2) * (kWarp * 16) + (row % 8 * 4 + eight % 2 * 2) * 16 + row / 8 % 2 * 4;
    store_shared(to, words.x);
    store_shared(to + 8, words.y);
    store_shared(to + 16, words.z);
    store_shared(to + 24, words.w);
  }
  MaskKey key;
  if constexpr (kMasked) {
    key = MaskKey(p.mask);
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      const RowShare share = key.row(load_global(p.mask.rows + first_row + row));
      store_shared(shares + row * 16, make_uint4(share.word0, share.word2, share.word3, 0));
    }
  }

  const int64_t a_feature = first_feature + 8 * (g / 2);
  const int64_t a_count = p.features - a_feature;
  const Half* const a = static_cast<const Half*>(p.a) + a_feature;
  const uint32_t selector = g % 2 == 0 ? 0x5410u : 0x7632u;
  uint32_t fragments[kSteps][4][2];
  if constexpr (kResident) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      load_fragments<kAligned>(fragments[s], a, p.ld_a, s * kRanks, p.ranks, a_count, q, selector);
    }
  }
  synchronize_block();

  int stage = 0;
  int free_stage = kStages - 1;
  for (int row = 0; row < rows; row += kRowsPerStep) {
    fetch(row + (kStages - 1) * kRowsPerStep, free_stage);
    free_stage = stage;
    float sums[2][4][4] = {};
    const auto multiply = [&](int tile, const uint32_t(&b)[4][2]) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const auto a = load_shared<uint4>(u + ((row / 16 + m) * tiles + tile) * (kWarp * 16) + lane * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(Half{}, sums[m][j], a.x, a.y, a.z, a.w, b[j][0], b[j][1]);
      }
    };
    if constexpr (kResident) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) multiply(s, fragments[s]);
    } else {
#pragma unroll 2
      for (int tile = 0; tile < tiles; ++tile) {
        load_fragments<kAligned>(fragments[0], a, p.ld_a, tile * kRanks, p.ranks, a_count, q, selector);
        multiply(tile, fragments[0]);
      }
    }

    copy_wait<kStages - 1>();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int here = row + 8 * i + g;
      if (here < rows && count > 0) {
        const float(&sum)[4][4] = sums[i / 2];
        const int c = i % 2 * 2;
        const auto before = load_shared<uint4>(pipe.at(stage, i));
        uint4 value{
            add<Half>(before.x, sum[0] + c), add<Half>(before.y, sum[1] + c), add<Half>(before.z, sum[2] + c),
            add<Half>(before.w, sum[3] + c)};
        if constexpr (kMasked) {
          const Eight<kAligned> eight(key, p.mask.feature_offset + feature);
          const auto share = load_shared<uint4>(shares + here * 16);
          const Draws draws = eight.draw(key, {share.x, share.y, share.z});
          // A dropped element keeps its bits.
          value.x = key.select(draws.words[0], value.x, before.x);
          value.y = key.select(draws.words[1], value.y, before.y);
          value.z = key.select(draws.words[2], value.z, before.z);
          value.w = key.select(draws.words[3], value.w, before.w);
        }
        Half* const to = out + here * p.ld_out;
        if constexpr (kAligned) {
          store_global(reinterpret_cast<uint4*>(to), value);
        } else {
          const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (j < count) store_global(to + j, Half{static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16))});
          }
        }
      }
    }
    stage = next_stage(stage, kStages);
  }
}

template <typename Half, int kSteps, bool kResident, bool kMasked, bool kAligned>
int launch_half(const Problem& p, CUstream_st* stream) {
  const dim3 grid(static_cast<unsigned>(p.row_blocks * ceil_divide(p.features, kFeaturesPerBlock)));
  const size_t shared_bytes =
      kWarps * Pipe::kBytes + static_cast<size_t>(p.rows_per_block) * (bytes_of_u(p.ranks) + (kMasked ? 16 : 0));
  return launch(expand_half<Half, kSteps, kResident, kMasked, kAligned>, grid, kThreads, shared_bytes, stream, p);
}

template <typename Half, bool kMasked>
int launch_half_masked(const Problem& p, bool aligned, CUstream_st* stream) {
  if (!aligned) return launch_half<Half, 1, false, kMasked, false>(p, stream);
  if (p.ranks == 0) return launch_half<Half, 1, false, kMasked, true>(p, stream);
  if (p.ranks <= kRanks) return launch_half<Half, 1, true, kMasked, true>(p, stream);
  if (p.ranks <= 2 * kRanks) return launch_half<Half, 2, true, kMasked, true>(p, stream);
  if (p.ranks <= 3 * kRanks) return launch_half<Half, 3, true, kMasked, true>(p, stream);
  if (p.ranks <= kMostSteps * kRanks) return launch_half<Half, kMostSteps, true, kMasked, true>(p, stream);
  return launch_half<Half, 1, false, kMasked, true>(p, stream);
}

// Enough rows to repay the loading of fragments; fewer where there would be less than four blocks for each
// multiprocessor, which runs two at once.
int rows_per_block(int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  const int64_t slabs = ceil_divide(features, kFeaturesPerBlock);
  int rows = 128;
  while (rows > kRowsPerStep && (rows * static_cast<int64_t>(bytes_of_u(ranks)) > kMostBytesOfU ||
                                 ceil_divide(tokens, rows) * slabs < 4 * static_cast<int64_t>(multiprocessors))) {
    rows /= 2;
  }
  return rows;
}

template <typename Half>
int expand_in_half(
    Matrix out, ConstMatrix u, ConstMatrix a, MaskArgs mask, bool accumulate, int multiprocessors, CUstream_st* stream) {
  const int rows = rows_per_block(out.rows, out.columns, a.rows, multiprocessors);
  const Problem p{
      out.data, out.ld, u.data, u.ld, a.data, a.ld, out.rows, out.columns,
      a.rows, ceil_divide(out.rows, rows), rows, in_eights(u.data, u.ld, u.columns), accumulate, mask};
  const bool aligned = in_eights(out.data, out.ld, out.columns) && in_eights(a.data, a.ld, a.columns) &&
                       (mask.threshold == 0 || mask.feature_offset % kDrawsPerBlock == 0);
  return mask.threshold == 0 ? launch_half_masked<Half, false>(p, aligned, stream)
                             : launch_half_masked<Half, true>(p, aligned, stream);
}

template <typename T>
int expand_in_full(Matrix out, ConstMatrix u, ConstMatrix a, MaskArgs mask, bool accumulate, CUstream_st* stream) {
  const SimtProblem<T> p{
      {static_cast<const T*>(u.data), u.ld, false},
      {static_cast<const T*>(a.data), a.ld, false},
      static_cast<T*>(out.data), out.ld, nullptr, out.rows, out.columns, a.rows, a.rows, mask, accumulate};
  return launch_simt<Simt::kExpand>(p, 1, stream);
}

}  // namespace

int launch_expand(
    Dtype dtype, Matrix out, ConstMatrix u, ConstMatrix a, MaskArgs mask, bool accumulate, int multiprocessors,
    CUstream_st* stream) {
  if (out.rows == 0 || out.columns == 0) return 0;
  if (mask.threshold >= 65536) {
    // Everything is dropped: a sum over no ranks.
    u.columns = a.rows = 0;
    mask.threshold = 0;
  }
  if (a.rows == 0 && accumulate) return 0;
  switch (dtype) {
    case Dtype::kFloat64:
      return expand_in_full<double>(out, u, a, mask, accumulate, stream);
    case Dtype::kFloat32:
      return expand_in_full<float>(out, u, a, mask, accumulate, stream);
    case Dtype::kBFloat16:
      return expand_in_half<BFloat16>(out, u, a, mask, accumulate, multiprocessors, stream);
    default:
      return expand_in_half<Float16>(out, u, a, mask, accumulate, multiprocessors, stream);
  }
}

}  // namespace lowrank_dist
