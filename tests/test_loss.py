"""Equations 1 and 2 in plain PyTorch: the specification.

test_fused_loss.py holds the kernel to it.
"""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mhkd

INF, NAN = math.inf, math.nan
reference = functools.partial(mhkd.mhkd_loss, backend="reference")


def restated(student, teacher, labels, tau, alpha, weights, marked, ignore=-100):
    """The loss and the terms of equations 1 and 2 as they are written, number after number."""

    def softmax(row, temperature):
        scaled = [float(z) / temperature for z in row]
        top = max(scaled)
        exponentials = [math.exp(z - top) for z in scaled]
        return [e / sum(exponentials) for e in exponentials], [
            z - top - math.log(sum(exponentials)) for z in scaled
        ]

    def cross_entropy(row, label):
        return -softmax(row, 1.0)[1][label]

    rows = [b for b, label in enumerate(labels) if label != ignore]
    loss, terms = 0.0, []
    for z_s, z_t, weight, mark in zip(student, teacher, weights, marked):
        kl = ce = ce_t = 0.0
        for b in rows:
            (p_t, log_p_t), (_, log_p_s) = softmax(z_t[b], tau), softmax(z_s[b], tau)
            kl += sum(p * (lt - ls) for p, lt, ls in zip(p_t, log_p_t, log_p_s) if p > 0) / len(
                rows
            )
            ce += cross_entropy(z_s[b], labels[b]) / len(rows)
            ce_t += cross_entropy(z_t[b], labels[b]) / len(rows) if mark else 0.0
        loss += weight * (alpha * tau**2 * kl + (1 - alpha) * ce) + ce_t
        terms.append([tau**2 * kl, ce, ce_t])
    return loss, terms


def logits(H, B, K, seed=0, scale=3.0, dtype=torch.float64, device="cpu", requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    made = [
        (scale * torch.randn(B, K, generator=generator, dtype=torch.float64)).to(device, dtype)
        for _ in range(H)
    ]
    return [z.requires_grad_(requires_grad) for z in made]


def classes(B, K, seed=5, device="cpu"):
    return torch.randint(K, (B,), generator=torch.Generator().manual_seed(seed)).to(device)


def numbers(tensors):
    return [z.detach().cpu().double().numpy() for z in tensors]


@settings(max_examples=60, deadline=None)
@given(
    H=st.integers(1, 4), B=st.integers(1, 6), K=st.integers(1, 7), tau=st.floats(0.5, 20),
    alpha=st.floats(0, 1), beta=st.floats(0, 5), scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000), data=st.data(),
)  # fmt: skip
def test_loss_and_terms_are_those_of_the_equations(H, B, K, tau, alpha, beta, scale, seed, data):
    student, teacher = logits(H, B, K, seed, scale), logits(H, B, K, seed + 1, scale)
    labels = data.draw(st.lists(st.sampled_from([-100, *range(K)]), min_size=B, max_size=B))
    labels[0] = 0
    marked = data.draw(st.lists(st.booleans(), min_size=H, max_size=H))
    loss, terms = reference(
        student,
        teacher,
        torch.tensor(labels),
        tau=tau,
        alpha=alpha,
        beta=beta,
        teacher_ce=marked,
        return_terms=True,
    )
    weights = [1.0] + [beta] * (H - 1)
    wanted, wanted_terms = restated(
        numbers(student), numbers(teacher), labels, tau, alpha, weights, marked
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(terms.numpy(), wanted_terms, rtol=1e-9, atol=1e-9)


def test_defaults_are_the_papers_tau_4_alpha_nine_tenths_and_beta_one_half():
    student, teacher, labels = logits(3, 4, 5, 1), logits(3, 4, 5, 2), classes(4, 5)
    wanted, _ = restated(
        numbers(student), numbers(teacher), labels.tolist(), 4.0, 0.9, [1, 0.5, 0.5], [False] * 3
    )
    assert reference(student, teacher, labels).item() == pytest.approx(wanted, rel=1e-12)


def test_head_weights_stand_in_the_place_of_beta(device):
    student, teacher = logits(3, 4, 5, 1, device=device), logits(3, 4, 5, 2, device=device)
    labels = classes(4, 5, device=device)
    weights = [0.3, 2.0, 0.0]
    loss = reference(student, teacher, labels, beta=100.0, head_weights=weights)
    wanted, _ = restated(
        numbers(student), numbers(teacher), labels.tolist(), 4.0, 0.9, weights, [False] * 3
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("ignore", [-100, 2])
def test_gradcheck_on_the_students_logits(ignore):
    student, teacher, labels = (
        logits(3, 4, 5, 1, requires_grad=True),
        logits(3, 4, 5, 2),
        classes(4, 5),
    )
    labels[1] = ignore

    def loss(*z):
        return reference(z, teacher, labels, tau=3.0, alpha=0.7, beta=0.4, ignore_index=ignore)

    assert torch.autograd.gradcheck(loss, student)


def test_a_marked_teacher_head_gets_exactly_the_gradient_of_its_own_cross_entropy(device):
    student, labels = (
        logits(3, 4, 5, 1, requires_grad=True, device=device),
        classes(4, 5, device=device),
    )
    teacher = logits(3, 4, 5, 2, requires_grad=True, device=device)
    reference(student, teacher, labels, beta=7.0, teacher_ce=[False, True, True]).backward()
    for z in teacher[1:]:
        (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels), z)
        assert torch.equal(z.grad, wanted)


def test_an_unmarked_teacher_head_gets_no_gradient():
    teacher = logits(2, 4, 5, 2, requires_grad=True)
    student = logits(2, 4, 5, 1, requires_grad=True)
    reference(student, teacher, classes(4, 5), teacher_ce=[False, True]).backward()
    assert teacher[0].grad is None or not teacher[0].grad.any()


def test_without_marks_the_teacher_logits_that_require_a_gradient_are_marked():
    student, labels = logits(3, 4, 5, 1), classes(4, 5)
    teacher = logits(3, 4, 5, 2)
    teacher[1].requires_grad_(True)
    found = reference(student, teacher, labels)
    assert (
        found.item() == reference(student, teacher, labels, teacher_ce=[False, True, False]).item()
    )
    assert found.item() != reference(student, teacher, labels, teacher_ce=[False] * 3).item()


def test_teacher_heads_weigh_one_whatever_alpha_beta_and_the_head_weights_are():
    student, labels = logits(2, 4, 5, 1), classes(4, 5)
    for keywords in ({}, {"alpha": 0.0, "beta": 9.0}, {"head_weights": [0.0, 0.0]}):
        teacher = logits(2, 4, 5, 2, requires_grad=True)
        reference(student, teacher, labels, teacher_ce=[False, True], **keywords).backward()
        (wanted,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(teacher[1], labels), teacher[1]
        )
        assert torch.equal(teacher[1].grad, wanted)


def test_a_step_sends_no_gradient_to_the_teachers_backbone_and_one_to_its_heads():
    torch.manual_seed(0)
    teacher = mhkd.MultiHead(
        mhkd.build_model("resnet8", 4), ["layer1"], 4, frozen=True, width=4
    ).train()
    student = mhkd.MultiHead(mhkd.build_model("resnet8", 4), ["layer1"], 4, width=4).train()
    x = torch.randn(4, 3, 16, 16)
    reference(student(x), teacher(x), torch.arange(4)).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for p in teacher.heads.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_ignored_rows_count_nowhere(device):
    student, teacher = logits(2, 6, 5, 1, device=device), logits(2, 6, 5, 2, device=device)
    labels = classes(6, 5, device=device)
    labels[[0, 3]] = -100
    keep = labels != -100
    wanted = reference([z[keep] for z in student], [z[keep] for z in teacher], labels[keep])
    assert reference(student, teacher, labels).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_ignore_index_can_be_one_of_the_classes():
    student, teacher, labels = (
        logits(2, 6, 5, 1),
        logits(2, 6, 5, 2),
        torch.tensor([0, 1, 2, 2, 3, 4]),
    )
    keep = labels != 2
    wanted = reference([z[keep] for z in student], [z[keep] for z in teacher], labels[keep])
    assert reference(student, teacher, labels, ignore_index=2).item() == pytest.approx(
        wanted.item(), rel=1e-12
    )


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_poison_in_an_ignored_row_reaches_neither_the_loss_nor_a_gradient(poison):
    student, teacher = logits(2, 4, 5, 1), logits(2, 4, 5, 2)
    labels = torch.tensor([0, -100, 3, 1])
    wanted = reference(student, teacher, labels, teacher_ce=[True, True]).item()
    for z in (*student, *teacher):
        z[1] = poison
        z.requires_grad_(True)
    loss = reference(student, teacher, labels)
    loss.backward()
    assert loss.item() == wanted
    assert all(z.grad.isfinite().all() and not z.grad[1].any() for z in (*student, *teacher))


def test_nan_in_a_row_that_counts_makes_the_loss_nan_and_leaves_the_other_rows_gradients():
    student, teacher, labels = (
        logits(1, 4, 5, 1, requires_grad=True),
        logits(1, 4, 5, 2),
        classes(4, 5),
    )
    reference(student, teacher, labels).backward()
    wanted = student[0].grad.clone()
    spoilt = student[0].detach().clone()
    spoilt[2, 0] = NAN
    spoilt.requires_grad_(True)
    loss = reference([spoilt], teacher, labels)
    loss.backward()
    assert loss.isnan()
    others = [0, 1, 3]
    assert torch.equal(spoilt.grad[others], wanted[others])


def test_with_every_row_ignored_the_loss_and_terms_are_nan():
    loss, terms = reference(
        logits(2, 3, 4, 1), logits(2, 3, 4, 2), torch.full((3,), -100), return_terms=True
    )
    assert loss.isnan()
    assert terms[:, :2].isnan().all()


def test_an_empty_batch_gives_nan():
    assert reference(logits(2, 0, 4), logits(2, 0, 4), torch.zeros(0, dtype=torch.int64)).isnan()


def test_classes_masked_on_both_sides_contribute_nothing_and_get_no_gradient(device):
    student, teacher = logits(2, 4, 6, 1, device=device), logits(2, 4, 6, 2, device=device)
    labels = classes(4, 5, device=device)
    cut = [[z[:, :5].clone() for z in side] for side in (student, teacher)]
    for z in (*student, *teacher):
        z[:, 5] = -INF
    for z in student:
        z.requires_grad_(True)
    loss = reference(student, teacher, labels)
    loss.backward()
    assert loss.item() == pytest.approx(reference(*cut, labels).item(), rel=1e-12)
    assert all(z.grad.isfinite().all() and not z.grad[:, 5].any() for z in student)


def test_a_class_that_only_the_teacher_excludes_contributes_nothing_to_the_divergence():
    student, teacher, labels = logits(1, 3, 4, 1), logits(1, 3, 4, 2), torch.tensor([0, 1, 2])
    teacher[0][:, 3] = -INF
    loss, terms = reference(student, teacher, labels, return_terms=True)
    wanted, wanted_terms = restated(
        numbers(student), numbers(teacher), labels.tolist(), 4.0, 0.9, [1.0], [False]
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(terms.numpy(), wanted_terms, rtol=1e-12)


def test_a_class_that_only_the_student_excludes_makes_the_divergence_infinite():
    student, teacher, labels = logits(1, 3, 4, 1), logits(1, 3, 4, 2), torch.tensor([0, 1, 2])
    student[0][1, 3] = -INF
    loss, terms = reference(student, teacher, labels, return_terms=True)
    assert loss.item() == INF
    assert terms[0, 0].item() == INF
    assert terms[0, 1].isfinite()


def test_a_coefficient_of_zero_leaves_out_a_term_that_is_infinite():
    student, teacher, labels = logits(1, 3, 4, 1), logits(1, 3, 4, 2), torch.tensor([0, 1, 2])
    student[0][1, 3] = -INF
    ce = torch.nn.functional.cross_entropy(student[0], labels)
    assert reference(student, teacher, labels, alpha=0.0).item() == pytest.approx(
        ce.item(), rel=1e-12
    )


def test_logits_of_a_thousand_do_not_overflow(device):
    student = logits(2, 4, 5, 1, scale=1e3, dtype=torch.float32, device=device, requires_grad=True)
    teacher = logits(2, 4, 5, 2, scale=1e3, dtype=torch.float32, device=device)
    loss = reference(student, teacher, classes(4, 5, device=device))
    loss.backward()
    labels = classes(4, 5).tolist()
    wanted, _ = restated(
        numbers(student), numbers(teacher), labels, 4.0, 0.9, [1, 0.5], [False] * 2
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert all(z.grad.isfinite().all() for z in student)


def test_equal_logits_have_no_divergence():
    z = logits(2, 4, 5)
    _, terms = reference(z, z, classes(4, 5), return_terms=True)
    assert terms[:, 0].abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    student = logits(3, 4, 5, 1, dtype=dtype, device=device, requires_grad=True)
    teacher, labels = logits(3, 4, 5, 2, dtype=dtype, device=device), classes(4, 5, device=device)
    loss = reference(student, teacher, labels)
    loss.backward()
    wanted, _ = restated(
        numbers(student), numbers(teacher), labels.tolist(), 4.0, 0.9, [1, 0.5, 0.5], [False] * 3
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert {z.grad.dtype for z in student} == {dtype}


@pytest.mark.parametrize("of_student, of_teacher, of_loss", [
    (torch.float32, torch.float16, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64), (torch.float64, torch.float16, torch.float64),
])  # fmt: skip
def test_mixed_types_are_computed_in_float64_if_there_is_any_and_else_in_float32(
    of_student, of_teacher, of_loss
):
    student, teacher = logits(2, 4, 5, 1, dtype=of_student), logits(2, 4, 5, 2, dtype=of_teacher)
    labels = classes(4, 5)
    loss, terms = reference(student, teacher, labels, return_terms=True)
    wanted, _ = restated(
        numbers(student), numbers(teacher), labels.tolist(), 4.0, 0.9, [1, 0.5], [False] * 2
    )
    assert loss.dtype == terms.dtype == of_loss
    assert loss.item() == pytest.approx(wanted, rel=1e-5 if of_loss == torch.float32 else 1e-12)


def test_terms_are_detached_and_weigh_up_to_the_loss():
    student, teacher = (
        logits(3, 4, 5, 1, requires_grad=True),
        logits(3, 4, 5, 2, requires_grad=True),
    )
    marks = [False, True, True]
    loss, terms = reference(student, teacher, classes(4, 5), teacher_ce=marks, return_terms=True)
    assert terms.shape == (3, 3)
    assert not terms.requires_grad
    assert loss.requires_grad
    assert terms[0, 2] == 0
    weights = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    total = (weights * (0.9 * terms[:, 0] + 0.1 * terms[:, 1])).sum() + terms[1:, 2].sum()
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)


def test_the_inputs_are_left_as_they_were():
    student, teacher, labels = logits(2, 4, 5, 1), logits(2, 4, 5, 2), torch.tensor([0, -100, 2, 3])
    copies = [z.clone() for z in (*student, *teacher, labels)]
    reference(student, teacher, labels)
    assert all(torch.equal(a, b) for a, b in zip((*student, *teacher, labels), copies))


def test_strided_logits_and_tuples_are_taken():
    student = tuple(z.T.contiguous().T for z in logits(2, 4, 5, 1))
    teacher = tuple(z.repeat_interleave(2, dim=1)[:, ::2] for z in logits(2, 4, 5, 2))
    wanted = reference(logits(2, 4, 5, 1), logits(2, 4, 5, 2), classes(4, 5))
    assert reference(student, teacher, classes(4, 5)).item() == pytest.approx(
        wanted.item(), rel=1e-14
    )


def test_compiled_whole_it_gives_the_same_loss():
    student, teacher, labels = logits(2, 4, 5, 1), logits(2, 4, 5, 2), classes(4, 5)
    compiled = torch.compile(reference, fullgraph=True, backend="aot_eager")
    assert compiled(student, teacher, labels).item() == pytest.approx(
        reference(student, teacher, labels).item(), rel=1e-14
    )


def test_the_reference_backend_is_what_auto_computes():
    student, teacher, labels = logits(2, 4, 5, 1), logits(2, 4, 5, 2), classes(4, 5)
    wanted = mhkd.mhkd_loss(student, teacher, labels, backend="reference")
    assert mhkd.mhkd_loss(student, teacher, labels).item() == pytest.approx(
        wanted.item(), rel=1e-10
    )


A, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)

WRONG = [
    (TypeError, "a list", {"student_logits": A}),
    (TypeError, "a list", {"student_logits": A[None].repeat(1, 1, 1), "teacher_logits": A[None]}),
    (TypeError, "a list", {"teacher_logits": A[None]}),
    (ValueError, "lists differ.*0 student", {"student_logits": [], "teacher_logits": []}),
    (ValueError, "lists differ.*2 student logits, 1 teacher", {"student_logits": [A, A]}),
    (ValueError, "lists differ.*2 head weights", {"head_weights": [1.0, 1.0]}),
    (ValueError, "lists differ.*2 marks", {"teacher_ce": [True, True]}),
    (TypeError, "floating point.*int64", {"student_logits": [A.long()]}),
    (TypeError, "floating point.*int32", {"teacher_logits": [A.int()]}),
    (ValueError, r"\[4, 4\].*\[3, 4\]", {"teacher_logits": [torch.zeros(4, 4)]}),
    (ValueError, r"\[3, 5\].*\[3, 4\]", {"teacher_logits": [torch.zeros(3, 5)]}),
    (ValueError, r"\[\.\.\., K\]", {"student_logits": [A[:, :0]], "teacher_logits": [A[:, :0]]}),
    (ValueError, r"labels.*\[3\] for \[1, 3, 4\]", {
        "student_logits": [A[None]], "teacher_logits": [A[None]]}),
    (ValueError, r"labels.*\[\] for \[3, 4\]", {"labels": Y[0]}),
    (TypeError, "int64.*float32", {"labels": Y.float()}),
    (TypeError, "int64.*int32", {"labels": Y.int()}),
    (ValueError, r"labels.*\[2\] for \[3, 4\]", {"labels": Y[:2]}),
    (ValueError, r"labels.*\[3, 1\] for \[3, 4\]", {"labels": Y[:, None]}),
    (RuntimeError, "one device", {"teacher_logits": [A.to("meta")]}),
    (ValueError, "tau.*0", {"tau": 0.0}), (ValueError, "tau.*-1", {"tau": -1.0}),
    (ValueError, "tau.*nan", {"tau": NAN}), (ValueError, "tau.*inf", {"tau": INF}),
    (ValueError, "alpha.*nan", {"alpha": NAN}), (ValueError, "alpha.*1.1", {"alpha": 1.1}),
    (ValueError, "alpha.*-0.1", {"alpha": -0.1}),
    (TypeError, "alpha.*numbers", {"alpha": torch.tensor(0.5, requires_grad=True)}),
    (TypeError, "tau.*numbers", {"tau": torch.tensor(2.0)}),
    (ValueError, "weights.*nan", {"head_weights": [NAN]}),
    (ValueError, "weights.*-1", {"head_weights": [-1.0]}),
    (ValueError, "weights.*inf", {
        "beta": INF, "student_logits": [A, A], "teacher_logits": [A, A]}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, change", WRONG)
def test_arguments_that_make_no_sense_are_refused(error, message, change):
    arguments = {"student_logits": [A], "teacher_logits": [A], "labels": Y} | change
    with pytest.raises(error, match=message):
        reference(**arguments)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend.*'quick'"):
        mhkd.mhkd_loss([A], [A], Y, backend="quick")


def test_logits_of_a_language_model_are_rows_of_classes():
    student, teacher, labels = logits(2, 6, 5, 1), logits(2, 6, 5, 2), classes(6, 5)
    labels[3] = -100
    deep = [[z.view(2, 3, 5) for z in side] for side in (student, teacher)]
    found = reference(*deep, labels.view(2, 3))
    assert found.item() == reference(student, teacher, labels).item()


def test_kd_loss_leaves_out_the_rows_that_are_ignored():
    (z_s,), (z_t,), labels = (
        logits(1, 6, 5, 1),
        logits(1, 6, 5, 2),
        torch.tensor([0, 7, 1, 7, 2, 3]),
    )
    keep = labels != 7
    found = mhkd.kd_loss(
        z_s.view(2, 3, 5), z_t.view(2, 3, 5), labels=labels.view(2, 3), ignore_index=7
    )
    assert found.item() == pytest.approx(mhkd.kd_loss(z_s[keep], z_t[keep]).item(), rel=1e-12)


def test_the_fused_backend_is_refused_where_it_is_not_installed():
    if mhkd.loss_backend().startswith("fused"):
        pytest.skip("it is installed")
    with pytest.raises(RuntimeError, match="not installed"):
        mhkd.mhkd_loss([A], [A], Y, backend="fused")
