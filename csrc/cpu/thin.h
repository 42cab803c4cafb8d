// The thin products of the low-rank path on a CPU, on raw pointers: one thread's part of each. Compiled four times
// (thin_v4_bf16.cpp, thin_v4.cpp, thin_v3.cpp, thin_baseline.cpp); the build is chosen once at run time, so that a
// wheel runs on any x86-64 and is fast on each.
//
// Legend: T tokens, K columns of the wide matrix (features of X, or outputs of Y), R rows of A or Bᵀ, called ranks.
// A block gives a nonzero part of the [R, K] matrix: columns [column, +columns), ranks [rank, +ranks).
#pragma once

#include <cstdint>

namespace lowrank_dist {

enum class Element : int { kFloat64, kFloat32, kBFloat16, kFloat16 };
constexpr int kElements = 4;

// Strides are in elements.
struct View {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

struct Block {
  int64_t column;
  int64_t columns;
  int64_t rank;
  int64_t ranks;
};

// threshold 0: no mask; `rows` is then not read.
struct ThinMask {
  const int64_t* rows;
  uint32_t seed;
  uint32_t step;
  uint32_t stream;
  uint32_t threshold;
  int64_t feature_offset;
};

// Columns that are drawn, packed and multiplied together: sixteen Philox blocks.
constexpr int64_t kPanel = 128;
// Rows of one task of down and of expand: a few register tiles.
constexpr int64_t kDownRows = 24;
constexpr int64_t kExpandRows = 12;
// Columns that down sums in registers: the packed rows of a register tile then stay in the first-level cache.
constexpr int64_t kDownColumns = 1024;
// Rows (grad_a) or ranks (expand) that are summed from zero before being added to the total: a blocked sum errs less
// than one long chain. kExpandRanks is even.
constexpr int64_t kGradRows = 64;
constexpr int64_t kExpandRanks = 128;

constexpr int64_t panels(int64_t columns) {
  return (columns + kPanel - 1) / kPanel;
}

// A block of the [R, K] matrix in a kernel's reading order, panel by panel, zero beyond the last column.
struct Packed {
  Block block;
  void* data;
};

struct Thin {
  // Panels [begin, end) of one block of a, for down and for expand.
  void (*pack_dot_panels)(const Packed& packed, const View& a, int64_t begin, int64_t end);
  void (*pack_pair_panels)(const Packed& packed, const View& a, int64_t begin, int64_t end);
  // Rows [begin, end) of u, for expand and for grad_a; grad_a's begin is even.
  void (*pack_u_rows)(void* packed, const View& u, int64_t begin, int64_t end);
  void (*pack_u_pairs)(void* packed, const View& u, int64_t begin, int64_t end);
  // out[t, :] = Σ over blocks (m ⊙ x)[t, columns] · aᵀ for rows [begin, end), at most kDownRows. out has unit inner
  // stride; `scratch` is down_scratch_bytes(R) of this thread's own.
  void (*down)(
      void* out, int64_t out_stride, const View& x, const Packed* blocks, int64_t block_count, int64_t ranks,
      const ThinMask& mask, void* scratch, int64_t begin, int64_t end);
  // out[t, columns] += m ⊙ (u · a) for rows [begin, end), at most kExpandRows, and panels [first_panel, last_panel) of
  // one block. out has unit inner stride; u is packed, `ranks` wide.
  void (*expand)(
      void* out, int64_t out_stride, const void* u, int64_t ranks, const Packed& block, const ThinMask& mask,
      int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel);
  // out[ranks, columns] = uᵀ · (m ⊙ x) of one block's panel; out in the type of the sums, unit inner stride; u is
  // packed.
  void (*grad_a)(
      void* out, int64_t out_stride, const void* u, int64_t ranks, const View& x, const Block& block,
      const ThinMask& mask, void* scratch, int64_t panel);
};

// Bytes that suffice for any of the builds: an element is packed in at most 8, and the vector of a sum has at most 64.
constexpr int64_t packed_size(Element element) {
  return element == Element::kFloat64 ? 8 : 4;
}
constexpr int64_t packed_bytes(const Block& block, Element element) {
  return panels(block.columns) * kPanel * (block.ranks + block.ranks % 2) * packed_size(element);
}
constexpr int64_t packed_u_bytes(int64_t tokens, int64_t ranks, Element element) {
  return (tokens + 1) * (ranks + 1) * packed_size(element);
}
constexpr int64_t down_scratch_bytes(int64_t ranks) {
  return kDownRows * ranks * 64 + 6 * kDownColumns * 8;
}
constexpr int64_t grad_a_scratch_bytes(int64_t ranks) {
  return 8 * (ranks * kPanel + kGradRows * kPanel);
}

// The kernels by element type. All but the baseline exist only where GCC compiles for x86-64: AVX-512 with and without
// its bf16 products, and AVX2.
extern const Thin thin_v4_bf16[kElements];
extern const Thin thin_v4[kElements];
extern const Thin thin_v3[kElements];
extern const Thin thin_baseline[kElements];

}  // namespace lowrank_dist
