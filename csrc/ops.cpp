// The schemas of all operators. Kernels register themselves for their device in cpu/ and cuda/.
#include <torch/library.h>

TORCH_LIBRARY(lowrank_dist, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "down(Tensor(a!) out, Tensor x, Tensor a, int[] blocks, Tensor? rows, Tensor? key, int stream, int threshold, "
      "int feature_offset) -> ()",
      tags);
  m.def(
      "expand(Tensor(a!) out, Tensor u, Tensor a, bool accumulate, int[] blocks, Tensor? rows, Tensor? key, int "
      "stream, "
      "int threshold, int feature_offset) -> ()",
      tags);
  m.def(
      "grad_a(Tensor(a!) out, Tensor u, Tensor x, int[] blocks, Tensor? rows, Tensor? key, int stream, int threshold, "
      "int feature_offset) -> ()",
      tags);
  m.def("cpu_capability() -> str");
}
