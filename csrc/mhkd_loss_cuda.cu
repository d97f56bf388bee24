// The fused loss on CUDA: one launch for the loss of all heads, one for all gradients. What is fused, why, and the
// bytes moved stand in mhkd_loss.cpp: each pass reads each logit once, the backward writes each gradient once.
//
//   - A row belongs to a group of threads: a warp where it is short, a block where it is long (see run_rows, the one
//     place that decides). Each thread keeps the running sums of the classes it has seen (online softmax), so the
//     length of a row is unlimited and nothing is staged in shared memory.
//   - The block that finishes last adds up the rows' terms in a fixed order in float64: no float atomics, the same
//     bits each time, no third launch. Its counter is scratch of the call, zeroed on the stream.
//   - No host synchronisation, and no state outside the call: streams run side by side, CUDA graphs can record it.
//
// tests/cuda_emulation.h plays the part of CUDA that is used here, so that this file also runs as plain C++.
#include "mhkd_loss.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MHKD_ARCHITECTURES __CUDA_ARCH_LIST__  // nvcc's list of what it compiles for, as 900 for sm_90
#define MHKD_ASSERT_LABEL(label, classes) CUDA_KERNEL_ASSERT(label >= 0 && label < classes)
#endif

namespace MHKD_LIBRARY {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Up to this many classes a warp takes a row: 32 a lane, four packs of eight half-precision logits. Beyond, the
// lanes' chains of loads get long, and the rows of a batch are enough to fill the GPU with a block each.
constexpr int64_t kWarpClasses = 1024;
constexpr int kWarpBlock = 128;  // threads of a block whose warps take a row each
constexpr int kRowBlock = 512;   // threads of a block that takes one row

template <int kGroup>  // threads of a block whose rows take kGroup threads each
constexpr int kBlockOf = kGroup == kWarp ? kWarpBlock : kRowBlock;

// Threads of a multiprocessor that can be resident at once, by bounding the registers of each to 64: with 32 bytes a
// thread on their way, about what covers the latency of memory at its full bandwidth.
constexpr int kThreads = 1024;

// The gradients of a row need no reduction, so blocks can share a row where the batch alone would leave
// multiprocessors idle: about this many blocks are started, each with at least kSplitClasses classes.
constexpr int64_t kBackwardBlocks = 1024;
constexpr int64_t kSplitClasses = 8192;

constexpr int kLoadBytes = 16;  // the widest load of a thread

// A thread's sums are relative to a logit that it has seen, not to its largest: they are rescaled only where a logit
// exceeds the former by more than this, which for most threads never happens after the first pack. exp(16) times
// 256k classes is far from the limits of float32, and the relative precision of a sum does not depend on its scale.
constexpr double kSlack = 16;

struct AnyDtype {};  // dtypes known at run time: student and teacher differ, or float64, or short rows

struct Head {
  const void *s, *t;    // [B, K] logits
  void *grad_s, *grad_t;  // [B, K] contiguous, or null
  int64_t stride_s, stride_t;  // of the rows, in elements
  double weight;
  at::ScalarType dtype_s, dtype_t;
  bool marked;
};

struct Arguments {
  Head heads[kMaxHeads];
  const int64_t* labels;
  int64_t label_stride, ignore_index, batch;
  int classes, head_count;
  double tau, alpha;
  void* row_stats;      // [H * B, kRowStats] and the count of rows, in the dtype of the arithmetic
  double* row_terms;    // [H * B, kTerms], forward only
  unsigned* finished;   // blocks that have finished, forward only
  void *loss, *terms;   // outputs of the forward
  const void* grad_loss;  // input of the backward
  bool float64_loss;    // the dtype of loss, terms and grad_loss
};
static_assert(sizeof(Arguments) <= 4096, "kernel arguments");

// --------------------------------------------------------------------------------------------------
// Loads and stores
// --------------------------------------------------------------------------------------------------

template <class In>
struct alignas(kLoadBytes) Pack {
  static constexpr int kSize = kLoadBytes / sizeof(In);
  In values[kSize];
};

template <class In, class A>
__device__ A load_one(const void* row, at::ScalarType dtype, int i) {
  if constexpr (!std::is_same_v<In, AnyDtype>) {
    return static_cast<A>(static_cast<const In*>(row)[i]);
  } else {
    switch (dtype) {
      case at::kDouble: return static_cast<A>(static_cast<const double*>(row)[i]);
      case at::kFloat: return static_cast<A>(static_cast<const float*>(row)[i]);
      case at::kHalf: return static_cast<A>(static_cast<float>(static_cast<const c10::Half*>(row)[i]));
      default: return static_cast<A>(static_cast<float>(static_cast<const c10::BFloat16*>(row)[i]));
    }
  }
}

template <class In, class A>
__device__ void store_one(void* row, at::ScalarType dtype, int i, A value) {
  if constexpr (!std::is_same_v<In, AnyDtype>) {
    static_cast<In*>(row)[i] = static_cast<In>(value);
  } else {
    switch (dtype) {
      case at::kDouble: static_cast<double*>(row)[i] = value; break;
      case at::kFloat: static_cast<float*>(row)[i] = static_cast<float>(value); break;
      case at::kHalf: static_cast<c10::Half*>(row)[i] = c10::Half(static_cast<float>(value)); break;
      default: static_cast<c10::BFloat16*>(row)[i] = c10::BFloat16(static_cast<float>(value));
    }
  }
}

__device__ int64_t element_size(at::ScalarType dtype) {
  return dtype == at::kDouble ? 8 : dtype == at::kFloat ? 4 : 2;
}

__device__ const void* row_of(const void* z, at::ScalarType dtype, int64_t row, int64_t stride) {
  return static_cast<const char*>(z) + row * stride * element_size(dtype);
}

__device__ void* row_of(void* z, at::ScalarType dtype, int64_t row, int64_t stride) {
  return static_cast<char*>(z) + row * stride * element_size(dtype);
}

// How a row is cut: classes [0, packs) one by one, then count packs of 16 aligned bytes, then the rest one by one.
struct Cut {
  int packs, count;
};

// Rows of odd length start at any address. Packs can be loaded where all pointers reach an aligned address at the
// same class; null pointers agree with all.
template <class In>
__device__ Cut cut_row(int classes, const void* a, const void* b, const void* c, const void* d) {
  if constexpr (std::is_same_v<In, AnyDtype>) {
    return {classes, 0};
  } else {
    const void* pointers[] = {a, b, c, d};
    int offset = -1;
    for (const void* pointer : pointers) {
      if (pointer == nullptr) continue;
      const int here = static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kLoadBytes);
      if (offset >= 0 && here != offset) return {classes, 0};
      offset = here;
    }
    const int before = offset <= 0 ? 0 : (kLoadBytes - offset) / static_cast<int>(sizeof(In));
    if (before >= classes) return {classes, 0};
    return {before, (classes - before) / Pack<In>::kSize};
  }
}

template <class In>
__device__ Pack<In> load_pack(const void* row, const Cut& cut, int pack) {
  return reinterpret_cast<const Pack<In>*>(static_cast<const In*>(row) + cut.packs)[pack];
}

// The same for the last time that these logits are read: they are the first to leave the cache.
template <class In>
__device__ Pack<In> load_pack_last(const void* row, const Cut& cut, int pack) {
  const int4 bits = __ldcs(reinterpret_cast<const int4*>(static_cast<const In*>(row) + cut.packs) + pack);
  return reinterpret_cast<const Pack<In>&>(bits);
}

// --------------------------------------------------------------------------------------------------
// Arithmetic of a thread, of a warp, of a block
// --------------------------------------------------------------------------------------------------

__device__ float exp2_of(float x) { return exp2f(x); }
__device__ double exp2_of(double x) { return exp2(x); }

template <class A>
struct Scales {
  A tau, tau_scale, one_scale, slack, zero;  // tau, log2(e) / tau, log2(e), kSlack, largest_zero()
  __device__ Scales(double t, bool float64_loss)
      : tau(A(t)),
        tau_scale(A(1.4426950408889634 / t)),
        one_scale(A(1.4426950408889634)),
        slack(A(t < 1 ? kSlack * t : kSlack)),
        zero(A(largest_zero(float64_loss))) {}
};

template <int kPower, class A>
__device__ A exp_at_one(const Scales<A>& scales, A d, A exp_at_tau) {
  if constexpr (kPower == 0) {
    return exp2_of(d * scales.one_scale);
  } else {
    raise<kPower>(exp_at_tau);
    return exp_at_tau;
  }
}

// Adds kCount classes to the sums.
template <int kPower, int kCount, class A>
__device__ void add_classes(const A* s, const A* t, const Scales<A>& scales, bool marked, RowSums<A>& sums) {
  A max_s = sums.max_s, max_t = sums.max_t;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {  // a NaN loses: the sums carry it on
    max_s = s[j] > max_s ? s[j] : max_s;
    max_t = t[j] > max_t ? t[j] : max_t;
  }
  // Nothing is -inf here: the largest logits start at the lowest number. In float32 the differences may be infinite.
  if (max_s - sums.max_s > scales.slack || max_t - sums.max_t > scales.slack) {
    rebase(sums, max_s, max_t, scales.tau, scales.zero);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const A d_s = s[j] - sums.max_s, d_t = t[j] - sums.max_t;
    const A e_s = exp2_of(d_s * scales.tau_scale), e_t = exp2_of(d_t * scales.tau_scale);
    sums.tau_s += e_s;
    sums.one_s += exp_at_one<kPower>(scales, d_s, e_s);
    sums.tau_t += e_t;
    sums.cross += e_t * (e_t > scales.zero ? d_t - d_s : A(0));  // a class of teacher probability 0 contributes 0
    if (marked) sums.one_t += exp_at_one<kPower>(scales, d_t, e_t);
  }
}

template <class V>
__device__ V warp_sum(V x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <class A>
__device__ A warp_max(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// Every lane ends with the sums of the warp. From here on they are float64: what float32 rounds off a sum of all
// classes is multiplied by tau^2 in the divergence, while a thread's own sum is short.
template <class A>
__device__ RowSums<double> warp_reduce(RowSums<A> sums, const Arguments& args) {
  const A max_s = warp_max(sums.max_s), max_t = warp_max(sums.max_t);
  rebase(sums, max_s, max_t, A(args.tau), A(largest_zero(args.float64_loss)));
  return {max_s,
          max_t,
          warp_sum(double(sums.tau_s)),
          warp_sum(double(sums.tau_t)),
          warp_sum(double(sums.one_s)),
          warp_sum(double(sums.one_t)),
          warp_sum(double(sums.cross))};
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

// --------------------------------------------------------------------------------------------------
// Forward
// --------------------------------------------------------------------------------------------------

// The sums of one row over the threads of its group; thread 0 of the group ends with all of them.
template <class In, class A, int kPower, int kGroup>
__device__ RowSums<double> sum_row(const Arguments& args, const Head& head, const void* s, const void* t) {
  constexpr A lowest = std::numeric_limits<A>::lowest();
  const int thread = threadIdx.x % kGroup;
  const Scales<A> scales(args.tau, args.float64_loss);
  const int classes = args.classes;
  RowSums<A> sums{lowest, lowest};
  const Cut cut = cut_row<In>(classes, s, t, nullptr, nullptr);
  const auto add_one = [&](int i) {
    const A z_s = load_one<In, A>(s, head.dtype_s, i), z_t = load_one<In, A>(t, head.dtype_t, i);
    add_classes<kPower, 1>(&z_s, &z_t, scales, head.marked, sums);
  };
  for (int i = thread; i < cut.packs; i += kGroup) add_one(i);
  if constexpr (!std::is_same_v<In, AnyDtype>) {
    constexpr int kSize = Pack<In>::kSize;
    Pack<In> next_s, next_t;  // on their way while the current ones are worked on
    if (thread < cut.count) {
      next_s = load_pack<In>(s, cut, thread);
      next_t = load_pack<In>(t, cut, thread);
    }
    for (int pack = thread; pack < cut.count; pack += kGroup) {
      A z_s[kSize], z_t[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        z_s[j] = static_cast<A>(next_s.values[j]);
        z_t[j] = static_cast<A>(next_t.values[j]);
      }
      if (pack + kGroup < cut.count) {
        next_s = load_pack<In>(s, cut, pack + kGroup);
        next_t = load_pack<In>(t, cut, pack + kGroup);
      }
      add_classes<kPower, kSize>(z_s, z_t, scales, head.marked, sums);
    }
    for (int i = cut.packs + cut.count * kSize + thread; i < classes; i += kGroup) add_one(i);
  }
  RowSums<double> of_group = warp_reduce(sums, args);
  if constexpr (kGroup > kWarp) {
    __shared__ RowSums<double> of_warp[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = of_group;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const RowSums<double> none{lowest, lowest};
      of_group = warp_reduce(threadIdx.x < kGroup / kWarp ? of_warp[threadIdx.x] : none, args);
    }
  }
  return of_group;
}

// The last block: means over the rows that count, and the loss.
template <class A, int kBlock>
__device__ void reduce_rows(const Arguments& args) {
  const auto write = [&](void* to, int i, double value) {
    if (args.float64_loss) {
      static_cast<double*>(to)[i] = value;
    } else {
      static_cast<float*>(to)[i] = static_cast<float>(value);
    }
  };
  // Other blocks wrote the rows' terms: volatile, so that they do not come from this multiprocessor's cache.
  const volatile double* row_terms = args.row_terms;
  double counted = 0;
  for (int64_t b = threadIdx.x; b < args.batch; b += kBlock) {
    counted += args.labels[b * args.label_stride] != args.ignore_index;
  }
  counted = block_sum<kBlock>(counted);
  double loss = 0;
  for (int h = 0; h < args.head_count; ++h) {
    double sums[kTerms] = {0, 0, 0};
    for (int64_t b = threadIdx.x; b < args.batch; b += kBlock) {
      for (int term = 0; term < kTerms; ++term) sums[term] += row_terms[(h * args.batch + b) * kTerms + term];
    }
    for (int term = 0; term < kTerms; ++term) sums[term] = block_sum<kBlock>(sums[term]);
    if (threadIdx.x == 0) {
      const bool marked = args.heads[h].marked;
      for (int term = 0; term < kTerms; ++term) {
        sums[term] = term == kCeTeacher && !marked ? 0 : sums[term] / counted;  // no row: 0 / 0 is NaN
        write(args.terms, h * kTerms + term, sums[term]);
      }
      loss += weighted_terms(sums[kKl], sums[kCe], sums[kCeTeacher], args.alpha, args.heads[h].weight, marked);
    }
  }
  if (threadIdx.x == 0) {
    write(args.loss, 0, loss);
    static_cast<A*>(args.row_stats)[args.head_count * args.batch * kRowStats] = static_cast<A>(counted);
  }
}

template <class In, class A, int kPower, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kThreads / kBlockOf<kGroup>)
forward_kernel(const Arguments args) {
  constexpr int kBlock = kBlockOf<kGroup>;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (row < args.head_count * args.batch) {  // the same for all threads of a group: their barriers are safe
    const Head& head = args.heads[row / args.batch];
    const int64_t b = row % args.batch, label = args.labels[b * args.label_stride];
    A* stats = static_cast<A*>(args.row_stats) + row * kRowStats;
    double* terms = args.row_terms + row * kTerms;
    if (label != args.ignore_index) {
      MHKD_ASSERT_LABEL(label, args.classes);
      const void* s = row_of(head.s, head.dtype_s, b, head.stride_s);
      const void* t = row_of(head.t, head.dtype_t, b, head.stride_t);
      const RowSums<double> sums = sum_row<In, A, kPower, kGroup>(args, head, s, t);
      if (threadIdx.x % kGroup == 0) {
        finish_row(sums, load_one<In, double>(s, head.dtype_s, int(label)),
                   load_one<In, double>(t, head.dtype_t, int(label)), args.tau, head.marked, stats, terms);
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

// --------------------------------------------------------------------------------------------------
// Backward
// --------------------------------------------------------------------------------------------------

// The gradients of kCount classes from class i on.
template <int kPower, int kCount, class A>
__device__ void grad_classes(A* s, A* t, int i, int label, const A* stats, const Scales<A>& scales,
                             const GradCoefficients<A>& c, bool student, bool teacher) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    A e_t = 0;
    if (teacher || c.with_kl) {
      const A d_t = t[j] - stats[kMaxT];
      e_t = exp2_of(d_t * scales.tau_scale);
      if (teacher) t[j] = c.one_t * exp_at_one<kPower>(scales, d_t, e_t);
    }
    if (student) {
      const A d_s = s[j] - stats[kMaxS];
      const A e_s = exp2_of(d_s * scales.tau_scale);
      s[j] = c.one_s * exp_at_one<kPower>(scales, d_s, e_s);
      if (c.with_kl) s[j] += c.tau_s * e_s - c.tau_t * e_t;
    }
  }
  if (label >= i && label < i + kCount) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {  // an index known at compile time keeps s and t in registers
      if (label == i + j) {
        s[j] -= c.label_s;
        t[j] -= c.label_t;
      }
    }
  }
}

template <class In, class A, int kPower, int kGroup>
__device__ void grad_row(const Head& head, int64_t b, int label, const A* stats, const GradCoefficients<A>& c,
                         int classes, const Scales<A>& scales) {
  const int thread = blockIdx.y * kGroup + threadIdx.x % kGroup, threads = gridDim.y * kGroup;
  const void* s = row_of(head.s, head.dtype_s, b, head.stride_s);
  const void* t = row_of(head.t, head.dtype_t, b, head.stride_t);
  void* grad_s = head.grad_s ? row_of(head.grad_s, head.dtype_s, b, classes) : nullptr;
  void* grad_t = head.grad_t ? row_of(head.grad_t, head.dtype_t, b, classes) : nullptr;
  const bool student = grad_s != nullptr, teacher = grad_t != nullptr;
  const bool reads_teacher = teacher || c.with_kl;
  const Cut cut = cut_row<In>(classes, student ? s : nullptr, reads_teacher ? t : nullptr, grad_s, grad_t);
  const auto one = [&](int i) {
    A z_s = student ? load_one<In, A>(s, head.dtype_s, i) : A(0);
    A z_t = reads_teacher ? load_one<In, A>(t, head.dtype_t, i) : A(0);
    grad_classes<kPower, 1>(&z_s, &z_t, i, label, stats, scales, c, student, teacher);
    if (student) store_one<In>(grad_s, head.dtype_s, i, z_s);
    if (teacher) store_one<In>(grad_t, head.dtype_t, i, z_t);
  };
  for (int i = thread; i < cut.packs; i += threads) one(i);
  if constexpr (!std::is_same_v<In, AnyDtype>) {
    constexpr int kSize = Pack<In>::kSize;
    const auto store_pack = [&](void* row, int pack, const A* values) {
      Pack<In> out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.values[j] = static_cast<In>(values[j]);
      reinterpret_cast<Pack<In>*>(static_cast<In*>(row) + cut.packs)[pack] = out;
    };
    Pack<In> next_s{}, next_t{};
    if (thread < cut.count) {
      if (student) next_s = load_pack_last<In>(s, cut, thread);
      if (reads_teacher) next_t = load_pack_last<In>(t, cut, thread);
    }
    for (int pack = thread; pack < cut.count; pack += threads) {
      A z_s[kSize], z_t[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        z_s[j] = static_cast<A>(next_s.values[j]);
        z_t[j] = static_cast<A>(next_t.values[j]);
      }
      if (pack + threads < cut.count) {
        if (student) next_s = load_pack_last<In>(s, cut, pack + threads);
        if (reads_teacher) next_t = load_pack_last<In>(t, cut, pack + threads);
      }
      grad_classes<kPower, kSize>(z_s, z_t, cut.packs + pack * kSize, label, stats, scales, c, student, teacher);
      if (student) store_pack(grad_s, pack, z_s);
      if (teacher) store_pack(grad_t, pack, z_t);
    }
    for (int i = cut.packs + cut.count * kSize + thread; i < classes; i += threads) one(i);
  }
}

template <class In, class A, int kPower, int kGroup>
__global__ void __launch_bounds__(kBlockOf<kGroup>, kThreads / kBlockOf<kGroup>)
backward_kernel(const Arguments args) {
  constexpr int kBlock = kBlockOf<kGroup>;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kGroup) + threadIdx.x / kGroup;
  if (row >= args.head_count * args.batch) return;
  const Head& head = args.heads[row / args.batch];
  const int64_t b = row % args.batch, label = args.labels[b * args.label_stride];
  if (label == args.ignore_index) {
    const int thread = blockIdx.y * kGroup + threadIdx.x % kGroup, threads = gridDim.y * kGroup;
    void* grad_s = head.grad_s ? row_of(head.grad_s, head.dtype_s, b, args.classes) : nullptr;
    void* grad_t = head.grad_t ? row_of(head.grad_t, head.dtype_t, b, args.classes) : nullptr;
    for (int i = thread; i < args.classes; i += threads) {
      if (grad_s) store_one<In>(grad_s, head.dtype_s, i, A(0));
      if (grad_t) store_one<In>(grad_t, head.dtype_t, i, A(0));
    }
    return;
  }
  const A* all_stats = static_cast<const A*>(args.row_stats);
  const double counted = all_stats[args.head_count * args.batch * kRowStats];
  const double incoming = (args.float64_loss ? *static_cast<const double*>(args.grad_loss)
                                             : double(*static_cast<const float*>(args.grad_loss))) / counted;
  A stats[kRowStats];
#pragma unroll
  for (int i = 0; i < kRowStats; ++i) stats[i] = all_stats[row * kRowStats + i];
  const GradCoefficients<A> c = grad_coefficients(stats, incoming * kl_weight(args.alpha, head.weight),
                                                  incoming * ce_weight(args.alpha, head.weight),
                                                  head.marked ? incoming : 0., args.tau);
  grad_row<In, A, kPower, kGroup>(head, b, int(label), stats, c, args.classes,
                                    Scales<A>(args.tau, args.float64_loss));
}

// --------------------------------------------------------------------------------------------------
// Launches
// --------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
namespace device {

using Guard = c10::cuda::CUDAGuard;

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
template <class In, class A, int kPower>
static void run_rows(const Arguments& args, bool backward) {
  const int64_t rows = args.head_count * args.batch;
  if (args.classes <= kWarpClasses) {
    constexpr int64_t kRows = kWarpBlock / kWarp;
    const dim3 grid(unsigned(std::max<int64_t>(1, (rows + kRows - 1) / kRows)));
    device::launch(backward ? backward_kernel<In, A, kPower, kWarp> : forward_kernel<In, A, kPower, kWarp>, grid,
                   kWarpBlock, args);
    return;
  }
  dim3 grid(unsigned(std::max<int64_t>(1, rows)));
  if (backward) {
    const int64_t wanted = kBackwardBlocks / std::max<int64_t>(1, rows), most = args.classes / kSplitClasses;
    grid.y = unsigned(std::max<int64_t>(1, std::min(wanted, most)));
  }
  device::launch(backward ? backward_kernel<In, A, kPower, kRowBlock> : forward_kernel<In, A, kPower, kRowBlock>, grid,
                 kRowBlock, args);
}

// One exponential a logit for the paper's temperature, two for any other: each power more would compile every kernel
// once more for each architecture, and the second exponential is no more than the memory leaves time for.
constexpr int kPaperTau = 4;

template <class In>
static void run_power(const Arguments& args, bool backward) {
  if (args.tau == kPaperTau) return run_rows<In, float, kPaperTau>(args, backward);
  run_rows<In, float, 0>(args, backward);
}

static void run(const Arguments& args, at::ScalarType arithmetic, bool backward) {
  if (arithmetic == at::kDouble) return run_rows<AnyDtype, double, 0>(args, backward);
  const at::ScalarType dtype = args.heads[0].dtype_s;
  for (int h = 0; h < args.head_count; ++h) {
    if (args.heads[h].dtype_s != dtype || args.heads[h].dtype_t != dtype) {
      return run_rows<AnyDtype, float, 0>(args, backward);
    }
  }
  switch (dtype) {
    case at::kFloat: return run_power<float>(args, backward);
    case at::kHalf: return run_power<c10::Half>(args, backward);
    default: return run_power<c10::BFloat16>(args, backward);
  }
}

static Arguments arguments(TensorList z_s, TensorList z_t, const Tensor& labels, double tau, double alpha,
                           Weights head_weights, const Flags& teacher_ce, int64_t ignore_index) {
  constexpr int64_t most = int64_t(1) << 30;  // classes are counted in int; rows are numbered in blocks of a grid
  TORCH_CHECK_VALUE(z_s[0].size(1) <= most, "mhkd_loss: at most ", most, " classes, got ", z_s[0].size(1));
  Arguments args{};
  args.head_count = int(z_s.size());
  for (int h = 0; h < args.head_count; ++h) {
    args.heads[h] = {z_s[h].const_data_ptr(), z_t[h].const_data_ptr(), nullptr, nullptr, z_s[h].stride(0),
                     z_t[h].stride(0), head_weights[h], z_s[h].scalar_type(), z_t[h].scalar_type(), teacher_ce[h]};
  }
  args.labels = labels.const_data_ptr<int64_t>();
  args.label_stride = labels.stride(0);
  args.ignore_index = ignore_index;
  args.batch = labels.size(0);
  args.classes = int(z_s[0].size(1));
  args.tau = tau;
  args.alpha = alpha;
  return args;
}

std::tuple<Tensor, Tensor, Tensor> loss_cuda(TensorList student, TensorList teacher, const Tensor& labels,
                                                    double tau, double alpha, Weights head_weights,
                                                    const Flags& teacher_ce, int64_t ignore_index) {
  check_arguments(student, teacher, labels, tau, alpha, head_weights, teacher_ce);
  const device::Guard guard(labels.device());
  const auto z_s = adjacent_classes(student), z_t = adjacent_classes(teacher);
  Arguments args = arguments(z_s, z_t, labels, tau, alpha, head_weights, teacher_ce, ignore_index);
  const int64_t rows = args.head_count * args.batch;

  const auto options = labels.options().dtype(loss_dtype(student, teacher));
  const at::ScalarType arithmetic = arithmetic_dtype(student, teacher);
  Tensor loss = at::empty({}, options), terms = at::empty({args.head_count, kTerms}, options);
  Tensor row_stats = at::empty({rows * kRowStats + 1}, options.dtype(arithmetic));
  const Tensor row_terms = at::empty({rows * kTerms}, options.dtype(at::kDouble));
  const Tensor finished = at::empty({1}, options.dtype(at::kInt));
  args.row_stats = row_stats.mutable_data_ptr();
  args.row_terms = row_terms.mutable_data_ptr<double>();
  args.finished = reinterpret_cast<unsigned*>(finished.mutable_data_ptr<int>());
  args.loss = loss.mutable_data_ptr();
  args.terms = terms.mutable_data_ptr();
  args.float64_loss = loss.scalar_type() == at::kDouble;
  device::zero(args.finished);
  run(args, arithmetic, /*backward=*/false);
  return {loss, terms, row_stats};
}

std::vector<Tensor> loss_backward_cuda(const Tensor& grad_loss, TensorList student, TensorList teacher,
                                              const Tensor& labels, const Tensor& row_stats, double tau, double alpha,
                                              Weights head_weights, const Flags& teacher_ce, int64_t ignore_index,
                                              const Flags& needs_grad) {
  const device::Guard guard(labels.device());
  const auto z_s = adjacent_classes(student), z_t = adjacent_classes(teacher);
  Arguments args = arguments(z_s, z_t, labels, tau, alpha, head_weights, teacher_ce, ignore_index);
  const Tensor incoming = grad_loss.to(labels.device());  // a tensor on the CPU can scale a loss on the GPU
  args.grad_loss = incoming.const_data_ptr();
  args.float64_loss = incoming.scalar_type() == at::kDouble;
  args.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  std::vector<Tensor> grads;
  for (int i = 0; i < 2 * args.head_count; ++i) {
    if (!needs_grad[i]) continue;
    Head& head = args.heads[i % args.head_count];
    const bool is_student = i < args.head_count;
    grads.push_back(at::empty({args.batch, args.classes}, (is_student ? student[i] : teacher[i - args.head_count])
                                                              .options()));
    (is_student ? head.grad_s : head.grad_t) = grads.back().mutable_data_ptr();
  }
  if (!grads.empty() && args.batch > 0) run(args, row_stats.scalar_type(), /*backward=*/true);
  return grads;
}

std::string cuda_architectures() {
  std::string names = "CUDA";
  for (int architecture : {MHKD_ARCHITECTURES}) names += " sm_" + std::to_string(architecture / 10);
  return names;
}

}  // namespace MHKD_LIBRARY
