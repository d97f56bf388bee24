// What the CPU and the CUDA kernel of the fused multi-head distillation loss share: layouts, limits, and the
// arithmetic of one row once its sums are known. mhkd_loss.cpp says what is fused and why.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#ifdef __CUDACC__
#define MHKD_HD __host__ __device__ inline
#else
#define MHKD_HD inline
#endif

// The namespace of the operators. The tests build a second library from the same sources under another name.
#ifndef MHKD_LIBRARY
#define MHKD_LIBRARY mhkd
#endif

namespace MHKD_LIBRARY {

using at::Tensor;
using at::TensorList;
using Weights = at::ArrayRef<double>;
using Flags = c10::List<bool>;

// Head pointers travel to the GPU by value, inside the 4 KiB of kernel arguments; 16 heads take 1.3 KiB of it.
constexpr int kMaxHeads = 16;

// Rows this short are computed in float64 whatever their dtype. With so few classes the rounding errors of the
// exponentials no longer average out, tau^2 multiplies them, and float64 costs nothing that can be measured.
constexpr int64_t kExactClasses = 64;

// A class of teacher probability 0 contributes nothing to the divergence, also where the student's is 0. What counts as
// 0 is what is 0 in the dtype of the loss: float64 arithmetic for a float32 loss draws the line where float32 does.
MHKD_HD double largest_zero(bool float64_loss) {
  constexpr double smallest_float = 1.4012984643248171e-45;  // 2^-149
  return float64_loss ? 0 : smallest_float;
}

// Kept from the forward for the backward: six numbers a row, and behind all rows the count of those that count.
enum RowStat { kMaxS, kMaxT, kInvTauS, kInvTauT, kInvOneS, kInvOneT, kRowStats };

// What a row adds to the terms of its head: KL * tau^2, the student's cross-entropy, the teacher's.
enum Term { kKl, kCe, kCeTeacher, kTerms };

// The sums over (a part of) one row, relative to the largest logits seen so far:
//     tau_s = sum exp((s - max_s) / tau)      one_s = sum exp(s - max_s)      (tau_t, one_t: the teacher's)
//     cross = sum exp((t - max_t) / tau) * ((t - max_t) - (s - max_s))
// A row is read once: where a larger logit turns up, rebase() scales what has been summed.
template <class A>
struct RowSums {
  A max_s, max_t;
  A tau_s, tau_t, one_s, one_t, cross;  // RowSums{max_s, max_t} leaves them 0
};

// The largest logits start at the lowest finite number, not at -inf: -inf - lowest is -inf, whose exponential is
// the 0 that a masked class has to have, where -inf - -inf would be NaN. In a row without a finite logit the sums
// stay 0 and 0 / 0 gives the NaN that mathematics gives.
template <class A>
MHKD_HD void rebase(RowSums<A>& sums, A max_s, A max_t, A tau, A zero) {
  const A step_s = sums.max_s - max_s, step_t = sums.max_t - max_t;  // <= 0
  const A scale_t = std::exp(step_t / tau);
  sums.tau_s *= std::exp(step_s / tau);
  sums.one_s *= std::exp(step_s);
  sums.one_t *= std::exp(step_t);
  const A old_tau_t = sums.tau_t;
  sums.tau_t *= scale_t;
  // A class of teacher probability 0 contributes 0, also where cross or a step is infinite.
  sums.cross = sums.tau_t <= zero ? A(0) : scale_t * (sums.cross + old_tau_t * (step_t - step_s));
  sums.max_s = max_s;
  sums.max_t = max_t;
}

// From the sums of a whole row to its terms and to what the backward needs. logit_* are those of the row's label.
// With p = exp((t - max_t) / tau) / tau_t and q likewise, sum p (log p - log q) is the bracket below. It is a small
// difference of large numbers and tau^2 multiplies what is lost in it: from the sums of a row on all is float64.
template <class S>
MHKD_HD void finish_row(const RowSums<double>& sums, double logit_s, double logit_t, double tau, bool marked, S* stats,
                        double* terms) {
  terms[kKl] = (sums.cross / sums.tau_t / tau + std::log(sums.tau_s / sums.tau_t)) * tau * tau;
  terms[kCe] = std::log(sums.one_s) - (logit_s - sums.max_s);
  terms[kCeTeacher] = marked ? std::log(sums.one_t) - (logit_t - sums.max_t) : 0;
  stats[kMaxS] = S(sums.max_s);
  stats[kMaxT] = S(sums.max_t);
  stats[kInvTauS] = S(1 / sums.tau_s);
  stats[kInvTauT] = S(1 / sums.tau_t);
  stats[kInvOneS] = S(1 / sums.one_s);
  stats[kInvOneT] = S(marked ? 1 / sums.one_t : 0);
}

// What multiplies the exponentials of one row in the backward. With e = exp((z - max) / tau):
//     grad_s = tau_s * e_s + one_s * e_s^tau - tau_t * e_t,  minus label_s at the label
//     grad_t = one_t * e_t^tau,                              minus label_t at the label
// A coefficient of 0 wins over a term that is infinite or NaN, so a kernel leaves that term out: with_kl.
template <class A>
struct GradCoefficients {
  A tau_s, one_s, tau_t, one_t, label_s, label_t;
  bool with_kl;
};

template <class A>
MHKD_HD GradCoefficients<A> grad_coefficients(const A* stats, double kl, double ce, double ce_teacher, double tau) {
  // kl, ce and ce_teacher: the coefficients of the head's terms in the loss, times the incoming gradient, over the
  // number of rows that count. The incoming gradient is in here so that half types are rounded after it.
  GradCoefficients<A> c;
  c.with_kl = kl != 0;
  c.tau_s = c.with_kl ? A(kl * tau * stats[kInvTauS]) : A(0);
  c.tau_t = c.with_kl ? A(kl * tau * stats[kInvTauT]) : A(0);
  c.one_s = ce != 0 ? A(ce * stats[kInvOneS]) : A(0);
  c.one_t = A(ce_teacher * stats[kInvOneT]);
  c.label_s = A(ce);
  c.label_t = A(ce_teacher);
  return c;
}

// exp(x) = exp(x / tau)^tau: one exponential a logit serves both temperatures where tau is one of these integers.
// Beyond, the power's rounding error (tau times that of its base) would cost more than the exponential.
constexpr int kLargestPower = 5;

MHKD_HD int integer_power(double tau) {  // 0: tau is no such integer
  return tau >= 1 && tau <= kLargestPower && tau == std::floor(tau) ? int(tau) : 0;
}

// In place: as an argument or a result a register would be passed as the instruction set of this header says.
template <int kPower, class V>
__attribute__((always_inline)) MHKD_HD void raise(V& x) {
  static_assert(kPower >= 1 && kPower <= kLargestPower, "see integer_power");
  if constexpr (kPower == 2) x *= x;
  if constexpr (kPower == 3) x *= x * x;
  if constexpr (kPower == 4) {
    x *= x;
    x *= x;
  }
  if constexpr (kPower == 5) {
    const V square = x * x;
    x *= square * square;
  }
}

// The coefficients of a head's terms in the loss: equations 1 and 2 of the paper.
MHKD_HD double kl_weight(double alpha, double head_weight) { return head_weight * alpha; }
MHKD_HD double ce_weight(double alpha, double head_weight) { return head_weight * (1 - alpha); }

MHKD_HD double weighted_terms(double kl, double ce, double ce_teacher, double alpha, double head_weight, bool marked) {
  double loss = 0;
  if (kl_weight(alpha, head_weight) != 0) loss += kl_weight(alpha, head_weight) * kl;
  if (ce_weight(alpha, head_weight) != 0) loss += ce_weight(alpha, head_weight) * ce;
  return marked ? loss + ce_teacher : loss;
}

// ---- checks and shapes, in mhkd_loss.cpp ----

// Refuses wrong input as PyTorch's own losses do: ValueError for values and shapes, TypeError for dtypes.
void check_arguments(at::TensorList student, at::TensorList teacher, const at::Tensor& labels, double tau,
                     double alpha, at::ArrayRef<double> head_weights, const c10::List<bool>& teacher_ce);

// The dtype of the loss and the terms, and that of the arithmetic and of the rows' statistics.
at::ScalarType loss_dtype(at::TensorList student, at::TensorList teacher);
at::ScalarType arithmetic_dtype(at::TensorList student, at::TensorList teacher);

// Rows may have any stride; within a row the classes have to be adjacent. Copies what is not (transposed logits).
std::vector<at::Tensor> adjacent_classes(at::TensorList logits);

// ---- the CUDA kernels, in mhkd_loss_cuda.cu: registered in mhkd_loss.cpp, whose headers nvcc need not read ----

std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_cuda(at::TensorList student, at::TensorList teacher,
                                                         const at::Tensor& labels, double tau, double alpha,
                                                         at::ArrayRef<double> head_weights,
                                                         const c10::List<bool>& teacher_ce, int64_t ignore_index);
std::vector<at::Tensor> loss_backward_cuda(const at::Tensor& grad_loss, at::TensorList student,
                                           at::TensorList teacher, const at::Tensor& labels,
                                           const at::Tensor& row_stats, double tau, double alpha,
                                           at::ArrayRef<double> head_weights, const c10::List<bool>& teacher_ce,
                                           int64_t ignore_index, const c10::List<bool>& needs_grad);
std::string cuda_architectures();

}  // namespace MHKD_LIBRARY
