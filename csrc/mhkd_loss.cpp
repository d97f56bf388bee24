// The fused loss of multi-head knowledge distillation: schema, checks, Meta and Autograd.
//
//     sum_h (kl_h tau^2 KL(p_T || p_S) + ce_h CE(y, z_S)) + sum_{h marked} CE(y, z_T)
//
// with kl_h = w_h alpha and ce_h = w_h (1 - alpha) in the paper (equations 1 and 2).
//
// Plain PyTorch runs about twenty operations a head, nearly each with a temporary as large as the
// logits. Here one operator reads the logits of all heads where they lie:
//
//     forward   reads each logit of student and teacher once           2 B K bytes(z)  a head
//     backward  reads them once more and writes each gradient once     3 B K bytes(z)  a head
//
// The backward computes the probabilities again from six numbers a row, which is cheaper than to
// write and read them. Where tau is 1, 2 or 4 (on CUDA: 4) one exponential a logit is enough, as
// exp(x) = exp(x / tau)^tau. The gradient that comes in multiplies before anything is rounded to a
// half type. No state is kept between calls, so the backward can run again, with the same bits.
//
// A file per device: mhkd_loss_cpu.cpp, mhkd_loss_cuda.cu; mhkd_loss.h is their shared arithmetic.
// All is registered in C++: from Python that alone costs more than the loss of a small batch. The
// folder can be built alone, without or with the .cu file, as docs/methods.md shows.
#include "mhkd_loss.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <type_traits>

#define MHKD_STRING_(x) #x
#define MHKD_STRING(x) MHKD_STRING_(x)
#define MHKD_OPERATOR(name) MHKD_STRING(MHKD_LIBRARY) "::" name
#define MHKD_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)  // expands the name first

namespace MHKD_LIBRARY {

constexpr int64_t kInterface = 6;

// ---- Checks and shapes ----
// What the memory that the kernels touch depends on. mhkd.py has a sentence for each mistake.
static void check_arguments(const Call& call) {
  const Tensor &labels = call.labels, &first = call.student[0];
  const size_t heads = call.student.size();
  TORCH_CHECK_VALUE(heads >= 1 && heads <= size_t(kMaxHeads) && call.teacher.size() == heads &&
                        call.teacher_ce.size() == heads && call.numbers.size() == 2 * heads + 1 &&
                        (call.traced.empty() || call.traced.size() == 2 * heads + 1),
      "mhkd_loss: 1 to ", kMaxHeads, " heads, as many of each list");
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.dim() == 1,
      "mhkd_loss: labels must be int64 [B], got ", labels.sym_sizes());
  call.each([&](const Tensor& z) {
    const auto dtype = z.scalar_type();
    const bool floating = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
                          dtype == at::kBFloat16;
    TORCH_CHECK_VALUE(floating && z.device() == labels.device() && z.dim() == 2 &&
                          z.sym_size(0) == labels.sym_size(0) && z.sym_size(1) >= 1 &&
                          z.sym_size(1) == first.sym_size(1),
        "mhkd_loss: logits must be floating point [B, K] on the labels' device: ", dtype, " ",
        z.sym_sizes(), " on ", z.device(), ", labels ", labels.sym_sizes());
  });
}

// One number for each row's statistics, then those of RowCount.
static c10::SymInt stats_size(const Call& call) {
  return call.labels.sym_size(0) * int64_t(call.student.size() * kRowStats) + int64_t(kRowCounts);
}

// float64 if any logits are, else float32: the dtype of loss, terms and the rows' statistics.
static at::ScalarType loss_dtype(const Call& call) {
  at::ScalarType dtype = at::kFloat;
  call.each([&](const Tensor& z) { dtype = z.scalar_type() == at::kDouble ? at::kDouble : dtype; });
  return dtype;
}

static void check_backward(const Call& call, const Tensor& grad_loss, const Tensor& row_stats,
    c10::SymIntArrayRef grad_strides) {
  check_arguments(call);
  const size_t heads = call.student.size();
  bool good = grad_strides.size() == 2 * heads;
  for (size_t i = 0; good && i < 2 * heads; ++i) {
    const bool has_gradient = i < heads || call.teacher_ce[i - heads];
    const c10::SymInt& stride = grad_strides[i];
    good = stride == 0 || (has_gradient && stride >= call.student[0].sym_size(1));
  }
  TORCH_CHECK_VALUE(good && grad_loss.sym_numel() == 1 && row_stats.is_contiguous() &&
                        row_stats.device() == call.labels.device() &&
                        row_stats.scalar_type() == loss_dtype(call) &&
                        row_stats.sym_numel() == stats_size(call),
      "mhkd_loss: the backward takes grad_loss [], row_stats of the forward, grad_strides [2 H], "
      "which are K or more, or 0, as for a teacher's head that is not marked");
}

// Without the dispatcher on the CPU: its way to the allocator is long beside a short batch.
static Tensor empty(const Tensor& labels, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
    at::ScalarType dtype) {
  if (!labels.is_cpu()) {
    return at::empty_strided_symint(sizes, strides, labels.options().dtype(dtype));
  }
  return Tensor(at::detail::empty_strided_cpu(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), dtype));
}

// The logits as a device reads them: of one dtype, the classes of a row adjacent. Rows may have any
// stride. What is otherwise (mixed dtypes, transposed logits) is copied.
struct Prepared {
  c10::DeviceGuard guard;
  at::ScalarType result, dtype;  // of loss, terms and statistics; of the logits
  std::vector<Tensor> logits;    // the student's heads, then the teacher's
  Arguments args{};

  explicit Prepared(const Call& call)
      : guard(call.labels.device()),
        result(loss_dtype(call)),
        dtype(call.student[0].scalar_type()) {
    const int64_t heads = int64_t(call.student.size()), classes = call.student[0].size(1);
    constexpr int64_t most = int64_t(1) << 30;  // classes are counted in int
    TORCH_CHECK_VALUE(classes <= most, "mhkd_loss: at most ", most, " classes, got ", classes);
    logits.reserve(2 * heads);
    call.each([&](const Tensor& z) {
      if (z.scalar_type() != dtype) dtype = result;
    });
    call.each([&](const Tensor& z) {  // to() may transpose rows that overlap
      const Tensor same = z.scalar_type() == dtype ? z : z.to(dtype);
      logits.push_back(same.stride(1) == 1 || classes == 1 ? same : same.contiguous());
    });
    for (int64_t h = 0; h < heads; ++h) {
      const Tensor &s = logits[h], &t = logits[heads + h];
      args.heads[h] = {s.const_data_ptr(), t.const_data_ptr(), nullptr, nullptr, s.stride(0),
          t.stride(0), 0, 0,
          {{call.number(1 + h)}, {call.number(1 + heads + h)}, {double(call.teacher_ce[h])}}};
    }
    args.labels = call.labels.const_data_ptr<int64_t>();
    args.label_stride = call.labels.stride(0);
    args.ignore_index = call.ignore_index;
    args.batch = call.labels.size(0);
    args.classes = int(classes);
    args.head_count = int(heads);
    args.tau = {call.number(0)};
    args.unit = {scale(args.tau.exact)};
  }
};

Outputs loss(const Call& call, Run* run) {
  check_arguments(call);
  const auto heads = int64_t(call.student.size());
  const auto make = [&](c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
    return empty(call.labels, sizes, strides, loss_dtype(call));
  };
  const Outputs out(
      make({}, {}), make({heads, kTerms}, {kTerms, 1}), make({stats_size(call)}, {1}));
  if (run == nullptr) return out;
  Prepared ready(call);
  ready.args.loss = std::get<0>(out).mutable_data_ptr();
  ready.args.terms = std::get<1>(out).mutable_data_ptr();
  ready.args.row_stats = std::get<2>(out).mutable_data_ptr();
  run(ready.args, ready.dtype, /*backward=*/false);
  return out;
}

std::vector<Tensor> loss_backward(const Call& call, const Tensor& grad_loss,
    const Tensor& row_stats, c10::SymIntArrayRef grad_strides, Run* run) {
  check_backward(call, grad_loss, row_stats, grad_strides);
  const size_t heads = call.student.size();
  std::vector<Tensor> grads, computed;
  grads.reserve(2 * heads);
  for (size_t i = 0; i < 2 * heads; ++i) {
    if (grad_strides[i] == 0) continue;
    const Tensor& z = i < heads ? call.student[i] : call.teacher[i - heads];
    grads.push_back(empty(call.labels, z.sym_sizes(), {grad_strides[i], 1}, z.scalar_type()));
  }
  if (run == nullptr || grads.empty() || call.labels.numel() == 0) return grads;
  Prepared ready(call);
  Arguments& args = ready.args;
  // A tensor on the CPU can scale a loss on a GPU.
  const Tensor incoming = grad_loss.to(call.labels.device(), ready.result);
  args.grad_loss = incoming.const_data_ptr();
  args.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  for (size_t i = 0; i < 2 * heads; ++i) {
    if (grad_strides[i] == 0) continue;
    const Tensor& grad = grads[computed.size()];
    const bool same = grad.scalar_type() == ready.dtype;
    computed.push_back(
        same ? grad : empty(call.labels, grad.sym_sizes(), grad.sym_strides(), ready.dtype));
    Head& head = args.heads[i % heads];
    (i < heads ? head.grad_s : head.grad_t) = computed.back().mutable_data_ptr();
    (i < heads ? head.stride_grad_s : head.stride_grad_t) = grad.stride(0);
  }
  run(args, ready.dtype, /*backward=*/true);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].is_same(computed[i])) grads[i].copy_(computed[i]);
  }
  return grads;
}

// ---- Autograd ----
template <class Signature>
static auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What holds a node of the graph: std::shared_ptr, in newer PyTorch c10::intrusive_ptr.
using NodePointer = decltype(Edge::function);

template <class N, class Pointer = NodePointer, class... Args>
static Pointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(new N(std::forward<Args>(args)...),
        [](N* node) { deleteNode(node); });  // PyTorch's own: it does not recurse through the graph
  } else {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
}

// The row stride of a gradient: that of logits which are a part of somewhat longer rows (a padded
// vocabulary). CUDA reads and writes 16 bytes at a time where both are aligned alike.
static c10::SymInt grad_stride(const Tensor& z) {
  const c10::SymInt classes = z.sym_size(1), stride = z.sym_stride(0);
  const bool padded = z.sym_stride(1) == 1 && stride > classes && stride <= classes + classes / 8;
  return padded ? stride : classes;
}

static std::string refusal(const char* what) {
  return std::string("mhkd_loss: the fused kernel has no ") + what +
         "; call mhkd_loss with backend=\"reference\"";
}

// A tensor for the backward, which raises an error if it has been overwritten since. One of
// inference mode (a teacher's logits) has no version to tell that, so it is copied.
static SavedVariable saved(const Tensor& z) {
  return SavedVariable(z.is_inference() ? z.clone() : z, /*is_output=*/false);
}

// The node of the graph. torch::autograd::Function would keep the settings as boxed values and wrap
// its outputs for every case there is, which costs more than the loss of a small batch.
struct MhkdLossBackward : Node {
  std::vector<SavedVariable> logits;  // of the student's heads, then of the teacher's
  SavedVariable labels, row_stats;
  std::vector<double> numbers;
  std::vector<Tensor> traced;
  Flags teacher_ce;
  int64_t ignore_index;

  MhkdLossBackward(const Call& call, const Tensor& stats)
      : Node(torch::autograd::collect_next_edges(call.student, call.teacher)),
        labels(saved(call.labels)),
        row_stats(saved(stats)),
        numbers(call.numbers.vec()),
        traced(call.traced.vec()),
        teacher_ce(call.teacher_ce),
        ignore_index(call.ignore_index) {
    logits.reserve(2 * call.student.size());
    call.each([&](const Tensor& z) { logits.push_back(saved(z)); });
  }

  variable_list apply(variable_list&& grad_outputs) override {
    using Backward = decltype(flat_backward<loss_backward, nullptr>);
    static const auto backward = find_operator<Backward>(MHKD_OPERATOR("loss_backward"));
    const size_t heads = logits.size() / 2;
    variable_list result(2 * heads);
    if (!grad_outputs[0].defined()) return result;
    const std::lock_guard<std::mutex> lock(mutex_);  // backward() may run in several threads
    const Tensor stats = row_stats.unpack();  // raises if they have been released
    std::vector<Tensor> z;
    z.reserve(2 * heads);
    for (const SavedVariable& kept : logits) z.push_back(kept.unpack());
    std::vector<c10::SymInt> grad_strides;  // a teacher's head has a gradient if it is marked
    grad_strides.reserve(2 * heads);
    for (size_t i = 0; i < 2 * heads; ++i) {
      const bool wanted = task_should_compute_output(i) && (i < heads || teacher_ce[i - heads]);
      grad_strides.push_back(wanted ? grad_stride(z[i]) : c10::SymInt(0));
    }
    const TensorList all(z);
    std::vector<Tensor> grads;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      grads = backward.call(grad_outputs[0], all.slice(0, heads), all.slice(heads, heads),
          labels.unpack(), stats, numbers, traced, teacher_ce, ignore_index, grad_strides);
    }
    if (at::GradMode::is_enabled()) {  // create_graph=True: to differentiate them is refused
      const NodePointer refuses = make_node<torch::autograd::Error>(
          refusal("second derivative"), torch::autograd::collect_next_edges(grad_outputs[0], all));
      for (Tensor& grad : grads) torch::autograd::set_history(grad, refuses);
    }
    for (size_t i = 0, next = 0; i < 2 * heads; ++i) {
      if (grad_strides[i] != 0) result[i] = std::move(grads[next++]);
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& kept : logits) kept.reset_data();
    labels.reset_data();
    row_stats.reset_data();
  }

  // Without `override`: in PyTorch 2.6, whose own message then appears, the function is not const.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const {
    TORCH_CHECK_NOT_IMPLEMENTED(false, refusal("compiled autograd"));
  }

  std::string name() const override { return "MhkdLossBackward"; }
};

// vmap, grad and jvp of torch.func call this before anything else. They would need their own rules.
static void refuse_functorch(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, refusal("rule for torch.func"));
}

static Outputs loss_autograd(const Call& call) {
  call.each([](const Tensor& z) {
    const bool dual = z._fw_grad(/*level=*/0).defined();
    TORCH_CHECK_NOT_IMPLEMENTED(!dual, refusal("forward-mode derivative"));
  });
  static const auto forward = find_operator<decltype(flat<loss, nullptr>)>(MHKD_OPERATOR("loss"));
  Outputs out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = forward.call(call.student, call.teacher, call.labels, call.numbers, call.traced,
        call.teacher_ce, call.ignore_index);
  }
  if (!torch::autograd::compute_requires_grad(call.student, call.teacher)) return out;
  torch::autograd::set_history(
      std::get<0>(out), NodePointer(make_node<MhkdLossBackward>(call, std::get<2>(out))));
  return out;
}

// ---- Registration ----
MHKD_TORCH_LIBRARY(MHKD_LIBRARY, m) {
  // numbers: tau, kl_weights [H], ce_weights [H]. traced: empty, or scalar tensors in their place:
  // torch.compile would compile again for every number that it has not seen.
  // terms [H, 3]: KL * tau^2, CE(y, z_S), CE(y, z_T) of each head, without a gradient. row_stats is
  // for the backward.
  m.def("loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor labels, float[] numbers, "
        "Tensor[] traced, bool[] teacher_ce, int ignore_index=-100) -> "
        "(Tensor loss, Tensor terms, Tensor row_stats)");
  // grad_strides [2 H]: row strides of the student's gradients, then of the teacher's; 0: none.
  m.def("loss_backward(Tensor grad_loss, Tensor[] student_logits, Tensor[] teacher_logits, "
        "Tensor labels, Tensor row_stats, float[] numbers, Tensor[] traced, bool[] teacher_ce, "
        "int ignore_index, SymInt[] grad_strides) -> Tensor[]");
  // mhkd.py takes a library of this number alone: raise it with every change of what it relies on.
  m.def("interface() -> int", [] { return kInterface; });
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, Meta, m) {
  m.impl("loss", flat<loss, nullptr>);
  m.impl("loss_backward", flat_backward<loss_backward, nullptr>);
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("loss", torch::CppFunction::makeFromBoxedFunction<&refuse_functorch>());
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, Autograd, m) { m.impl("loss", flat<loss_autograd>); }

}  // namespace MHKD_LIBRARY
