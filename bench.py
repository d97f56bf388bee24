"""Benchmarks of the loss and of training steps: a table, and a JSON file with --json.

    python bench.py loss                     # the fused loss, plain PyTorch, torch.compile
    python bench.py step                     # training steps and what they consist of
    python bench.py step --pairs resnet32x4:shufflenetv2 --threads 1 --precision bfloat16
    python bench.py step --teacher-store     # steps that store the teacher's outputs or read them
    python bench.py networks runs/A runs/B   # milliseconds per image of trained networks

Implementations run alternately in one process on the same inputs. A time is the median. A ratio of
steps is the median of the ratios of adjacent steps, which other load on the machine slows equally.
"""

import argparse
import functools
import itertools
import json
import operator
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts memory prints nothing

import torch
import torch.nn.functional as F

import mhkd
import mhkd_config
import mhkd_record
import mhkd_runs
import mhkd_teacher

# --------------------------------------------------------------------------------------------------
# Time and memory
# --------------------------------------------------------------------------------------------------


def in_turn(functions: dict, inputs: list, device: torch.device, rounds: int, most: float = 0.0):
    """Seconds of each function's calls, [rounds] by name; more rounds within `most` seconds."""
    for run in functions.values():  # warm-up: compilation, caches of the allocator
        for one in inputs[:2]:
            run(*one)
    times = {name: [] for name in functions}
    end = time.perf_counter() + most * len(functions)
    for index in itertools.count():
        if index >= rounds and (time.perf_counter() > end or index >= 1000):
            return times
        for name in list(functions)[:: (-1) ** index]:  # none is always the first
            wait(device)
            start = time.perf_counter()
            functions[name](*inputs[index % len(inputs)])
            wait(device)
            times[name].append(time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(call, device: torch.device) -> int:
    """Peak bytes of tensors during the call, minus those that existed before."""
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
SECONDS, ROUNDS = 4.0, 15  # per implementation and shape, whichever takes longer
CACHE_BYTES = 64 * 2**20  # inputs cycle through at least this much, so that no cache has them


def make_inputs(heads, batch, classes, dtype, device) -> list[tuple]:
    """Student logits, teacher logits and labels, more of them than fit into a cache."""

    def one():
        z = [torch.randn(batch, classes, device=device, dtype=dtype) for _ in range(2 * heads)]
        labels = torch.randint(classes, (batch,), device=device)
        return [student.requires_grad_() for student in z[:heads]], z[heads:], labels

    size = 2 * heads * batch * classes * dtype.itemsize
    return [one() for _ in range(max(2, -(-CACHE_BYTES // size)))]


def liger_loss():
    """The same loss by liger-kernel's fused functions, or None if it is not installed."""
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
    functions = {
        name: lambda s, t, y, loss=loss: torch.autograd.grad(loss(s, t, y), s)
        for name, loss in losses.items()
    }
    source, target = torch.ones(2, 2**26, device=device)
    copies = in_turn({"copy": lambda: target.copy_(source)}, [()], device, ROUNDS)["copy"]
    bandwidth = 2 * source.nbytes / statistics.median(copies)  # read and written
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s\n")
    print(f"{'shape':18} {'implementation':14} {'ms':>9} {'ratio':>6} {'of copy':>8} {'peak':>11}")
    shapes, rows = [(*shape, torch.float32) for shape in SHAPES], []
    shapes += [(*shape, torch.bfloat16) for shape in CUDA_SHAPES if device.type == "cuda"]
    for heads, batch, classes, dtype in shapes:
        inputs = make_inputs(heads, batch, classes, dtype, device)
        torch._dynamo.reset()
        taken = in_turn(functions, inputs, device, ROUNDS, SECONDS)
        times = {name: statistics.median(values) for name, values in taken.items()}
        logits = heads * batch * classes * dtype.itemsize  # bytes
        moved = 5 * logits  # forward: two reads; backward: two reads and the gradient
        base = times.get("fused", times["plain PyTorch"])
        for name, median in times.items():
            ratio, fraction = median / base, moved / median / bandwidth
            peak = peak_memory(functools.partial(functions[name], *inputs[0]), device)
            title = f"{heads} x [{batch}, {classes}]"
            row = {"shape": title, "dtype": str(dtype), "implementation": name, "seconds": median}
            row |= {"ratio": ratio, "fraction_of_copy": fraction, "peak_bytes": peak}
            rows.append({**row, "gradient_bytes": logits})
            print(f"{title:18} {name:14} {median * 1e3:9.3f} {ratio:6.1f} {fraction:8.0%}", end=" ")
            print(f"{peak / 2**20:7.2f} of {logits / 2**20:.2f} MiB", flush=True)
    print("\nratio: time divided by that of the fused loss, or of plain PyTorch without it.")
    print("of copy: bandwidth of two reads and a gradient, divided by that of a copy.")
    print("peak: memory, of which the gradients take the second number.")
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


# --------------------------------------------------------------------------------------------------
# bench.py step
# --------------------------------------------------------------------------------------------------


def random_data(config: mhkd.Config, images: int, device: torch.device) -> mhkd.Data:
    """Random images of 100 classes: the time of a step does not depend on the images."""
    side, indices, none = config.image_size, torch.arange(images), torch.arange(0)
    pixels = torch.randint(256, (images, side, side, 3), dtype=torch.uint8)
    labels, classes = torch.randint(100, (images,)), [str(k) for k in range(100)]
    parts = pixels, labels, indices, none, none, classes
    return mhkd.Data(*parts, side, (0.5,) * 3, (0.25,) * 3, "").to(device)


class Step:
    """The inner loop of train()."""

    def __init__(self, config: mhkd.Config, data: mhkd.Data):
        torch.manual_seed(1)
        teacher = None
        if config.teacher:
            teacher = mhkd.build_model(config.teacher, len(data.classes)).to(data.device).eval()
        self.config, self.data, self.device = config, data, data.device
        self.distiller = mhkd.Distiller(config, data, teacher).train()
        if config.teacher_store:
            statistics = {"normalisation": [data.mean, data.std]}
            self.distiller.store = mhkd_teacher.open_store(config, data, self.distiller, statistics)
        if config.compile:  # as train() does
            for network in filter(None, (self.distiller.student, self.distiller.teacher)):
                network.compile(dynamic=False)
        parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        low = config.replace(lr=1e-3)  # for random labels
        self.optimizer = mhkd.make_optimizer(low, parameters)

    def batches(self):
        store = self.distiller.store
        for epoch in itertools.count(1):
            if store:
                store.open((epoch - 1) % self.config.views)
            yield from mhkd.epoch_batches(self.data, self.config, epoch)
            if store:
                store.save()

    def step(self, images, labels, indices) -> torch.Tensor:
        terms, metrics = self.distiller(images, labels, indices)
        self.optimizer.zero_grad()
        self.distiller.backward(terms)
        self.optimizer.step()
        kept = torch.stack(list(metrics.values()))
        assert images.device.type != "cpu" or kept[0].isfinite()
        return kept

    def parts(self, rounds: int) -> dict[str, float]:
        """Fractions of a step's time: each part run alone, forward and backward."""
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


def with_store(config: mhkd.Config, data: mhkd.Data, out: str) -> dict[str, Step]:
    """Steps that store the teacher's outputs, that read them, and of the student alone."""
    storing, stored = (config.replace(teacher_store="float32", out=f"{out}/{n}") for n in "ab")
    reads = Step(stored.replace(teacher_views=1), data)
    for batch in itertools.islice(reads.batches(), -(-len(data.train) // config.batch_size) + 1):
        reads.step(*batch)  # an epoch and a step, before which the epoch's rows are written
    alone = {"method": "ce", "teacher": None, "options": {}}
    return {
        "storing": Step(storing, data),
        "stored": reads,
        "ce": Step(config.replace(**alone), data),
    }


def bench_step(args, device: torch.device) -> dict:
    """Each pair and method: the step and its parts, or steps with and without the store."""
    mhkd_config.keep_freed_memory()
    print(f"{'pair, method':42} {'step':14} {'images/s':>9} {'ratio':>6} {'peak':>11}")
    rows = []
    for pair, method in itertools.product(mhkd.words(args.pairs), mhkd.words(args.methods)):
        settings = {"precision": args.precision, "batch_size": args.batch_size, "method": method}
        if method == "mhkd":
            options = {"head_width": args.head_width, "head_stride": args.head_stride}
            settings["options"] = {n: v for n, v in options.items() if v}
            settings["options"] |= {"teacher_heads": "pretrained"} if args.teacher_store else {}
        settings["compile"] = args.compile
        config = mhkd.Config(*pair.split(":"), **settings)
        epoch = min(20, args.rounds)  # batches
        data = random_data(config, epoch * config.batch_size, device)
        ways = {"step": Step(config, data)}
        if args.teacher_store:
            ways |= with_store(config, data, args.scratch)
        batches = {name: way.batches() for name, way in ways.items()}
        steps = {name: lambda w=w, b=batches[name]: w.step(*next(b)) for name, w in ways.items()}
        taken = in_turn(steps, [()], device, args.rounds)
        row = {"config": config.recorded(), "ways": {}}
        title = f"{pair}, {method}"
        for name, way in ways.items():
            rate = config.batch_size / statistics.median(taken[name])
            ratio = statistics.median(t / o for t, o in zip(taken[name], taken["step"]))
            peak = peak_memory(functools.partial(way.step, *next(batches[name])), device)
            row["ways"][name] = {"images_per_second": rate, "ratio": ratio, "peak_bytes": peak}
            print(f"{title:42} {name:14} {rate:9.1f} {ratio:6.2f} {peak >> 20:7} MiB", flush=True)
        if args.teacher_store:
            pairs = zip(taken["stored"], taken["ce"])
            row["stored_by_ce"] = statistics.median(s / c for s, c in pairs)
            print(f"  time of a step, stored outputs / ce: {row['stored_by_ce']:.3f}")
            sums = (sum(taken[n][: args.rounds // epoch * epoch]) for n in ("storing", "step"))
            row["storing_epoch"] = operator.truediv(*sums)
            print(f"  time of an epoch, storing / without: {row['storing_epoch']:.3f}")
        elif method in ("kd", "mhkd"):
            row["fractions"] = ways["step"].parts(args.rounds)
            print("  parts:", ", ".join(f"{part} {s:.1%}" for part, s in row["fractions"].items()))
        rows.append(row)
    print(f"\nn = {args.rounds} steps of each. ratio: time divided by that of the first line.")
    print("peak: memory of tensors and gradients, without weights, momentum and data.")
    return {"rows": rows, "rounds": args.rounds}


# --------------------------------------------------------------------------------------------------
# bench.py networks
# --------------------------------------------------------------------------------------------------


def bench_networks(args, device: torch.device) -> dict:
    """Milliseconds per image of the networks of runs, also written to RUN/speed.json."""
    calls, rows = {}, {}
    finished = [folder for folder in args.runs if (folder / "result.json").is_file()]
    if not finished:
        raise mhkd.UsageError(f"there is no finished run in {', '.join(map(str, args.runs))}")
    for folder in finished:
        path = folder / "student.pt"
        student = mhkd.load_student(path).to(device)
        rows[folder] = {"student_sha256": mhkd_runs.sha256_of(path), "milliseconds": {}}
        for batch in (1, 64):
            x = torch.rand(batch, 3, student.image_size, student.image_size, device=device)
            calls[folder, batch] = functools.partial(student.model, x)
    with torch.inference_mode():
        taken = in_turn(calls, [()], device, args.rounds, 0.5)
    print("ms per image, batches of 1 and 64:")
    for (folder, batch), times in taken.items():
        rows[folder]["milliseconds"][str(batch)] = 1e3 * statistics.median(times) / batch
    here = mhkd_record.environment(mhkd.Config(student="resnet8", method="ce"), device)
    for folder, row in rows.items():
        mhkd_runs.write_json(folder / "speed.json", row | {"environment": here})
        print(f"{folder}: {', '.join(f'{ms:.3g}' for ms in row['milliseconds'].values())}")
    return {"rows": {str(folder): row for folder, row in rows.items()}, "rounds": args.rounds}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the fused loss, plain PyTorch and torch.compile")
    loss.add_argument("--no-compile", action="store_true", help="without torch.compile")
    loss.set_defaults(run=bench_loss)
    step = commands.add_parser("step", help="training steps")
    step.add_argument(
        "--pairs",
        default="wrn_40_2:wrn_16_2",
        help="teacher:student, separated by commas (default: wrn_40_2:wrn_16_2)",
    )
    step.add_argument(
        "--methods", default="kd,mhkd", help="methods (default: kd,mhkd); parts are shown for these"
    )
    step.add_argument(
        "--precision", default="auto", help="precision, as for mhkd.py (default: auto)"
    )
    step.add_argument(
        "--teacher-store",
        action="store_true",
        help="time steps that store the teacher's outputs (with the pretrained heads of mhkd), "
        "steps that read them, and steps of the student alone",
    )
    step.add_argument("--head-width", type=int, help="of mhkd (default: 256)")
    step.add_argument("--head-stride", type=int, help="of mhkd (default: 1)")
    step.add_argument("--batch-size", type=int, default=64, help="images (default: 64)")
    step.add_argument("--rounds", type=int, default=20, help="steps of each (default: 20)")
    step.add_argument("--compile", action="store_true", help="torch.compile the networks")
    step.set_defaults(run=bench_step)
    networks = commands.add_parser("networks", help="milliseconds per image of trained networks")
    networks.add_argument(
        "runs", nargs="+", type=Path, help="folders of runs; other paths are skipped"
    )
    networks.add_argument("--rounds", type=int, default=20, help="calls of each (default: 20)")
    networks.set_defaults(run=bench_networks)
    for command in (loss, step, networks):
        command.add_argument("--device", help="cpu or cuda (default: cuda if available)")
        command.add_argument("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
        command.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return mhkd_config.command_line("bench.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads or torch.get_num_threads())
    machine = {"device": args.device, "precision": getattr(args, "precision", "auto")}
    config = mhkd.Config(student="resnet8", method="ce", **machine)
    with mhkd.runtime(config) as device:
        here = mhkd_record.environment(config, device)
        print(", ".join(f"{n} {here[n]}" for n in ("hardware", "threads", "torch", "loss")))
        with tempfile.TemporaryDirectory() as args.scratch:
            result = {"environment": here, **args.run(args, device)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
