"""Benchmarks. They print a table, and write it as JSON where --json names a file.

    python bench.py loss                     # the fused loss beside plain PyTorch and torch.compile
    python bench.py step                     # a training step beside one as it is usually written
    python bench.py step --pairs resnet32x4:shufflenetv2 --threads 1 --precision bfloat16

What is compared runs in one process on the same inputs, in turn. A time is the median; a ratio of
steps is the median of the ratios of neighbours in time, which a busy machine slows alike.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler, which counts memory, need not talk

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import mhkd

# --------------------------------------------------------------------------------------------------
# Time and memory
# --------------------------------------------------------------------------------------------------


def in_turn(contestants: dict, inputs: list, device: torch.device, rounds: int, most: float = 0.0):
    """Seconds of each contestant's calls, [rounds] by name, more of them in `most` seconds each."""
    for run in contestants.values():  # warm-up: compilation, caches of the allocator
        for one in inputs[:2]:
            run(*one)
    times = {name: [] for name in contestants}
    end = time.perf_counter() + most * len(contestants)
    for index in itertools.count():
        if index >= rounds and (time.perf_counter() > end or index >= 1000):
            return times
        for name in list(contestants)[:: (-1) ** index]:  # none is always the first
            wait(device)
            start = time.perf_counter()
            contestants[name](*inputs[index % len(inputs)])
            wait(device)
            times[name].append(time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(call, device: torch.device) -> int:
    """Peak bytes of tensors during the call beyond those there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


# --------------------------------------------------------------------------------------------------
# bench.py loss
# --------------------------------------------------------------------------------------------------

SHAPES = [(4, 64, 100), (4, 256, 1000), (4, 64, 21841), (1, 64, 50257)]  # heads, batch, classes
CUDA_SHAPES = [(1, 8192, 32000), (1, 4096, 151936)]  # bfloat16
SECONDS, ROUNDS = 4.0, 15  # of measuring for each contestant and shape, whichever takes longer
CACHE_BYTES = 64 * 2**20  # inputs rotate through at least this: no cache holds the next ones


def make_inputs(heads, batch, classes, dtype, device) -> list[tuple]:
    """Student logits, teacher logits and labels, so many times that no cache holds them all."""

    def one():
        z = [torch.randn(batch, classes, device=device, dtype=dtype) for _ in range(2 * heads)]
        labels = torch.randint(classes, (batch,), device=device)
        return [student.requires_grad_() for student in z[:heads]], z[heads:], labels

    size = 2 * heads * batch * classes * dtype.itemsize
    return [one() for _ in range(max(2, -(-CACHE_BYTES // size)))]


def liger_loss():
    """liger-kernel's fused cross-entropy and divergence for the same work, or None without it."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    cross_entropy = LigerCrossEntropyLoss()
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student, teacher, labels, tau=4.0, alpha=0.9):
        total = 0
        for head, (z_s, z_t) in enumerate(zip(student, teacher, strict=True)):
            kl = divergence(F.log_softmax(z_s / tau, dim=1), F.log_softmax(z_t / tau, dim=1))
            weighed = alpha * kl * tau**2 + (1 - alpha) * cross_entropy(z_s, labels)
            total = total + (0.5 if head else 1.0) * weighed
        return total

    return loss


def bench_loss(args, device: torch.device) -> dict:
    """Forward and backward of the loss with each backend."""

    def plain(s, t, y):
        return mhkd.mhkd_loss(s, t, y, backend="reference")

    losses = {"plain PyTorch": plain}
    if not args.no_compile:
        losses["torch.compile"] = torch.compile(plain)
    if device.type == "cuda" and (liger := liger_loss()):
        losses["liger-kernel"] = liger
    if mhkd.loss_backend().startswith("fused"):
        losses["fused"] = lambda s, t, y: mhkd.mhkd_loss(s, t, y, backend="fused")
    contestants = {
        name: lambda s, t, y, loss=loss: torch.autograd.grad(loss(s, t, y), s)
        for name, loss in losses.items()
    }
    source, target = torch.ones(2, 2**26, device=device)
    copies = in_turn({"copy": lambda: target.copy_(source)}, [()], device, ROUNDS)["copy"]
    bandwidth = 2 * source.nbytes / statistics.median(copies)  # read and written
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s\n")
    print(f"{'shape':18} {'contestant':14} {'ms':>9} {'ratio':>6} {'of copy':>8} {'peak':>11}")
    shapes, rows = [(*shape, torch.float32) for shape in SHAPES], []
    shapes += [(*shape, torch.bfloat16) for shape in CUDA_SHAPES if device.type == "cuda"]
    for heads, batch, classes, dtype in shapes:
        inputs = make_inputs(heads, batch, classes, dtype, device)
        torch._dynamo.reset()
        taken = in_turn(contestants, inputs, device, ROUNDS, SECONDS)
        times = {name: statistics.median(values) for name, values in taken.items()}
        logits = heads * batch * classes * dtype.itemsize  # bytes
        moved = 5 * logits  # forward: two reads; backward: two reads and the gradient
        base = times.get("fused", times["plain PyTorch"])
        for name, median in times.items():
            ratio, share = median / base, moved / median / bandwidth
            peak = peak_memory(functools.partial(contestants[name], *inputs[0]), device)
            title = f"{heads} x [{batch}, {classes}]"
            row = {"shape": title, "dtype": str(dtype), "contestant": name, "seconds": median}
            row |= {"ratio": ratio, "share_of_copy": share, "peak_bytes": peak}
            rows.append({**row, "gradient_bytes": logits})
            print(f"{title:18} {name:14} {median * 1e3:9.3f} {ratio:6.1f} {share:8.0%}", end=" ")
            print(f"{peak / 2**20:7.2f} of {logits / 2**20:.2f} MiB", flush=True)
    print("\nratio: time over the fused loss's, where that is not installed over plain PyTorch's.")
    print("of copy: bandwidth, for logits read twice and their gradients written, over a copy's.")
    print("peak: memory, and the gradients' part of it.")
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


# --------------------------------------------------------------------------------------------------
# bench.py step
# --------------------------------------------------------------------------------------------------


def random_data(config: mhkd.Config, images: int, device: torch.device) -> mhkd.Data:
    """Random images of 100 classes: the time of a step does not depend on what they show."""
    side, places, none = config.image_size, torch.arange(images), torch.arange(0)
    pixels = torch.randint(256, (images, side, side, 3), dtype=torch.uint8)
    labels, classes = torch.randint(100, (images,)), [str(k) for k in range(100)]
    parts = pixels, labels, places, none, none, classes
    return mhkd.Data(*parts, side, (0.5,) * 3, (0.25,) * 3, "").to(device)


class Ours:
    """The inner loop of train()."""

    def __init__(self, config: mhkd.Config, data: mhkd.Data):
        torch.manual_seed(1)
        teacher = mhkd.build_model(config.teacher, len(data.classes)).to(data.device).eval()
        self.config, self.data, self.device = config, data, data.device
        self.distiller = mhkd.Distiller(config, data, teacher).train()
        parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(parameters, 1e-3, **settings)  # low, for random labels

    def batches(self):
        for epoch in itertools.count(1):
            yield from mhkd.epoch_batches(self.data, self.config, epoch)

    def step(self, images, labels, indices) -> torch.Tensor:
        terms, figures = self.distiller(images, labels, indices)
        self.optimizer.zero_grad()
        self.distiller.backward(terms)
        self.optimizer.step()
        kept = torch.stack(list(figures.values()))
        assert images.device.type != "cpu" or kept[0].isfinite()
        return kept

    def parts(self, rounds: int) -> dict[str, float]:
        """Shares of a step's parts, each run alone, forward and backward."""
        d, method, batches = self.distiller, self.distiller.methods[-1], self.batches()
        images, labels, _ = next(batches)

        def leaf(tensor):
            return tensor.detach().requires_grad_()

        teacher, student = d.observe(d.teacher, images), d.observe(d.student, images)
        features = {unit: leaf(feature) for unit, feature in student.features.items()}
        student = mhkd.Outputs(leaf(student.logits), features, None)
        z_s = [leaf(student.logits) for _ in (0, *features)]
        z_t = [teacher.logits, *(leaf(teacher.logits) for _ in features)]

        def heads():
            with mhkd.autocast(self.config, self.device):
                z = method.student_heads(student)[1:] + method.teacher_heads(teacher)[1:]
            torch.stack(z).sum().backward()

        parts = {
            "data": lambda: next(batches),
            "teacher": lambda: d.observe(d.teacher, images),
            "student": lambda: d.observe(d.student, images).logits.sum().backward(),
            **({"heads": heads} if features else {}),
            "loss": lambda: mhkd.mhkd_loss(z_s, z_t, labels).backward(),
            "optimizer": self.optimizer.step,
        }
        taken = in_turn(parts, [()], self.device, rounds)
        medians = {part: statistics.median(values) for part, values in taken.items()}
        return {part: median / sum(medians.values()) for part, median in medians.items()}


class PilImages:
    """Images and labels as torchvision's data sets give them."""

    def __init__(self, config: mhkd.Config, data: mhkd.Data):
        from torchvision import transforms as T

        self.images, self.labels = data.images.cpu().numpy(), data.labels.tolist()
        crop, flip = T.RandomCrop(data.size, config.crop_padding), T.RandomHorizontalFlip()
        steps = T.ToPILImage(), crop, flip, T.ToTensor(), T.Normalize(data.mean, data.std)
        self.transform = T.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


class Usual(Ours):
    """The same work as it is usually written: images from PIL, a loss for each term, .item()."""

    def __init__(self, config: mhkd.Config, data: mhkd.Data, workers: int = 0):
        super().__init__(config, data)
        self.distiller.to(memory_format=torch.contiguous_format)
        how = {"shuffle": True, "num_workers": workers, "pin_memory": self.device.type == "cuda"}
        self.loader = DataLoader(PilImages(config, data), config.batch_size, **how)

    def batches(self):
        for _ in itertools.count():
            yield from self.loader

    def step(self, images, labels) -> tuple[float, float]:
        x, y = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        o, method = self.config.options, self.distiller.methods[-1]
        student, teacher = self.distiller.student(x), self.distiller.teacher(x)
        z_s, z_t = [student.logits], [teacher.logits]
        if student.features:
            z_s, z_t = method.student_heads(student), method.teacher_heads(teacher)
        loss = 0
        for head in range(len(z_s)):
            p_t = F.softmax(z_t[head].detach() / o["tau"], dim=1)
            log_p_s = F.log_softmax(z_s[head] / o["tau"], dim=1)
            kl = F.kl_div(log_p_s, p_t, reduction="batchmean") * o["tau"] ** 2
            term = o["alpha"] * kl + (1 - o["alpha"]) * F.cross_entropy(z_s[head], y)
            loss = loss + (o["beta"] * term + F.cross_entropy(z_t[head], y) if head else term)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), (z_s[0].argmax(dim=1) == y).float().mean().item()


def bench_step(args, device: torch.device) -> dict:
    """Each pair and method: both ways in turn, and where the time of ours goes."""
    mhkd.keep_freed_memory()  # for the whole process, so for both ways
    print("the usual way: in float32; freed memory is kept by the allocator in both\n")
    print(f"{'pair, method':42} {'way':14} {'images/s':>9} {'ratio':>6} {'peak':>11}")
    rows = []
    for pair, method in itertools.product(mhkd.words(args.pairs), mhkd.words(args.methods)):
        settings = {"precision": args.precision, "batch_size": args.batch_size, "method": method}
        config = mhkd.Config(*pair.split(":"), **settings)
        data = random_data(config, 20 * config.batch_size, device)
        ways = {"ours": Ours(config, data)}
        if method in ("kd", "mhkd"):
            ways["the usual way"] = Usual(config, data, args.workers)
        batches = {name: way.batches() for name, way in ways.items()}
        steps = {name: lambda w=w, b=batches[name]: w.step(*next(b)) for name, w in ways.items()}
        taken = in_turn(steps, [()], device, args.rounds)
        row = {"config": config.recorded(), "ways": {}}
        title = f"{pair}, {method}"
        for name, way in ways.items():
            rate = config.batch_size / statistics.median(taken[name])
            ratio = statistics.median(t / o for t, o in zip(taken[name], taken["ours"]))
            peak = peak_memory(functools.partial(way.step, *next(batches[name])), device)
            row["ways"][name] = {"images_per_second": rate, "ratio": ratio, "peak_bytes": peak}
            print(f"{title:42} {name:14} {rate:9.1f} {ratio:6.2f} {peak >> 20:7} MiB", flush=True)
        if len(ways) > 1:
            row["shares"] = ways["ours"].parts(args.rounds)
            print("  ours:", ", ".join(f"{part} {s:.1%}" for part, s in row["shares"].items()))
        rows.append(row)
    print(f"\nn = {args.rounds} steps of each. ratio: time over ours. peak: of tensors in a step,")
    print("gradients among them, beyond weights, momentum and data.")
    return {"rows": rows, "rounds": args.rounds, "workers": args.workers}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the fused loss beside plain PyTorch and torch.compile")
    loss.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    loss.set_defaults(run=bench_loss)
    step = commands.add_parser("step", help="a training step beside the usual way")
    step.add_argument("--pairs", default="wrn_40_2:wrn_16_2", help="teacher:student,...")
    step.add_argument("--methods", default="kd,mhkd", help="others than these two run alone")
    step.add_argument("--precision", default="auto", help="of ours, as for mhkd.py")
    step.add_argument("--batch-size", type=int, default=64)
    step.add_argument("--rounds", type=int, default=20, help="steps of each way, in turn")
    step.add_argument("--workers", type=int, default=0, help="that load images the usual way")
    step.set_defaults(run=bench_step)
    for command in (loss, step):
        command.add_argument("--device", help="cpu, cuda: the best there is")
        command.add_argument("--threads", type=int, help="of PyTorch on the CPU: its own choice")
        command.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    machine = {"device": args.device, "precision": getattr(args, "precision", "auto")}
    config = mhkd.Config(student="resnet8", method="ce", **machine)
    with mhkd.surroundings(config) as device:
        here = mhkd.environment(config, device)
        print(", ".join(f"{n} {here[n]}" for n in ("hardware", "threads", "torch", "loss")))
        result = {"environment": here, **args.run(args, device)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
