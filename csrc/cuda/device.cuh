// The machine as the kernels see it: PTX in small functions, memory access, conversions, the launch.
//
// LOWRANK_EMULATE replaces this file's machine by tests/emulation/machine.h, which runs the same kernels on a CPU, lane
// by lane. It is the only switch of its kind: all code outside this file is what ships, so its indexing, fragments,
// masks and barriers are tested without a GPU too (tests/unit/test_cuda_kernels.py).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(LOWRANK_EMULATE)
#include "machine.h"
#else
#include <cuda_runtime.h>
#endif

#include "kernels.h"

namespace lowrank_dist {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#if !defined(LOWRANK_EMULATE)

// An address in shared memory.
using Shared = uint32_t;

// A block's dynamic shared memory: the only kind used.
__device__ __forceinline__ Shared shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// Global memory. Inputs that are not written during the kernel go through the read-only path.
template <typename T>
__device__ __forceinline__ T load_global(const T* address) {
  return __ldg(address);
}
template <>
__device__ __forceinline__ BFloat16 load_global(const BFloat16* address) {
  return {__ldg(&address->bits)};
}
template <>
__device__ __forceinline__ Float16 load_global(const Float16* address) {
  return {__ldg(&address->bits)};
}
// Memory that this kernel also writes: not through the read-only path.
template <typename T>
__device__ __forceinline__ T load_own(const T* address) {
  return *address;
}
template <typename T>
__device__ __forceinline__ void store_global(T* address, T value) {
  *address = value;
}
template <>
__device__ __forceinline__ void store_global(uint4* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// A vector's address is a multiple of its size. The sizes of the fast paths are one instruction each, kept in order
// with the asynchronous copies and waits.
template <typename T>
__device__ __forceinline__ T load_shared(Shared address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}
template <>
__device__ __forceinline__ uint4 load_shared(Shared address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}
template <>
__device__ __forceinline__ uint2 load_shared(Shared address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(address));
  return value;
}
template <typename T>
__device__ __forceinline__ void store_shared(Shared address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Copies `bytes` (at most 16) from global memory and fills up to 16 with zeros. Complete at the latest at the wait.
__device__ __forceinline__ void copy16_async(Shared to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are in flight; the copies of the others are visible to
// this thread.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void synchronize_block() { __syncthreads(); }

// The byte n of the result is byte selector[n] of {high, low}.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, kSelector);
}
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// c += a·b over a warp; the fragments of PTX mma.m16n8k16 (see tests/emulation/machine.h).
__device__ __forceinline__ void mma(
    BFloat16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(
    Float16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Rounding to nearest, ties to even.
__device__ __forceinline__ uint32_t pack(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack(Float16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float widen(Float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(wide) : "h"(value.bits));
  return wide;
}
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Returns the error code of the launch alone. A block needs an attribute to get more than 48 KB of shared memory.
template <typename... Parameters, typename... Arguments>
int launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, CUstream_st* stream,
    Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t code = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (code != cudaSuccess) return static_cast<int>(code);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

#endif  // !LOWRANK_EMULATE

// The two elements of a word, the low half first.
template <typename Half>
__device__ __forceinline__ float widen_low(uint32_t word) {
  return widen(Half{static_cast<uint16_t>(word)});
}
template <typename Half>
__device__ __forceinline__ float widen_high(uint32_t word) {
  return widen(Half{static_cast<uint16_t>(word >> 16)});
}

// The type in which a sum is stored.
__device__ __forceinline__ void round_to(BFloat16& to, float sum) {
  to.bits = static_cast<uint16_t>(pack(BFloat16{}, sum, 0.0f));
}
__device__ __forceinline__ void round_to(Float16& to, float sum) {
  to.bits = static_cast<uint16_t>(pack(Float16{}, sum, 0.0f));
}
__device__ __forceinline__ void round_to(float& to, float sum) { to = sum; }
__device__ __forceinline__ void round_to(double& to, double sum) { to = sum; }

// The type in which a product of this type is summed.
template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

__host__ __device__ constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lowrank_dist
