// The fused loss on CUDA: one launch for the loss of all heads, one for all gradients. What is
// fused, why, and the bytes moved stand in mhkd_loss.cpp.
//
//   - A row belongs to a group of threads: a warp where it is short, a block where it is long (see
//     run_rows, the one place that decides). The length of a row is unlimited.
//   - The loops have no guards. An exponent is one multiply-add, z * scale - max, where max is the
//     largest of 32 logits of the row and is never corrected. Overflow, a masked class (which gives
//     -inf - -inf), NaN: all show in the sums. That row is done again by guarded_sums().
//   - The block that finishes last adds up the rows' terms in a fixed order in float64: no float
//     atomics, the same bits each time, no third launch. Its counter is zeroed on the stream.
//   - No host synchronisation, no state outside the call: streams run side by side, CUDA graphs can
//     record it.
//
// docs/measurements.md predicts its speed from the machine code: it has been compiled and emulated
// (as plain C++, with tests/cuda_emulation.h), not timed on a GPU.
#include "mhkd_loss.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef MHKD_CUDA_KEY
#define MHKD_CUDA_KEY CUDA
#endif
#define MHKD_ARCHITECTURES __CUDA_ARCH_LIST__  // nvcc's list of what it compiles for, as 900
#define MHKD_ASSERT_LABEL(label, classes) CUDA_KERNEL_ASSERT(label >= 0 && label < classes)
#endif

namespace MHKD_LIBRARY {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Up to this many classes a warp takes a row: 32 a lane, four packs of eight half-precision logits.
// Beyond, the lanes' chains of loads get long, and a batch has rows enough for a block each.
constexpr int64_t kWarpClasses = 1024;
constexpr int kWarpBlock = 128;  // threads of a block whose warps take a row each
constexpr int kRowBlock = 320;   // threads of a block that sums one row
constexpr int kGradBlock = 128;  // threads of a block that takes gradients of one row

template <int kGroup>  // threads of a block whose rows take kGroup threads each
constexpr int kBlockOf = kGroup == kWarp ? kWarpBlock : kGroup;

// Threads that have to fit on a multiprocessor at once, which leaves each 96 registers. Each has 16
// bytes of both sides on their way, in total 20 KB: 4.3e12 bytes a second (a copy on an H200) that
// take 600 ns each are 19.5 KB. For float64 the compiler may do as it likes.
constexpr int kThreads = 640;

template <class In, int kGroup>
constexpr int kBlocks = std::is_same_v<In, double> ? 1 : kThreads / kBlockOf<kGroup>;

// The gradients of a row need no reduction, so blocks can share a row where the batch alone would
// leave multiprocessors idle: about this many blocks are started, each with kSplitClasses or more.
constexpr int64_t kBackwardBlocks = 2048;
constexpr int64_t kSplitClasses = 8192;

constexpr int kLoadBytes = 16;  // the widest load of a thread

// Sums of a thread at least this large, or NaN, are taken again by guarded_sums(). Below, a rebase
// whose factor underflows (2^-126) loses nothing beside the sums of 1 and more that it is added to.
constexpr double kLargeSum = 18446744073709551616.;  // 2^64: a logit 44 above the shift, at tau 1

// ---- Loads and stores ----
// Those that share a row: of a warp, of a block, of several blocks.
struct Threads {
  int mine, count;
};

template <class In>
struct alignas(kLoadBytes) Pack {
  static constexpr int kSize = kLoadBytes / sizeof(In);
  In values[kSize];
};

// kLast: it is the last time that these logits are read, they are the first to leave the cache.
template <bool kLast, class In>
__device__ Pack<In> load_pack(const In* packs, int i) {
  const int4* bits = reinterpret_cast<const int4*>(packs) + i;
  const int4 loaded = kLast ? __ldcs(bits) : *bits;
  return reinterpret_cast<const Pack<In>&>(loaded);
}

template <class In, class A>
__device__ void store_pack(In* packs, int i, const A* values) {
  Pack<In> out;
#pragma unroll
  for (int j = 0; j < Pack<In>::kSize; ++j) out.values[j] = static_cast<In>(values[j]);
  reinterpret_cast<Pack<In>*>(packs)[i] = out;
}

// A row of both sides, handed out to the threads that share it: packs of 16 aligned bytes, and one
// by one the classes before and behind them. Rows may start anywhere; packs are possible where all
// pointers (but null) reach an aligned address at the same class. The next packs are on their way,
// from the constructor on, while the last are worked on.
template <bool kLast, class In>
struct Packs {
  static constexpr int kSize = Pack<In>::kSize;
  const In *s, *t;
  Threads threads;
  int classes, begin, count = 0;  // classes before the first pack, packs
  Pack<In> next_s, next_t;

  __device__ Packs(const In* s, const In* t, const In* grad_s, const In* grad_t, int classes,
      Threads threads)
      : s(s), t(t), threads(threads), classes(classes), begin(classes) {
    if constexpr (std::is_same_v<In, double>) return;  // bound by its arithmetic, not by its loads
    const auto offset = [](const In* z) {
      return int(reinterpret_cast<uintptr_t>(z) % kLoadBytes);
    };
    const In* others[] = {t, grad_s, grad_t};
    for (const In* z : others) {
      if (z != nullptr && offset(z) != offset(s)) return;
    }
    const int first = (kLoadBytes - offset(s)) % kLoadBytes / int(sizeof(In));
    if (first >= classes) return;
    begin = first;
    count = (classes - first) / kSize;
    load(threads.mine);
  }

  __device__ void load(int pack) {
    if (pack >= count) return;
    next_s = load_pack<kLast>(s + begin, pack);
    next_t = load_pack<kLast>(t + begin, pack);
  }

  // Calls on_pack(its number, of s, of t) and on_class(class) for all that is this thread's.
  template <class OnPack, class OnClass>
  __device__ void for_each(const OnPack& on_pack, const OnClass& on_class) {
    for (int pack = threads.mine; pack < count; pack += threads.count) {
      const Pack<In> now_s = next_s, now_t = next_t;
      load(pack + threads.count);
      on_pack(pack, now_s, now_t);
    }
    const int packed = count * kSize;
#pragma unroll 1  // it is short, or slow anyway: registers count more
    for (int i = threads.mine; i < classes - packed; i += threads.count) {
      on_class(i < begin ? i : i + packed);
    }
  }

  // Whether class i is this thread's.
  __device__ bool owns(int i) const {
    const int at = i - begin, packed = count * kSize;
    const int nth = at < 0 ? i : at < packed ? at / kSize : i - packed;
    return nth % threads.count == threads.mine;
  }
};

// ---- Arithmetic of a thread, of a warp, of a block ----
__device__ double fast_exp2(double x) { return exp2(x); }
__device__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__  // one instruction, however this file is compiled: denormal numbers become 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 2^(tau x), from 2^x where squarings lead there.
template <int kSquarings, class A>
__device__ A at_one(A x, A exp2_x, A tau) {
  if constexpr (kSquarings == kNoSquarings) return fast_exp2(x * tau);
#pragma unroll
  for (int i = 0; i < kSquarings; ++i) exp2_x *= exp2_x;
  return exp2_x;
}

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <class A>
__device__ A warp_max(A x) {  // a NaN loses: the sums carry it on
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = std::fmax(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

// Every lane ends with the sums of the warp.
template <class A>
__device__ RowSums<A> warp_sum(RowSums<A> sums, A tau) {
  rebase(sums, warp_max(sums.max_s), warp_max(sums.max_t), tau, A(1));
  return {sums.max_s, sums.max_t, warp_sum(sums.tau_s), warp_sum(sums.tau_t), warp_sum(sums.one_s),
      warp_sum(sums.one_t), warp_sum(sums.cross)};
}

// Thread 0 of the group ends with the sums of the group, all of whose threads have to come here.
template <int kGroup, class A>
__device__ RowSums<A> group_sum(RowSums<A> sums, A tau) {
  sums = warp_sum(sums, tau);
  if constexpr (kGroup > kWarp) {
    __shared__ RowSums<A> of_warp[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      constexpr A lowest = std::numeric_limits<A>::lowest();
      const RowSums<A> none{lowest, lowest};
      sums = warp_sum(threadIdx.x < kGroup / kWarp ? of_warp[threadIdx.x] : none, tau);
    }
  }
  return sums;
}

template <int kGroup>
__device__ bool group_all(bool condition) {
  if constexpr (kGroup > kWarp) return __syncthreads_and(condition);
  return __all_sync(kAllLanes, condition);
}

// ---- Forward ----
template <int kSquarings, bool kMarked, class A>
__device__ void add_class(A s, A t, A scale, A tau, RowSums<A>& sums) {
  const A x_s = std::fma(s, scale, -sums.max_s), x_t = std::fma(t, scale, -sums.max_t);
  const A e_s = fast_exp2(x_s), e_t = fast_exp2(x_t);
  sums.tau_s += e_s;
  sums.tau_t += e_t;
  sums.cross += e_t * (x_t - x_s);
  sums.one_s += at_one<kSquarings>(x_s, e_s, tau);
  if constexpr (kMarked) sums.one_t += at_one<kSquarings>(x_t, e_t, tau);
}

// A thread's share of the sums of a row, without a guard: the shift is the largest of 32 logits and
// is never corrected, and -inf - -inf gives NaN. good() tells whether that has gone well.
template <class In, int kSquarings, int kGroup, bool kMarked, class A = Arithmetic<In>>
__device__ RowSums<A> fast_sums(const In* s, const In* t, int classes, A scale, A tau) {
  constexpr A lowest = std::numeric_limits<A>::lowest();
  const int thread = threadIdx.x % kGroup;
  Packs<false, In> packs(s, t, nullptr, nullptr, classes, {thread, kGroup});
  const int sample = thread < classes ? thread : classes - 1;
  RowSums<A> sums{warp_max(std::fmax(A(s[sample]) * scale, lowest)),
      warp_max(std::fmax(A(t[sample]) * scale, lowest))};
  const auto add = [&](In z_s, In z_t) {
    add_class<kSquarings, kMarked>(A(z_s), A(z_t), scale, tau, sums);
  };
  const auto add_pack = [&](int, const Pack<In>& of_s, const Pack<In>& of_t) {
#pragma unroll
    for (int j = 0; j < Pack<In>::kSize; ++j) add(of_s.values[j], of_t.values[j]);
  };
  packs.for_each(add_pack, [&](int i) { add(s[i], t[i]); });
  return sums;
}

template <class A>
__device__ bool good(const RowSums<A>& sums) {  // all of these are positive; NaN is not good
  return sums.tau_s + sums.tau_t + sums.one_s + sums.one_t + std::fabs(sums.cross) < A(kLargeSum);
}

// x of a logit not above max. Only max is rounded, so that x is not 0 for the largest logit: for
// classes that are masked by -1e30 it could be 1e22.
template <class A>
__device__ A below(A z, A scale, A max) {
  const A x = std::fma(z, scale, -max);
  return x > A(1) ? A(0) : x;
}

// The same for any logits: those of rows that begin with low logits, masked classes, NaN.
template <class In, int kGroup, class A = Arithmetic<In>>
__device__ RowSums<A> guarded_sums(const In* s, const In* t, int classes, A scale, A tau) {
  constexpr A lowest = std::numeric_limits<A>::lowest();
  RowSums<A> sums{lowest, lowest};
  for (int i = threadIdx.x % kGroup; i < classes; i += kGroup) {
    const A z_s = A(s[i]), z_t = A(t[i]);
    const A max_s = std::fmax(z_s * scale, sums.max_s);
    const A max_t = std::fmax(z_t * scale, sums.max_t);
    if (max_s > sums.max_s || max_t > sums.max_t) rebase(sums, max_s, max_t, tau, A(1));
    const A x_s = below(z_s, scale, sums.max_s), x_t = below(z_t, scale, sums.max_t);
    const A e_t = fast_exp2(x_t);
    sums.tau_s += fast_exp2(x_s);
    sums.one_s += fast_exp2(x_s * tau);
    sums.tau_t += e_t;
    sums.one_t += fast_exp2(x_t * tau);
    if (e_t > 0) sums.cross += e_t * (x_t - x_s);  // teacher probability 0 contributes 0
  }
  return sums;
}

// The last block: means over the rows that count, and the loss. A warp adds up a term of a head, or
// a number of rows. Other blocks wrote the rows' terms: __ldcg bypasses this processor's cache.
template <class A, int kBlock>
__device__ void reduce_rows(const Arguments& args) {
  __shared__ double sums[kMaxHeads * kTerms + kRowCounts];
  A* stats = static_cast<A*>(args.row_stats);
  const int count = args.head_count * kTerms;
  for (int i = threadIdx.x / kWarp; i < count + kRowCounts; i += kBlock / kWarp) {
    const A* terms = stats + i / kTerms * args.batch * kRowStats + kRowTerms + i % kTerms;
    double sum = 0;
#pragma unroll 8
    for (int64_t b = threadIdx.x % kWarp; b < args.batch; b += kWarp) {
      const int64_t y = args.labels[b * args.label_stride];
      const bool counts = y != args.ignore_index && (i == count + kCounted || y != kUnlabelled);
      sum += i < count ? double(__ldcg(terms + b * kRowStats)) : double(counts);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) sums[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double loss = 0;
  for (int h = 0; h < args.head_count; ++h) {
    A* terms = static_cast<A*>(args.terms) + h * kTerms;
    loss += args.heads[h].finish(sums + h * kTerms, sums + count, terms);
  }
  *static_cast<A*>(args.loss) = static_cast<A>(loss);
  for (int i = 0; i < kRowCounts; ++i) {
    stats[args.rows() * kRowStats + i] = static_cast<A>(1 / sums[count + i]);
  }
}

template <class In, int kSquarings, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kBlocks<In, kGroup>)
    forward_kernel(const Arguments args) {
  using A = Arithmetic<In>;
  constexpr int kBlock = kBlockOf<kGroup>;
  const int64_t i = int64_t(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (i < args.rows()) {  // all threads of a group: their barriers are safe
    const Row<In> row(args, i);
    const bool marked = row.labelled && row.head.marked();
    if (row.counts) {
      const int64_t label = row.labelled ? row.label : 0;
      MHKD_ASSERT_LABEL(label, args.classes);
      const A tau = args.tau.as<A>(), unit = args.unit.as<A>();
      const auto fast = [&](auto of_teacher) {
        return fast_sums<In, kSquarings, kGroup, of_teacher.value>(
            row.s, row.t, args.classes, unit, tau);
      };
      RowSums<A> sums = marked ? fast(std::true_type()) : fast(std::false_type());
      if (!group_all<kGroup>(good(sums))) {
        sums = guarded_sums<In, kGroup>(row.s, row.t, args.classes, unit, tau);
      }
      sums = group_sum<kGroup>(sums, tau);
      if (threadIdx.x % kGroup == 0) {
        const A x_s = std::fma(A(row.s[label]), unit, -sums.max_s);
        const A x_t = std::fma(A(row.t[label]), unit, -sums.max_t);
        finish_row(sums, x_s, x_t, tau, row.labelled, marked, row.stats);
      }
    } else if (threadIdx.x % kGroup == 0) {
      for (int j = 0; j < kRowStats; ++j) row.stats[j] = 0;
    }
  }
  __shared__ bool is_last;
  __threadfence();  // what this block has written is seen by the block that counts it as finished
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(args.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  reduce_rows<A, kBlock>(args);
}

// ---- Backward ----
template <int kSquarings, Part kPart, class In, class A = Arithmetic<In>>
__device__ void grad_row(const GradRow<In>& s, const GradRow<In>& t, int classes, int label,
    A scale, A tau, Threads threads) {
  const auto of_class = [&](In z_s, In z_t, A& grad_s, A& grad_t) {
    const A x_s = std::fma(A(z_s), scale, -s.c.max), e_s = fast_exp2(x_s);
    grad_s = s.c.one * at_one<kSquarings>(x_s, e_s, tau);
    if constexpr (kPart == kAlone) return;
    const A x_t = std::fma(A(z_t), scale, -t.c.max), e_t = fast_exp2(x_t);
    grad_s += s.c.tau * e_s - s.c.tau_t * e_t;
    if constexpr (kPart == kBoth) grad_t = t.c.one * at_one<kSquarings>(x_t, e_t, tau);
  };
  Packs<true, In> packs(s.z, t.z, s.grad, kPart == kBoth ? t.grad : nullptr, classes, threads);
  In *const packs_s = s.grad + packs.begin, *const packs_t = t.grad + packs.begin;
  const auto on_pack = [&](int pack, const Pack<In>& of_s, const Pack<In>& of_t) {
    A grad_s[Pack<In>::kSize], grad_t[Pack<In>::kSize];
#pragma unroll
    for (int j = 0; j < Pack<In>::kSize; ++j) {
      of_class(of_s.values[j], of_t.values[j], grad_s[j], grad_t[j]);
    }
    store_pack(packs_s, pack, grad_s);
    if constexpr (kPart == kBoth) store_pack(packs_t, pack, grad_t);
  };
  const auto one = [&](int i, A minus_s, A minus_t) {
    A grad_s, grad_t;
    of_class(s.z[i], t.z[i], grad_s, grad_t);
    s.grad[i] = static_cast<In>(grad_s - minus_s);
    if constexpr (kPart == kBoth) t.grad[i] = static_cast<In>(grad_t - minus_t);
  };
  packs.for_each(on_pack, [&](int i) { one(i, 0, 0); });
  // The label's is written again, by the thread that wrote it: its writes stay in order.
  if (label >= 0 && packs.owns(label)) one(label, s.c.label, t.c.label);
}

template <class In, int kSquarings, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kBlocks<In, kGroup>)
    backward_kernel(const Arguments args) {
  using A = Arithmetic<In>;
  const int64_t i = int64_t(blockIdx.x) * (kBlockOf<kGroup> / kGroup) + threadIdx.x / kGroup;
  if (i >= args.rows()) return;
  const Row<In> row(args, i);
  const Threads threads{int(blockIdx.y * kGroup + threadIdx.x % kGroup), int(gridDim.y * kGroup)};
  const auto zero = [&](In* grad) {
    for (int k = threads.mine; k < args.classes; k += threads.count) grad[k] = In(0);
  };
  const auto run = [&](const auto& side, const auto& teacher, auto part) {
    grad_row<kSquarings, part.value, In>(side, teacher, args.classes, int(row.label),
        args.unit.as<A>(), args.tau.as<A>(), threads);
  };
  for_gradients(args, row, zero, run);
}

// ---- Launches ----
#ifdef __CUDACC__
namespace device {

constexpr at::DeviceType kType = at::kCUDA;

static void launch(void (*kernel)(Arguments), dim3 grid, int block, const Arguments& args) {
  kernel<<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

static void zero(unsigned* counter) {
  C10_CUDA_CHECK(cudaMemsetAsync(counter, 0, sizeof *counter, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace device
#endif

// A warp a row, or a block, or (backward) several blocks: the one place that decides.
template <class In, int kSquarings>
static void run_rows(const Arguments& args, bool backward) {
  const int64_t rows = std::max<int64_t>(1, args.rows());
  if (args.classes <= kWarpClasses) {
    constexpr int64_t kRows = kWarpBlock / kWarp;
    const auto kernel = backward ? backward_kernel<In, kSquarings, kWarp>
                                 : forward_kernel<In, kSquarings, kWarp>;
    device::launch(kernel, dim3(unsigned((rows + kRows - 1) / kRows)), kWarpBlock, args);
  } else if (!backward) {
    const auto kernel = forward_kernel<In, kSquarings, kRowBlock>;
    device::launch(kernel, dim3(unsigned(rows)), kRowBlock, args);
  } else {
    const int64_t wanted = kBackwardBlocks / rows, most = args.classes / kSplitClasses;
    const dim3 grid(unsigned(rows), unsigned(std::max<int64_t>(1, std::min(wanted, most))));
    device::launch(backward_kernel<In, kSquarings, kGradBlock>, grid, kGradBlock, args);
  }
}

// One exponential a logit for the paper's temperature, two for any other: each more would compile
// every kernel once more for each architecture, and the memory leaves time for a second.
constexpr int kPaperTau = 4;

template <class In>
static void run_tau(const Arguments& args, bool backward) {
  args.tau.exact == kPaperTau ? run_rows<In, 2>(args, backward)
                        : run_rows<In, kNoSquarings>(args, backward);
}

static void run(Arguments& args, at::ScalarType dtype, bool backward) {
  Tensor finished;
  if (!backward) {
    finished = at::empty({1}, at::TensorOptions().device(device::kType).dtype(at::kInt));
    args.finished = reinterpret_cast<unsigned*>(finished.mutable_data_ptr<int>());
    device::zero(args.finished);
  }
  switch (dtype) {
    case at::kDouble: return run_rows<double, kNoSquarings>(args, backward);
    case at::kFloat: return run_tau<float>(args, backward);
    case at::kHalf: return run_tau<c10::Half>(args, backward);
    default: return run_tau<c10::BFloat16>(args, backward);
  }
}

static std::string cuda_architectures() {
  std::string names = "CUDA";
  for (int architecture : {MHKD_ARCHITECTURES}) names += " sm_" + std::to_string(architecture / 10);
  return names;
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, MHKD_CUDA_KEY, m) {
  m.impl("loss", flat<loss, run>);
  m.impl("loss_backward", flat_backward<loss_backward, run>);
}

TORCH_LIBRARY_FRAGMENT(MHKD_LIBRARY, m) {
  m.def("cuda_architectures() -> str", cuda_architectures);
}

}  // namespace MHKD_LIBRARY
