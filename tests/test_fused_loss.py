"""The fused loss against the plain PyTorch one, which is its specification."""

import gc
import importlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import weakref
from collections import Counter, namedtuple
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from conftest import ROOT, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.utils import cpp_extension

import mhkd
import mhkd_fused

# Kernel.loss: as mhkd.mhkd_loss, by this kernel.
Kernel = namedtuple("Kernel", ["name", "device", "loss"])
CSRC = ROOT / "csrc"
INF, NAN = math.inf, math.nan
BFLOAT16_MIN = torch.finfo(torch.bfloat16).min
OF_TEACHER = "mhkd_loss: the teacher's final logits"  # all logits here require gradients
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """mhkd_loss_cuda.cu, compiled as C++ against cuda_emulation.h: torch.ops.mhkd_emulated.loss."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or no csrc")
    folder = tmp_path_factory.mktemp("emulation")
    new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    flags = [f"-std={'c++20' if new else 'c++17'}", "-O1", "-fPIC", "-w"]
    flags += ["-DMHKD_LIBRARY=mhkd_emulated"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    emulation = ["-x", "c++", "-include", ROOT / "tests" / "cuda_emulation.h"]
    sources = [("mhkd_loss.cpp", []), ("mhkd_loss_cuda.cu", emulation)]
    jobs = [
        subprocess.Popen([*compiler, *flags, *extra, "-c", CSRC / name, "-o", folder / f"{name}.o"])
        for name, extra in sources
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    library = folder / "mhkd_emulated.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    command = [*compiler, "-shared", *folder.glob("*.o"), *libraries, "-o", library]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return torch.ops.mhkd_emulated.loss.default


def with_operator(operator):
    """mhkd_loss by this operator."""

    def loss(*args, **kw):
        with patch.multiple(mhkd_fused, _loaded=True, operator=operator):
            return mhkd.mhkd_loss(*args, backend="fused", **kw)

    return loss


@pytest.fixture(scope="session", params=["cpu", "cuda", "emulated"])
def kernel(request):
    if request.param == "emulated":
        return Kernel("emulated", "cpu", with_operator(request.getfixturevalue("emulated")))
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = mhkd.loss_backend()
    if backend.startswith("reference") or (request.param == "cuda" and "CUDA" not in backend):
        pytest.skip(backend)
    return Kernel(request.param, request.param, with_operator(mhkd_fused.operator))


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
    z = torch.randn(2 * count, batch, classes, generator=generator, dtype=torch.float64) * scale
    z = [logits.clone().to(device, dtype).requires_grad_() for logits in z]
    labels = torch.randint(classes, (batch,), generator=generator)
    return z[:count], z[count:], labels.to(device)


def evaluate(loss, student, teacher, labels, *, dtype=None, layout=LAYOUTS["contiguous"], **kw):
    """The loss, its terms and the gradients of all logits, converted to ``dtype`` before."""
    leaves = [z.detach().to(dtype or z.dtype).clone() for z in (*student, *teacher)]
    leaves = [z.requires_grad_(old.requires_grad) for z, old in zip(leaves, (*student, *teacher))]
    z = [layout(leaf) for leaf in leaves]
    value, terms = loss(z[: len(student)], z[len(student) :], labels, return_terms=True, **kw)
    if value.requires_grad:
        value.backward()
    gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves]
    return [value.detach(), terms, *gradients]


def spread(z):
    """Of each row, the largest minus the smallest finite logit."""
    z = z.detach().double()
    finite = z.isfinite()
    low = torch.where(finite, z, INF).amin(1)
    return (torch.where(finite, z, -INF).amax(1) - low).clamp(min=0).nan_to_num()


def assert_accurate(
    loss, student, teacher, labels, *, tau=4.0, alpha=0.9, head_weights=None, teacher_ce=None,
    layout=LAYOUTS["contiguous"],
):  # fmt: skip
    """Against float64 mathematics, each output to 16 roundings of the numbers it is made of."""
    head_weights = head_weights or [1.0] + [0.5] * (len(student) - 1)
    teacher_ce = teacher_ce or [True] * len(student)
    kw = {"tau": tau, "alpha": alpha, "head_weights": head_weights, "teacher_ce": teacher_ce}
    results = evaluate(loss, student, teacher, labels, layout=layout, **kw)
    exact = evaluate(reference, student, teacher, labels, dtype=torch.float64, **kw)
    counted = labels != -100
    labelled = counted & (labels != mhkd.UNLABELLED)
    log_k, terms, total = math.log(student[0].shape[1]), [], 0.0
    for z_s, z_t, weight, marked in zip(student, teacher, head_weights, teacher_ce):
        width = torch.maximum(spread(z_s), spread(z_t))[counted]
        sizes = tau**2 * (1 + width / tau + log_k) + (width + log_k)
        terms.append(sizes.mean().item() if len(sizes) else 1.0)
        total += (weight + marked) * terms[-1]
    N = max(1, int(labelled.sum()))  # the smaller number: larger gradients
    gradients = [w * (alpha * tau + 1 - alpha) / N for w in head_weights]
    gradients += [marked / N for marked in teacher_ce]
    sizes = [torch.tensor(total), torch.tensor(terms)[:, None], *map(torch.tensor, gradients)]
    for result, truth, size in zip(results, exact, sizes, strict=True):
        rounding = torch.finfo(result.dtype).eps
        factor = 16 * 32 if result.dtype == torch.float64 else 16  # the yardstick rounds, too
        allowed = (factor * rounding * size).double().to(truth.device)
        result = result.double()
        finite = truth.isfinite()
        assert torch.equal(result[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0))
        error = (result - truth).abs()
        assert (error <= allowed)[finite].all(), (error[finite].max(), allowed)


def assert_equal(results, others):
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)


# Values and gradients


@st.composite
def calls(draw):
    """Logits of any sensible shape, dtype, stride and size, and the settings of the loss."""
    count, batch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # around the lengths where the kernels change their ways, and anything short
    edges = [64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 4099]
    classes = draw(st.one_of(st.integers(1, 200), st.sampled_from(edges)))
    scale = draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4]))
    seed, dtype = draw(st.integers(0, 2**16)), draw(st.sampled_from(DTYPES))
    student, teacher, labels = make_heads(
        count, batch, classes, dtype=dtype, scale=scale, seed=seed
    )
    if draw(st.booleans()):  # another dtype for the teacher
        other = draw(st.sampled_from(DTYPES))
        teacher = [z.detach().to(other).requires_grad_() for z in teacher]
    if draw(st.booleans()):  # the student as the teacher is
        student = [z.detach().to(dtype).requires_grad_() for z in teacher]
    if draw(st.booleans()):  # far from 0
        for z in (*student, *teacher):
            z.data += 300
    for label in (-100, mhkd.UNLABELLED):
        if draw(st.booleans()):
            labels[draw(st.integers(0, batch - 1))] = label
    if draw(st.booleans()) and classes > 2:  # classes masked for both
        first = draw(st.integers(0, classes - 1))
        for z in (*student, *teacher):
            z.data[:, first::3] = -INF
    kw = {
        "tau": draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.3, 20.0])),
        "alpha": draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        "head_weights": [draw(st.sampled_from([1.0, 0.5, 0.0])) for _ in range(count)],
        "teacher_ce": [draw(st.booleans()) for _ in range(count)],
        "layout": LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))],
    }
    return student, teacher, labels, kw


NO_HEALTH_CHECK = list(HealthCheck)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=NO_HEALTH_CHECK)
@given(calls())
def test_loss_terms_and_gradients_are_accurate(kernel, call):
    student, teacher, labels, kw = call
    student, teacher = (
        [z.detach().to(kernel.device).requires_grad_() for z in side] for side in (student, teacher)
    )
    assert_accurate(kernel.loss, student, teacher, labels.to(kernel.device), **kw)


def test_each_heads_terms_have_coefficients_of_their_own(kernel):
    call = make_heads(3, 5, 40, device=kernel.device)
    kw = {"kl_weights": [0.0, 2.0, 0.5], "ce_weights": [1.0, 0.0, 3.0], "teacher_ce": [True] * 3}
    found = evaluate(kernel.loss, *call, **kw)
    for x, y in zip(found, evaluate(reference, *call, dtype=torch.float64, **kw)):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 64, 257, 1024, 1025, 9001, 20001, 256 * 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_regime_of_row_length_is_accurate(kernel, classes, dtype):
    heads = make_heads(2, 3, classes, device=kernel.device, dtype=dtype)
    assert_accurate(kernel.loss, *heads, teacher_ce=[False, True])


@pytest.mark.parametrize("classes", [900, 5000])
@pytest.mark.parametrize("low", [-50.0, -300.0, -1e20, -1e30, BFLOAT16_MIN, -INF])
def test_rows_that_begin_with_low_logits_are_accurate(kernel, classes, low):
    """What a thread sees first is no measure of what comes."""
    student, teacher, labels = make_heads(2, 3, classes, device=kernel.device)
    for z in (*student, *teacher):
        z.data[:2, : classes // 2] += low
        z.data[2, : classes - 50] += low
    labels[:] = classes - 7
    for tau in (1.0, 4.0):
        assert_accurate(kernel.loss, student, teacher, labels, tau=tau)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_gradients_are_computed_only_for_logits_that_ask_for_them(kernel, alpha):
    student, teacher, labels = make_heads(3, 4, 50, device=kernel.device)
    kernel.loss(student, teacher, labels, teacher_ce=[False] * 3, alpha=alpha).backward()
    assert all(z.grad is None for z in teacher)  # not even zeros where a head is not marked
    expected = evaluate(kernel.loss, student, teacher, labels, alpha=alpha)[2:]
    wanted = [True, False, True, False, True, True]
    leaves = [z.detach().requires_grad_(want) for z, want in zip(student + teacher, wanted)]
    loss = kernel.loss(leaves[:3], leaves[3:], labels, teacher_ce=[True] * 3, alpha=alpha)
    loss.backward()
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, gradient)
    loss, terms = kernel.loss(student, teacher, labels, return_terms=True)
    assert loss.requires_grad and not terms.requires_grad
    with torch.no_grad():
        assert kernel.loss(student, teacher, labels).grad_fn is None


def test_sixteen_heads_are_one_call_and_more_are_refused_or_left_to_the_reference(kernel):
    heads = make_heads(16, 2, 11, device=kernel.device, dtype=torch.float64)
    torch.testing.assert_close(evaluate(kernel.loss, *heads), evaluate(reference, *heads))
    more = make_heads(17, 2, 5, device=kernel.device)
    with pytest.raises(ValueError, match="1 to 16 heads"):
        kernel.loss(*more)
    assert mhkd.mhkd_loss(*more, backend="auto").isfinite()


def test_any_leading_dimensions_are_rows(kernel):
    student, teacher, labels = make_heads(2, 6, 40, device=kernel.device)
    expected = evaluate(kernel.loss, student, teacher, labels)
    for lead in ((2, 3), (1, 6, 1), (3, 2)):
        deep = [[z.view(*lead, 40) for z in side] for side in (student, teacher)]
        value = kernel.loss(*deep, labels.view(lead))
        gradients = torch.autograd.grad(value, student + teacher)
        assert_equal([value.detach(), *gradients], [expected[0], *expected[2:]])
    first, _, _ = make_heads(1, 1, 40, device=kernel.device)
    single = kernel.loss([first[0][0]], [first[0][0]], labels[0])  # [K] with a label
    assert torch.equal(single, kernel.loss(first, first, labels[:1]))


@pytest.mark.parametrize("of_student", LAYOUTS)
@pytest.mark.parametrize("of_teacher", LAYOUTS)
def test_student_and_teacher_in_different_layouts_are_accurate(kernel, of_student, of_teacher):
    for dtype, classes in ((torch.float32, 70), (torch.bfloat16, 1100)):
        student, teacher, labels = make_heads(2, 3, classes, device=kernel.device, dtype=dtype)
        names = iter([of_student] * 2 + [of_teacher] * 2)  # a layout is asked for each head

        def layout(z, names=names):
            return LAYOUTS[next(names)](z)

        assert_accurate(kernel.loss, student, teacher, labels, layout=layout)


def test_labels_may_have_any_stride(kernel):
    student, teacher, labels = make_heads(2, 5, 40, device=kernel.device)
    expected = evaluate(kernel.loss, student, teacher, labels)
    apart = labels.repeat_interleave(3)[::3]
    assert apart.stride() == (3,)
    between = apart.as_strided((4, 2), (3, 1), apart.storage_offset() + 1)
    between.copy_((labels[:4, None] + 1) % 40)  # other labels
    assert_equal(evaluate(kernel.loss, student, teacher, apart), expected)
    same = labels[:1].expand(5)
    assert_equal(
        evaluate(kernel.loss, student, teacher, same),
        evaluate(kernel.loss, student, teacher, same.contiguous()),
    )


def test_more_than_2_to_the_31_elements_are_addressed(installed):
    """Forward and backward; of the logits one row is stored."""
    classes = 2**20
    rows = 2**11 + 1
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * 2**30:
        pytest.skip("the gradient takes 4 GiB")
    (z_s,), (z_t,), _ = make_heads(1, 1, classes, dtype=torch.bfloat16)
    labels = torch.full((rows,), -100)
    labels[-1] = 7
    student = z_s.detach().expand(rows, classes).requires_grad_()
    found = mhkd.mhkd_loss([student], [z_t.detach().expand(rows, -1)], labels, backend="fused")
    (gradient,) = torch.autograd.grad(found, student)
    one = mhkd.mhkd_loss([z_s], [z_t.detach()], labels[-1:], backend="fused")
    (expected,) = torch.autograd.grad(one, z_s)
    assert found.item() == one.item()
    assert torch.equal(gradient[-1:], expected) and not gradient[:-1:512].any()


def test_rows_far_apart_are_addressed(kernel):
    """Rows that begin more than 2^31 elements apart, in memory that is never touched between."""
    if kernel.device != "cpu":
        pytest.skip("a GPU has no memory that is only reserved")
    (z_s,), (z_t,), labels = make_heads(1, 3, 50, dtype=torch.bfloat16)
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 50), (2**30, 1))
    apart.copy_(z_s.detach())
    found = evaluate(kernel.loss, [z_s], [z_t], labels, layout=lambda z: z)
    for student, teacher in ((apart, z_t), (z_s, apart)):
        expected = found if student is apart else evaluate(kernel.loss, [z_s], [z_s], labels)
        leaf = student.detach().requires_grad_()
        loss = kernel.loss([leaf], [teacher.detach()], labels, teacher_ce=[False])
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(gradient, expected[2])


def test_rows_of_a_language_model_are_read_where_they_lie(kernel):
    """[B, T, K] sliced from more classes: view(-1, K) is possible, so nothing is copied."""
    z = torch.randn(2, 3, 48, device=kernel.device)[..., :40]
    seen = []
    with patch.multiple(
        mhkd_fused,
        _loaded=True,
        operator=lambda s, t, *rest: seen.append(s[0]) or mhkd._reference_loss(s, t, *rest),
    ):
        labels = torch.zeros(2, 3, dtype=torch.int64, device=kernel.device)
        mhkd.mhkd_loss([z], [z], labels, backend="fused")
    assert seen[0].data_ptr() == z.data_ptr() and seen[0].stride() == (48, 1)


# Rows and classes that do not count; numbers that are none

PLAIN = [0.5, 1.0, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4]
ROWS = {  # student, teacher: a row of four classes with label 1, repeated to fill longer ones
    "a class masked for the student alone": ([0.5, 1.0, -INF, 2.0], PLAIN[1]),
    "a class masked for the teacher alone": (PLAIN[0], [0.1, 0.2, -INF, 0.4]),
    "a class masked for both": ([0.5, 1.0, -INF, 2.0], [0.1, 0.2, -INF, 0.4]),
    "the label masked for the student": ([0.5, -INF, 1.5, 2.0], PLAIN[1]),
    "the label masked for both": ([0.5, -INF, 1.5, 2.0], [0.1, -INF, 0.3, 0.4]),
    "all classes masked for the student": ([-INF] * 4, PLAIN[1]),
    "all classes masked for the teacher": (PLAIN[0], [-INF] * 4),
    "masked with the lowest number": ([-3e38, 1.0, 0.5, 2.0], [-3e38, 0.1, 0.2, 0.3]),
    "a teacher probability that underflows": (PLAIN[0], [9e4, 0.2, 0.3, 0.4]),
    "masked where the teacher's underflows": ([0.5, 1.0, -INF, 2.0], [0.1, 0.2, -1e3, 0.4]),
    "NaN in the student": ([0.5, 1.0, NAN, 2.0], PLAIN[1]),
    "NaN in the teacher": (PLAIN[0], [0.1, 0.2, NAN, 0.4]),
    "+inf in the student": ([0.5, INF, 1.5, 2.0], PLAIN[1]),
    "+inf in the teacher": (PLAIN[0], [0.1, INF, 0.3, 0.4]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("classes", [4, 100, 1100])
def test_infinite_and_nan_logits_give_what_the_reference_gives(kernel, name, classes):
    (plain_s,), (plain_t,), _ = make_heads(1, 2, classes, scale=1.0)
    rows = [torch.tensor(row).repeat(classes // 4)[None] for row in ROWS[name]]
    z_s, z_t = (
        torch.cat([row, z.detach()]).to(kernel.device).requires_grad_()
        for row, z in zip(rows, (plain_s, plain_t))
    )
    labels = torch.tensor([1, 0, 2], device=kernel.device)
    for alpha in (0.0, 0.9, 1.0):
        torch.testing.assert_close(
            evaluate(kernel.loss, [z_s], [z_t], labels, alpha=alpha),
            evaluate(reference, [z_s], [z_t], labels, alpha=alpha),
            equal_nan=True,
        )


@pytest.mark.parametrize("classes", [7, 100, 1100])
@pytest.mark.parametrize("batch, ignored", [(4, 1), (3, 3), (0, 0)])
def test_ignored_rows_count_nowhere_even_if_they_hold_nan_or_are_all(
    kernel, classes, batch, ignored
):
    student, teacher, labels = make_heads(2, batch, classes, device=kernel.device)
    for z in (*student, *teacher):
        z.data[:ignored] = NAN
    labels[:ignored] = 255
    result, expected = (
        evaluate(loss, student, teacher, labels, ignore_index=255)
        for loss in (kernel.loss, reference)
    )
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert not any(gradient[:ignored].any() for gradient in result[2:])


@pytest.mark.parametrize("classes", [7, 100, 1100])
@pytest.mark.parametrize("unlabelled", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_unlabelled_rows_count_for_the_divergence_alone(kernel, classes, unlabelled, alpha):
    student, teacher, labels = make_heads(2, 5, classes, device=kernel.device)
    labels[:unlabelled], labels[4] = mhkd.UNLABELLED, -100
    for z in (*student, *teacher):
        z.data[4] = NAN
    kw = {"alpha": alpha, "teacher_ce": [True, False]}
    result, expected = (
        evaluate(loss, student, teacher, labels, **kw) for loss in (kernel.loss, reference)
    )
    torch.testing.assert_close(result, expected)
    terms, of_student, of_teacher = result[1], result[2], result[4]
    assert terms[:, 0].all() and terms[0, 1:].all() == (unlabelled < 4)
    assert of_student[:unlabelled].any() == (alpha > 0)
    assert not of_teacher[:unlabelled].any() and not of_student[4].any()
    labels[4] = mhkd.UNLABELLED  # ignored next; then all rows are unlabelled
    for label, ignore in ((labels, mhkd.UNLABELLED), (None, 0)):
        result, expected = (
            evaluate(loss, student, teacher, label, ignore_index=ignore, **kw)
            for loss in (kernel.loss, reference)
        )
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("labels", [[0, 1, -1], [-1, -1, -1], [-100, -1, 2]])
def test_gradcheck_with_unlabelled_rows(kernel, labels):
    student, teacher, _ = make_heads(2, 3, 5, device=kernel.device, dtype=torch.float64)
    labels = torch.tensor(labels, device=kernel.device)
    teacher = [z.detach() for z in teacher]
    assert torch.autograd.gradcheck(
        lambda *z: kernel.loss(z[:2], teacher, labels, tau=3.0, alpha=0.7), student
    )
    # The teacher's gradient is that of its cross-entropy: the divergence is detached from it.
    teacher = [z.requires_grad_() for z in teacher]
    kw = {"teacher_ce": [True, True], "alpha": 0.0, "head_weights": [0.0, 0.0]}
    assert torch.autograd.gradcheck(lambda *z: kernel.loss(student, z, labels, **kw), teacher)


@pytest.mark.parametrize(
    "alpha, weights", [(0.0, [1.0, 1.0]), (1.0, [1.0, 0.5]), (0.5, [0.0, 1.0]), (0.5, [0.0, 0.0])]
)
@pytest.mark.parametrize("marked", [False, True])
def test_a_coefficient_of_zero_wins_over_an_infinite_term(kernel, alpha, weights, marked):
    student, teacher, labels = make_heads(2, 3, 40, device=kernel.device)
    student[0].data[0, 5] = -INF if alpha else 0.0
    teacher[0].data[0, 6] = NAN
    labels[0] = 5
    if weights[0] == 0:
        student[0].data[1, 2], student[0].data[2, 3] = NAN, INF
    kw = {"alpha": alpha, "head_weights": weights, "teacher_ce": [marked, False]}
    result = evaluate(kernel.loss, student, teacher, labels, **kw)
    expected = evaluate(reference, student, teacher, labels, **kw)
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert weights[0] != 0 or not result[2].any()


@pytest.mark.parametrize("classes", [10, 1100])
def test_an_incoming_gradient_of_zero_is_multiplied_as_any_other(kernel, classes):
    """0 * NaN is NaN: a row that is spoilt shows, by both backends."""
    student, teacher, labels = make_heads(1, 3, classes, device=kernel.device)
    student[0].data[1, 2] = NAN
    for loss in (kernel.loss, reference):
        (gradient,) = torch.autograd.grad(0.0 * loss(student, teacher, labels), student)
        assert gradient[1].isnan().all() and not gradient[[0, 2]].any()


def test_equal_logits_have_a_divergence_of_exactly_zero(kernel):
    student, _, labels = make_heads(2, 4, 1000, device=kernel.device)
    terms = evaluate(kernel.loss, student, student, labels)[1]
    assert terms[:, 0].tolist() == [0.0, 0.0]


# Autograd


def test_a_second_call_and_a_second_backward_give_the_same_bits_and_gradients_accumulate(kernel):
    student, teacher, labels = make_heads(3, 5, 1500, device=kernel.device)
    once = evaluate(kernel.loss, student, teacher, labels)[2:]
    loss = kernel.loss(student, teacher, labels)
    assert_equal(torch.autograd.grad(loss, student + teacher, retain_graph=True), once)
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert_equal([z.grad for z in student + teacher], [2 * gradient for gradient in once])


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_loss_scale_reaches_half_precision_gradients_before_they_are_rounded(kernel, classes):
    student, teacher, labels = make_heads(1, 64, classes, device=kernel.device, dtype=torch.float16)
    teacher = [(student[0].detach() + 1e-2 * teacher[0].detach()).requires_grad_()]  # small ones
    (kernel.loss(student, teacher, labels) * 2.0**14).backward()
    exact = evaluate(reference, student, teacher, labels, dtype=torch.float64)[2] * 2.0**14
    torch.testing.assert_close(student[0].grad.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_second_derivative_names_the_reference_backend(kernel):
    student, teacher, labels = make_heads(1, 2, 5, device=kernel.device)
    loss = kernel.loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.sum().backward()


def derivatives(loss):
    """What the kernel has no rule for, each a function of the student's logits."""

    def dual(z):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, torch.ones_like(z)))).tangent

    def compiled(z):
        with compiled_autograd._enable(lambda graph: graph):
            loss(z.detach().requires_grad_()).backward()

    def no_grad(z):
        with torch.no_grad():
            return dual(z)

    ones = torch.ones(3, 5)
    return {
        "a dual tensor": dual,
        "a dual tensor under no_grad": no_grad,
        "func.jvp": lambda z: torch.func.jvp(loss, (z,), (ones,)),
        "func.jacfwd": lambda z: torch.func.jacfwd(loss)(z),
        "func.grad": lambda z: torch.func.grad(loss)(z),
        "func.vmap": lambda z: torch.func.vmap(loss)(z[None]),
        "compiled autograd": compiled,
    }


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", derivatives(None))
def test_what_has_no_rule_in_the_kernel_names_the_reference_backend(kernel, name, requires_grad):
    if kernel.name == "cuda":
        pytest.skip("the same code, whatever the device")
    (z_s,), (z_t,), labels = make_heads(1, 3, 5)
    z_s, z_t = z_s.detach().requires_grad_(requires_grad), z_t.detach()
    derivative = derivatives(lambda z: kernel.loss([z], [z_t], labels))[name]
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        derivative(z_s)
    if "compiled" not in name:
        assert derivatives(lambda z: reference([z], [z_t], labels))[name](z_s) is not None


def test_a_teacher_and_labels_of_inference_mode_are_taken(kernel):
    student, teacher, labels = make_heads(2, 3, 40, device=kernel.device)
    expected = evaluate(kernel.loss, student, [z.detach() for z in teacher], labels)
    with torch.inference_mode():
        teacher, labels = [z.detach() * 1 for z in teacher], labels * 1
    assert labels.is_inference()
    loss = kernel.loss(student, teacher, labels)
    gradients = torch.autograd.grad(loss, student, retain_graph=True)
    assert_equal([loss.detach(), *gradients], [expected[0], *expected[2:4]])
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_teacher_of_inference_mode_can_be_overwritten_before_the_backward_pass(kernel):
    """As when several batches share one buffer: the gradients are those of the old values."""
    student, teacher, labels = make_heads(2, 3, 40, device=kernel.device)
    expected = evaluate(kernel.loss, student, [z.detach() for z in teacher], labels)
    with torch.inference_mode():
        teacher, labels = [z.detach() * 1 for z in teacher], labels * 1
    loss = kernel.loss(student, teacher, labels)
    with torch.inference_mode():
        for z in (*teacher, labels):
            z.zero_()
    assert_equal(torch.autograd.grad(loss, student), expected[2:4])


def test_rows_that_overlap_and_are_converted_are_read_in_order(kernel):
    (z_s,), (z_t,), labels = make_heads(1, 8, 33, device=kernel.device, dtype=torch.float64)
    z_t = z_t.detach()
    overlapping = torch.linspace(-3, 3, 60, device=kernel.device).unfold(0, 33, 1)[:8]
    assert overlapping.stride() == (1, 1)
    for call in (([overlapping], [z_t]), ([z_s], [overlapping])):
        expected = evaluate(reference, *call, labels)
        for found, wanted in zip(kernel.loss(*call, labels, return_terms=True), expected):
            torch.testing.assert_close(found.detach(), wanted)


@pytest.mark.parametrize("inference", [False, True])
def test_a_backward_pass_releases_the_saved_tensors(kernel, inference):
    if kernel.device != "cpu":
        pytest.skip("NumPy's memory is on the CPU")
    arrays = [np.ones((3, 40), np.float32), np.ones((3, 40), np.float32), np.zeros(3, np.int64)]
    alive = [weakref.ref(array) for array in arrays]
    leaf = torch.ones(3, 1, requires_grad=True)
    student = torch.from_numpy(arrays[0])
    with torch.inference_mode(inference):
        teacher, labels = map(torch.from_numpy, arrays[1:])
    loss = kernel.loss([student.mul_(leaf)], [teacher], labels)
    del arrays, student, teacher, labels
    loss.backward()
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("changed", ["student", "teacher", "labels"])
def test_logits_or_labels_changed_before_the_backward_pass_are_an_error(kernel, changed):
    (z_s,), (z_t,), labels = make_heads(1, 3, 40, device=kernel.device)
    z_s, z_t = z_s * 1, z_t.detach()
    loss = kernel.loss([z_s], [z_t], labels)
    {"student": z_s, "teacher": z_t, "labels": labels}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_half_precision_logits_of_autocast_give_a_float32_loss(kernel):
    student, teacher, labels = make_heads(1, 6, 12, device=kernel.device)
    weight = torch.eye(12, device=kernel.device, requires_grad=True)
    with torch.autocast(kernel.device, dtype=torch.bfloat16):
        logits = F.linear(student[0], weight)
        loss = kernel.loss([logits], teacher, labels)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


# The operator in PyTorch


@pytest.fixture
def installed():
    if not mhkd.loss_backend().startswith("fused"):
        pytest.skip("the fused kernel is not installed")


@pytest.fixture
def no_caches():
    """Code that was compiled for an earlier interface of the operator is not used."""
    with torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        yield


@pytest.fixture
def operator(kernel):
    if kernel.name == "emulated":
        pytest.skip("the emulated library shares schema, Meta and Autograd with the real one")
    return torch.ops.mhkd.loss.default


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 7), (torch.bfloat16, 100)], ids=str)
def test_opcheck_passes(operator, kernel, dtype, classes):
    student, teacher, labels = make_heads(2, 3, classes, device=kernel.device, dtype=dtype)
    arguments = (student, teacher, labels, [4.0, 0.9, 0.45, 0.1, 0.05], [], [False, True], -100)
    torch.library.opcheck(operator, arguments)
    _, _, stats = operator(*arguments)
    student, teacher = [z.detach() for z in student], [z.detach() for z in teacher]
    grad, strides = torch.ones((), device=kernel.device), [classes + 3, 0, 0, classes]
    torch.library.opcheck(
        torch.ops.mhkd.loss_backward.default,
        (grad, student, teacher, labels, stats, *arguments[3:], strides),
    )


def test_torch_compile_sees_one_operator_and_gives_the_same_bits(operator, kernel):
    seen = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.append([name for name in calls if "getitem" not in name])
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(mhkd.mhkd_loss, fullgraph=True, backend=backend)
    for batch in (3, 5):  # the second shape is dynamic
        heads = make_heads(2, batch, 40, device=kernel.device)
        assert_equal(evaluate(compiled, *heads), evaluate(kernel.loss, *heads))
    assert [name for name in seen[0] if "mhkd" in name] == ["mhkd.loss.default"]
    assert len(seen[0]) < 8  # tau and the weights become tensors
    assert seen[1].count("mhkd.loss.default") == 1  # with guards on its shape


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_takes_a_changing_tau_and_weights_without_compiling_each(
    operator, kernel, compiler, no_caches
):
    student, teacher, labels = make_heads(2, 4, 40, device=kernel.device)
    teacher = [z.detach() for z in teacher]
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def loss(*call, tau, alpha, beta):
        return mhkd.mhkd_loss(
            *call, tau=tau, alpha=alpha, beta=beta, return_terms=True, backend="fused"
        )

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for i in range(12):  # more than the limit of compilations
        kw = {"tau": [4.0, 2.5, 1.0][i % 3] + i // 3, "alpha": 0.9 - i / 50, "beta": 0.5 + i / 10}
        found, expected = (
            [value.detach(), terms, *torch.autograd.grad(value, student)]
            for value, terms in (of(student, teacher, labels, **kw) for of in (compiled, loss))
        )
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2  # as plain PyTorch: numbers, then whatever numbers


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32], ids=str)
def test_a_gradient_has_the_row_stride_of_logits_of_a_padded_vocabulary(operator, device, other):
    """Rows of 50,304 are aligned to 16 bytes, those of 50,257 are not."""
    full = torch.randn(3, 50304, dtype=torch.bfloat16, device=device)
    far = torch.randn(3, 80000, dtype=torch.bfloat16, device=device)
    labels = torch.tensor([1, -100, 2], device=device)
    for whole, stride in ((full, 50304), (far, 50257), (far.t().contiguous().t(), 50257)):
        student = whole[:, :50257].requires_grad_()
        teacher = full[:, :50257].to(other).requires_grad_()
        loss = mhkd.mhkd_loss([student], [teacher], labels, teacher_ce=[True], backend="fused")
        gradients = torch.autograd.grad(loss, [student, teacher])
        seen = [gradient.stride() for gradient in gradients]
        assert seen == [(stride, 1), (teacher.stride(0), 1)]
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, other]
        if device == "cpu":
            expected = evaluate(with_operator(operator), [student], [teacher], labels)[2:]
            assert_equal(gradients, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_knows_the_strides_of_the_gradients(operator, kernel, compiler, no_caches):
    weight = torch.randn(112, 8, device=kernel.device, requires_grad=True)
    _, teacher, labels = make_heads(1, 3, 100, device=kernel.device)
    hidden, teacher = torch.randn(3, 8, device=kernel.device), [teacher[0].detach()]

    def loss(weight):
        logits = F.linear(hidden, weight)[:, :100]  # of a padded vocabulary
        return mhkd.mhkd_loss([logits], teacher, labels, backend="fused")

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    found, expected = (torch.autograd.grad(of(weight), weight)[0] for of in (compiled, loss))
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="autograd aborts on a CUDA tensor in a CPU build"
)
def test_scalars_on_the_cpu_beside_logits_on_a_gpu_are_traced(installed):
    with FakeTensorMode():
        z = [torch.empty(3, 8, device="cuda", requires_grad=True)]
        labels = torch.empty(3, device="cuda", dtype=torch.int64)
        traced = [torch.empty((), dtype=torch.float64) for _ in range(3)]
        settings = labels, [0.0] * 3, traced, [False], -100
        loss, _, stats = torch.ops.mhkd.loss(z, z, *settings)
        (gradient,) = torch.ops.mhkd.loss_backward(loss, z, z, labels, stats, *settings[1:], [8, 0])
    assert loss.device.type == gradient.device.type == "cuda"


def test_torch_compile_of_a_fresh_process_finds_and_checks_the_kernel(operator, kernel):
    done = run_python(
        "import torch, mhkd, mhkd_fused\n"
        f"mhkd_fused.TO_BE_CHECKED = ('{kernel.device}',)\n"
        f"z = [torch.zeros(2, 3, 4, device='{kernel.device}', requires_grad=True)]\n"
        f"y = torch.ones(2, 3, dtype=torch.int64, device='{kernel.device}')\n"
        "step = torch.compile(mhkd.mhkd_loss, fullgraph=True, backend='aot_eager')\n"
        "print(step(z, z, y).grad_fn is not None, list(mhkd_fused._problems.values()))\n"
    )
    assert done.stdout.split() == ["True", "['']"], done.stderr


def test_meta_tensors_give_shapes_and_dtypes(installed):
    student, teacher, labels = make_heads(2, 3, 40, device="meta", dtype=torch.float16)
    loss, terms = mhkd.mhkd_loss(student, teacher, labels, backend="fused", return_terms=True)
    loss.backward()
    found = loss.shape, loss.dtype, terms.shape, terms.dtype
    assert found == ((), torch.float32, (2, 3), torch.float32)
    assert student[1].grad.shape == (3, 40) and student[1].grad.dtype == torch.float16


# Wrong input


@pytest.mark.parametrize("label", [-2, 5, 2**40])
def test_a_label_that_is_no_class_is_an_error(kernel, label):
    if kernel.name == "cuda":  # the assertion ends the use of the GPU: another process
        done = run_python(
            "import torch, mhkd; z = torch.zeros(1, 5, device='cuda'); "
            f"y = torch.tensor([{label}], device='cuda'); "
            "mhkd.mhkd_loss([z], [z], y, backend='fused').item()"
        )
        assert done.returncode != 0 and "assert" in done.stderr
        return
    student, teacher, labels = make_heads(1, 3, 5)
    labels[1] = label
    with pytest.raises(IndexError, match="out of bounds"):
        kernel.loss(student, teacher, labels)


def test_the_backward_operator_checks_its_arguments(operator, kernel):
    student, teacher, labels = make_heads(2, 3, 5, device=kernel.device)
    student, teacher = [z.detach() for z in student], [z.detach() for z in teacher]
    settings = [4.0, 0.9, 0.45, 0.1, 0.05], [], [False, True], -100
    loss, _, stats = operator(student, teacher, labels, *settings)
    one, strides = torch.ones_like(loss), [5, 6, 0, 7]
    backward = torch.ops.mhkd.loss_backward.default

    def run(grad=one, s=student, t=teacher, y=labels, stats=stats, numbers=settings[0],
            traced=(), marked=settings[2], strides=strides):  # fmt: skip
        return backward(grad, s, t, y, stats, numbers, list(traced), marked, -100, strides)

    for grad in (one.half(), one.double(), one.cpu(), one[None]):
        assert_equal(run(grad), run())
    many = 10 * student
    wrong = [
        {"s": many, "t": many, "numbers": [1.0] * 41, "marked": [True] * 20, "strides": [5] * 40},
        {"s": student[:1]}, {"t": []}, {"y": labels[:2]}, {"y": labels.int()},
        {"t": [z[:, :3] for z in teacher]}, {"s": [z.long() for z in student]},
        {"grad": torch.ones(2)}, {"stats": stats[:-1]}, {"stats": stats.double()},
        {"stats": stats.repeat_interleave(2)[::2]}, {"numbers": [4.0]}, {"traced": [one]},
        {"strides": [5] * 3}, {"strides": [5] * 8}, {"strides": [5] * 4}, {"strides": [4, 0, 0, 0]},
        {"marked": [False]},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match="mhkd_loss: "):
            run(**change)
    meta = [z.to("meta") for z in student]
    with pytest.raises(ValueError, match="grad_strides"):
        run(s=meta, t=meta, y=labels.to("meta"), stats=stats.to("meta"), strides=[5] * 3)


# Where the kernel comes from, and whether it is believed


def run_python(code, **environment):
    return python("-c", code, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "change, warned",
    [("importlib.util.find_spec = lambda name: None", 0), ("mhkd_fused.INTERFACE += 1", 1)],
    ids=["none", "of another interface"],
)
def test_without_a_kernel_auto_is_plain_pytorch_and_fused_says_what_is_missing(change, warned):
    if warned and not mhkd.loss_backend().startswith("fused"):
        pytest.skip("the fused kernel is not installed")
    done = run_python(
        "import importlib.util, torch, mhkd, mhkd_fused\n"
        f"{change}\n"
        "z, y = [torch.zeros(2, 4)], torch.tensor([1, 2])\n"
        "print(mhkd.mhkd_loss(z, z, y).item(), mhkd.loss_backend())\n"
        "mhkd.mhkd_loss(z, z, y, backend='fused')\n"
    )
    assert re.match(r"0\.138\d* reference \(fused loss not installed\)", done.stdout)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: mhkd_loss: the fused loss is not installed")
    assert done.stderr.count("has interface") == warned


def test_two_copies_of_the_script_share_one_kernel(tmp_path, monkeypatch):
    shutil.copy(mhkd.__file__, tmp_path / "copied_mhkd.py")
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied_mhkd")
    assert copied.loss_backend() == mhkd.loss_backend()
    call = make_heads(1, 2, 5)
    assert torch.equal(copied.mhkd_loss(*call), mhkd.mhkd_loss(*call))


@pytest.fixture
def to_be_checked(emulated):
    """A process whose kernel is the emulated one, on a device where auto has to check first."""
    with patch.multiple(
        mhkd_fused, _loaded=True, operator=emulated, _problems={}, TO_BE_CHECKED=("cpu",)
    ):
        yield emulated


def test_auto_takes_the_kernel_once_it_has_agreed_with_plain_pytorch(to_be_checked):
    heads = make_heads(2, 3, 40)
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_TEACHER)
        found = mhkd.mhkd_loss(*heads)
    assert torch.equal(found, with_operator(to_be_checked)(*heads))
    assert list(mhkd_fused._problems.values()) == [""]
    assert torch.equal(state, torch.get_rng_state())
    with torch.inference_mode(), torch.autocast("cpu"):
        assert mhkd_fused.check("cpu", mhkd._reference_loss) == ""
    with torch.device("meta"):  # as with torch.set_default_device("cuda")
        assert mhkd_fused.check("cpu", mhkd._reference_loss) == ""


@pytest.mark.parametrize(
    "wrong_in, said",
    [
        ("loss", "differs from plain PyTorch"),
        ("terms", "differs from plain PyTorch"),
        ("gradients", "differs from plain PyTorch"),
        ("call", "no kernel image"),  # the GPU goes on working
    ],
)
def test_a_kernel_that_is_wrong_is_found_out_and_plain_pytorch_is_used(
    to_be_checked, wrong_in, said
):
    def wrong(student, teacher, *rest):
        if wrong_in == "call":
            raise RuntimeError("CUDA error: no kernel image is available for execution")
        if wrong_in == "gradients":  # twice what they should be, the values as they are
            same = [torch.where(z.isfinite(), z - z.detach(), 0) for z in student]
            student = [z + zero for z, zero in zip(student, same)]
        loss, terms, stats = to_be_checked(student, teacher, *rest)
        return loss * (1 + 1e-4 * (wrong_in == "loss")), terms + 1e-3 * (wrong_in == "terms"), stats

    heads = make_heads(2, 3, 40)
    with patch.object(mhkd_fused, "operator", wrong):
        with pytest.warns(UserWarning, match=f"{said}.*plain PyTorch is used"):
            found = mhkd.mhkd_loss(*heads)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", OF_TEACHER)
            mhkd.mhkd_loss(*heads)
        assert torch.equal(found, reference(*heads))
        assert said in "".join(mhkd_fused._problems.values())


def test_a_cuda_error_in_the_check_names_the_reference_backend(to_be_checked):
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    with patch.object(mhkd_fused, "operator", Mock(side_effect=error)):
        with pytest.raises(
            mhkd_fused.KernelCrash, match="illegal memory.*--backend reference"
        ) as crash:
            mhkd.mhkd_loss(*make_heads(1, 3, 40))
    assert "\n" not in str(crash.value)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_of_this_processor_is_accurate(capability):
    """The code is chosen at run time, as PyTorch's is: ATEN_CPU_CAPABILITY lowers the choice."""
    code = "import mhkd; print(mhkd.loss_backend())"
    backend = run_python(code, ATEN_CPU_CAPABILITY=capability).stdout
    if f"CPU {capability.replace('default', 'plain')}" not in backend:
        pytest.skip(f"{capability} is not available: {backend.strip()}")
    if backend.strip() == mhkd.loss_backend():
        pytest.skip(f"{capability} is what all tests here run with")
    names = "(every_regime or infinite_and_nan or begin_with) and cpu"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    done = python(*arguments, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("classes", [100, 3000])
def test_the_number_of_threads_does_not_change_a_bit(installed, classes):
    heads, threads, results = make_heads(3, 40, classes), torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(evaluate(mhkd.mhkd_loss, *heads, backend="fused"))
    torch.set_num_threads(threads)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_csrc_alone_is_built_by_another_project(tmp_path):
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None or shutil.which("ninja") is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, no ninja, or no csrc")
    shutil.copytree(CSRC, tmp_path / "csrc")
    code = (
        "import glob, torch\n"
        "from torch.utils.cpp_extension import load\n"
        "load('fused_loss', glob.glob('csrc/*.cpp'), is_python_module=False)\n"
        "z, y = [torch.zeros(2, 4, requires_grad=True)], torch.tensor([1, 2])\n"
        "loss, terms, _ = torch.ops.mhkd.loss(z, z, y, [4.0, 0.9, 0.1], [], [False])\n"
        "loss.backward()\n"
        "print(loss.item(), z[0].grad.isfinite().all().item())\n"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "build")}
    done = python("-c", code, cwd=tmp_path, env=environment)
    assert re.search(r"^0\.138\d* True$", done.stdout, re.M), done.stderr[-2000:]


# The machine code of the CUDA kernels

# Instructions for a pair of logits in the loops over 16-byte loads, at tau 4: the most of all,
# which compute the teacher's own cross-entropy too, and the most of the others. Keys: kernel, bytes
# of a logit. Another tau takes one exponential a logit more, and the product before it.
MOST = {
    ("forward", 2): (24, 22),
    ("forward", 4): (36, 36),
    ("backward", 2): (28, 20),
    ("backward", 4): (40, 40),
}
OTHER_TAU = 4


def innermost_loops(listing):
    """The instructions of each innermost loop: what a branch backwards comes back to."""
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[T\d]+ )?([A-Z0-9_.]+)([^;]*);"
    code = [(int(at, 16), op, rest) for at, op, rest in re.findall(pattern, listing)]
    last_end = -1
    for end, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target[1], 16) < end:
            begin = int(target[1], 16)
            if begin > last_end:  # no loop ends inside
                yield [op for at, op, _ in code if begin <= at <= end]
            last_end = end


def test_the_machine_code_keeps_to_the_instructions_and_registers_promised(tmp_path):
    spec = importlib.util.find_spec("triton")  # it brings cuobjdump along
    beside = spec and str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    dump = shutil.which("cuobjdump") or (beside and shutil.which("cuobjdump", path=beside))
    if not shutil.which("nvcc") or not dump or not CSRC.is_dir():
        pytest.skip("no nvcc, no cuobjdump, or no csrc")
    binary = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90", "-cubin"]
    command += ["-Xptxas", "-v", *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += [CSRC / "mhkd_loss_cuda.cu", "-o", binary]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}
    sass = subprocess.run([dump, "--dump-sass", binary], capture_output=True, text=True, check=True)
    checked = Counter()
    for function in re.split(r"\n\s*Function : ", sass.stdout)[1:]:
        name, listing = function.split("\n", 1)
        size = 2 if re.search("Half|BFloat16", name) else 4
        kind = "forward" if "forward_kernel" in name else "backward"
        if "kernelId" in name:  # of double: bound by its arithmetic
            continue
        # The host computes in float64 what is the same for all threads; a GPU may be slow at it.
        # Forward the last block adds up the rows' terms in float64.
        assert kind == "forward" or not re.search(r"\bD(FMA|MUL|ADD|SETP)\b|64H", listing), name
        costs = []
        for ops in innermost_loops(listing):
            if loads := sum(op.startswith("LDG") and "128" in op for op in ops):
                assert not any(op.startswith(("LDL", "STL")) for op in ops), name
                costs.append(len(ops) / (loads / 2 * 16 / size))
        more = OTHER_TAU if "Li0E" in name else 0
        *others, most = sorted(costs)
        allowed, allowed_others = MOST[kind, size]
        assert most <= allowed + more and max(others) <= allowed_others + more, (name, costs)
        checked[kind] += 1
    assert checked == {"forward": 12, "backward": 12}


# run_all.sh gpu

PARTS = ["build", "tests", "memcheck", "racecheck", "loss", "step-float32", "step-bfloat16"]
PARTS += ["step-compile", "main-job"]


def run_gpu(out, **environment):
    if not (ROOT / "run_all.sh").exists():
        pytest.skip("no run_all.sh")
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment}
    done = subprocess.run(["./run_all.sh", "gpu"], cwd=ROOT, env=environment, capture_output=True)
    report = (out / "report.md").read_text()
    states = dict(re.findall("^## (\\S+): (.*)$", report, re.M))
    limits = [int(limit) for limit in re.findall("limit (\\d+) s", report)]
    assert list(states) == PARTS and len(limits) == len(PARTS)
    assert sum(limits) <= 480 and "PyTorch" in report
    return done.returncode, states, report


def test_without_a_gpu_each_part_says_so(tmp_path):
    code, states, _ = run_gpu(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert code == 0 and set(states.values()) == {"no GPU"}


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    """With an interpreter that claims a GPU and can do nothing else but step."""
    script = 'case "$*" in *is_available*) echo True ;; *version*) echo PyTorch ;;'
    script += " *step*) echo done ;; *) echo broken >&2; exit 3 ;; esac\n"
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}")
    fake.chmod(0o755)
    code, states, report = run_gpu(tmp_path / "out", PYTHON=str(fake))
    assert code == 1
    assert {states[part] for part in PARTS if "step" in part} == {"passed"}
    assert {states[part] for part in ("build", "tests", "loss", "main-job")} == {
        "failed, exit status 3"
    }
    assert "broken" in report and "done" in report


# CUDA alone


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


def test_a_graph_that_is_captured_before_the_check_holds_plain_pytorch(cuda):
    student, teacher, labels = make_heads(2, 8, 300, device=cuda)
    with patch.object(mhkd_fused, "_problems", {}):
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            loss = mhkd.mhkd_loss(student, teacher, labels)
        graph.replay()
        assert not mhkd_fused._problems
        torch.testing.assert_close(loss, mhkd.mhkd_loss(student, teacher, labels).detach())
        assert list(mhkd_fused._problems.values()) == [""]


def test_forward_and_backward_are_one_launch_each(cuda):
    student, teacher, labels = make_heads(4, 8, 3000, device=cuda)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mhkd.mhkd_loss(student, teacher, labels, backend="fused").backward()
        torch.cuda.synchronize()
    ours = [e.name for e in profile.events() if "mhkd" in e.name and "kernel" in e.name]
    assert len(ours) == 2, ours


def test_streams_run_side_by_side(cuda):
    calls = [make_heads(2, 16, 5000, device=cuda, seed=seed) for seed in range(4)]
    expected = [evaluate(mhkd.mhkd_loss, *call, backend="fused") for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, call, wanted in zip(streams, calls, expected):
            with torch.cuda.stream(stream):
                result = evaluate(mhkd.mhkd_loss, *call, backend="fused")
            stream.synchronize()
            assert_equal(result, wanted)
