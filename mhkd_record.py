"""What is recorded of a run: what identifies it, where it ran, and what its student reaches.

mhkd.py imports this file for training. A folder of a run is named after its configuration.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import datetime
import functools
import hashlib
import inspect
import json
import platform
import subprocess
import symtable
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mhkd
import mhkd_runs
from mhkd import Data, Distiller, epoch_batches, find_methods
from mhkd_runs import in_file_name, sha256_of

if TYPE_CHECKING:
    from mhkd_config import Config


def record_of(config: Config, data: Data, teacher_record: Mapping[str, Any]) -> dict[str, Any]:
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
        **code_hashes(config),
        "data_sha256": data.sha256,
        "unlabelled_sha256": data.unlabelled_sha256,
        "data_facts": data.facts,
        "normalisation": {"mean": data.mean, "std": data.std},
    }


def code_hashes(config: Config) -> dict[str, str]:
    """Hashes of the code that computes a training step, and of initial weights in files.

    They cover what turns an image into a gradient: the networks, heads, losses, the selected
    methods, augmentation. Comments, messages, records and the report are not covered, nor is the
    code of libraries, whose versions are recorded (docs/choices.md).
    """
    found = {}
    methods = find_methods(config.method).values()
    roots = [*methods, Distiller, Data, epoch_batches]
    for module in {m.__module__ for m in methods if not is_ours(m.__module__)}:
        file = getattr(sys.modules.get(module), "__file__", None) or ""
        if file.endswith(".py") and "site-packages" not in file:  # what a user's method imports
            roots += mhkd.sibling("mhkd_custom").source_files(f"{file}:")[1:]
    found["method_code_sha256"] = code_sha256(roots)
    for role in ("student", "teacher"):
        name, init = getattr(config, role), getattr(config, f"{role}_init")
        if name in mhkd.MODELS:
            kind, settings = mhkd.MODELS[name]
            settings = settings, mhkd.UNITS.get(kind)
            found[f"{role}_code_sha256"] = code_sha256([kind], repr(settings))
        elif name and ".py:" in name:
            files = mhkd.sibling("mhkd_custom").source_files(name)
            found[f"{role}_code_sha256"] = code_sha256(files)
        if name and init.startswith("file:") and Path(init[5:]).is_file():
            found[f"{role}_init_sha256"] = sha256_of(init[5:])
    return found


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


IMAGES = "sibling('mhkd_images')"  # the only module whose functions mhkd.py calls in a step


def code_sha256(roots: Iterable[Any], more: str = "") -> str:
    """The hash of what classes and functions compute, or of Python files. See parts_of_code()."""
    found = {"": more, **parts_of_code(roots)}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def parts_of_code(roots: Iterable[Any]) -> dict[str, str]:
    """The hash of each part of the code by its name: of `roots` and of what they use.

    It follows functions, classes and constants of their own modules and of this project.
    Comments, docstrings, annotations and errors do not count, nor in this project's code strings
    with spaces and f-strings, which are messages. In a user's code they may be patterns or names;
    there numbers and strings in closures count, too, the statements that assign other objects to
    the names of a module, and the bytecode of what has no source.
    """
    todo, found = list(roots), {}
    visited: dict[int, Any] = {}
    # A user's program may be __main__, too.
    main = "mhkd" if sys.modules["mhkd"] is sys.modules["__main__"] else "__main__"
    modules = {thing.__module__ for thing in todo if not isinstance(thing, Path)}
    modules |= {mhkd.__name__, "mhkd_images"}  # __main__ in `python mhkd.py`

    def followed(module: str) -> bool:
        return module in modules or is_ours(module)

    while todo:
        thing = todo.pop()
        is_file = isinstance(thing, Path)
        # `python mhkd.py` has the classes of mhkd in __main__.
        module = "" if is_file else thing.__module__.replace("__main__", main)
        name = thing.name if is_file else f"{module}.{thing.__qualname__}"
        while is_file and name in found:  # the same name in another folder, which may be moved
            name += "'"
        # Other functions of a user's module may have the same name: lambdas, those of a factory.
        while not is_file and name in found and not is_ours(module) and id(thing) not in visited:
            name += "'"
        if name in found:
            continue
        visited[id(thing)] = thing
        if is_file:
            trees = [ast.parse(thing.read_text())]
        else:
            trees = definitions_in(thing.__module__).get(thing.__qualname__, [])
        known = {} if is_file else vars(sys.modules[thing.__module__])
        used = set() if is_file else {*globals_in(thing.__module__).get(thing.__name__, ())}
        for part in around(trees) if known else ():
            used |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        digest = hashlib.sha256()
        for function in () if is_file or is_ours(thing.__module__) else functions_of(thing):
            cells = zip(function.__code__.co_freevars, function.__closure__ or ())
            with contextlib.suppress(ValueError):  # an empty cell
                values = [(name, cell.cell_contents) for name, cell in cells]
                values = [v for v in values if is_plain(v) and not isinstance(v[1], (list, dict))]
                digest.update(repr(values).encode())
            if not trees:
                digest.update(repr(bytecode_of(function.__code__)).encode())
        for place, node in computation_of(trees, is_file or not is_ours(thing.__module__)):
            part = type(node).__name__ if isinstance(node, (ast.AST, list)) else repr(node)
            digest.update(f"{place} {part}\n".encode())
            value = None
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                value = known.get(node.id) if node.id in used else None  # a local name is none
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == IMAGES:
                value = getattr(mhkd.sibling("mhkd_images", optional=True), node.attr, None)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = known.get(node.value.id)
                if isinstance(owner, types.ModuleType) and followed(owner.__name__):
                    value = getattr(owner, node.attr, None)
            value = None if isinstance(value, types.ModuleType) else inspect.unwrap(value)
            if isinstance(value, (type, types.FunctionType)) and followed(value.__module__):
                todo.append(value)
            elif isinstance(node, ast.Name) and value is not None and is_plain(value):
                found[node.id] = repr(value)
            elif isinstance(node, ast.Name) and value is not None and not is_ours(module):
                assigned = definitions_in(thing.__module__).get(f"{node.id} =", [])
                found |= {f"{module}.{node.id}": str([ast.dump(part) for part in assigned])}
                for part in (part for tree in assigned for part in ast.walk(tree)):
                    used_there = known.get(part.id) if isinstance(part, ast.Name) else None
                    if isinstance(used_there, (type, types.FunctionType)):
                        todo += [used_there] * followed(used_there.__module__)
        found[name] = digest.hexdigest()
    return found


def is_ours(module: str) -> bool:
    """Whether a module is a part of this project."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return file.parent == Path(mhkd.__file__).parent and file.name.startswith("mhkd")


def is_plain(value: Any) -> bool:
    """Whether a constant consists of numbers and strings only."""
    if isinstance(value, (tuple, list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(is_plain, parts))
    return value is None or isinstance(value, (int, float, str))


@functools.cache
def globals_in(module: str) -> dict[str, set[str]]:
    """For each class and function of a module the names that it takes from the module."""
    found: dict[str, set[str]] = {}

    def names_of(table: symtable.SymbolTable) -> set[str]:
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        return names.union(*map(names_of, table.get_children()))

    def visit(table: symtable.SymbolTable) -> None:
        for part in table.get_children():
            found.setdefault(part.get_name(), set()).update(names_of(part))
            visit(part)

    with contextlib.suppress(OSError, TypeError):  # typed into an interpreter: no source
        source = inspect.getsource(sys.modules[module])
        visit(symtable.symtable(source, module, "exec"))
    return found


def around(definitions: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What the scope around definitions evaluates: decorators, bases, defaults of arguments."""
    for node in definitions:
        yield from getattr(node, "decorator_list", [])
        yield from getattr(node, "bases", [])
        if isinstance(node, ast.FunctionDef):
            yield from filter(None, [*node.args.defaults, *node.args.kw_defaults])


def functions_of(thing: Any) -> list[types.FunctionType]:
    """A function, or the functions of a class."""
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    functions = [getattr(part, "__func__", part) for part in parts]
    return [function for function in functions if isinstance(function, types.FunctionType)]


def bytecode_of(code: types.CodeType) -> list[Any]:
    constants: list[Any] = []
    for c in code.co_consts:  # sets have another order in each process
        c = sorted(map(repr, c)) if isinstance(c, frozenset) else c
        constants.append(bytecode_of(c) if isinstance(c, types.CodeType) else c)
    return [code.co_code.hex(), code.co_names, constants]


@functools.cache
def definitions_in(module: str) -> dict[str, list[ast.AST]]:
    """The syntax trees of a module's classes and functions by qualified name.

    The assignments to a name of the module have the key "name =".
    """
    found: dict[str, list[ast.AST]] = {}

    def visit(node: ast.AST, inside: str = "") -> None:
        for part in ast.iter_child_nodes(node):
            prefix = inside
            if isinstance(part, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(inside + part.name, []).append(part)
                local = ".<locals>." if isinstance(part, ast.FunctionDef) else "."
                prefix = inside + part.name + local
            elif isinstance(part, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and not inside:
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for n in (n for target in targets for n in ast.walk(target)):
                    if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                        found.setdefault(f"{n.id} =", []).append(part)
            visit(part, prefix)

    with contextlib.suppress(OSError, TypeError):  # typed into an interpreter: no source
        visit(ast.parse(inspect.getsource(sys.modules[module])))
    return found


def computation_of(node: Any, strings: bool, place: str = "") -> Iterator[tuple[str, Any]]:
    """Place and value of everything in a syntax tree that changes what the code computes.

    strings: whether all strings but docstrings count.
    """
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    message = isinstance(node, str) and " " in node or isinstance(node, ast.JoinedStr)
    if isinstance(node, ast.Raise) or (docstring if strings else message):
        return
    yield place, node
    if isinstance(node, list):
        for i, part in enumerate(node):
            yield from computation_of(part, strings, f"{place}.{i}")
    elif isinstance(node, ast.AST):
        for name, part in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                yield from computation_of(part, strings, f"{place}.{name}")


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
        _, _, name = processors.read_text().partition("model name\t: ")
        hardware = name.partition("\n")[0].strip() or hardware
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
        result = {
            **mhkd.evaluate(deployed, data),
            "accuracy_is": f"of the student of epoch {epoch}, saved and loaded into the plain "
            f"network; the epoch is {KEPT[config.keep]}",
            "kept_epoch": epoch,
            "best_test_accuracy": best["test_accuracy"],  # chosen by the test images
            "best_test_epoch": best["epoch"],
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
