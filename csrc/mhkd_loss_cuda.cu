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
// Instructions for a pair of logits (student, teacher) in the loops at tau 4, from the machine code
// for sm_90 (tests/test_fused_loss.py counts them), and the bytes a second that an H100 or H200
// could then read and write (132 multiprocessors issue 4 warps a cycle at 1.7 GHz, in practice
// three quarters of that: 21.5e12 instructions a second):
//
//                                bfloat16  float16  float32    bfloat16, bytes a second
//     forward                        17.0     15.0     13.5     5.1e12
//     with the teacher's own CE      19.0     17.0     15.5     4.5e12
//     backward                       16.9     15.0     13.8     7.6e12
//     with the teacher's gradient    20.6     18.6     17.2     8.3e12
//
// Any other tau takes 1 more, or 2 with the teacher's, and an exponential more a logit. Of those
// there are 3.6e12 a second: 4.8 and 3.6e12 bytes a second forward in bfloat16.
//
// More than a copy moves, 3.0e12 on an H100 and 4.3e12 on an H200 (but for that 3.6): the memory
// should be the limit. This is a prediction, not a measurement: the file has been compiled and
// emulated, not timed on a GPU.
//
// To keep 4.3e12 bytes a second coming for 600 ns, 19.5 KB must be on their way to a multiprocessor
// (13.6 KB for 3.0e12). A thread has 16 bytes of both sides on their way while it works on the
// last: 20 KB with the 640 threads, or more, that fit.
//
// tests/cuda_emulation.h plays the part of CUDA that is used here, so that this file also runs as
// plain C++.
#include "mhkd_loss.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

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

// Threads that have to fit on a multiprocessor at once, which leaves each 96 registers: the head of
// this file says what they have on their way. For float64 the compiler may do as it likes.
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

template <class In>
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

// -------------------------------------------------------------------------------------------------
// Loads and stores
// -------------------------------------------------------------------------------------------------

template <class In>
struct alignas(kLoadBytes) Pack {
  static constexpr int kSize = kLoadBytes / sizeof(In);
  In values[kSize];
};

// How a row is cut: `before` classes one by one, `count` packs of 16 aligned bytes, the rest one by
// one. Rows of odd length start at any address; packs are possible where all pointers reach an
// aligned address at the same class. Null pointers agree with all.
template <class In>
struct Cut {
  int classes, before, count;

  __device__ Cut(
      int classes, const In* a, const In* b, const In* c = nullptr, const In* d = nullptr)
      : classes(classes), before(classes), count(0) {
    if constexpr (std::is_same_v<In, double>) return;  // bound by its arithmetic, not by its loads
    const In* pointers[] = {a, b, c, d};
    const auto offset = [](const In* z) {
      return int(reinterpret_cast<uintptr_t>(z) % kLoadBytes);
    };
    for (const In* z : pointers) {
      if (z != nullptr && offset(z) != offset(a)) return;
    }
    const int first = (kLoadBytes - offset(a)) % kLoadBytes / int(sizeof(In));
    if (first >= classes) return;
    before = first;
    count = (classes - first) / Pack<In>::kSize;
  }

  __device__ int rest() const { return before + count * Pack<In>::kSize; }

  // The thread, of those that share the row, that reads class i.
  __device__ int owner(int i, int threads) const {
    if (i < before) return i % threads;
    return i < rest() ? (i - before) / Pack<In>::kSize % threads : (i - rest()) % threads;
  }
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

// -------------------------------------------------------------------------------------------------
// Arithmetic of a thread, of a warp, of a block
// -------------------------------------------------------------------------------------------------

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

// 2^(tau x), from 2^x where tau is kPower.
template <int kPower, class A>
__device__ A at_one(A x, A exp2_x, A tau) {
  if constexpr (kPower == 0) return fast_exp2(x * tau);
  if constexpr (kPower != 0) raise<kPower>(exp2_x);
  return exp2_x;
}

template <int kPower, bool kMarked, class A>
__device__ void add_class(A s, A t, A scale, A tau, RowSums<A>& sums) {
  const A x_s = std::fma(s, scale, -sums.max_s), x_t = std::fma(t, scale, -sums.max_t);
  const A e_s = fast_exp2(x_s), e_t = fast_exp2(x_t);
  sums.tau_s += e_s;
  sums.tau_t += e_t;
  sums.cross += e_t * (x_t - x_s);
  sums.one_s += at_one<kPower>(x_s, e_s, tau);
  if constexpr (kMarked) sums.one_t += at_one<kPower>(x_t, e_t, tau);
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

// Thread 0 ends with the sum over the block. All threads of the block have to come here.
template <int kBlock>
__device__ double block_sum(double x) {
  __shared__ double of_warp[kBlock / kWarp];
  x = warp_sum(x);
  __syncthreads();  // the previous call may still be reading
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kBlock / kWarp; ++warp) sum += of_warp[warp];
  }
  return sum;
}

// -------------------------------------------------------------------------------------------------
// Forward
// -------------------------------------------------------------------------------------------------

// A thread's share of the sums of a row, without a guard: the shift is the largest of 32 logits and
// is never corrected, and -inf - -inf gives NaN. good() tells whether that has gone well.
template <class In, int kPower, int kGroup, bool kMarked, class A = Arithmetic<In>>
__device__ RowSums<A> fast_sums(const In* s, const In* t, int classes, A scale, A tau) {
  constexpr A lowest = std::numeric_limits<A>::lowest();
  const int thread = threadIdx.x % kGroup;
  const Cut<In> cut(classes, s, t);
  const In *packs_s = s + cut.before, *packs_t = t + cut.before;
  Pack<In> next_s, next_t;  // on their way while the current ones are worked on
  const auto load = [&](int pack) {
    if (pack >= cut.count) return;
    next_s = load_pack<false>(packs_s, pack);
    next_t = load_pack<false>(packs_t, pack);
  };
  load(thread);
  const int sample = thread < classes ? thread : classes - 1;
  RowSums<A> sums{warp_max(std::fmax(A(s[sample]) * scale, lowest)),
      warp_max(std::fmax(A(t[sample]) * scale, lowest))};
  for (int pack = thread; pack < cut.count; pack += kGroup) {
    const Pack<In> now_s = next_s, now_t = next_t;
    load(pack + kGroup);
#pragma unroll
    for (int j = 0; j < Pack<In>::kSize; ++j) {
      add_class<kPower, kMarked>(A(now_s.values[j]), A(now_t.values[j]), scale, tau, sums);
    }
  }
  const auto add_range = [&](int begin, int end) {
#pragma unroll 1  // it is short, or slow anyway: registers count more
    for (int i = begin + thread; i < end; i += kGroup) {
      add_class<kPower, kMarked>(A(s[i]), A(t[i]), scale, tau, sums);
    }
  };
  add_range(0, cut.before);
  add_range(cut.rest(), classes);
  return sums;
}

template <class A>
__device__ bool good(const RowSums<A>& sums) {  // all of these are positive; NaN is not good
  return sums.tau_s + sums.tau_t + sums.one_s + sums.one_t + std::fabs(sums.cross) < A(kLargeSum);
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
    const A x_s = std::fma(z_s, scale, -sums.max_s), x_t = std::fma(z_t, scale, -sums.max_t);
    const A e_t = fast_exp2(x_t);
    sums.tau_s += fast_exp2(x_s);
    sums.one_s += fast_exp2(x_s * tau);
    sums.tau_t += e_t;
    sums.one_t += fast_exp2(x_t * tau);
    if (e_t > 0) sums.cross += e_t * (x_t - x_s);  // teacher probability 0 contributes 0
  }
  return sums;
}

// The last block: means over the rows that count, and the loss. Other blocks wrote the rows' terms:
// __ldcg does not take them from this multiprocessor's cache.
template <class A, int kBlock>
__device__ void reduce_rows(const Arguments& args) {
  const A* row_terms = static_cast<const A*>(args.row_terms);
  double counted = 0;
#pragma unroll 8
  for (int64_t b = threadIdx.x; b < args.batch; b += kBlock) {
    counted += args.labels[b * args.label_stride] != args.ignore_index;
  }
  counted = block_sum<kBlock>(counted);
  double loss = 0;
  for (int h = 0; h < args.head_count; ++h) {
    double sums[kTerms] = {0, 0, 0};
    const A* of_head = row_terms + h * args.batch * kTerms;
#pragma unroll 8
    for (int64_t b = threadIdx.x; b < args.batch; b += kBlock) {
      for (int i = 0; i < kTerms; ++i) sums[i] += __ldcg(of_head + b * kTerms + i);
    }
    for (int i = 0; i < kTerms; ++i) sums[i] = block_sum<kBlock>(sums[i]);
    if (threadIdx.x == 0) {
      A* terms = static_cast<A*>(args.terms) + h * kTerms;
      loss += args.heads[h].weights(args.alpha).finish(sums, counted, terms);
    }
  }
  if (threadIdx.x == 0) {
    *static_cast<A*>(args.loss) = static_cast<A>(loss);
    A* stats = static_cast<A*>(args.row_stats);
    stats[args.rows() * kRowStats] = static_cast<A>(counted);
  }
}

template <class In, int kPower, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kBlocks<In, kGroup>)
    forward_kernel(const Arguments args) {
  using A = Arithmetic<In>;
  constexpr int kBlock = kBlockOf<kGroup>;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (row < args.rows()) {  // all threads of a group: their barriers are safe
    const Head& head = args.heads[row / args.batch];
    const int64_t b = row % args.batch, label = args.labels[b * args.label_stride];
    A* stats = static_cast<A*>(args.row_stats) + row * kRowStats;
    A* terms = static_cast<A*>(args.row_terms) + row * kTerms;
    if (label != args.ignore_index) {
      MHKD_ASSERT_LABEL(label, args.classes);
      const In* s = static_cast<const In*>(head.s) + b * head.stride_s;
      const In* t = static_cast<const In*>(head.t) + b * head.stride_t;
      const A tau = A(args.tau), scale_z = A(scale(args.tau));
      RowSums<A> sums =
          head.marked ? fast_sums<In, kPower, kGroup, true>(s, t, args.classes, scale_z, tau)
                      : fast_sums<In, kPower, kGroup, false>(s, t, args.classes, scale_z, tau);
      if (!group_all<kGroup>(good(sums))) {
        sums = guarded_sums<In, kGroup>(s, t, args.classes, scale_z, tau);
      }
      sums = group_sum<kGroup>(sums, tau);
      if (threadIdx.x % kGroup == 0) {
        const A x_s = std::fma(A(s[label]), scale_z, -sums.max_s);
        const A x_t = std::fma(A(t[label]), scale_z, -sums.max_t);
        finish_row(sums, x_s, x_t, tau, head.marked, stats, terms);
      }
    } else if (threadIdx.x % kGroup == 0) {
      for (int i = 0; i < kRowStats; ++i) stats[i] = 0;
      for (int i = 0; i < kTerms; ++i) terms[i] = 0;
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

// -------------------------------------------------------------------------------------------------
// Backward
// -------------------------------------------------------------------------------------------------

// The threads of a row's gradients: of a warp, of a block, of the blocks that share the row.
struct Threads {
  int mine, count;
};

template <int kPower, Part kPart, class In, class A = Arithmetic<In>>
__device__ void grad_row(const GradRow<In, A>& s, const GradRow<In, A>& t,
    int classes, int label, A scale, A tau, Threads threads) {
  const auto of_class = [&](In z_s, In z_t, A& grad_s, A& grad_t) {
    const A x = std::fma(A(z_s), scale, -s.max), e = fast_exp2(x);
    grad_s = s.one * at_one<kPower>(x, e, tau);
    if constexpr (kPart == kAlone) return;
    const A x_t = std::fma(A(z_t), scale, -t.max), e_t = fast_exp2(x_t);
    grad_s += s.tau * e - s.tau_t * e_t;
    if constexpr (kPart == kBoth) grad_t = t.one * at_one<kPower>(x_t, e_t, tau);
  };
  const Cut<In> cut(
      classes, s.z, kPart == kAlone ? nullptr : t.z, s.grad, kPart == kBoth ? t.grad : nullptr);
  const In *packs_s = s.z + cut.before, *packs_t = t.z + cut.before;
  In *to_s = s.grad + cut.before, *to_t = t.grad + cut.before;
  constexpr int kSize = Pack<In>::kSize;
  Pack<In> next_s, next_t;
  const auto load = [&](int pack) {
    if (pack >= cut.count) return;
    next_s = load_pack<true>(packs_s, pack);
    if constexpr (kPart != kAlone) next_t = load_pack<true>(packs_t, pack);
  };
  load(threads.mine);
  for (int pack = threads.mine; pack < cut.count; pack += threads.count) {
    const Pack<In> now_s = next_s, now_t = next_t;
    load(pack + threads.count);
    A grad_s[kSize], grad_t[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      of_class(now_s.values[j], now_t.values[j], grad_s[j], grad_t[j]);
    }
    store_pack(to_s, pack, grad_s);
    if constexpr (kPart == kBoth) store_pack(to_t, pack, grad_t);
  }
  const auto one = [&](int i, A minus_s, A minus_t) {
    A grad_s, grad_t;
    of_class(s.z[i], t.z[i], grad_s, grad_t);
    s.grad[i] = static_cast<In>(grad_s - minus_s);
    if constexpr (kPart == kBoth) t.grad[i] = static_cast<In>(grad_t - minus_t);
  };
  const auto range = [&](int begin, int end) {
#pragma unroll 1  // it is short, or slow anyway: registers count more
    for (int i = begin + threads.mine; i < end; i += threads.count) one(i, 0, 0);
  };
  range(0, cut.before);
  range(cut.rest(), classes);
  // The label's is written again, by the thread that wrote it: its writes stay in order.
  if (threads.mine == cut.owner(label, threads.count)) one(label, s.label, t.label);
}

template <class In, int kPower, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kBlocks<In, kGroup>)
    backward_kernel(const Arguments args) {
  using A = Arithmetic<In>;
  constexpr int kBlock = kBlockOf<kGroup>;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (row >= args.rows()) return;
  const Head& head = args.heads[row / args.batch];
  const int64_t b = row % args.batch, label = args.labels[b * args.label_stride];
  const Threads threads{int(blockIdx.y * kGroup + threadIdx.x % kGroup), int(gridDim.y * kGroup)};
  const int classes = args.classes;
  In* grad_s = head.grad_s ? static_cast<In*>(head.grad_s) + b * classes : nullptr;
  In* grad_t = head.grad_t ? static_cast<In*>(head.grad_t) + b * classes : nullptr;
  const HeadWeights weights = head.weights(args.alpha);
  const bool counts = label != args.ignore_index;
  if (!counts || (weights.kl == 0 && weights.ce == 0)) {
    for (int i = threads.mine; grad_s && i < classes; i += threads.count) grad_s[i] = In(0);
    grad_s = nullptr;
  }
  if (!counts) {
    for (int i = threads.mine; grad_t && i < classes; i += threads.count) grad_t[i] = In(0);
    return;
  }
  const A* stats = static_cast<const A*>(args.row_stats);
  const double counted = stats[args.rows() * kRowStats];
  const double incoming = *static_cast<const A*>(args.grad_loss) / counted;
  const In* s = static_cast<const In*>(head.s) + b * head.stride_s;
  const In* t = static_cast<const In*>(head.t) + b * head.stride_t;
  const auto run = [&](const auto& side, const auto& teacher, auto part) {
    grad_row<kPower, part.value, In>(
        side, teacher, classes, int(label), A(scale(args.tau)), A(args.tau), threads);
  };
  for_gradients(s, t, grad_s, grad_t, weights, stats + row * kRowStats, incoming, args.tau, run);
}

// -------------------------------------------------------------------------------------------------
// Launches
// -------------------------------------------------------------------------------------------------

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
template <class In, int kPower>
static void run_rows(const Arguments& args, bool backward) {
  const int64_t rows = std::max<int64_t>(1, args.rows());
  if (args.classes <= kWarpClasses) {
    constexpr int64_t kRows = kWarpBlock / kWarp;
    const dim3 grid(unsigned((rows + kRows - 1) / kRows));
    device::launch(
        backward ? backward_kernel<In, kPower, kWarp> : forward_kernel<In, kPower, kWarp>, grid,
        kWarpBlock, args);
    return;
  }
  if (!backward) {
    device::launch(forward_kernel<In, kPower, kRowBlock>, dim3(unsigned(rows)), kRowBlock, args);
    return;
  }
  const int64_t wanted = kBackwardBlocks / rows, most = args.classes / kSplitClasses;
  const dim3 grid(unsigned(rows), unsigned(std::max<int64_t>(1, std::min(wanted, most))));
  device::launch(backward_kernel<In, kPower, kGradBlock>, grid, kGradBlock, args);
}

// One exponential a logit for the paper's temperature, two for any other: each power more would
// compile every kernel once more for each architecture, and the memory leaves time for a second.
constexpr int kPaperTau = 4;

template <class In>
static void run_power(const Arguments& args, bool backward) {
  if (args.tau == kPaperTau) return run_rows<In, kPaperTau>(args, backward);
  run_rows<In, 0>(args, backward);
}

static void run(Arguments& args, at::ScalarType dtype, bool backward) {
  Tensor row_terms, finished;
  if (!backward) {
    const auto options = at::TensorOptions().device(device::kType).dtype(at::kInt);
    finished = at::empty({1}, options);
    row_terms = at::empty({args.rows() * kTerms},
        options.dtype(dtype == at::kDouble ? at::kDouble : at::kFloat));
    args.row_terms = row_terms.mutable_data_ptr();
    args.finished = reinterpret_cast<unsigned*>(finished.mutable_data_ptr<int>());
    device::zero(args.finished);
  }
  switch (dtype) {
    case at::kDouble: return run_rows<double, 0>(args, backward);
    case at::kFloat: return run_power<float>(args, backward);
    case at::kHalf: return run_power<c10::Half>(args, backward);
    default: return run_power<c10::BFloat16>(args, backward);
  }
}

static std::string cuda_architectures() {
  std::string names = "CUDA";
  for (int architecture : {MHKD_ARCHITECTURES}) names += " sm_" + std::to_string(architecture / 10);
  return names;
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, MHKD_CUDA_KEY, m) {
  m.impl("loss", On<run, loss>::call);
  m.impl("loss_backward", On<run, loss_backward>::call);
}

TORCH_LIBRARY_FRAGMENT(MHKD_LIBRARY, m) {
  m.def("cuda_architectures() -> str", cuda_architectures);
}

}  // namespace MHKD_LIBRARY
