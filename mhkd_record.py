"""What is recorded of a run: what identifies it, where it ran, and what its student reaches.

mhkd.py imports this file for training. A folder of a run is named after its configuration.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mhkd
import mhkd_code
import mhkd_runs
from mhkd import Data, Distiller, UsageError, find_methods
from mhkd_runs import in_file_name

if TYPE_CHECKING:
    from mhkd_config import Config


def code_of(config: Config) -> dict[str, str]:
    """The hashes of the code of a run, the same in all processes.

    Raises:
        UsageError: the options were changed in place; the name of the folder would not show it.
    """
    if config.replace().options != config.options:
        raise UsageError("Config.options was changed: use config.replace(options={...})")
    return mhkd_runs.of_main(mhkd_code.code_hashes(config))


def check_files(config: Config, code: Mapping[str, str], kinds: Sequence[str]) -> None:
    """Raise an error if code or initial weights are not those of these hashes any more.

    kinds: which of them, for example "student_init".
    """
    now = mhkd_code.network_hashes(config)
    for role, what in (kind.split("_") for kind in kinds):
        key = f"{role}_{what}_sha256"
        if now.get(key) != code.get(key):
            file = f"the code of the {role} {getattr(config, role)}"
            file = f"the file of --{role}-init" if what == "init" else file
            raise UsageError(
                f"{file} was changed during the run: restore it and give the same command again, "
                "which goes on"
            )


def record_of(
    config: Config, data: Data, teacher_record: Mapping[str, Any], code: Mapping[str, str]
) -> dict[str, Any]:
    """What defines a run: its configuration, the hashes of teacher, code and data."""
    differs = dict(config.differs)
    if mhkd.world_size() > 1:  # batch norm sees each process's part of the batch alone
        differs["processes"] = mhkd.world_size()
    if data.unlabelled_sha256:
        differs["unlabelled"] = data.facts["unlabelled"]
    if config.teacher_weights:
        differs["teacher_weights"] = teacher_record["teacher_sha256"][:8]
    return {
        "name": name_of(config, differs, data.sha256),
        "config": {**config.recorded(), "processes": mhkd.world_size()},
        "differs": differs,
        **teacher_record,
        **code,
        "final_options": final_options(config.method),
        "data_sha256": data.sha256,
        "unlabelled_sha256": data.unlabelled_sha256,
        "data_facts": data.facts,
        "normalisation": {"mean": data.mean, "std": data.std},
    }


def final_options(method: str) -> list[str]:
    """The options of the loss on the final outputs; none if a user's method computes it."""
    *_, last = find_methods(method).values()
    return [*last.final_options] if mhkd_code.is_ours(last.final_terms.__module__) else []


def initial_state_sha256(config: Config, data: Data) -> str | None:
    """The hash of the student's initial weights that do not depend on the seed.

    A library gives them, or a FILE.py, which may read them from another file.
    """
    may_be_read = ".py:" in config.student or config.student_init == "pretrained"
    if not may_be_read or any(m.on_teacher for m in find_methods(config.method).values()):
        return None
    images = data.center_crop(data.train[:2]).cpu()

    def hashes(seed: int) -> set[tuple[str, str]]:
        mhkd.set_seed(seed)
        state = mhkd.build_student(config, len(data.classes), images).state_dict()
        return {(name, mhkd_runs.sha256_of_state({name: t})) for name, t in state.items()}

    return hashlib.sha256(repr(sorted(hashes(0) & hashes(1))).encode()).hexdigest()


def name_of(config: Config, differs: Mapping[str, Any], data_sha256: str = "") -> str:
    """The name of a run's folder."""
    # Two folders of images are two data sets.
    dataset = config.dataset + (f"_{data_sha256[:8]}" if config.dataset == "folder" else "")
    who = [dataset, config.teacher, config.student, config.method, f"seed{config.seed}"]
    return folder_name([part for part in who if part], differs)


def environment(config: Config, device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    names = ("data", "unlabelled", "out", "teacher_weights", "compile")
    return {
        **machine(device),
        "mhkd": mhkd.__version__,
        "loss": mhkd.loss_backend() if config.backend != "reference" else "reference",
        **{name: getattr(config, name) for name in names},
    }


def folder_name(who: Iterable[Any], differs: Mapping[str, Any]) -> str:
    """A name for a run's folder from what it is and what differs from the recipe."""
    parts = [in_file_name(part) for part in who]
    parts += [f"{key}={in_file_name(value)}" for key, value in differs.items()]
    name = "-".join(parts)
    if len(name) > 200:  # file systems allow 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif (processors := Path("/proc/cpuinfo")).is_file():
        first = processors.read_text().partition("\n\n")[0]
        entries = dict(re.findall(r"(.+?)\s*: (.*)", first))
        hardware = entries.get("model name") or hardware
        if {"cpu family", "model"} <= entries.keys():  # the name alone may be "AMD EPYC"
            hardware += f" (family {entries['cpu family']}, model {entries['model']})"
    return {
        "device": str(device),
        "hardware": hardware,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **versions,
        "commit": commit_of(Path(mhkd.__file__).resolve()),
    }


def commit_of(script: Path) -> str | None:
    """The commit of a script, marked if the code has changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(script.parent), *arguments]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", script.name)
        changes = git("status", "--porcelain", "--", "mhkd*.py", "csrc")
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_saved(distiller: Distiller, images: Tensor) -> None:
    """Raise an error in the first step if the saved student would not load or would differ.

    images: [B, 3, S, S], for which the loaded student must give the same logits.
    """
    c, what = distiller.config, "the saved student would not fit a newly built one"
    logits, cuda = [], [images.device] * images.is_cuda
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        fresh = mhkd.build_model(c.student, distiller.student.num_classes, "random", c.image_size)
        mhkd_runs.load_state(fresh, distiller.plain_state(), what)
        for network in (distiller.student.model, fresh.to(images.device)):
            torch.manual_seed(0)
            logits.append(network.eval()(images))
    distiller.train()
    # Buffers that are not saved may change slowly. Those without an effect may be counters.
    saved, theirs = distiller.student.model.state_dict(), dict(fresh.named_buffers())
    ours = distiller.student.model.named_buffers()
    both = [(b, theirs[n]) for n, b in ours if n not in saved and n in theirs]
    changed = any(a.shape == b.shape and not torch.equal(a, b) for a, b in both)
    changed &= not torch.equal(*logits)
    if changed or (logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max():
        raise UsageError(
            "the saved student would not compute what the trained one does: keep all tensors "
            f"of {c.student} in its state dict, not in buffers with persistent=False; with "
            "--method lsh its classifier must be a plain nn.Linear"
        )


def check_trained(distiller: Distiller, parameters: list[Tensor], labelled: Tensor) -> None:
    """After the first step, with so many labelled images: what is trained.

    An error if the student has no gradient (a note with a user's method, whose weights may rise
    from 0), a note if the optimizer lacks a parameter.
    """
    student = [p for p in distiller.student.parameters() if p.requires_grad]
    learns = any(p.grad is not None and p.grad.any() for p in student)
    if student and labelled > 0 and not learns:
        if all(mhkd_code.is_ours(type(method).__module__) for method in distiller.methods):
            raise UsageError(mhkd.NO_GRADIENT)
        mhkd.log(f"note: in the first step {mhkd.NO_GRADIENT}")
    known = {id(p) for p in parameters}
    named = distiller.named_parameters()
    if late := [name for name, p in named if p.requires_grad and id(p) not in known]:
        what = f"note: not in the optimizer, and so not trained by it, are {', '.join(late)}"
        mhkd.log(f"{what}: create or unfreeze them in the method's __init__")


def means_of(
    steps: list[Tensor], sizes: list[int], names: list[str], parameters: list[Tensor], epoch: int
) -> dict[str, float]:
    """Means over the images of an epoch. They and the weights must be finite.

    steps: the metrics of each step. sizes: numbers of images. Cross-entropies, whose names begin
    with "ce", are weighted by the labelled images; the training accuracy becomes that of these.
    """
    metrics = mhkd.average_over_processes(torch.stack(steps)).cpu().double()  # [steps, metrics]
    bad = (~metrics.isfinite()).nonzero()
    if len(bad):
        step = bad[0, 0].item()
        place, first = f"is not finite in epoch {epoch}, step {step + 1}", metrics[step, 0]
        terms = ", ".join([names[i] for s, i in bad.tolist() if s == step and i] or ["loss"])
        if first.isfinite():
            raise UsageError(f"the metric {terms} {place}: let the method return a finite number")
        hint = "check the weight of that term, or try a lower --lr"
        raise UsageError(f"the loss {place} ({terms}): {hint}")
    if not all(p.isfinite().all() for p in parameters):
        raise UsageError(
            f"the weights are not finite in epoch {epoch}, after its last step: try a lower --lr"
        )
    images = torch.tensor(sizes, dtype=torch.float64)
    labelled = metrics[:, names.index("labelled")]
    means = {}
    for name, values in zip(names, metrics.T):
        of = labelled if name.split("_")[0] == "ce" else images
        total = (values * of).sum() / of.sum().clamp(min=1)
        if name.startswith("train_accuracy"):
            total = values.sum() / labelled.sum().clamp(min=1)
        if name != "labelled":
            means[name] = total.item()
    return means


def line_of(config: Config, entry: dict[str, Any]) -> str:
    left = datetime.timedelta(seconds=int((config.epochs - entry["epoch"]) * entry["seconds"]))
    val = f"val {entry['val_accuracy']:.2f} %  " if "val_accuracy" in entry else ""
    return (
        f"{config.student} {config.method} epoch {entry['epoch']}/{config.epochs}  "
        f"lr {entry['lr']:.3g}  loss {entry['loss']:.4f}  "
        f"train {entry['train_accuracy']:.2f} %  {val}test {entry['test_accuracy']:.2f} %  "
        f"{entry['images_per_second']:.0f} images/s  {left} left"
    )


class Best:
    """The student of the epoch with the highest validation accuracy, the first of equal ones."""

    def __init__(self) -> None:
        self.accuracy, self.epoch, self.student = -1.0, 0, {}

    def update(self, entry: Mapping[str, Any], student: dict[str, Any]) -> None:
        if entry["val_accuracy"] > self.accuracy:
            self.accuracy, self.epoch = entry["val_accuracy"], entry["epoch"]
            self.student = copy.copy(student)  # with _metadata, the versions of the modules
            for name, t in student.items():
                self.student[name] = t.clone() if isinstance(t, Tensor) else t

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


KEPT = {"last": "the last one", "best": "that of the highest validation accuracy"}


def finish(
    run: Any, config: Config, data: Data, distiller: Distiller, student: dict[str, Any], epoch: int
) -> dict[str, Any]:
    """Save the plain student of an epoch, load it again, and record the loaded one's accuracy."""
    if mhkd_runs.is_main():
        check_files(config, run.record, ["student_code"])
        name = config.student
        if ":" in name:
            name = mhkd.sibling("mhkd_custom").absolute_name(name)
        content = {"model": student, "name": name, "classes": data.classes}
        content |= {"image_size": config.image_size, "mean": [*data.mean], "std": [*data.std]}
        content["resize"] = data.images.shape[1]
        content["code_sha256"] = run.record.get("student_code_sha256")
        for method in distiller.methods:
            content |= method.saved()
        plain = mhkd.build_model(config.student, len(data.classes), "random", config.image_size)
        path = run.save_student(content)
        deployed = mhkd_runs.load_weights(plain, path).to(data.device)
        best = max(run.log, key=lambda entry: entry["test_accuracy"])
        accuracies = mhkd.evaluate(deployed, data)
        before, after = run.log[epoch - 1]["test_accuracy"], accuracies["accuracy"]
        if abs(before - after) > 0.5 + 100 / len(data.test):
            what = (
                f"the student had {before:.2f} % in epoch {epoch}, and saved it has {after:.2f} %"
            )
            mhkd.log(f"note: {what}: does it hold something that is not in its state dict?")
        result = {
            **accuracies,
            "accuracy_is": f"of the student of epoch {epoch}, saved and loaded into the plain "
            f"network; the epoch is {KEPT[config.keep]}",
            "kept_epoch": epoch,
            "best_test_accuracy": best["test_accuracy"],  # chosen by the test images
            "best_test_epoch": best["epoch"],
            "classes": len(data.classes),
            "parameters": sum(p.numel() for p in deployed.parameters()),
            "epochs": len(run.log),
            "seconds": round(sum(entry["seconds"] for entry in run.log), 3),
        }
        if len(data.val):
            best = max(run.log, key=lambda entry: entry["val_accuracy"])
            result |= {"best_val_epoch": best["epoch"], "best_val_accuracy": best["val_accuracy"]}
            result["test_accuracy_at_best_val_epoch"] = best["test_accuracy"]
        run.finish(result, config.keep_checkpoint)
        accuracy = run.result["accuracy"]
        mhkd.log(f"'{path}': {accuracy:.2f} % on the test images after epoch {epoch}")
    mhkd_runs.wait_for_all()
    return mhkd_runs.read_json(run.folder / "result.json")
