// What the CPU and the CUDA kernel of the fused multi-head distillation loss share: layouts,
// limits, and the arithmetic of one row. mhkd_loss.cpp says what is fused and why.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define MHKD_HD __host__ __device__ inline
#else
#define MHKD_HD inline
#endif

// The namespace of the operators. The tests build a second library from these sources under another
// name.
#ifndef MHKD_LIBRARY
#define MHKD_LIBRARY mhkd
#endif

namespace MHKD_LIBRARY {

using at::Tensor;
using at::TensorList;
using Weights = at::ArrayRef<double>;
using Flags = c10::List<bool>;

// Head pointers travel to the GPU by value, in its 4 KiB of kernel arguments.
constexpr int kMaxHeads = 16;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// What multiplies a logit: with x = (z - max) * scale(tau), exp((z - max) / tau) is 2^x and
// exp(z - max) is 2^(tau x).
MHKD_HD double scale(double tau) { return kLog2E / tau; }

// Sums over (a part of) a row, of its x_s and x_t:
//     tau_s = sum 2^x_s    one_s = sum 2^(tau x_s)    cross = sum 2^x_t (x_t - x_s)
// and tau_t, one_t of the teacher. A row is read once: for another maximum rebase() scales the
// sums. The unit of the maxima, and of cross, is that of x on CUDA, where x = z * scale - max is a
// single multiply-add, and that of z on the CPU. Any number near the largest logit will do for
// max_*.
template <class A>
struct RowSums {
  A max_s, max_t;
  A tau_s, tau_t, one_s, one_t, cross;  // RowSums{max_s, max_t} leaves them 0
};

// To larger maxima. They start at the lowest finite number, not at -inf: a masked logit, -inf, then
// has x = -inf, whose exponential is 0, where -inf - -inf would be NaN. In a row without a finite
// logit the sums stay 0, and 0 / 0 gives the NaN that mathematics gives. unit: of x in that of max.
template <class A>
MHKD_HD void rebase(RowSums<A>& sums, A max_s, A max_t, A tau, A unit) {
  const A step_s = sums.max_s - max_s, step_t = sums.max_t - max_t;  // <= 0
  const A scale_t = std::exp2(step_t * unit);
  const A cross = scale_t * (sums.cross + sums.tau_t * (step_t - step_s));
  sums.tau_s *= std::exp2(step_s * unit);
  sums.one_s *= std::exp2(step_s * unit * tau);
  sums.one_t *= std::exp2(step_t * unit * tau);
  sums.tau_t *= scale_t;
  // A class of teacher probability 0 contributes 0, also where cross or a step is infinite.
  sums.cross = sums.tau_t == 0 ? A(0) : cross;
  sums.max_s = max_s;
  sums.max_t = max_t;
}

// Kept from the forward for the backward: six numbers a row, and behind all rows the count of those
// that count.
enum RowStat { kMaxS, kMaxT, kInvTauS, kInvTauT, kInvOneS, kInvOneT, kRowStats };

// What a row adds to the terms of its head: KL * tau^2, the student's cross-entropy, the teacher's.
enum Term { kKl, kCe, kCeTeacher, kTerms };

template <class A>
MHKD_HD A log2_of(A x) {
#ifdef __CUDA_ARCH__
  return std::log2(x);
#else
  return std::log(x) * A(kLog2E);  // the C library's log2 is slower: it shows with short rows
#endif
}

// From the sums of a whole row to its terms and statistics; x_s and x_t are those of its label.
// With p = 2^x_t / tau_t and q likewise, the bracket is sum p (log2 p - log2 q).
template <class A, class To, class Out>
MHKD_HD void finish_row(
    const RowSums<A>& sums, A x_s, A x_t, A tau, bool marked, To* stats, Out* terms) {
  const A ln2 = A(kLn2);
  terms[kKl] = (sums.cross / sums.tau_t + log2_of(sums.tau_s / sums.tau_t)) * ln2 * tau * tau;
  terms[kCe] = (log2_of(sums.one_s) - tau * x_s) * ln2;
  terms[kCeTeacher] = marked ? (log2_of(sums.one_t) - tau * x_t) * ln2 : A(0);
  stats[kMaxS] = To(sums.max_s);
  stats[kMaxT] = To(sums.max_t);
  stats[kInvTauS] = To(1 / sums.tau_s);
  stats[kInvTauT] = To(1 / sums.tau_t);
  stats[kInvOneS] = To(1 / sums.one_s);
  stats[kInvOneT] = To(marked ? 1 / sums.one_t : A(0));
}

// What the terms of one head weigh in the loss, equations 1 and 2: the divergence, the student's
// cross-entropy, the teacher's. Where one is 0 its term counts nothing, were it infinite or NaN.
struct HeadWeights {
  double kl, ce, ce_teacher;

  // From the sums over all rows to the terms, means over those that count; what they add to the
  // loss.
  template <class A>
  MHKD_HD double finish(double* sums, double counted, A* terms) const {
    for (int i = 0; i < kTerms; ++i) {
      sums[i] = i == kCeTeacher && ce_teacher == 0 ? 0 : sums[i] / counted;  // no row: 0 / 0 is NaN
      terms[i] = static_cast<A>(sums[i]);
    }
    return (kl != 0 ? kl * sums[kKl] : 0) + (ce != 0 ? ce * sums[kCe] : 0) + sums[kCeTeacher];
  }
};

struct Head {
  const void *s, *t;           // [B, K] logits
  void *grad_s, *grad_t;       // [B, K] contiguous, or null
  int64_t stride_s, stride_t;  // of the rows, in elements
  double weight;
  bool marked;

  MHKD_HD HeadWeights weights(double alpha) const {
    return {weight * alpha, weight * (1 - alpha), double(marked)};
  }
};

// One call, forward or backward, as the kernels take it.
struct Arguments {
  Head heads[kMaxHeads];
  const int64_t* labels;
  int64_t label_stride, ignore_index, batch;
  int classes, head_count;
  double tau, alpha;
  void* row_stats;        // [H * B, kRowStats], then the count of rows; all these float or double
  void *loss, *terms;     // outputs of the forward
  const void* grad_loss;  // input of the backward
  void* row_terms;        // [H * B, kTerms], forward on CUDA only
  unsigned* finished;     // blocks that have finished, forward on CUDA only

  MHKD_HD int64_t rows() const { return head_count * batch; }
};
static_assert(sizeof(Arguments) <= 4096, "kernel arguments");

// The gradient of one row of one side, the student's or the teacher's. With e = 2^x of this side
// and e_t of the teacher:
//     grad = tau * e - tau_t * e_t + one * e^tau,  minus label at the label
template <class Z, class A>
struct GradRow {
  const Z* z;
  Z* grad;
  A max, tau, tau_t, one, label;
};

// What of it is there: the student's whole gradient, the teacher's too (they share exponentials),
// or a cross-entropy alone, of either side, for which nothing of the other is read.
enum Part { kStudent, kBoth, kAlone };

// Calls run(row of this side, row of the teacher, a Part as a type) for the gradients of a row.
// `incoming` is the gradient of the loss over the number of rows that count: it is in here so that
// half types are rounded after it. The divergence is detached from the teacher.
template <class Z, class A, class Run>
MHKD_HD void for_gradients(const Z* z_s, const Z* z_t, Z* grad_s, Z* grad_t,
    const HeadWeights& weights, const A* stats, double incoming, double tau, const Run& run) {
  const bool kl = weights.kl != 0, ce = weights.ce != 0;
  const A of_kl = A(incoming * weights.kl * tau), of_ce = A(incoming * weights.ce);
  const A of_teacher = A(incoming), zero = 0;
  const GradRow<Z, A> s{z_s, grad_s, stats[kMaxS], of_kl * stats[kInvTauS],
      of_kl * stats[kInvTauT], ce ? of_ce * stats[kInvOneS] : zero, ce ? of_ce : zero};
  const GradRow<Z, A> t{
      z_t, grad_t, stats[kMaxT], zero, zero, of_teacher * stats[kInvOneT], of_teacher};
  if (kl && grad_s && grad_t) return run(s, t, std::integral_constant<Part, kBoth>());
  if (kl && grad_s) run(s, t, std::integral_constant<Part, kStudent>());
  if (!kl && grad_s) run(s, s, std::integral_constant<Part, kAlone>());
  if (grad_t) run(t, t, std::integral_constant<Part, kAlone>());
}

// 2^(tau x) = (2^x)^tau: one exponential a logit serves both temperatures where tau is one of these
// integers. Beyond, the power's rounding error (tau times that of its base) would cost more than
// the exponential. 0: tau is no such integer.
constexpr int kLargestPower = 5;

MHKD_HD int integer_power(double tau) {
  return tau >= 1 && tau <= kLargestPower && tau == std::floor(tau) ? int(tau) : 0;
}

// In place: as an argument or a result a vector register would be passed as the instruction set of
// this header says.
template <int kPower, class V>
__attribute__((always_inline)) MHKD_HD void raise(V& x) {
  static_assert(kPower >= 1 && kPower <= kLargestPower, "see integer_power");
  const V base = x;
  if constexpr (kPower == 2 || kPower >= 4) x *= x;
  if constexpr (kPower == 3) x *= x * x;
  if constexpr (kPower >= 4) x *= x;
  if constexpr (kPower == 5) x *= base;
}

// ---- the operators, in mhkd_loss.cpp: all but the numbers themselves ----

// How a device computes a call, forward or backward, whose logits are of this dtype.
using Run = void(Arguments& args, at::ScalarType logits, bool backward);

std::tuple<Tensor, Tensor, Tensor> loss(Run* run, TensorList student, TensorList teacher,
    const Tensor& labels, double tau, double alpha, Weights head_weights,
    const Flags& teacher_ce, int64_t ignore_index);

std::vector<Tensor> loss_backward(Run* run, const Tensor& grad_loss, TensorList student,
    TensorList teacher, const Tensor& labels, const Tensor& row_stats, double tau, double alpha,
    Weights head_weights, const Flags& teacher_ce, int64_t ignore_index, const Flags& needs_grad);

// On<run, loss>::call is the operator of a device.
template <Run* run, auto function>
struct On;
template <Run* run, class R, class... Args, R (*function)(Run*, Args...)>
struct On<run, function> {
  static R call(Args... args) { return function(run, args...); }
};

}  // namespace MHKD_LIBRARY
