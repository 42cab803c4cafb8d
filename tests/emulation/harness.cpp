// The emulated kernels for ctypes: every matrix by pointer, the machine's switches, and its mma on its own.
#include "device.cuh"

using lowrank_dist::ConstMatrix;
using lowrank_dist::Dtype;
using lowrank_dist::MaskArgs;
using lowrank_dist::Matrix;

namespace {

emulation::Machine& m = emulation::machine();

template <typename Half>
void one_mma(const uint32_t* a, const uint32_t* b, float* c) {
  const unsigned lane = threadIdx.x;
  float sums[4];
  std::memcpy(sums, c + 4 * lane, sizeof(sums));
  lowrank_dist::mma(
      Half{}, sums, a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3], b[2 * lane], b[2 * lane + 1]);
  std::memcpy(c + 4 * lane, sums, sizeof(sums));
}

}  // namespace

extern "C" {

void emulation_begin(unsigned seed, int fault) {
  m.random.seed(seed);
  m.fault = fault;
  m.ranges.clear();
  m.error.clear();
  m.launches = 0;
  m.blocks = 0;
}

void emulation_name(const void* begin, int64_t bytes, int writable) {
  const auto* first = static_cast<const unsigned char*>(begin);
  m.ranges.push_back({first, first + bytes, writable != 0});
}

const char* emulation_error() { return m.error.c_str(); }
int emulation_launches() { return m.launches; }
int64_t emulation_blocks() { return m.blocks; }

int emulate_mma(int dtype, const uint32_t* a, const uint32_t* b, float* c) {
  const bool bfloat16 = dtype == static_cast<int>(Dtype::kBFloat16);
  return emulation::run_grid(dim3(1), 32, 0, [=] {
    bfloat16 ? one_mma<lowrank_dist::BFloat16>(a, b, c) : one_mma<lowrank_dist::Float16>(a, b, c);
  });
}

void emulate_round(int dtype, const float* from, uint16_t* to, float* back, int64_t count) {
  const bool bfloat16 = dtype == static_cast<int>(Dtype::kBFloat16);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = bfloat16 ? emulation::to_bfloat16(from[i]) : emulation::to_float16(from[i]);
    back[i] = bfloat16 ? emulation::from_bfloat16(to[i]) : emulation::from_float16(to[i]);
  }
}

uint64_t emulate_down_workspace(int dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  return lowrank_dist::down_workspace(static_cast<Dtype>(dtype), tokens, features, ranks, multiprocessors);
}
uint64_t emulate_grad_a_workspace(int dtype, int64_t tokens, int64_t features, int64_t ranks, int multiprocessors) {
  return lowrank_dist::grad_a_workspace(static_cast<Dtype>(dtype), tokens, features, ranks, multiprocessors);
}

int emulate_down(
    int dtype, const Matrix* out, const ConstMatrix* x, const ConstMatrix* a, const MaskArgs* mask, void* workspace,
    int multiprocessors) {
  return lowrank_dist::launch_down(
      static_cast<Dtype>(dtype), *out, *x, *a, *mask, workspace, multiprocessors, nullptr);
}
int emulate_expand(
    int dtype, const Matrix* out, const ConstMatrix* u, const ConstMatrix* a, const MaskArgs* mask, void*,
    int multiprocessors) {
  return lowrank_dist::launch_expand(static_cast<Dtype>(dtype), *out, *u, *a, *mask, true, multiprocessors, nullptr);
}
int emulate_write(
    int dtype, const Matrix* out, const ConstMatrix* u, const ConstMatrix* a, const MaskArgs* mask, void*,
    int multiprocessors) {
  return lowrank_dist::launch_expand(static_cast<Dtype>(dtype), *out, *u, *a, *mask, false, multiprocessors, nullptr);
}
int emulate_grad_a(
    int dtype, const Matrix* out, const ConstMatrix* u, const ConstMatrix* x, const MaskArgs* mask, void* workspace,
    int multiprocessors) {
  return lowrank_dist::launch_grad_a(
      static_cast<Dtype>(dtype), *out, *u, *x, *mask, workspace, multiprocessors, nullptr);
}
}
