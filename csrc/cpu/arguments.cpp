#include "arguments.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace lowrank_dist {
namespace {

struct Choice {
  const Thin* table;
  std::string name;
};

const Choice& choice() {
  static const Choice chosen = []() -> Choice {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const std::string capability = at::get_cpu_capability();
    // A user who sets ATEN_CPU_CAPABILITY gets that level and no higher one.
    if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16") &&
        std::getenv("ATEN_CPU_CAPABILITY") == nullptr) {
      return {thin_v4_bf16, "AVX-512 with bf16 products"};
    }
    if (capability == "AVX512") return {thin_v4, "AVX-512"};
    if (capability == "AVX2") return {thin_v3, "AVX2"};
#endif
    return {thin_baseline, "baseline"};
  }();
  return chosen;
}

// Elements that make it worth waking a thread, as in PyTorch's own elementwise kernels.
constexpr int64_t kGrain = 32768;

}  // namespace

const Thin& thin(Element element) {
  return choice().table[static_cast<int>(element)];
}

Element element_of(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Element::kFloat64;
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK(
          false, "lowrank_dist::", op, ": tensors must be float64, float32, bfloat16 or float16, not ",
          tensor.scalar_type());
  }
}

View view_of(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type) {
  TORCH_CHECK(
      tensor.device().is_cpu() && tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == rows &&
          tensor.size(1) == columns,
      "lowrank_dist::", op, ": ", name, " must be ", type, " [", rows, ", ", columns, "] on the CPU, not ",
      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  return {tensor.const_data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1)};
}

int64_t written(const char* op, const at::Tensor& out, int64_t rows, int64_t columns, at::ScalarType type) {
  const View view = view_of(op, "out", out, rows, columns, type);
  TORCH_CHECK(
      columns <= 1 || view.column_stride == 1, "lowrank_dist::", op, ": out must have unit inner stride, not strides ",
      out.strides());
  TORCH_CHECK(
      rows <= 1 || view.row_stride >= columns, "lowrank_dist::", op, ": rows of out must not overlap, strides are ",
      out.strides());
  return view.row_stride;
}

std::vector<Block> blocks_of(const char* op, at::IntArrayRef blocks, int64_t ranks, int64_t columns) {
  TORCH_CHECK(
      blocks.size() % 4 == 0, "lowrank_dist::", op, ": blocks must be quadruples, not ", blocks.size(), " numbers");
  if (blocks.empty()) return {{0, columns, 0, ranks}};
  std::vector<Block> parsed;
  parsed.reserve(blocks.size() / 4);
  for (size_t i = 0; i < blocks.size(); i += 4) {
    const Block block{blocks[i], blocks[i + 1], blocks[i + 2], blocks[i + 3]};
    TORCH_CHECK(
        block.column >= 0 && block.columns >= 0 && block.columns <= columns - block.column && block.rank >= 0 &&
            block.ranks >= 0 && block.ranks <= ranks - block.rank,
        "lowrank_dist::", op, ": block ", blocks.slice(i, 4), " does not lie in [", ranks, ", ", columns, "]");
    parsed.push_back(block);
  }
  return parsed;
}

Mask mask_of(
    const char* op, const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream,
    int64_t threshold, int64_t feature_offset, int64_t tokens) {
  TORCH_CHECK(
      threshold >= 0 && threshold <= 65536, "lowrank_dist::", op, ": threshold must be in [0, 65536], not ", threshold);
  TORCH_CHECK(feature_offset >= 0, "lowrank_dist::", op, ": feature_offset must not be negative, is ", feature_offset);
  if (threshold == 0) return {{nullptr, 0, 0, 0, 0, 0}, {}};
  TORCH_CHECK(rows.has_value() && key.has_value(), "lowrank_dist::", op, ": a mask needs rows and key");
  TORCH_CHECK(
      rows->device().is_cpu() && rows->dim() == 1 && rows->size(0) == tokens && rows->scalar_type() == at::kLong,
      "lowrank_dist::", op, ": rows must be int64 [T] on the CPU with T = ", tokens, ", not ", rows->scalar_type(), " ",
      rows->sizes(), " on ", rows->device());
  TORCH_CHECK(
      key->device().is_cpu() && key->dim() == 1 && key->size(0) == 2 && key->scalar_type() == at::kLong,
      "lowrank_dist::", op, ": key must be int64 [2] on the CPU (seed, step), not ", key->scalar_type(), " ",
      key->sizes(), " on ", key->device());
  const at::Tensor contiguous = rows->contiguous();
  const int64_t* numbers = key->const_data_ptr<int64_t>();
  return {
      {contiguous.const_data_ptr<int64_t>(), static_cast<uint32_t>(numbers[0]),
       static_cast<uint32_t>(numbers[key->stride(0)]), static_cast<uint32_t>(stream), static_cast<uint32_t>(threshold),
       feature_offset},
      contiguous};
}

void* scratch(int64_t bytes) {
  thread_local std::unique_ptr<Buffer> kept;
  thread_local int64_t size = 0;
  if (size < bytes) {
    kept.reset();
    kept = std::make_unique<Buffer>(bytes);
    size = bytes;
  }
  return kept->data();
}

PackedMatrix::PackedMatrix(Element element, const View& a, const std::vector<Block>& blocks, Order order) {
  const auto pack = order == Order::kDot ? thin(element).pack_dot_panels : thin(element).pack_pair_panels;
  int64_t bytes = 0, count = 0;
  for (const Block& block : blocks) {
    bytes += packed_bytes(block, element);
    count += panels(block.columns);
  }
  memory_ = std::make_unique<Buffer>(bytes);
  char* next = memory_->data();
  // Panel → (block, panel of the block), so that one parallel loop covers the panels of all blocks.
  std::vector<std::pair<int64_t, int64_t>> every;
  every.reserve(count);
  for (const Block& block : blocks) {
    for (int64_t panel = 0; panel < panels(block.columns); ++panel) every.emplace_back(packed_.size(), panel);
    packed_.push_back({block, next});
    next += packed_bytes(block, element);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kPanel * a.rows));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(packed_[every[i].first], a, every[i].second, every[i].second + 1);
    }
  });
}

std::unique_ptr<Buffer> pack_u(Element element, const View& u, Order order) {
  auto packed = std::make_unique<Buffer>(packed_u_bytes(u.rows, u.columns, element));
  const auto pack = order == Order::kRows ? thin(element).pack_u_rows : thin(element).pack_u_pairs;
  // In pairs: rows that are summed together are packed together.
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / std::max<int64_t>(1, u.columns));
  at::parallel_for(0, (u.rows + 1) / 2, grain, [&](int64_t begin, int64_t end) {
    pack(packed->data(), u, 2 * begin, std::min(2 * end, u.rows));
  });
  return packed;
}

TORCH_LIBRARY_IMPL(lowrank_dist, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", []() { return choice().name; });
}

}  // namespace lowrank_dist
