// A CUDA device of one multiprocessor, emulated on a CPU: the machine of csrc/cuda/device.cuh under LOWRANK_EMULATE.
//
// Each thread of a block is a fibre. Fibres meet where lanes and warps meet on a GPU (mma over a warp, barriers over a
// block). Between such points a seeded scheduler runs them in any order, so a result that depends on a missing barrier
// differs from seed to seed. The emulation is stricter than a GPU on purpose: shared memory starts as NaN; an
// asynchronous copy lands only at its wait, and its target is NaN until then; every access to global memory must be
// aligned and lie in memory that the caller has named; all threads of a block must reach its barriers.
//
// The fragments of mma.m16n8k16 are written from the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point
// type"), not from the kernels, so that this file can check them.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedLimit = 227 * 1024;
constexpr int kLaunchFailure = 719;

// Faults that a test may plant, to see that the harness notices.
enum Fault : int { kNone, kNoBarrier, kNoWait, kSwappedFragment };

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};

struct Fibre {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
  dim3 thread;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};

struct WarpState {
  Operands operands[32];
  int arrived = 0;
};

struct Range {
  const unsigned char* begin;
  const unsigned char* end;
  bool writable;
};

struct Machine {
  std::vector<Fibre> fibres = std::vector<Fibre>(kMostThreads);
  std::vector<int> runnable;
  std::vector<WarpState> warps = std::vector<WarpState>(kMostThreads / 32);
  std::vector<int> at_barrier;
  std::vector<unsigned char> shared = std::vector<unsigned char>(kSharedLimit + 256);
  std::vector<Range> ranges;
  std::function<void()> body;
  std::mt19937 random;
  std::string error;
  dim3 block, grid;
  jmp_buf scheduler;
  unsigned char* stacks = nullptr;
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  int threads = 0;
  int current = 0;
  int finished = 0;
  int launches = 0;
  int64_t blocks = 0;
  int fault = kNone;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline Fibre& fibre() { return machine().fibres[machine().current]; }

// Switches to the scheduler; returns when it picks this fibre again.
inline __attribute__((noinline)) void leave() {
  Machine& m = machine();
  if (_setjmp(m.fibres[m.current].here) == 0) _longjmp(m.scheduler, 1);
}

// Ends the launch: the fibres are abandoned and start anew with the next launch.
[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  m.error = what + " (block " + std::to_string(m.block.x) + ", " + std::to_string(m.block.y) + ", " +
            std::to_string(m.block.z) + ", thread " + std::to_string(m.current) + ")";
  _longjmp(m.scheduler, 2);
}

inline void fibre_main() {
  for (;;) {
    machine().body();
    ++machine().finished;
    leave();
  }
}

inline void check_global(const void* address, size_t bytes, size_t alignment, bool write) {
  const auto* begin = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned access to global memory");
  for (const Range& range : machine().ranges) {
    if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !write)) return;
  }
  fail(write ? "write outside of the outputs" : "read outside of the operands");
}

inline void check_shared(const unsigned char* address, size_t bytes, size_t alignment) {
  const Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned access to shared memory");
  if (address < m.shared_begin || address + bytes > m.shared_begin + m.shared_bytes) {
    fail("access outside of shared memory");
  }
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25));
}

inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // The spacing of the representable numbers here; nearbyint rounds ties to even.
  const int spacing = std::max(exponent, -13) - 11;
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -spacing)));
  const float rounded = std::ldexp(static_cast<float>(units), spacing);
  if (rounded == 0.0f) return sign;
  if (rounded < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
  std::frexp(rounded, &exponent);
  const auto fraction = static_cast<int>(std::ldexp(rounded, 11 - exponent)) - 1024;
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | fraction);
}

// D = A·B + C over the 32 lanes, in place of C. Products are exact, the sum is rounded once.
template <float (*kWiden)(uint16_t)>
void multiply_fragments(Operands (&lanes)[32]) {
  static const std::vector<float>& wide = *[] {
    auto* table = new std::vector<float>(65536);
    for (int bits = 0; bits < 65536; ++bits) (*table)[bits] = kWiden(static_cast<uint16_t>(bits));
    return table;
  }();
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2;
    const int in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = wide[lanes[lane].a[i / 2] >> (16 * (i & 1)) & 0xFFFF];
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[row][group] = wide[lanes[lane].b[i / 2] >> (16 * (i & 1)) & 0xFFFF];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8;
      const int column = lane % 4 * 2 + (i & 1);
      double sum = lanes[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[lane].c[i] = static_cast<float>(sum);
    }
  }
}

template <float (*kWiden)(uint16_t)>
void warp_multiply(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Machine& m = machine();
  if (m.fault == kSwappedFragment) std::swap(a1, a2);
  const int lane = m.current % 32;
  WarpState& warp = m.warps[m.current / 32];
  Operands& own = warp.operands[lane];
  own = {{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  if (++warp.arrived < 32) {
    leave();
  } else {
    warp.arrived = 0;
    multiply_fragments<kWiden>(warp.operands);
    for (int other = 0; other < 32; ++other) {
      if (other != lane) m.runnable.push_back(m.current - lane + other);
    }
  }
  std::memcpy(c, own.c, sizeof(own.c));
}

inline void block_barrier() {
  Machine& m = machine();
  if (m.fault == kNoBarrier) return;
  m.at_barrier.push_back(m.current);
  if (static_cast<int>(m.at_barrier.size()) < m.threads) {
    leave();
    return;
  }
  for (const int other : m.at_barrier) {
    if (other != m.current) m.runnable.push_back(other);
  }
  m.at_barrier.clear();
}

// Runs one block to its end: either any lane at any point, or one warp as long as it can run, for the widest drift.
inline bool run_block(bool by_warps) {
  Machine& m = machine();
  std::memset(m.shared_begin, 0xFF, m.shared_bytes);
  m.finished = 0;
  m.at_barrier.clear();
  m.runnable.clear();
  for (int thread = 0; thread < m.threads; ++thread) m.runnable.push_back(thread);
  volatile int favourite = -1;
  if (_setjmp(m.scheduler) == 2) return false;
  if (m.finished == m.threads) return true;
  if (m.runnable.empty()) {
    m.error = "deadlock: " + std::to_string(m.at_barrier.size()) + " of " + std::to_string(m.threads) +
              " threads at the barrier, " + std::to_string(m.finished) + " at their end";
    return false;
  }
  size_t pick = m.random() % m.runnable.size();
  if (by_warps) {
    size_t tried = 0;
    while (tried < m.runnable.size() && m.runnable[(pick + tried) % m.runnable.size()] / 32 != favourite) ++tried;
    if (tried < m.runnable.size()) pick = (pick + tried) % m.runnable.size();
  }
  m.current = m.runnable[pick];
  favourite = m.current / 32;
  m.runnable[pick] = m.runnable.back();
  m.runnable.pop_back();
  Fibre& next = m.fibres[m.current];
  if (next.started) _longjmp(next.here, 1);
  next.started = true;
  setcontext(&next.start);
  return false;
}

inline void prepare_fibres() {
  Machine& m = machine();
  if (m.stacks == nullptr) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m.stacks = static_cast<unsigned char*>(
        mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE, kFlags, -1, 0));
  }
  for (int thread = 0; thread < kMostThreads; ++thread) {
    Fibre& fibre = m.fibres[thread];
    fibre.started = false;
    fibre.groups.clear();
    fibre.open.clear();
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = m.stacks + kStackBytes * thread;
    fibre.start.uc_stack.ss_size = kStackBytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
  }
  for (WarpState& warp : m.warps) warp.arrived = 0;
}

inline int run_grid(dim3 grid, int threads, size_t shared_bytes, std::function<void()> body) {
  Machine& m = machine();
  static bool prepared = false;
  if (!prepared) prepare_fibres();
  prepared = true;
  ++m.launches;
  m.grid = grid;
  m.threads = threads;
  m.shared_bytes = shared_bytes;
  m.shared_begin = m.shared.data() + (128 - reinterpret_cast<uintptr_t>(m.shared.data()) % 128);
  m.body = std::move(body);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads > kMostThreads || shared_bytes > kSharedLimit) {
    m.error = "a launch that no device accepts";
    return kLaunchFailure;
  }
  m.blocks += static_cast<int64_t>(blocks);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[m.random() % i]);
  for (const uint64_t index : order) {
    m.block = dim3(
        static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
        static_cast<unsigned>(index / grid.x / grid.y));
    for (int thread = 0; thread < threads; ++thread) {
      m.fibres[thread].thread = dim3(static_cast<unsigned>(thread), 0, 0);
    }
    if (!run_block(m.random() % 2 == 0)) {
      prepare_fibres();
      return kLaunchFailure;
    }
  }
  return 0;
}

}  // namespace emulation

#define threadIdx (emulation::fibre().thread)
#define blockIdx (emulation::machine().block)

namespace lowrank_dist {

struct BFloat16;
struct Float16;

using Shared = unsigned char*;

inline Shared shared_memory() { return emulation::machine().shared_begin; }

template <typename T>
inline T load_global(const T* address) {
  emulation::check_global(address, sizeof(T), alignof(T), false);
  return *address;
}
template <typename T>
inline T load_own(const T* address) {
  return load_global(address);
}
template <typename T>
inline void store_global(T* address, T value) {
  emulation::check_global(address, sizeof(T), alignof(T), true);
  *address = value;
}

template <typename T>
inline T load_shared(Shared address) {
  emulation::check_shared(address, sizeof(T), alignof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(Shared address, T value) {
  emulation::check_shared(address, sizeof(T), alignof(T));
  std::memcpy(address, &value, sizeof(T));
}

inline void copy16_async(Shared to, const void* from, int bytes) {
  emulation::check_shared(to, 16, 16);
  if (bytes > 0) emulation::check_global(from, bytes, 16, false);
  std::memset(to, 0xFF, 16);
  emulation::fibre().open.push_back({to, from, bytes});
}
inline void copy_commit() {
  emulation::Fibre& fibre = emulation::fibre();
  fibre.groups.push_back(std::move(fibre.open));
  fibre.open.clear();
}
template <int kPending>
inline void copy_wait() {
  emulation::Fibre& fibre = emulation::fibre();
  while (fibre.groups.size() > static_cast<size_t>(kPending)) {
    for (const emulation::Copy& copy : fibre.groups.front()) {
      if (emulation::machine().fault == emulation::kNoWait) continue;
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fibre.groups.pop_front();
  }
}

inline void synchronize_block() { emulation::block_barrier(); }

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * which) & 0xFF) << (8 * i);
  }
  return result;
}
template <uint32_t kSelector>
inline uint32_t permute(uint32_t low, uint32_t high) {
  return permute(low, high, kSelector);
}

template <typename Half>
inline void mma(
    Half, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    emulation::warp_multiply<emulation::from_bfloat16>(c, a0, a1, a2, a3, b0, b1);
  } else {
    emulation::warp_multiply<emulation::from_float16>(c, a0, a1, a2, a3, b0, b1);
  }
}

template <typename Half>
inline uint32_t pack(Half, float low, float high) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    return emulation::to_bfloat16(low) | static_cast<uint32_t>(emulation::to_bfloat16(high)) << 16;
  } else {
    return emulation::to_float16(low) | static_cast<uint32_t>(emulation::to_float16(high)) << 16;
  }
}
template <typename Half>
inline float widen(Half value) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    return emulation::from_bfloat16(value.bits);
  } else {
    return emulation::from_float16(value.bits);
  }
}

}  // namespace lowrank_dist

struct CUstream_st;

namespace lowrank_dist {

template <typename... Parameters, typename... Arguments>
int launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, CUstream_st*, Arguments... arguments) {
  return emulation::run_grid(grid, threads, shared_bytes, [=] { kernel(arguments...); });
}

}  // namespace lowrank_dist
