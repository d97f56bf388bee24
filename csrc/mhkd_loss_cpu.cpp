// The fused loss on the CPU: rows in parallel, each by the code for the instructions that this
// machine has. What is computed and why it is fused stands in mhkd_loss.cpp, the arithmetic of a
// row in mhkd_loss_cpu_rows.h.
#include "mhkd_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace MHKD_LIBRARY {

// A row is worked off in blocks of student and teacher that stay in the first-level cache (2 * 8
// KiB in float32) between the search for the largest logit and the exponentials: main memory sees
// every logit once.
constexpr int64_t kBlock = 2048;

// Registers that a lane adds up before it starts anew: the square root of the 256 AVX2 registers of
// a block.
constexpr int64_t kRun = 16;

// Below this many classes a thread is not worth its wake-up.
constexpr int64_t kGrain = 8192;

template <class T>
struct RowKernels {
  RowSums<double> (*sums)(const T* s, const T* t, int64_t classes, double tau, bool marked);
  void (*gradients)(const T* s, const T* t, T* grad_s, T* grad_t, int classes, double tau,
      int64_t label, const T* stats, const HeadWeights& weights, double incoming);
};

}  // namespace MHKD_LIBRARY

// ---- the same text for each instruction set ----

#if defined(__x86_64__)
#define MHKD_X86
#endif

#define MHKD_ISA plain
#define MHKD_VECTOR_BYTES 16  // SSE2, which every x86-64 has, or Neon
#include "mhkd_loss_cpu_rows.h"
#undef MHKD_ISA
#undef MHKD_VECTOR_BYTES

#ifdef MHKD_X86
// instruction_set() below asks for each of these before it lets their code run.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MHKD_ISA avx2
#define MHKD_VECTOR_BYTES 32
#include "mhkd_loss_cpu_rows.h"
#undef MHKD_ISA
#undef MHKD_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif
#define MHKD_ISA avx512
#define MHKD_VECTOR_BYTES 64
#include "mhkd_loss_cpu_rows.h"
#undef MHKD_ISA
#undef MHKD_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace MHKD_LIBRARY {

// "avx512", "avx2" or "plain": what PyTorch uses, so that ATEN_CPU_CAPABILITY chooses here too.
// That variable can ask for more than the processor has, so the processor is asked as well.
static const std::string& instruction_set() {
  static const std::string name = [] {
#ifdef MHKD_X86
    const std::string capability = at::get_cpu_capability();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512 && capability == "AVX512") return "avx512";
    if (avx2 && (capability == "AVX2" || capability == "AVX512")) return "avx2";
#endif
    return "plain";
  }();
  return name;
}

template <class T>
static RowKernels<T> row_kernels(double tau) {
#ifdef MHKD_X86
  if (instruction_set() == "avx512") return avx512::row_kernels<T>(tau);
  if (instruction_set() == "avx2") return avx2::row_kernels<T>(tau);
#endif
  return plain::row_kernels<T>(tau);
}

template <class In>
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

// A row of logits for the arithmetic: half types are converted into the buffer.
template <class In, class T>
static const T* converted(const void* z, int64_t start, int64_t classes, T* buffer) {
  const In* row = static_cast<const In*>(z) + start;
  if constexpr (std::is_same_v<In, T>) return row;
  std::copy_n(row, classes, buffer);
  return buffer;
}

// Calls run(row of all, head, row of the head, label, two rows to convert into).
template <class In, class Run>
static void for_rows(const Arguments& args, const Run& run) {
  using T = Arithmetic<In>;
  const int64_t grain = std::max<int64_t>(1, kGrain / args.classes);
  at::parallel_for(0, args.rows(), grain, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(std::is_same_v<In, T> ? 0 : 2 * int64_t(args.classes));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row % args.batch;
      const int64_t y = args.labels[b * args.label_stride];
      run(row, args.heads[row / args.batch], b, y, buffer.data());
    }
  });
}

template <class In, class T = Arithmetic<In>>
static void forward(const Arguments& args) {
  int64_t counted = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t y = args.labels[b * args.label_stride];
    if (y == args.ignore_index) continue;
    TORCH_CHECK_INDEX(y >= 0 && y < args.classes, "Target ", y, " is out of bounds.");
    ++counted;
  }
  T* row_stats = static_cast<T*>(args.row_stats);
  std::vector<double> row_terms(args.rows() * kTerms);  // zero where a row does not count
  const RowKernels<T> kernels = row_kernels<T>(args.tau);
  const int64_t classes = args.classes;
  for_rows<In>(args, [&](int64_t row, const Head& head, int64_t b, int64_t y, T* buffer) {
    T* stats = row_stats + row * kRowStats;
    if (y == args.ignore_index) {
      std::fill_n(stats, int(kRowStats), T(0));
      return;
    }
    const T* s = converted<In>(head.s, b * head.stride_s, classes, buffer);
    const T* t = converted<In>(head.t, b * head.stride_t, classes, buffer + classes);
    RowSums<double> sums = kernels.sums(s, t, classes, args.tau, head.marked);
    // Not in the kernels: a function of the C library that runs after AVX code may be very slow.
    const double unit = scale(args.tau);
    sums.cross *= unit;
    finish_row(sums, (s[y] - sums.max_s) * unit, (t[y] - sums.max_t) * unit, args.tau, head.marked,
        stats, &row_terms[row * kTerms]);
  });

  // One thread adds up the rows, in order and in float64: the bits do not depend on the number of
  // threads.
  double loss = 0;
  const double* of_row = row_terms.data();
  for (int h = 0; h < args.head_count; ++h) {
    double sums[kTerms] = {0, 0, 0};
    for (int64_t b = 0; b < args.batch; ++b, of_row += kTerms) {
      for (int i = 0; i < kTerms; ++i) sums[i] += of_row[i];
    }
    T* terms = static_cast<T*>(args.terms) + h * kTerms;
    loss += args.heads[h].weights(args.alpha).finish(sums, double(counted), terms);
  }
  *static_cast<T*>(args.loss) = T(loss);
  row_stats[args.rows() * kRowStats] = T(counted);
}

template <class In, class T = Arithmetic<In>>
static void backward(const Arguments& args) {
  const T* row_stats = static_cast<const T*>(args.row_stats);
  const double counted = row_stats[args.rows() * kRowStats];
  const double incoming = *static_cast<const T*>(args.grad_loss) / counted;
  const RowKernels<T> kernels = row_kernels<T>(args.tau);
  const int64_t classes = args.classes;
  for_rows<In>(args, [&](int64_t row, const Head& head, int64_t b, int64_t y, T* buffer) {
    In* grads[] = {static_cast<In*>(head.grad_s), static_cast<In*>(head.grad_t)};
    T* to[] = {nullptr, nullptr};  // where the gradients are computed: in the place of the logits
    const HeadWeights weights = head.weights(args.alpha);
    for (int side : {0, 1}) {
      if (grads[side] == nullptr) continue;
      grads[side] += b * classes;
      if (y == args.ignore_index || (side == 0 && weights.kl == 0 && weights.ce == 0)) {
        std::fill_n(grads[side], classes, In(0));
      } else if constexpr (std::is_same_v<In, T>) {
        to[side] = grads[side];
      } else {
        to[side] = buffer + side * classes;
      }
    }
    if (!to[0] && !to[1]) return;
    const T* s = converted<In>(head.s, b * head.stride_s, classes, buffer);
    const T* t = converted<In>(head.t, b * head.stride_t, classes, buffer + classes);
    kernels.gradients(s, t, to[0], to[1], args.classes, args.tau, y, row_stats + row * kRowStats,
        weights, incoming);
    if constexpr (!std::is_same_v<In, T>) {
      for (int side : {0, 1}) {
        if (to[side]) std::copy_n(to[side], classes, grads[side]);
      }
    }
  });
}

static void run(Arguments& args, at::ScalarType dtype, bool is_backward) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "mhkd_loss",
      [&] { is_backward ? backward<scalar_t>(args) : forward<scalar_t>(args); });
}

static std::string capability() { return "CPU " + instruction_set(); }

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, CPU, m) {
  m.impl("loss", On<run, loss>::call);
  m.impl("loss_backward", On<run, loss_backward>::call);
}

TORCH_LIBRARY_FRAGMENT(MHKD_LIBRARY, m) { m.def("cpu_capability() -> str", capability); }

}  // namespace MHKD_LIBRARY
