"""Benchmarks. They print a table, and write it as JSON where --json names a file.

    python bench.py loss    # the fused loss beside plain PyTorch and torch.compile
    python bench.py step    # where the time of a training step goes

Everything that is compared runs side by side in one process on the same inputs, taken in turn, and the median counts.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import mhkd

# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------

CACHE_BYTES = 64 * 2**20  # inputs rotate through at least this much, so that no cache holds the next ones
LARGEST_SETS = 8
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


def extra_memory(run, one, device: str) -> int | None:
    """Peak bytes beyond the inputs during one call, gradients included."""
    for leaf in one.leaves:
        leaf.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(one)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run(one)
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
    number = min(LARGEST_SETS, max(2, -(-CACHE_BYTES // size)))

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
    """The parts of a training step, timed one after another on random images: medians over the steps."""
    config = mhkd.resolve(
        mhkd.Config(
            teacher=arguments.teacher,
            student=arguments.student,
            method=arguments.method,
            batch_size=arguments.batch_size,
        )
    )
    device = mhkd.pick_device(arguments.device)
    K, steps = 100, arguments.steps + arguments.warmup
    N = max(arguments.images, config.batch_size * steps)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, config.image_size, config.image_size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(K, (N,), generator=generator)
    data = mhkd.Data(images, labels, images, labels, [""] * K, (0.5,) * 3, (0.25,) * 3, "").to(device)
    distiller = mhkd.build_distiller(config, mhkd.build_model(config.teacher, K).to(device), data).train()
    method = distiller.objective.methods[-1]
    optimizer = torch.optim.SGD(
        [p for p in distiller.parameters() if p.requires_grad],
        lr=1e-3, momentum=config.momentum, weight_decay=config.weight_decay,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {}
    mark = 0.0

    def lap(part: str | None = None) -> None:
        nonlocal mark
        if device.type == "cuda":
            torch.cuda.synchronize()
        if part:
            seconds.setdefault(part, []).append(time.perf_counter() - mark)
        mark = time.perf_counter()

    batches = mhkd.epoch_batches(data, config, generator)
    for _ in range(steps):
        lap()
        x, batch_labels, indices = next(batches)
        lap("data")
        student = distiller.student(x)
        lap("student, forward")
        teacher = distiller.teacher(x)
        lap("teacher, forward")
        if config.method in ("kd", "mhkd"):
            loss = split_loss(method, student, teacher, batch_labels, lap)
        else:
            terms = distiller.objective(mhkd.Step(student, teacher, batch_labels, indices))
            loss = sum(terms.values())
            lap("method, forward")
            distiller.backward(terms)
            lap("all, backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        accuracy = (student.logits.argmax(dim=1) == batch_labels).float().mean()
        torch.stack([loss.detach(), accuracy])[0].isfinite().item()
        lap("figures for the log")

    medians = {part: statistics.median(times[arguments.warmup :]) for part, times in seconds.items()}
    total = sum(medians.values())
    print(f"{config.teacher} -> {config.student}, {config.method}, batch {config.batch_size}, n = {arguments.steps}")
    for part, value in medians.items():
        print(f"{part:32} {1e3 * value:9.2f} ms  {100 * value / total:6.2f} %")
    neither = total - sum(value for part, value in medians.items() if "ward" in part and "loss" not in part)
    split = config.method in ("kd", "mhkd")
    if split:
        print(f"{'neither networks nor heads':32} {1e3 * neither:9.2f} ms  {100 * neither / total:6.2f} %")
    print(f"{'step':32} {1e3 * total:9.2f} ms  {config.batch_size / total:.1f} images/s")
    return {
        "config": config.recorded(), "steps": arguments.steps, "seconds": medians,
        "share_of_neither_networks_nor_heads": neither / total if split else None,
        "environment": mhkd.environment(device),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the fused loss beside plain PyTorch and torch.compile")
    loss.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    loss.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    loss.set_defaults(run=bench_loss)
    step = commands.add_parser("step", help="where the time of a training step goes")
    step.add_argument("--teacher", default="wrn_40_2")
    step.add_argument("--student", default="wrn_16_2")
    step.add_argument("--method", default="mhkd", help="kd and mhkd are split further")
    step.add_argument("--images", type=int, default=0, help="of the training set, for the banks of crd (CIFAR: 50000)")
    step.add_argument("--batch-size", type=int, default=64)
    step.add_argument("--steps", type=int, default=20)
    step.add_argument("--warmup", type=int, default=3)
    step.add_argument("--device")
    step.set_defaults(run=bench_step)
    for command in (loss, step):
        command.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    result = args.run(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
