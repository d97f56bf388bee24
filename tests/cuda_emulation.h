// The part of CUDA that mhkd_loss_cuda.cu uses, played on the CPU, for the tests: compile that file
// as C++ with -include cuda_emulation.h. Blocks run one after the other. The threads of a block are
// fibers that run until they reach a barrier or a shuffle, every other block in reverse order, so
// that a forgotten barrier shows: a thread runs far ahead of those whose results it needs. A
// barrier that not all threads reach is an error and not a hang.
#pragma once

#include <ucontext.h>

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__ inline
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define MHKD_CUDA_KEY CPU
#define MHKD_ARCHITECTURES 0  // none: "CUDA sm_0" says that this is no GPU
#define MHKD_ASSERT_LABEL(label, classes) \
  if (!(label >= 0 && label < classes)) return emulation::fail_assertion()

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) int4 {
  int x, y, z, w;
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum class Waits { kNothing, kWarpBarrier, kBlockBarrier, kFinished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waits waits;
  int parity;  // of its next shuffle or vote
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current, block_size;
inline dim3 thread_index(0), block_index(0), grid_dim(1);
// What each thread of the block offers, for two shuffles or votes in turn.
alignas(16) inline char shuffled[2][1024][16];
inline bool assertion_failed;
inline void (*body)(const void*);
inline const void* body_arguments;

inline void fail_assertion() { assertion_failed = true; }

inline void wait(Waits what) {
  fibers[current].waits = what;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_fiber() {
  body(body_arguments);
  wait(Waits::kFinished);
}

// Lets the waiting threads in [begin, end) go on if all that have not finished wait for the same
// barrier.
inline bool release(int begin, int end, Waits barrier) {
  bool any = false;
  for (int i = begin; i < end; ++i) {
    if (fibers[i].waits == Waits::kFinished) continue;
    if (fibers[i].waits != barrier) return false;
    any = true;
  }
  for (int i = begin; any && i < end; ++i) {
    if (fibers[i].waits == barrier) fibers[i].waits = Waits::kNothing;
  }
  return any;
}

inline void run_block(int threads, bool reversed) {
  block_size = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.waits = Waits::kNothing;
    fiber.parity = 0;
  }
  while (true) {
    bool ran = false, finished = true;
    for (int i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibers[current].waits == Waits::kNothing) {
        thread_index.x = unsigned(current);
        swapcontext(&scheduler, &fibers[current].context);
        ran = true;
      }
      finished = finished && fibers[current].waits == Waits::kFinished;
    }
    if (finished) return;
    bool released = false;
    for (int warp = 0; warp < threads; warp += kWarp) {
      released = release(warp, warp + kWarp, Waits::kWarpBarrier) || released;
    }
    released = release(0, threads, Waits::kBlockBarrier) || released;
    TORCH_CHECK(ran || released, "emulated CUDA: threads of a block wait at different barriers");
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_dim

inline void __syncthreads() { emulation::wait(emulation::Waits::kBlockBarrier); }
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}

namespace emulation {

// Each thread offers its value and waits for the others. The next time another half of the array is
// used: no thread can be two shuffles ahead of one that is still reading.
template <class V>
int offer(V value, Waits barrier) {
  const int parity = fibers[current].parity;
  fibers[current].parity ^= 1;
  std::memcpy(shuffled[parity][current], &value, sizeof value);
  wait(barrier);
  return parity;
}

inline bool all(bool condition, Waits barrier, int begin, int end) {
  const int parity = offer(condition, barrier);
  bool result = true;
  for (int i = begin; i < end; ++i) result = result && shuffled[parity][i][0];
  return result;
}

}  // namespace emulation

template <class V>
V __shfl_xor_sync(unsigned lanes, V value, int mask) {
  TORCH_CHECK(lanes == 0xffffffffu, "emulated CUDA: shuffles of whole warps only");
  const int me = emulation::current;
  const int parity = emulation::offer(value, emulation::Waits::kWarpBarrier);
  std::memcpy(&value, emulation::shuffled[parity][me ^ mask], sizeof value);
  return value;
}

inline bool __all_sync(unsigned, bool condition) {
  const int warp = emulation::current / emulation::kWarp * emulation::kWarp;
  return emulation::all(condition, emulation::Waits::kWarpBarrier, warp, warp + emulation::kWarp);
}

inline bool __syncthreads_and(bool condition) {
  return emulation::all(condition, emulation::Waits::kBlockBarrier, 0, emulation::block_size);
}

template <class V>
V __ldcg(const V* address) {
  return *address;
}

inline int4 __ldcs(const int4* address) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0, "emulated CUDA: misaligned address");
  return *address;
}

// What mhkd_loss_cuda.cu asks of the host.
namespace MHKD_LIBRARY {
struct Arguments;
namespace device {

constexpr c10::DeviceType kType = c10::DeviceType::CPU;

inline void zero(unsigned* counter) { *counter = 0; }

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, int block, const Args& args) {
  using namespace emulation;
  static void (*the_kernel)(Args);
  the_kernel = kernel;
  body = [](const void* arguments) { the_kernel(*static_cast<const Args*>(arguments)); };
  body_arguments = &args;
  grid_dim = grid;
  assertion_failed = false;
  while (int(fibers.size()) < block) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<char[]>(kStack);
  }
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
      run_block(block, (block_index.x + block_index.y) % 2);
    }
  }
  TORCH_CHECK_INDEX(!assertion_failed, "device-side assert: Target is out of bounds.");
}

}  // namespace device
}  // namespace MHKD_LIBRARY
