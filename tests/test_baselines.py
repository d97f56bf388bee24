"""The losses of the other authors' methods, each against its formula written out."""

import itertools
import math

import pytest
import torch

import mhkd
from mhkd_baselines import CRDLoss, binary_kl_norm_loss, cc_loss, lsh_loss, rkd_loss

B, K = 6, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def assert_same(loss, restated, *inputs):
    """Two scalars computed from the same leaves have one value and the same gradients."""
    torch.testing.assert_close(loss, restated, rtol=1e-10, atol=1e-12)
    settings = {"allow_unused": True, "materialize_grads": True}
    ours, theirs = (torch.autograd.grad(x, inputs, **settings) for x in (loss, restated))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_kd_loss_is_tau_squared_times_the_divergence():
    student, teacher, tau = random(B, K, scale=3), random(B, K, scale=3), 4.0
    p_s, p_t = (torch.softmax(z / tau, dim=1) for z in (student, teacher.detach()))
    restated = tau**2 * (p_t * (p_t / p_s).log()).sum() / B
    assert_same(mhkd.kd_loss(student, teacher, tau), restated, student, teacher)


def test_cc_loss_multiplies_the_differences_of_neighbours():
    student, teacher = random(B, 4), random(B, 4)
    delta = (student - teacher).abs()
    restated = sum(delta[i, d] * delta[i + 1, d] for i in range(B - 1) for d in range(4)) / (B - 1)
    assert_same(cc_loss(student, teacher), restated, student, teacher)


def test_rkd_loss_compares_all_distances_and_angles():
    student, teacher = random(B, 4), random(B, 3, scale=5)

    def smooth_l1(a, b):
        return (a - b).abs() - 0.5 if (a - b).abs() >= 1 else (a - b) ** 2 / 2

    def distances(x):
        pairs = itertools.permutations(range(B), 2)
        d = {(i, j): (x[i] - x[j]).square().sum().sqrt() for i, j in pairs}
        return {pair: value / (sum(d.values()) / len(d)) for pair, value in d.items()}

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / (a.norm() * b.norm()) if i not in (j, k) else torch.zeros((), dtype=x.dtype)

    d_s, d_t = distances(student), distances(teacher.detach())
    restated = 25 * sum(smooth_l1(d_s[pair], d_t[pair]) for pair in d_s) / B**2  # the diagonal is 0
    triplets = itertools.product(range(B), repeat=3)
    angles = [smooth_l1(cosine(student, *t), cosine(teacher.detach(), *t)) for t in triplets]
    assert_same(rkd_loss(student, teacher), restated + 50 * sum(angles) / B**3, student, teacher)


def test_rkd_loss_has_finite_gradients_where_embeddings_coincide():
    student, same = torch.randn(4, 3), torch.ones(4, 3, requires_grad=True)
    student[1] = student[0]
    rkd_loss(student.requires_grad_(), torch.randn(4, 3)).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e3
    rkd_loss(same, torch.ones(4, 3)).backward()
    assert same.grad.abs().max() == 0


@pytest.mark.parametrize("rows", [None, [0, 2, 3], []], ids=["all", "some", "none"])
def test_lsh_loss_is_the_cross_entropy_of_the_teachers_bits(rows):
    student, teacher = random(B, 4), random(B, 4)
    weight, bias = random(7, 4).detach(), random(7).detach()
    restated = 0 * student.sum()
    for b, h in itertools.product(range(B) if rows is None else rows, range(7)):
        p = 1 / (1 + torch.exp(-(weight[h] @ student[b] + bias[h])))
        bit = weight[h] @ teacher[b].detach() + bias[h] > 0
        restated = restated - (p if bit else 1 - p).log() / (len(rows or range(B)) * 7)
    counted = None if rows is None else torch.tensor([b in rows for b in range(B)])
    loss = lsh_loss(student, teacher, weight, bias, counted)
    assert_same(loss, restated, student, teacher)


def test_binary_kl_norm_loss_compares_every_class_with_a_fair_coin():
    student, teacher, tau = random(B, K, scale=4), random(B, K), 2.0
    restated = 0
    for z_s, z_t in zip(student.flatten(), teacher.detach().flatten()):
        p = 1 / (1 + torch.exp(-(z_s - z_t) / tau))
        restated = restated + tau**2 / B * 0.5 * ((0.5 / p).log() + (0.5 / (1 - p)).log())
    assert_same(binary_kl_norm_loss(student, teacher, tau), restated, student, teacher)


def test_binary_kl_norm_loss_stays_finite_at_huge_differences():
    student = torch.full((2, 3), 1e4, requires_grad=True)
    loss = binary_kl_norm_loss(student, -torch.ones(2, 3) * 1e4)
    loss.backward()
    assert loss.item() == pytest.approx(4 * 3 * (1e4 / 2 - math.log(2)), rel=1e-6)
    assert student.grad.isfinite().all()


# Contrastive representation distillation

N, DIM = 12, 4


def crd(**settings):
    torch.manual_seed(1)
    return CRDLoss(5, 3, N, DIM, tau=0.3, **settings).double()


def test_crd_loss_is_its_formula_with_the_normaliser_of_the_first_batch():
    module, Z = crd(), None
    for _ in range(3):
        student, teacher, indices = random(B, 5), random(B, 3), torch.randperm(N)[:B]
        contrast = torch.stack([torch.cat((i[None], torch.randperm(N)[:5])) for i in indices])
        banks = {"student": module.student_bank.clone(), "teacher": module.teacher_bank.clone()}
        v_s, v_t = module.embed_student(student), module.embed_teacher(teacher)
        v_s, v_t = (torch.stack([v / v.norm() for v in rows]) for rows in (v_s, v_t))
        restated, likeness = 0, []
        for anchors, bank in ((v_s, banks["teacher"]), (v_t, banks["student"])):
            scores = [[v @ bank[j] / 0.3 for j in row] for v, row in zip(anchors, contrast)]
            likeness.append(torch.stack([torch.stack(row) for row in scores]).exp())
        Z = Z or [N * values.detach().mean() for values in likeness]
        for values, z in zip(likeness, Z):
            for positive, *negatives in values / z:
                noise = 5 / N
                restated = restated - (positive / (positive + noise + 1e-7)).log() / B
                restated = restated - sum((noise / (p + noise + 1e-7)).log() for p in negatives) / B
        loss = module(student, teacher, indices, contrast)
        # Its backward runs here, after the banks have moved on.
        assert_same(loss, restated, student, teacher, *module.parameters())
        for name, new in (("student", v_s), ("teacher", v_t)):
            expected = banks[name].clone()
            for row, i in zip(new.detach(), indices):
                mixed = 0.5 * banks[name][i] + 0.5 * row
                expected[i] = mixed / mixed.norm()
            torch.testing.assert_close(getattr(module, f"{name}_bank"), expected)


def test_crd_banks_begin_uniform_are_part_of_the_state_and_rest_in_eval_mode():
    module = CRDLoss(5, 3, 2000, 128)
    bound = 1 / math.sqrt(128 / 3)
    for bank in (module.student_bank, module.teacher_bank):
        assert bank.abs().max() <= bound
        assert bank.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    module = crd().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert {"student_bank", "teacher_bank", "normaliser"} <= before.keys()
    module(random(2, 5), random(2, 3), torch.tensor([0, 1]), torch.tensor([[0, 2, 3], [1, 4, 5]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


LABELS = torch.arange(200) % 7  # classes of 28 or 29


@pytest.mark.parametrize("negatives", [20, 150, 172, 190, 1000])
def test_crd_draws_of_other_classes_none_twice_or_every_one_where_there_are_too_few(negatives):
    module = CRDLoss(5, 3, 200, negatives=negatives, labels=LABELS)
    indices = torch.randperm(200)
    contrast = module.draw(indices)
    assert contrast.shape == (200, 1 + negatives) and torch.equal(contrast[:, 0], indices)
    for own, *drawn in contrast.tolist():
        assert all(LABELS[drawn] != LABELS[own])
        assert len({*drawn}) == min(negatives, (LABELS != LABELS[own]).sum())


def test_crd_negatives_are_uniform_over_the_other_classes():
    module = CRDLoss(5, 3, 200, negatives=20, labels=LABELS)
    drawn = module.draw(torch.zeros(3000, dtype=torch.int64))[:, 1:]
    others = LABELS != LABELS[0]
    counts = torch.bincount(drawn.flatten(), minlength=200)[others]
    expected = drawn.numel() / others.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < others.sum() + 5 * math.sqrt(2 * others.sum())


def test_crd_without_labels_or_contrast_and_with_one_class_is_refused():
    with pytest.raises(ValueError, match="labels"):
        crd()(random(2, 5), random(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one class"):
        crd(labels=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[12\]"):
        crd(labels=torch.arange(N + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_those_of_the_same_numbers_in_float32(dtype):
    s, t = torch.randn(64, 512).to(dtype).requires_grad_(), torch.randn(64, 512).to(dtype)
    for loss in (lambda s, t: rkd_loss(s, t, 25.0, 0.0), rkd_loss, cc_loss, binary_kl_norm_loss):
        full = s.detach().float().requires_grad_()
        found, wanted = loss(s, t), loss(full, t.float())
        assert found.item() == wanted.item() != 0
        gradients = [torch.autograd.grad(z, x)[0] for z, x in ((found, s), (wanted, full))]
        torch.testing.assert_close(gradients[0], gradients[1].to(dtype))


def test_shapes_that_would_be_broadcast_or_summed_over_another_dimension_are_refused():
    wrong = [((4, 5), (4, 1)), ((4, 3, 5), (4, 3, 5)), ((4, 5), (1, 5)), ((5,), (5,))]
    for loss in (cc_loss, binary_kl_norm_loss, rkd_loss):
        for shapes in wrong[loss is rkd_loss :]:  # the widths may differ for rkd
            with pytest.raises(ValueError, match=f"{loss.__name__}: student and teacher must be"):
                loss(*(torch.ones(shape) for shape in shapes))
