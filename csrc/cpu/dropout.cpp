// y[t,k] = x[t,k]·keep(t,k) / (1 − threshold/65536) in one pass over x: the mask is drawn, used and forgotten.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "philox.h"

// A wheel must run on any x86-64, yet AVX-512 is 2.6 times as fast as SSE2 here (AVX2: 1.2 in bf16): each function below
// is compiled for all three and the dynamic linker picks one. Clang and older GCC cannot dispatch on these names.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LOWRANK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOWRANK_CLONES
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the draws of a block are read as the halves of its words");

namespace lowrank_dist {
namespace {

// Blocks drawn together: one lane each of the widest vectors.
constexpr int kLanes = 16;
constexpr int kTile = kLanes * kDrawsPerBlock;

// Everything but the element type. Strides are in elements; y is contiguous.
struct Problem {
  const void* x;
  int64_t stride_t;
  int64_t stride_k;
  const int64_t* rows;
  void* y;
  int64_t features;
  int64_t feature_offset;
  DropoutKey key;
  uint16_t threshold;
};

// draws[i] belongs to global feature 8·first_block + i.
LOWRANK_INLINE void draw_tile(uint16_t* draws, uint32_t first_block, uint64_t row, const DropoutKey& key) {
  uint32_t words[kLanes][4];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t c0 = first_block + lane;
    uint32_t c1 = static_cast<uint32_t>(row);
    uint32_t c2 = static_cast<uint32_t>(row >> 32);
    uint32_t c3 = key.stream;
    philox4x32(c0, c1, c2, c3, key.seed, key.step);
    words[lane][0] = c0;
    words[lane][1] = c1;
    words[lane][2] = c2;
    words[lane][3] = c3;
  }
  std::memcpy(draws, words, sizeof(words));
}

// Half precision is scaled in float32 and rounded once, as PyTorch does. A product, not a selection: NaN stays NaN.
template <typename scalar_t>
LOWRANK_INLINE void apply(
    scalar_t* y, const scalar_t* x, int64_t stride, const uint16_t* draws, int64_t count, uint16_t threshold) {
  using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const auto scale = static_cast<compute_t>(65536.0 / (65536 - threshold));
  for (int64_t i = 0; i < count; ++i) {
    const compute_t factor = draws[i] >= threshold ? scale : compute_t(0);
    y[i] = static_cast<scalar_t>(static_cast<compute_t>(x[i * stride]) * factor);
  }
}

template <typename scalar_t>
LOWRANK_INLINE void dropout_rows(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) uint16_t draws[kTile];
  for (int64_t t = begin; t < end; ++t) {
    const auto* x = static_cast<const scalar_t*>(p.x) + t * p.stride_t;
    auto* y = static_cast<scalar_t*>(p.y) + t * p.features;
    // The first block may begin before this shard's first feature: its leading draws belong to a neighbour.
    int64_t skip = p.feature_offset % kDrawsPerBlock;
    int64_t block = p.feature_offset / kDrawsPerBlock;
    for (int64_t k = 0; k < p.features; block += kLanes) {
      draw_tile(draws, static_cast<uint32_t>(block), static_cast<uint64_t>(p.rows[t]), p.key);
      const int64_t count = std::min<int64_t>(kTile - skip, p.features - k);
      if (p.stride_k != 1) {
        apply(y + k, x + k * p.stride_k, p.stride_k, draws + skip, count, p.threshold);
      } else if (count == kTile) {
        apply(y + k, x + k, 1, draws, kTile, p.threshold);
      } else {
        apply(y + k, x + k, 1, draws + skip, count, p.threshold);
      }
      k += count;
      skip = 0;
    }
  }
}

// target_clones does not take templates.
LOWRANK_CLONES void rows_float64(const Problem& p, int64_t begin, int64_t end) { dropout_rows<double>(p, begin, end); }
LOWRANK_CLONES void rows_float32(const Problem& p, int64_t begin, int64_t end) { dropout_rows<float>(p, begin, end); }
LOWRANK_CLONES void rows_bfloat16(const Problem& p, int64_t begin, int64_t end) {
  dropout_rows<at::BFloat16>(p, begin, end);
}
LOWRANK_CLONES void rows_float16(const Problem& p, int64_t begin, int64_t end) { dropout_rows<at::Half>(p, begin, end); }

using Rows = void (*)(const Problem&, int64_t, int64_t);

Rows rows_for(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return rows_float64;
    case at::kFloat:
      return rows_float32;
    case at::kBFloat16:
      return rows_bfloat16;
    case at::kHalf:
      return rows_float16;
    default:
      TORCH_CHECK(false, "lowrank_dist::dropout: x must be float64, float32, bfloat16 or float16, not ", type);
  }
}

at::Tensor dropout(
    const at::Tensor& x,
    const at::Tensor& rows,
    int64_t seed,
    int64_t step,
    int64_t stream,
    int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(x.dim() == 2, "lowrank_dist::dropout: x must be [T, K], not ", x.sizes());
  TORCH_CHECK(
      rows.dim() == 1 && rows.size(0) == x.size(0) && rows.scalar_type() == at::kLong,
      "lowrank_dist::dropout: rows must be int64 [T] with T = ", x.size(0), ", not ", rows.scalar_type(), " ", rows.sizes());
  TORCH_CHECK(threshold >= 0 && threshold < 65536, "lowrank_dist::dropout: threshold must be in [0, 65536), not ", threshold);
  TORCH_CHECK(feature_offset >= 0, "lowrank_dist::dropout: feature_offset must not be negative, is ", feature_offset);
  const Rows run = rows_for(x.scalar_type());
  const at::Tensor y = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor rows_contiguous = rows.contiguous();
  const Problem problem{
      x.const_data_ptr(),
      x.stride(0),
      x.stride(1),
      rows_contiguous.const_data_ptr<int64_t>(),
      y.mutable_data_ptr(),
      x.size(1),
      feature_offset,
      {static_cast<uint32_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)},
      static_cast<uint16_t>(threshold)};
  // A thread should have enough to do to be worth waking: 32768 elements, as PyTorch's own elementwise kernels.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, x.size(1)));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) { run(problem, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_dist, CPU, m) {
  m.impl("dropout", &dropout);
}

}  // namespace lowrank_dist
