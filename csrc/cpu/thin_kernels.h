// The body of thin.h, compiled once for each instruction set. The including file has set its compiler target and
// defined LOWRANK_THIN. Everything here is local to it and inlined: the linker may take a shared inline function (std::
// and at:: have many) from the code of another target, and the program may then run an instruction that the machine
// lacks.
#include "thin_pack.h"

namespace lowrank_dist {
namespace {

// ---- down

template <typename E>
LOWRANK_LOCAL typename E::sum sum_lanes(typename E::Vector v) {
  typename E::sum parts[kLanes<E>];
  store_as(parts, v);
  for (int width = kLanes<E> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// sums[i][j], a vector each, += x row i · a rank j over `tiles` tiles.
template <typename E, int Rows, int Ranks>
LOWRANK_LOCAL void dot(
    typename E::sum* sums, int64_t sums_stride, const typename E::packed* x, int64_t x_tile,
    const typename E::packed* a, int64_t a_tile, int64_t tiles) {
  using Vector = typename E::Vector;
  using Operand = typename E::Operand;
  Vector acc[Rows][Ranks] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int k = 0; k < kDotTile<E>; k += kOperandLanes<E>) {
      Operand xs[Rows];
      for (int i = 0; i < Rows; ++i) xs[i] = load_as<Operand>(x + tile * x_tile + i * kDotTile<E> + k);
      for (int j = 0; j < Ranks; ++j) {
        const Operand aj = load_as<Operand>(a + tile * a_tile + j * kDotTile<E> + k);
        for (int i = 0; i < Rows; ++i) acc[i][j] = E::multiply_add(acc[i][j], xs[i], aj);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Ranks; ++j) {
      auto* to = sums + i * sums_stride + j * kLanes<E>;
      store_as(to, load_as<Vector>(to) + acc[i][j]);
    }
  }
}

template <typename E, int Rows>
LOWRANK_LOCAL void dot_ranks(
    typename E::sum* sums, int64_t sums_stride, const typename E::packed* x, const typename E::packed* a, int64_t ranks,
    int64_t tiles) {
  const int64_t x_tile = Rows * kDotTile<E>, a_tile = ranks * kDotTile<E>;
  int64_t r = 0;
  for (; r + kDotRanks <= ranks; r += kDotRanks) {
    dot<E, Rows, kDotRanks>(sums + r * kLanes<E>, sums_stride, x, x_tile, a + r * kDotTile<E>, a_tile, tiles);
  }
  for (; r < ranks; ++r) {
    dot<E, Rows, 1>(sums + r * kLanes<E>, sums_stride, x, x_tile, a + r * kDotTile<E>, a_tile, tiles);
  }
}

// Rows [t, t + Rows) over columns [first, +columns) of a block: packed, then multiplied while they are in the cache.
template <typename E, int Rows>
LOWRANK_LOCAL void down_tile(
    typename E::sum* sums, int64_t ranks, const View& x, const Packed& packed, const ThinMask& mask,
    typename E::packed* packed_x, int64_t t, int64_t first, int64_t columns) {
  const Block& block = packed.block;
  int16_t keep[kKeepRow];
  for (int i = 0; i < Rows; ++i) {
    for (int64_t k = 0; k < columns; k += kPanel) {
      const int64_t column = block.column + first + k, count = smaller(kPanel, columns - k);
      const int16_t* kept = mask.threshold == 0 ? nullptr : keep_row(keep, mask, t + i, column, count);
      prefetch_row<E>(x, t + i + Rows, column);
      const PanelRow<E> row(x, t + i, column, count, kept);
      pack_dot<E>(packed_x + k * Rows + i * kDotTile<E>, Rows * kDotTile<E>, row);
    }
  }
  const auto* a = static_cast<const typename E::packed*>(packed.data) + first * block.ranks;
  const int64_t tiles = panels(columns) * (kPanel / kDotTile<E>);
  dot_ranks<E, Rows>(sums + block.rank * kLanes<E>, ranks * kLanes<E>, packed_x, a, block.ranks, tiles);
}

template <typename E>
void down(
    void* out, int64_t out_stride, const View& x, const Packed* blocks, int64_t block_count, int64_t ranks,
    const ThinMask& mask, void* scratch, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, lanes = ranks * kLanes<E>;
  auto* sums = static_cast<typename E::sum*>(scratch);
  auto* packed_x = reinterpret_cast<typename E::packed*>(sums + kDownRows * lanes);
  std::memset(sums, 0, rows * lanes * sizeof(typename E::sum));
  for (int64_t b = 0; b < block_count; ++b) {
    const int64_t width = blocks[b].block.columns;
    for (int64_t first = 0; first < width; first += kDownColumns) {
      const int64_t columns = smaller(kDownColumns, width - first);
      int64_t t = 0;
      for (; t + kDotRows <= rows; t += kDotRows) {
        down_tile<E, kDotRows>(sums + t * lanes, ranks, x, blocks[b], mask, packed_x, begin + t, first, columns);
      }
      for (; t < rows; ++t) {
        down_tile<E, 1>(sums + t * lanes, ranks, x, blocks[b], mask, packed_x, begin + t, first, columns);
      }
    }
  }
  for (int64_t t = 0; t < rows; ++t) {
    auto* to = static_cast<typename E::stored*>(out) + (begin + t) * out_stride;
    for (int64_t r = 0; r < ranks; ++r) {
      to[r] = E::round(sum_lanes<E>(load_as<typename E::Vector>(sums + t * lanes + r * kLanes<E>)));
    }
  }
}

// ---- expand

// acc[i, :] += u[i, :] · a on one tile, in registers.
template <typename E, int Rows>
LOWRANK_LOCAL void multiply(
    typename E::Vector (&acc)[Rows][kVectors], const typename E::packed* u, int64_t u_stride,
    const typename E::packed* a, int64_t ranks) {
  using Operand = typename E::Operand;
  for (int64_t r = 0; r < ranks; r += E::kPair) {
    Operand av[kVectors];
    for (int v = 0; v < kVectors; ++v) av[v] = load_as<Operand>(a + r * kTile<E> + v * kOperandLanes<E>);
    for (int i = 0; i < Rows; ++i) {
      const Operand ui = E::broadcast(u + i * u_stride + r);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = E::multiply_add(acc[i][v], av[v], ui);
    }
  }
}

// out[i, :] += m ⊙ (u[i, :] · a) on one tile of `columns` columns.
template <typename E, int Rows>
LOWRANK_LOCAL void expand_tile(
    typename E::stored* out, int64_t out_stride, const typename E::packed* u, int64_t u_stride,
    const typename E::packed* a, int64_t ranks, const int16_t* const* keep, int64_t columns) {
  using Vector = typename E::Vector;
  Vector acc[Rows][kVectors] = {};
  multiply<E, Rows>(acc, u, u_stride, a, smaller(ranks, kExpandRanks));
  for (int64_t first = kExpandRanks; first < ranks; first += kExpandRanks) {
    Vector more[Rows][kVectors] = {};
    multiply<E, Rows>(more, u + first, u_stride, a + first * kTile<E>, smaller(ranks - first, kExpandRanks));
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < kVectors; ++v) acc[i][v] += more[i][v];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    typename E::stored* to = out + i * out_stride;
    alignas(64) typename E::stored edge[kTile<E>];
    if (columns < kTile<E>) {
      for (int64_t k = 0; k < columns; ++k) edge[k] = to[k];
      for (int64_t k = columns; k < kTile<E>; ++k) edge[k] = 0;
      to = edge;
    }
    for (int v = 0; v < kVectors; ++v) {
      Vector sum = acc[i][v];
      if (keep != nullptr) sum = select<E>(sum, keep[i] + v * kLanes<E>);
      E::store(to + v * kLanes<E>, E::load(to + v * kLanes<E>) + sum);
    }
    if (columns < kTile<E>) {
      for (int64_t k = 0; k < columns; ++k) out[i * out_stride + k] = edge[k];
    }
  }
}

template <typename E>
void expand(
    void* out, int64_t out_stride, const void* u, int64_t all_ranks, const Packed& packed, const ThinMask& mask,
    int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
  const Block& block = packed.block;
  const int64_t ranks = paired<E>(block.ranks), u_stride = all_ranks + E::kPair - 1;
  int16_t keep[kExpandRows][kKeepRow];
  const int16_t* kept[kExpandRows];
  const auto* u0 = static_cast<const typename E::packed*>(u) + begin * u_stride + block.rank;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t column = block.column + panel * kPanel, columns = smaller(kPanel, block.columns - panel * kPanel);
    auto* to = static_cast<typename E::stored*>(out) + begin * out_stride + column;
    const auto* a = static_cast<const typename E::packed*>(packed.data) + panel * kPanel * ranks;
    for (int64_t t = 0; t < end - begin; ++t) prefetch<true>(to + t * out_stride + kPanel, kPanel * sizeof(*to));
    if (mask.threshold != 0) {
      for (int64_t t = begin; t < end; ++t) kept[t - begin] = keep_row(keep[t - begin], mask, t, column, columns);
    }
    for (int64_t offset = 0; offset < columns; offset += kTile<E>) {
      const int64_t count = smaller(kTile<E>, columns - offset);
      int64_t i = 0;
      for (; i + kRowTile <= end - begin; i += kRowTile) {
        expand_tile<E, kRowTile>(
            to + i * out_stride + offset, out_stride, u0 + i * u_stride, u_stride, a + offset * ranks, ranks,
            mask.threshold == 0 ? nullptr : kept + i, count);
      }
      for (; i < end - begin; ++i) {
        expand_tile<E, 1>(
            to + i * out_stride + offset, out_stride, u0 + i * u_stride, u_stride, a + offset * ranks, ranks,
            mask.threshold == 0 ? nullptr : kept + i, count);
      }
      for (int64_t t = 0; mask.threshold != 0 && t < end - begin; ++t) kept[t] += kTile<E>;
    }
  }
}

// ---- grad_a

// sums[j, :] += Σ over rows u[t, j] · x[t, :] on one tile.
template <typename E, int Ranks>
LOWRANK_LOCAL void grad_tile(
    typename E::sum* sums, const typename E::packed* u, int64_t u_stride, const typename E::packed* x, int64_t rows) {
  using Vector = typename E::Vector;
  using Operand = typename E::Operand;
  Vector acc[Ranks][kVectors] = {};
  for (int64_t t = 0; t < rows; t += E::kPair) {
    Operand xv[kVectors];
    for (int v = 0; v < kVectors; ++v) xv[v] = load_as<Operand>(x + t * kTile<E> + v * kOperandLanes<E>);
    for (int j = 0; j < Ranks; ++j) {
      const Operand uj = E::broadcast(u + t * u_stride + j * E::kPair);
      for (int v = 0; v < kVectors; ++v) acc[j][v] = E::multiply_add(acc[j][v], xv[v], uj);
    }
  }
  for (int j = 0; j < Ranks; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      auto* to = sums + j * kPanel + v * kLanes<E>;
      store_as(to, load_as<Vector>(to) + acc[j][v]);
    }
  }
}

template <typename E>
void grad_a(
    void* out, int64_t out_stride, const void* u, int64_t ranks, const View& x, const Block& block,
    const ThinMask& mask, void* scratch, int64_t panel) {
  auto* sums = static_cast<typename E::sum*>(scratch);
  auto* packed_x = reinterpret_cast<typename E::packed*>(sums + block.ranks * kPanel);
  std::memset(sums, 0, block.ranks * kPanel * sizeof(*sums));
  const int64_t column = block.column + panel * kPanel, columns = smaller(kPanel, block.columns - panel * kPanel);
  int16_t keep[2][kKeepRow];
  for (int64_t begin = 0; begin < x.rows; begin += kGradRows) {
    const int64_t rows = smaller(kGradRows, x.rows - begin), paired_rows = paired<E>(rows);
    for (int64_t t = 0; t < rows; t += E::kPair) {
      const int64_t both = E::kPair == 2 && t + 1 < rows;
      const int16_t* kept[2] = {nullptr, nullptr};
      for (int64_t i = 0; mask.threshold != 0 && i <= both; ++i) {
        kept[i] = keep_row(keep[i], mask, begin + t + i, column, columns);
      }
      for (int i = 0; i < E::kPair; ++i) prefetch_row<E>(x, begin + t + kGradRows / 4 + i, column);
      const PanelRow<E> first(x, begin + t, column, columns, kept[0]);
      const PanelRow<E> second(x, begin + t + both, column, columns, kept[both]);
      pack_pair<E>(packed_x + t * kTile<E>, paired_rows * kTile<E>, first, both ? &second : nullptr);
    }
    const auto* u0 = static_cast<const typename E::packed*>(u) + begin * ranks + block.rank * E::kPair;
    for (int tile = 0; tile < kPanel / kTile<E>; ++tile) {
      const auto* tile_x = packed_x + tile * paired_rows * kTile<E>;
      auto* to = sums + tile * kTile<E>;
      int64_t r = 0;
      for (; r + 6 <= block.ranks; r += 6) grad_tile<E, 6>(to + r * kPanel, u0 + r * E::kPair, ranks, tile_x, rows);
      for (; r + 4 <= block.ranks; r += 4) grad_tile<E, 4>(to + r * kPanel, u0 + r * E::kPair, ranks, tile_x, rows);
      for (; r < block.ranks; ++r) grad_tile<E, 1>(to + r * kPanel, u0 + r * E::kPair, ranks, tile_x, rows);
    }
  }
  auto* to = static_cast<typename E::sum*>(out) + block.rank * out_stride + column;
  for (int64_t r = 0; r < block.ranks; ++r) {
    std::memcpy(to + r * out_stride, sums + r * kPanel, columns * sizeof(*sums));
  }
}

template <typename E>
constexpr Thin table() {
  return {pack_dot_panels<E>, pack_pair_panels<E>, pack_u_rows<E>, pack_u_pairs<E>, down<E>, expand<E>, grad_a<E>};
}

}  // namespace

extern const Thin LOWRANK_THIN[kElements] = {table<Float64>(), table<Float32>(), table<BFloat16>(), table<Float16>()};

}  // namespace lowrank_dist
