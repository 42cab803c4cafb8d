// The interface of the CUDA kernels: raw pointers, strides and numbers. No torch header here, so that nvcc alone
// compiles them.
//
// Legend: T tokens, K features of the shared input, R = Σ r over the factors that read it.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace lowrank_dist {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A matrix of elements of one dtype; element (i, j) lies at data + i·ld + j. Any alignment is allowed.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t ld;
};

struct ConstMatrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t ld;
};

// m(t,k) = [draw16(rows[t], feature_offset + k) >= threshold], see philox.h; `key` = {seed, step} lies on the device,
// so that a captured graph draws the next step's mask. threshold 0: no mask, and the pointers are not read. threshold
// 65536: everything is dropped.
struct MaskArgs {
  const int64_t* rows;
  const int64_t* key;
  uint32_t stream;
  uint32_t threshold;
  int64_t feature_offset;
};

// Bytes of scratch memory for a launch (0 for none) on a device of this many multiprocessors. It depends on the shapes
// alone, as does the order of every sum, so results are bitwise repeatable.
size_t down_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors);
size_t grad_a_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors);

// Each launch returns the cudaError_t (0: success) of the launches alone: it never waits for a kernel. `workspace` is
// aligned to 16 bytes and may hold anything. `multiprocessors` is the number that sized the workspace.

// out[T,R] = (m ⊙ x)[T,K] · a[R,K]ᵀ, summed in fp32 (fp64 for fp64) and rounded once to the dtype.
[[nodiscard]] int launch_down(
    Dtype dtype, Matrix out, ConstMatrix x, ConstMatrix a, MaskArgs mask, void* workspace, int multiprocessors,
    CUstream_st* stream);

// out[T,K] += m ⊙ (u[T,R] · a[R,K]): the product in fp32, one rounding to the dtype after the sum with out. Without
// `accumulate` out is written and not read.
[[nodiscard]] int launch_expand(
    Dtype dtype, Matrix out, ConstMatrix u, ConstMatrix a, MaskArgs mask, bool accumulate, int multiprocessors,
    CUstream_st* stream);

// out[R,K] = u[T,R]ᵀ · (m ⊙ x)[T,K]; u and x of the dtype, out fp32 (fp64 for fp64). Two stages over rows, no atomics;
// zeros where T = 0.
[[nodiscard]] int launch_grad_a(
    Dtype dtype, Matrix out, ConstMatrix u, ConstMatrix x, MaskArgs mask, void* workspace, int multiprocessors,
    CUstream_st* stream);

}  // namespace lowrank_dist
