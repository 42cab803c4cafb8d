// From the operators' tensors to thin.h: argument checks, and the choice of the kernels' build.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Optional.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "thin.h"

namespace lowrank_dist {

// The kernels for this machine's best instruction set. ATen chooses, so ATEN_CPU_CAPABILITY applies.
const Thin& thin(Element element);

Element element_of(const char* op, const at::Tensor& tensor);

// A [rows, columns] argument of the given dtype on the CPU, any strides.
View view_of(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type);

// The same for an output: unit inner stride. Returns the leading dimension.
int64_t written(const char* op, const at::Tensor& out, int64_t rows, int64_t columns, at::ScalarType type);

// Quadruples (first column, columns, first rank, ranks); none means the whole matrix.
std::vector<Block> blocks_of(const char* op, at::IntArrayRef blocks, int64_t ranks, int64_t columns);

struct Mask {
  ThinMask thin;
  at::Tensor rows;  // keeps thin.rows alive
};

Mask mask_of(
    const char* op, const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream,
    int64_t threshold, int64_t feature_offset, int64_t tokens);

// Scratch memory of this thread, kept between calls: a new allocation would cost a page fault every 4 KB.
void* scratch(int64_t bytes);

// Memory of one call, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(::operator new(std::max<int64_t>(bytes, 64), std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// The order of a packed operand: that of a for down (kDot), of a for expand and u for grad_a (kPair), of u for expand.
enum class Order { kDot, kPair, kRows };

// The [R, K] matrix, kDot for down and kPair for expand.
class PackedMatrix {
 public:
  PackedMatrix(Element element, const View& a, const std::vector<Block>& blocks, Order order);
  const std::vector<Packed>& blocks() const { return packed_; }

 private:
  std::unique_ptr<Buffer> memory_;
  std::vector<Packed> packed_;
};

// u [T, R], kRows for expand and kPair for grad_a.
std::unique_ptr<Buffer> pack_u(Element element, const View& u, Order order);

}  // namespace lowrank_dist
