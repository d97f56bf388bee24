#!/usr/bin/env python3
"""Which runs the paper's tables and the small study need, and the report of what has run.

    python mhkd_tables.py plan table1,table2                   # their runs: done or todo
    python mhkd_tables.py plan table1 --pairs vgg13:vgg8 --methods kd,mhkd --seeds 0 --epochs 60
    python mhkd_tables.py plan small --methods ce,kd,mhkd --seeds 0,1,2
    python mhkd_tables.py report runs                          # tables and pictures, written there

`plan` knows table1, table2, table3 and small, the study of docs/measurements.md, and takes any
option of mhkd.py for all runs, or for those that have it. It prints a line for each run: done or
todo, teacher or student, the arguments for mhkd.py, with tabs between; run_all.sh computes them. A
method "mhkd:2" is MHKD with the head of unit 2 alone, "mhkd:head_stride=2" that with this option.

`report` compares first what is alike: runs of one data set, pair, teacher and recipe. The paper's
tables follow, for runs of its recipe in full, then all runs. It writes report.md, report.csv and,
where matplotlib is installed, a picture of each pair.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mhkd
from mhkd import Config, UsageError

# --------------------------------------------------------------------------------------------------
# 1. The paper's tables and the small study
# --------------------------------------------------------------------------------------------------


class Table:
    """A table of the paper: a column for each pair, a row for each method, accuracies in percent.

    Figures are "mean" or "mean(standard deviation)".
    """

    def __init__(self, title: str, dataset: str, text: str):
        self.title, self.dataset = title, dataset
        self.pairs, *lines = [line.split() for line in text.strip().splitlines()]
        self.paper = {row: figures for row, *figures in lines}
        self.rows = [row for row in self.paper if row not in ("compression", "teacher")]


TABLES = {
    "table1": Table("Table 1: test accuracy on CIFAR-100, %", "cifar100", """
        wrn_40_2:wrn_16_2 resnet110:resnet20 vgg13:vgg8 vgg13:mobilenetv2 resnet32x4:shufflenetv2
        compression  68.81        70.00        58.10        92.82        83.22
        teacher      75.61        74.31        74.64        74.64        79.42
        ce           73.26        69.06        70.36        64.60        71.82
        kd           74.92        70.67        72.98        67.37        74.45
        fitnet       75.12        70.67        73.22        66.90        75.15
        cc           75.09        70.88        73.04        68.02        74.72
        rkd          74.89        70.77        72.97        67.87        74.55
        mhkd         75.28(0.26)  71.00(0.24)  73.96(0.19)  69.11(0.12)  76.34(0.24)
        crd          75.64(0.21)  71.56(0.16)  74.29(0.12)  69.94(0.05)  76.05(0.09)
        crd+mhkd     75.89(0.10)  71.76(0.10)  74.37(0.26)  70.21(0.19)  76.47(0.21)
    """),
    "table2": Table("Table 2: one head against several, CIFAR-100, %", "cifar100", """
        wrn_40_2:wrn_16_2 vgg13:vgg8
        kd           74.92        72.98
        fitnet       75.12        73.22
        cc           75.09        73.04
        rkd          74.89        72.97
        mhkd:1       75.27(0.27)  73.63(0.29)
        mhkd:2       75.16(0.15)  73.76(0.12)
        mhkd:3       75.00(0.35)  73.32(0.21)
        mhkd         75.28(0.26)  73.96(0.19)
    """),
    "table3": Table("Table 3: test accuracy on SVHN, %", "svhn", """
        wrn_40_2:wrn_16_2 resnet56:resnet20 vgg13:vgg8 mobilenetv2:vgg13 shufflenetv2:resnet32x4
        teacher      94.29        93.69        94.20        95.47        96.08
        ce           93.05(0.01)  93.05(0.01)  91.74(0.06)  93.96(0.21)  94.17(0.09)
        kd           94.67(0.06)  93.95(0.12)  93.93(0.06)  95.31(0.04)  95.96(0.10)
        fitnet       94.75(0.06)  94.10(0.05)  94.25(0.06)  95.73(0.09)  96.20(0.08)
        cc           95.00(0.06)  94.43(0.09)  94.30(0.12)  95.75(0.08)  96.04(0.09)
        rkd          95.28(0.12)  94.57(0.06)  94.40(0.08)  95.83(0.02)  96.25(0.02)
        mhkd         95.38(0.03)  94.70(0.04)  94.45(0.07)  95.88(0.01)  96.68(0.03)
    """),
}  # fmt: skip
# The paper's data sets have so many classes, this among them. Other images are not theirs.
CLASSES = {"cifar100": (100, "aquarium_fish"), "svhn": (10, "7")}

# The protocol of docs/measurements.md: the settings of all runs, then in order of their importance
# the pair, its number of training images, and for each row the number of seeds.
SMALL = {"dataset": "cifar100", "image_size": 16, "epochs": 30, "head_width": 64}
SMALL |= {"device": "cpu", "backend": "reference"}
A, B = ("wrn_16_2:resnet8", 20_000), ("vgg13:vgg8", 10_000)
SMALL_ROWS = [
    (A, {"ce": 5, "kd": 10, "mhkd": 10}),
    (B, {"ce": 5, "kd": 5, "mhkd": 5}),
    (A, {"mhkd:head_stride=2": 10}),
    (A, dict.fromkeys(("fitnet", "cc", "rkd", "crd", "lsh", "dhkd"), 3)),
    (A, dict.fromkeys(("mhkd:1", "mhkd:2", "mhkd:3", "crd+mhkd"), 3)),
]


# --------------------------------------------------------------------------------------------------
# 2. The plan
# --------------------------------------------------------------------------------------------------

FIELDS = [f.name for f in dataclasses.fields(Config) if f.name != "options"]


def plan(
    tables: Sequence[str], settings: Mapping[str, Any], seeds: Sequence[int] = (),
    pairs: Sequence[str] = (), rows: Sequence[str] = (),
) -> tuple[list[Config], list[Config]]:  # fmt: skip
    """The runs that tables need, each once: the teachers, and the others.

    Args:
        tables: keys of TABLES, or "small".
        settings: of all runs, fields of Config and options of methods by name; a data set stands
            for CIFAR-100.
        seeds: by default 0, 1 and 2, of "small" those of its protocol, which they narrow.
        pairs, rows: these alone; a method that the paper's table lacks is a further row.

    Raises:
        UsageError: a table, a pair or a row does not exist, or nothing is left.
    """
    wanted = [block for name in tables for block in blocks(name, seeds)]
    known = dict.fromkeys(row for *_, numbers in wanted for row in numbers)
    further = [row for row in rows if row not in known]
    for row in further:
        if ":" in row or "small" in tables:
            mhkd.check_name("row", row, known)
    for pair in pairs:
        mhkd.check_name("pair", pair, dict.fromkeys(pair for pair, *_ in wanted))
    teachers, others = {}, {}
    for pair, own, numbers in wanted:
        if own["dataset"] == "svhn" != settings.get("dataset", "svhn"):
            raise UsageError("table3 is for --dataset svhn only")
        numbers = numbers | dict.fromkeys(further, seeds or (0, 1, 2))
        for seed in sorted({seed for of_row in numbers.values() for seed in of_row}):
            for row in numbers:
                if seed in numbers[row] and row in (rows or [row]) and pair in (pairs or [pair]):
                    config = cell(row, pair, {**own, **settings, "seed": seed})
                    others[identity(config.recorded())] = config
                    if config.teacher and not config.teacher_weights:
                        teacher = config.of_teacher()
                        teachers[identity(teacher.recorded())] = teacher
    configs = [config for key, config in others.items() if key not in teachers]
    if not others:
        raise UsageError("no run is left with these --seeds, --pairs and --methods")
    if len({config.teacher for config in configs if config.teacher_weights}) > 1:
        raise UsageError("--teacher-weights is for one teacher: narrow the plan to its pairs")
    for name in {*settings} - {*FIELDS} - {name for c in others.values() for name in c.options}:
        raise UsageError(mhkd.foreign_option(name, [*others.values()][-1].method))
    return list(teachers.values()), configs


def blocks(name: str, seeds: Sequence[int]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A table's pairs, each with its settings and the seeds of each row."""
    if name == "small":
        chosen = {n: [s for s in range(n) if not seeds or s in seeds] for n in (3, 5, 10)}
        return [
            (pair, {**SMALL, "subset": images}, {row: chosen[n] for row, n in numbers.items()})
            for (pair, images), numbers in SMALL_ROWS
        ]
    mhkd.check_name("table", name, [*TABLES, "small"])
    rows = dict.fromkeys(TABLES[name].rows, seeds or (0, 1, 2))
    return [(pair, {"dataset": TABLES[name].dataset}, rows) for pair in TABLES[name].pairs]


def cell(row: str, pair: str, settings: Mapping[str, Any]) -> Config:
    """The run of a row and a pair. Of the options of methods it takes those that the row has."""
    method, _, choice = row.partition(":")
    methods = mhkd.find_methods(method)
    declared = mhkd.method_options(methods)
    options = {name: value for name, value in settings.items() if name in declared}
    if choice:
        name, _, value = choice.rpartition("=")
        options[name or "units"] = declared[name or "units"].parse(value)
    teacher, student = pair.split(":")
    if not any(kind.needs_teacher for kind in methods.values()):
        teacher = None
    chosen = {name: value for name, value in settings.items() if name in FIELDS}
    chosen |= {"teacher": teacher, "student": student, "method": "+".join(methods)}
    return Config(**chosen, options=options)


def identity(recorded: Mapping[str, Any]) -> str:
    return json.dumps({"processes": 1, **recorded}, sort_keys=True)


def print_plan(tables: Sequence[str], settings: Mapping[str, Any], **narrowed: Sequence) -> None:
    phases = dict(zip(("teacher", "student"), plan(tables, settings, **narrowed)))
    weights = settings.get("teacher_weights")
    if weights and not Path(weights).is_file():
        raise UsageError(f"there is no checkpoint '{weights}'")

    def key(recorded: Mapping[str, Any], data: str) -> tuple[str, str]:
        return identity(recorded), os.path.abspath(data) if recorded["dataset"] == "folder" else ""

    runs, _ = read_runs(settings.get("out", Config.out))
    there = {key(r["config"], r["environments"][-1]["data"]): r for r in runs if not r["remark"]}

    def finished(config: Config) -> dict[str, Any] | None:
        """Its record, if the very teacher that is planned has taught it."""
        run, teacher = there.get(key(config.recorded(), config.data)), None
        if run and config.teacher_weights:
            teacher = mhkd.sha256_of(weights)
        elif run and config.teacher:
            teacher = (finished(config.of_teacher()) or {"student_sha256": ""})["student_sha256"]
        return run if run and run["teacher_sha256"] == teacher else None

    for phase, configs in phases.items():
        for config in configs:
            state = "done" if finished(config) else "todo"
            print(f"{state}\t{phase}\t{shlex.join(arguments_of(config))}")


def arguments_of(config: Config) -> list[str]:
    """The command line of a configuration: what is not left to the recipe."""
    arguments = []
    for name, value in {"method": config.method, **config.given, **config.given["options"]}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and name != "options":
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            arguments += [f"--{flag}", text]
    return arguments


# --------------------------------------------------------------------------------------------------
# 3. Records, what can be compared, and statistics
# --------------------------------------------------------------------------------------------------

KEYS = ("name", "config", "differs", "teacher_sha256", "teacher_accuracy", "data_sha256", "seconds")
KEYS += ("accuracy", "class_accuracy", "best_accuracy", "best_epoch", "epochs", "student_sha256")
ORDER = ["ce", "kd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd", "mhkd", "crd+mhkd"]
OF_TEACHER = ("teacher_weights", "teacher_seed", "teacher_init", "teacher_units", "student_units")


def read_runs(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records directly below a folder, and a sentence for each file that cannot be used.

    Each has its "curve", the accuracy after every epoch, the options of its method in which it
    differs from the recipe as "own", and a "remark", empty where its student is there.
    """
    runs, unusable = [], []
    for path in sorted(Path(folder).glob("*/result.json")):
        student, log = path.with_name("student.pt"), path.with_name("log.jsonl")
        try:
            run = mhkd.read_json(path, *KEYS, "environments")
            options, apart = run["config"]["options"], run["differs"]
            run["own"] = {name: apart.pop(name) for name in list(apart) if name in options}
            run["remark"], run["curve"] = "student.pt is not there", []
            if student.is_file():
                same = mhkd.sha256_of(student) == run["student_sha256"]
                run["remark"] = "" if same else "student.pt is not that of the record"
            runs.append(run)
        except (UsageError, OSError) as error:
            unusable.append(str(error))
            continue
        except (KeyError, TypeError, AttributeError) as error:
            unusable.append(f"'{path}' is no record of this version ({error!r})")
            continue
        try:
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            if [entry["epoch"] for entry in entries] != list(range(1, run["epochs"] + 1)):
                raise ValueError(f"it does not have the {run['epochs']} epochs of the record")
            run["curve"] = [float(entry["test_accuracy"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            unusable.append(f"'{log}' is damaged ({mhkd.first_line(error)}): its curve is left out")
    return runs, unusable


class Group:
    """Runs that can be compared: of one data set, pair, teacher and recipe."""

    def __init__(self, runs: Sequence[dict[str, Any]]):
        self.runs, self.first, c = [*runs], runs[0], runs[0]["config"]
        self.teacher, self.student, self.data = c["teacher"], c["student"], c["dataset"]
        self.recipe = dict(self.first["differs"])  # what sets its runs apart from the recipe
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # label, seed: run
        if self.data == "folder":
            self.data += f" '{Path(self.first['environments'][-1]['data']).name}'"

    def has_student(self, alone: Group) -> bool:
        """Whether the network of the other group is the student here, trained by this recipe."""
        recipe = {name: value for name, value in self.recipe.items() if name not in OF_TEACHER}
        same = self.first["data_sha256"] == alone.first["data_sha256"] and recipe == alone.recipe
        return same and self.student == alone.student

    def label_rows(self) -> None:
        """Name the rows. What is alike in all that have such an option goes to the recipe."""
        values: dict[str, set[str]] = {}
        for run in self.runs:
            for name, value in run["config"]["options"].items():
                values.setdefault(name, set()).add(json.dumps(value))
        common = {name for name in values if len(values[name]) == 1} - {"units"}
        for run in sorted(self.runs, key=in_order):
            own = {name: value for name, value in run["own"].items() if name not in common}
            self.recipe |= {name: value for name, value in run["own"].items() if name in common}
            row = label_of(run["config"]["method"], own)
            self.rows.setdefault(row, {}).setdefault(run["config"]["seed"], run)

    def row_of(self, method: str) -> str | None:
        """The row of a method, that with the fewest options of its own."""
        methods = {row: [*runs.values()][0]["config"]["method"] for row, runs in self.rows.items()}
        return min((row for row in methods if methods[row] == method), key=len, default=None)

    def figures(self, row: str, base: str | None = None) -> Figures:
        """Of a row's accuracies, or of their differences to another row's over common seeds."""
        rows = (self.rows.get(name, {}).items() for name in (row, base))
        mine, theirs = ({seed: run["accuracy"] for seed, run in runs} for runs in rows)
        seeds = [seed for seed in mine if base is None or seed in theirs]
        return Figures(mine[seed] - theirs.get(seed, 0) for seed in seeds)


def in_order(run: dict[str, Any]) -> tuple:
    method = run["config"]["method"]
    place = ORDER.index(method) if method in ORDER else len(ORDER)
    return place, method, shown(run["own"]), run["config"]["seed"]


def shown(settings: Mapping[str, Any]) -> str:
    values = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def label_of(method: str, own: Mapping[str, Any]) -> str:
    """A row's name: "mhkd", "mhkd, head 1", "mhkd (head_stride 2)", "student alone (ce)"."""
    units = own.get("units", [])
    heads = f", head{'s' * (len(units) > 1)} {'+'.join(map(str, units))}" if units else ""
    rest = shown({name: value for name, value in own.items() if name != "units"})
    name = "student alone (ce)" if method == "ce" else method
    return name + heads + (f" ({rest})" if rest else "")


def group_runs(runs: Iterable[dict[str, Any]]) -> list[Group]:
    """What can be compared. Networks alone stand beside the pairs that they belong to."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        who = [run["config"]["teacher"], run["config"]["student"], run["differs"]]
        who += [run["data_sha256"], run["teacher_sha256"]]
        alike.setdefault(json.dumps(who, sort_keys=True), []).append(run)
    groups = [Group(found) for found in alike.values()]
    chosen = [group for group in groups if group.teacher]
    teachers = {group.first["teacher_sha256"] for group in chosen}
    for alone in [group for group in groups if not group.teacher]:
        pairs = [group for group in chosen if group.teacher and group.has_student(alone)]
        for group in pairs:
            group.runs += alone.runs
        if not pairs and not all(run["student_sha256"] in teachers for run in alone.runs):
            chosen.append(alone)
    for group in chosen:
        group.label_rows()
    return chosen


class Figures:
    """Mean, standard deviation of the sample, standard error, 95 % interval by Student's t."""

    def __init__(self, values: Iterable[float]):
        self.values = [*values]
        self.n = len(self.values)
        self.mean = statistics.mean(self.values) if self.values else None
        self.std = self.error = self.half = None
        if self.n > 1:
            self.std = statistics.stdev(self.values)
            self.error = self.std / math.sqrt(self.n)
            self.half = student_t(self.n - 1) * self.error  # of the interval's width

    def accuracy(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ({self.std:.2f})")

    def difference(self) -> str:
        if self.std is None:
            return ""
        interval = f"[{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]"
        return f"{self.mean:+.2f} ± {self.error:.2f} {interval}, n={self.n}"

    def csv(self) -> list[Any]:
        values = (self.mean, self.std, self.error, self.half)
        return [self.n, *("" if value is None else round(value, 4) for value in values)]


QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t: from a table, beyond it by Cornish and Fisher's series."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    return sum(term / freedom**power for power, term in enumerate(terms))


# --------------------------------------------------------------------------------------------------
# 4. The report
# --------------------------------------------------------------------------------------------------

EXPLANATION = """\
Test accuracy after the last epoch, in percent: mean (standard deviation of the sample) of n runs.
Runs of one seed are pairs: differences are over the seeds that both rows have, mean ± standard
error with the 95 % interval by Student's t."""
CSV_COLUMNS = ["data_set", "data_sha256", "teacher", "teacher_sha256", "student", "recipe", "row"]
CSV_COLUMNS += ["seeds"] + [
    prefix + name for prefix in ("", "minus_alone_", "minus_kd_")
    for name in ("n", "mean", "std", "standard_error", "half_95_interval")
]  # fmt: skip


def report(folder: str | Path) -> str:
    """The finished runs below a folder: what compares, the paper's tables, and a list of all.

    Written there as report.md, whose text is returned, report.csv and pictures.

    Raises:
        UsageError: no run below it has finished, or the folder cannot be written to.
    """
    folder = Path(folder)
    runs, unusable = read_runs(folder)
    if not runs:
        raise UsageError("; ".join([f"there is no finished run below '{folder}'", *unusable]))
    groups = group_runs(runs)
    parts = ["# What has run", EXPLANATION]
    for group, name in zip(groups, draw(folder, groups)):
        parts += [group_markdown(group), name and f"![accuracy]({name})"]
    papers = [text for table in TABLES.values() if (text := table_markdown(table, runs))]
    parts += papers and ["# The paper's tables, for runs of its recipe in full", *papers]
    parts += ["# All runs", list_of_runs(runs, groups)]
    parts += unusable and ["# Not used", "\n".join(f"- {sentence}" for sentence in unusable)]
    text, rows = "\n\n".join(part for part in parts if part), io.StringIO()
    lines = [line for group in groups for line in group_csv(group)]
    csv.writer(rows, lineterminator="\n").writerows([CSV_COLUMNS, *lines])
    for name, content in (("report.md", text + "\n"), ("report.csv", rows.getvalue())):
        mhkd.write_atomically(folder / name, lambda file, c=content: file.write(c.encode()))
    return text


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def group_markdown(group: Group) -> str:
    first, bases = group.first, []
    if len(group.rows) > 1:
        bases = [base for base in map(group.row_of, ("ce", "kd")) if base]
    pair = f"{group.teacher} → {group.student}" if group.teacher else f"{group.student} alone"
    facts = f"Apart from the recipe: {shown(group.recipe) or 'nothing'}. "
    facts += f"Data {first['data_sha256'][:8]}, {len(first['class_accuracy'])} classes"
    rows = []
    if group.teacher:
        facts += f"; teacher {first['teacher_sha256'][:8]}"
        accuracy = f"{first['teacher_accuracy']:.2f}"
        rows.append([f"teacher {group.teacher}", accuracy, *[""] * (1 + len(bases))])
    for row in group.rows:
        figures = group.figures(row)
        to = ["" if row == base else group.figures(row, base).difference() for base in bases]
        rows.append([row, figures.accuracy(), figures.n, *to])
    header = ["", "accuracy, %", "n", *(f"minus {base}" for base in bases)]
    return f"## {group.data}: {pair}\n\n{facts}.\n\n{markdown(header, rows)}"


def group_csv(group: Group) -> Iterable[list[Any]]:
    first = group.first
    who = [group.data, first["data_sha256"], group.teacher, first["teacher_sha256"], group.student]
    for row, runs in group.rows.items():
        seeds = " ".join(map(str, sorted(runs)))
        figures = [group.figures(row)]
        figures += [group.figures(row, group.row_of(method) or "") for method in ("ce", "kd")]
        yield [*who, shown(group.recipe), row, seeds, *(x for f in figures for x in f.csv())]


def list_of_runs(runs: Sequence[dict[str, Any]], groups: Sequence[Group]) -> str:
    counted = {id(run) for g in groups for seeds in g.rows.values() for run in seeds.values()}
    grouped = {id(run) for g in groups for run in g.runs}
    rows = []
    for run in runs:
        c = run["config"]
        twice = "" if id(run) in counted or id(run) not in grouped else "its seed is there twice"
        rows.append([
            run["name"], label_of(c["method"], run["own"]), c["seed"], f"{run['accuracy']:.2f}",
            f"{run['best_accuracy']:.2f} ({run['best_epoch']})", run["epochs"],
            f"{run['seconds'] / 60:.1f}", "; ".join(filter(None, (twice, run["remark"]))),
        ])  # fmt: skip
    header = ["run", "method", "seed", "last epoch, %", "best epoch, % (which)", "epochs"]
    return markdown([*header, "minutes", "remark"], rows)


def row_in_paper(run: dict[str, Any]) -> str | None:
    """The row of a run by the paper's recipe in full on the paper's data; None for others."""
    number, one = CLASSES.get(run["config"]["dataset"], (0, ""))
    units, rest = run["own"].get("units", []), {*run["own"]} - {"units"}
    images = len(run["class_accuracy"]) == number and one in run["class_accuracy"]
    apart = {*run["differs"]} - {"teacher_weights", "teacher_seed"}  # another teacher is no recipe
    if apart or rest or len(units) > 1 or not images:
        return None
    return run["config"]["method"] + "".join(f":{unit}" for unit in units)


def table_markdown(table: Table, runs: Sequence[dict[str, Any]]) -> str:
    """The table as the paper lays it out; under each of our rows the paper's and the difference.

    Empty where no cell has a run. A method that Tables 1 and 3 lack gets a further row.
    """
    found: dict[tuple, dict[int, float]] = {}
    for run in runs:
        c, row = run["config"], row_in_paper(run)
        if row and c["dataset"] == table.dataset:
            cell = found.setdefault((row, c["teacher"], c["student"]), {})
            cell.setdefault(c["seed"], run["accuracy"])
    pairs, rows, filled = [pair.split(":") for pair in table.pairs], [], 0
    known = {*table.paper, *(row.partition(":")[0] for row in table.rows)}
    further = {row for row, *pair in found if pair in pairs and row not in known and ":" not in row}
    for row in [*table.paper, *(sorted(further) if "teacher" in table.paper else ())]:
        papers = [figure.replace("(", " (") for figure in table.paper.get(row, [])]
        keys = [(row, t, s) for t, s in pairs]
        if row in ("teacher", "ce"):
            keys = [("ce", None, pair[row == "ce"]) for pair in pairs]
        if row == "compression":
            rows += [["compression, counted", *map(compression, table.pairs)], ["· paper", *papers]]
            continue
        cells = [Figures(found.get(key, {}).values()) for key in keys]
        filled += sum(f.n for f in cells)
        name = "student alone" if row == "ce" else row.replace("mhkd:", "mhkd, head ")
        ours = [f"{f.accuracy()}, n={f.n}" if f.n else "missing" for f in cells]
        rows.append([f"**{name}**", *ours])
        if papers:
            means = [(f.mean, float(figure.split()[0])) for f, figure in zip(cells, papers)]
            apart = ["" if mine is None else f"{mine - paper:+.2f}" for mine, paper in means]
            rows += [["· paper", *papers]] + ([["· difference", *apart]] if any(apart) else [])
    header = ["", *map(" → ".join, pairs)]
    return f"## {table.title}\n\n{markdown(header, rows)}" if filled else ""


def compression(pair: str) -> str:
    """Parameters saved, in percent of the teacher's, counted from the networks."""
    with torch.device("meta"):
        models = [mhkd.build_model(name, CLASSES["cifar100"][0]) for name in pair.split(":")]
    teacher, student = (sum(p.numel() for p in model.parameters()) for model in models)
    return f"{100 * (1 - student / teacher):.2f}"


# --------------------------------------------------------------------------------------------------
# 5. Pictures
# --------------------------------------------------------------------------------------------------

COLORS = {"ce": "#7f7f7f", "kd": "#0072b2", "mhkd": "#d55e00"}
FURTHER = ("#009e73", "#cc79a7", "#56b4e9")
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
STYLE |= {"legend.frameon": False, "lines.linewidth": 1.2, "axes.titlesize": 8, "savefig.dpi": 200}


def draw(folder: Path, groups: Sequence[Group]) -> Iterable[str]:
    """A picture of each group: curves, and where there are several rows how they compare.

    Yields their names, empty without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        mhkd.say("note: no pictures without matplotlib: pip install matplotlib")
        yield from [""] * len(groups)
        return
    names: list[str] = []
    for group in groups:
        parts = (group.first["config"]["dataset"], group.teacher, group.student)
        name = "-".join(mhkd.in_file_name(part) for part in parts if part)
        names.append(name)
        name += f"-{names.count(name)}.png" if names.count(name) > 1 else ".png"
        panels = [draw_curves, draw_differences][: 1 + (len(group.rows) > 1)]
        with matplotlib.rc_context(STYLE):
            size = (3.5 * len(panels), max(2.8, 1 + 0.2 * len(group.rows)))
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for axis, panel in zip(axes, panels):
                panel(axis, group)
            entries = axes[0].get_legend_handles_labels()
            figure.legend(*entries, loc="outside lower center", ncols=2 * len(panels))
            mhkd.write_atomically(folder / name, lambda f, fig=figure: fig.savefig(f, format="png"))
        yield name


def colors_of(group: Group) -> dict[str, str]:
    """The rows that have a color and a curve: of ce, kd and mhkd, of others where these lack."""
    colors = {row: color for method, color in COLORS.items() if (row := group.row_of(method))}
    others = [row for row in group.rows if row not in colors][: len(COLORS) - len(colors)]
    return colors | dict(zip(others, FURTHER))


def draw_curves(axis: Any, group: Group) -> None:
    """Accuracy over epochs, mean and range over seeds; the last value where a log is damaged."""
    from matplotlib.ticker import MaxNLocator

    for row, color in colors_of(group).items():
        runs = group.rows[row].values()
        curves = [run["curve"] for run in runs if run["curve"]]
        epochs = list(range(1, len(curves[0]) + 1)) if curves else [group.first["epochs"]]
        steps = list(zip(*(curves or [[run["accuracy"]] for run in runs])))
        means, low, high = ([f(s) for s in steps] for f in (statistics.mean, min, max))
        label = f"{row}, n={len(curves or runs)}"
        marker = "o" if len(steps) < 12 else None
        axis.plot(epochs, means, color=color, marker=marker, markersize=3, label=label)
        axis.fill_between(epochs, low, high, alpha=0.2, linewidth=0, color=color)
        if len(steps) == 1:
            axis.vlines(epochs, low, high, color=color)
    if group.teacher:
        accuracy = group.first["teacher_accuracy"]
        axis.axhline(accuracy, color="black", linestyle="--", label=f"teacher, {accuracy:.2f} %")
    pair = f"{group.teacher} → {group.student}" if group.teacher else group.student
    axis.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{group.data}: {pair}")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.margins(x=0.5 if len(epochs) == 1 else 0.05)


def draw_differences(axis: Any, group: Group) -> None:
    """All rows against KD, where it is missing the student alone, with their 95 % intervals."""
    base, colors = group.row_of("kd") or group.row_of("ce"), colors_of(group)
    zero = group.figures(base).mean if base else 0
    for place, row in enumerate(group.rows):
        f = group.figures(row, base)
        if f.n:
            half = None if row == base else f.half
            color = colors.get(row, "#333333")
            axis.errorbar(f.mean, place, xerr=half, fmt="o", markersize=4, capsize=2, color=color)
    if group.teacher:
        axis.axvline(group.first["teacher_accuracy"] - zero, color="black", linestyle="--")
    for row in {base, group.row_of("ce")} - {None}:
        mean = group.figures(row, base).mean
        if mean is not None:
            axis.axvline(mean, color=colors[row], zorder=0)
    labels = [f"{textwrap.fill(row, 30)}  {group.figures(row).accuracy()}" for row in group.rows]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_title("accuracy, % (std)", loc="left", x=0, ha="right")
    title = f"difference to {base}, points" if base else "test accuracy, %"
    axis.set(xlabel=f"{title}\n(95 % intervals)")


# --------------------------------------------------------------------------------------------------
# 6. Command line
# --------------------------------------------------------------------------------------------------

INSTEAD = {"method": "methods", "seed": "seeds", "teacher": "pairs", "student": "pairs"}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> None:
        if not arguments or {"-h", "--help"} & {*arguments}:
            print(__doc__)
        elif arguments[0] == "report" and len(arguments) == 2:
            print(report(arguments[1]))
        elif arguments[0] == "plan" and len(arguments) > 1 and not arguments[1].startswith("-"):
            settings = parse_settings(arguments[2:])
            narrowed = {name: settings.pop(name, ()) for name in ("seeds", "pairs", "rows")}
            print_plan(mhkd.words(arguments[1]), settings, **narrowed)
        else:
            raise UsageError("it is: report DIR, or: plan table1,table2,... [options], see --help")

    return mhkd.command_line("mhkd_tables.py", run)


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """What was given: seeds, pairs, rows, fields of Config, options of any method."""
    with contextlib.suppress(UsageError):  # loads the baselines, where their file is there
        mhkd.find_methods(mhkd.BASELINES[0])
    kinds = mhkd.METHODS.values()
    options = {n: o for kind in kinds for n, o in {**kind.final_options, **kind.options}.items()}
    there = mhkd.method_options(mhkd.find_methods(Config.method))

    def extra(parser: mhkd.Parser) -> None:
        parser.add_argument("--seeds", type=mhkd.integers)
        parser.add_argument("--pairs", type=mhkd.words)
        parser.add_argument("--methods", type=mhkd.words, dest="rows")
        for name, option in options.items():
            if name not in there:
                mhkd.add_option(parser, name, option)

    given = {n: v for n, v in vars(mhkd.parse_config(arguments, extra)[0]).items() if v is not None}
    for name in {*given} & {*INSTEAD}:
        raise UsageError(f"a plan takes --{INSTEAD[name]}, not --{name}")
    return {n: v for n, v in given.items() if n in ("seeds", "pairs", "rows", *FIELDS, *options)}


if __name__ == "__main__":
    sys.exit(main())
