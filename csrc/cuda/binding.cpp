// From the operators' tensors to kernels.h: argument checks, pointers and strides, and the stream.
//
// Nothing here waits for the device. Memory comes from PyTorch's allocator, so a CUDA graph may capture every call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <optional>

#include "kernels.h"

namespace lowrank_dist {
namespace {

// A matrix for a kernel to read, and the tensor that keeps its memory alive.
struct Input {
  at::Tensor tensor;
  ConstMatrix matrix;
};

struct Mask {
  at::Tensor rows;
  at::Tensor key;
  MaskArgs arguments;
};

Dtype dtype_of(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(
          false, "lowrank_dist::", op, ": tensors must be float64, float32, bfloat16 or float16, not ",
          tensor.scalar_type());
  }
}

void check_matrix(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type,
    at::Device device) {
  TORCH_CHECK(
      tensor.device() == device && tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == rows &&
          tensor.size(1) == columns,
      "lowrank_dist::", op, ": ", name, " must be ", type, " [", rows, ", ", columns, "] on ", device, ", not ",
      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

// Neighbouring features must be neighbours in memory; other layouts are copied.
Input input(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type,
    at::Device device) {
  check_matrix(op, name, tensor, rows, columns, type, device);
  const at::Tensor readable = columns <= 1 || tensor.stride(1) == 1 ? tensor : tensor.contiguous();
  return {readable, {readable.const_data_ptr(), rows, columns, readable.stride(0)}};
}

Matrix output(
    const char* op, const at::Tensor& out, int64_t rows, int64_t columns, at::ScalarType type, at::Device device) {
  check_matrix(op, "out", out, rows, columns, type, device);
  TORCH_CHECK(
      columns <= 1 || out.stride(1) == 1, "lowrank_dist::", op, ": out must have unit inner stride, not strides ",
      out.strides());
  TORCH_CHECK(
      rows <= 1 || out.stride(0) >= columns, "lowrank_dist::", op, ": rows of out must not overlap, strides are ",
      out.strides());
  return {out.mutable_data_ptr(), rows, columns, out.stride(0)};
}

Mask mask_of(
    const char* op, const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream,
    int64_t threshold, int64_t feature_offset, int64_t tokens, at::Device device) {
  TORCH_CHECK(
      threshold >= 0 && threshold <= 65536, "lowrank_dist::", op, ": threshold must be in [0, 65536], not ", threshold);
  TORCH_CHECK(feature_offset >= 0, "lowrank_dist::", op, ": feature_offset must not be negative, is ", feature_offset);
  if (threshold == 0) return {{}, {}, {nullptr, nullptr, 0, 0, 0}};
  TORCH_CHECK(rows.has_value() && key.has_value(), "lowrank_dist::", op, ": a mask needs rows and key");
  TORCH_CHECK(
      rows->device() == device && rows->dim() == 1 && rows->size(0) == tokens && rows->scalar_type() == at::kLong,
      "lowrank_dist::", op, ": rows must be int64 [T] on ", device, " with T = ", tokens, ", not ", rows->scalar_type(),
      " ", rows->sizes(), " on ", rows->device());
  TORCH_CHECK(
      key->device() == device && key->dim() == 1 && key->size(0) == 2 && key->scalar_type() == at::kLong,
      "lowrank_dist::", op, ": key must be int64 [2] on ", device, " (seed, step), not ", key->scalar_type(), " ",
      key->sizes(), " on ", key->device());
  Mask mask{rows->contiguous(), key->contiguous(), {}};
  mask.arguments = {
      mask.rows.const_data_ptr<int64_t>(), mask.key.const_data_ptr<int64_t>(), static_cast<uint32_t>(stream),
      static_cast<uint32_t>(threshold), feature_offset};
  return mask;
}

void check_dense(const char* op, at::IntArrayRef blocks) {
  TORCH_CHECK(
      blocks.empty(), "lowrank_dist::", op, ": blocks must be empty on CUDA, where matrices are dense, not ", blocks);
}

// Queried once per device, because it is needed before every launch.
int multiprocessors(at::Device device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  std::atomic<int>& count = known.at(device.index());
  if (count == 0) {
    int found = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device.index()));
    count = found;
  }
  return count;
}

at::Tensor workspace(size_t bytes, at::Device device) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
}

void check_launch(const char* op, int code) {
  TORCH_CHECK(
      code == cudaSuccess, "lowrank_dist::", op, ": the launch failed: ",
      cudaGetErrorString(static_cast<cudaError_t>(code)));
}

void down(
    at::Tensor& out, const at::Tensor& x, const at::Tensor& a, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      x.dim() == 2 && a.dim() == 2, "lowrank_dist::down: x and a must be matrices, not ", x.sizes(), " and ", a.sizes());
  const at::Device device = x.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::ScalarType type = x.scalar_type();
  const Dtype dtype = dtype_of("down", x);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = a.size(0);
  check_dense("down", blocks);
  const Input x_in = input("down", "x", x, tokens, features, type, device);
  const Input a_in = input("down", "a", a, ranks, features, type, device);
  const Matrix written = output("down", out, tokens, ranks, type, device);
  const Mask mask = mask_of("down", rows, key, stream, threshold, feature_offset, tokens, device);
  const int processors = multiprocessors(device);
  const at::Tensor scratch = workspace(down_workspace(dtype, tokens, features, ranks, processors), device);
  check_launch(
      "down", launch_down(
                  dtype, written, x_in.matrix, a_in.matrix, mask.arguments, scratch.mutable_data_ptr(), processors,
                  c10::cuda::getCurrentCUDAStream()));
}

void expand(
    at::Tensor& out, const at::Tensor& u, const at::Tensor& a, bool accumulate, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      u.dim() == 2 && a.dim() == 2, "lowrank_dist::expand: u and a must be matrices, not ", u.sizes(), " and ",
      a.sizes());
  const at::Device device = u.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::ScalarType type = u.scalar_type();
  const Dtype dtype = dtype_of("expand", u);
  const int64_t tokens = u.size(0), ranks = u.size(1), features = a.size(1);
  check_dense("expand", blocks);
  const Input u_in = input("expand", "u", u, tokens, ranks, type, device);
  const Input a_in = input("expand", "a", a, ranks, features, type, device);
  const Matrix written = output("expand", out, tokens, features, type, device);
  const Mask mask = mask_of("expand", rows, key, stream, threshold, feature_offset, tokens, device);
  check_launch(
      "expand", launch_expand(
                    dtype, written, u_in.matrix, a_in.matrix, mask.arguments, accumulate, multiprocessors(device),
                    c10::cuda::getCurrentCUDAStream()));
}

void grad_a(
    at::Tensor& out, const at::Tensor& u, const at::Tensor& x, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      u.dim() == 2 && x.dim() == 2, "lowrank_dist::grad_a: u and x must be matrices, not ", u.sizes(), " and ",
      x.sizes());
  const at::Device device = x.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::ScalarType type = x.scalar_type();
  const Dtype dtype = dtype_of("grad_a", x);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = u.size(1);
  check_dense("grad_a", blocks);
  const Input u_in = input("grad_a", "u", u, tokens, ranks, type, device);
  const Input x_in = input("grad_a", "x", x, tokens, features, type, device);
  const at::ScalarType sum = type == at::kDouble ? at::kDouble : at::kFloat;
  const Matrix written = output("grad_a", out, ranks, features, sum, device);
  const Mask mask = mask_of("grad_a", rows, key, stream, threshold, feature_offset, tokens, device);
  const int processors = multiprocessors(device);
  const at::Tensor scratch = workspace(grad_a_workspace(dtype, tokens, features, ranks, processors), device);
  check_launch(
      "grad_a", launch_grad_a(
                    dtype, written, u_in.matrix, x_in.matrix, mask.arguments, scratch.mutable_data_ptr(), processors,
                    c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_dist, CUDA, m) {
  m.impl("down", &down);
  m.impl("expand", &expand);
  m.impl("grad_a", &grad_a);
}

}  // namespace lowrank_dist
