"""The loss from hidden states: distillation of language models without the logits of all tokens.

linear_mhkd_loss computes mhkd.mhkd_loss chunk by chunk, with the fused loss or plain PyTorch. For a
vocabulary of 50,000 the logits and their gradients would take most of the memory of a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import mhkd

# Logits of one head in a chunk. Fewer rows make the matrix products slow, more take more memory.
CHUNK_LOGITS = 2**23
INSTEAD = 'call mhkd_loss with backend="reference" on the logits'


def linear_mhkd_loss(
    student_hidden: Sequence[Tensor], student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Sequence[Tensor], teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None, *, student_bias: Tensor | Sequence[Tensor] | None = None,
    teacher_bias: Tensor | Sequence[Tensor] | None = None, tau: float = 4.0, alpha: float = 0.9,
    beta: float = 0.5, head_weights: Sequence[float] | None = None,
    kl_weights: Sequence[float] | None = None, ce_weights: Sequence[float] | None = None,
    ignore_index: int = -100, return_terms: bool = False, backend: str = "auto",
    chunk: int | None = None, accumulate: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """mhkd_loss of the logits hidden @ weight.T + bias of each head, which are never stored whole.

    Equations, options and errors are those of mhkd.mhkd_loss. The student's hidden states, weights
    and biases get gradients, the teacher's none: there is no teacher_ce. The gradients are computed
    with the loss, so that one backward pass is possible; second derivatives and forward mode are
    refused. They are scaled by the incoming gradient after they have been rounded: with float16 and
    a loss scale, small ones are lost.

    Args:
        student_hidden, teacher_hidden: a tensor [..., d] for each head, the final output first. The
            d of student and teacher may differ.
        student_weight, teacher_weight: [V, d] for all heads, or a list with one for each.
        labels: [...], int64, or None, as for mhkd_loss: of the token that each row predicts.
        student_bias, teacher_bias: [V], or a list with one for each head.
        chunk: rows whose logits of one head are computed at a time. Default: 2^23 / V.
        accumulate: dtype in which the gradients of weights and biases are summed over the chunks,
            by default that of the weight. torch.float32 for bfloat16 weights: 4 bytes instead of 2
            per weight until the backward pass, and a temporary of 2 bytes per weight.

    Returns:
        The loss, a scalar: float64 for float64 hidden states, otherwise float32. With
        `return_terms` also the terms [H, 3], see mhkd.mhkd_loss; the teacher's is 0.
    """
    if isinstance(student_hidden, Tensor) or isinstance(teacher_hidden, Tensor):
        what = "hidden states must be a list, a tensor for each head, not one tensor"
        raise TypeError(f"linear_mhkd_loss: {what}")
    heads = len(student_hidden)
    head_weights = [1.0] + [beta] * (heads - 1) if head_weights is None else head_weights
    weights = {"head_weights": head_weights, "kl_weights": kl_weights, "ce_weights": ce_weights}
    try:
        mhkd._check_settings(student_hidden, student_hidden, tau, alpha, weights, [False] * heads)
    except (TypeError, ValueError) as error:
        raise type(error)(f"linear_{error}") from None
    mhkd.check_name("backend", backend, mhkd.BACKENDS)
    kl_weights = [w * alpha for w in head_weights] if kl_weights is None else kl_weights
    ce_weights = [w * (1 - alpha) for w in head_weights] if ce_weights is None else ce_weights
    if labels is None:
        shape, device = student_hidden[0].shape[:-1], student_hidden[0].device
        labels, ignore_index = torch.full(shape, mhkd.UNLABELLED, device=device), -100
    columns = [
        [x.reshape(-1, x.shape[-1]) for x in student_hidden],  # [N, d]
        _of_heads(student_weight, heads), _of_heads(student_bias, heads),
        [x.reshape(-1, x.shape[-1]) for x in teacher_hidden],
        _of_heads(teacher_weight, heads), _of_heads(teacher_bias, heads), kl_weights, ce_weights,
    ]  # fmt: skip
    if labels.dtype != torch.int64:
        raise TypeError(f"linear_mhkd_loss: labels must be int64, not {labels.dtype}")
    for x in (*student_hidden, *teacher_hidden):
        if x.shape[:-1] != labels.shape:
            raise ValueError(
                "linear_mhkd_loss: labels must be [...] for hidden states [..., d], a label for "
                f"each row: {list(labels.shape)} for {list(x.shape)}"
            )
    settings = {"tau": tau, "ignore_index": ignore_index, "backend": backend}
    settings["return_terms"] = return_terms
    loss, terms = _in_chunks(columns, labels.reshape(-1), chunk, accumulate, settings)
    return (loss, terms) if return_terms else loss


def _of_heads(x: Tensor | Sequence[Tensor] | None, heads: int) -> list[Tensor | None]:
    return [x] * heads if x is None or isinstance(x, Tensor) else list(x)


def _in_chunks(columns, labels, chunk, accumulate, settings) -> tuple[Tensor, Tensor]:
    """linear_mhkd_loss and its terms, with a list of each argument and rows [N, d]."""
    lengths = [len(column) for column in columns]
    if len({*lengths}) > 1:
        raise ValueError(f"linear_mhkd_loss: the lists differ in length: {lengths}")
    trained = columns[0] + columns[1] + columns[2]
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in trained):
        raise NotImplementedError(f"linear_mhkd_loss has no forward-mode derivative: {INSTEAD}")
    trained = trained if torch.is_grad_enabled() else []
    grads = {
        x: torch.zeros_like(x, dtype=None if i < lengths[0] else accumulate)
        for i, x in enumerate(trained) if x is not None and x.requires_grad
    }  # fmt: skip
    kind = labels.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    chunk = chunk or max(1, CHUNK_LOGITS // len(columns[1][0]))
    with torch.no_grad(), torch.autocast(kind, enabled=False):

        def to_autocast(x):  # half types under autocast, which leaves float64 as it is
            stays = x is None or dtype is None or x.dtype == torch.float64
            return x if stays else x.to(dtype)

        cast = {x: to_autocast(x) for x in itertools.chain(*columns[1:3], *columns[4:6])}
        # A chunk's terms are means over its rows: it weighs as many of all rows as count in it.
        counted = labels != settings["ignore_index"]
        masks = torch.stack((counted, counted & (labels != mhkd.UNLABELLED)))  # [2, N]
        parts = [part.sum(dim=1) for part in masks.split(chunk, dim=1)]
        counts = torch.stack(parts).tolist()  # the only synchronisation with a GPU
        all_kl, all_ce = (sum(column) for column in zip(*counts))
        double = torch.float64 in {x.dtype for x in columns[0] + columns[3]}
        loss = labels.new_zeros((), dtype=torch.float64 if double else torch.float32)
        terms = loss.new_zeros(lengths[0], 3)
        if not all_kl:  # means over no row
            terms[:, :2] = math.nan
            loss += math.nan if any(columns[6] + columns[7]) else 0.0
        for start, (n_kl, n_ce) in zip(range(0, len(labels), chunk), counts):
            here = slice(start, start + chunk)
            of_all = n_kl / max(1, all_kl), n_ce / max(1, all_ce), 0.0  # weights of its terms
            for h, (x_s, w_s, b_s, x_t, w_t, b_t, kl, ce) in enumerate(zip(*columns)):
                kl, ce = kl * of_all[0], ce * of_all[1]
                counts_nothing = kl == ce == 0
                if n_kl == 0 or (counts_nothing and not settings["return_terms"]):
                    continue
                x = to_autocast(x_s[here])
                student = x, cast[w_s], cast[b_s]
                teacher = to_autocast(x_t[here]), cast[w_t], cast[b_t]
                one = {"kl_weights": [kl], "ce_weights": [ce], "teacher_ce": [False]} | settings
                part, found, grad = _of_chunk(
                    student, teacher, labels[here], one, bool(grads) and not counts_nothing
                )
                loss += part
                terms[h] += found[0] * found.new_tensor(of_all)
                if grad is None:
                    continue
                if x_s in grads:
                    grads[x_s][here] += grad @ cast[w_s]
                if w_s in grads and grads[w_s].dtype == grad.dtype:
                    grads[w_s].addmm_(grad.T, x)
                elif w_s in grads:
                    grads[w_s] += grad.T @ x
                if b_s in grads:
                    grads[b_s] += grad.sum(dim=0)
                del grad  # before the next logits take its place
    return _WithGradients.apply(loss, list(grads.values()), *grads), terms


def _of_chunk(
    student, teacher, labels, options, differentiate
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and terms of one head's logits [chunk, V], and the gradient of the student's."""
    z_s = F.linear(*student).requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        z_t = [F.linear(*teacher)]
        loss, terms = mhkd.mhkd_loss([z_s], z_t, labels, **options | {"return_terms": True})
    return loss.detach(), terms, torch.autograd.grad(loss, z_s)[0] if differentiate else None


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients have been computed with it."""

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():  # create_graph: these gradients have no graph
            raise NotImplementedError(f"linear_mhkd_loss has no second derivative: {INSTEAD}")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_mhkd_loss: a second backward pass is not possible, because the gradients "
                "are kept once and scaled in place: compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(grad_loss) for gradient in gradients)
