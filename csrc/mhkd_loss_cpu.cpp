// The fused loss on the CPU: rows in parallel, each by the code for the instructions that this
// machine has, in mhkd_loss_cpu_rows.h. What is fused and why stands in mhkd_loss.cpp.
#include "mhkd_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace MHKD_LIBRARY {

// A row is worked off in blocks of student and teacher that stay in the first-level cache (2 * 8
// KiB in float32) between the search for the largest logit and the exponentials: main memory sees
// every logit once.
constexpr int kBlock = 2048;

// Registers that a lane adds up before it starts anew: the square root of the 256 AVX2 registers of
// a block.
constexpr int kRun = 16;

// Below this many classes a thread is not worth its wake-up.
constexpr int64_t kGrain = 8192;

template <class In>
struct RowKernels {
  RowSums<double> (*sums[2])(const In* s, const In* t, int classes, double tau);  // [marked]
  void (*gradients[kParts])(const GradRow<In>& s, const GradRow<In>& t, int classes, double tau,
      int64_t label);  // [of a Part]
};

}  // namespace MHKD_LIBRARY

// ---- the same text for each instruction set ----

#define MHKD_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define MHKD_TARGET(set) \
  MHKD_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MHKD_TARGET_END MHKD_PRAGMA(clang attribute pop)
#else
#define MHKD_TARGET(set) MHKD_PRAGMA(GCC push_options) MHKD_PRAGMA(GCC target(set))
#define MHKD_TARGET_END MHKD_PRAGMA(GCC pop_options)
#endif

#define MHKD_ISA plain
#define MHKD_VECTOR_BYTES 16  // SSE2, which every x86-64 has, or Neon
#include "mhkd_loss_cpu_rows.h"

#ifdef __x86_64__  // row_kernels() below asks for each of these before it lets their code run
#define MHKD_ISA avx2
#define MHKD_VECTOR_BYTES 32
MHKD_TARGET("avx2,fma")
#include "mhkd_loss_cpu_rows.h"
MHKD_TARGET_END

#define MHKD_ISA avx512
#define MHKD_VECTOR_BYTES 64
MHKD_TARGET("avx512f,avx512vl,avx512bw,avx512dq,fma")
#include "mhkd_loss_cpu_rows.h"
MHKD_TARGET_END
#endif

namespace MHKD_LIBRARY {

// "avx512", "avx2" or "plain": what PyTorch uses, so that ATEN_CPU_CAPABILITY chooses here too.
// That variable can ask for more than the processor has, so the processor is asked as well.
static const std::string& instruction_set() {
  static const std::string name = [] {
#ifdef __x86_64__
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

template <class In>
static RowKernels<In> row_kernels(double tau) {
#ifdef __x86_64__
  if (instruction_set() == "avx512") return avx512::row_kernels<In>(tau);
  if (instruction_set() == "avx2") return avx2::row_kernels<In>(tau);
#endif
  return plain::row_kernels<In>(tau);
}

template <class In, class OfRow>
static void for_rows(const Arguments& args, const OfRow& of_row) {
  const int64_t grain = std::max<int64_t>(1, kGrain / args.classes);
  at::parallel_for(0, args.rows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of_row(Row<In>(args, i));
  });
}

template <class In, class T = Arithmetic<In>>
static void forward(const Arguments& args) {
  double counts[kRowCounts] = {0, 0};
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t y = args.labels[b * args.label_stride];
    if (y == args.ignore_index) continue;
    ++counts[kCounted];
    if (y == kUnlabelled) continue;
    TORCH_CHECK_INDEX(y >= 0 && y < args.classes, "Target ", y, " is out of bounds.");
    ++counts[kLabelled];
  }
  const RowKernels<In> kernels = row_kernels<In>(args.tau.exact);
  const double tau = args.tau.exact, unit = args.unit.exact;
  for_rows<In>(args, [&](const Row<In>& row) {
    if (!row.counts) {
      std::fill_n(row.stats, kRowStats, T(0));
      return;
    }
    const bool marked = row.labelled && row.head.marked();
    RowSums<double> sums = kernels.sums[marked](row.s, row.t, args.classes, tau);
    // Not in the kernels: a function of the C library that runs after AVX code may be very slow.
    sums.cross *= unit;
    const int64_t k = row.labelled ? row.label : 0;
    const double x_s = (T(row.s[k]) - sums.max_s) * unit, x_t = (T(row.t[k]) - sums.max_t) * unit;
    finish_row(sums, x_s, x_t, tau, row.labelled, marked, row.stats);
  });

  // One thread adds up the rows, in order and in float64: the bits do not depend on the number of
  // threads.
  double loss = 0;
  T* stats = static_cast<T*>(args.row_stats);
  for (int h = 0; h < args.head_count; ++h) {
    double sums[kTerms] = {0, 0, 0};
    for (int64_t b = 0; b < args.batch; ++b, stats += kRowStats) {
      for (int i = 0; i < kTerms; ++i) sums[i] += stats[kRowTerms + i];
    }
    T* terms = static_cast<T*>(args.terms) + h * kTerms;
    loss += args.heads[h].finish(sums, counts, terms);
  }
  *static_cast<T*>(args.loss) = T(loss);
  for (int i = 0; i < kRowCounts; ++i) stats[i] = T(1 / counts[i]);
}

template <class In>
static void backward(const Arguments& args) {
  const RowKernels<In> kernels = row_kernels<In>(args.tau.exact);
  for_rows<In>(args, [&](const Row<In>& row) {
    const auto zero = [&](In* grad) { std::fill_n(grad, args.classes, In(0)); };
    const auto run = [&](const auto& side, const auto& teacher, auto part) {
      kernels.gradients[part](side, teacher, args.classes, args.tau.exact, row.label);
    };
    for_gradients(args, row, zero, run);
  });
}

static void run(Arguments& args, at::ScalarType dtype, bool is_backward) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "mhkd_loss",
      [&] { is_backward ? backward<scalar_t>(args) : forward<scalar_t>(args); });
}

static std::string capability() { return "CPU " + instruction_set(); }

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, CPU, m) {
  m.impl("loss", flat<loss, run>);
  m.impl("loss_backward", flat_backward<loss_backward, run>);
}

TORCH_LIBRARY_FRAGMENT(MHKD_LIBRARY, m) { m.def("cpu_capability() -> str", capability); }

}  // namespace MHKD_LIBRARY
