"""Methods of other authors for comparison with MHKD: FitNet, CC, RKD, CRD, LSH and DHKD.

    python mhkd.py --teacher vgg13 --student vgg8 --method crd          # alone
    python mhkd.py --teacher vgg13 --student vgg8 --method crd+mhkd     # combined with MHKD
    python mhkd.py --help --method crd                                  # its options

The first four are added to the cross-entropy and the divergence of the final outputs, both with
weight 1. Their own terms and weights are those of the CRD benchmark (HobbitLong/RepDistiller). Its
script runs FitNet, CC, RKD and CRD without the divergence (`--kd-weight 0` here); only its "CRD +
KD" has both with weight 1. LSH and DHKD follow their authors' code. The losses are functions of
tensors that can be used in other programs. mhkd.py imports this file when one of these methods is
selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhkd
from mhkd import COUNT, NOT_NEGATIVE, POSITIVE, Batch, Data, FeatureExtractor, Option, Outputs

if TYPE_CHECKING:
    from mhkd_config import Config


class BenchmarkMethod(mhkd.Method):
    """gamma * CE + kd_weight * tau^2 * KL on the final outputs; subclasses add a term."""

    final_options = {
        "tau": Option(4.0, "temperature of the softmax", rule=POSITIVE),
        "gamma": Option(1.0, "weight of the final outputs' cross-entropy", rule=NOT_NEGATIVE),
        "kd_weight": Option(1.0, "weight of the final outputs' tau^2 KL", rule=NOT_NEGATIVE),
    }

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        o, z_s, terms = self.options, batch.student.logits, {}
        if o.gamma:
            terms["ce"] = o.gamma * mhkd.mean_cross_entropy(z_s, batch.labels)
        if o.kd_weight:
            kl = mhkd.kd_loss(z_s, batch.teacher.logits, o.tau, backend=self.config.backend)
            terms["kd"] = o.kd_weight * kl
        return terms


class FitNet(BenchmarkMethod):
    """Hints (Romero et al. 2015): mean squared error between one feature of each network.

    A convolution, batch norm and ReLU map the student's feature to the size of the teacher's. It is
    the feature of the second unit; for a vgg, as in the benchmark, that of the third.
    """

    options = {"fitnet_weight": Option(100.0, "weight of the FitNet term", rule=NOT_NEGATIVE)}

    def __init__(self, config, student: FeatureExtractor, teacher: FeatureExtractor, data: Data):
        super().__init__(config, student, teacher, data)
        self.unit_s, self.unit_t = (self.units(config, n)[0] for n in ("student", "teacher"))
        (channels, *s), (target, *t) = student.shapes[self.unit_s], teacher.shapes[self.unit_t]
        if [2 * size for size in t] == s:
            conv: nn.Module = nn.Conv2d(channels, target, 3, stride=2, padding=1)
        elif t == [2 * size for size in s]:
            conv = nn.ConvTranspose2d(channels, target, 4, stride=2, padding=1)
        elif s[0] >= t[0]:
            conv = nn.Conv2d(channels, target, [1 + a - b for a, b in zip(s, t)])
        else:  # does not occur in the benchmark
            conv = nn.ConvTranspose2d(channels, target, [1 + b - a for a, b in zip(s, t)])
        self.regressor = nn.Sequential(conv, nn.BatchNorm2d(target), nn.ReLU())

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        return (3,) if getattr(config, network).startswith("vgg") else (2,)

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        f_s, f_t = batch.student.features[self.unit_s], batch.teacher.features[self.unit_t]
        return {"fitnet": self.options.fitnet_weight * F.mse_loss(self.regressor(f_s), f_t)}


def checked(name: str, student: Tensor, teacher: Tensor, width: bool = True) -> list[Tensor]:
    """Both [B, C], of the same shape or (width=False) B, with at least the precision of float32."""
    shapes = [[*x.shape][: 2 if width else 1] for x in (student, teacher)]
    if student.dim() != 2 or teacher.dim() != 2 or shapes[0] != shapes[1]:
        shapes = [*student.shape], [*teacher.shape]
        raise ValueError(f"{name}: student and teacher must be [B, C] and agree: {shapes}")
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher)]


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence of embeddings [B, D] (Peng et al. 2019), as in the CRD benchmark.

    With delta = student - teacher: the mean over neighbours i, i + 1 of
    sum_d |delta_i,d| |delta_i+1,d|. Both inputs get gradients. NaN for a single row.
    """
    student, teacher = checked("cc_loss", student, teacher)
    delta = (student - teacher).abs()  # [B, D]
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


EMBED_DIM = {"embed_dim": Option(128, "width of the embeddings", int, COUNT)}


class CorrelationCongruence(BenchmarkMethod):
    """Correlation congruence (Peng et al. 2019) of linearly embedded penultimate features."""

    needs_penultimate = ("student", "teacher")
    options = EMBED_DIM | {"cc_weight": Option(0.02, "weight of the CC term", rule=NOT_NEGATIVE)}

    def __init__(self, config, student: FeatureExtractor, teacher: FeatureExtractor, data: Data):
        super().__init__(config, student, teacher, data)
        self.embed_student = nn.Linear(student.width, self.options.embed_dim)
        self.embed_teacher = nn.Linear(teacher.width, self.options.embed_dim)

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        student = self.embed_student(batch.student.penultimate)
        teacher = self.embed_teacher(batch.teacher.penultimate)
        return {"cc": self.options.cc_weight * cc_loss(student, teacher)}


def rkd_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Relational knowledge distillation of embeddings [B, C], [B, C'] (Park et al. 2019).

    As in the CRD benchmark: distance_weight * smooth L1 of the pairwise distances, each divided by
    its own mean over those above 0, plus angle_weight * smooth L1 of the cosines of the angles of
    all triplets. The teacher gets no gradient. Needs memory for B * B * (C + C' + B) numbers.
    """
    student, teacher = checked("rkd_loss", student, teacher, width=False)

    def relations(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x[None, :, :] - x[:, None, :]  # [B, B, C], [i, j] is x_j - x_i
        distance = difference.norm(dim=2)  # [B, B]; its gradient at 0 is 0
        apart = distance > 0
        mean = distance.sum() / apart.sum().clamp(min=1)
        # A distance of 0 has no direction; the cosine is 0 and the gradient finite.
        direction = difference / torch.where(apart, distance, 1)[:, :, None]
        cosine = direction @ direction.transpose(1, 2)  # [B, B, B], [i, j, k]: at i
        return distance / torch.where(mean > 0, mean, 1), cosine

    (d_s, c_s), (d_t, c_t) = relations(student), relations(teacher.detach())
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * F.smooth_l1_loss(c_s, c_t)


class RelationalDistillation(BenchmarkMethod):
    """Relational knowledge distillation (Park et al. 2019) of the penultimate features."""

    needs_penultimate = ("student", "teacher")
    options = {"rkd_weight": Option(1.0, "weight of the RKD term", rule=NOT_NEGATIVE)}

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        rkd = rkd_loss(batch.student.penultimate, batch.teacher.penultimate)
        return {"rkd": self.options.rkd_weight * rkd}


class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian, Krishnan, Isola 2020), as in their benchmark.

    A linear layer maps both features to `embed_dim`, then they are normalised. Two memory banks
    contain an embedding of each training sample, one for each network. The student's embedding is
    contrasted with the teacher's bank: its own sample against samples of other classes; and the
    teacher's embedding with the student's bank. With anchor v, bank row u and N samples

        P(u) = exp(v.u / tau) / Z,  Z = N * mean of exp(v.u / tau) over the first batch, then fixed
        loss = - 1/B sum_b [ log P+ / (P+ + m/N + eps) + sum over m negatives of
                             log (m/N) / (P- + m/N + eps) ]

    for both directions together, eps = 1e-7. Afterwards (in training mode) the batch's rows become
    normalise(momentum * old + (1 - momentum) * new). The banks are buffers in the state dict. Under
    torch.distributed every process stores the rows of all processes.

    The scores with the whole bank are one matrix product, from which the needed ones are gathered.
    This takes B * N numbers instead of B * m * embed_dim for gathered rows, 40 times fewer for
    m = 16384 and N = 50000.

    Args:
        student_dim, teacher_dim: lengths of the two features.
        num_samples: N, of the training set.
        embed_dim, negatives, tau, momentum: as above; m = negatives.
        labels: class indices [N] of all training samples, to draw negatives of other classes than
            the anchor's, uniformly, and without replacement if there are enough. Not needed if
            `contrast` is given.

    Raises:
        ValueError: neither labels nor contrast; labels of a single class, or not [N].
    """

    EPSILON = 1e-7

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        embed_dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        labels: Tensor | None = None,
    ):
        super().__init__()
        self.num_samples, self.negatives = num_samples, negatives
        self.tau, self.momentum = tau, momentum
        self.embed_student = nn.Linear(student_dim, embed_dim)
        self.embed_teacher = nn.Linear(teacher_dim, embed_dim)
        bound = 1 / math.sqrt(embed_dim / 3)
        for name in ("student_bank", "teacher_bank"):
            bank = torch.empty(num_samples, embed_dim).uniform_(-bound, bound)
            self.register_buffer(name, bank)
        self.register_buffer("normaliser", torch.zeros(2))  # Z of each direction; 0: none yet
        self.register_buffer("labels", labels, persistent=False)
        if labels is not None:
            if labels.shape != (num_samples,):
                raise ValueError(f"CRDLoss: labels must be [{num_samples}]: {list(labels.shape)}")
            counts = torch.bincount(labels)
            if counts.max() == num_samples:
                raise ValueError("CRDLoss: all labels are of one class, so there are no negatives")
            self.register_buffer("others", (num_samples - counts)[labels], persistent=False)  # [N]
            self.enough = num_samples - counts.max().item() >= negatives

    @torch.no_grad()
    def draw(self, indices: Tensor) -> Tensor:
        """Indices to contrast with [B, 1 + m]: the sample's own, then those of other classes."""
        if self.labels is None:
            raise ValueError("CRDLoss: give it labels, or forward the indices to contrast with")
        N, m, B = self.num_samples, self.negatives, len(indices)
        keys = torch.rand(B, N, device=indices.device)
        keys.masked_fill_(self.labels == self.labels[indices, None], -1)  # below other classes'
        # The m largest of independent random keys: a choice without replacement.
        negatives = keys.topk(min(m, N), dim=1, sorted=not self.enough).indices
        if not self.enough:  # all of the other classes, then some of them again
            others = self.others[indices, None]  # [B, 1]
            again = (torch.rand(B, m, device=indices.device) * others).long().clamp(max=others - 1)
            place = torch.arange(m, device=indices.device).expand(B, m)
            negatives = negatives.gather(1, torch.where(place < others, place, again))
        return torch.cat((indices[:, None], negatives), dim=1)

    def forward(
        self, student: Tensor, teacher: Tensor, indices: Tensor, contrast: Tensor | None = None
    ) -> Tensor:
        """Penultimate features [B, C], [B, C'], indices of the training set [B]; returns a scalar.

        contrast: bank rows [B, 1 + m], the positive one first. Default: drawn.
        """
        contrast = self.draw(indices) if contrast is None else contrast
        v_s = F.normalize(self.embed_student(student), dim=1)  # [B, embed_dim]
        v_t = F.normalize(self.embed_teacher(teacher), dim=1)
        # The backward pass reads the banks, so the update creates new ones.
        scores = [v_s @ self.teacher_bank.T, v_t @ self.student_bank.T]  # [B, N] each
        loss = sum(self._nce(score, contrast, i) for i, score in enumerate(scores))
        if self.training:
            self._remember(v_s.detach(), v_t.detach(), indices)
        return loss

    def _nce(self, scores: Tensor, contrast: Tensor, direction: int) -> Tensor:
        m, N = contrast.shape[1] - 1, self.num_samples
        similarity = (scores.gather(1, contrast) / self.tau).exp()  # [B, 1 + m]
        first = mhkd.average_over_processes(N * similarity.detach().mean())
        Z = torch.where(self.normaliser[direction] > 0, self.normaliser[direction], first)
        if self.training:
            self.normaliser = torch.stack(
                [Z if i == direction else self.normaliser[i] for i in (0, 1)]
            )
        p, q = similarity / Z, m / N + self.EPSILON
        positive, negative = p[:, :1], p[:, 1:]
        per_row = (positive / (positive + q)).log().sum(dim=1)
        return -(per_row + ((m / N) / (negative + q)).log().sum(dim=1)).mean()

    @torch.no_grad()
    def _remember(self, v_s: Tensor, v_t: Tensor, indices: Tensor) -> None:
        indices = mhkd.gather_from_processes(indices)
        for name, new in (("student_bank", v_s), ("teacher_bank", v_t)):
            bank, new = getattr(self, name), mhkd.gather_from_processes(new)
            new = F.normalize(self.momentum * bank[indices] + (1 - self.momentum) * new, dim=1)
            setattr(self, name, bank.index_copy(0, indices, new))


class ContrastiveDistillation(BenchmarkMethod):
    """Contrastive representation distillation (Tian et al. 2020) of the penultimate features."""

    needs_labels = True  # its negatives are of other classes
    needs_penultimate = ("student", "teacher")
    options = EMBED_DIM | {
        "crd_weight": Option(0.8, "weight of the CRD term", rule=NOT_NEGATIVE),
        "crd_tau": Option(0.07, "temperature of CRD", rule=POSITIVE),
        "negatives": Option(16384, "negative samples for each image", int, COUNT),
    }

    def __init__(self, config, student: FeatureExtractor, teacher: FeatureExtractor, data: Data):
        super().__init__(config, student, teacher, data)
        o, labels = self.options, data.train_labels
        if len(labels.unique()) < 2:
            raise mhkd.UsageError("--method crd needs training images of at least two classes")
        sizes = student.width, teacher.width, len(labels), o.embed_dim, o.negatives
        self.crd = CRDLoss(*sizes, o.crd_tau, labels=labels)

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        crd = self.crd(batch.student.penultimate, batch.teacher.penultimate, batch.indices)
        return {"crd": self.options.crd_weight * crd}


def lsh_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, counted: Tensor | None = None
) -> Tensor:
    """Locality-sensitive hashing loss of features [B, C] (Wang, Ge, Wu 2021).

    Binary cross-entropy between sigmoid(W f_s + b) and the teacher's hash bits 1[W f_t + b > 0],
    for weight W [H, C] and bias b [H]: the mean over the bits and the rows that are `counted` (bool
    [B], default: all), 0 if there are none. The teacher gets no gradient.
    """
    bits = (F.linear(teacher.detach(), weight, bias) > 0).to(student.dtype)  # [B, H]
    logits = F.linear(student, weight, bias)
    rows = F.binary_cross_entropy_with_logits(logits, bits, reduction="none").mean(dim=1)
    return mean_of_counted(rows, counted)


def mean_of_counted(rows: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of the values [B] where `counted`, without waiting for the device."""
    if counted is None:
        return rows.mean()
    number = mhkd.average_over_processes(counted.sum().float())  # gradients are averaged, too
    return torch.where(counted, rows, 0).sum() / number.clamp(min=1 / mhkd.world_size())


class FeatureMimicking(mhkd.Method):
    """Feature mimicking with LSH (Wang, Ge, Wu 2021, "Distilling knowledge by mimicking features").

    The student learns the teacher's penultimate feature; there is no KL. If the widths differ, the
    student has a linear layer to the teacher's width before its classifier during training. Nothing
    is between the two layers, so they are merged into one classifier afterwards.
    """

    needs_labels = True  # to see which samples the teacher classifies correctly
    needs_penultimate = ("student", "teacher")
    options = {
        "lsh_weight": Option(6.0, "weight of the LSH term", rule=NOT_NEGATIVE),
        "lsh_bits": Option(32, "hash bits per entry of the teacher's feature", int, COUNT),
        "lsh_samples": Option(
            "correct", "correct: samples that the teacher classifies correctly; or all",
            str, mhkd.one_of("correct", "all"),
        ),
    }  # fmt: skip
    HASH_VALUES = 2**24  # at a time, 64 MiB; all of them, [N, 32 C], take 13 GB for C = 2048

    def __init__(self, config, student: FeatureExtractor, teacher: FeatureExtractor, data: Data):
        super().__init__(config, student, teacher, data)
        std = teacher.model.get_submodule(teacher.classifier).weight.std().item()
        C = teacher.width
        self.register_buffer("weight", torch.empty(self.options.lsh_bits * C, C).normal_(0, std))
        self.register_buffer("bias", torch.zeros(len(self.weight)))

    @classmethod
    def adapt(
        cls, student: nn.Module, teacher: nn.Module, num_classes: int, example: Tensor
    ) -> None:
        rest = {"example_input": example}
        own, its = (FeatureExtractor(n, [], num_classes, **rest) for n in (student, teacher))
        if own.width and its.width and own.width != its.width:
            widened = WidenedClassifier(own.width, its.width, num_classes)
            student.set_submodule(own.classifier, widened)

    @classmethod
    def plain(cls, student: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        for name, module in student.named_modules():
            if isinstance(module, WidenedClassifier):
                state = {k: t for k, t in state.items() if not k.startswith(f"{name}.")}
                state |= {f"{name}.{k}": t for k, t in module.folded().state_dict().items()}
        return state

    @torch.no_grad()
    def prepare(self, of_teacher: Callable[[], Iterator[Outputs]]) -> None:
        """b = - the (lower) median of W f_t over the training set: half of the bits are set."""
        features = [mhkd.gather_from_processes(outputs.penultimate) for outputs in of_teacher()]
        features = torch.cat(features)  # [N, C]
        parts = self.weight.split(max(1, self.HASH_VALUES // len(features)))  # some bits at a time
        medians = [(part @ features.T).median(dim=1).values for part in parts]
        self.bias.copy_(-torch.cat(medians))

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        f_s, f_t = batch.student.penultimate, batch.teacher.penultimate
        correct = batch.teacher.logits.argmax(dim=1) == batch.labels
        counted = correct if self.options.lsh_samples == "correct" else None
        mimic = mean_of_counted((f_s - f_t).square().mean(dim=1), counted)
        lsh = lsh_loss(f_s, f_t, self.weight, self.bias, counted)
        return {"lsh": self.options.lsh_weight * (mimic + lsh)}


class WidenedClassifier(nn.Sequential):
    """Two linear layers, C -> width -> K, in place of a network's classifier."""

    def __init__(self, in_features: int, width: int, num_classes: int):
        super().__init__(nn.Linear(in_features, width), nn.Linear(width, num_classes))

    def folded(self) -> nn.Linear:
        """One linear layer that computes the same, W2 (W1 x + b1) + b2, merged in float64."""
        folded = nn.Linear(self[0].in_features, self[1].out_features).to(self[0].weight)
        # On the CPU: MPS has no float64.
        W1, b1, W2, b2 = (p.detach().cpu().double() for p in self.parameters())
        with torch.no_grad():
            folded.weight.copy_(W2 @ W1)
            folded.bias.copy_(W2 @ b1 + b2)
        return folded


def binary_kl_norm_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float = 2.0) -> Tensor:
    """BinaryKL-Norm of logits [B, K] (Yang et al. 2024, "Dual-head knowledge distillation").

    tau^2 / B * the sum over rows and classes of
    KL(Bernoulli(1/2) || Bernoulli(sigmoid((z_s - z_t) / tau))). The teacher gets no gradient. The
    log-sigmoid stays finite where the sigmoid rounds to 0 or 1.
    """
    z_s, z_t = checked("binary_kl_norm_loss", student_logits, teacher_logits)
    x = (z_s - z_t.detach()) / tau  # [B, K]
    kl = -(F.logsigmoid(x) + F.logsigmoid(-x)) / 2 - math.log(2)
    return tau**2 * kl.sum(dim=1).mean()


class DualHead(mhkd.Method):
    """Dual-head knowledge distillation (Yang et al. 2024): the teacher trains a second classifier.

    The student's own classifier gets only the cross-entropy. If the two gradients disagree, the
    second is aligned: its component opposite to the first is removed.
    """

    needs_penultimate = ("student",)
    options = {
        "dhkd_weight": Option(1.0, "weight of the DHKD term", rule=NOT_NEGATIVE),
        "dhkd_tau": Option(2.0, "temperature of DHKD", rule=POSITIVE),
        "dhkd_head": Option(
            "nonlinear", "second classifier: nonlinear or linear",
            str, mhkd.one_of("nonlinear", "linear"),
        ),
        "dhkd_align": Option(True, "align the gradients of both classifiers (default: yes)", bool),
    }  # fmt: skip

    def __init__(self, config, student: FeatureExtractor, teacher: FeatureExtractor, data: Data):
        super().__init__(config, student, teacher, data)
        C, K = student.width, len(data.classes)
        layers: list[nn.Module] = [nn.Linear(C, K)]
        if self.options.dhkd_head == "nonlinear":
            layers = [nn.Linear(C, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU()]
            layers.append(nn.Linear(200, K))
        self.head = nn.Sequential(*layers)

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        z_s, z_t = self.head(batch.student.penultimate), batch.teacher.logits
        kl = binary_kl_norm_loss(z_s, z_t, self.options.dhkd_tau)
        return {"dhkd": self.options.dhkd_weight * kl}

    def backward(self, terms: dict, student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        if not self.options.dhkd_align:
            return super().backward(terms, student, others)
        parameters = [*student, *others]
        g2 = gradient_of(terms["dhkd"], parameters, retain_graph=True)
        g1 = gradient_of(sum(t for name, t in terms.items() if name != "dhkd"), parameters)
        n = sum(p.numel() for p in student)  # compared on the student's parameters
        dot, square = g1[:n] @ g2[:n], g1[:n] @ g1[:n]
        against = torch.where(square > 0, dot.clamp(max=0) / square, 0)
        g1[:n] *= 1 - against  # g1 + (g2 - against * g1)
        sizes = [p.numel() for p in parameters]
        for p, part in zip(parameters, (g1 + g2).split(sizes)):
            p.grad = part.view_as(p)


def gradient_of(term: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False) -> Tensor:
    """The gradient of all parameters as one vector, averaged over the processes."""
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": retain_graph}
    gradients = torch.autograd.grad(term, parameters, **options)
    return mhkd.average_over_processes(torch.cat([g.flatten() for g in gradients]))


mhkd.METHODS.update(fitnet=FitNet, cc=CorrelationCongruence, rkd=RelationalDistillation)
mhkd.METHODS.update(crd=ContrastiveDistillation, lsh=FeatureMimicking, dhkd=DualHead)
