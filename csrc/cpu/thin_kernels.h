// The body of thin.h, compiled once for each instruction set. The file that includes it has set its compiler target and
// defines LOWRANK_THIN. Everything here is local to it and inlined: an inline function shared with code of another
// target (std:: and at:: have many) could be linked from the wrong one, and then runs into an instruction that is not
// there.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "philox.h"
#include "thin.h"

#define LOWRANK_LOCAL inline __attribute__((always_inline))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the draws of a block are read as the halves of its words");

namespace lowrank_dist {
namespace {

// Register tiles: rows × vectors of accumulators, in 32 registers with AVX-512 and in 16 without.
#if LOWRANK_LEVEL >= 4
constexpr int kBytes = 64, kVectors = 4, kRowTile = 6, kDotRows = 6, kDotRanks = 4;
#elif LOWRANK_LEVEL == 3
constexpr int kBytes = 32, kVectors = 2, kRowTile = 6, kDotRows = 3, kDotRanks = 4;
#else
constexpr int kBytes = 16, kVectors = 2, kRowTile = 6, kDotRows = 3, kDotRanks = 4;
#endif
static_assert(kExpandRows % kRowTile == 0 && kDownRows % kDotRows == 0);

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef int64_t I64 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes)));
typedef uint16_t U16Half __attribute__((vector_size(kBytes / 2)));
typedef int16_t I16Half __attribute__((vector_size(kBytes / 2)));
typedef int16_t I16Quarter __attribute__((vector_size(kBytes / 4)));

template <typename V>
LOWRANK_LOCAL V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
LOWRANK_LOCAL void store_as(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

LOWRANK_LOCAL int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Rows are pages apart, so the processor does not see what comes next in each of them. Prefetching beyond the end of a
// matrix does nothing.
template <bool Written>
LOWRANK_LOCAL void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, Written);
}

// ---- Element types: how they are stored, what they are summed in, and the operands of one multiply-add.
//
// An operand lane holds kPair elements: a multiply-add takes kPair products at once (AVX512_BF16: two), so operands are
// packed with the kPair elements that are summed beside each other.

LOWRANK_LOCAL float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

LOWRANK_LOCAL uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// fp32 or fp64: multiplied as they are.
template <typename Scalar, typename V, typename Integers, typename KeepVector>
struct Plain {
  using stored = Scalar;
  using sum = Scalar;
  using packed = Scalar;
  using Vector = V;
  using Operand = V;
  using Mask = Integers;
  using Keep = KeepVector;
  using SumMask = Mask;
  using SumKeep = Keep;
  static constexpr int kPair = 1;
  static LOWRANK_LOCAL Scalar round(Scalar x) { return x; }
  static LOWRANK_LOCAL Vector load(const Scalar* p) { return load_as<V>(p); }
  static LOWRANK_LOCAL void store(Scalar* p, Vector v) { store_as(p, v); }
  static LOWRANK_LOCAL Scalar pack(Scalar x) { return x; }
  static LOWRANK_LOCAL Operand operand(const Scalar* p) { return load_as<V>(p); }
  static LOWRANK_LOCAL Operand broadcast(const Scalar* p) { return V{} + *p; }
  static LOWRANK_LOCAL Vector multiply_add(Vector acc, Operand a, Operand b) { return acc + a * b; }
};

using Float64 = Plain<double, F64, I64, I16Quarter>;
using Float32 = Plain<float, F32, I32, I16Half>;

// bf16 or fp16 through `Format`: widened to fp32 as they are packed, rounded once as they are stored.
template <typename Format>
struct Widened : Format {
  using stored = uint16_t;
  using sum = float;
  using packed = float;
  using Vector = F32;
  using Operand = F32;
  using Mask = I32;
  using Keep = I16Half;
  using SumMask = Mask;
  using SumKeep = Keep;
  static constexpr int kPair = 1;
  static LOWRANK_LOCAL float pack(uint16_t x) { return Format::widen(x); }
  static LOWRANK_LOCAL Operand operand(const uint16_t* p) { return Format::load(p); }
  static LOWRANK_LOCAL Operand broadcast(const float* p) { return F32{} + *p; }
  static LOWRANK_LOCAL Vector multiply_add(Vector acc, Operand a, Operand b) { return acc + a * b; }
};

struct BFloat16Format {
  static LOWRANK_LOCAL float widen(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static LOWRANK_LOCAL uint16_t round(float x) {
    const uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static LOWRANK_LOCAL F32 load(const uint16_t* p) {
    return (F32)(__builtin_convertvector(load_as<U16Half>(p), U32) << 16);
  }
  static LOWRANK_LOCAL void store(uint16_t* p, F32 v) {
    const U32 bits = (U32)v;
    const U32 nan = (U32)(v != v);
    const U32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_as(p, __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), U16Half));
  }
};

struct Float16Format {
  static LOWRANK_LOCAL float widen(uint16_t x) {
    // Subnormals and zeros come out right because the product with 2^112 is exact and normalises.
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return float_of(bits_of(float_of(rest << 13) * 0x1p112f) | sign);
  }
  static LOWRANK_LOCAL uint16_t round(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or beyond
    if (rest < 0x38800000) {                       // below the smallest normal: added to 2^-1 it rounds at 2^-24
      return sign | static_cast<uint16_t>(bits_of(float_of(rest) + 0.5f) - bits_of(0.5f));
    }
    return sign | static_cast<uint16_t>((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
  }
  static LOWRANK_LOCAL F32 load(const uint16_t* p) {
#if LOWRANK_LEVEL >= 4
    return (F32)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif LOWRANK_LEVEL == 3
    return (F32)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    F32 v;
    for (int i = 0; i < kBytes / 4; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
  static LOWRANK_LOCAL void store(uint16_t* p, F32 v) {
#if LOWRANK_LEVEL >= 4
    store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LOWRANK_LEVEL == 3
    store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kBytes / 4; ++i) p[i] = round(v[i]);
#endif
  }
};

using Float16 = Widened<Float16Format>;

#if LOWRANK_LEVEL == 5
// AVX512_BF16 multiplies pairs of bf16 into fp32 sums: half the packed bytes and half the instructions. Like oneDNN's
// products it takes subnormals (below 1.2e-38) for zeros, as it multiplies and as it rounds.
struct BFloat16 : BFloat16Format {
  using stored = uint16_t;
  using sum = float;
  using packed = uint16_t;
  using Vector = F32;
  using Operand = U16;
  using Mask = U16;
  using Keep = U16;
  using SumMask = I32;
  using SumKeep = I16Half;
  static constexpr int kPair = 2;
  static LOWRANK_LOCAL void store(uint16_t* p, F32 v) { store_as(p, _mm512_cvtneps_pbh((__m512)v)); }
  static LOWRANK_LOCAL uint16_t pack(uint16_t x) { return x; }
  static LOWRANK_LOCAL Operand operand(const uint16_t* p) { return load_as<U16>(p); }
  static LOWRANK_LOCAL Operand broadcast(const uint16_t* p) { return (U16)(U32{} + load_as<uint32_t>(p)); }
  static LOWRANK_LOCAL Vector multiply_add(Vector acc, Operand a, Operand b) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#else
using BFloat16 = Widened<BFloat16Format>;
#endif

// Columns of one vector of sums, of the sums of a register tile (expand, grad_a) and of a tile of down's operands.
template <typename E>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(typename E::sum));
template <typename E>
constexpr int kTile = kVectors * kLanes<E>;
template <typename E>
constexpr int kDotTile = E::kPair * kTile<E>;
template <typename E>
constexpr int kOperandLanes = kBytes / static_cast<int>(sizeof(typename E::packed));

// ---- The dropout mask: 16-bit all-ones where an element is kept.

// The low halves of a's 64-bit lanes times b. Its callers leave garbage in the high halves.
LOWRANK_LOCAL U64 multiply_low(U64 a, uint32_t b) {
#if LOWRANK_LEVEL >= 4
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LOWRANK_LEVEL == 3
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * static_cast<uint64_t>(b);
#endif
}

constexpr int kBlockLanes = kBytes / 8;  // Philox blocks drawn together, one in each 64-bit lane
constexpr int kKeepRow = static_cast<int>(kPanel) + kDrawsPerBlock * kBlockLanes;

#if LOWRANK_LEVEL >= 4
constexpr U64 kCount = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr I64 kLow = {0, 8, 1, 9, 2, 10, 3, 11}, kHigh = {4, 12, 5, 13, 6, 14, 7, 15};
#elif LOWRANK_LEVEL == 3
constexpr U64 kCount = {0, 1, 2, 3};
constexpr I64 kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7};
#else
constexpr U64 kCount = {0, 1};
constexpr I64 kLow = {0, 2}, kHigh = {1, 3};
#endif

LOWRANK_LOCAL void keep_blocks(int16_t* keep, uint64_t first_block, uint64_t row, const ThinMask& mask) {
  const U64 zero = {};
  U64 c0 = kCount + first_block, c1 = zero + (row & 0xffffffff), c2 = zero + (row >> 32), c3 = zero + mask.stream;
  uint32_t k0 = mask.seed, k1 = mask.step;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U64 product0 = multiply_low(c0, kPhiloxMultiplier0), product1 = multiply_low(c2, kPhiloxMultiplier1);
    c0 = product1 >> 32 ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = product1;
    c2 = product0 >> 32 ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const U64 first = (c0 & 0xffffffff) | c1 << 32, second = (c2 & 0xffffffff) | c3 << 32;
  const uint16_t threshold = static_cast<uint16_t>(mask.threshold);
  const U16 low = (U16)__builtin_shuffle(first, second, (U64)kLow),
            high = (U16)__builtin_shuffle(first, second, (U64)kHigh);
  store_as(keep, low >= threshold);
  store_as(keep + kBytes / 2, high >= threshold);
}

// Draws a panel of one row into `buffer` [kKeepRow]; returns where its first feature lies in it.
LOWRANK_LOCAL const int16_t* keep_row(
    int16_t* buffer, const ThinMask& mask, int64_t t, int64_t column, int64_t columns) {
  if (mask.threshold > 0xffff) {
    std::memset(buffer, 0, sizeof(int16_t) * kPanel);
    return buffer;
  }
  const uint64_t feature = static_cast<uint64_t>(mask.feature_offset + column);
  const int skip = static_cast<int>(feature % kDrawsPerBlock);
  constexpr int kStep = kDrawsPerBlock * kBlockLanes;
  for (int64_t done = 0; done < columns + skip; done += kStep) {
    keep_blocks(buffer + done, (feature + done) / kDrawsPerBlock, static_cast<uint64_t>(mask.rows[t]), mask);
  }
  return buffer + skip;
}

// A vector of sums where it is kept, zero elsewhere.
template <typename E>
LOWRANK_LOCAL typename E::Vector select(typename E::Vector v, const int16_t* keep) {
  using Mask = typename E::SumMask;
  return (typename E::Vector)((Mask)v & __builtin_convertvector(load_as<typename E::SumKeep>(keep), Mask));
}

// ---- Packing

template <typename E>
LOWRANK_LOCAL void prefetch_row(const View& x, int64_t row, int64_t column) {
  constexpr int64_t size = sizeof(typename E::stored);
  prefetch<false>(
      static_cast<const char*>(x.data) + (row * x.row_stride + column * x.column_stride) * size, kPanel * size);
}

// One row of a panel as operands: `columns` of them from `column` on, zero beyond, and where not kept.
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

// Expand's and grad_a's layout: tiles of columns with the kPair rows that are summed beside each other.
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

// u as expand reads it: [T][R + kPair − 1], the last of them zero. A block of an odd number of ranks reads one rank
// beyond its own, times zeros.
template <typename E>
void pack_u_rows(void* packed, const View& u, int64_t begin, int64_t end) {
  const auto* from = static_cast<const typename E::stored*>(u.data);
  for (int64_t t = begin; t < end; ++t) {
    auto* to = static_cast<typename E::packed*>(packed) + t * (u.columns + E::kPair - 1);
    for (int64_t r = 0; r < u.columns; ++r) to[r] = E::pack(from[t * u.row_stride + r * u.column_stride]);
    for (int64_t r = u.columns; r < u.columns + E::kPair - 1; ++r) to[r] = 0;
  }
}

// u as grad_a reads it: [T / kPair][R][kPair], zero beyond the last row.
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
