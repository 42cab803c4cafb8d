// The schemas of all operators. Kernels register themselves for their device in cpu/ (and cuda/).
#include <torch/library.h>

TORCH_LIBRARY(lowrank_dist, m) {
  m.def(
      "dropout(Tensor x, Tensor rows, int seed, int step, int stream, int threshold, int feature_offset) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
