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


def restated(student, teacher, labels, tau=4.0, alpha=0.9, weights=None, marked=None):
    """The loss and the terms of equations 1 and 2 as they are written, number after number."""

    def log_softmax(row, temperature):
        scaled = [float(z) / temperature for z in row]
        top = max(scaled)
        log_sum = math.log(sum(math.exp(z - top) for z in scaled))
        return [z - top - log_sum for z in scaled]

    weights = weights or [1.0] + [0.5] * (len(student) - 1)
    labels = labels.tolist()
    rows = [b for b, label in enumerate(labels) if label != -100]
    labelled = [b for b in rows if labels[b] != mhkd.UNLABELLED]
    loss, terms = 0.0, []
    for z_s, z_t, weight, mark in zip(student, teacher, weights, marked or [False] * len(student)):
        z_s, z_t = z_s.tolist(), z_t.tolist()
        kl = ce = ce_t = 0.0
        for b in rows:
            pairs = zip(log_softmax(z_t[b], tau), log_softmax(z_s[b], tau))
            kl += sum(math.exp(t) * (t - s) for t, s in pairs if t > -INF) / len(rows)
        for b in labelled:
            ce -= log_softmax(z_s[b], 1.0)[labels[b]] / len(labelled)
            ce_t -= log_softmax(z_t[b], 1.0)[labels[b]] / len(labelled) if mark else 0.0
        loss += weight * (alpha * tau**2 * kl + (1 - alpha) * ce) + ce_t
        terms.append([tau**2 * kl, ce, ce_t])
    return loss, terms


def approx(wanted, rel=1e-12):
    return pytest.approx(wanted if isinstance(wanted, float) else wanted.item(), rel=rel)


def logits(H, B, K, seed=0, scale=3.0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(H, B, K, generator=generator, dtype=torch.float64)
    return [z.to(device, dtype).clone() for z in scale * made]


def heads(H=2, B=4, K=5, *, grads="", device="cpu", **kw):
    """Student's logits, teacher's, labels; grads: "s" and "t" for the side that asks for them."""
    student, teacher = (
        logits(H, B, K, 1, device=device, **kw),
        logits(H, B, K, 2, device=device, **kw),
    )
    for side in [student] * ("s" in grads) + [teacher] * ("t" in grads):
        for z in side:
            z.requires_grad_(True)
    labels = torch.randint(K, (B,), generator=torch.Generator().manual_seed(5))
    return student, teacher, labels.to(device)


@settings(max_examples=60, deadline=None)
@given(
    H=st.integers(1, 4), B=st.integers(1, 6), K=st.integers(1, 7), tau=st.floats(0.5, 20),
    alpha=st.floats(0, 1), beta=st.floats(0, 5), scale=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 1000), data=st.data(),
)  # fmt: skip
def test_loss_and_terms_are_those_of_the_equations(H, B, K, tau, alpha, beta, scale, seed, data):
    student, teacher = logits(H, B, K, seed, scale), logits(H, B, K, seed + 1, scale)
    labels = data.draw(st.lists(st.sampled_from([-100, -1, *range(K)]), min_size=B, max_size=B))
    labels = torch.tensor([data.draw(st.sampled_from([-1, 0])), *labels[1:]])
    marked = data.draw(st.lists(st.booleans(), min_size=H, max_size=H))
    kw = {"tau": tau, "alpha": alpha, "beta": beta, "teacher_ce": marked, "return_terms": True}
    loss, terms = reference(student, teacher, labels, **kw)
    weights = [1.0] + [beta] * (H - 1)
    wanted, wanted_terms = restated(student, teacher, labels, tau, alpha, weights, marked)
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(terms.numpy(), wanted_terms, rtol=1e-9, atol=1e-9)


def test_defaults_are_the_papers_tau_4_alpha_nine_tenths_and_beta_one_half():
    call = heads(3)
    assert reference(*call).item() == approx(restated(*call)[0])


def test_head_weights_stand_in_the_place_of_beta(device):
    call, weights = heads(3, device=device), [0.3, 2.0, 0.0]
    loss = reference(*call, beta=100.0, head_weights=weights)
    assert loss.item() == approx(restated(*call, weights=weights)[0])


def test_kl_weights_and_ce_weights_are_the_coefficients_of_each_heads_two_terms(device):
    call, kl, ce = heads(3, device=device), [0.0, 2.0, 0.5], [1.0, 0.0, 3.0]
    loss, terms = reference(*call, kl_weights=kl, ce_weights=ce, beta=7.0, return_terms=True)
    wanted = sum(a * t[0] + b * t[1] for a, b, t in zip(kl, ce, terms))
    assert loss.item() == approx(wanted.item())
    assert reference(*call, kl_weights=[0.9, 0.45, 0.45]).item() == approx(reference(*call).item())
    assert reference(*call, ce_weights=[1, 0, 0], alpha=1.0, beta=0.0).item() == approx(
        (terms[0, 0] + terms[0, 1]).item()
    )


@pytest.mark.parametrize("others", [[0, 3], [0, -1], [-1, -1]])
@pytest.mark.parametrize("ignore", [-100, 2])
def test_gradcheck_on_the_students_logits(ignore, others):
    student, teacher, _ = heads(3, grads="s")
    labels = torch.tensor([others[0], ignore, *others])
    kw = {"tau": 3.0, "alpha": 0.7, "beta": 0.4, "ignore_index": ignore}
    assert torch.autograd.gradcheck(lambda *z: reference(z, teacher, labels, **kw), student)


@pytest.mark.parametrize("keywords", [
    {"beta": 7.0}, {"alpha": 0.0, "beta": 9.0}, {"head_weights": [0.0] * 3}, {},
])  # fmt: skip
def test_a_marked_teacher_head_learns_from_its_own_cross_entropy_with_weight_1(device, keywords):
    student, teacher, labels = heads(3, grads="st", device=device)
    reference(student, teacher, labels, teacher_ce=[False, True, True], **keywords).backward()
    assert teacher[0].grad is None or not teacher[0].grad.any()
    for z in teacher[1:]:
        (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels), z)
        assert torch.equal(z.grad, wanted)


def test_without_marks_the_teacher_logits_that_require_a_gradient_are_marked():
    call = heads(3)
    call[1][1].requires_grad_(True)
    found = reference(*call)
    assert found.item() == reference(*call, teacher_ce=[False, True, False]).item()
    assert found.item() != reference(*call, teacher_ce=[False] * 3).item()


def test_a_step_sends_no_gradient_to_the_teachers_backbone_and_one_to_its_heads():
    torch.manual_seed(0)
    student, teacher = (
        mhkd.MultiHead(mhkd.build_model("resnet8", 4), ["layer1"], 4, width=4, **kw).train()
        for kw in ({}, {"frozen": True})
    )
    x = torch.randn(4, 3, 16, 16)
    reference(student(x), teacher(x), torch.arange(4)).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for p in teacher.heads.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_logits_of_a_thousand_do_not_overflow(device):
    call = heads(scale=1e3, dtype=torch.float32, device=device, grads="s")
    loss = reference(*call)
    loss.backward()
    assert loss.item() == approx(restated(*call)[0], rel=1e-5)
    assert all(z.grad.isfinite().all() for z in call[0])


@pytest.mark.parametrize("ignore", [-100, 2])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_count_nowhere_whatever_they_hold(device, ignore, poison):
    student, teacher, labels = heads(B=6, device=device)
    labels[[0, 3]] = ignore
    keep = labels != ignore
    marked = {"teacher_ce": [True, True]}
    wanted = reference(
        [z[keep] for z in student], [z[keep] for z in teacher], labels[keep], **marked
    )
    for z in (*student, *teacher):
        z[~keep] = poison
        z.requires_grad_(True)
    loss = reference(student, teacher, labels, ignore_index=ignore)
    loss.backward()
    assert loss.item() == approx(wanted)
    assert all(z.grad.isfinite().all() and not z.grad[~keep].any() for z in (*student, *teacher))


def test_unlabelled_rows_count_for_the_divergence_alone(device):
    student, teacher, labels = heads(B=6, device=device, grads="st")
    labels[[0, 3]], labels[4] = mhkd.UNLABELLED, -100
    keep = labels >= 0
    kw = {"teacher_ce": [True] * 2, "return_terms": True}
    loss, terms = reference(student, teacher, labels, **kw)
    _, of_labelled = reference([z[keep] for z in student], [z[keep] for z in teacher], labels[keep],
        **kw)  # fmt: skip
    _, of_all = reference(student, teacher, labels.clamp(min=0).where(labels != -100, -100), **kw)
    torch.testing.assert_close(terms[:, 1:], of_labelled[:, 1:])
    torch.testing.assert_close(terms[:, 0], of_all[:, 0])
    loss.backward()
    assert all(z.grad[[0, 3]].all() for z in student)
    assert not any(z.grad[[0, 3]].any() for z in teacher)


def test_without_labels_all_rows_are_unlabelled_and_the_cross_entropies_are_zero(device):
    student, teacher, labels = heads(3, device=device, grads="st")
    kw = {"teacher_ce": [True] * 3, "return_terms": True}
    loss, terms = reference(student, teacher, None, ignore_index=-1, **kw)
    same, _ = reference(student, teacher, torch.full_like(labels, mhkd.UNLABELLED), **kw)
    divergence = reference(student, teacher, labels, ce_weights=[0] * 3, teacher_ce=[False] * 3)
    assert not terms[:, 1:].any() and terms[:, 0].all()
    assert loss.item() == same.item() == approx(divergence)
    loss.backward()
    for z, wanted in zip(student, torch.autograd.grad(divergence, student)):
        torch.testing.assert_close(z.grad, wanted)
    assert all(z.grad is None or not z.grad.any() for z in teacher)
    deep = [[z.view(2, 2, 5) for z in side] for side in (student, teacher)]
    assert reference(*deep, None, teacher_ce=[False] * 3).item() == approx(divergence)


def test_maps_without_labels_and_what_is_no_tensor_are_refused():
    z = torch.ones(2, 4, 3, 3)
    with pytest.raises(ValueError, match="mhkd.kd_loss"):
        mhkd.mhkd_loss([z], [z], None, alpha=1.0)
    one = torch.ones(2, 5)
    for student, labels in (([one], [0, 1]), ([[one]], torch.tensor([0, 1])), (([one], one), None)):
        with pytest.raises(TypeError, match="must be tensors"):
            mhkd.mhkd_loss(student, [one] * len(student), labels)


def test_unlabelled_rows_are_ignored_if_their_label_is_the_ignored_one():
    student, teacher, labels = heads(B=6)
    labels[[0, 3]] = mhkd.UNLABELLED
    keep = labels >= 0
    wanted = reference([z[keep] for z in student], [z[keep] for z in teacher], labels[keep])
    assert reference(student, teacher, labels, ignore_index=-1).item() == approx(wanted)


def test_nan_in_an_unlabelled_row_reaches_only_the_divergence():
    student, teacher, labels = heads(1, grads="st")
    labels[2] = mhkd.UNLABELLED
    student[0].data[2, 0] = teacher[0].data[2, 1] = NAN
    kw = {"teacher_ce": [True], "kl_weights": [0.0]}
    loss, terms = reference(student, teacher, labels, return_terms=True, **kw)
    loss.backward()
    assert loss.isfinite() and terms[0].isnan().tolist() == [True, False, False]
    assert not student[0].grad[2].any() and not teacher[0].grad[2].any()


def test_nan_in_a_row_that_counts_makes_the_loss_nan_and_leaves_the_other_rows_gradients():
    student, teacher, labels = heads(1, grads="s")
    (wanted,) = torch.autograd.grad(reference(student, teacher, labels), student)
    student[0].data[2, 0] = NAN
    loss = reference(student, teacher, labels)
    (found,) = torch.autograd.grad(loss, student)
    assert loss.isnan()
    assert torch.equal(found[[0, 1, 3]], wanted[[0, 1, 3]])


@pytest.mark.parametrize("batch", [0, 3])
def test_with_no_row_that_counts_the_loss_and_terms_are_nan(batch):
    student, teacher, labels = heads(B=batch)
    loss, terms = reference(student, teacher, labels.fill_(-100), return_terms=True)
    assert loss.isnan()
    assert terms[:, :2].isnan().all()


def test_classes_masked_on_both_sides_contribute_nothing_and_get_no_gradient(device):
    cut = heads(device=device)
    student, teacher = (
        [torch.nn.functional.pad(z, (0, 1), value=-INF).requires_grad_() for z in side]
        for side in cut[:2]
    )
    loss = reference(student, teacher, cut[2], teacher_ce=[False, False])
    loss.backward()
    assert loss.item() == approx(reference(*cut))
    assert all(z.grad.isfinite().all() and not z.grad[:, 5].any() for z in student)


def test_a_class_that_only_the_teacher_excludes_contributes_nothing_to_the_divergence():
    student, teacher, labels = heads(1, 3, 4)
    labels = labels.clamp(max=2)
    teacher[0][:, 3] = -INF
    loss, terms = reference(student, teacher, labels, return_terms=True)
    wanted, wanted_terms = restated(student, teacher, labels)
    assert loss.item() == approx(wanted)
    np.testing.assert_allclose(terms.numpy(), wanted_terms, rtol=1e-12)


def test_a_class_that_only_the_student_excludes_makes_the_divergence_infinite_if_it_counts():
    student, teacher, labels = heads(1, 3, 4)
    labels = labels.clamp(max=2)
    student[0][1, 3] = -INF
    loss, terms = reference(student, teacher, labels, return_terms=True)
    assert loss.item() == terms[0, 0].item() == INF
    ce = torch.nn.functional.cross_entropy(student[0], labels)
    assert terms[0, 1].item() == approx(ce)
    assert reference(student, teacher, labels, alpha=0.0).item() == approx(ce)


@pytest.mark.parametrize("of_student, of_teacher, of_loss", [
    (torch.float16, torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64), (torch.float64, torch.float16, torch.float64),
])  # fmt: skip
def test_the_arithmetic_is_float64_if_any_logits_are_and_else_float32(
    of_student, of_teacher, of_loss, device
):
    student, teacher, labels = heads(device=device)
    student = [z.to(of_student).requires_grad_() for z in student]
    teacher = [z.to(of_teacher) for z in teacher]
    loss, terms = reference(student, teacher, labels, return_terms=True)
    loss.backward()
    wanted, _ = restated(student, teacher, labels)
    assert loss.dtype == terms.dtype == of_loss
    assert loss.item() == approx(wanted, rel=1e-5 if of_loss == torch.float32 else 1e-12)
    assert {z.grad.dtype for z in student} == {of_student}


def test_terms_are_detached_and_weigh_up_to_the_loss():
    marks = [False, True, True]
    loss, terms = reference(*heads(3, grads="st"), teacher_ce=marks, return_terms=True)
    assert terms.shape == (3, 3)
    assert loss.requires_grad and not terms.requires_grad
    assert terms[0, 2] == 0
    weights = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    total = (weights * (0.9 * terms[:, 0] + 0.1 * terms[:, 1])).sum() + terms[1:, 2].sum()
    assert loss.item() == approx(total)


def test_strided_logits_and_tuples_are_taken_and_the_inputs_left_as_they_were():
    student, teacher, labels = heads()
    labels[1] = -100
    strided = tuple(z.T.contiguous().T for z in student)
    every_other = tuple(z.repeat_interleave(2, dim=1)[:, ::2] for z in teacher)
    copies = [z.clone() for z in (*student, *teacher, labels)]
    wanted = reference(student, teacher, labels)
    assert reference(strided, every_other, labels).item() == approx(wanted, rel=1e-14)
    given = (*strided, *every_other, labels)
    assert all(torch.equal(a, b) for a, b in zip(given, copies))


def test_compiled_whole_it_gives_the_same_loss():
    call = heads()
    compiled = torch.compile(reference, fullgraph=True, backend="aot_eager")
    assert compiled(*call).item() == approx(reference(*call), rel=1e-14)


A, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)

WRONG = [
    (TypeError, "a list", {"student_logits": A}),
    (TypeError, "a list", {"student_logits": A[None].repeat(1, 1, 1), "teacher_logits": A[None]}),
    (TypeError, "a list", {"teacher_logits": A[None]}),
    (ValueError, "lists differ.*0 student", {"student_logits": [], "teacher_logits": []}),
    (ValueError, "lists differ.*2 student logits, 1 teacher", {"student_logits": [A, A]}),
    (ValueError, "lists differ.*2 head_weights", {"head_weights": [1.0, 1.0]}),
    (ValueError, "lists differ.*2 teacher_ce", {"teacher_ce": [True, True]}),
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
    (ValueError, "backend.*'quick'", {"backend": "quick"}),
    (ValueError, "weights.*nan", {"head_weights": [NAN]}),
    (ValueError, "weights.*-1", {"head_weights": [-1.0]}),
    (ValueError, "lists differ.*2 kl_weights", {"kl_weights": [1.0, 1.0]}),
    (ValueError, "ce_weights.*-1", {"ce_weights": [-1.0]}),
    (TypeError, "weights must be numbers", {"kl_weights": [torch.tensor(1.0)]}),
    (ValueError, "teacher_ce must contain True or False", {"teacher_ce": [0.5]}),
    (ValueError, "teacher_ce must contain True or False", {"teacher_ce": [None]}),
    (ValueError, "weights.*inf", {
        "beta": INF, "student_logits": [A, A], "teacher_logits": [A, A]}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, change", WRONG)
def test_arguments_that_make_no_sense_are_refused_by_both_backends_in_one_sentence(
    error, message, change
):
    said = set()
    for backend in ["reference"] + ["fused"] * mhkd.loss_backend().startswith("fused"):
        arguments = {"student_logits": [A], "teacher_logits": [A], "labels": Y, "backend": backend}
        with pytest.raises(error, match=message) as caught:
            mhkd.mhkd_loss(**arguments | change)
        said.add(str(caught.value))
    (sentence,) = said
    assert len(sentence) < 160


def test_logits_of_a_language_model_are_rows_of_classes():
    student, teacher, labels = heads(B=6)
    labels[3] = -100
    deep = [[z.view(2, 3, 5) for z in side] for side in (student, teacher)]
    found = reference(*deep, labels.view(2, 3))
    assert found.item() == reference(student, teacher, labels).item()


def test_kd_loss_leaves_out_the_rows_that_are_ignored():
    (z_s,), (z_t,), _ = heads(1, 6)
    labels = torch.tensor([0, 7, 1, 7, 2, 3])
    keep = labels != 7
    deep = z_s.view(2, 3, 5), z_t.view(2, 3, 5)
    found = mhkd.kd_loss(*deep, labels=labels.view(2, 3), ignore_index=7)
    assert found.item() == approx(mhkd.kd_loss(z_s[keep], z_t[keep]))
    labels[labels != 7] = mhkd.UNLABELLED
    assert found.item() == mhkd.kd_loss(*deep, labels=labels.view(2, 3), ignore_index=7).item()
