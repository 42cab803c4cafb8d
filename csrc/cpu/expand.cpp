// out[T,K] += m ⊙ (u[T,R] · a[R,K]), or = without `accumulate`: lowrank_dist/ops/low_rank.py. No two tasks write the
// same element of out.
#include <torch/library.h>

#include "arguments.h"

namespace lowrank_dist {
namespace {

// Panels of one task: with few rows, the threads share the columns.
constexpr int64_t kChunk = 16;

struct Columns {
  int64_t block;
  int64_t first_panel;
  int64_t last_panel;
};

void expand(
    at::Tensor& out, const at::Tensor& u, const at::Tensor& a, bool accumulate, at::IntArrayRef blocks,
    const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& key, int64_t stream, int64_t threshold,
    int64_t feature_offset) {
  TORCH_CHECK(
      u.dim() == 2 && a.dim() == 2, "lowrank_dist::expand: u and a must be matrices, not ", u.sizes(), " and ",
      a.sizes());
  const at::ScalarType type = u.scalar_type();
  const Element element = element_of("expand", u);
  const int64_t tokens = u.size(0), ranks = u.size(1), features = a.size(1);
  const View u_view = view_of("expand", "u", u, tokens, ranks, type);
  const View a_view = view_of("expand", "a", a, ranks, features, type);
  const int64_t stride = written("expand", out, tokens, features, type);
  const std::vector<Block> parsed = blocks_of("expand", blocks, ranks, features);
  const Mask mask = mask_of("expand", rows, key, stream, threshold, feature_offset, tokens);
  if (tokens == 0) return;
  if (!accumulate) out.zero_();
  const PackedMatrix packed(element, a_view, parsed, Order::kPair);
  const std::unique_ptr<Buffer> packed_u = pack_u(element, u_view, Order::kRows);
  std::vector<Columns> chunks;
  for (size_t b = 0; b < parsed.size(); ++b) {
    for (int64_t panel = 0; panel < panels(parsed[b].columns); panel += kChunk) {
      chunks.push_back({static_cast<int64_t>(b), panel, std::min(panel + kChunk, panels(parsed[b].columns))});
    }
  }
  const int64_t tasks = (tokens + kExpandRows - 1) / kExpandRows * chunks.size();
  void* data = out.mutable_data_ptr();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Columns& chunk = chunks[i % chunks.size()];
      const int64_t first = i / static_cast<int64_t>(chunks.size()) * kExpandRows;
      thin(element).expand(
          data, stride, packed_u->data(), ranks, packed.blocks()[chunk.block], mask.thin, first,
          std::min(first + kExpandRows, tokens), chunk.first_panel, chunk.last_panel);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank_dist, CPU, m) {
  m.impl("expand", &expand);
}

}  // namespace lowrank_dist
