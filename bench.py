#!/usr/bin/env python3
"""Benchmarks. They print a table, and write it as JSON where --json names a file.

python bench.py step --teacher wrn_40_2 --student wrn_16_2    # where the time of a training step goes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

import mhkd


def step(arguments: argparse.Namespace) -> dict:
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
    K, N = 100, config.batch_size * (arguments.steps + arguments.warmup)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, config.image_size, config.image_size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(K, (N,), generator=generator)
    data = mhkd.Data(images, labels, images, labels, [""] * K, (0.5,) * 3, (0.25,) * 3, "").to(device)
    torch.manual_seed(0)
    networks = {}
    for role, frozen in (("student", False), ("teacher", True)):
        network = mhkd.build_model(getattr(config, role), K)
        networks[role] = mhkd.MultiHead(network, mhkd.units_of(config, role), K, frozen=frozen)
    method = mhkd.METHODS[config.method](config)
    distiller = mhkd.Distiller(networks["student"], networks["teacher"], method).to(device).train()
    optimizer = torch.optim.SGD(
        [p for p in distiller.parameters() if p.requires_grad],
        lr=1e-3, momentum=config.momentum, weight_decay=config.weight_decay,
    )  # fmt: skip
    order, corners, mirrored = (t.to(device) for t in mhkd.draw_epoch(config, N, generator))

    seconds: dict[str, list[float]] = {}
    mark = 0.0

    def lap(part: str | None = None) -> None:
        nonlocal mark
        if device.type == "cuda":
            torch.cuda.synchronize()
        if part:
            seconds.setdefault(part, []).append(time.perf_counter() - mark)
        mark = time.perf_counter()

    for i in range(0, N, config.batch_size):
        batch = slice(i, i + config.batch_size)
        lap()
        batch_images = mhkd.augment(
            data.train_images[order[batch]], corners[batch], mirrored[batch], config.crop_padding
        )
        batch_labels = data.train_labels[order[batch]]
        x = data.normalise(batch_images)
        lap("data")
        outputs = networks["student"](x)
        lap("student and heads, forward")
        targets = networks["teacher"](x)
        lap("teacher and heads, forward")
        # The loss on leaves of its own, so that its backward can be told from the networks'.
        student_leaves = [z.detach().requires_grad_() for z in outputs]
        teacher_leaves = [z.detach().requires_grad_(z.requires_grad) for z in targets]
        lap()
        loss = sum(method(student_leaves, teacher_leaves, batch_labels).values())
        loss.backward()
        lap("loss, forward and backward")
        leaves = zip([*outputs, *targets], [*student_leaves, *teacher_leaves])
        pairs = [(z, leaf.grad) for z, leaf in leaves if leaf.grad is not None]
        torch.autograd.backward([z for z, _ in pairs], [gradient for _, gradient in pairs])
        lap("networks and heads, backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        accuracy = (outputs[0].argmax(dim=1) == batch_labels).float().mean()
        torch.stack([loss.detach(), accuracy])[0].isfinite().item()
        lap("figures for the log")

    medians = {part: statistics.median(times[arguments.warmup :]) for part, times in seconds.items()}
    total = sum(medians.values())
    print(f"{config.teacher} -> {config.student}, {config.method}, batch {config.batch_size}, n = {arguments.steps}")
    for part, value in medians.items():
        print(f"{part:32} {1e3 * value:9.2f} ms  {100 * value / total:6.2f} %")
    neither = total - sum(value for part, value in medians.items() if "ward" in part and "loss" not in part)
    print(f"{'neither networks nor heads':32} {1e3 * neither:9.2f} ms  {100 * neither / total:6.2f} %")
    print(f"{'step':32} {1e3 * total:9.2f} ms  {config.batch_size / total:.1f} images/s")
    return {
        "config": config.recorded(), "steps": arguments.steps, "seconds": medians,
        "share_of_neither_networks_nor_heads": neither / total, "environment": mhkd.environment(device),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("step", help="where the time of a training step goes")
    command.add_argument("--teacher", default="wrn_40_2")
    command.add_argument("--student", default="wrn_16_2")
    command.add_argument("--method", default="mhkd", choices=["kd", "mhkd"])
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--warmup", type=int, default=3)
    command.add_argument("--device")
    command.set_defaults(run=step)
    for command in commands.choices.values():
        command.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    result = arguments.run(arguments)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
