// What the files of the fused multi-head distillation loss share: the operator's arguments, the
// layout of a call, the arithmetic of one row. mhkd_loss.cpp says what is fused and why.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define MHKD_HD __host__ __device__ inline
#else
#define MHKD_HD inline
#endif

#ifndef MHKD_LIBRARY  // the namespace; the tests build a second library under another name
#define MHKD_LIBRARY mhkd
#endif

namespace MHKD_LIBRARY {

using at::Tensor;
using at::TensorList;
using Numbers = at::ArrayRef<double>;
using Flags = c10::List<bool>;

template <class In>  // of logits of type In
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

// A row of this label counts for the divergence, not for a cross-entropy. UNLABELLED in mhkd.py.
constexpr int64_t kUnlabelled = -1;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// What multiplies a logit: with x = (z - max) * scale(tau), exp((z - max) / tau) is 2^x and
// exp(z - max) is 2^(tau x).
MHKD_HD double scale(double tau) { return kLog2E / tau; }

// 2^(tau x) is 2^x squared so many times: one exponential a logit serves both temperatures. Any
// other tau (kNoSquarings) takes two.
constexpr int kNoSquarings = -1;

MHKD_HD int squarings(double tau) {
  return tau == 1 ? 0 : tau == 2 ? 1 : tau == 4 ? 2 : kNoSquarings;
}

// ---- One call as the kernels take it ----
// What a row adds to the terms of its head: KL * tau^2, the student's cross-entropy, the teacher's.
enum Term { kKl, kCe, kCeTeacher, kTerms };

// What the forward writes for each row: six numbers for the backward, and the row's terms.
enum RowStat { kMaxS, kMaxT, kInvTauS, kInvTauT, kInvOneS, kInvOneT, kRowTerms };
constexpr int kRowStats = int(kRowTerms) + int(kTerms);

// Rows that count for the divergence, for a cross-entropy; behind the statistics: one over each.
enum RowCount { kCounted, kLabelled, kRowCounts };

// A number that the host has computed, in both precisions: most GPUs are slow in float64.
struct Setting {
  double exact = 0;
  float single = float(exact);

  template <class A>
  MHKD_HD A as() const {
    return std::is_same_v<A, double> ? A(exact) : A(single);
  }
};

struct Head {
  const void *s, *t;      // [B, K] logits
  void *grad_s, *grad_t;  // [B, K], or null
  int64_t stride_s, stride_t, stride_grad_s, stride_grad_t;  // of the rows, in elements
  // Of the terms in the loss, equations 1 and 2. Where one is 0 its term counts nothing, were it
  // infinite or NaN.
  Setting weights[kTerms];

  MHKD_HD bool marked() const { return weights[kCeTeacher].single != 0; }

  // From the sums over all rows to the terms, means over those that count (0 / 0 is NaN; where only
  // unlabelled rows count a cross-entropy is 0); their part of the loss.
  template <class A>
  MHKD_HD double finish(const double* sums, const double* counts, A* terms) const {
    double loss = 0;
    for (int i = 0; i < kTerms; ++i) {
      const double rows = counts[i == kKl ? kCounted : kLabelled];
      const bool absent = i == kCeTeacher && !marked();
      const double mean = absent || (rows == 0 && counts[kCounted] > 0) ? 0 : sums[i] / rows;
      terms[i] = static_cast<A>(mean);
      if (weights[i].exact != 0) loss += weights[i].exact * mean;
    }
    return loss;
  }
};

constexpr int kMaxHeads = 16;

struct Arguments {
  Head heads[kMaxHeads];
  const int64_t* labels;
  int64_t label_stride, ignore_index, batch;
  int classes, head_count;
  Setting tau, unit;      // unit: scale(tau)
  void *loss, *terms;     // outputs of the forward
  const void* grad_loss;  // input of the backward
  void* row_stats;        // [H * B, kRowStats], [kRowCounts]
  unsigned* finished;     // blocks that have finished, forward on CUDA only

  MHKD_HD int64_t rows() const { return head_count * batch; }
};
static_assert(sizeof(Arguments) <= 4096, "they travel to the GPU by value, in 4 KiB at most");

// One row of one head: row b of the batch.
template <class In>
struct Row {
  const Head& head;
  int64_t b, label;
  bool counts, labelled;
  const In *s, *t;
  Arithmetic<In>* stats;

  MHKD_HD Row(const Arguments& args, int64_t i)
      : head(args.heads[i / args.batch]),
        b(i % args.batch),
        label(args.labels[b * args.label_stride]),
        counts(label != args.ignore_index),
        labelled(counts && label != kUnlabelled),
        s(static_cast<const In*>(head.s) + b * head.stride_s),
        t(static_cast<const In*>(head.t) + b * head.stride_t),
        stats(static_cast<Arithmetic<In>*>(args.row_stats) + i * kRowStats) {}
};

// ---- Forward: the sums of a row ----
// Sums over (a part of) a row, of its x_s and x_t:
//     tau_s = sum 2^x_s    one_s = sum 2^(tau x_s)    cross = sum 2^x_t (x_t - x_s)
// and tau_t, one_t of the teacher. A row is read once: rebase() scales them for another maximum.
// The unit of the maxima and of cross is that of x on CUDA, where x = z * scale - max is a single
// multiply-add, and that of z on the CPU. Any number near the largest logit will do for max_*.
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

// From the sums of a whole row to what is kept; x_s and x_t are those of its label, if it has one.
// With p = 2^x_t / tau_t and q likewise, kl is sum p (log p - log q).
template <class A, class To>
MHKD_HD void finish_row(
    const RowSums<A>& sums, A x_s, A x_t, A tau, bool labelled, bool marked, To* stats) {
  const A ln2 = A(kLn2);
  const A kl = sums.cross / sums.tau_t * ln2 + std::log(sums.tau_s / sums.tau_t);
  const A ce = labelled ? std::log(sums.one_s) - tau * x_s * ln2 : A(0);
  const A ce_teacher = marked ? std::log(sums.one_t) - tau * x_t * ln2 : A(0);
  const A kept[kRowStats] = {sums.max_s, sums.max_t, 1 / sums.tau_s, 1 / sums.tau_t,
      1 / sums.one_s, marked ? 1 / sums.one_t : A(0), kl * tau * tau, ce, ce_teacher};
  for (int i = 0; i < kRowStats; ++i) stats[i] = static_cast<To>(kept[i]);
}

// ---- Backward: the gradients of a row ----
// With e = 2^x of the side whose gradient it is and e_t of the teacher:
//     tau * e - tau_t * e_t + one * e^tau,  minus label at the label
template <class A>
struct Coefficients {
  A max, tau, tau_t, one, label;
};

template <class Z>
struct GradRow {
  const Z* z;
  Z* grad;
  Coefficients<Arithmetic<Z>> c;
};

// What of it is there: the student's whole gradient, the teacher's too (they share exponentials),
// or a cross-entropy alone, of either side, for which nothing of the other is read.
enum Part { kStudent, kBoth, kAlone, kParts };

// Calls run(row of this side, row of the teacher, a Part as a type) for the gradients of a row, and
// zero() for those that are 0 whatever the logits are. The divergence is detached from the teacher.
// The gradient that comes in is in the coefficients: half types are rounded after it.
template <class In, class Zero, class Run>
MHKD_HD void for_gradients(
    const Arguments& args, const Row<In>& row, const Zero& zero, const Run& run) {
  using A = Arithmetic<In>;
  const Head& head = row.head;
  const A weight_kl = head.weights[kKl].as<A>(), weight_ce = head.weights[kCe].as<A>();
  const bool kl = weight_kl != 0, ce = row.labelled && weight_ce != 0;
  In *grad_s = static_cast<In*>(head.grad_s), *grad_t = static_cast<In*>(head.grad_t);
  if (grad_s) grad_s += row.b * head.stride_grad_s;
  if (grad_t) grad_t += row.b * head.stride_grad_t;
  if (grad_s && !(row.counts && (kl || ce))) {
    zero(grad_s);
    grad_s = nullptr;
  }
  if (grad_t && !row.labelled) {
    zero(grad_t);
    grad_t = nullptr;
  }
  const A* stats = row.stats;
  const A* one_over = static_cast<const A*>(args.row_stats) + args.rows() * kRowStats;
  const A incoming = *static_cast<const A*>(args.grad_loss);
  const A of_kl = incoming * one_over[kCounted] * weight_kl * args.tau.as<A>();
  const A of_teacher = incoming * one_over[kLabelled], of_ce = ce ? of_teacher * weight_ce : A(0);
  const GradRow<In> s{row.s, grad_s,
      {stats[kMaxS], of_kl * stats[kInvTauS], of_kl * stats[kInvTauT],
          ce ? of_ce * stats[kInvOneS] : A(0), of_ce}};
  const GradRow<In> t{
      row.t, grad_t, {stats[kMaxT], 0, 0, of_teacher * stats[kInvOneT], of_teacher}};
  if (kl && grad_s && grad_t) return run(s, t, std::integral_constant<Part, kBoth>());
  if (kl && grad_s) run(s, t, std::integral_constant<Part, kStudent>());
  if (!kl && grad_s) run(s, s, std::integral_constant<Part, kAlone>());
  if (grad_t) run(t, t, std::integral_constant<Part, kAlone>());
}

// ---- The operators, in mhkd_loss.cpp: all but the numbers themselves ----
struct Call {
  TensorList student, teacher;
  const Tensor& labels;
  Numbers numbers;    // tau, kl_weights [H], ce_weights [H]
  TensorList traced;  // the same as scalar tensors, or empty
  const Flags& teacher_ce;
  int64_t ignore_index;

  template <class Function>
  void each(const Function& function) const {
    for (const TensorList& logits : {student, teacher}) {
      for (const Tensor& z : logits) function(z);
    }
  }
  double number(size_t i) const { return traced.empty() ? numbers[i] : traced[i].item<double>(); }
};
using Outputs = std::tuple<Tensor, Tensor, Tensor>;  // loss, terms, row_stats

// How a device computes a call whose logits are of this dtype; nullptr: shapes and dtypes alone.
using Run = void(Arguments& args, at::ScalarType logits, bool backward);

Outputs loss(const Call& call, Run* run);
std::vector<Tensor> loss_backward(const Call& call, const Tensor& grad_loss,
    const Tensor& row_stats, c10::SymIntArrayRef grad_strides, Run* run);

// Functions of a Call as the dispatcher calls them, argument by argument.
template <auto function, auto... more>
Outputs flat(TensorList student, TensorList teacher, const Tensor& labels, Numbers numbers,
    TensorList traced, const Flags& teacher_ce, int64_t ignore_index) {
  return function({student, teacher, labels, numbers, traced, teacher_ce, ignore_index}, more...);
}

template <auto function, auto... more>
std::vector<Tensor> flat_backward(const Tensor& grad_loss, TensorList student, TensorList teacher,
    const Tensor& labels, const Tensor& row_stats, Numbers numbers, TensorList traced,
    const Flags& teacher_ce, int64_t ignore_index, c10::SymIntArrayRef grad_strides) {
  const Call call{student, teacher, labels, numbers, traced, teacher_ce, ignore_index};
  return function(call, grad_loss, row_stats, grad_strides, more...);
}

}  // namespace MHKD_LIBRARY
