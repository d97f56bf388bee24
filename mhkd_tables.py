#!/usr/bin/env python3
"""Which runs the paper's tables and the small study need, and the report of what has run.

    python mhkd_tables.py plan table1,table2                   # their runs: done or todo
    python mhkd_tables.py plan table1 --pairs vgg13:vgg8 --methods kd,mhkd --seeds 0 --epochs 60
    python mhkd_tables.py plan small --methods ce,kd,mhkd --seeds 0,1,2
    python mhkd_tables.py report runs                          # tables and pictures, written there

`plan` has table1, table2, table3 and small (docs/measurements.md), and takes any option of mhkd.py
for all runs. It prints a line for each: "done" or "todo", "teacher" or "student", the arguments for
mhkd.py, with tabs between; run_all.sh computes them. A row "mhkd:2" is MHKD with the head of unit 2
alone, "mhkd:head_stride=2" with that option.

`report` compares first what is alike: runs of one data set, pair, teacher and recipe. The paper's
tables follow, for runs of the paper's recipe in full, then all runs. It writes report.md,
report.csv and, with matplotlib, pictures.
"""

from __future__ import annotations

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
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mhkd
from mhkd import Config, UsageError

# --------------------------------------------------------------------------------------------------
# 1. The paper's tables and the small study
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper: a column for each pair, a row for each method, accuracies in percent.

    Figures are "mean" or "mean(standard deviation)".
    """

    title: str
    dataset: str
    pairs: str  # teacher:student
    rows: dict[str, str]
    teachers: str | None = None  # the teachers' own accuracies
    compression: str | None = None  # as the paper prints it
    titles: dict[str, str] = dataclasses.field(default_factory=dict)  # where not TITLES


TABLES = {
    "table1": Table(
        "Table 1: test accuracy on CIFAR-100, %",
        "cifar100",
        "wrn_40_2:wrn_16_2 resnet110:resnet20 vgg13:vgg8 vgg13:mobilenetv2 resnet32x4:shufflenetv2",
        {
            "ce": "73.26 69.06 70.36 64.60 71.82",
            "kd": "74.92 70.67 72.98 67.37 74.45",
            "fitnet": "75.12 70.67 73.22 66.90 75.15",
            "cc": "75.09 70.88 73.04 68.02 74.72",
            "rkd": "74.89 70.77 72.97 67.87 74.55",
            "mhkd": "75.28(0.26) 71.00(0.24) 73.96(0.19) 69.11(0.12) 76.34(0.24)",
            "crd": "75.64(0.21) 71.56(0.16) 74.29(0.12) 69.94(0.05) 76.05(0.09)",
            "crd+mhkd": "75.89(0.10) 71.76(0.10) 74.37(0.26) 70.21(0.19) 76.47(0.21)",
        },
        teachers="75.61 74.31 74.64 74.64 79.42",
        compression="68.81 70.00 58.10 92.82 83.22",
    ),
    "table2": Table(
        "Table 2: one head against several on CIFAR-100, test accuracy, %",
        "cifar100",
        "wrn_40_2:wrn_16_2 vgg13:vgg8",
        {
            "kd": "74.92 72.98",
            "fitnet": "75.12 73.22",
            "cc": "75.09 73.04",
            "rkd": "74.89 72.97",
            "mhkd:1": "75.27(0.27) 73.63(0.29)",
            "mhkd:2": "75.16(0.15) 73.76(0.12)",
            "mhkd:3": "75.00(0.35) 73.32(0.21)",
            "mhkd": "75.28(0.26) 73.96(0.19)",
        },
        titles={"mhkd": "Head-1+2+3"},
    ),
    "table3": Table(
        "Table 3: test accuracy on SVHN, %",
        "svhn",
        "wrn_40_2:wrn_16_2 resnet56:resnet20 vgg13:vgg8 mobilenetv2:vgg13 shufflenetv2:resnet32x4",
        {
            "ce": "93.05(0.01) 93.05(0.01) 91.74(0.06) 93.96(0.21) 94.17(0.09)",
            "kd": "94.67(0.06) 93.95(0.12) 93.93(0.06) 95.31(0.04) 95.96(0.10)",
            "fitnet": "94.75(0.06) 94.10(0.05) 94.25(0.06) 95.73(0.09) 96.20(0.08)",
            "cc": "95.00(0.06) 94.43(0.09) 94.30(0.12) 95.75(0.08) 96.04(0.09)",
            "rkd": "95.28(0.12) 94.57(0.06) 94.40(0.08) 95.83(0.02) 96.25(0.02)",
            "mhkd": "95.38(0.03) 94.70(0.04) 94.45(0.07) 95.88(0.01) 96.68(0.03)",
        },
        teachers="94.29 93.69 94.20 95.47 96.08",
    ),
}
TITLES = {"teacher": "Teacher baseline", "ce": "Student baseline", "fitnet": "FitNet"}
TITLES |= {f"mhkd:{unit}": f"Head-{unit}" for unit in (1, 2, 3)}
# The paper's data sets have so many classes, this among them: other images are never theirs.
CLASSES = {"cifar100": (100, "aquarium_fish"), "svhn": (10, "7")}

# The protocol of docs/measurements.md: the settings of all runs; then in order the pair, its number
# of images, and for each row its number of seeds.
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


def blocks(name: str, seeds: Sequence[int]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A table's pairs, each with its settings and the seeds of each row."""
    if name == "small":
        chosen = {n: [s for s in range(n) if not seeds or s in seeds] for n in (3, 5, 10)}
        return [
            (pair, {**SMALL, "subset": images}, {row: chosen[n] for row, n in numbers.items()})
            for (pair, images), numbers in SMALL_ROWS
        ]
    mhkd.check_name("table", name, [*TABLES, "small"])
    table = TABLES[name]
    rows = dict.fromkeys(table.rows, seeds or (0, 1, 2))
    return [(pair, {"dataset": table.dataset}, rows) for pair in table.pairs.split()]


def plan(
    tables: Sequence[str], settings: Mapping[str, Any] = types.MappingProxyType({}),
    seeds: Sequence[int] = (), pairs: Sequence[str] = (), rows: Sequence[str] = (),
) -> tuple[list[Config], list[Config]]:  # fmt: skip
    """The runs that tables need, each once: the teachers, and the others.

    Args:
        tables: keys of TABLES, or "small".
        settings: of all runs, fields of Config and options of methods by name; a data set stands
            for CIFAR-100.
        seeds: by default 0, 1 and 2, of "small" the protocol's.
        pairs, rows: these alone; a method that the paper's table lacks is a further row.

    Raises:
        UsageError: a table, a pair or a row does not exist, or nothing is left.
    """
    wanted = [block for name in tables for block in blocks(name, seeds)]
    known = dict.fromkeys(row for *_, numbers in wanted for row in numbers)
    further = [row for row in rows if row not in known]
    for pair in pairs:
        mhkd.check_name("pair", pair, dict.fromkeys(pair for pair, *_ in wanted))
    for row in further:
        if ":" in row or "small" in tables:
            mhkd.check_name("row", row, known)
    teachers, others = {}, {}
    for pair, own, numbers in wanted:
        numbers = {row: s for row, s in numbers.items() if not rows or row in rows}
        numbers |= dict.fromkeys(further, seeds or (0, 1, 2))
        chosen = {**own, **settings}
        if own["dataset"] == "svhn" != settings.get("dataset", "svhn"):
            raise UsageError("table3 is for --dataset svhn only")
        for seed in sorted({seed for s in numbers.values() for seed in s}):
            for row in [row for row in numbers if seed in numbers[row] and pair in (pairs or [pair])]:
                config = cell(row, pair, {**chosen, "seed": seed})
                others[identity(config.recorded())] = config
                if config.teacher and not config.teacher_weights:
                    teacher = config.of_teacher()
                    teachers[identity(teacher.recorded())] = teacher
    configs = [config for key, config in others.items() if key not in teachers]
    if not others:
        raise UsageError("no run is left with these --seeds, --pairs and --methods")
    if len({config.teacher for config in configs if config.teacher_weights}) > 1:
        raise UsageError("--teacher-weights is for one teacher: narrow the plan to its pairs")
    for name in {*settings} - {*FIELDS} - {name for c in configs for name in c.options}:
        raise UsageError(mhkd.foreign_option(name, configs[-1].method))
    return list(teachers.values()), configs


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
        run, taught = there.get(key(config.recorded(), config.data)), None
        if run and config.teacher_weights:
            taught = mhkd.sha256_of(weights)
        elif run and config.teacher:
            taught = (finished(config.of_teacher()) or {"student_sha256": "none"})["student_sha256"]
        return run if run and run["teacher_sha256"] == taught else None

    for phase, configs in phases.items():
        for config in configs:
            state = "done" if finished(config) else "todo"
            print(f"{state}\t{phase}\t{shlex.join(arguments_of(config))}")


def arguments_of(config: Config) -> list[str]:
    """The command line of a configuration: what is not left to the recipe."""
    arguments = []
    for name, value in {**config.given, "method": config.method, **config.given["options"]}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and name != "options":
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            arguments += [f"--{flag}", text]
    return arguments


# --------------------------------------------------------------------------------------------------
# 3. Records, and what can be compared
# --------------------------------------------------------------------------------------------------

KEYS = ["name", "config", "differs", "teacher_sha256", "teacher_accuracy", "data_sha256", "accuracy"]
KEYS += ["class_accuracy", "best_accuracy", "best_epoch", "epochs", "seconds", "student_sha256"]
ORDER = ["ce", "kd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd", "mhkd", "crd+mhkd"]
OF_TEACHER = ("teacher_weights", "teacher_seed", "teacher_init", "teacher_units", "student_units")


def read_runs(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records directly below a folder, and a sentence for each file that cannot be used.

    Each has its "curve", the accuracy after each epoch, and a "remark", empty where its student is
    there.
    """
    runs, unusable = [], []
    for path in sorted(Path(folder).glob("*/result.json")):
        student, log = path.with_name("student.pt"), path.with_name("log.jsonl")
        try:
            run = mhkd.read_json(path, *KEYS, "environments")
            run["remark"], run["curve"] = "student.pt is not there", []
            if student.is_file():
                same = mhkd.sha256_of(student) == run["student_sha256"]
                run["remark"] = "" if same else "student.pt is not that of the record"
            runs.append(run)
        except (UsageError, OSError) as error:
            unusable.append(str(error))
            continue
        try:
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            if [entry["epoch"] for entry in entries] != list(range(1, run["epochs"] + 1)):
                raise ValueError(f"it does not have the {run['epochs']} epochs of the record")
            run["curve"] = [float(entry["test_accuracy"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            unusable.append(f"'{log}' is damaged ({mhkd.first_line(error)}): its curve is left out")
    return runs, unusable


@dataclasses.dataclass
class Group:
    """Runs that can be compared: of one data set, pair, teacher and recipe."""

    teacher: str | None
    student: str
    recipe: dict[str, Any]  # what sets them apart from the recipe, beside the options of methods
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: dict[str, dict[int, dict]] = dataclasses.field(default_factory=dict)  # label, seed: run

    def label_rows(self) -> None:
        """Name the rows. What is alike in all that have such an option goes to the recipe."""
        kinds: dict[str, dict[str, set[str]]] = {}  # option: value: rows that have it
        for run in self.runs:
            for name, value in run["config"]["options"].items():
                row = json.dumps([run["config"]["method"], divide(run)[1]], sort_keys=True)
                kinds.setdefault(name, {}).setdefault(json.dumps(value), set()).add(row)
        common = {name for name, values in kinds.items() if [len(v) > 1 for v in values.values()] == [1]}
        common -= {"units"}
        self.runs.sort(key=lambda run: (place_of(run["config"]["method"]), run["config"]["seed"]))
        for run in self.runs:
            own = divide(run)[1]
            self.recipe |= {name: own[name] for name in own if name in common}
            label = label_of(run["config"]["method"], {k: own[k] for k in own if k not in common})
            self.rows.setdefault(label, {}).setdefault(run["config"]["seed"], run)

    def title(self) -> str:
        dataset = self.runs[0]["config"]["dataset"]
        if dataset == "folder":
            dataset = f"folder '{Path(self.runs[0]['environments'][-1]['data']).name}'"
        return f"{dataset}: {f'{self.teacher} → ' if self.teacher else ''}{self.student}"

    def row_of(self, method: str) -> str | None:
        """The row of a method, that with the fewest options of its own."""
        found = [row for row, runs in self.rows.items() for run in runs.values() if run["config"]["method"] == method]
        return min(found, key=len, default=None)

    def figures(self, row: str, base: str | None = None) -> Figures:
        """Of a row's accuracies, or of their differences to another row's over common seeds."""
        mine, others = self.rows[row], self.rows.get(base, {})
        seeds = [seed for seed in mine if not base or seed in others]
        return Figures([mine[s]["accuracy"] - (others[s]["accuracy"] if base else 0) for s in seeds])


def divide(run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What sets a run apart from the recipe: all but the options of its method, and those."""
    apart, options = run["differs"], run["config"]["options"]
    own = {name: value for name, value in apart.items() if name in options}
    return {name: value for name, value in apart.items() if name not in own}, own


def place_of(method: str) -> tuple[int, str]:
    return ORDER.index(method) if method in ORDER else len(ORDER), method


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in words."""
    values = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def label_of(method: str, own: Mapping[str, Any]) -> str:
    """A row's name: "mhkd", "mhkd, head 1", "mhkd (head_stride 2)"."""
    units = own.get("units", [])
    heads = f", head{'s' * (len(units) > 1)} {'+'.join(map(str, units))}" if units else ""
    rest = shown({name: value for name, value in own.items() if name != "units"})
    return method + heads + (f" ({rest})" if rest else "")


def group_runs(runs: Iterable[dict[str, Any]]) -> list[Group]:
    """What can be compared. Networks alone stand beside the pairs that they belong to."""
    groups: dict[str, Group] = {}
    for run in runs:
        c, (recipe, _) = run["config"], divide(run)
        who = [run["data_sha256"], c["teacher"], c["student"], run["teacher_sha256"], recipe]
        group = Group(c["teacher"], c["student"], recipe)
        groups.setdefault(json.dumps(who, sort_keys=True), group).runs.append(run)
    chosen = [group for group in groups.values() if group.teacher]
    taught = {group.runs[0]["teacher_sha256"] for group in chosen}
    for alone in [group for group in groups.values() if not group.teacher]:
        beside = [
            group
            for group in chosen
            if group.teacher and group.student == alone.student
            and group.runs[0]["data_sha256"] == alone.runs[0]["data_sha256"]
            and {k: v for k, v in group.recipe.items() if k not in OF_TEACHER} == alone.recipe
        ]  # fmt: skip
        for group in beside:
            group.runs += alone.runs
        if not beside and not all(run["student_sha256"] in taught for run in alone.runs):
            chosen.append(alone)
    for group in chosen:
        group.label_rows()
    return sorted(chosen, key=lambda g: (g.teacher is None, g.runs[0]["config"]["dataset"]))


class Figures:
    """Mean, standard deviation of the sample, standard error, 95 % interval by Student's t."""

    def __init__(self, values: Sequence[float]):
        self.n = len(values)
        self.mean = statistics.mean(values) if values else None
        self.std = self.error = self.low = self.high = None
        if self.n > 1:
            self.std = statistics.stdev(values)
            self.error = self.std / math.sqrt(self.n)
            half = quantile(self.n - 1) * self.error
            self.low, self.high = self.mean - half, self.mean + half

    def accuracy(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ({self.std:.2f})")

    def difference(self) -> str:
        if self.std is None:
            return ""
        interval = f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.mean:+.2f} ± {self.error:.2f} {interval}, n={self.n}"

    def csv(self) -> list[Any]:
        values = (self.mean, self.std, self.error, self.low, self.high)
        return [self.n, *("" if value is None else round(value, 4) for value in values)]


QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t: from a table, beyond it by Cornish and Fisher's series."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


# --------------------------------------------------------------------------------------------------
# 4. The report
# --------------------------------------------------------------------------------------------------


EXPLANATION = """\
Test accuracy after the last epoch, in percent: mean (standard deviation of the sample) of n runs.
Runs of one seed are pairs: differences are over the seeds that both rows have, mean ± standard error
with the 95 % interval by Student's t."""
STATISTICS = ["n", "mean", "std", "standard_error", "low", "high"]
CSV_COLUMNS = ["data_set", "data_sha256", "teacher", "teacher_sha256", "student", "recipe", "row", "seeds"]
CSV_COLUMNS += [f"{prefix}{s}" for prefix in ("", "to_alone_", "to_kd_") for s in STATISTICS]


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
    papers = {name: found for name, table in TABLES.items() if (found := cells_of(table, runs))}
    names = list(draw(folder, groups, papers))
    parts = ["# What has run", EXPLANATION]
    for group, name in zip(groups, names or [""] * len(groups)):
        parts += [group_markdown(group), name and f"![accuracy]({name})"]
    if papers:
        parts += ["# The paper's tables, for runs of its recipe in full"]
    for name, found in papers.items():
        parts += [table_markdown(TABLES[name], found), f"![accuracy]({name}.png)" if names else ""]
    parts += ["# All runs", list_of_runs(runs, groups)]
    if unusable:
        parts += ["# Not used", "\n".join(f"- {sentence}" for sentence in unusable)]
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
    first, bases = group.runs[0], [base for base in map(group.row_of, ("ce", "kd")) if base]
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
        rows.append([name_of(row), figures.accuracy(), figures.n, *to])
    header = ["", "accuracy, %", "n", *(f"minus {name_of(base)}" for base in bases)]
    return f"## {group.title()}\n\n{facts}.\n\n{markdown(header, rows)}"


def group_csv(group: Group) -> Iterable[list[Any]]:
    first = group.runs[0]
    who = [first["config"]["dataset"], first["data_sha256"], group.teacher, first["teacher_sha256"]]
    for row in group.rows:
        seeds = " ".join(map(str, sorted(group.rows[row])))
        bases = [None, group.row_of("ce") or "", group.row_of("kd") or ""]
        figures = [figure for base in bases for figure in group.figures(row, base).csv()]
        yield [*who, group.student, shown(group.recipe), row, seeds, *figures]


def name_of(row: str) -> str:
    return "student alone (ce)" if row == "ce" else row


def list_of_runs(runs: Sequence[dict[str, Any]], groups: Sequence[Group]) -> str:
    counted = {id(run) for g in groups for seeds in g.rows.values() for run in seeds.values()}
    counted |= {id(run) for run in runs if not run["config"]["teacher"]}
    rows = []
    for run in runs:
        c, apart = run["config"], divide(run)
        remarks = [run["remark"]] + ([] if id(run) in counted else ["not counted: its seed is there twice"])
        rows.append([
            run["name"], c["dataset"], f"{c['teacher'] or ''} → {c['student']}".strip(" →"),
            label_of(c["method"], apart[1]), c["seed"], f"{run['accuracy']:.2f}",
            f"{run['best_accuracy']:.2f} ({run['best_epoch']})", run["epochs"],
            f"{run['seconds'] / 60:.1f}", "; ".join(filter(None, remarks)),
        ])  # fmt: skip
    header = ["run", "data set", "networks", "method", "seed", "last epoch, %", "best epoch, %"]
    return markdown([*header, "epochs", "minutes", "remark"], rows)


# The paper's tables


def papers_row(run: dict[str, Any]) -> str | None:
    """The row of a run by the paper's recipe in full on the paper's data; None for others."""
    c, (apart, own) = run["config"], divide(run)
    units = own.pop("units", [])
    classes, one = CLASSES.get(c["dataset"], (0, ""))
    images = len(run["class_accuracy"]) == classes and one in run["class_accuracy"]
    if apart or own or not images or len(units) > 1:
        return None
    return c["method"] + "".join(f":{unit}" for unit in units)


def cells_of(table: Table, runs: Sequence[dict[str, Any]]) -> dict[str, list[Figures]]:
    """The figures of a table's cells by row; of "teacher", too. Nothing where there is no run."""
    found: dict[tuple, dict[int, float]] = {}
    for run in runs:
        c, row = run["config"], papers_row(run)
        if row and c["dataset"] == table.dataset:
            key = (row, c["teacher"], c["student"])
            found.setdefault(key, {}).setdefault(c["seed"], run["accuracy"])
    pairs = [pair.split(":") for pair in table.pairs.split()]
    rows = [*table.rows]
    if table.teachers:  # Tables 1 and 3 take further methods, too
        known = {row.partition(":")[0] for row in rows}
        there = dict.fromkeys(row for row, *pair in found if pair in pairs)
        rows = ["teacher", *rows, *(row for row in there if row not in known and ":" not in row)]
    cells = {}
    for row in rows:
        keys = [("ce", None, t) if row == "teacher" else (row, None if row == "ce" else t, s) for t, s in pairs]
        cells[row] = [Figures([*found.get(key, {}).values()]) for key in keys]
    return cells if any(figures.n for line in cells.values() for figures in line) else {}


def papers_figures(table: Table, row: str) -> list[str]:
    line = (table.teachers or "") if row == "teacher" else table.rows.get(row, "")
    return line.split()


def table_title(table: Table, row: str) -> str:
    return table.titles.get(row) or TITLES.get(row) or (row if row not in table.rows else row.upper())


def table_markdown(table: Table, cells: dict[str, list[Figures]]) -> str:
    """The table as the paper lays it out; under each of our rows the paper's and the difference."""
    pairs = [pair.split(":") for pair in table.pairs.split()]
    saved = []
    for pair in pairs:
        with torch.device("meta"):
            models = (mhkd.build_model(name, CLASSES[table.dataset][0]) for name in pair)
            t, s = (sum(p.numel() for p in model.parameters()) for model in models)
        saved.append(f"{100 * (1 - s / t):.2f}")
    rows = [["Compression, counted, %", *saved]]
    if table.compression:
        rows.append(["· paper", *table.compression.split()])
    for row, line in cells.items():
        ours = [f"{f.accuracy()}, n={f.n}" if f.n else "missing" for f in line]
        rows.append([f"**{table_title(table, row)}**", *ours])
        if papers := papers_figures(table, row):
            rows.append(["· paper", *(figure.replace("(", " (") for figure in papers)])
            means = [(f.mean, float(figure.split("(")[0])) for f, figure in zip(line, papers)]
            if any(f.n for f in line):
                rows.append(["· difference", *("" if a is None else f"{a - b:+.2f}" for a, b in means)])
    return f"## {table.title}\n\n{markdown(['', *map(' → '.join, pairs)], rows)}"


# --------------------------------------------------------------------------------------------------
# 5. Pictures
# --------------------------------------------------------------------------------------------------

COLORS = {"ce": "#7f7f7f", "kd": "#0072b2", "mhkd": "#d55e00"}
FURTHER = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def draw(folder: Path, groups: Sequence[Group], papers: dict[str, Any]) -> Iterable[str]:
    """A picture of each group, whose names are returned, and of each of the paper's tables."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        mhkd.say("note: no pictures without matplotlib: pip install matplotlib")
        return
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
    style |= {"legend.frameon": False, "lines.linewidth": 1.2}

    def save(figure: Any, name: str) -> None:
        FigureCanvasAgg(figure)
        write = lambda file: figure.savefig(file, format="png", dpi=200)  # noqa: E731
        mhkd.write_atomically(folder / name, write)

    with matplotlib.rc_context(style):
        names: list[str] = []
        for group in groups:
            parts = (group.runs[0]["config"]["dataset"], group.teacher, group.student)
            name = "-".join(mhkd.in_file_name(part) for part in parts if part)
            name += f"-{names.count(name) + 1}" if name in names else ""
            names.append(name)
            height = max(2.8, 1.1 + 0.24 * len(group.rows))
            figure = Figure(figsize=(7, height), layout="constrained")
            draw_group(figure, group)
            save(figure, f"{name}.png")
            yield f"{name}.png"
        for name, cells in papers.items():
            figure = Figure(layout="constrained")
            draw_table(figure, TABLES[name], cells)
            save(figure, f"{name}.png")


def draw_group(figure: Any, group: Group) -> None:
    """Left accuracy over epochs, mean and range over seeds; right all rows against KD."""
    from matplotlib.ticker import MaxNLocator

    main = [row for row in map(group.row_of, ("ce", "kd", "mhkd")) if row]
    main += [row for row in group.rows if row not in main][: max(0, 3 - len(main))]
    colors = {row: COLORS.get(row.partition(" ")[0]) or FURTHER[i] for i, row in enumerate(main)}
    base = group.row_of("kd") or group.row_of("ce")
    dots = len(group.rows) > 1
    left, *right = figure.subplots(1, 1 + dots, width_ratios=[1, 1.1][: 1 + dots], squeeze=False)[0]
    for row in main:
        curves = [run["curve"] for run in group.rows[row].values() if run["curve"]]
        if curves:
            steps, epochs = list(zip(*curves)), range(1, len(curves[0]) + 1)
            marker = "o" if len(steps) < 12 else None
            means = [statistics.mean(step) for step in steps]
            label = name_of(row)
            left.plot(epochs, means, marker=marker, markersize=3, color=colors[row], label=label)
            low, high = [min(step) for step in steps], [max(step) for step in steps]
            left.fill_between(epochs, low, high, alpha=0.2, linewidth=0, color=colors[row])
    teacher = group.runs[0]["teacher_accuracy"] if group.teacher else None
    if teacher is not None:
        left.axhline(teacher, color="black", linestyle="--", label=f"teacher, {teacher:.2f} %")
    left.set(xlabel="epoch", ylabel="test accuracy, %", title=group.title())
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="lower right")
    for axis in right:
        rows = list(group.rows)[::-1]
        for place, row in enumerate(rows):
            d = group.figures(row, base)
            if d.n:
                color = colors.get(row, "#333333")
                error = None if d.error is None or row == base else [[d.mean - d.low], [d.high - d.mean]]
                axis.errorbar(d.mean, place, xerr=error, fmt="o", markersize=4, color=color, capsize=2)
        zero = group.figures(base).mean if base else 0
        if teacher is not None:
            axis.axvline(teacher - zero, color="black", linestyle="--")
        if alone := group.row_of("ce"):
            axis.axvline(group.figures(alone, base).mean, color=COLORS["ce"])
        axis.axvline(0, color=colors.get(base))
        labels = [f"{textwrap.fill(row, 30)}  {group.figures(row).accuracy()}" for row in rows]
        axis.set_yticks(range(len(rows)), labels)
        axis.set(ylim=(-0.6, len(rows) - 0.4))
        what = f"difference to {name_of(base)} over common seeds, points" if base else "test accuracy, %"
        axis.set(xlabel=f"{what}\n(with 95 % intervals)")


def draw_table(figure: Any, table: Table, cells: dict[str, list[Figures]]) -> None:
    """A panel for each pair that has run: our mean and deviation, and the paper's, for each row."""
    pairs = table.pairs.split()
    columns = [i for i in range(len(pairs)) if any(line[i].n for line in cells.values())]
    rows = [row for row in cells if row != "teacher"][::-1]
    figure.set_size_inches(max(3.5, 1 + 2 * len(columns)), 1.2 + 0.25 * len(rows))
    for axis, i in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns):
        for place, row in enumerate(rows):
            if papers := papers_figures(table, row):
                value = float(papers[i].split("(")[0])
                axis.plot(value, place, "D", markersize=4, color="0.5", fillstyle="none", label="paper")
            if cells[row][i].n:
                error, mean = cells[row][i].std or 0, cells[row][i].mean
                axis.errorbar(mean, place, xerr=error, fmt="o", markersize=4, capsize=2, label="here", color="#d55e00")
        for row, style in (("teacher", "--"), ("ce", "-")):
            if row in cells and cells[row][i].n:
                label = f"{TITLES[row].split()[0].lower()} alone, here"
                axis.axvline(cells[row][i].mean, color=COLORS["ce"], linestyle=style, label=label)
        axis.set(title=pairs[i].replace(":", " → "), xlabel="test accuracy, %")
        axis.set_yticks(range(len(rows)), [table_title(table, row) for row in rows])
    handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)


# --------------------------------------------------------------------------------------------------
# 6. Command line
# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return mhkd.command_line("mhkd_tables.py", lambda: run(arguments))


def run(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(__doc__)
    elif arguments[0] == "report" and len(arguments) == 2:
        print(report(arguments[1]))
    elif arguments[0] == "plan" and len(arguments) > 1 and not arguments[1].startswith("-"):
        options = all_options()

        def extra(parser: mhkd.Parser) -> None:
            for name in ("seeds", "pairs", "methods"):
                parser.add_argument(f"--{name}", type=mhkd.integers if name == "seeds" else mhkd.words)
            declared = mhkd.method_options(mhkd.find_methods(Config.method))
            for name, option in options.items():
                if name not in declared:
                    mhkd.add_option(parser, name, option)

        parsed = {k: v for k, v in vars(mhkd.parse_config(arguments[2:], extra)[0]).items() if v is not None}
        for name, instead in (("method", "methods"), ("seed", "seeds"), ("teacher", "pairs"), ("student", "pairs")):
            if name in parsed:
                raise UsageError(f"a plan has --{instead}, not --{name}")
        settings = {name: parsed[name] for name in (*FIELDS, *options) if name in parsed}
        names = (("seeds", "seeds"), ("pairs", "pairs"), ("rows", "methods"))
        narrowed = {key: parsed.get(name, ()) for key, name in names}
        print_plan(mhkd.words(arguments[1]), settings, **narrowed)
    else:
        raise UsageError("there is: report DIR, and plan table1,table2,table3,small [options]")


def all_options() -> dict[str, mhkd.Option]:
    """Those of all methods, of the baselines too, where their file is there."""
    try:
        mhkd.find_methods(mhkd.BASELINES[0])
    except UsageError:
        pass
    kinds = mhkd.METHODS.values()
    return {name: o for k in kinds for name, o in {**k.final_options, **k.options}.items()}


if __name__ == "__main__":
    sys.exit(main())
