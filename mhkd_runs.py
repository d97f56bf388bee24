"""Run folders of mhkd.py: files, locks, weights, checkpoints, logs.

A run folder holds config.json, log.jsonl, checkpoint.pt, checkpoint-before.pt, student.pt and
result.json. Each file is replaced atomically, so that a process that is killed at any moment leaves
the old or the new file. One process at a time works in a folder. This module imports only PyTorch
and the standard library and knows nothing about distillation methods.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pickle
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHECKPOINTS = ("checkpoint.pt", "checkpoint-before.pt")  # the latest and the one before


class RunError(ValueError):
    """A file or folder cannot be used. The message is one sentence that says what to do."""

    user_error = True  # mhkd_config.command_line() prints the message without a traceback


class AnotherRun(RunError):
    """The folder belongs to a run with other settings, data or code."""


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or something like it, has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def is_main() -> bool:
    """Whether this process writes files and prints: the first one under torchrun."""
    if joined():
        return dist.get_rank() == 0
    return not under_torchrun() or int(os.environ["RANK"]) == 0


def log(text: str) -> None:
    """Print a line in the main process, above the progress bar if tqdm shows one."""
    if is_main():
        tqdm = sys.modules.get("tqdm")
        (tqdm.tqdm.write if tqdm else print)(text)
        sys.stdout.flush()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        hint = "free disk space or fix the cause, then run the same command again"
        raise RunError(f"'{path}' could not be written ({first_line(error)}): {hint}") from error


def write_atomically(path: Path, write: Callable[[Any], Any], keep: Path | None = None) -> None:
    """Call write(file) on a temporary file, flush it to the disk, then rename it to `path`.

    keep: where to move the previous file.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """The object in a JSON file, which must have these keys; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content.keys() >= {*keys}:
            raise ValueError(f"it must have {', '.join(keys)}")
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise RunError(f"'{path}' is damaged ({reason}): move its folder away") from error
    return content


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_state(state: Mapping[str, Any]) -> str:
    """The hash of a state dict with tensors of any dtype."""
    digest = hashlib.sha256()
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_quantized:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            # A copy: NumPy would mark the storage as one that cannot be resized.
            value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path, reason: str, wait: bool = True) -> Iterator[bool]:
    """Hold a folder, which is created if missing; the value is whether it is held.

    While another process holds it, print `reason` and wait, or without `wait` give False at once.
    The operating system releases the lock however the process ends, and leaves no file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield True
        return
    import fcntl

    handle, held = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if held := wait:
                log(f"{reason}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield held
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked_by_main(folder: Path, reason: str) -> Iterator[None]:
    """Under torchrun the main process holds a folder while all of them run.

    While another run holds it, they tell each other so every second, because PyTorch limits the
    time that a process waits for another.
    """
    if not joined():
        with locked(folder, reason):
            yield
        return
    held, said = [False], False
    while True:
        with contextlib.ExitStack() as stack:
            if is_main():
                held[0] = stack.enter_context(locked(folder, reason, wait=False))
            dist.broadcast_object_list(held)
            if held[0]:
                yield
                return
        if not said:
            log(f"{reason}: waiting for it")
        said = True
        time.sleep(1)


def joined() -> bool:
    """Whether this process has joined the others of its run."""
    return dist.is_available() and dist.is_initialized()


def check_processes(model: nn.Module, epochs: int) -> None:
    """Under torchrun: raise an error unless all processes have the same weights and epochs."""
    if joined():
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (epochs, sha256_of_state(model.state_dict())))
        if len({*states}) > 1:
            raise RunError(
                "the processes of torchrun start with different weights or epochs: initialise "
                "networks with torch, numpy or random only, and use one --out for all processes"
            )


def of_main(value: Any) -> Any:
    """Under torchrun: the value that the main process has."""
    values = [value]
    if joined():
        dist.broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Under torchrun: until all processes have come here."""
    if joined():
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def load_file(path: Path) -> Any:
    """Load a file of torch.save that holds only tensors and plain values; check its CRC sums."""
    if not path.is_file():
        raise RunError(f"there is no checkpoint '{path}'")
    try:
        if zipfile.is_zipfile(path):  # PyTorch itself does not compare the checksums
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of its part {bad} is wrong")
        safe = [argparse.Namespace, *numpy_scalars()]  # the CRD benchmark stores its options
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, which could run code: save network.state_dict()"
            with open(path, "rb") as file:
                if not file.read(2).startswith((b"PK", b"\x80")):  # a ZIP file or a pickle
                    reason = "torch.save() has not written it"
        raise RunError(f"'{path}' is damaged or no checkpoint ({reason})") from error


def numpy_scalars() -> list[Any]:
    """What a NumPy number in a checkpoint needs to be loaded."""
    try:
        import numpy as np
    except ImportError:
        return []
    core = getattr(np, "_core", None) or np.core
    kinds = [type(np.dtype(c)) for c in "?bhilqBHILQefd"]
    return [core.multiarray.scalar, np.dtype, *kinds]


def read_state(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict from a file, alone or as its entry "model", "state_dict" or similar.

    names: entries of the network, to recognise the prefixes of DataParallel, torch.compile,
    Lightning and AveragedModel, whose counter is left out.
    """
    content = load_file(Path(path))
    if isinstance(content, dict):
        if "distiller" in content:
            raise RunError(f"'{path}' is a checkpoint of a run: use the student.pt beside it")
        keys = ("model", "state_dict", "model_state_dict", "net", "network")
        content = next(
            (content[key] for key in keys if isinstance(content.get(key), dict)), content
        )
    if not isinstance(content, dict) or not all(
        isinstance(name, str)
        and isinstance(t, Tensor)
        and t.layout == torch.strided
        and not (t.is_complex() or t.is_meta)
        for name, t in content.items()
    ):
        raise RunError(f"'{path}' holds no state dict: save {{'model': network.state_dict()}}")
    if {*content}.isdisjoint(names):
        versions = getattr(content, "_metadata", None) or {}
        content = {name: tensor for name, tensor in content.items() if name != "n_averaged"}
        for prefix in ("module.", "_orig_mod.", "model.", "net."):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
            # Names of modules end before the dot; "" is the network.
            versions = {f"{n}.".removeprefix(prefix)[:-1]: v for n, v in versions.items()}
        content = with_versions(content, versions)
    return content


def with_versions(state: Mapping[str, Any], versions: Any) -> dict[str, Any]:
    """A state dict with the versions of the modules, which some layers need to be loaded."""
    state = OrderedDict(state)
    state._metadata = versions
    return state


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint, {"model": state_dict} or a state dict alone, strictly into a network.

    Raises:
        RunError: the file is missing or damaged, or has another network or number of classes.
    """
    state = read_state(path, model.state_dict())
    load_state(model, state, f"'{path}' is of another network or number of classes")
    return model


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], what: str, new_classes: int = 0
) -> None:
    """Load a state dict strictly; `what` begins the error message if an entry does not fit.

    new_classes: number of classes; if given, a classifier of another number is left as it is.
    """
    with contextlib.suppress(RuntimeError):  # some modules accept other shapes, as observers do
        model.load_state_dict(state)
        return
    theirs = {key: tuple(t.shape) for key, t in state.items() if isinstance(t, Tensor)}
    lazy = nn.UninitializedParameter, nn.UninitializedBuffer  # of any shape
    ours = {
        key: theirs.get(key, ()) if isinstance(t, lazy) else tuple(t.shape)
        for key, t in model.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor)
    }
    for key in {**ours, **theirs}:
        a, b = theirs.get(key, "missing"), ours.get(key, "missing")
        new_classifier = "missing" not in (a, b) and (new_classes, *a[1:]) == b
        if a != b and not (new_classes and new_classifier):
            raise RunError(f"{what}: '{key}' is {a} in the file, {b} in the network")
    fitting = {key: tensor for key, tensor in state.items() if theirs.get(key) == ours.get(key)}
    versions = getattr(state, "_metadata", None)
    model.load_state_dict(with_versions(fitting, versions), strict=False)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


class Run:
    """A run folder and what it has computed so far.

    Args:
        folder: the folder, which must exist and be locked.
        record: what defines the run: "config" and entries ending in "_sha256" are compared with
            those in the folder; everything is written to config.json and result.json.
        overwrite: move the files of another run away instead of raising an error.

    Attributes:
        result: the content of result.json if the run has finished and its student.pt is intact.
        log: a dict for each epoch.

    Raises:
        RunError: the folder holds another run or a damaged record.
    """

    def __init__(self, folder: Path, record: dict[str, Any], overwrite: bool = False):
        self.folder, self.record, self.log = folder, record, []
        self.writer: Any = None  # for TensorBoard
        self.result: dict[str, Any] | None = None
        try:
            for name in ("config.json", "result.json"):
                if before := read_json(folder / name, "config"):
                    self._refuse_another(before)
        except RunError:
            if not overwrite:
                raise
            before = None
            if is_main():
                self._move_aside()
        student = folder / "student.pt"
        if before and student.is_file() and sha256_of(student) == before.get("student_sha256"):
            self.result = before
        elif before:
            what = "has changed and will be renamed" if student.is_file() else "is missing"
            log(f"note: '{student}' {what}: the run is repeated")

    def _move_aside(self) -> None:
        """Move the files of the folder, which stays and stays locked, to OUT/replaced."""
        parent = self.folder.parent / "replaced"
        aside = unused(parent / f"{self.folder.name}-{i}" for i in itertools.count(1))
        aside.mkdir(parents=True)
        for path in self.folder.iterdir():
            os.replace(path, aside / path.name)
        log(f"note: the previous content of '{self.folder}' was moved to '{aside}'")

    def _refuse_another(self, before: Mapping[str, Any]) -> None:
        def identity(record: Mapping[str, Any]) -> dict[str, Any]:
            config = {**record["config"], **record["config"].get("options", {}), "options": None}
            hashes = {k: record.get(k) for k in self.record if k.endswith("_sha256")}
            units = json.loads(json.dumps(record.get("units")))  # with the keys of JSON
            return config | hashes | {"units in use": units}

        old, new = identity(before), identity(self.record)
        if all(used := [record.get("normalisation") for record in (before, self.record)]):
            old["mean, std"], new["mean, std"] = ([*map(list, u.values())] for u in used)
        pairs = {k: (old.get(k), new.get(k)) for k in {**old, **new}}  # missing is None
        differ = [f"{k} was {a}, is {b}" for k, (a, b) in pairs.items() if a != b]
        changed = [text.partition(" ")[0] for text in differ if "_sha256 " in text]
        if differ and len(changed) == len(differ):
            parts = " and ".join(k.removesuffix("_sha256").replace("_", " ") for k in changed)
            raise AnotherRun(
                f"'{self.folder}' holds a run with another {parts}: run again with --overwrite to "
                "replace it, or choose another --out"
            )
        if differ:
            what = f"'{self.folder}' holds a run with another configuration ({'; '.join(differ)})"
            raise AnotherRun(f"{what}: move it away, or choose another --out")

    def restore(self, parts: Mapping[str, Any], here: dict[str, Any]) -> None:
        """Load the latest checkpoint, if any, into objects with load_state_dict.

        here: the environment, see mhkd_record.environment(). config.json lists each one in which
        the run has been trained.
        """
        paths = [self.folder / name for name in CHECKPOINTS if (self.folder / name).is_file()]
        if paths:
            hint = "remove it" + (", and the one before is used" if paths[1:] else "")
            try:
                state = load_file(paths[0])
                before, self.log = json.loads(state["record"]), json.loads(state["log"])
                self._refuse_another(before)
                for name, part in parts.items():
                    part.load_state_dict(state[name])
            except AnotherRun:
                raise
            except Exception as error:
                reason = first_line(error)
                raise RunError(f"'{paths[0]}' cannot be used ({reason}): {hint}") from error
        past = (read_json(self.folder / "config.json") or {}).get("environments") or [here]
        changes = [f"{k} {past[-1].get(k)} -> {v}" for k, v in here.items() if past[-1].get(k) != v]
        if changes:
            changed = ", ".join(changes)
            log(f"note: the environment has changed since the last checkpoint: {changed}")
        self.record["environments"] = [*past, here] if changes else past
        if is_main():
            write_json(self.folder / "config.json", self.record)
            if self.log:
                self._write_log()

    def save(self, parts: Mapping[str, Any]) -> None:
        """Write the state after an epoch, whose entry is already in `log`."""
        if is_main():
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"epoch": len(self.log), "log": json.dumps(self.log)}
            state["record"] = json.dumps(self.record)
            latest, before = (self.folder / name for name in CHECKPOINTS)
            write_atomically(latest, lambda file: torch.save(state, file), keep=before)
            self._write_log()

        if self.writer:
            self._show(self.log[-1:])

    def show_in_tensorboard(self) -> None:
        """Write the log for TensorBoard, too, from its beginning."""
        if is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                hint = "pip install tensorboard"
                raise RunError(f"--tensorboard needs tensorboard ({error}): {hint}") from error
            self.writer = SummaryWriter(self.folder, purge_step=1)
            self._show(self.log)

    def _show(self, entries: Iterable[Mapping[str, Any]]) -> None:
        for entry in entries:
            for name, value in entry.items():
                self.writer.add_scalar(name, value, entry["epoch"])
        self.writer.flush()

    def _write_log(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        write_atomically(self.folder / "log.jsonl", lambda file: file.write(lines.encode()))

    def save_student(self, content: dict[str, Any]) -> Path:
        path = self.folder / "student.pt"
        finished = (read_json(self.folder / "result.json") or {}).get("student_sha256")
        if finished and path.is_file() and sha256_of(path) != finished:  # a user has changed it
            names = (self.folder / f"student-changed-{i}.pt" for i in itertools.count(1))
            os.replace(path, unused(names))
        write_atomically(path, lambda file: torch.save(content, file))
        return path

    def finish(self, result: Mapping[str, Any], keep_checkpoint: bool) -> None:
        """Write result.json, then delete the checkpoints."""
        student = {"student_sha256": sha256_of(self.folder / "student.pt")}
        self.result = json.loads(json.dumps({**self.record, **result, **student}))
        write_json(self.folder / "result.json", self.result)
        for name in () if keep_checkpoint else CHECKPOINTS:
            (self.folder / name).unlink(missing_ok=True)


def unused(paths: Iterable[Path]) -> Path:
    return next(path for path in paths if not path.exists())


def in_file_name(value: Any) -> str:
    """A value as a part of a file name."""
    text = "+".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text)
