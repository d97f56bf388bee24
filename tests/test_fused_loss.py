"""The fused loss against the plain PyTorch one, which is its specification."""

import importlib.util
import itertools
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension

import mhkd


@dataclass
class Kernel:
    name: str
    device: str
    loss: Callable  # as mhkd.mhkd_loss, by this kernel

    def __repr__(self):  # what hypothesis prints
        return self.name


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """mhkd_loss_cuda.cu, compiled as C++ against cuda_emulation.h and registered as torch.ops.mhkd_emulated."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulation")
    standard = "c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10) else "c++17"
    flags = [f"-std={standard}", "-O1", "-fPIC", "-w", "-DMHKD_LIBRARY=mhkd_emulated", "-DMHKD_CUDA_KEY=CPU"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    emulation = ["-x", "c++", "-include", ROOT / "tests" / "cuda_emulation.h"]
    jobs = [
        subprocess.Popen([*compiler, *flags, *extra, "-c", ROOT / "csrc" / source, "-o", folder / f"{source}.o"])
        for source, extra in [("mhkd_loss.cpp", []), ("mhkd_loss_cuda.cu", emulation)]
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    library = folder / "mhkd_emulated.so"
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    subprocess.run([*compiler, "-shared", *folder.glob("*.o"), *libraries, "-o", library], check=True)
    torch.ops.load_library(library)
    return torch.ops.mhkd_emulated


def _emulated_loss(
    student,
    teacher,
    labels,
    *,
    tau=4.0,
    alpha=0.9,
    beta=0.5,
    head_weights=None,
    teacher_ce=None,
    ignore_index=-100,
    return_terms=False,
):
    if head_weights is None:
        head_weights = [1.0] + [beta] * (len(student) - 1)
    if teacher_ce is None:
        teacher_ce = [z.requires_grad for z in teacher]
    loss, terms, _ = torch.ops.mhkd_emulated.loss(
        student, teacher, labels, tau, alpha, head_weights, teacher_ce, ignore_index
    )
    return (loss, terms) if return_terms else loss


@pytest.fixture(scope="session", params=["cpu", "cuda", "emulated"])
def kernel(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_library")
        return Kernel("emulated", "cpu", _emulated_loss)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = mhkd.loss_backend()
    if backend.startswith("reference") or (request.param == "cuda" and "CUDA" not in backend):
        pytest.skip(backend)
    return Kernel(request.param, request.param, lambda *args, **kw: mhkd.mhkd_loss(*args, backend="fused", **kw))


INF, NAN = math.inf, math.nan
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What may change the strides of logits without changing their values.
LAYOUTS = {
    "contiguous": lambda z: z,
    "rows apart, any alignment": lambda z: F.pad(z, (1, 2))[:, 1 : z.shape[1] + 1],
    "every other row": lambda z: z.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda z: z.t().contiguous().t(),
}


def reference(*args, **kw):
    return mhkd.mhkd_loss(*args, backend="reference", **kw)


def make_heads(count, batch, classes, *, device="cpu", dtype=torch.float32, scale=3.0, seed=0):
    """Student heads, teacher heads and labels; all logits ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    z = [torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale for _ in range(2 * count)]
    z = [logits.to(device, dtype).requires_grad_() for logits in z]
    labels = torch.randint(classes, (batch,), generator=generator)
    return z[:count], z[count:], labels.to(device)


def evaluate(loss, student, teacher, labels, *, dtype=None, layout=LAYOUTS["contiguous"], **kw):
    """The loss, its terms and the gradients of all logits, with the logits converted to ``dtype``."""
    leaves = [z.detach().to(dtype or z.dtype).clone().requires_grad_(z.requires_grad) for z in (*student, *teacher)]
    z = [layout(leaf) for leaf in leaves]
    value, terms = loss(z[: len(student)], z[len(student) :], labels, return_terms=True, **kw)
    if value.requires_grad:
        value.backward()
    return [value.detach(), terms, *(torch.zeros_like(z) if z.grad is None else z.grad for z in leaves)]


def assert_within_error_of_reference(results, references, exact):
    """The issue's criterion: twice the reference's error plus 8 units of rounding; float64 to 1e-12."""
    for result, ref, truth in zip(results, references, exact, strict=True):
        assert result.dtype == ref.dtype and result.shape == ref.shape
        result, ref, eps = result.double(), ref.double(), torch.finfo(ref.dtype).eps
        finite = truth.isfinite() & ref.isfinite()
        assert torch.equal(result[~finite].nan_to_num(7.0), ref[~finite].nan_to_num(7.0))  # the same NaN, inf, -inf
        if not finite.any():
            continue
        error = (result - truth)[finite].abs().max()
        largest = truth[finite].abs().max()
        if ref.dtype == truth.dtype and eps < 1e-12:
            assert error <= 1e-12 * max(1.0, largest)  # a small divergence is a difference of larger numbers
        else:
            assert error <= 2 * (ref - truth)[finite].abs().max() + 8 * eps * largest


def assert_equal(results, others):
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# Values and gradients
# --------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """Logits of any sensible shape, dtype, stride and size, and the settings of the loss."""
    count, batch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # around the lengths where the kernels change their ways, and anything short
    edges = [64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 4099]
    classes = draw(st.one_of(st.integers(1, 200), st.sampled_from(edges)))
    dtype = draw(st.sampled_from(DTYPES))
    student, teacher, labels = make_heads(
        count,
        batch,
        classes,
        dtype=dtype,
        scale=draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4])),
        seed=draw(st.integers(0, 2**16)),
    )
    if draw(st.booleans()):  # another dtype for the teacher
        other = draw(st.sampled_from(DTYPES))
        teacher = [z.detach().to(other).requires_grad_() for z in teacher]
    if draw(st.booleans()):  # the student as the teacher is
        student = [z.detach().to(dtype).requires_grad_() for z in teacher]
    if draw(st.booleans()):
        labels[draw(st.integers(0, batch - 1))] = -100
    if draw(st.booleans()) and classes > 2:  # classes masked for both
        first = draw(st.integers(0, classes - 1))
        for z in (*student, *teacher):
            z.data[:, first::3] = -INF
    return (
        student,
        teacher,
        labels,
        {
            "tau": draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.3, 20.0])),
            "alpha": draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
            "head_weights": [draw(st.sampled_from([1.0, 0.5, 0.0])) for _ in range(count)],
            "teacher_ce": [draw(st.booleans()) for _ in range(count)],
        },
        draw(st.sampled_from(sorted(LAYOUTS))),
    )


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_loss_terms_and_gradients_are_as_accurate_as_the_reference(kernel, call):
    student, teacher, labels, kw, layout = call
    student, teacher = [z.to(kernel.device) for z in student], [z.to(kernel.device) for z in teacher]
    student, teacher = ([z.detach().requires_grad_() for z in side] for side in (student, teacher))
    labels = labels.to(kernel.device)
    result = evaluate(kernel.loss, student, teacher, labels, layout=LAYOUTS[layout], **kw)
    ref = evaluate(reference, student, teacher, labels, **kw)
    exact = evaluate(reference, student, teacher, labels, dtype=torch.float64, **kw)
    assert_within_error_of_reference(result, ref, exact)


@pytest.mark.parametrize("classes", [1, 64, 65, 257, 1024, 1025, 9001, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_regime_of_row_length_agrees_with_the_reference(kernel, classes, dtype):
    student, teacher, labels = make_heads(2, 3, classes, device=kernel.device, dtype=dtype)
    result = evaluate(kernel.loss, student, teacher, labels)
    ref = evaluate(reference, student, teacher, labels)
    assert_within_error_of_reference(result, ref, evaluate(reference, student, teacher, labels, dtype=torch.float64))


def test_a_row_of_a_quarter_million_classes_agrees_with_the_reference(kernel):
    student, teacher, labels = make_heads(1, 2, 256 * 1024, device=kernel.device)
    result = evaluate(kernel.loss, student, teacher, labels)
    ref = evaluate(reference, student, teacher, labels)
    assert_within_error_of_reference(result, ref, evaluate(reference, student, teacher, labels, dtype=torch.float64))


@pytest.mark.parametrize("tau", [1.0, 4.0, 2.5])
@pytest.mark.parametrize("classes", [5, 40])
def test_student_gradients_pass_gradcheck(kernel, tau, classes):
    student, teacher, labels = make_heads(2, 3, classes, device=kernel.device, dtype=torch.float64, scale=1.0)
    labels[1] = -100
    teacher = [z.detach() for z in teacher]
    assert torch.autograd.gradcheck(lambda *z: kernel.loss(z, teacher, labels, tau=tau), student)


def test_teacher_gradients_are_those_of_its_cross_entropy_alone(kernel):
    student, teacher, labels = make_heads(3, 4, 50, device=kernel.device, dtype=torch.float64)
    kernel.loss(student, teacher, labels, teacher_ce=[False, True, True]).backward()
    assert teacher[0].grad is None
    for z in teacher[1:]:
        (expected,) = torch.autograd.grad(F.cross_entropy(z, labels), z)
        torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)


def test_gradients_are_computed_only_for_logits_that_ask_for_them(kernel):
    student, teacher, labels = make_heads(3, 4, 50, device=kernel.device)
    expected = evaluate(kernel.loss, student, teacher, labels)[2:]
    wanted = [True, False, True, False, True, True]
    leaves = [z.detach().requires_grad_(want) for z, want in zip(student + teacher, wanted, strict=True)]
    kernel.loss(leaves[:3], leaves[3:], labels, teacher_ce=[True] * 3).backward()
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, gradient)


def test_sixteen_heads_are_one_call(kernel):
    student, teacher, labels = make_heads(16, 2, 11, device=kernel.device, dtype=torch.float64)
    torch.testing.assert_close(
        evaluate(kernel.loss, student, teacher, labels), evaluate(reference, student, teacher, labels)
    )


# --------------------------------------------------------------------------------------------------
# Rows and classes that do not count; numbers that are none
# --------------------------------------------------------------------------------------------------

ROWS = {  # student, teacher: a row of six classes with label 1, continued to fill longer ones
    "a class masked for the student alone": ([0.5, 1.0, -INF, 2.0], [0.1, 0.2, 0.3, 0.4]),
    "a class masked for the teacher alone": ([0.5, 1.0, 1.5, 2.0], [0.1, 0.2, -INF, 0.4]),
    "a class masked for both": ([0.5, 1.0, -INF, 2.0], [0.1, 0.2, -INF, 0.4]),
    "the label masked for the student": ([0.5, -INF, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4]),
    "the label masked for both": ([0.5, -INF, 1.5, 2.0], [0.1, -INF, 0.3, 0.4]),
    "all classes masked for the student": ([-INF] * 4, [0.1, 0.2, 0.3, 0.4]),
    "all classes masked for the teacher": ([0.5, 1.0, 1.5, 2.0], [-INF] * 4),
    "masked with the lowest number": ([-3e38, 1.0, 0.5, 2.0], [-3e38, 0.1, 0.2, 0.3]),
    "a teacher probability that underflows": ([0.5, 1.0, 1.5, 2.0], [9e4, 0.2, 0.3, 0.4]),
    "a class masked for the student where the teacher's underflows": ([0.5, 1.0, -INF, 2.0], [0.1, 0.2, -1e3, 0.4]),
    "NaN in the student": ([0.5, 1.0, NAN, 2.0], [0.1, 0.2, 0.3, 0.4]),
    "NaN in the teacher": ([0.5, 1.0, 1.5, 2.0], [0.1, 0.2, NAN, 0.4]),
    "+inf in the student": ([0.5, INF, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4]),
    "+inf in the teacher": ([0.5, 1.0, 1.5, 2.0], [0.1, INF, 0.3, 0.4]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("classes", [4, 100, 1100])
def test_infinite_and_nan_logits_give_what_the_reference_gives(kernel, name, classes):
    rows = [torch.tensor(row).repeat(classes // 4) for row in ROWS[name]]
    plain_s, plain_t, _ = make_heads(1, 2, classes, scale=1.0)
    (z_s,), (z_t,) = (
        [torch.cat([row[None], z[0].detach()]).to(kernel.device).requires_grad_()]
        for row, z in zip(rows, (plain_s, plain_t), strict=True)
    )
    labels = torch.tensor([1, 0, 2], device=kernel.device)
    for alpha in (0.0, 0.9, 1.0):
        torch.testing.assert_close(
            evaluate(kernel.loss, [z_s], [z_t], labels, alpha=alpha),
            evaluate(reference, [z_s], [z_t], labels, alpha=alpha),
            equal_nan=True,
        )


def test_a_student_that_begins_masked_is_not_nan(kernel):
    """The first classes that a thread sees are all -inf: its running maximum has nothing to stand on yet."""
    student, teacher, labels = make_heads(1, 2, 5000, device=kernel.device, dtype=torch.float64)
    for z in (student[0], teacher[0]):
        z.data[:, :4900] = -INF
    labels.fill_(4950)
    result = evaluate(kernel.loss, student, teacher, labels)
    assert all(tensor.isfinite().all() for tensor in result)
    torch.testing.assert_close(result, evaluate(reference, student, teacher, labels))


@pytest.mark.parametrize("classes", [10, 100, 1100])
def test_ignored_rows_count_nowhere_even_if_they_hold_nan(kernel, classes):
    student, teacher, labels = make_heads(2, 4, classes, device=kernel.device)
    expected = evaluate(kernel.loss, [z[1:] for z in student], [z[1:] for z in teacher], labels[1:])
    for z in (*student, *teacher):
        z.data[0] = NAN
    labels[0] = 255
    result = evaluate(kernel.loss, student, teacher, labels, ignore_index=255)
    assert_equal(result[:2], expected[:2])
    for gradient, other in zip(result[2:], expected[2:], strict=True):
        assert torch.equal(gradient[1:], other) and not gradient[0].any()


@pytest.mark.parametrize("batch", [0, 3])
def test_no_row_that_counts_gives_nan_and_zero_gradients(kernel, batch):
    student, teacher, labels = make_heads(2, batch, 7, device=kernel.device)
    for loss in (kernel.loss, reference):
        value, terms, *gradients = evaluate(loss, student, teacher, labels.fill_(-100))
        assert value.isnan() and terms.isnan().all()
        assert all(gradient.shape == (batch, 7) and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("alpha, weights", [(0.0, [1.0, 1.0]), (1.0, [1.0, 0.5]), (0.5, [0.0, 1.0]), (0.5, [0.0, 0.0])])
def test_a_coefficient_of_zero_wins_over_an_infinite_term(kernel, alpha, weights):
    student, teacher, labels = make_heads(2, 3, 40, device=kernel.device)
    student[0].data[0, 5] = -INF if alpha else 0.0
    teacher[0].data[0, 6] = NAN
    labels[0] = 5
    kw = {"alpha": alpha, "head_weights": weights, "teacher_ce": [False, False]}
    torch.testing.assert_close(
        evaluate(kernel.loss, student, teacher, labels, **kw),
        evaluate(reference, student, teacher, labels, **kw),
        equal_nan=True,
    )


def test_equal_logits_have_a_divergence_of_exactly_zero(kernel):
    student, _, labels = make_heads(2, 4, 1000, device=kernel.device)
    terms = evaluate(kernel.loss, student, student, labels)[1]
    assert terms[:, 0].tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# Autograd
# --------------------------------------------------------------------------------------------------


def test_backward_runs_twice_and_gives_the_same_bits(kernel):
    student, teacher, labels = make_heads(2, 4, 100, device=kernel.device)
    loss = kernel.loss(student, teacher, labels)
    first = torch.autograd.grad(loss, student + teacher, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, student + teacher), first)


def test_two_calls_give_the_same_bits(kernel):
    student, teacher, labels = make_heads(3, 5, 1500, device=kernel.device)
    assert_equal(evaluate(kernel.loss, student, teacher, labels), evaluate(kernel.loss, student, teacher, labels))


def test_gradients_accumulate(kernel):
    student, teacher, labels = make_heads(2, 4, 100, device=kernel.device)
    once = evaluate(kernel.loss, student, teacher, labels)[2:]
    for _ in range(2):
        kernel.loss(student, teacher, labels).backward()
    assert_equal([z.grad for z in student + teacher], [2 * gradient for gradient in once])


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_loss_scale_reaches_half_precision_gradients_before_they_are_rounded(kernel, classes):
    student, teacher, labels = make_heads(1, 64, classes, device=kernel.device, dtype=torch.float16)
    teacher = [(student[0].detach() + 1e-2 * teacher[0].detach()).requires_grad_()]  # small gradients
    (kernel.loss(student, teacher, labels) * 2.0**14).backward()
    exact = evaluate(reference, student, teacher, labels, dtype=torch.float64)[2] * 2.0**14
    torch.testing.assert_close(student[0].grad.double(), exact, rtol=1e-3, atol=1e-6)


def test_a_second_derivative_names_the_reference_backend(kernel):
    student, teacher, labels = make_heads(1, 2, 5, device=kernel.device)
    (gradient,) = torch.autograd.grad(kernel.loss(student, teacher, labels), student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.sum().backward()


def test_half_precision_logits_of_autocast_give_a_float32_loss(kernel):
    student, teacher, labels = make_heads(1, 6, 12, device=kernel.device)
    weight = torch.eye(12, device=kernel.device, requires_grad=True)
    with torch.autocast(kernel.device, dtype=torch.bfloat16):
        logits = F.linear(student[0], weight)
        loss = kernel.loss([logits], teacher, labels)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_without_gradients_nothing_is_recorded(kernel):
    student, teacher, labels = make_heads(1, 2, 5, device=kernel.device)
    with torch.no_grad():
        assert kernel.loss(student, teacher, labels).grad_fn is None
    loss, terms = kernel.loss(student, teacher, labels, return_terms=True)
    assert loss.requires_grad and not terms.requires_grad


# --------------------------------------------------------------------------------------------------
# The operator in PyTorch
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def operator(kernel):
    if kernel.name == "emulated":
        pytest.skip("the emulated library shares its schema, Meta and Autograd with the real one")
    return torch.ops.mhkd.loss.default


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 7), (torch.bfloat16, 100)], ids=str)
def test_opcheck_passes(operator, kernel, dtype, classes):
    student, teacher, labels = make_heads(2, 3, classes, device=kernel.device, dtype=dtype)
    arguments = (student, teacher, labels, 4.0, 0.9, [1.0, 0.5], [False, True], -100)
    torch.library.opcheck(operator, arguments)
    _, _, row_stats = operator(*arguments)
    student, teacher = [z.detach() for z in student], [z.detach() for z in teacher]
    grad = torch.ones((), device=kernel.device)
    torch.library.opcheck(
        torch.ops.mhkd.loss_backward.default,
        (grad, student, teacher, labels, row_stats, *arguments[3:], [True, False, False, True]),
    )


def test_torch_compile_sees_one_operator(operator, kernel):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    student, teacher, labels = make_heads(2, 3, 40, device=kernel.device)
    compiled = torch.compile(lambda s, t, y: kernel.loss(s, t, y), fullgraph=True, backend=backend)
    compiled(student, teacher, labels).backward()
    assert [name for name in seen if "getitem" not in name] == ["mhkd.loss.default"]


def test_torch_compile_of_a_fresh_process_finds_the_kernel(operator, kernel):
    done = run_python(
        "import torch, mhkd\n"
        f"z, y = [torch.zeros(2, 4, device='{kernel.device}', requires_grad=True)], torch.ones(2, dtype=torch.int64)\n"
        "step = torch.compile(mhkd.mhkd_loss, fullgraph=True, backend='aot_eager')\n"
        f"print(step(z, z, y.to('{kernel.device}')).grad_fn is not None, hasattr(torch.ops.mhkd, 'loss'))\n"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_torch_compile_gives_the_same_bits(operator, kernel):
    torch._dynamo.reset()
    compiled = torch.compile(kernel.loss, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):  # the second shape is dynamic
        student, teacher, labels = make_heads(2, batch, 40, device=kernel.device)
        assert_equal(evaluate(compiled, student, teacher, labels), evaluate(kernel.loss, student, teacher, labels))


def test_meta_tensors_give_shapes_and_dtypes():
    if not mhkd.loss_backend().startswith("fused"):
        pytest.skip("the fused kernel is not installed")
    student, teacher, labels = make_heads(2, 3, 40, device="meta", dtype=torch.float16)
    loss, terms = mhkd.mhkd_loss(student, teacher, labels, backend="fused", return_terms=True)
    loss.backward()
    assert (loss.shape, loss.dtype, terms.shape, terms.dtype) == ((), torch.float32, (2, 3), torch.float32)
    assert student[1].grad.shape == (3, 40) and student[1].grad.dtype == torch.float16


# --------------------------------------------------------------------------------------------------
# Wrong input
# --------------------------------------------------------------------------------------------------


def with_heads(change):
    """A call with two heads of which something has been changed."""

    def arguments(device):
        call = dict(
            zip(("student_logits", "teacher_logits", "labels"), make_heads(2, 3, 5, device=device), strict=True)
        )
        change(call)
        return call

    return arguments


WRONG = {
    "no heads": (ValueError, lambda c: c.update(student_logits=[], teacher_logits=[], head_weights=[])),
    "fewer teacher heads": (ValueError, lambda c: c["teacher_logits"].pop()),
    "too few weights": (ValueError, lambda c: c.update(head_weights=[1.0])),
    "too many marks": (ValueError, lambda c: c.update(teacher_ce=[True] * 3)),
    "another number of classes": (ValueError, lambda c: c["student_logits"].__setitem__(1, torch.zeros(3, 6))),
    "another batch": (ValueError, lambda c: c["teacher_logits"].__setitem__(1, torch.zeros(2, 5))),
    "labels of another batch": (ValueError, lambda c: c.update(labels=torch.zeros(2, dtype=torch.int64))),
    "two-dimensional labels": (ValueError, lambda c: c.update(labels=torch.zeros(3, 5, dtype=torch.int64))),
    "no classes": (
        ValueError,
        lambda c: c.update(student_logits=[torch.zeros(3, 0)], teacher_logits=[torch.zeros(3, 0)]),
    ),
    "one-dimensional logits": (ValueError, lambda c: c["student_logits"].__setitem__(0, torch.zeros(3))),
    "tau of 0": (ValueError, lambda c: c.update(tau=0.0)),
    "tau that is NaN": (ValueError, lambda c: c.update(tau=NAN)),
    "alpha above 1": (ValueError, lambda c: c.update(alpha=1.5)),
    "a negative weight": (ValueError, lambda c: c.update(head_weights=[1.0, -1.0])),
    "labels of 32 bits": (TypeError, lambda c: c.update(labels=c["labels"].int())),
    "labels that are floating point": (TypeError, lambda c: c.update(labels=c["labels"].float())),
    "integer logits": (TypeError, lambda c: c["teacher_logits"].__setitem__(0, torch.zeros(3, 5, dtype=torch.int64))),
    "a teacher on another device": (
        RuntimeError,
        lambda c: c["teacher_logits"].__setitem__(0, torch.zeros(3, 5, device="meta")),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_by_both_backends_alike(kernel, name):
    error, change = WRONG[name]
    for loss in (kernel.loss, reference):
        call = with_heads(change)(kernel.device)
        if kernel.device != "cpu" and name != "a teacher on another device":

            def move(z):
                return z.to(kernel.device)

            call = {
                k: [move(z) for z in v] if "logits" in k else move(v) if k == "labels" else v for k, v in call.items()
            }
        with pytest.raises(error, match="mhkd_loss"):
            loss(call.pop("student_logits"), call.pop("teacher_logits"), call.pop("labels"), **call)


def test_more_heads_than_the_kernel_takes_are_refused_and_left_to_the_reference(kernel):
    student, teacher, labels = make_heads(17, 2, 5, device=kernel.device)
    with pytest.raises(ValueError, match="1 to 16 heads"):
        kernel.loss(student, teacher, labels)
    assert mhkd.mhkd_loss(student, teacher, labels, backend="auto").isfinite()


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class_is_an_error(kernel, label):
    if kernel.name == "cuda":  # the assertion ends the use of the GPU: another process
        code = (
            "import torch, mhkd; z = torch.zeros(1, 5, device='cuda'); "
            f"mhkd.mhkd_loss([z], [z], torch.tensor([{label}], device='cuda'), backend='fused').item()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "assert" in done.stderr
        return
    student, teacher, labels = make_heads(1, 3, 5)
    labels[1] = label
    message = "out of bounds" if kernel.name == "emulated" else f"Target {label} is out of bounds"
    with pytest.raises(IndexError, match=message):
        kernel.loss(student, teacher, labels)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        mhkd.mhkd_loss(*make_heads(1, 2, 5), backend="fastest")


# --------------------------------------------------------------------------------------------------
# Where the kernel comes from
# --------------------------------------------------------------------------------------------------


def run_python(code, **environment):
    path = os.pathsep.join([str(Path(mhkd.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_without_the_kernel_auto_is_plain_pytorch_and_fused_says_what_is_missing():
    done = run_python(
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "import torch, mhkd\n"
        "z, y = [torch.zeros(2, 4)], torch.tensor([1, 2])\n"
        "print(mhkd.loss_backend(), mhkd.mhkd_loss(z, z, y).item())\n"
        "mhkd.mhkd_loss(z, z, y, backend='fused')\n"
    )
    assert done.stdout.startswith("reference (fused kernel not installed) 0.138")
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: mhkd_loss: the fused kernel is not installed")


def test_two_copies_of_the_script_share_one_kernel(tmp_path):
    copy = tmp_path / "copied_mhkd.py"
    copy.write_text(Path(mhkd.__file__).read_text())
    spec = importlib.util.spec_from_file_location("copied_mhkd", copy)
    copied = importlib.util.module_from_spec(spec)
    sys.modules["copied_mhkd"] = copied
    spec.loader.exec_module(copied)
    assert copied.loss_backend() == mhkd.loss_backend()
    call = make_heads(1, 2, 5)
    assert torch.equal(copied.mhkd_loss(*call), mhkd.mhkd_loss(*call))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_of_this_processor_agrees_with_the_reference(capability):
    """The code is chosen at run time, as PyTorch's is: ATEN_CPU_CAPABILITY lowers the choice."""
    backend = run_python("import mhkd; print(mhkd.loss_backend())", ATEN_CPU_CAPABILITY=capability).stdout
    if f"CPU {capability.replace('default', 'plain')}" not in backend:
        pytest.skip(f"{capability} is not available: {backend.strip()}")
    if backend.strip() == mhkd.loss_backend():
        pytest.skip(f"{capability} is what all tests here run with")
    names = "every_regime or infinite_and_nan"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", f"({names}) and cpu"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("classes", [100, 3000])
def test_the_number_of_threads_does_not_change_a_bit(classes):
    if not mhkd.loss_backend().startswith("fused"):
        pytest.skip("the fused kernel is not installed")
    student, teacher, labels = make_heads(3, 40, classes)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(evaluate(mhkd.mhkd_loss, student, teacher, labels, backend="fused"))
    torch.set_num_threads(threads)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


# --------------------------------------------------------------------------------------------------
# CUDA alone
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available() or "CUDA" not in mhkd.loss_backend():
        pytest.skip("no CUDA device, or no CUDA kernel")
    return "cuda"


def test_a_cuda_graph_replays_the_loss_and_its_gradients(cuda):
    student, teacher, labels = make_heads(2, 8, 3000, device=cuda)
    leaves = [*student, *(z.detach() for z in teacher)]

    def step():
        loss = mhkd.mhkd_loss(leaves[:2], leaves[2:], labels, backend="fused")
        return [loss, *torch.autograd.grad(loss, leaves[:2])]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for seed in (1, 2):
        new_student, new_teacher, new_labels = make_heads(2, 8, 3000, device=cuda, seed=seed)
        with torch.no_grad():
            for leaf, new in zip(leaves, new_student + new_teacher, strict=True):
                leaf.copy_(new)
            labels.copy_(new_labels)
        graph.replay()
        assert_equal([z.detach() for z in recorded], [z.detach() for z in step()])


def test_forward_and_backward_are_one_launch_each(cuda):
    student, teacher, labels = make_heads(4, 8, 3000, device=cuda)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mhkd.mhkd_loss(student, teacher, labels, backend="fused").backward()
        torch.cuda.synchronize()
    ours = [event.name for event in profile.events() if "mhkd" in event.name and "kernel" in event.name]
    assert len(ours) == 2, ours


def test_streams_run_side_by_side(cuda):
    calls = [make_heads(2, 16, 5000, device=cuda, seed=seed) for seed in range(4)]
    expected = [evaluate(mhkd.mhkd_loss, *call, backend="fused") for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _, (index, call) in itertools.product(range(5), enumerate(calls)):
        with torch.cuda.stream(streams[index]):
            result = evaluate(mhkd.mhkd_loss, *call, backend="fused")
        streams[index].synchronize()
        assert_equal(result, expected[index])
