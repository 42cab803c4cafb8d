// Types for thin_kernels.h: the instruction set's vectors and register tiles, and the element types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "thin.h"

#define LOWRANK_LOCAL inline __attribute__((always_inline))

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

// Rows are pages apart, so the hardware prefetcher does not follow them. Prefetching beyond the end of a matrix does
// nothing.
template <bool Written>
LOWRANK_LOCAL void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, Written);
}

// ---- Element types: their storage, the type of their sums, and the operands of one multiply-add.
//
// An operand lane holds kPair elements: a multiply-add takes kPair products at once (AVX512_BF16: two), so operands are
// packed with the kPair elements that are summed together side by side.

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
// products it treats subnormals (below 1.2e-38) as zeros, in multiplying and in rounding.
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

// Columns of a vector of sums, of a register tile's sums (expand, grad_a) and of a tile of down's operands.
template <typename E>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(typename E::sum));
template <typename E>
constexpr int kTile = kVectors * kLanes<E>;
template <typename E>
constexpr int kDotTile = E::kPair * kTile<E>;
template <typename E>
constexpr int kOperandLanes = kBytes / static_cast<int>(sizeof(typename E::packed));

}  // namespace
}  // namespace lowrank_dist
