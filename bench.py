"""Benchmarks. They print a table, and write it as JSON where --json names a file.

    python bench.py loss    # the fused loss beside plain PyTorch and torch.compile
    python bench.py step    # a training step beside one as it is usually written, and where its time goes

Everything that is compared runs side by side in one process on the same inputs, taken in turn, and the median counts.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler, which counts memory here, need not talk

import torch
import torch.nn.functional as F

import mhkd

# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------

CACHE_BYTES = 64 * 2**20  # inputs rotate through at least this much, so that no cache holds the next ones
SECONDS = 4.0  # of measuring for each contestant and shape, in rounds with the others
FEWEST_ROUNDS, MOST_ROUNDS = 15, 1000


def medians(contestants: dict, inputs: list, device: str) -> dict[str, float]:
    """Median seconds of each contestant, called in turn on inputs in turn."""
    for run in contestants.values():  # warm-up: compilation, caches of the allocator
        for one in inputs[:3]:
            run(one)
    times = {name: [] for name in contestants}
    end = time.perf_counter() + SECONDS * len(contestants)
    for index in range(MOST_ROUNDS):
        if index >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in contestants.items():
            one = inputs[index % len(inputs)]
            for leaf in one.leaves:
                leaf.grad = None
            times[name].append(seconds(run, one, device))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run, one, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run(one)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run(one)
    return time.perf_counter() - start


def extra_memory(run, one, device: str) -> int:
    """Peak bytes beyond the inputs during one call, gradients included."""
    for leaf in one.leaves:
        leaf.grad = None
    return peak_memory(lambda: run(one), device)


def peak_memory(call, device: str) -> int:
    """Peak bytes of tensors during the call beyond those there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


# --------------------------------------------------------------------------------------------------
# bench.py loss
# --------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    student: list
    teacher: list
    labels: torch.Tensor
    empty: "Inputs | None" = None  # as many heads without a row, for the empty operator

    @property
    def leaves(self):
        return [*self.student, *(self.empty.student if self.empty else [])]


SHAPES = [(4, 64, 100), (4, 256, 1000), (4, 64, 21841), (1, 64, 50257)]
CUDA_SHAPES = [(1, 8192, 32000), (1, 4096, 151936)]  # bfloat16


def make_inputs(heads, batch, classes, dtype, device) -> list[Inputs]:
    size = 2 * heads * batch * classes * dtype.itemsize
    number = max(2, -(-CACHE_BYTES // size))

    def one(rows, empty=None):
        z = [torch.randn(rows, classes, device=device, dtype=dtype) for _ in range(2 * heads)]
        labels = torch.randint(classes, (rows,), device=device)
        return Inputs([student.requires_grad_() for student in z[:heads]], z[heads:], labels, empty)

    return [one(batch, one(0)) for _ in range(number)]


def forward_and_backward(loss):
    def run(inputs):
        loss(inputs.student, inputs.teacher, inputs.labels).backward()

    return run


def liger():
    """liger-kernel's loss for the same work, if it is installed: its fused cross-entropy and its divergence."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    cross_entropy, divergence = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student, teacher, labels, tau=4.0, alpha=0.9):
        total = 0
        for head, (z_s, z_t) in enumerate(zip(student, teacher, strict=True)):
            kl = divergence(F.log_softmax(z_s / tau, dim=1), F.log_softmax(z_t / tau, dim=1)) * tau**2
            total = total + (0.5 if head else 1.0) * (alpha * kl + (1 - alpha) * cross_entropy(z_s, labels))
        return total

    return forward_and_backward(loss)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device).fill_(1.0)
    target = torch.empty_like(source).fill_(1.0)

    class Nothing:
        leaves = ()

    best = medians({"copy": lambda _: target.copy_(source)}, [Nothing()], device)["copy"]
    return 2 * source.numel() * source.element_size() / best


def bench_loss(args) -> dict:
    device = args.device
    backend = mhkd.loss_backend()
    fused = backend.startswith("fused")
    environment = {
        "hardware": mhkd.hardware_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend,
        "device": device,
        "tau": 4.0,
        "copy_bytes_per_second": copy_bandwidth(device),
    }
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    titles = f"{'shape':>18} {'dtype':>8} {'contestant':>14} {'ms':>9} {'ratio':>7} {'GB/s':>7} {'of copy':>8}"
    print(f"\n{titles} {'memory':>10} {'gradients':>10}")
    # The empty operator is the same one, with its schema, checks and autograd, on heads without a row.
    run_fused = forward_and_backward(lambda s, t, y: mhkd.mhkd_loss(s, t, y, backend="fused"))
    rows = []
    shapes = [(*shape, torch.float32) for shape in SHAPES]
    if device == "cuda":
        shapes += [(*shape, torch.bfloat16) for shape in CUDA_SHAPES]
    for heads, batch, classes, dtype in shapes:
        inputs = make_inputs(heads, batch, classes, dtype, device)
        torch._dynamo.reset()

        def plain(s, t, y):
            return mhkd.mhkd_loss(s, t, y, backend="reference")

        contestants = {"plain PyTorch": forward_and_backward(plain)}
        if not args.no_compile:
            contestants["torch.compile"] = forward_and_backward(torch.compile(plain))
        if device == "cuda" and (peer := liger()):
            contestants["liger-kernel"] = peer
        if fused:
            contestants["fused"] = run_fused
            contestants["empty operator"] = lambda one: run_fused(one.empty)
        times = medians(contestants, inputs, device)
        logits = heads * batch * classes * dtype.itemsize
        moved = 5 * logits  # forward: two reads; backward: two reads and the gradient
        for name, median in times.items():
            memory = None if name == "empty operator" else extra_memory(contestants[name], inputs[0], device)
            row = {
                "heads": heads, "batch": batch, "classes": classes, "dtype": str(dtype).removeprefix("torch."),
                "contestant": name, "seconds": median, "slower_than_fused": median / times.get("fused", median),
                "bytes_per_second": None if name == "empty operator" else moved / median,
                "extra_bytes": memory, "gradient_bytes": logits,
            }  # fmt: skip
            rows.append(row)
            shape = f"{heads} x [{batch}, {classes}]"
            line = f"{shape:>18} {row['dtype']:>8} {name:>14} {median * 1e3:9.3f} {row['slower_than_fused']:7.1f}"
            if memory is not None:
                share = moved / median / environment["copy_bytes_per_second"]
                line += f" {moved / median / 1e9:7.1f} {share:8.0%} {memory / 2**20:6.2f} MiB {logits / 2**20:6.2f} MiB"
            print(line, flush=True)
    print("\nratio: time over that of the fused loss. GB/s: the logits read twice (forward, backward) and the gradient")
    print("written once, over the time. memory: peak beyond the inputs, in which the gradients are included.")
    return {"environment": environment, "rows": rows}


# --------------------------------------------------------------------------------------------------
# bench.py step
# --------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What both ways of training start from: the same random images, networks with the same weights."""

    config: mhkd.Config
    data: mhkd.Data
    teacher: torch.nn.Module
    device: torch.device

    @classmethod
    def make(cls, pair: str, method: str, arguments, **values) -> "Bench":
        teacher, student = pair.split(":")
        names = ("batch_size", "units", "precision", "channels_last", "compile")
        given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
        config = mhkd.Config(teacher=teacher, student=student, method=method, **given | values)
        config, device = mhkd.resolve(config), mhkd.pick_device(arguments.device)
        # An epoch of the one is at least what a block of steps needs.
        K, N = 100, max(arguments.images, config.batch_size * (arguments.steps + WARMUP))
        generator, side = torch.Generator().manual_seed(0), config.image_size
        images = torch.randint(256, (N, side, side, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(K, (N,), generator=generator)
        data = mhkd.Data(images, labels, images, labels, [""] * K, (0.5,) * 3, (0.25,) * 3, "").to(device)
        torch.manual_seed(1)
        return cls(config, data, mhkd.build_model(teacher, K).to(device).eval(), device)

    def optimizer(self, parameters) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.SGD(parameters, lr=1e-3, momentum=c.momentum, weight_decay=c.weight_decay)

    def precision(self):
        return mhkd.tf32_in_convolutions(mhkd.precision_on(self.device, self.config) == "tf32")

    def ours(self) -> tuple[mhkd.Distiller, torch.optim.Optimizer]:
        distiller = mhkd.build_distiller(self.config, self.teacher, self.data).train()
        if self.config.compile == "yes":
            distiller.compile_networks()
        return distiller, self.optimizer([p for p in distiller.parameters() if p.requires_grad])


WARMUP = 2  # steps of each block that are not counted


def our_way(bench: Bench):
    """A generator that makes a step of mhkd.py at each next()."""
    distiller, optimizer = bench.ours()
    generator = torch.Generator().manual_seed(0)
    with bench.precision():
        while True:
            for images, labels, indices in mhkd.epoch_batches(bench.data, bench.config, generator):
                if len(labels) == bench.config.batch_size:
                    figures = mhkd.train_step(distiller, optimizer, images, labels, indices)
                    yield torch.stack(list(figures.values()))


class PilImages(torch.utils.data.Dataset):
    """Images and labels as torchvision's data sets give them."""

    def __init__(self, bench: Bench):
        from torchvision import transforms

        c, data = bench.config, bench.data
        self.images, self.labels = data.train_images.cpu().numpy(), data.train_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(c.image_size, padding=c.crop_padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def usual_way(bench: Bench, workers: int):
    """The same work as it is usually written: worker processes with PIL, a loss for each term, figures every step."""
    c, K = bench.config, len(bench.data.classes)
    names = {role: mhkd.units_of(c, role) for role in ("teacher", "student")}
    torch.manual_seed(c.seed)
    student = mhkd.MultiHead(mhkd.build_model(c.student, K), names["student"], K).to(bench.device).train()
    teacher = mhkd.MultiHead(copy.deepcopy(bench.teacher), names["teacher"], K, frozen=True).to(bench.device).train()
    optimizer = bench.optimizer([*student.parameters(), *teacher.heads.parameters()])
    images = PilImages(bench)
    loader = torch.utils.data.DataLoader(
        images, c.batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=bench.device.type == "cuda"
    )
    while True:
        for x, y in loader:
            x, y = x.to(bench.device, non_blocking=True), y.to(bench.device, non_blocking=True)
            outputs, loss = student(x), 0
            for head, (z_s, z_t) in enumerate(zip(outputs, teacher(x))):
                p_t = F.softmax(z_t.detach() / c.tau, dim=1)
                kl = F.kl_div(F.log_softmax(z_s / c.tau, dim=1), p_t, reduction="batchmean") * c.tau**2
                weighed = c.alpha * kl + (1 - c.alpha) * F.cross_entropy(z_s, y)
                loss = loss + (c.beta * weighed + F.cross_entropy(z_t, y) if head else weighed)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item(), (outputs[0].argmax(dim=1) == y).float().mean().item()


def compare(contestants: dict, arguments) -> dict[str, dict[str, float]]:
    """Of each, in turn in blocks of steps: images per second, the median block; the peak memory of a step; and how
    much faster the first one is, the median of the ratios of blocks that followed one another.

    A contestant is a Bench and what makes its generator of steps.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for _ in range(arguments.rounds):
        for name, (bench, make) in contestants.items():
            steps = make(bench)
            for _ in range(WARMUP):
                next(steps)
            wait(bench.device)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                next(steps)
            wait(bench.device)
            rates[name].append(bench.config.batch_size * arguments.steps / (time.perf_counter() - start))
            if name not in memory:
                memory[name] = peak_memory(lambda steps=steps: next(steps), bench.device.type)
            steps.close()  # ends the worker processes
    first = next(iter(rates.values()))
    return {
        name: {
            "images_per_second": statistics.median(values),
            "first_is_faster": statistics.median(a / b for a, b in zip(first, values)),
            "peak_bytes": memory[name],
        }
        for name, values in rates.items()
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def breakdown(bench: Bench, steps: int) -> dict[str, float]:
    """Median seconds of the parts of a step of ours, made one after another."""
    config, data = bench.config, bench.data
    distiller, optimizer = bench.ours()
    method = distiller.objective.methods[-1]
    seconds: dict[str, list[float]] = {}
    mark = 0.0

    def lap(part: str | None = None) -> None:
        nonlocal mark
        wait(bench.device)
        if part:
            seconds.setdefault(part, []).append(time.perf_counter() - mark)
        mark = time.perf_counter()

    batches = mhkd.epoch_batches(data, config, torch.Generator().manual_seed(0))
    for _ in range(steps + WARMUP):
        lap()
        x, labels, indices = next(batches)
        lap("data")
        student = distiller.observe(distiller.student, x)
        lap("student, forward")
        teacher = distiller.observe(distiller.teacher, x)
        lap("teacher, forward")
        if config.method in ("kd", "mhkd"):
            loss = split_loss(method, student, teacher, labels, lap)
        else:
            terms = distiller.objective(mhkd.Step(student, teacher, labels, indices))
            loss = sum(terms.values())
            lap("method, forward")
            distiller.backward(terms)
            lap("all, backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        accuracy = (student.logits.argmax(dim=1) == labels).float().mean()
        torch.stack([loss.detach(), accuracy])[0].isfinite().item()
        lap("figures for the log")
    return {part: statistics.median(times[WARMUP:]) for part, times in seconds.items()}


def split_loss(method, student, teacher, labels, lap) -> torch.Tensor:
    """Heads, loss and backward of kd or mhkd, each timed on its own."""
    outputs, targets = [student.logits], [teacher.logits]
    if hasattr(method, "all_logits"):
        outputs, targets = method.all_logits(student, "student"), method.all_logits(teacher, "teacher")
    lap("heads, forward")
    # The loss on leaves of its own, so that its backward can be told from the networks'.
    student_leaves = [z.detach().requires_grad_() for z in outputs]
    teacher_leaves = [z.detach().requires_grad_(z.requires_grad) for z in targets]
    lap()
    if hasattr(method, "all_logits"):
        loss = method.loss(student_leaves, teacher_leaves, labels)
    else:
        bare = [mhkd.Outputs(z[0], {}, None) for z in (student_leaves, teacher_leaves)]
        loss = method.final_terms(mhkd.Step(*bare, labels, None))["kd"]
    loss.backward()
    lap("loss, forward and backward")
    leaves = zip([*outputs, *targets], [*student_leaves, *teacher_leaves])
    pairs = [(z, leaf.grad) for z, leaf in leaves if leaf.grad is not None]
    torch.autograd.backward([z for z, _ in pairs], [gradient for _, gradient in pairs])
    lap("networks and heads, backward")
    return loss


def bench_step(arguments) -> dict:
    """Each pair and method: both ways side by side, where the time of ours goes, how it grows."""
    pairs = mhkd.TABLES["table1"].pairs.split() if arguments.pairs == "all" else mhkd.words(arguments.pairs)
    rows, growth = [], []
    for pair in pairs:
        for name in mhkd.words(arguments.methods):
            bench = Bench.make(pair, name, arguments)
            with bench.precision():
                parts = breakdown(bench, arguments.steps)
            total = sum(parts.values())
            print(f"{pair}, {name}, batch {bench.config.batch_size}, n = {arguments.steps} steps")
            for part, value in parts.items():
                print(f"  {part:30} {1e3 * value:9.2f} ms  {100 * value / total:6.2f} %")
            row = {"config": bench.config.recorded(), "seconds": parts}
            ways = {"ours": (bench, our_way)}
            if name in ("kd", "mhkd"):
                row["neither_networks_nor_heads"] = (
                    1 - sum(value for part, value in parts.items() if "ward" in part and "loss" not in part) / total
                )
                print(f"  neither networks nor heads {row['neither_networks_nor_heads']:27.2%}")
                ways["the usual way"] = (bench, lambda bench: usual_way(bench, arguments.workers))
            row["ways"] = compare(ways, arguments)
            print_rates(row["ways"])
            rows.append(row)
        if arguments.growth:
            size = bench.config.batch_size
            several = {f"mhkd, {n} head{'s' * (n > 1)}": ("mhkd", {"units": (1, 2, 3)[:n]}) for n in (1, 2, 3)}
            several = {"kd": ("kd", {})} | several
            several |= {f"mhkd, batch {b}": ("mhkd", {"batch_size": b}) for b in (size // 4, 4 * size)}
            benches = {title: Bench.make(pair, method, arguments, **v) for title, (method, v) in several.items()}
            print(f"{pair}, batch {size} unless it says otherwise")
            found = compare({title: (bench, our_way) for title, bench in benches.items()}, arguments)
            print_rates(found)
            growth.append({"pair": pair, "batch_size": size, "ways": found})
    print("peak memory: of tensors in a step, gradients among them, beyond weights, momentum and data")
    settings = {"steps": arguments.steps, "rounds": arguments.rounds, "workers": arguments.workers}
    here = mhkd.environment(mhkd.pick_device(arguments.device))
    return {"rows": rows, "growth": growth, **settings, "environment": here}


def print_rates(ways: dict[str, dict[str, float]]) -> None:
    for name, way in ways.items():
        rate, ratio, memory = way["images_per_second"], way["first_is_faster"], way["peak_bytes"] / 2**20
        print(f"  {name:20} {rate:9.1f} images/s  ratio {ratio:5.2f}  peak {memory:8.1f} MiB")
    print(flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the fused loss beside plain PyTorch and torch.compile")
    loss.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    loss.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    loss.set_defaults(run=bench_loss)
    step = commands.add_parser("step", help="a training step beside the usual way")
    step.add_argument("--pairs", default="wrn_40_2:wrn_16_2", help="teacher:student,...; all: those of Table 1")
    step.add_argument("--methods", default="kd,mhkd", help="kd and mhkd are compared with the usual way")
    step.add_argument("--units", type=mhkd.integers, help="of mhkd: 1 or 1,2 or 1,2,3")
    step.add_argument("--images", type=int, default=0, help="of the training set, for the banks of crd (CIFAR: 50000)")
    step.add_argument("--batch-size", type=int)
    step.add_argument("--growth", action="store_true", help="also ours with 0 to 3 heads, a quarter and 4 batches")
    for name in ("precision", "channels_last", "compile"):
        step.add_argument(f"--{name.replace('_', '-')}", help="of ours, as for mhkd.py")
    step.add_argument("--steps", type=int, default=10, help="in a block")
    step.add_argument("--rounds", type=int, default=3, help="blocks of each way")
    step.add_argument("--workers", type=int, default=2, help="processes that load images the usual way")
    step.add_argument("--device")
    step.set_defaults(run=bench_step)
    for command in (loss, step):
        command.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    result = args.run(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
