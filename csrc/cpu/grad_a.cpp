// out[R,K] = u[T,R]ᵀ · (m ⊙ x)[T,K]: lowrank_dist/ops/low_rank.py. A task is a panel of columns and sums over all rows
// itself, 64 at a time. Tasks share no output, so the result does not depend on the number of threads.
#include <torch/library.h>

#include "arguments.h"

namespace lowrank_dist {
namespace {

void grad_a(
    at::Tensor& out, const at::Tensor& u, const at::Tensor& x, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      u.dim() == 2 && x.dim() == 2, "lowrank_dist::grad_a: u and x must be matrices, not ", u.sizes(), " and ",
      x.sizes());
  const at::ScalarType type = x.scalar_type();
  const Element element = element_of("grad_a", x);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = u.size(1);
  const View u_view = view_of("grad_a", "u", u, tokens, ranks, type);
  const View x_view = view_of("grad_a", "x", x, tokens, features, type);
  const int64_t stride = written("grad_a", out, ranks, features, type == at::kDouble ? at::kDouble : at::kFloat);
  const std::vector<Block> parsed = blocks_of("grad_a", blocks, ranks, features);
  const Mask mask = mask_of("grad_a", rows, key, stream, threshold, feature_offset, tokens);
  const std::unique_ptr<Buffer> packed_u = pack_u(element, u_view, Order::kPair);
  std::vector<std::pair<int64_t, int64_t>> every;  // (block, panel of it)
  for (size_t b = 0; b < parsed.size(); ++b) {
    for (int64_t panel = 0; panel < panels(parsed[b].columns); ++panel) every.emplace_back(b, panel);
  }
  void* data = out.mutable_data_ptr();
  at::parallel_for(0, every.size(), 1, [&](int64_t begin, int64_t end) {
    void* own = scratch(grad_a_scratch_bytes(ranks));
    for (int64_t i = begin; i < end; ++i) {
      thin(element).grad_a(
          data, stride, packed_u->data(), ranks, x_view, parsed[every[i].first], mask.thin, own, every[i].second);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_dist, CPU, m) {
  m.impl("grad_a", &grad_a);
}

}  // namespace lowrank_dist
