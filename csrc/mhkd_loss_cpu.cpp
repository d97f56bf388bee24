// The fused loss on the CPU: rows in parallel, each by the code for the instructions that this
// machine has. What is computed and why it is fused stands in mhkd_loss.cpp, the arithmetic of a
// row in mhkd_loss_cpu_rows.h.
#include "mhkd_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
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

struct Row {  // of logits, or of a gradient: null where none is asked for
  void* data;
  at::ScalarType dtype;

  explicit operator bool() const { return data != nullptr; }
};

struct RowKernels {
  RowSums<double> (*sums)(const Row& s, const Row& t, int64_t classes, double tau, bool marked);
  void (*gradients)(const Row& s, const Row& t, int64_t classes, double tau, int64_t label,
      const void* stats, const HeadWeights& weights, double incoming, const Row& grad_s,
      const Row& grad_t);
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

static RowKernels row_kernels(bool float64, double tau) {
#ifdef MHKD_X86
  if (instruction_set() == "avx512") return avx512::row_kernels(float64, tau);
  if (instruction_set() == "avx2") return avx2::row_kernels(float64, tau);
#endif
  return plain::row_kernels(float64, tau);
}

// The rows of a tensor. Asking the tensor for every row would cost as much as a short row itself.
struct Rows {
  char* data = nullptr;
  int64_t bytes = 0;  // from row to row
  at::ScalarType dtype = at::kFloat;

  Rows() = default;
  explicit Rows(const Tensor& z)
      : data(static_cast<char*>(const_cast<void*>(z.const_data_ptr()))),
        bytes(z.stride(0) * z.element_size()),
        dtype(z.scalar_type()) {}

  Row operator[](int64_t b) const { return {data ? data + b * bytes : nullptr, dtype}; }
};

// Without the dispatcher, whose way to the allocator is long beside a short batch.
static Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return Tensor(at::detail::empty_cpu(sizes, dtype));
}

// A number from a tensor on the CPU. Tensor::item() would go through the dispatcher.
static double number(const Tensor& values, int64_t index) {
  return AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "mhkd_loss",
      [&] { return double(values.const_data_ptr<scalar_t>()[index]); });
}

static int64_t grain(int64_t classes) { return std::max<int64_t>(1, kGrain / classes); }

static std::tuple<Tensor, Tensor, Tensor> loss_cpu(TensorList student, TensorList teacher,
    const Tensor& labels, double tau, double alpha, Weights head_weights, const Flags& teacher_ce,
    int64_t ignore_index) {
  check_arguments(student, teacher, labels, tau, head_weights, teacher_ce);
  const auto z_s = adjacent_classes(student), z_t = adjacent_classes(teacher);
  const int64_t heads = int64_t(z_s.size()), batch = labels.size(0), classes = z_s[0].size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t label_stride = labels.stride(0);

  int64_t counted = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t y = label[b * label_stride];
    if (y == ignore_index) continue;
    TORCH_CHECK_INDEX(y >= 0 && y < classes, "Target ", y, " is out of bounds.");
    ++counted;
  }

  const at::ScalarType dtype = loss_dtype(student, teacher);
  const int64_t rows = heads * batch;
  Tensor loss = empty({}, dtype), terms = empty({heads, kTerms}, dtype);
  Tensor row_stats = empty({rows * kRowStats + 1}, dtype);
  char* stats = static_cast<char*>(row_stats.mutable_data_ptr());
  const int64_t row_bytes = kRowStats * row_stats.element_size();

  bool marked[kMaxHeads];
  Rows rows_s[kMaxHeads], rows_t[kMaxHeads];
  for (int64_t h = 0; h < heads; ++h) {
    marked[h] = teacher_ce[h];
    rows_s[h] = Rows(z_s[h]);
    rows_t[h] = Rows(z_t[h]);
  }
  std::vector<double> row_terms(rows * kTerms);  // zero where a row does not count
  const RowKernels kernels = row_kernels(dtype == at::kDouble, tau);
  // Not in the kernels: a function of the C library that runs after AVX code may be very slow.
  const auto finish = [&](auto* row_stats, int64_t h, int64_t b, int64_t y, double* terms) {
    const Row s = rows_s[h][b], t = rows_t[h][b];
    RowSums<double> sums = kernels.sums(s, t, classes, tau, marked[h]);
    sums.cross *= scale(tau);
    double z_s, z_t;
    const double x_s = (*plain::as_arithmetic(s, y, 1, &z_s) - sums.max_s) * scale(tau);
    const double x_t = (*plain::as_arithmetic(t, y, 1, &z_t) - sums.max_t) * scale(tau);
    finish_row(sums, x_s, x_t, tau, marked[h], row_stats, terms);
  };
  at::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row / batch, b = row % batch, y = label[b * label_stride];
      void* to = stats + row * row_bytes;
      if (y == ignore_index) {
        std::fill_n(static_cast<char*>(to), row_bytes, char(0));
      } else if (dtype == at::kDouble) {
        finish(static_cast<double*>(to), h, b, y, &row_terms[row * kTerms]);
      } else {
        finish(static_cast<float*>(to), h, b, y, &row_terms[row * kTerms]);
      }
    }
  });

  // One thread adds up the rows, in order and in float64: the bits do not depend on the number of
  // threads.
  AT_DISPATCH_FLOATING_TYPES(dtype, "mhkd_loss", [&] {
    scalar_t* out = terms.mutable_data_ptr<scalar_t>();
    double total = 0;
    for (int64_t h = 0; h < heads; ++h) {
      double sum[kTerms] = {0, 0, 0};
      for (int64_t b = 0; b < batch; ++b) {
        for (int term = 0; term < kTerms; ++term)
          sum[term] += row_terms[(h * batch + b) * kTerms + term];
      }
      for (int term = 0; term < kTerms; ++term) {
        sum[term] = term == kCeTeacher && !marked[h]
                        ? 0
                        : sum[term] / double(counted);  // no row: 0 / 0 is NaN
        out[h * kTerms + term] = scalar_t(sum[term]);
      }
      total += HeadWeights(alpha, head_weights[h], marked[h]).loss(sum);
    }
    *loss.mutable_data_ptr<scalar_t>() = scalar_t(total);
    row_stats.mutable_data_ptr<scalar_t>()[rows * kRowStats] = scalar_t(counted);
  });
  return {loss, terms, row_stats};
}

static std::vector<Tensor> loss_backward_cpu(const Tensor& grad_loss, TensorList student,
    TensorList teacher, const Tensor& labels, const Tensor& row_stats, double tau, double alpha,
    Weights head_weights, const Flags& teacher_ce, int64_t ignore_index, const Flags& needs_grad) {
  const auto z_s = adjacent_classes(student), z_t = adjacent_classes(teacher);
  const int64_t heads = int64_t(z_s.size()), batch = labels.size(0), classes = z_s[0].size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t label_stride = labels.stride(0);
  const char* stats = static_cast<const char*>(row_stats.const_data_ptr());
  const int64_t row_bytes = kRowStats * row_stats.element_size();

  std::vector<Tensor> grads;
  grads.reserve(2 * heads);
  Rows rows_s[kMaxHeads], rows_t[kMaxHeads], grad_s[kMaxHeads],
      grad_t[kMaxHeads];  // null: no gradient is asked for
  for (int64_t i = 0; i < 2 * heads; ++i) {
    if (!needs_grad[i]) continue;
    grads.push_back(empty({batch, classes}, (i < heads ? z_s[i] : z_t[i - heads]).scalar_type()));
    (i < heads ? grad_s[i] : grad_t[i - heads]) = Rows(grads.back());
  }

  const double counted = number(row_stats, heads * batch * kRowStats);
  const double incoming = number(grad_loss, 0) / counted;
  std::vector<HeadWeights> weights;
  weights.reserve(heads);
  for (int64_t h = 0; h < heads; ++h) {
    rows_s[h] = Rows(z_s[h]);
    rows_t[h] = Rows(z_t[h]);
    weights.emplace_back(alpha, head_weights[h], teacher_ce[h]);
  }
  const RowKernels kernels = row_kernels(row_stats.scalar_type() == at::kDouble, tau);
  at::parallel_for(0, heads * batch, grain(classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row / batch, b = row % batch, y = label[b * label_stride];
      Row to_s = grad_s[h][b], to_t = grad_t[h][b];
      const bool counts = y != ignore_index;
      for (Row* to : {&to_s, &to_t}) {  // zero where the row or the head counts nothing
        if (*to && (!counts || (to == &to_s && weights[h].kl == 0 && weights[h].ce == 0))) {
          std::fill_n(static_cast<char*>(to->data), classes * c10::elementSize(to->dtype), char(0));
          to->data = nullptr;
        }
      }
      kernels.gradients(rows_s[h][b], rows_t[h][b], classes, tau, y, stats + row * row_bytes,
          weights[h], incoming, to_s, to_t);
    }
  });
  return grads;
}

static std::string capability() { return "CPU " + instruction_set(); }

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, CPU, m) {
  m.impl("loss", loss_cpu);
  m.impl("loss_backward", loss_backward_cpu);
}

TORCH_LIBRARY_FRAGMENT(MHKD_LIBRARY, m) { m.def("cpu_capability() -> str", capability); }

}  // namespace MHKD_LIBRARY
