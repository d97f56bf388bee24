"""linear_mhkd_loss against mhkd_loss of the logits that it never stores."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import mhkd
from mhkd_linear import CHUNK_LOGITS, linear_mhkd_loss

BACKENDS = ["reference"] + ["fused"] * mhkd.loss_backend().startswith("fused")
V, D_S, D_T, LEAD = 50, 8, 12, (3, 7)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(heads=2, dtype=torch.float64, shared=True, bias=True, seed=0):
    """The student's hidden states, weights, biases; the teacher's; labels."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sides = []
    for d in (D_S, D_T):
        hidden = [randn(*LEAD, d) for _ in range(heads)]
        weights = [randn(V, d) for _ in range(1 if shared else heads)]
        biases = [randn(V) for _ in range(1 if shared else heads)] if bias else []
        sides.append((hidden, weights, biases))
    for x in sum(sides[0], []):
        x.requires_grad_()
    labels = torch.randint(V, LEAD, generator=generator)
    labels[0, :3], labels[1, 2:] = -100, mhkd.UNLABELLED
    return *sides, labels


def one_or_list(tensors):
    return None if not tensors else tensors[0] if len(tensors) == 1 else tensors


def chunked(student, teacher, labels, **kw):
    (x_s, w_s, b_s), (x_t, w_t, b_t) = student, teacher
    return linear_mhkd_loss(
        x_s, one_or_list(w_s), x_t, one_or_list(w_t), labels, student_bias=one_or_list(b_s),
        teacher_bias=one_or_list(b_t), **kw,
    )  # fmt: skip


def materialised(student, teacher, labels, **kw):
    def logits(hidden, weights, biases):
        biases = biases or [None]
        return [
            F.linear(x, weights[i % len(weights)], biases[i % len(biases)])
            for i, x in enumerate(hidden)
        ]

    z_t = [z.detach() for z in logits(*teacher)]
    return mhkd.mhkd_loss(logits(*student), z_t, labels, **kw)


def compare(call, tolerance=None, accumulate=None, chunk=None, **kw):
    leaves = sum(call[0], [])
    results = []
    for loss in (
        chunked(*call, chunk=chunk, accumulate=accumulate, **kw),
        materialised(*call, **kw),
    ):
        gradients = torch.autograd.grad(3.0 * loss, leaves, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(*results, **(tolerance or {}))


@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 1000, None])
@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_are_those_of_materialised_logits(backend, chunk, shared):
    compare(make(shared=shared, bias=not shared), chunk=chunk, backend=backend)


@pytest.mark.parametrize(
    "kw",
    [
        {"tau": 2.5, "alpha": 0.3, "beta": 2.0},
        {"head_weights": [0.0, 1.5], "ignore_index": 7},
        {"kl_weights": [0.0, 2.0], "ce_weights": [1.0, 0.0]},
        {"alpha": 1.0, "ignore_index": -1},
        {"alpha": 0.0},
    ],
)
def test_all_options_are_those_of_mhkd_loss(backend, kw):
    student, teacher, labels = make(bias=True)
    if "ignore_index" in kw:
        labels[labels == -100] = kw["ignore_index"]
    compare((student, teacher, labels), chunk=4, backend=backend, **kw)


@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("kw", [{}, {"kl_weights": [1, 0], "ce_weights": [0, 0]}])
def test_terms_are_those_of_mhkd_loss(backend, chunk, kw):
    call, kw = make(), {"return_terms": True, "backend": backend, **kw}
    loss, terms = chunked(*call, chunk=chunk, **kw)
    torch.testing.assert_close((loss, terms), materialised(*call, **kw))
    call[2].fill_(-100)
    for weights in ({}, {"kl_weights": [0, 0], "ce_weights": [0, 0]}):
        found = chunked(*call, chunk=chunk, **kw | weights)
        torch.testing.assert_close(found, materialised(*call, **kw | weights), equal_nan=True)


@pytest.mark.parametrize("labels", [-100, mhkd.UNLABELLED, None])
def test_batches_without_a_label_or_a_row_that_counts(backend, labels):
    student, teacher, old = make()
    labels = labels if labels is None else torch.full_like(old, labels)
    compare((student, teacher, labels), chunk=4, backend=backend, tolerance={
        "equal_nan": True, "rtol": 1e-7, "atol": 1e-9})  # fmt: skip


def test_gradients_go_only_to_tensors_of_the_student_that_ask_for_them(backend):
    student, teacher, labels = make()
    for x in sum(teacher, []):
        x.requires_grad_()
    student[1][0].requires_grad_(False)
    chunked(student, teacher, labels, chunk=4, backend=backend).backward()
    assert all(x.grad is None for x in sum(teacher, [])) and student[1][0].grad is None
    assert all(x.grad is not None for x in student[0] + student[2])
    with torch.no_grad():
        value = chunked(student, teacher, labels, chunk=4, backend=backend)
    assert not value.requires_grad
    torch.testing.assert_close(value, materialised(student, teacher, labels).detach())


def test_a_second_backward_pass_is_refused(backend):
    loss = chunked(*make(), backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_other_derivatives_are_refused(backend):
    """They would be 0 or missing: the gradients are computed with the loss."""
    student, teacher, labels = make()
    loss = chunked(student, teacher, labels, backend=backend)
    with pytest.raises(NotImplementedError, match="second derivative.*on the logits"):
        torch.autograd.grad(loss, student[0], create_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        x = forward_ad.make_dual(student[0][0].detach(), torch.ones(*LEAD, D_S))
        chunked(([x, x], *student[1:]), teacher, labels, backend=backend)


def test_gradients_are_those_of_finite_differences(backend):
    """gradcheck would go backward twice."""
    student, teacher, labels = make()
    leaves, step = sum(student, []), 1e-6
    gradients = torch.autograd.grad(chunked(student, teacher, labels, backend=backend), leaves)
    for leaf, gradient in zip(leaves, gradients):
        direction, values = torch.randn_like(leaf), []
        for sign in (1, -1):
            leaf.data += sign * step * direction
            values.append(chunked(student, teacher, labels, chunk=4, backend=backend).item())
            leaf.data -= sign * step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-6, abs=1e-8)


def test_lists_and_rows_that_do_not_agree_are_named(backend):
    (x, w, b), (x_t, w_t, b_t), labels = make(shared=False)
    for wrong in (
        ((x, w[:1] * 3, b), (x_t, w_t, b_t), labels),
        ((x, w, b), (x_t[:1], w_t, b_t), labels),
    ):
        with pytest.raises(ValueError, match="linear_mhkd_loss: the lists differ in length"):
            chunked(*wrong, backend=backend)
    transposed = [h.transpose(0, 1) for h in x_t]  # as many rows, in another order
    for wrong in (
        ((x, w, b), (x_t, w_t, b_t), labels[:2]), ((x, w, b), (x_t, w_t, b_t), labels.T),
        ((x, w, b), (transposed, w_t, b_t), labels),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="linear_mhkd_loss: labels must be"):
            chunked(*wrong, backend=backend)
    for hidden in ((x[0], x_t), (x, x_t[0])):
        with pytest.raises(TypeError, match="must be a list, a tensor for each head"):
            linear_mhkd_loss(hidden[0], w, hidden[1], w_t, None)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        chunked((x, w, b), (x_t, w_t, b_t), None, alpha=1.5)
    ignored, nothing = torch.full_like(labels, -100), {"kl_weights": [0, 0], "ce_weights": [0, 0]}
    for rows, wrong, message in (
        (labels, {**nothing, "head_weights": [1, 2, 3]}, "lists differ in length"),
        (labels, {**nothing, "head_weights": [1, -1]}, "head_weights must be finite and not"),
        (labels, {**nothing, "tau": -1.0}, "tau must be"), (ignored, {"tau": 0.0}, "tau must be"),
        (ignored, {"backend": "no"}, "no backend 'no'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            chunked((x, w, b), (x_t, w_t, b_t), rows, **wrong)
    with pytest.raises(TypeError, match="labels must be int64"):
        chunked((x, w, b), (x_t, w_t, b_t), labels.int(), kl_weights=[0, 0], ce_weights=[0, 0])
    with pytest.raises(ValueError, match="tau must be"):
        chunked((x, w, b), (x_t, w_t, b_t), labels, tau=0.0, backend=backend)


def test_float32_accumulation_is_closer_for_bfloat16_weights(backend):
    student, teacher, labels = make(dtype=torch.bfloat16, bias=False)
    exact = [[x.detach().double().requires_grad_() for x in xs] for xs in student]
    teacher_64 = [[x.double() for x in xs] for xs in teacher]
    (truth,) = torch.autograd.grad(materialised(exact, teacher_64, labels), exact[1])
    errors = []
    for accumulate in (None, torch.float32):
        loss = chunked(student, teacher, labels, chunk=1, accumulate=accumulate, backend=backend)
        (found,) = torch.autograd.grad(loss, student[1])
        assert found.dtype == torch.bfloat16
        errors.append((found.double() - truth).norm() / truth.norm())
    assert errors[1] < errors[0] and errors[1] < 0.02


def test_under_autocast_the_products_are_half_precision_and_the_gradients_the_weights(backend):
    student, teacher, labels = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [
            loss(student, teacher, labels, backend=backend) for loss in (chunked, materialised)
        ]
    torch.testing.assert_close(*results)
    found, expected = (torch.autograd.grad(loss, sum(student, [])) for loss in results)
    assert {x.dtype for x in found} == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_autocast_leaves_float64_as_it_is(backend):
    call = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(call, backend=backend)


def test_a_chunk_has_few_enough_rows_for_a_large_vocabulary(backend, monkeypatch):
    rows = []
    loss = mhkd.mhkd_loss
    monkeypatch.setattr(
        mhkd, "mhkd_loss", lambda s, *rest, **kw: rows.append(len(s[0])) or loss(s, *rest, **kw)
    )
    vocabulary = CHUNK_LOGITS // 4
    x, weight = torch.randn(10, 1, requires_grad=True), torch.zeros(vocabulary, 1)
    linear_mhkd_loss([x], weight, [x.detach()], weight, torch.zeros(10).long(), backend=backend)
    assert rows == [4, 4, 2]


class CausalModel(nn.Module):
    """Two blocks; the hidden states of the last one, then of the first, for one output weight."""

    def __init__(self, width, vocabulary=V):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, tokens):
        x, states = self.embedding(tokens), []
        for block, norm in zip(self.blocks, self.norms):
            x = x + block(x)[0]
            states.insert(0, norm(x))
        return states  # [B, T, d] each


def distil(hidden_and_weight, teacher, student, parameters, backend, tokens):
    """Three steps with each loss from the same start: both series of losses."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    series = []
    for way in ("chunks", "logits"):
        with torch.no_grad():
            for name, p in student.named_parameters():
                p.copy_(start[name])
        optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
        for _ in range(3):
            with torch.no_grad():
                x_t, w_t = hidden_and_weight(teacher, tokens)
            x_s, w_s = hidden_and_weight(student, tokens)
            if way == "chunks":
                loss = linear_mhkd_loss(x_s, w_s, x_t, w_t, labels, chunk=5, backend=backend)
            else:
                z_s, z_t = [x @ w_s.T for x in x_s], [x @ w_t.T for x in x_t]
                kw = {"teacher_ce": [False, False], "backend": "reference"}
                loss = mhkd.mhkd_loss(z_s, z_t, labels, **kw)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        series.append(losses)
    return series


def check(series):
    assert series[0] == pytest.approx(series[1], rel=1e-4)
    assert series[0][0] > series[0][1] > series[0][2]


def test_a_causal_model_with_heads_that_share_the_output_weights_learns(backend):
    torch.manual_seed(0)
    teacher, student = CausalModel(16), CausalModel(8)
    tokens = torch.randint(V, (4, 6))

    def hidden_and_weight(model, tokens):
        return model(tokens), model.embedding.weight  # tied

    parameters = list(student.parameters())
    check(distil(hidden_and_weight, teacher, student, parameters, backend, tokens))


def test_a_model_of_transformers_learns(backend):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher, student = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=V, n_positions=16, n_embd=width, n_layer=2, n_head=2, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )) for width in (32, 16)
    )  # fmt: skip
    tokens = torch.randint(V, (4, 6))

    def hidden_and_weight(model, tokens):
        states = model.transformer(tokens, output_hidden_states=True).hidden_states
        # The last has passed the final norm, the head after block 1 uses it, too.
        return [states[-1], model.transformer.ln_f(states[1])], model.lm_head.weight

    parameters = list(student.parameters())
    check(distil(hidden_and_weight, teacher, student, parameters, backend, tokens))
