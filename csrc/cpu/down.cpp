// out[T,R] = (m ⊙ x)[T,K] · a[R,K]ᵀ: lowrank_dist/ops/low_rank.py. Blocks of rows are the tasks; each sums over K in one
// order.
#include <torch/library.h>

#include "arguments.h"

namespace lowrank_dist {
namespace {

void down(
    at::Tensor& out, const at::Tensor& x, const at::Tensor& a, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      x.dim() == 2 && a.dim() == 2, "lowrank_dist::down: x and a must be matrices, not ", x.sizes(), " and ",
      a.sizes());
  const at::ScalarType type = x.scalar_type();
  const Element element = element_of("down", x);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = a.size(0);
  const View x_view = view_of("down", "x", x, tokens, features, type);
  const View a_view = view_of("down", "a", a, ranks, features, type);
  const int64_t stride = written("down", out, tokens, ranks, type);
  const std::vector<Block> parsed = blocks_of("down", blocks, ranks, features);
  const Mask mask = mask_of("down", rows, key, stream, threshold, feature_offset, tokens);
  if (tokens == 0 || ranks == 0) return;
  const PackedMatrix packed(element, a_view, parsed, Order::kDot);
  void* data = out.mutable_data_ptr();
  at::parallel_for(0, (tokens + kDownRows - 1) / kDownRows, 1, [&](int64_t begin, int64_t end) {
    void* own = scratch(down_scratch_bytes(ranks));
    for (int64_t i = begin; i < end; ++i) {
      thin(element).down(
          data, stride, x_view, packed.blocks().data(), packed.blocks().size(), ranks, mask.thin, own, i * kDownRows,
          std::min((i + 1) * kDownRows, tokens));
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_dist, CPU, m) {
  m.impl("down", &down);
}

}  // namespace lowrank_dist
