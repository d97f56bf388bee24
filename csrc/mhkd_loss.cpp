// The fused loss of multi-head knowledge distillation: schema, checks, Meta and Autograd.
//
//     sum_h (kl_h tau^2 KL(p_T || p_S) + ce_h CE(y, z_S)) + sum_{h marked} CE(y, z_T)
//
// with kl_h = w_h alpha and ce_h = w_h (1 - alpha) in the paper (equations 1 and 2).
//
// Plain PyTorch runs about twenty small operations a head forward and backward, nearly each with a
// temporary of the size of the logits. Here one operator reads the logits of all heads where they
// lie:
//
//     forward   reads each logit of student and teacher once           2 B K bytes(z)  a head
//     backward  reads them once more and writes each gradient once     3 B K bytes(z)  a head
//
// (4 B K where the teacher's own cross-entropy asks for its gradient too). The probabilities are
// never stored: the backward computes the exponentials again from six numbers a row, which is
// cheaper than to write and read them. Where tau is 1, 2 or 4 (on CUDA: 4) one exponential a logit
// is enough, as exp(x) = exp(x / tau)^tau. The memory beyond the inputs is the gradients. The
// gradient that comes in multiplies before anything is rounded to a half type. Nothing saved is
// written to and no state is kept between calls, so the backward can run again, and two runs give
// the same bits.
//
// A file per device: mhkd_loss_cpu.cpp, mhkd_loss_cuda.cu. Their shared arithmetic stands in
// mhkd_loss.h. All is registered in C++: from Python the registration alone would cost more than
// the loss of a small batch. The folder can be built alone, without or with the .cu file:
//
//     torch.utils.cpp_extension.load("fused_loss", glob.glob("csrc/*.c*"), is_python_module=False)
#include "mhkd_loss.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
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

constexpr int64_t kInterface = 5;

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
  for (const TensorList& logits : {call.student, call.teacher}) {
    for (const Tensor& z : logits) {
      const auto dtype = z.scalar_type();
      const bool floating = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
                            dtype == at::kBFloat16;
      TORCH_CHECK_VALUE(floating && z.device() == labels.device() && z.dim() == 2 &&
                            z.sym_size(0) == labels.sym_size(0) && z.sym_size(1) >= 1 &&
                            z.sym_size(1) == first.sym_size(1),
          "mhkd_loss: logits must be floating point [B, K] on the labels' device: ", dtype, " ",
          z.sym_sizes(), " on ", z.device(), ", labels ", labels.sym_sizes());
    }
  }
}

// One number for each row's statistics, then those of RowCount.
static c10::SymInt stats_size(const Call& call) {
  return call.labels.sym_size(0) * int64_t(call.student.size() * kRowStats) + int64_t(kRowCounts);
}

// float64 if any logits are, else float32: the dtype of the loss, the terms, the rows' statistics.
static at::ScalarType loss_dtype(const Call& call) {
  for (const TensorList& logits : {call.student, call.teacher}) {
    for (const Tensor& z : logits) {
      if (z.scalar_type() == at::kDouble) return at::kDouble;
    }
  }
  return at::kFloat;
}

static void check_backward(const Call& call, const Tensor& grad_loss, const Tensor& row_stats,
    const Flags& needs_grad) {
  check_arguments(call);
  const size_t heads = call.student.size();
  bool gradients = needs_grad.size() == 2 * heads;  // of a teacher's head only if it is marked
  for (size_t h = 0; gradients && h < heads; ++h) {
    gradients = call.teacher_ce[h] || !needs_grad[heads + h];
  }
  TORCH_CHECK_VALUE(gradients && grad_loss.sym_numel() == 1 && row_stats.is_contiguous() &&
                        row_stats.device() == call.labels.device() &&
                        row_stats.scalar_type() == loss_dtype(call) &&
                        row_stats.sym_numel() == stats_size(call),
      "mhkd_loss: the backward takes grad_loss [], row_stats of the forward, 2 H needs_grad, true "
      "for marked teacher heads alone");
}

// Without the dispatcher on the CPU: its way to the allocator is long beside a short batch.
static Tensor empty(const Tensor& labels, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (labels.is_cpu()) return Tensor(at::detail::empty_cpu(sizes, dtype));
  return at::empty(sizes, labels.options().dtype(dtype));
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
    for (const TensorList& side : {call.student, call.teacher}) {
      for (const Tensor& z : side) {
        logits.push_back(z.stride(1) == 1 || classes == 1 ? z : z.contiguous());
        if (z.scalar_type() != dtype) dtype = result;
      }
    }
    for (Tensor& z : logits) {
      if (z.scalar_type() != dtype) z = z.to(dtype);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Tensor &s = logits[h], &t = logits[heads + h];
      const double marked = call.teacher_ce[h];
      args.heads[h] = {s.const_data_ptr(), t.const_data_ptr(), nullptr, nullptr, s.stride(0),
          t.stride(0), {call.number(1 + h), call.number(1 + heads + h), marked}};
    }
    args.labels = call.labels.const_data_ptr<int64_t>();
    args.label_stride = call.labels.stride(0);
    args.ignore_index = call.ignore_index;
    args.batch = call.labels.size(0);
    args.classes = int(classes);
    args.head_count = int(heads);
    args.tau = call.number(0);
  }
};

Outputs loss(const Call& call, Run* run) {
  check_arguments(call);
  Prepared ready(call);
  Arguments& args = ready.args;
  Tensor loss = empty(call.labels, {}, ready.result);
  Tensor terms = empty(call.labels, {args.head_count, kTerms}, ready.result);
  Tensor row_stats = empty(call.labels, {args.rows() * kRowStats + kRowCounts}, ready.result);
  args.loss = loss.mutable_data_ptr();
  args.terms = terms.mutable_data_ptr();
  args.row_stats = row_stats.mutable_data_ptr();
  run(args, ready.dtype, /*backward=*/false);
  return {loss, terms, row_stats};
}

std::vector<Tensor> loss_backward(const Call& call, const Tensor& grad_loss,
    const Tensor& row_stats, const Flags& needs_grad, Run* run) {
  check_backward(call, grad_loss, row_stats, needs_grad);
  Prepared ready(call);
  Arguments& args = ready.args;
  // A tensor on the CPU can scale a loss on a GPU.
  const Tensor incoming = grad_loss.to(call.labels.device(), ready.result);
  args.grad_loss = incoming.const_data_ptr();
  args.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  std::vector<Tensor> grads;
  const int heads = args.head_count;
  grads.reserve(2 * heads);
  for (int i = 0; i < 2 * heads; ++i) {
    if (!needs_grad[i]) continue;
    grads.push_back(empty(call.labels, {args.batch, args.classes}, ready.dtype));
    (i < heads ? args.heads[i].grad_s : args.heads[i - heads].grad_t) =
        grads.back().mutable_data_ptr();
  }
  if (!grads.empty() && args.batch > 0) run(args, ready.dtype, /*backward=*/true);
  for (int i = 0, next = 0; i < 2 * heads; ++i) {
    if (!needs_grad[i]) continue;
    const auto dtype = (i < heads ? call.student[i] : call.teacher[i - heads]).scalar_type();
    Tensor& grad = grads[next++];
    if (dtype != ready.dtype) grad = grad.to(dtype);
  }
  return grads;
}

// Shapes and dtypes alone, for torch.compile.

static Outputs loss_meta(const Call& call) {
  check_arguments(call);
  const auto options = call.labels.options().dtype(loss_dtype(call));
  return {at::empty({}, options), at::empty({int64_t(call.student.size()), kTerms}, options),
      at::empty_symint({stats_size(call)}, options)};
}

static std::vector<Tensor> loss_backward_meta(const Call& call, const Tensor& grad_loss,
    const Tensor& row_stats, const Flags& needs_grad) {
  check_backward(call, grad_loss, row_stats, needs_grad);
  std::vector<Tensor> grads;
  for (size_t i = 0, heads = call.student.size(); i < 2 * heads; ++i) {
    const Tensor& z = i < heads ? call.student[i] : call.teacher[i - heads];
    if (needs_grad[i]) grads.push_back(at::empty_symint(z.sym_sizes(), z.options()));
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

static std::string refusal(const char* what) {
  return std::string("mhkd_loss: the fused kernel has no ") + what +
         "; call mhkd_loss with backend=\"reference\"";
}

// A tensor for the backward. One made in inference mode, as a teacher's logits may be, has no version
// and cannot be a SavedVariable.
class Kept {
  SavedVariable saved;
  Tensor inference;

 public:
  explicit Kept(const Tensor& z) {
    if (z.is_inference()) {
      inference = z;
    } else {
      saved = SavedVariable(z, /*is_output=*/false);
    }
  }
  Tensor unpack() const { return inference.defined() ? inference : saved.unpack(); }
  void release() {
    inference.reset();
    saved.reset_data();
  }
};

// The node of the graph, written by hand: torch::autograd::Function would keep the settings in a
// dictionary of boxed values and wrap its outputs for every case there is, which costs more than
// the loss of a small batch.
struct MhkdLossBackward : Node {
  std::vector<Kept> logits;  // of the student's heads, then of the teacher's
  Kept labels, row_stats;
  std::vector<double> numbers;
  std::vector<Tensor> traced;
  Flags teacher_ce;
  int64_t ignore_index;

  MhkdLossBackward(const Call& call, const Tensor& stats)
      : Node(torch::autograd::collect_next_edges(call.student, call.teacher)),
        labels(call.labels),
        row_stats(stats),
        numbers(call.numbers.vec()),
        traced(call.traced.vec()),
        teacher_ce(call.teacher_ce),
        ignore_index(call.ignore_index) {
    logits.reserve(2 * call.student.size());
    for (const TensorList& side : {call.student, call.teacher}) {
      for (const Tensor& z : side) logits.emplace_back(z);
    }
  }

  variable_list apply(variable_list&& grad_outputs) override {
    static const auto backward =
        find_operator<decltype(flat_backward<loss_backward_meta>)>(MHKD_OPERATOR("loss_backward"));
    const size_t heads = logits.size() / 2;
    variable_list result(2 * heads);
    if (!grad_outputs[0].defined()) return result;
    const std::lock_guard<std::mutex> lock(mutex_);  // backward() may run in several threads
    const Tensor stats = row_stats.unpack();  // raises if they have been released
    std::vector<Tensor> z;
    z.reserve(2 * heads);
    for (const Kept& kept : logits) z.push_back(kept.unpack());
    Flags needs_grad;  // the divergence sends the teacher no gradient: only a marked head has one
    needs_grad.reserve(2 * heads);
    for (size_t i = 0; i < 2 * heads; ++i) {
      needs_grad.push_back(task_should_compute_output(i) && (i < heads || teacher_ce[i - heads]));
    }
    const TensorList all(z);
    std::vector<Tensor> grads;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      grads = backward.call(grad_outputs[0], all.slice(0, heads), all.slice(heads, heads),
          labels.unpack(), stats, numbers, traced, teacher_ce, ignore_index, needs_grad);
    }
    if (at::GradMode::is_enabled()) {  // create_graph=True: to differentiate them is refused
      const NodePointer refuses = make_node<torch::autograd::Error>(
          refusal("second derivative"), torch::autograd::collect_next_edges(grad_outputs[0], all));
      for (Tensor& grad : grads) torch::autograd::set_history(grad, refuses);
    }
    for (size_t i = 0, next = 0; i < 2 * heads; ++i) {
      if (needs_grad[i]) result[i] = std::move(grads[next++]);
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Kept& kept : logits) kept.release();
    labels.release();
    row_stats.release();
  }

  // Compiled autograd would call apply() with tensors of its own. PyTorch 2.6 asks the second.
  using Args = torch::dynamo::autograd::CompiledNodeArgs;
  void compiled_args(Args&) const { TORCH_CHECK_NOT_IMPLEMENTED(false, refusal(kCompiled)); }
  void compiled_args(Args&) { TORCH_CHECK_NOT_IMPLEMENTED(false, refusal(kCompiled)); }
  static constexpr char kCompiled[] = "compiled autograd";

  std::string name() const override { return "MhkdLossBackward"; }
};

// vmap, grad and jvp of torch.func call this before anything else. They would need their own rules.
static void refuse_functorch(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, refusal("rule for torch.func"));
}

static Outputs loss_autograd(const Call& call) {
  for (const TensorList& side : {call.student, call.teacher}) {
    for (const Tensor& z : side) {
      const bool dual = z._fw_grad(/*level=*/0).defined();
      TORCH_CHECK_NOT_IMPLEMENTED(!dual, refusal("forward-mode derivative"));
    }
  }
  static const auto forward = find_operator<decltype(flat<loss_meta>)>(MHKD_OPERATOR("loss"));
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
  // numbers: tau, the kl_weights of the heads, their ce_weights. traced: empty, or scalar tensors in
  // place of them: torch.compile compiles again for every number that it has not seen.
  // terms [H, 3]: KL * tau^2, CE(y, z_S), CE(y, z_T) of each head, without a gradient. row_stats is
  // for the backward.
  m.def("loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor labels, float[] numbers, "
        "Tensor[] traced, bool[] teacher_ce, int ignore_index=-100) -> "
        "(Tensor loss, Tensor terms, Tensor row_stats)");
  // needs_grad: a bool for each student head, then for each teacher head; as many gradients come
  // back as are true.
  m.def("loss_backward(Tensor grad_loss, Tensor[] student_logits, Tensor[] teacher_logits, "
        "Tensor labels, Tensor row_stats, float[] numbers, Tensor[] traced, bool[] teacher_ce, "
        "int ignore_index, bool[] needs_grad) -> Tensor[]");
  // mhkd.py takes a library of this number alone: raise it with every change of what it relies on.
  m.def("interface() -> int", [] { return kInterface; });
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, Meta, m) {
  m.impl("loss", flat<loss_meta>);
  m.impl("loss_backward", flat_backward<loss_backward_meta>);
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("loss", torch::CppFunction::makeFromBoxedFunction<&refuse_functorch>());
}

TORCH_LIBRARY_IMPL(MHKD_LIBRARY, Autograd, m) { m.impl("loss", flat<loss_autograd>); }

}  // namespace MHKD_LIBRARY
