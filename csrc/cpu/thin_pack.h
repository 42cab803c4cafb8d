// Operands in the order in which thin_kernels.h multiplies them, masked during packing.
#pragma once

#include "thin_mask.h"

namespace lowrank_dist {
namespace {

template <typename E>
LOWRANK_LOCAL void prefetch_row(const View& x, int64_t row, int64_t column) {
  constexpr int64_t size = sizeof(typename E::stored);
  prefetch<false>(
      static_cast<const char*>(x.data) + (row * x.row_stride + column * x.column_stride) * size, kPanel * size);
}

// One row of a panel as operands: `columns` of them from `column` on; zero beyond, and where dropped.
template <typename E>
struct PanelRow {
  alignas(64) typename E::stored gathered[kPanel];
  const typename E::stored* from;
  const int16_t* keep;

  LOWRANK_LOCAL PanelRow(const View& x, int64_t row, int64_t column, int64_t columns, const int16_t* kept)
      : keep(kept) {
    from = static_cast<const typename E::stored*>(x.data) + row * x.row_stride + column * x.column_stride;
    if (x.column_stride == 1 && columns == kPanel) return;
    for (int64_t k = 0; k < columns; ++k) gathered[k] = from[k * x.column_stride];
    for (int64_t k = columns; k < kPanel; ++k) gathered[k] = 0;
    from = gathered;
  }

  LOWRANK_LOCAL typename E::Operand operand(int k) const {
    const typename E::Operand value = E::operand(from + k);
    if (keep == nullptr) return value;
    using Mask = typename E::Mask;
    return (typename E::Operand)((Mask)value & __builtin_convertvector(load_as<typename E::Keep>(keep + k), Mask));
  }
};

// Down's layout: tiles of consecutive columns, `tile_stride` apart.
template <typename E>
LOWRANK_LOCAL void pack_dot(typename E::packed* to, int64_t tile_stride, const PanelRow<E>& row) {
  for (int tile = 0; tile < kPanel / kDotTile<E>; ++tile) {
    for (int k = 0; k < kDotTile<E>; k += kOperandLanes<E>) {
      store_as(to + tile * tile_stride + k, row.operand(tile * kDotTile<E> + k));
    }
  }
}

// Expand's and grad_a's layout: tiles of columns with the kPair rows that are summed together.
template <typename E>
LOWRANK_LOCAL void pack_pair(
    typename E::packed* to, int64_t tile_stride, const PanelRow<E>& first, [[maybe_unused]] const PanelRow<E>* second) {
  if constexpr (E::kPair == 1) {
    pack_dot<E>(to, tile_stride, first);
  } else {
#if LOWRANK_LEVEL == 5
    constexpr U16 low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    for (int k = 0; k < kPanel; k += kOperandLanes<E>) {
      const U16 a = first.operand(k), b = second == nullptr ? U16{} : second->operand(k);
      auto* at = to + k / kTile<E> * tile_stride + k % kTile<E> * 2;
      store_as(at, __builtin_shuffle(a, b, low));
      store_as(at + kOperandLanes<E>, __builtin_shuffle(a, b, low + 16));
    }
#endif
  }
}

template <typename E>
void pack_dot_panels(const Packed& packed, const View& a, int64_t begin, int64_t end) {
  const Block& block = packed.block;
  for (int64_t panel = begin; panel < end; ++panel) {
    auto* to = static_cast<typename E::packed*>(packed.data) + panel * kPanel * block.ranks;
    const int64_t column = panel * kPanel, columns = smaller(kPanel, block.columns - column);
    for (int64_t r = 0; r < block.ranks; ++r) {
      const PanelRow<E> row(a, block.rank + r, block.column + column, columns, nullptr);
      pack_dot<E>(to + r * kDotTile<E>, block.ranks * kDotTile<E>, row);
    }
  }
}

template <typename E>
constexpr int64_t paired(int64_t count) {
  return (count + E::kPair - 1) / E::kPair * E::kPair;
}

template <typename E>
void pack_pair_panels(const Packed& packed, const View& a, int64_t begin, int64_t end) {
  const Block& block = packed.block;
  for (int64_t panel = begin; panel < end; ++panel) {
    auto* to = static_cast<typename E::packed*>(packed.data) + panel * kPanel * paired<E>(block.ranks);
    const int64_t column = panel * kPanel, columns = smaller(kPanel, block.columns - column);
    for (int64_t r = 0; r < block.ranks; r += E::kPair) {
      const PanelRow<E> first(a, block.rank + r, block.column + column, columns, nullptr);
      const bool both = E::kPair == 2 && r + 1 < block.ranks;
      const PanelRow<E> second(a, block.rank + r + both, block.column + column, columns, nullptr);
      pack_pair<E>(to + r * kTile<E>, paired<E>(block.ranks) * kTile<E>, first, both ? &second : nullptr);
    }
  }
}

// u in expand's layout: [T][R + kPair − 1], the last of them zero. A block with an odd number of ranks reads one rank
// beyond its own and multiplies it by zeros.
template <typename E>
void pack_u_rows(void* packed, const View& u, int64_t begin, int64_t end) {
  const auto* from = static_cast<const typename E::stored*>(u.data);
  for (int64_t t = begin; t < end; ++t) {
    auto* to = static_cast<typename E::packed*>(packed) + t * (u.columns + E::kPair - 1);
    for (int64_t r = 0; r < u.columns; ++r) to[r] = E::pack(from[t * u.row_stride + r * u.column_stride]);
    for (int64_t r = u.columns; r < u.columns + E::kPair - 1; ++r) to[r] = 0;
  }
}

// u in grad_a's layout: [T / kPair][R][kPair], zero beyond the last row.
template <typename E>
void pack_u_pairs(void* packed, const View& u, int64_t begin, int64_t end) {
  const auto* from = static_cast<const typename E::stored*>(u.data);
  for (int64_t t = begin; t < end; t += E::kPair) {
    auto* to = static_cast<typename E::packed*>(packed) + t * u.columns;
    for (int64_t r = 0; r < u.columns; ++r) {
      for (int i = 0; i < E::kPair; ++i) {
        const bool there = t + i < u.rows;
        to[r * E::kPair + i] = there ? E::pack(from[(t + i) * u.row_stride + r * u.column_stride]) : 0;
      }
    }
  }
}

}  // namespace
}  // namespace lowrank_dist
