"""Settings of a run, and the command line. The recipes of data sets are in mhkd_data.py.

One dataclass, Config, is the help, the record and the argument of mhkd.train().
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mhkd
import mhkd_teacher  # noqa: F401  (it registers the method `heads`)
from mhkd import (
    BACKENDS,
    COUNT,
    HEAD_OPTIONS,
    METHODS,
    MODELS,
    NOT_NEGATIVE,
    POSITIVE,
    RESIZED_CROP_FROM,
    Method,
    Option,
    UsageError,
    check_name,
    find_methods,
    integers,
    one_of,
    words,
)
from mhkd_data import BASE_RECIPE, DATASETS

# --------------------------------------------------------------------------------------------------
# 1. Settings
# --------------------------------------------------------------------------------------------------

# The authors' code and the CRD benchmark train these networks with a lower rate.
LOW_LR, LOW_LR_MODELS = 0.01, ("mobilenetv2", "shufflenetv2")

SEED = (lambda v: 0 <= v < 2**62, "between 0 and 2^62")
NAMES = (lambda v: len(v) > 0, "at least one name")
SIZE = (lambda v: 16 <= v <= 4096, "between 16 and 4096")
PADDING = (lambda v: 0 <= v <= 4096, "between 0 and 4096")
AT_LEAST_2 = (lambda v: 2 <= v < 2**31, "at least 2 and below 2^31")
BETWEEN_0_AND_1 = (lambda v: 0 < v < 1, "above 0 and below 1")
BELOW_1 = (lambda v: 0 <= v < 1, "at least 0 and below 1")
FACTOR = (lambda v: 0 < v <= 1, "above 0 and at most 1")
ASCENDING = (lambda v: all(s >= 0 for s in v) and list(v) == sorted(v), "ascending epochs")
CHANNELS = (lambda v: len(v) == 3 and all(0 <= x <= 1 for x in v), "three numbers from 0 to 1")
STDS = (lambda v: len(v) == 3 and all(0 < x <= 1 for x in v), "three numbers above 0, at most 1")
INITS = "random, pretrained (the library's weights) or file:PATH (a state dict)"
INIT = (lambda v: v in ("random", "pretrained") or v.startswith("file:"), INITS)
NETWORK = "a network of the README's list, torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
UNIT_NAMES = "comma-separated names of its units, which are submodules (default: detected)"
PRECISION = (
    "float32, tf32 (CUDA) or bfloat16 (autocast); auto is float32 with tf32 in CUDA's convolutions"
)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in words(text))


def path(text: str) -> str:
    return text


def plain(value: Any) -> Any:
    """A value of Config: arrays and tensors as numbers, lists as tuples, paths as strings."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def field(group: str, default: Any, help: str, parse: Any = str, rule: Any = None) -> Any:
    """A field of Config. Those of the group "runtime" may change when a run continues."""
    facts = {"group": group, "option": Option(default, help, parse, rule)}
    return dataclasses.field(default=default, metadata=facts)


IDENTITY = ("dataset", "teacher", "student", "method", "seed")


@dataclasses.dataclass
class Config:
    """What a run does. Fields that are None get the value of the data set's recipe, if it has one.

    Attributes:
        options: values of the method's options, by name.
        differs: everything that differs from the recipe, besides data set, networks, method, seed.

    Raises:
        UsageError: a name that does not exist, a value out of range.
    """

    # fmt: off
    teacher: str | None = field("networks", None, NETWORK)
    student: str | None = field("networks", None, "network to train, as for --teacher")
    teacher_init: str = field("networks", "random", f"initial weights: {INITS}", str, INIT)
    student_init: str = field("networks", "random", f"initial weights: {INITS}", str, INIT)
    teacher_units: Sequence[str] | None = field("networks", None, UNIT_NAMES, words, NAMES)
    student_units: Sequence[str] | None = field("networks", None, UNIT_NAMES, words, NAMES)
    method: str = field("method", "mhkd", "training method; several are joined by +: crd+mhkd")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = field("data", "cifar100", "cifar100, cifar10, svhn, digits, folder (of images)")
    image_size: int | None = field(
        "data", None, "side of the images in pixels (default: 32; digits 16)", int, SIZE)
    subset: int | None = field(
        "data", None, "number of training images (default: all)", int, AT_LEAST_2)
    test_subset: int | None = field(
        "data", None, "number of test images (default: all)", int, COUNT)
    val_fraction: float = field(
        "data", 0.0, "fraction of the training images held out for validation", float, BELOW_1)
    test_fraction: float | None = field("data", None, "fraction of each class that is held out for "
        "the test, for --dataset folder without train/ (default: none)", float, BETWEEN_0_AND_1)
    crop_padding: int | None = field(
        "data", None, "pixels around images for random crops, for --image-size below "
        "64 (default: 4; digits 2)", int, PADDING)
    crop_scale: float = field(
        "data", 0.08, "minimum area of a random resized crop, as a fraction; for --image-size from "
        "64", float, FACTOR)
    flip: bool | None = field("data", None, "random mirror images (default: yes; digits no)", bool)
    augment: str = field("data", "crop", "random crop and mirror image (crop), then one operation "
        "on colour or shape (trivial: TrivialAugment) or two (rand: RandAugment)", str,
        one_of("crop", "trivial", "rand"))
    mean: Sequence[float] | None = field("data", None, "mean of the channels on the scale 0 to 1, "
        "for both networks (default: that in the teacher's file, or else of the pretrained "
        "weights of the teacher, with --method ce of the student, or else of the data set)",
        numbers, CHANNELS)
    std: Sequence[float] | None = field(
        "data", None, "standard deviation of the channels, with --mean", numbers, STDS)
    epochs: int | None = field(
        "training", None, "number of epochs (default: 240; svhn 150; digits 30)", int, COUNT)
    batch_size: int | None = field(
        "training", None, "images per step, at least 2 (default: 64; svhn 200)", int, AT_LEAST_2)
    lr: float | None = field("training", None, "learning rate "
        "(default: 0.05; mobilenetv2, shufflenetv2 0.01; svhn 0.001; adamw 0.001)", float, POSITIVE)
    lr_steps: Sequence[int] | None = field("training", None, "epochs after which the rate falls "
        "(default: 150,180,210 of 240; svhn 80,110,135; digits 19,23,26)", integers, ASCENDING)
    lr_decay: float = field("training", 0.1, "factor for the rate at --lr-steps", float, FACTOR)
    optimizer: str = field("training", "sgd", "sgd or adamw", str, one_of("sgd", "adamw"))
    schedule: str = field("training", "steps", "learning rate over the run: steps (--lr-steps) or "
        "cosine (to 0)", str, one_of("steps", "cosine"))
    warmup: float = field("training", 0.0, "epochs of linear warm-up of the learning rate, also "
        "fractions", float, NOT_NEGATIVE)
    clip_grad: float | None = field("training", None, "maximum norm of the gradient of all trained "
        "parameters (default: no limit)", float, POSITIVE)
    momentum: float | None = field(
        "training", None, "momentum of SGD (default: 0.9)", float, BELOW_1)
    weight_decay: float | None = field(
        "training", None, "weight decay (default: 0.0005; adamw 0.05)", float, NOT_NEGATIVE)
    ema: float | None = field("training", None, "decay of an exponential moving average of the "
        "weights, which is tested and saved, e.g. 0.999; also for a teacher that is trained here "
        "(default: none)", float, BETWEEN_0_AND_1)
    keep: str = field("training", "last", "epoch of the saved student or teacher: last, or best, "
        "that of the highest validation accuracy", str, one_of("last", "best"))
    seed: int = field("training", 0, "seed of weights, batch order and augmentation", int, SEED)
    view_seed: int | None = field("training", None, "seed of the augmentation of each image and "
        "epoch (default: drawn with the batch order from --seed; 0 with --teacher-store or "
        "--teacher-views)",
        int, SEED)
    teacher_store: str | None = field("training", None, "keep the teacher's outputs (no feature "
        "maps) in OUT/cache for later epochs and runs: float32 (exact; if no value is given) or "
        "float16 (half the size)",
        str, one_of("float32", "float16"))
    teacher_views: int | None = field("training", None,
        "different augmentations of each image, used in turn (default: one per epoch)", int, COUNT)
    teacher_seed: int = field("training", 0, "seed of a teacher that is trained here", int, SEED)
    teacher_epochs: int | None = field("training", None,
        "epochs of a teacher that is trained here (default: --epochs)", int, COUNT)
    teacher_lr: float | None = field("training", None,
        "learning rate of a teacher that is trained here (default: that of its recipe)",
        float, POSITIVE)
    precision: str = field(
        "training", "auto", PRECISION, str, one_of("auto", "float32", "tf32", "bfloat16"))
    teacher_weights: str | None = field("runtime", None,
        "checkpoint of the teacher (default: train it first)", path, (len, "a file"))
    data: str = field("runtime", "data", "folder of the data, also for downloads", path)
    unlabelled: str | None = field("runtime", None, "folder of images without labels, with "
        "--dataset folder (default: DATA/unlabelled if it exists)", path, (len, "a folder"))
    out: str = field("runtime", "runs", "folder of the run folders", path)
    device: str | None = field(
        "runtime", None, "cpu, cuda, cuda:1 or mps (default: cuda, else mps, else cpu)")
    backend: str = field("runtime", "auto",
        "loss: fused (compiled), reference (PyTorch) or auto (fused if possible)",
        str, one_of(*BACKENDS))
    compile: bool = field("runtime", False, "torch.compile the networks (slow first step)", bool)
    keep_checkpoint: bool = field("runtime", False, "keep checkpoint.pt of a finished run", bool)
    tensorboard: bool = field("runtime", False, "also write the log for TensorBoard", bool)
    skip_unreadable: bool = field("runtime", False, "leave out images that cannot be read", bool)
    overwrite: bool = field("runtime", False, "if the run's folder was written by other code or "
        "from other files, move it to OUT/replaced and train again", bool)
    # fmt: on

    def __setattr__(self, name: str, value: Any) -> None:
        group = "method" if name == "options" else FIELDS.get(name, {}).get("group", "runtime")
        # Other values follow from it, such as milestones from the epochs.
        if group != "runtime" and name != "seed" and "differs" in vars(self):
            raise UsageError(f"Config.{name} cannot be assigned: use config.replace({name}=...)")
        super().__setattr__(name, plain(value))

    def __post_init__(self) -> None:
        check_name("data set", self.dataset, DATASETS)
        for name, facts in FIELDS.items():
            check_no_text(name, facts["option"], getattr(self, name))
        for name in ("student_units", "teacher_units"):
            if isinstance(names := getattr(self, name), str):
                setattr(self, name, words(names))
        methods = find_methods(self.method)
        self.method = "+".join(methods)
        if not self.student:
            raise UsageError(
                "give --student, for example: python mhkd.py --teacher vgg13 --student vgg8"
            )
        if self.view_seed is None and (self.teacher_store or self.teacher_views):
            self.view_seed = 0
        if not any(method.needs_teacher for method in methods.values()):
            for name in FIELDS:
                if name.startswith("teacher"):
                    setattr(self, name, FIELDS[name]["option"].default)
        elif not self.teacher:
            raise UsageError(f"--teacher is missing: --method {self.method} needs one; ce does not")
        if self.teacher and self.teacher_weights is not None:
            given = ("teacher_seed", "teacher_init", "teacher_epochs", "teacher_lr")
            for name in given:  # the teacher is not trained
                if getattr(self, name) != getattr(Config, name):
                    what = "a teacher of --teacher-weights is not trained"
                    raise UsageError(f"leave out {flag_of(name)}: {what}")
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std must be given together")
        if self.keep == "best" and not self.val_fraction:
            raise UsageError("--keep best needs validation images: give --val-fraction, e.g. 0.1")
        if self.optimizer == "adamw" and self.momentum is not None:
            raise UsageError("--momentum is an option of --optimizer sgd, not of adamw")
        if self.schedule == "cosine" and (self.lr_steps or self.lr_decay != Config.lr_decay):
            raise UsageError("--lr-steps and --lr-decay are options of --schedule steps")
        for name in ("test_fraction", "unlabelled"):
            if getattr(self, name) is not None and self.dataset != "folder":
                raise UsageError(f"{flag_of(name)} is for --dataset folder, not {self.dataset}")
        if self.unlabelled is not None and not mhkd.takes_unlabelled(self.method):
            raise UsageError(f"--method {self.method} cannot use --unlabelled: leave it out")
        if any(m.on_teacher for m in methods.values()) and self.student != self.teacher:
            raise UsageError("--method heads has no student: give the teacher as --student, too")
        no_student = any(method.on_teacher for method in methods.values())
        if no_student and (self.ema or self.keep == "best" or self.student_init != "random"):
            what = "leave out --ema, --keep best and --student-init"
            raise UsageError(f"--method heads trains no student: {what}")
        for name in filter(None, (self.student, self.teacher)):
            if ":" not in name:
                check_name("network", name, MODELS)
        declared = method_options(methods)
        for name in DATASETS[self.dataset].recipe:
            if name not in {**FIELDS, **declared}:
                mhkd.sibling("mhkd_baselines", optional=True)  # registers its methods
                options = [{**m.options, **m.final_options} for m in METHODS.values()]
                known = sorted({*FIELDS}.union(*options))
                check_name(f"setting for the recipe of {self.dataset} named", name, known)
            one_default = name in FIELDS and FIELDS[name]["option"].default is not None
            if one_default or name.startswith("teacher") or name in ("view_seed", "units"):
                raise UsageError(
                    f"the recipe of the data set {self.dataset} cannot contain {name}, which has "
                    f"one default for all data sets: give {flag_of(name)} for each run"
                )
        for name in self.options:
            if name not in declared:
                raise UsageError(foreign_option(name, self.method))
        usual = {name: facts["option"].default for name, facts in FIELDS.items()}
        usual |= {name: option.default for name, option in declared.items()}
        usual |= {name: v for name, v in self._recipe().items() if name in usual}
        values = {name: getattr(self, name) for name in FIELDS} | dict(self.options)
        values = {n: usual[n] if values.get(n) is None else values[n] for n in usual}
        rules = {n: facts["option"] for n, facts in FIELDS.items()} | declared
        for name, option in rules.items():
            value = values[name]
            check_no_text(name, option, value)
            if option.parse is int and isinstance(value, float):
                raise UsageError(f"{flag_of(name)} must be a whole number, not {value}")
            if option.rule and value is not None and not option.rule[0](value):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{flag_of(name)} must be {option.rule[1]}, not {shown}")
        self.options = {name: values.pop(name) for name in declared}
        for name, value in values.items():
            setattr(self, name, value)
        unused = "crop_scale" if self.image_size < RESIZED_CROP_FROM else "crop_padding"
        if values[unused] != usual[unused]:
            raise UsageError(f"{flag_of(unused)} has no effect with --image-size {self.image_size}")
        if self.warmup > self.epochs:
            raise UsageError(f"--warmup {self.warmup:g} is longer than the {self.epochs} epochs")
        # The usual number of epochs is that of the full schedule, to which the milestones scale.
        usual["epochs"] = (BASE_RECIPE | dict(DATASETS[self.dataset].recipe))["epochs"]
        differs = {
            name: value
            for name, value in {**values, **self.options}.items()
            if name not in IDENTITY and value != usual[name]
            and not (name in FIELDS and FIELDS[name]["group"] == "runtime")
        }  # fmt: skip

        self._given_views = self.teacher_views  # for replace()
        if (self.teacher_views or 0) >= self.epochs:
            if self.teacher_views > self.epochs:
                mhkd.log(f"note: --teacher-views is limited to the {self.epochs} epochs")
            self.teacher_views = None
            differs.pop("teacher_views")
        for name, method in methods.items() if self.teacher_store else ():
            if method.needs_maps(self):
                raise UsageError(
                    f"--teacher-store holds no feature maps, and --method {name} trains on those "
                    "of the teacher: leave it out, or use --teacher-heads pretrained with mhkd"
                )
            own = method.frozen_heads is not mhkd.Method.frozen_heads
            if own and self.options.get("teacher_heads") not in ("pretrained", "logits"):
                raise UsageError(
                    "--teacher-store holds the heads of --teacher-heads pretrained, and --method "
                    f"{name} has others: leave it out"
                )
        self.differs = differs

    @property
    def views(self) -> int:
        """Number of views of each image."""
        return self.teacher_views or self.epochs

    def _recipe(self) -> dict[str, Any]:
        """The values that the data set, the student and the number of epochs imply."""
        recipe = BASE_RECIPE | {"momentum": 0.9, "weight_decay": 5e-4}
        if self.student in LOW_LR_MODELS:
            recipe["lr"] = LOW_LR
        own = DATASETS[self.dataset].recipe
        if "epochs" in own:  # with the milestones of the base in proportion, unless it has others
            recipe["lr_steps"] = scaled(recipe["lr_steps"], own["epochs"] / recipe["epochs"])
        recipe |= own
        if self.optimizer == "adamw":
            recipe |= {"momentum": None, "weight_decay": 0.05, "lr": 0.001}
        full, epochs = recipe["epochs"], self.epochs or recipe["epochs"]
        recipe["epochs"] = epochs
        recipe["lr_steps"] = scaled(recipe["lr_steps"], epochs / full)
        if self.schedule == "cosine":
            recipe["lr_steps"] = ()
        sides = [names for names in (self.student_units, self.teacher_units) if names]
        if len({len(names) for names in sides}) > 1:
            raise UsageError("--teacher-units and --student-units must have the same length")
        if self.teacher and len(sides) == 1 and len(sides[0]) != 3:
            raise UsageError("give both --teacher-units and --student-units if they are not three")
        recipe["units"] = tuple(range(1, len(sides[0] if sides else (1, 2, 3)) + 1))
        if self.options.get("teacher_heads") == "pretrained":
            recipe["teacher_heads_epochs"] = max(1, round(epochs / 3))
        elif self.options.get("teacher_heads_epochs"):
            raise UsageError("--teacher-heads-epochs is for --teacher-heads pretrained")
        return recipe

    def arguments(self) -> dict[str, Any]:
        """The arguments that make this configuration again, without defaults."""
        kept = {*IDENTITY, *self.differs, *(n for n in FIELDS if FIELDS[n]["group"] == "runtime")}
        given = {n: getattr(self, n) for n in FIELDS if n in kept}
        given = {n: v for n, v in given.items() if v != FIELDS[n]["option"].default}
        return given | {"options": {n: v for n, v in self.options.items() if n in self.differs}}

    def replace(self, **changes: Any) -> Config:
        """The same with changes; values of the recipe are determined again."""
        views = {"teacher_views": self._given_views} if "epochs" in changes else {}
        new = Config(**{**self.arguments(), **views, **changes})
        if changes.keys().isdisjoint(("epochs", "teacher_views")):
            new._given_views = self._given_views
        return new

    def of_teacher(self) -> Config:
        """The run that trains the teacher: the same recipe, with its own rate and epochs."""
        epochs = self.teacher_epochs or self.epochs
        own = {"student_units": None, "options": {}, "method": "ce", "seed": self.teacher_seed}
        own |= {"student": self.teacher, "student_init": self.teacher_init, "teacher": None}
        return self.replace(**self._changes_for_teacher(epochs), **own, lr=self.teacher_lr)

    def of_heads(self, teacher_weights: str | Path) -> Config:
        """The run that trains the teacher's heads: the same recipe, a schedule in proportion.

        The rate is that of the teacher's recipe, so that all students share one run.
        """
        epochs, o = self.options["teacher_heads_epochs"], self.options
        own = {"student": self.teacher, "student_init": "random", "method": "heads"}
        own |= {"student_units": self.teacher_units, "teacher_weights": str(teacher_weights)}
        own |= {"seed": self.teacher_seed, "lr": None, "teacher_epochs": None, "teacher_lr": None}
        own |= {"teacher_seed": 0, "teacher_init": "random"}
        own |= {"ema": None, "keep": "last", "options": {name: o[name] for name in HEAD_OPTIONS}}
        return self.replace(**self._changes_for_teacher(epochs), **own)

    def _changes_for_teacher(self, epochs: int) -> dict[str, Any]:
        """What differs in a run on the teacher: its epochs, schedule, images and views."""
        factor, given = epochs / self.epochs, "lr_steps" in self.differs
        return {
            "epochs": epochs,
            "lr_steps": scaled(self.lr_steps, factor) if given else None,  # None: the recipe's
            "warmup": min(self.warmup * factor, epochs),  # not above it by rounding
            **dict.fromkeys(("unlabelled", "view_seed", "teacher_store", "teacher_views")),
        }

    def recorded(self) -> dict[str, Any]:
        """The values that distinguish runs, as JSON returns them."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("group") != "runtime"]
        return json.loads(json.dumps({f.name: getattr(self, f.name) for f in fields}))


FIELDS = {f.name: f.metadata for f in dataclasses.fields(Config) if f.metadata}


def scaled(steps: Sequence[int], factor: float) -> tuple[int, ...]:
    """Milestones for another number of epochs. Different ones stay at least an epoch apart."""
    found: list[int] = []
    for before, step in zip((None, *steps), steps):
        lowest = found[-1] + (step != before) if found else min(step, 1)  # not before epoch 1
        found.append(max(round(step * factor), lowest))
    return tuple(found)


def check_no_text(name: str, option: Option, value: Any) -> None:
    kind = {int: "a number", float: "a number", bool: "True or False"}.get(option.parse)
    if kind and isinstance(value, str):
        raise UsageError(f"{flag_of(name)} must be {kind}, not the text '{value}'")


def foreign_option(name: str, method: str) -> str:
    """Why an option cannot be given with a method."""
    mhkd.sibling("mhkd_baselines", optional=True)  # registers its methods
    flag = flag_of(name)
    owners = [m for m, kind in METHODS.items() if name in {**kind.options, **kind.final_options}]
    if owners:
        return f"{flag} is an option of --method {' or '.join(owners)}, not of {method}"
    names = {*Config.__dataclass_fields__, *method_options(find_methods(method))} - {"options"}
    near = difflib.get_close_matches(flag, map(flag_of, names), n=3, cutoff=0.75)
    return f"there is no option {flag}" + (f": did you mean {' or '.join(near)}?" if near else "")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def method_options(methods: Mapping[str, type[Method]]) -> dict[str, Option]:
    """The options of joined methods: those of the last one's final terms and of all own terms."""
    *_, last = methods.values()
    found = dict(last.final_options)
    for name, method in methods.items():
        for key, option in method.options.items():
            if found.setdefault(key, option) is not option:
                what = f"--method {name} has an option {key}"
                raise UsageError(f"{what}, which other terms of the loss have, too: rename it")
    for key in found.keys() & FIELDS.keys():
        raise UsageError(f"--method {'+'.join(methods)} has an option {key}, the name of a setting "
                         "of all methods: rename it")  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------
# 2. Command lines: errors are one sentence and an exit status
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def add_option(group: Any, name: str, option: Option) -> None:
    flag, default, help = flag_of(name), option.default, option.help
    if option.parse is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=name, action=action, default=None, help=help)
        return
    if default is not None:
        help = f"{help} (default: {default})"
    kinds = {
        str: "NAME",
        words: "NAME,NAME",
        integers: "INT,INT",
        numbers: "FLOAT,FLOAT,FLOAT",
    }
    metavar = kinds.get(option.parse, option.parse.__name__.upper())
    if option.rule and option.rule[1].startswith("one of "):
        metavar = "{" + option.rule[1].removeprefix("one of ").replace(", ", "|") + "}"
    optional = {"nargs": "?", "const": "float32"} if name == "teacher_store" else {}
    group.add_argument(
        flag, type=option.parse, default=None, help=help, metavar=metavar, **optional
    )


def parse_config(
    arguments: Sequence[str], extra: Callable[[Parser], None] = lambda parser: None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse a command line, with what `extra` adds to it.

    Returns everything that was given, and the arguments of Config.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=Config.method)
    methods = find_methods(first.parse_known_args(arguments)[0].method)
    if {"-h", "--help"} & {*arguments}:
        mhkd.sibling("mhkd_baselines", optional=True)  # registers its methods
    parser = Parser(
        prog="mhkd.py", description=mhkd.__doc__.split("\n\nThe method")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Methods: {', '.join(METHODS)}. --help --method NAME shows the options of one.",
    )  # fmt: skip
    names = dict.fromkeys(facts["group"] for facts in FIELDS.values())
    groups = {name: parser.add_argument_group(name) for name in names}
    for name, facts in FIELDS.items():
        add_option(groups[facts["group"]], name, facts["option"])
    declared = method_options(methods)
    for name, option in declared.items():
        add_option(groups["method"], name, option)
    version = "show versions and compare the fused loss with plain PyTorch"
    parser.add_argument("--version", action="store_true", help=version)
    extra(parser)
    parsed, left = parser.parse_known_args(arguments)
    for word in left:
        if not word.startswith("--"):
            raise UsageError(f"the argument '{word}' belongs to no option")
        name = word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        raise UsageError(foreign_option(name, "+".join(methods)))
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    config = {name: values[name] for name in FIELDS if name in values}
    return parsed, {**config, "options": {n: values[n] for n in declared if n in values}}


def main(arguments: Sequence[str] | None = None) -> int:
    def run() -> None:
        parsed, values = parse_config(sys.argv[1:] if arguments is None else arguments)
        if parsed.version:
            loss = mhkd.loss_backend()
            print(f"mhkd {mhkd.__version__}, PyTorch {torch.__version__}, loss: {loss}")
            fused = mhkd.sibling("mhkd_fused", optional=True)
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available() if fused else []:
                problem = fused.check(device, mhkd._reference_loss)
                print(f"fused loss on {device}: {problem or 'agrees with plain PyTorch'}")
            return
        config = Config(**values)
        if config.epochs < min(values.get("lr_steps") or [config.epochs]):
            mhkd.log(
                f"note: --lr-steps begin after the {config.epochs} epochs, so the rate is fixed"
            )
        if not config.teacher:  # these also set the view seed, which every method uses
            views = ("teacher_store", "teacher_views")
            names = [n for n in values if n.startswith("teacher") and n not in views]
            for flag in map(flag_of, names):
                mhkd.log(f"note: {flag} has no effect with --method {config.method}")
            if "teacher_views" in values:
                mhkd.log(f"note: --method {config.method} sees a new view in every epoch, of "
                    f"--view-seed {config.view_seed}, whatever --teacher-views is")  # fmt: skip
        keep_freed_memory()
        mhkd.train(config)

    return command_line("mhkd.py", run)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors, which saves page faults in the next step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def command_line(program: str, run: Callable[[], Any]) -> int:
    """Call run(); errors end as one sentence on stderr and an exit status."""

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, terminate)
    again = "the same command continues after the last finished epoch"
    status = 1
    try:
        run()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        status, sentence = (143 if error.args else 130), f"{str(error) or 'interrupted'}; {again}"
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status, sentence = 141, f"the output was closed; {again}"
    except OSError as error:
        sentence = f"{error}; when that is fixed, {again}"
    except MemoryError as error:
        sentence = f"there is not enough memory ({error}): try a smaller batch, image or head"
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            sentence = f"{error}: try a smaller batch, image or head"
        elif getattr(error, "user_error", False):
            sentence = str(error)
        else:
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    with contextlib.suppress(OSError):
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return status
