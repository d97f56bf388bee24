#!/usr/bin/env python3
"""Which runs the paper's tables and the small study need, and the report of what has run.

    python mhkd_tables.py plan table1,table2                   # their runs: done or todo
    python mhkd_tables.py plan table1 --pairs vgg13:vgg8 --methods kd,mhkd --seeds 0 --epochs 60
    python mhkd_tables.py plan small --methods ce,kd,mhkd --seeds 0,1,2
    python mhkd_tables.py report runs                          # tables and pictures, written there

`plan` knows table1, table2, table3 and small, the study of docs/measurements.md, and takes any
option of mhkd.py for all runs, or for those that have it. It prints a line for each run: done or
todo, teacher or student, the arguments for mhkd.py, with tabs between; run_all.sh computes them. A
method "mhkd:2" is MHKD with the head of unit 2 alone, "kd:gamma=1" KD with that option.

`report` compares first what is alike: runs of one data set, pair, teacher and recipe. The paper's
tables follow, for runs of its recipe in full, then all runs. It writes report.md and, where
matplotlib is installed, a picture of each pair.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mhkd
from mhkd import Config, UsageError

# --------------------------------------------------------------------------------------------------
# 1. The paper's tables and the small study
# --------------------------------------------------------------------------------------------------


class Table:
    """A table of the paper: a column for each pair, a row for each method: mean(std) in percent."""

    def __init__(self, title: str, dataset: str, text: str):
        self.title, self.dataset = title, dataset
        self.pairs, *lines = [line.split() for line in text.strip().splitlines()]
        self.paper = {row: figures for row, *figures in lines}
        self.rows = [row for row in self.paper if row != "teacher"]


TABLES = {
    "table1": Table("Table 1: test accuracy on CIFAR-100, %", "cifar100", """
        wrn_40_2:wrn_16_2 resnet110:resnet20 vgg13:vgg8 vgg13:mobilenetv2 resnet32x4:shufflenetv2
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
# The paper's data sets have so many classes, this among them; other images are not theirs.
CLASSES = {"cifar100": (100, "aquarium_fish"), "svhn": (10, "7")}

# The second protocol of docs/measurements.md. The teacher learns from all images, the students from
# 5,000. For each pair: (rows, their number of seeds), in the order in which they are computed.
STUDY = {"dataset": "cifar100", "image_size": 16, "device": "cpu", "backend": "reference"}
STUDY_TEACHER = STUDY | {"student": "wrn_16_2", "method": "ce", "epochs": 30}
STUDY_STUDENT = STUDY | {"subset": 5000, "epochs": 60}
STUDY_STUDENT |= {"options": {"head_width": 64, "head_stride": 2}}
EQUAL = ":gamma=1:kd_weight=1"  # final cross-entropy and divergence both with weight 1
BEST = EQUAL + ":teacher_heads=pretrained"
FACTORIAL = ["mhkd" + heads for heads in ("", ":teacher_heads=pretrained", ":teacher_heads=logits")]
FACTORIAL = [row + weights for row in ("kd", *FACTORIAL) for weights in ("", EQUAL)]
OTHERS = ["mhkd:units=1", "mhkd:units=2", "mhkd:units=3", "mhkd:head_ce=0", "mhkd:head_stride=1"]
OTHERS = [row + BEST for row in (*OTHERS, "crd+mhkd")]
SMALL_ROWS = [
    ("wrn_16_2:resnet8", ["ce", *FACTORIAL], 10),
    ("wrn_16_2:shufflenetv2", ["ce", "kd", "kd" + EQUAL, FACTORIAL[4], FACTORIAL[5]], 5),
    ("wrn_16_2:resnet8", [*OTHERS, "fitnet", "cc", "rkd", "crd", "lsh", "dhkd"], 5),
]


# --------------------------------------------------------------------------------------------------
# 2. The plan
# --------------------------------------------------------------------------------------------------

INSTEAD = {"--method": "methods", "--seed": "seeds", "--teacher": "pairs", "--student": "pairs"}


def cells(name: str, seeds: Sequence[int] = ()) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Pair, row, seed and settings of each run. Seeds narrow the study's, and replace a table's."""
    if name == "small":
        for pair, rows, number in SMALL_ROWS:
            for seed, row in itertools.product(range(number), rows):
                if seed in (seeds or [seed]):
                    yield pair, row, seed, STUDY_STUDENT
        return
    table = TABLES[mhkd.check_name("table", name, [*TABLES, "small"])]
    for pair, seed, row in itertools.product(table.pairs, seeds or range(3), table.rows):
        yield pair, row, seed, {"dataset": table.dataset, "options": {}}


def settings_of(row: str, declared: Mapping[str, mhkd.Option]) -> dict[str, Any]:
    """The options that a row names: "mhkd:2" is unit 2 alone, "kd:gamma=1" that option."""
    found = {}
    for part in row.split(":")[1:]:
        name, _, value = part.rpartition("=")
        name = name or "units"
        found[name] = declared[mhkd.check_name("option", name, declared)].parse(value)
    return found


def plan(tables: Sequence[str], arguments: Sequence[str]) -> tuple[list[Config], list[Config]]:
    """The runs that tables need, each once: the teachers, and the others.

    arguments: --seeds, --pairs, --methods, and options of mhkd.py for the runs that have them.
    """
    every = [cell for name in tables for cell in cells(name)]
    pairs, rows = (dict.fromkeys(cell[i] for cell in every) for i in (0, 1))
    declared = {row: mhkd.method_options(mhkd.find_methods(row.split(":")[0])) for row in rows}
    known = {name: option for options in declared.values() for name, option in options.items()}

    def extra(parser: Any) -> None:
        parser.add_argument("--seeds", type=mhkd.integers, default=())
        parser.add_argument("--pairs", type=mhkd.words, default=pairs)
        parser.add_argument("--methods", type=mhkd.words, default=rows)
        for name, option in known.items():
            mhkd.add_option(parser, name, option)

    for flag in {argument.partition("=")[0] for argument in arguments} & {*INSTEAD}:
        raise UsageError(f"a plan takes --{INSTEAD[flag]}, not {flag}")
    # ce has no options of its own, so those of all rows can be added.
    given, fields = mhkd.parse_config(["--method", "ce", *arguments], extra)
    options = {name: value for name in known if (value := getattr(given, name)) is not None}
    for what, names, there in (("pair", given.pairs, pairs), ("row", given.methods, rows)):
        for name in names:
            mhkd.check_name(what, name, there)

    study_teacher = Config(**{**STUDY_TEACHER, **fields, "seed": 0, "teacher_weights": None})
    study_weights = Path(study_teacher.out) / mhkd.name_of(study_teacher, study_teacher.differs())
    teachers, others = [], []
    for pair, row, seed, own in (cell for name in tables for cell in cells(name, given.seeds)):
        if pair in given.pairs and row in given.methods:
            teacher, student = pair.split(":")
            chosen = {**own["options"], **options, **settings_of(row, declared[row])}
            of_teacher = {} if row == "ce" else {"teacher": teacher}
            if own is STUDY_STUDENT and of_teacher:
                of_teacher["teacher_weights"] = str(study_weights / "student.pt")
            config = Config(**{
                **own, **of_teacher, **fields, "seed": seed, "student": student,
                "method": row.split(":")[0],
                "options": {name: v for name, v in chosen.items() if name in declared[row]},
            })  # fmt: skip
            if config not in others:
                others.append(config)
            if own is STUDY_STUDENT and of_teacher and "teacher_weights" not in fields:
                trained_first = study_teacher
            elif config.teacher and not config.teacher_weights:
                trained_first = config.of_teacher()
            else:
                continue
            if trained_first not in teachers:
                teachers.append(trained_first)
    if not others:
        raise UsageError("no run is left with these --seeds, --pairs and --methods")
    for name in {*options}.difference(*(config.options for config in others)):
        raise UsageError(mhkd.foreign_option(name, others[-1].method))
    if len({config.teacher for config in others if config.teacher_weights}) > 1:
        raise UsageError("--teacher-weights is for one teacher: narrow the plan to its pairs")
    if (path := fields.get("teacher_weights")) and not Path(path).is_file():
        raise UsageError(f"there is no checkpoint '{path}'")
    return teachers, [config for config in others if config not in teachers]


def key_of(recorded: Mapping[str, Any], data: str, teacher_sha256: str | None = None) -> str:
    """What makes a run another one, where it was recorded and where it is planned."""
    folder = os.path.abspath(data) if recorded["dataset"] == "folder" else None
    return json.dumps([{"processes": 1, **recorded}, folder, teacher_sha256], sort_keys=True)


def print_plan(tables: Sequence[str], arguments: Sequence[str]) -> None:
    """A line for each run; done is what the planned teacher itself has taught."""
    teachers, others = plan(tables, arguments)
    runs, _ = read_runs((teachers + others)[0].out)
    there = {run["key"]: run["student_sha256"] for run in runs if run["has_student"]}
    for phase, configs in (("teacher", teachers), ("student", others)):
        for config in configs:
            taught_by = None
            if config.teacher_weights:
                weights = Path(config.teacher_weights)
                taught_by = mhkd.sha256_of(weights) if weights.is_file() else "to be trained"
            elif config.teacher:
                teacher = config.of_teacher()
                taught_by = there.get(key_of(teacher.recorded(), teacher.data))
            state = "done" if key_of(config.recorded(), config.data, taught_by) in there else "todo"
            print(f"{state}\t{phase}\t{shlex.join(arguments_of(config))}")


def arguments_of(config: Config) -> list[str]:
    """The command line of a configuration: what is not left to the recipe."""
    given = {"method": config.method, **config.given, **config.given["options"]}
    del given["options"]
    arguments = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            arguments += [f"--{flag}", str(value)]
    return arguments


# --------------------------------------------------------------------------------------------------
# 3. Records, what can be compared, and statistics
# --------------------------------------------------------------------------------------------------

KEYS = """name config differs teacher_sha256 teacher_accuracy data_sha256 student_sha256 accuracy
    class_accuracy best_accuracy best_epoch epochs seconds environments""".split()


def read_runs(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records directly below a folder, and a sentence for each file that cannot be used.

    Each has its "key", its "curve", accuracies by epoch, and whether it still "has_student".
    """
    runs, unusable = [], []
    for path in sorted(Path(folder).glob("*/result.json")):
        student, log = path.with_name("student.pt"), path.with_name("log.jsonl")
        try:
            run = mhkd.read_json(path, *KEYS)
            if "options" not in run["config"]:
                raise UsageError(f"'{path}' is of another version")
            same = student.is_file() and mhkd.sha256_of(student) == run["student_sha256"]
        except (UsageError, OSError) as error:
            unusable.append(str(error))
            continue
        try:
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            curve = {entry["epoch"]: float(entry["test_accuracy"]) for entry in entries}
            if [*curve] != [*range(1, run["epochs"] + 1)]:
                raise ValueError(f"it does not have the {run['epochs']} epochs of the record")
        except (OSError, ValueError, KeyError, TypeError) as error:
            unusable.append(f"'{log}' is damaged ({error}): its curve is left out")
            curve = {run["epochs"]: run["accuracy"]}
        key = key_of(run["config"], run["environments"][-1]["data"], run["teacher_sha256"])
        runs.append({**run, "key": key, "curve": curve, "has_student": same})
    return runs, unusable


OF_TEACHER = {"teacher_weights", "teacher_seed", "teacher_init", "teacher_units", "student_units"}
ORDER = ("student alone", "kd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd", "mhkd", "crd+mhkd")


class Group:
    """Runs that can be compared: rows of accuracies by seed, and of curves. `twice` is in none."""

    def __init__(self, runs: Sequence[dict[str, Any]]):
        self.one = runs[-1]  # networks alone come first: where there is a teacher, it taught this
        config, data = self.one["config"], self.one["config"]["dataset"]
        self.teacher, self.student = config["teacher"], config["student"]
        if data == "folder":
            data += f" '{Path(self.one['environments'][-1]['data']).name}'"
        pair = f"{self.teacher} → {self.student}" if self.teacher else f"{self.student} alone"
        self.title = f"{data}: {pair}"
        self.apart: dict[str, Any] = {}  # what sets all runs apart from the recipe
        self.rows: dict[str, dict[int, float]] = {}
        self.curves: dict[str, list[dict[int, float]]] = {}
        self.twice: list[str] = []
        values: dict[str, set[str]] = {}
        for run in runs:
            for name, value in run["config"]["options"].items():
                values.setdefault(name, set()).add(str(value))
        different = {name for name, found in values.items() if len(found) > 1} | {"units"}
        for run in runs:
            own = {name: value for name, value in run["differs"].items() if name in different}
            self.apart |= {n: v for n, v in run["differs"].items() if n not in own}
            method, seed = run["config"]["method"], run["config"]["seed"]
            row = ", ".join(["student alone" if method == "ce" else method, *shown(own)])
            if seed in self.rows.setdefault(row, {}):
                self.twice.append(run["name"])
            else:
                self.rows[row][seed] = run["accuracy"]
                self.curves.setdefault(row, []).append(run["curve"])
        self.rows = dict(sorted(self.rows.items(), key=place_of))

    def differences(self, row: str, base: str) -> list[float]:
        """Those of the seeds that both rows have."""
        mine, theirs = self.rows[row], self.rows[base]
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def place_of(row: tuple[str, Any]) -> tuple[int, str]:
    method = row[0].split(",")[0]
    return (*ORDER, method).index(method), row[0]


def shown(settings: Mapping[str, Any]) -> list[str]:
    values = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}
    return [f"{name} {value}" for name, value in values.items()]


def group_runs(runs: Sequence[dict[str, Any]]) -> list[Group]:
    """What can be compared. Networks alone stand beside the pairs that they belong to."""
    # Older records do not tell the normalisation: it was the data set's, which others tell.
    usual, others = {}, {"teacher_weights", "teacher_init", "student_init"}
    for run in runs:
        if "normalisation" in run and others.isdisjoint(run["differs"]):
            usual[run["data_sha256"]] = run["normalisation"]
    alike: dict[str, dict[str | None, list]] = {}
    runs = [run for run in runs if run["config"]["method"] != "heads"]
    for run in runs:
        c, data = run["config"], run["data_sha256"]
        of_others = OF_TEACHER.union(c["options"])
        recipe = {n: v for n, v in run["differs"].items() if n not in of_others}
        used = run.get("normalisation", usual.get(data))
        network = json.dumps([c["dataset"], c["student"], recipe, data, used], sort_keys=True)
        teacher = json.dumps([run["teacher_sha256"], c["teacher_units"], c["student_units"]])
        by_teacher = alike.setdefault(network, {})
        by_teacher.setdefault(teacher if c["teacher"] else None, []).append(run)
    teachers, groups = {run["teacher_sha256"] for run in runs}, []
    for by_teacher in alike.values():
        alone = by_teacher.pop(None, [])
        groups += [Group(alone + taught) for taught in by_teacher.values()]
        if not by_teacher and not all(run["student_sha256"] in teachers for run in alone):
            groups.append(Group(alone))
    return groups


def mean_and_std(values: Collection[float]) -> str:
    std = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{std}"


T = (12.7062, 4.3027, 3.1825, 2.7765, 2.5706, 2.4470, 2.3647, 2.3061, 2.2622)  # for n = 2 to 10


def difference(values: Sequence[float]) -> tuple[float, float, str]:
    """The mean, half of its 95 % interval by Student's t, and both with the standard error."""
    n, mean = len(values), statistics.mean(values)
    if n == 1:
        return mean, math.nan, f"{mean:+.2f}, n=1"
    error = statistics.stdev(values) / math.sqrt(n)
    # Beyond n = 10 never below the true value, and at most 0.5 % above.
    half = error * (T[n - 2] if n <= 10 else 1.96 + 2.72 / (n - 1))
    return mean, half, f"{mean:+.2f} ± {error:.2f} [{mean - half:+.2f}, {mean + half:+.2f}], n={n}"


# --------------------------------------------------------------------------------------------------
# 4. The report and its pictures
# --------------------------------------------------------------------------------------------------

EXPLANATION = """\
Test accuracy after the last epoch, in percent: mean (standard deviation of the sample) of n runs.
Runs of one seed are pairs: differences are over the seeds that both rows have, mean ± standard
error with the 95 % interval by Student's t."""


def report(folder: str | Path) -> str:
    """The text of report.md, which is written there, with pictures, of the runs below a folder."""
    folder = Path(folder)
    runs, unusable = read_runs(folder)
    if not runs:
        raise UsageError("; ".join([f"there is no finished run below '{folder}'", *unusable]))
    groups = group_runs(runs)
    parts = ["# What has run", EXPLANATION]
    for group, name in zip(groups, draw(folder, groups)):
        parts += [group_table(group)] + [f"![accuracy]({name})"] * bool(name)
    papers = [text for table in TABLES.values() if (text := paper_table(table, runs))]
    parts += papers and ["# The paper's tables, for runs of its recipe in full", *papers]
    parts += ["# All runs", list_of_runs(runs)]
    if lost := [run["name"] for run in runs if not run["has_student"]]:
        parts.append(f"The student.pt of its record is not beside {', '.join(lost)}.")
    twice = sorted({name for group in groups for name in group.twice})
    unusable += [f"'{name}' is not compared: its seed is there twice" for name in twice]
    if unusable:
        parts += ["# Not used", "\n".join(f"- {sentence}" for sentence in unusable)]
    text = "\n\n".join(parts)
    mhkd.write_atomically(folder / "report.md", lambda file: file.write(f"{text}\n".encode()))
    return text


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def list_of_runs(runs: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        best = f"{run['best_accuracy']:.2f} ({run['best_epoch']})"
        minutes = f"{run['seconds'] / 60:.1f}"
        rows.append([run["name"], f"{run['accuracy']:.2f}", best, run["epochs"], minutes])
    header = ["run", "last epoch, %", "best epoch, % (which)", "epochs", "minutes"]
    return markdown(header, rows)


def group_table(group: Group) -> str:
    one, bases = group.one, [row for row in ("student alone", "kd") if row in group.rows]
    apart = ", ".join(shown(group.apart))
    facts = [f"Apart from the recipe: {apart or 'nothing'}"]
    facts += [f"data {one['data_sha256'][:8]}, {len(one['class_accuracy'])} classes"]
    if "normalisation" in one:
        facts += [f"normalised by {', '.join(shown(one['normalisation']))}"]
    rows = []
    if group.teacher:
        facts += [f"teacher {one['teacher_sha256'][:8]}"]
        accuracy = f"{one['teacher_accuracy']:.2f}"
        rows.append([f"teacher {group.teacher}", accuracy, "", *("" for _ in bases)])
    for row, accuracies in group.rows.items():
        rows.append([row, mean_and_std(accuracies.values()), len(accuracies)])
        for base in bases:
            values = group.differences(row, base) if row != base else []
            rows[-1].append(difference(values)[-1] if values else "")
    header = ["", "accuracy, %", "n", *(f"minus {base}" for base in bases)]
    return f"## {group.title}\n\n{'; '.join(facts)}.\n\n{markdown(header, rows)}"


def row_in_paper(run: Mapping[str, Any]) -> str | None:
    """The row of a run by the paper's recipe in full on the paper's data; None for others."""
    number, one = CLASSES.get(run["config"]["dataset"], (0, ""))
    if len(run["class_accuracy"]) != number or one not in run["class_accuracy"]:
        return None
    if {*run["differs"]} - {"units", "teacher_weights", "teacher_seed"}:  # which are no recipe
        return None
    return ":".join(map(str, [run["config"]["method"], *run["differs"].get("units", [])]))


def paper_table(table: Table, runs: Iterable[Mapping[str, Any]]) -> str:
    """The table as the paper lays it out, our figures beside its own; empty where we have none."""
    found: dict[tuple, dict[int, float]] = {}
    for run in runs:
        c, row = run["config"], row_in_paper(run)
        if row in table.rows and c["dataset"] == table.dataset:
            cell = found.setdefault((row, c["teacher"], c["student"]), {})
            cell.setdefault(c["seed"], run["accuracy"])
    lines = []
    for row, figures in table.paper.items():
        lines.append([row])
        for pair, figure in zip(table.pairs, figures):
            teacher, student = pair.split(":")
            alone = {"ce": student, "teacher": teacher}.get(row)
            ours = found.get(("ce", None, alone) if alone else (row, teacher, student), {}).values()
            text = f"{mean_and_std(ours)}, n={len(ours)}" if ours else "–"
            lines[-1].append(f"{text} / {figure}")
    header = ["ours / the paper's", *(pair.replace(":", " → ") for pair in table.pairs)]
    return f"## {table.title}\n\n{markdown(header, lines)}" if found else ""


COLORS = {"student alone": "C7", "kd": "C0", "mhkd": "C1"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "savefig.dpi": 200}
STYLE |= {"axes.titlesize": 8, "lines.linewidth": 1.2, "legend.frameon": False}


def draw(folder: Path, groups: Sequence[Group]) -> Iterator[str]:
    """A picture of each group, curves and how the rows compare; its name, or ""."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        mhkd.say("note: no pictures without matplotlib: pip install matplotlib")
        yield from [""] * len(groups)
        return
    stems: list[str] = []
    for group in groups:
        parts = (group.one["config"]["dataset"], group.teacher, group.student)
        stem = "-".join(mhkd.in_file_name(part) for part in parts if part)
        stems.append(stem)
        name = f"{stem}-{stems.count(stem)}.png"
        with matplotlib.rc_context(STYLE):
            size = (7, max(2.8, 1 + 0.2 * len(group.rows)))
            figure = Figure(figsize=size, layout="constrained")
            curves, dots = figure.subplots(1, 2)
            draw_curves(curves, group)
            draw_differences(dots, group)
            figure.legend(loc="outside lower center", ncols=4)
            mhkd.write_atomically(folder / name, lambda f, fig=figure: fig.savefig(f, format="png"))
        yield name


def draw_curves(axis: Any, group: Group) -> None:
    """Accuracy over epochs, mean and range over seeds, of three rows."""
    chosen = sorted(group.rows, key=lambda row: row not in COLORS)[: len(COLORS)]
    for place, row in enumerate(chosen):
        curves = group.curves[row]
        epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        means, low, high = ([f(v) for v in values] for f in (statistics.mean, min, max))
        color = COLORS.get(row, f"C{place + 2}")
        marker = "o" if len(epochs) < 12 else None
        label = f"{row}, n={len(curves)}"
        axis.plot(epochs, means, color=color, marker=marker, markersize=3, label=label)
        axis.fill_between(epochs, low, high, color=color, alpha=0.2)
        axis.vlines(epochs[-1], low[-1], high[-1], color=color)  # of one epoch there is no area
    if group.teacher:
        accuracy = group.one["teacher_accuracy"]
        axis.axhline(accuracy, color="black", linestyle="--", label=f"teacher, {accuracy:.2f} %")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set(xlabel="epoch", ylabel="test accuracy, %", title=group.title)


def draw_differences(axis: Any, group: Group) -> None:
    """All rows against KD, where it is missing the student alone, with their 95 % intervals."""
    rows = [*group.rows]
    base = next((row for row in ("kd", "student alone") if row in rows), rows[0])
    for place, row in enumerate(rows):
        if values := group.differences(row, base):
            mean, half, _ = difference(values)
            color = COLORS.get(row, "black")
            axis.errorbar(mean, place, xerr=half, fmt="o", markersize=4, capsize=2, color=color)
            if row in ("kd", "student alone"):
                axis.axvline(mean, color=color, linewidth=0.8, zorder=0)
    if group.teacher:
        zero = statistics.mean(group.rows[base].values())
        axis.axvline(group.one["teacher_accuracy"] - zero, color="black", linestyle="--")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set(xlabel=f"difference to {base}, points (95 % intervals)")


# --------------------------------------------------------------------------------------------------
# 5. Command line
# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> None:
        if not arguments or {"-h", "--help"} & {*arguments}:
            print(__doc__)
        elif arguments[0] == "report" and len(arguments) == 2:
            print(report(arguments[1]))
        elif arguments[0] == "plan" and len(arguments) > 1 and not arguments[1].startswith("-"):
            print_plan(mhkd.words(arguments[1]), arguments[2:])
        else:
            raise UsageError("it is: report DIR, or: plan table1,table2,... [options], see --help")

    return mhkd.command_line("mhkd_tables.py", run)


if __name__ == "__main__":
    sys.exit(main())
