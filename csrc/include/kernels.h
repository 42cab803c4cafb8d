// What the CUDA kernels take: raw pointers, strides and numbers. No torch header here, so that nvcc alone compiles
// them.
//
// Legend: T tokens, K features of the shared input, R = Σ r over the factors that read it.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace lowrank_dist {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A matrix of elements of one dtype; element (i, j) lies at data + i·ld + j. Nothing is assumed of its alignment.
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
// so that a captured graph draws the next step's mask. threshold 0: no mask, the pointers are not read. 65536: all
// dropped.
struct MaskArgs {
  const int64_t* rows;
  const int64_t* key;
  uint32_t stream;
  uint32_t threshold;
  int64_t feature_offset;
};

// Bytes of scratch memory that a launch wants (0 for none) on a device of that many multiprocessors. A function of the
// shapes alone, and so is the order of every sum: results are bitwise repeatable.
size_t down_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors);
size_t grad_a_workspace(Dtype dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors);

// Each launch returns a cudaError_t (0: success), that of the launches alone: it never waits for a kernel. `workspace`
// is aligned to 16 bytes; what it holds does not matter. `multiprocessors` is the one that sized the workspace.

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
