"""The methods beside MHKD: each loss against its formula written out, each method trained, killed and resumed."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SCRIPT, TINY
from torch import nn

import mhkd

B, K = 6, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def assert_same_value_and_gradients(loss, restated, inputs):
    """Two scalars computed from the same leaves."""
    torch.testing.assert_close(loss, restated, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, inputs, allow_unused=True, materialize_grads=True) for x in (loss, restated))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


# The losses


def test_kd_loss_is_tau_squared_times_the_divergence():
    student, teacher, tau = random(B, K, scale=3), random(B, K, scale=3), 4.0
    restated = 0
    for z_s, z_t in zip(student, teacher.detach()):
        p_s, p_t = (torch.exp(z / tau) / torch.exp(z / tau).sum() for z in (z_s, z_t))
        restated = restated + sum(p_t[k] * (p_t[k] / p_s[k]).log() for k in range(K)) * tau**2 / B
    assert_same_value_and_gradients(mhkd.kd_loss(student, teacher, tau), restated, [student, teacher])


def test_cc_loss_multiplies_the_differences_of_neighbours():
    student, teacher = random(B, 4), random(B, 4)
    delta = (student - teacher).abs()
    restated = sum(delta[i, d] * delta[i + 1, d] for i in range(B - 1) for d in range(4)) / (B - 1)
    assert_same_value_and_gradients(mhkd.cc_loss(student, teacher), restated, [student, teacher])


def smooth_l1(a, b):
    return (a - b).abs() - 0.5 if (a - b).abs() >= 1 else (a - b) ** 2 / 2


def test_rkd_loss_compares_all_distances_and_angles():
    student, teacher = random(B, 4), random(B, 3, scale=5)

    def distances(x):
        d = {(i, j): (x[i] - x[j]).square().sum().sqrt() for i, j in itertools.permutations(range(B), 2)}
        return {pair: value / (sum(d.values()) / len(d)) for pair, value in d.items()}

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / (a.norm() * b.norm()) if i not in (j, k) else torch.zeros((), dtype=x.dtype)

    d_s, d_t = distances(student), distances(teacher.detach())
    restated = 25 * sum(smooth_l1(d_s[pair], d_t[pair]) for pair in d_s) / B**2  # the diagonal is 0
    triplets = itertools.product(range(B), repeat=3)
    angles = [smooth_l1(cosine(student, *t), cosine(teacher.detach(), *t)) for t in triplets]
    restated = restated + 50 * sum(angles) / B**3
    assert_same_value_and_gradients(mhkd.rkd_loss(student, teacher), restated, [student, teacher])


def test_rkd_loss_has_finite_gradients_where_embeddings_coincide():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    student[1] = student[0]
    student.requires_grad_()
    mhkd.rkd_loss(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e3
    same = torch.ones(4, 3, requires_grad=True)
    mhkd.rkd_loss(same, torch.ones(4, 3)).backward()
    assert same.grad.abs().max() == 0


@pytest.mark.parametrize("counted", [None, [True, False, True, True, False, False]])
def test_lsh_loss_is_the_cross_entropy_of_the_teachers_bits(counted):
    student, teacher, weight, bias = random(B, 4), random(B, 4), random(7, 4).detach(), random(7).detach()
    rows = [b for b in range(B) if counted is None or counted[b]]
    restated = 0
    for b in rows:
        for h in range(7):
            p = 1 / (1 + torch.exp(-(weight[h] @ student[b] + bias[h])))
            bit = weight[h] @ teacher[b].detach() + bias[h] > 0
            restated = restated - (p if bit else 1 - p).log() / (len(rows) * 7)
    counted = None if counted is None else torch.tensor(counted)
    loss = mhkd.lsh_loss(student, teacher, weight, bias, counted)
    assert_same_value_and_gradients(loss, restated, [student, teacher])


def test_lsh_loss_of_no_counted_row_is_zero_and_so_are_its_gradients():
    student = random(B, 4)
    settings = random(B, 4), random(7, 4).detach(), random(7).detach()
    loss = mhkd.lsh_loss(student, *settings, torch.zeros(B, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_binary_kl_norm_loss_compares_every_class_with_a_fair_coin():
    student, teacher, tau = random(B, K, scale=4), random(B, K), 2.0
    restated = 0
    for z_s, z_t in zip(student.flatten(), teacher.detach().flatten()):
        p = 1 / (1 + torch.exp(-(z_s - z_t) / tau))
        restated = restated + tau**2 / B * 0.5 * ((0.5 / p).log() + (0.5 / (1 - p)).log())
    assert_same_value_and_gradients(mhkd.binary_kl_norm_loss(student, teacher, tau), restated, [student, teacher])


def test_binary_kl_norm_loss_stays_finite_at_huge_differences():
    student = torch.full((2, 3), 1e4, requires_grad=True)
    loss = mhkd.binary_kl_norm_loss(student, -torch.ones(2, 3) * 1e4)
    loss.backward()
    assert loss.item() == pytest.approx(4 * 3 * (1e4 / 2 - math.log(2)), rel=1e-6)
    assert student.grad.isfinite().all()


# Contrastive representation distillation

N, DIM = 12, 4


def crd(**settings):
    torch.manual_seed(1)
    return mhkd.CRDLoss(5, 3, N, DIM, tau=0.3, **settings).double()


def test_crd_loss_is_its_formula_with_the_normaliser_of_the_first_batch():
    module = crd()
    Z = None
    for _ in range(3):
        student, teacher, indices = random(B, 5), random(B, 3), torch.randperm(N)[:B]
        contrast = torch.stack([torch.cat((i[None], torch.randperm(N)[:5])) for i in indices])
        banks = {"student": module.student_bank.clone(), "teacher": module.teacher_bank.clone()}
        v_s = torch.stack([module.embed_student(f) / module.embed_student(f).norm() for f in student])
        v_t = torch.stack([module.embed_teacher(f) / module.embed_teacher(f).norm() for f in teacher])
        restated, likeness = 0, {}
        for name, anchors, bank in (("s", v_s, banks["teacher"]), ("t", v_t, banks["student"])):
            likeness[name] = [[torch.exp(v @ bank[j] / 0.3) for j in row] for v, row in zip(anchors, contrast)]
        if Z is None:
            Z = {k: N * torch.stack([x for row in v for x in row]).detach().mean() for k, v in likeness.items()}
        for name, rows in likeness.items():
            for positive, *negatives in [[x / Z[name] for x in row] for row in rows]:
                noise = 5 / N
                restated = restated - (positive / (positive + noise + 1e-7)).log() / B
                restated = restated - sum((noise / (p + noise + 1e-7)).log() for p in negatives) / B
        parameters = [student, teacher, *module.parameters()]
        assert_same_value_and_gradients(module(student, teacher, indices, contrast), restated, parameters)
        for name, new in (("student", v_s), ("teacher", v_t)):
            expected = banks[name].clone()
            for row, i in zip(new.detach(), indices):
                mixed = 0.5 * banks[name][i] + 0.5 * row
                expected[i] = mixed / mixed.norm()
            torch.testing.assert_close(getattr(module, f"{name}_bank"), expected)


def test_crd_banks_begin_uniform_are_part_of_the_state_and_rest_in_eval_mode():
    module = mhkd.CRDLoss(5, 3, 2000, 128)
    bound = 1 / math.sqrt(128 / 3)
    for bank in (module.student_bank, module.teacher_bank):
        assert bank.abs().max() <= bound and bank.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert {"student_bank", "teacher_bank", "normaliser"} <= set(module.state_dict())
    module = crd().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(random(2, 5), random(2, 3), torch.tensor([0, 1]), torch.tensor([[0, 2, 3], [1, 4, 5]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_crd_backward_may_run_again_after_the_banks_have_moved_on():
    module, student, teacher = crd(), random(2, 5), random(2, 3)
    loss = module(student, teacher, torch.tensor([0, 1]), torch.tensor([[0, 2, 3], [1, 4, 5]]))
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


LABELS = torch.arange(200) % 7  # classes of 28 or 29


def test_crd_negatives_are_never_of_the_anchors_class_and_never_twice():
    module = mhkd.CRDLoss(5, 3, 200, negatives=150, labels=LABELS)
    for _ in range(20):
        indices = torch.randperm(200)[:16]
        contrast = module.draw(indices)
        assert contrast.shape == (16, 151) and torch.equal(contrast[:, 0], indices)
        assert (LABELS[contrast[:, 1:]] != LABELS[indices, None]).all()
        assert all(len(row.unique()) == 150 for row in contrast[:, 1:])


@pytest.mark.parametrize("negatives", [172, 190, 1000])
def test_crd_draws_every_other_sample_and_some_again_where_there_are_too_few(negatives):
    module = mhkd.CRDLoss(5, 3, 200, negatives=negatives, labels=LABELS)
    indices = torch.arange(200)
    contrast = module.draw(indices)[:, 1:]
    assert contrast.shape == (200, negatives)
    assert (LABELS[contrast] != LABELS[:, None]).all()
    for row, label in zip(contrast, LABELS):
        assert len(row.unique()) == min(negatives, (LABELS != label).sum())


def test_crd_negatives_are_uniform_over_the_other_classes():
    module = mhkd.CRDLoss(5, 3, 200, negatives=20, labels=LABELS)
    counts = torch.zeros(200)
    for _ in range(300):
        counts += torch.bincount(module.draw(torch.zeros(10, dtype=torch.int64))[:, 1:].flatten(), minlength=200)
    others = LABELS != LABELS[0]
    expected = 300 * 10 * 20 / others.sum()
    chi_squared = ((counts[others] - expected) ** 2 / expected).sum()
    assert chi_squared < others.sum() + 5 * math.sqrt(2 * others.sum())


def test_crd_without_labels_or_contrast_and_with_one_class_is_refused():
    with pytest.raises(ValueError, match="labels"):
        crd()(random(2, 5), random(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one class"):
        crd(labels=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[12\]"):
        crd(labels=torch.arange(N + 1))


# The methods, built as a run builds them


def make_data(size=64, image_size=16, classes=K):
    images = torch.randint(256, (size, image_size, image_size, 3), dtype=torch.uint8)
    labels = torch.arange(size) % classes
    return mhkd.Data(images, labels, images, labels, [""] * classes, (0.5,) * 3, (0.25,) * 3, "")


def make(method, teacher="wrn_16_2", student="resnet8", data=None, **settings):
    """Distiller and a batch of images, labels, indices."""
    settings = {"dataset": "digits", "head_width": 8, "negatives": 20, **settings}
    config = mhkd.resolve(mhkd.Config(teacher=teacher, student=student, method=method, **settings))
    data = data or make_data(image_size=config.image_size)
    torch.manual_seed(3)
    distiller = mhkd.build_distiller(config, mhkd.build_model(teacher, K), data).train()
    batch = next(mhkd.epoch_batches(data, config, torch.Generator().manual_seed(0)))
    return distiller, batch


COMBINED = ("crd+mhkd", "crd+dhkd", "fitnet+cc+rkd+mhkd")
PAIRS = [("wrn_16_2", "resnet8"), ("vgg8", "mobilenetv2"), ("resnet8x4", "shufflenetv2"), ("mobilenetv2", "vgg8")]


@pytest.mark.parametrize("method", [*mhkd.METHODS, *COMBINED])
@pytest.mark.parametrize("teacher, student", PAIRS)
def test_a_step_of_every_method_reaches_the_student_and_what_it_adds_and_spares_the_teacher(method, teacher, student):
    distiller, batch = make(method, teacher, student, image_size=32, batch_size=8)
    terms, logits = distiller(*batch)
    assert logits.shape == (8, K) and all(term.isfinite() and term.dim() == 0 for term in terms.values())
    distiller.backward(terms)
    for name, parameter in distiller.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
    assert any(p.grad.any() for p in distiller.student.parameters())


@pytest.mark.parametrize(
    "student, teacher", list(itertools.permutations(["resnet8", "vgg8", "mobilenetv2", "shufflenetv2"], 2))
)
@pytest.mark.parametrize("image_size", [16, 17, 33, 48])
def test_fitnets_regressor_fits_maps_of_every_size(student, teacher, image_size):
    distiller, (images, *_) = make("fitnet", teacher, student, image_size=image_size)
    images = images[:2]
    fitnet = distiller.objective.methods[0]
    (f_s,), (f_t,) = (tuple(n(images).features.values()) for n in (distiller.student, distiller.teacher))
    assert fitnet.regressor(f_s).shape == f_t.shape


def test_fitnets_hints_are_those_of_the_benchmark_and_its_regressor_changes_sizes_as_there():
    config = mhkd.Config(teacher="vgg13", student="wrn_16_2")
    assert mhkd.FitNet.units(config, "teacher") == ("block2",)
    assert mhkd.FitNet.units(config, "student") == ("block2",)
    assert mhkd.FitNet.units(mhkd.Config(student="mobilenetv2"), "student") == ("blocks.2",)
    for teacher, student, kind, kernel in (
        ("vgg8", "resnet8", nn.Conv2d, 3),  # 16 to 8
        ("resnet8", "vgg8", nn.ConvTranspose2d, 4),  # 8 to 16
        ("resnet8", "wrn_16_2", nn.Conv2d, 1),
    ):
        conv = make("fitnet", teacher, student, image_size=32)[0].objective.methods[0].regressor[0]
        assert type(conv) is kind and conv.kernel_size == (kernel, kernel)


@pytest.mark.parametrize("method, gamma, alpha", [("fitnet", 1, 1), ("cc", 1, 1), ("rkd", 1, 1), ("crd", 1, 1)])
def test_the_benchmarks_methods_add_their_weighted_term_to_cross_entropy_and_divergence(method, gamma, alpha):
    distiller, batch = make(method)
    terms, logits = distiller(*batch)
    torch.testing.assert_close(terms["ce"], gamma * nn.functional.cross_entropy(logits, batch[1]))
    torch.testing.assert_close(terms["kd"], alpha * mhkd.kd_loss(logits, distiller.teacher(batch[0]).logits, 4.0))
    assert set(terms) == {"ce", "kd", method}
    default = getattr(mhkd.Config(), f"{method}_weight")
    doubled, _ = make(method, **{f"{method}_weight": 2 * default})[0](*batch)
    torch.testing.assert_close(doubled[method], 2 * terms[method])


def test_joined_methods_take_the_final_outputs_terms_of_one_and_add_their_own():
    crd, batch = make("crd")
    mhkd_alone, _ = make("mhkd")
    both, _ = make("crd+mhkd")
    assert set(both(*batch)[0]) == {"mhkd", "crd"}
    step = mhkd.Step(both.student(batch[0]), both.teacher(batch[0]), *batch[1:])
    torch.manual_seed(5)
    terms = both.objective(step)
    contrastive, multi_head = both.objective.methods
    torch.manual_seed(5)
    torch.testing.assert_close(terms["mhkd"], multi_head.final_terms(step)["mhkd"])
    assert terms["crd"] > 0 and set(crd(*batch)[0]) == {"ce", "kd", "crd"} and set(mhkd_alone(*batch)[0]) == {"mhkd"}


def test_the_order_in_which_methods_are_joined_means_nothing():
    names = {mhkd.resolve(mhkd.Config("vgg13", "vgg8", method=name)).method for name in ("crd+mhkd", "mhkd+crd")}
    assert names == {"crd+mhkd"}


@pytest.mark.parametrize(
    "method, message",
    [
        ("crd+crd", "twice"),
        ("ce+lsh", "adds nothing"),
        ("kd+mhkd", "adds nothing"),
        ("crd+nothing", "no method 'nothing'"),
    ],
)
def test_methods_that_cannot_be_joined_are_refused(method, message):
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd.resolve(mhkd.Config("vgg13", "vgg8", method=method))


@pytest.mark.parametrize("other, gives", [("mhkd", "mhkd"), ("kd", "kd"), ("crd", "new")])
def test_a_new_method_is_joined_with_any_other(other, gives, monkeypatch):
    class New(mhkd.BenchmarkMethod):
        def own_terms(self, step):
            return {"new": step.student.logits.square().mean()}

    monkeypatch.setitem(mhkd.METHODS, "new", New)
    assert list(mhkd.methods_of(mhkd.Config(method=f"new+{other}")))[-1] == gives
    distiller, batch = make(f"{other}+new", batch_size=8)
    terms, _ = distiller(*batch)
    assert "new" in terms and ("ce" in terms) == (gives == "new")


def test_options_of_terms_that_a_joined_method_does_not_give_are_no_configuration(capsys):
    config = mhkd.Config("vgg13", "vgg8", method="crd+mhkd", gamma=0.5, crd_weight=0.7)
    notes = []
    resolved = mhkd.resolve(config, notes.append)
    assert (resolved.gamma, resolved.crd_weight) == (1.0, 0.7) and "--gamma has no effect" in notes[0]


def test_of_joined_methods_only_one_may_set_the_gradients(monkeypatch):
    monkeypatch.setitem(mhkd.METHODS, "other", type("Other", (mhkd.DualHead,), {}))
    with pytest.raises(mhkd.UsageError, match="only one of"):
        mhkd.resolve(mhkd.Config("vgg13", "vgg8", method="dhkd+other"))


# Feature mimicking


def test_lsh_bits_are_set_for_half_of_the_training_set_and_chunks_change_nothing(monkeypatch):
    distiller, _ = make("lsh")
    method, data = distiller.objective.methods[0], make_data()

    def epoch():
        config = mhkd.resolve(mhkd.Config("wrn_16_2", "resnet8", dataset="digits"))
        return mhkd.epoch_batches(data, config, torch.Generator().manual_seed(4))

    method.prepare(distiller.teacher, epoch)
    with torch.no_grad():
        features = torch.cat([distiller.teacher(images).penultimate for images, _, _ in epoch()])
    hashes = features @ method.weight.T
    torch.testing.assert_close(method.bias, -hashes.sort(dim=0).values[(len(hashes) - 1) // 2])  # the lower median
    assert method.weight.shape == (32 * 128, 128)
    classifier = distiller.teacher.model.fc.weight
    assert method.weight.std().item() == pytest.approx(classifier.std().item(), rel=0.01)
    whole = method.bias.clone()
    monkeypatch.setattr(mhkd.FeatureMimicking, "HASH_VALUES", 64 * 100)
    method.prepare(distiller.teacher, epoch)
    torch.testing.assert_close(method.bias, whole)


@pytest.mark.parametrize("samples", ["correct", "all"])
def test_lsh_counts_the_samples_that_are_asked_for(samples):
    distiller, batch = make("lsh", student="wrn_16_1", teacher="resnet8", lsh_samples=samples)  # both 64 wide
    step = mhkd.Step(distiller.student(batch[0]), distiller.teacher(batch[0]), *batch[1:])
    method = distiller.objective.methods[0]
    right = step.teacher.logits.argmax(dim=1) == batch[1]
    assert 0 < right.sum() < len(right)
    rows = [i for i in range(len(right)) if samples == "all" or right[i]]
    f_s, f_t = step.student.penultimate[rows], step.teacher.penultimate[rows]
    expected = nn.functional.mse_loss(f_s, f_t) + mhkd.lsh_loss(f_s, f_t, method.weight, method.bias)
    torch.testing.assert_close(method.own_terms(step)["lsh"], 6 * expected)
    assert not any(isinstance(module, mhkd.WidenedClassifier) for module in distiller.modules())


@pytest.mark.parametrize("student", ["resnet8", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_lsh_widens_the_student_to_the_teachers_width_and_folds_it_back_exactly(student):
    distiller, (images, *_) = make("lsh", "wrn_16_2", student)
    assert distiller.student.width == 128 == distiller.student(images[:2]).penultimate.shape[1]
    widened = distiller.student.remove().double().eval()
    plain = mhkd.FeatureMimicking.plain(widened)
    fresh = mhkd.build_model(student, K).double().eval()
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(images.double()), widened(images.double()), rtol=1e-10, atol=1e-10)


# Dual heads


def gradients(distiller, term):
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    return torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("method", ["dhkd", "crd+dhkd"])
def test_dhkd_takes_off_what_points_against_the_cross_entropys_gradient(method):
    distiller, batch = make(method)
    distiller.double()
    terms, _ = distiller(batch[0].double(), *batch[1:])
    named = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    student = [p for name, p in named.items() if name.startswith("student.")]
    others = [p for name, p in named.items() if not name.startswith("student.")]
    rest = sum(term for name, term in terms.items() if name != "dhkd")
    disagreed = []
    for sign in (1, -1):  # with one of the two signs the gradients disagree
        signed = {**terms, "dhkd": sign * terms["dhkd"]}
        g1, g2 = (dict(zip(named, gradients(distiller, term))) for term in (rest, signed["dhkd"]))
        on_student = [name for name in named if name.startswith("student.")]
        dot = sum((g1[name] * g2[name]).sum() for name in on_student)
        disagreed.append(bool(dot < 0))
        expected = {name: g1[name] + g2[name] for name in named}
        if dot < 0:
            square = sum(g1[name].square().sum() for name in on_student)
            expected |= {name: expected[name] - dot / square * g1[name] for name in on_student}
        backward_keeping_the_graph(distiller, signed, student, others)
        for name, p in named.items():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-10)
    assert sorted(disagreed) == [False, True]


def backward_keeping_the_graph(distiller, terms, student, others):
    grad = torch.autograd.grad

    def keeping(*arguments, **options):
        return grad(*arguments, **{**options, "retain_graph": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", keeping)
        distiller.objective.backward(terms, student, others)


def test_dhkd_costs_two_backward_passes(monkeypatch):
    distiller, batch = make("dhkd")
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a further backward"))
    distiller.backward(distiller(*batch)[0])
    assert len(calls) == 2


def test_dhkd_without_alignment_and_with_a_linear_head_is_the_plain_sum():
    distiller, batch = make("dhkd", dhkd_align=False, dhkd_head="linear")
    assert isinstance(distiller.objective.methods[0].head, nn.Linear)
    terms, _ = distiller(*batch)
    expected = gradients(distiller, sum(terms.values()))
    distiller.backward(terms)
    for p, gradient in zip([p for p in distiller.parameters() if p.requires_grad], expected):
        torch.testing.assert_close(p.grad, gradient)


# Whole runs

RUN = ["--student", "resnet8", *TINY, "--subset", "300", "--batch-size", "25", "--epochs", "4", "--negatives", "100"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("teacher")
    assert mhkd.main(["--student", "wrn_16_2", "--method", "ce", *TINY, "--subset", "500", "--out", str(out)]) == 0
    return next(out.glob("*")) / "student.pt"


@pytest.mark.parametrize("method", [name for name in mhkd.METHODS if name != "ce"] + ["crd+mhkd"])
def test_every_method_learns_goes_on_after_a_kill_and_leaves_a_plain_student(method, teacher, tmp_path, capsys):
    arguments = ["--teacher", "wrn_16_2", "--teacher-weights", str(teacher), "--method", method, *RUN]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--out", str(killed)], stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not list(killed.glob("*/checkpoint.pt")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert mhkd.main([*arguments, "--out", str(killed)]) == 0
    assert "goes on after epoch" in capsys.readouterr().out
    (resumed,) = killed.glob("*/student.pt")
    assert mhkd.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    (whole,) = tmp_path.glob("whole/*/student.pt")

    state, other = (torch.load(path, weights_only=True)["model"] for path in (whole, resumed))
    assert all(torch.equal(state[name], other[name]) for name in state) and state.keys() == other.keys()
    plain = {name: tensor.shape for name, tensor in mhkd.build_model("resnet8", 10).state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == plain
    log = [json.loads(line) for line in (whole.parent / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["train_accuracy"] > log[0]["train_accuracy"] + 5


IN_TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[3:]
import torch, mhkd, test_methods

with mhkd.team(torch.device("cpu")):
    rank = mhkd.rank()
    torch.manual_seed(0)
    distiller, _ = test_methods.make(sys.argv[1], batch_size=16, dhkd_align=sys.argv[2] == "aligned")
    data, config = test_methods.make_data(), distiller.objective.methods[0].config
    module = mhkd.parallel(distiller, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(rank)  # other negatives and other dropout in each
    seen = []
    for images, labels, indices in mhkd.epoch_batches(data, config, torch.Generator().manual_seed(0), 2, rank):
        before = distiller.objective.methods[0].crd.student_bank.clone()
        mhkd.train_step(module, optimizer, images, labels, indices)
        moved = (distiller.objective.methods[0].crd.student_bank != before).any(dim=1)
        assert moved.sum() == 16 and moved[indices].all() and len(indices) == 8  # the other process's rows, too
        seen.append(indices)
    named = [*distiller.objective.named_buffers(), *distiller.named_parameters()]
    for name, tensor in named:
        if "running" in name or "num_batches" in name:
            continue  # each process keeps its own; that of the first is saved
        mine, first = tensor.detach().clone(), tensor.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(mine, first), name
    everything = mhkd.gather_from_processes(torch.cat(seen))
    assert len(everything.unique()) == 64
    print("agreed")
"""


@pytest.mark.parametrize("method", ["crd+mhkd aligned", "crd+dhkd aligned", "crd+dhkd plain"])
def test_two_processes_keep_the_same_banks_and_take_the_same_steps(method, tmp_path):
    (tmp_path / "two.py").write_text(IN_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "two.py"), *method.split(), str(SCRIPT.parent), str(SCRIPT.parent / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr
