"""The report of finished runs: what they show, as Markdown tables and pictures.

    python mhkd_tables.py report runs

writes report.md to the folder of the runs and, if matplotlib is installed, a picture of each group
of runs that can be compared: those of the same data set, teacher, student and recipe. The paper's
tables contain runs of its full recipe only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import shlex
import statistics
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import mhkd
import mhkd_data
import mhkd_runs
import mhkd_tables as tables
from mhkd import UsageError
from mhkd_config import Config
from mhkd_tables import BEST, PAIR_A, PAIR_B, PRIMARY, PRIMARY_SEEDS

# --------------------------------------------------------------------------------------------------
# 1. Records, and which of them can be compared
# --------------------------------------------------------------------------------------------------

KEYS = """name config differs teacher_sha256 teacher_accuracy data_sha256 student_sha256 accuracy
    class_accuracy epochs seconds environments""".split()
SPEED_KEYS = ("student_sha256", "milliseconds", "environment")


def read_runs(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records directly below a folder, and a sentence for each file that cannot be used.

    Each also gets its "folder", its "key", its "curve" (test accuracies by epoch), the
    "train_accuracy" of the kept epoch (None without a log), its "speed" (see bench.py networks; {}
    if it was not measured), whether it still "has_student", and the normalisation "used".
    """
    runs, unusable = [], []
    for path in sorted(Path(folder).glob("*/result.json")):
        student, log = path.with_name("student.pt"), path.with_name("log.jsonl")
        try:
            run = mhkd_runs.read_json(path, *KEYS)
            if isinstance(run["config"], dict) and "options" not in run["config"]:
                raise UsageError(f"'{path}' is of another version")
            check_types(run)
            data = run["environments"][-1]["data"]
            key = tables.key_of(run["config"], data, run["teacher_sha256"])
            same = student.is_file() and mhkd_runs.sha256_of(student) == run["student_sha256"]
            speed = mhkd_runs.read_json(path.with_name("speed.json"), *SPEED_KEYS) or {}
        except (UsageError, mhkd_runs.RunError, OSError) as error:
            unusable.append(str(error))
            continue
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            unusable.append(f"'{path}' is damaged ({error}): move its folder away")
            continue
        curve, train = {run["epochs"]: run["accuracy"]}, None
        try:
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            found = {entry["epoch"]: float(entry["test_accuracy"]) for entry in entries}
            if [*found] != [*range(1, run["epochs"] + 1)]:
                raise ValueError(f"it does not have the {run['epochs']} epochs of the record")
            kept = entries[run.get("kept_epoch", 0) - 1]
            curve, train = found, float(kept["train_accuracy"])
        except FileNotFoundError:
            unusable.append(f"there is no '{log}': the run counts, its curve is left out")
        except (OSError, ValueError, LookupError, TypeError) as error:
            unusable.append(f"'{log}' is damaged ({error}): the run counts, its curve is left out")
        run |= {"key": key, "curve": curve, "train_accuracy": train, "has_student": same}
        of_other = speed.get("student_sha256") != run["student_sha256"]
        run |= {"folder": path.parent, "speed": {} if of_other else speed}
        runs.append(run)
    # Older records lack the normalisation: it was the data set's, which newer ones may contain.
    usual, others = {}, {"teacher_weights", "teacher_init", "student_init", "mean", "std"}
    for run in runs:
        if "normalisation" in run and others.isdisjoint(run["differs"]):
            usual[run["data_sha256"]] = run["normalisation"]
    for run in runs:
        run["used"] = run.get("normalisation", usual.get(run["data_sha256"]))
    return runs, unusable


NUMBER = (int, float)
TYPES = {"name": str, "config": dict, "differs": dict, "data_sha256": str, "student_sha256": str}
TYPES |= {"accuracy": NUMBER, "epochs": int, "seconds": NUMBER, "class_accuracy": dict}
IN_CONFIG = {"seed": int, "dataset": str, "student": str, "method": str, "options": dict}
IN_CONFIG |= {"image_size": int, "teacher": (str, type(None))}
IF_THERE = {"normalisation": dict, "init_sha256": str, "initial_weights": str}
IF_THERE |= {"teacher_heads_sha256": (str, type(None))}


def check_types(run: Mapping[str, Any]) -> None:
    """Raise ValueError unless a record has the values that the report uses."""
    config, places = run["config"], run["environments"]
    wanted = [(n, run[n], kind) for n, kind in TYPES.items()]
    wanted += [(n, run[n], kind) for n, kind in IF_THERE.items() if n in run]
    config = config if isinstance(config, dict) else {}
    wanted += [(n, config.get(n), kind) for n, kind in IN_CONFIG.items()]
    if config.get("teacher"):
        wanted += [("teacher_accuracy", run["teacher_accuracy"], NUMBER)]
        wanted += [("teacher_sha256", run["teacher_sha256"], str)]
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}")
    if not (isinstance(places, list) and places and all(isinstance(p, dict) for p in places)):
        raise ValueError(f"environments is {places!r}")


def final_weights(run: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """tau and the weights of cross-entropy and KL on the final outputs; None for other terms.

    kd and mhkd have an alpha, from which a weight follows that is None (or missing in old records).
    """
    options = run["config"]["options"]
    if "final_options" in run:  # not in old records
        options = {name: options[name] for name in run["final_options"]}
    alpha, gamma, kl = (options.get(name) for name in ("alpha", "gamma", "kd_weight"))
    if alpha is not None:
        gamma, kl = 1 - alpha if gamma is None else gamma, alpha if kl is None else kl
    if None in (options.get("tau"), gamma, kl):
        return None
    return options["tau"], round(gamma, 9), round(kl, 9)


@dataclasses.dataclass(eq=False)
class Row:
    """Runs that differ only in their seed."""

    name: str
    method: str
    options: dict[str, Any]  # those that differ from the recipe
    weights: Any  # see final_weights(), and the unlabelled images
    views: dict[str, Any]  # view seed and number of views, if they differ from the recipe
    store: str | None  # of the teacher's outputs
    runs: dict[int, dict[str, Any]]  # by seed

    def values(self, name: str = "accuracy") -> list[float]:
        return [run[name] for run in self.runs.values() if run[name] is not None]

    def mean(self) -> float:
        return statistics.mean(self.values())

    def minus(self, base: Row | None) -> list[float]:
        """Differences of the test accuracy over the seeds that both rows have."""
        seeds = sorted(self.runs.keys() & base.runs.keys()) if base and base is not self else []
        return [self.runs[seed]["accuracy"] - base.runs[seed]["accuracy"] for seed in seeds]


EXPLORATORY = "fitnet+mhkd"  # the addition to the protocol: no verdict
VIEWS = {"view_seed", "teacher_store", "teacher_views"}
OF_TEACHER = {name for name in Config.__dataclass_fields__ if name.startswith("teacher_")} - VIEWS
ORDER = ("ce", "kd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd", "mhkd", "crd+mhkd")
OTHERWISE = {"teacher_weights", "mean", "std"}  # shown as hash and normalisation
IN_NAME = {"units", "gamma", "kd_weight", "unlabelled"}  # always part of a row's name
IN_NAME |= {"teacher_units", "student_units"}  # of the heads; kd has none


class Group:
    """Runs that can be compared, as rows. twice: sentences on runs whose seed its row has."""

    def __init__(self, runs: Sequence[dict[str, Any]]):
        self.one = runs[-1]  # runs without a teacher come first
        config, data = self.one["config"], self.one["config"]["dataset"]
        self.teacher, self.student = config["teacher"], config["student"]
        if data == "folder":
            data += f" '{Path(self.one['environments'][-1]['data']).name}'"
        pair = f"{self.teacher} → {self.student}" if self.teacher else f"{self.student} alone"
        self.title = f"{data}: {pair}"
        self.common: dict[str, Any] = {}  # what differs from the recipe and is in no row's name
        self.runs, self.twice = runs, []
        values: dict[str, set[str]] = {}
        unlabelled: dict[Any, set[str]] = {}  # the sets of as many images
        for run in runs:
            for name, value in {**defaults_of(run), **run["config"]["options"]}.items():
                values.setdefault(name, set()).add(str(value))
            if sha256 := run.get("unlabelled_sha256"):
                unlabelled.setdefault(run["differs"].get("unlabelled"), set()).add(sha256)
        in_name = {name for name, found in values.items() if len(found) > 1} | IN_NAME | VIEWS
        rows: dict[tuple, Row] = {}  # by name and by what its runs must share
        for run in runs:
            c, differs = run["config"], run["differs"]
            self.common |= {n: v for n, v in differs.items() if n not in in_name | OTHERWISE}
            own = {n: v for n, v in differs.items() if n in in_name}
            images = run.get("unlabelled_sha256")
            if len(unlabelled.get(own.get("unlabelled"), ())) > 1:
                own["unlabelled"] = f"{own['unlabelled']} ({images[:8]})"
            name = ", ".join(["student alone" if c["method"] == "ce" else c["method"], *shown(own)])
            options = {n: v for n, v in differs.items() if n in c["options"] or "_units" in n}
            weights = final_weights(run), images
            views = {n: v for n, v in differs.items() if n in VIEWS - {"teacher_store"}}
            new = Row(name, c["method"], options, weights, views, c.get("teacher_store"), {})
            of_user = None if is_built_in(c["method"]) else run.get("method_code_sha256")
            hashes = [part[:8] for part in (run.get("teacher_heads_sha256"), of_user) if part]
            row = rows.setdefault((name, *hashes), new)
            if (first := row.runs.setdefault(c["seed"], run)) is not run:
                self.twice.append(repeated(run, first))
        names = collections.Counter(row.name for row in rows.values())
        for (name, *hashes), row in rows.items():  # other heads of the teacher, or a method's code
            row.name += f" ({', '.join(hashes)})" * (names[name] > 1 and bool(hashes))
        methods = [*ORDER, *sorted({row.method for row in rows.values()} - {*ORDER})]
        self.rows = sorted(rows.values(), key=lambda row: (methods.index(row.method), row.name))

    def alone(self, row: Row | None = None) -> Row | None:
        """The row of the student alone, with the same view seed if there is one."""
        seed = row and row.views.get("view_seed")
        found = [r for r in self.rows if r.method == "ce"]
        return min(found, key=lambda r: r.views.get("view_seed") != seed, default=None)

    def kd_of(self, row: Row) -> Row | None:
        """The row of kd with the same temperature, final weights, unlabelled images and views."""
        found = [r for r in self.rows if r.method == "kd" and r.weights == row.weights]
        found = [r for r in found if r.views == row.views and row.method != "kd"]
        return min(found, key=lambda r: (r.store != row.store, -len(r.runs)), default=None)

    def with_more_views(self, row: Row) -> Row | None:
        """The same with all views instead of fewer, or with those of the run's own seed."""
        views = {n: v for n, v in row.views.items() if "teacher_views" in row.views}
        views.pop("teacher_views", None)
        same = row.method, row.options, row.weights, views
        rows = ((r, (r.method, r.options, r.weights, r.views)) for r in self.rows)
        found = [r for r, its in rows if its == same and r.views != row.views]
        return min(found, key=lambda r: (r.store != row.store, -len(r.runs)), default=None)

    def differences(self, base_of: Any) -> dict[str, list[float]]:
        """Each row minus its base, base_of(row), for the rows that have one."""
        found = {row.name: row.minus(base_of(row)) for row in self.rows}
        return {name: values for name, values in found.items() if values}


def repeated(run: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    which = f"its settings and seed are those of '{first['folder'].name}'"
    return f"'{run['folder'].name}' is not compared: {which}"


def best_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """For each method the row of the highest mean, among those with the most seeds."""
    found: dict[str, Row] = {}
    for row in rows:
        both = row, found.get(row.method, row)
        found[row.method] = max(both, key=lambda r: (len(r.runs), r.mean()))
    return found


def is_built_in(method: str) -> bool:
    """Whether it is no method of a user's program."""
    with contextlib.suppress(UsageError):
        return bool(mhkd.find_methods(method))
    return False


def defaults_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with their defaults: older records lack newer ones."""
    method = run["config"]["method"]
    declared = tables.options_of(method) if is_built_in(method) else {}
    return {name: option.default for name, option in declared.items()}


def shown(settings: Mapping[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return ",".join(map(text, value))
        return f"{value:.15g}" if isinstance(value, float) else str(value)

    return [f"{name} {text(value)}" for name, value in settings.items()]


def recipe_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the recipe, without method, teacher and normalisation."""
    others = OF_TEACHER.union(run["config"]["options"], OTHERWISE, VIEWS, IN_NAME)
    return {name: value for name, value in run["differs"].items() if name not in others}


def group_runs(runs: Sequence[dict[str, Any]]) -> list[Group]:
    """What can be compared. Runs without a teacher belong to the groups of all teachers."""
    runs = [run for run in runs if run["config"]["method"] != "heads"]
    alike: dict[str, dict[str | None, list]] = {}
    for run in runs:
        c = run["config"]
        network = [c["dataset"], c["student"], recipe_of(run), run["data_sha256"], run["used"]]
        # Not of built-in networks: older records have no hash of their code.
        code = run.get("student_code_sha256") if ".py:" in c["student"] else None
        network += [run.get("student_init_sha256"), code]
        by_teacher = alike.setdefault(json.dumps(network, sort_keys=True), {})
        by_teacher.setdefault(run["teacher_sha256"] if c["teacher"] else None, []).append(run)
    teachers, groups = {run["teacher_sha256"] for run in runs}, []
    for by_teacher in alike.values():
        alone = by_teacher.pop(None, [])
        groups += [Group(alone + taught) for taught in by_teacher.values()]
        if not by_teacher and not all(run["student_sha256"] in teachers for run in alone):
            groups.append(Group(alone))
    return groups


# --------------------------------------------------------------------------------------------------
# 2. Statistics, and the claims of the second protocol
# --------------------------------------------------------------------------------------------------


def mean_and_std(values: Sequence[float]) -> str:
    std = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{std}" if values else ""


@functools.cache
def students_t(p: float, freedom: int) -> float:
    """The quantile of Student's t distribution at p, which is above 0.5.

    For t = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1).
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def integral(a: float, steps: int = 400) -> float:  # from 0, by Simpson's rule
        y = [math.cos(a * i / steps) ** (freedom - 1) for i in range(steps + 1)]
        return scale * a / steps / 3 * (y[0] + 4 * sum(y[1::2]) + 2 * sum(y[2:-1:2]) + y[-1])

    low, high = 0.0, min(math.pi / 2, 30 / math.sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < p - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The mean, its standard error, and half of its interval by Student's t; NaN for one value."""
    n, mean = len(values), statistics.mean(values)
    if n == 1:
        return mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(n)
    return mean, error, error * students_t((1 + level) / 2, n - 1)


def estimate(values: Sequence[float], level: float = 0.95) -> str:
    mean, error, half = interval(values, level)
    if len(values) == 1:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ± {error:.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def claims(runs: Sequence[dict[str, Any]]) -> str:
    """The claims of the second protocol as a table; "" if no run with a teacher belongs to it."""
    lines: list[list[str]] = []

    def add(claim: str, row: Row | None, base: Row | None, level: float, seeds: int = 1) -> None:
        claim += of_teacher
        text, verdict, values = "–", "undecided", row.minus(base) if row else []
        if values:
            text, (mean, _, half) = estimate(values, level), interval(values, level)
            if abs(mean) > half:
                verdict = "supported" if mean > 0 else "contradicted"
        verdict = verdict if len(values) >= seeds else "incomplete"
        if row and row.method == EXPLORATORY:
            verdict = "exploratory"
        lines.append([claim, str(len(values)), text, verdict])

    teacher = Config(**tables.STUDY_TEACHER)
    key = tables.key_of(teacher.recorded(), teacher.data)
    of_protocol = {run["student_sha256"]: run["key"] == key for run in runs}
    sentences = {
        None: "run is not here, so that its settings cannot be checked.",
        False: "settings are not those of the protocol, its students do not count.",
    }
    notes, groups = {}, {}
    for group in group_runs([run for run in runs if is_of_study(run)]):
        if (pair := f"{group.teacher}:{group.student}") in (PAIR_A, PAIR_B):
            found = of_protocol.get(sha256 := group.one["teacher_sha256"])
            if not found:
                accuracy = f"{group.one['teacher_accuracy']:.2f} %"
                notes[f"Teacher {sha256[:8]} ({accuracy}): its {sentences[found]}"] = None
            if found is not False:
                groups[group] = pair
    for group, pair in groups.items():
        several = [*groups.values()].count(pair) > 1
        hashes = {n: group.one[f"{n}_sha256"][:8] for n in ("teacher", "data")}
        of_teacher = f" ({', '.join(shown(hashes))})" if several else ""
        find = functools.partial(find_row, group, pair)
        primary = [(t, find(row), find(base)) for t, row, base in PRIMARY if pair == PAIR_A]
        for claim, row, base in primary:
            add(f"primary: {claim}", row, base, 1 - 0.05 / len(PRIMARY), PRIMARY_SEEDS)
        bases = group.kd_of, group.alone
        pairs = [(row, base_of(row)) for row in group.rows for base_of in bases]
        pairs += [(row, group.with_more_views(row)) for row in group.rows]
        pairs += [(find("mhkd" + BEST), find(f"mhkd:units={unit}" + BEST)) for unit in (1, 2, 3)]
        for row, base in dict.fromkeys(pairs):
            if row and row.minus(base) and (row, base) not in [claim[1:] for claim in primary]:
                add(f"{group.student}: {row.name} above {base.name}", row, base, 0.95)
        best = best_rows(row for row in group.rows if not row.views)
        if best.keys() >= {"kd", "mhkd"}:
            row, base = best["mhkd"], best["kd"]
            claim = f"{group.student}: best mhkd ({row.name}) above best kd ({base.name})"
            add(claim, row, base, 0.95)
    text = markdown(["claim", "n", "difference", "verdict"], lines) if lines else ""
    return "\n\n".join(filter(None, [*notes, text]))


@functools.cache
def rows_of_protocol() -> frozenset[str]:
    """Students, methods and differing settings of the rows of both studies."""
    rows = [(pair, name) for pair, names, _ in sum(tables.STUDIES.values(), []) for name in names]
    configs = [tables.config_of(pair, name, 0, tables.STUDY_STUDENT) for pair, name in rows]
    configs += [config.replace(view_seed=0) for config in configs]
    return frozenset(row_of_protocol(c.student, c.method, c.differs) for c in configs)


def row_of_protocol(student: str, method: str, differs: Mapping[str, Any]) -> str:
    left = json.dumps({n: v for n, v in differs.items() if n not in OTHERWISE})
    left = json.loads(left, parse_int=float)  # 1 and 1.0 are the same
    return json.dumps([student, method, left], sort_keys=True)


def is_of_study(run: Mapping[str, Any]) -> bool:
    """Whether a run is of the second protocol: row, recipe, seed, device and loss."""
    c, places = run["config"], run["environments"]
    where = {(place.get("device", "cpu"), place.get("loss", "reference")) for place in places}
    of_protocol = c["dataset"] == "cifar100" and recipe_of(run) == tables.STUDY_RECIPE
    of_protocol &= row_of_protocol(c["student"], c["method"], run["differs"]) in rows_of_protocol()
    return of_protocol and c["seed"] < PRIMARY_SEEDS and where == {("cpu", "reference")}


def find_row(group: Group, pair: str, name: str) -> Row | None:
    """The row of a group that a name in SMALL_ROWS describes."""
    config = tables.config_of(pair, name, 0, tables.STUDY_STUDENT)
    options = {n: v for n, v in config.differs.items() if n in config.options}
    same = (config.method, json.loads(json.dumps(options)), {})
    return next((r for r in group.rows if (r.method, r.options, r.views) == same), None)


# --------------------------------------------------------------------------------------------------
# 3. The report and its pictures
# --------------------------------------------------------------------------------------------------

EXPLANATION = """\
Accuracies are those of student.pt (of the last epoch unless keep is "best"), in percent: mean
(standard deviation) of n seeds.
Differences of test accuracy are paired by seed: mean ± standard error [95 % interval by Student's
t]. KD of the same weights has the row's weights of cross-entropy and KL on the final outputs.
Options that a row does not name have their defaults. In records of version 0.2.0 the train accuracy
is the mean over the batches, later over the images."""
CLAIMS = """\
Primary claims have intervals at level 98.75 % (0.05 / 4), the others at 95 %. A claim is supported
or contradicted if its interval excludes 0. n is the number of seeds so far. Primary claims are
decided with ten seeds, as the protocol says. Runs of other seeds than 0 to 9, of rows that are not
in the protocol, on other devices than the CPU or with another loss than plain PyTorch do not count.
The best rows are chosen by the same test images, among the rows of their method with the most
seeds."""


def report(folder: str | Path) -> str:
    """The text of report.md, which is written, with pictures, to the folder of the runs."""
    folder = Path(folder)
    runs, unusable = read_runs(folder)
    if not runs:
        raise UsageError("; ".join([f"there is no finished run below '{folder}'", *unusable]))
    groups = group_runs(runs)
    parts = ["# What has run", EXPLANATION]
    for group, picture in zip(groups, draw(folder, groups)):
        parts += [group_table(group), picture, completion(group, folder)]
    parts += ["# Networks", network_table(groups, runs)] if groups else []
    if text := claims(runs):
        parts += ["# Claims of the second study", CLAIMS, text]
    twice: list[str] = []
    papers = [paper_table(table, runs, twice) for table in tables.TABLES.values()]
    papers = [text for text in papers if text]
    parts += papers and ["# The paper's tables, for runs of its recipe in full", *papers]
    header = ["run", "test accuracy, %", "epochs", "minutes"]
    rows = [
        [run["name"], accuracy_of(run), run["epochs"], f"{run['seconds'] / 60:.1f}"] for run in runs
    ]
    parts += ["# All runs", markdown(header, rows)]
    if lost := [run["name"] for run in runs if not run["has_student"]]:
        names = ", ".join(lost[:3] + ["…"] * (len(lost) > 3))
        parts.append(f"{len(lost)} of these runs are without the student.pt of the record: {names}")
    unusable += sorted({*twice, *(text for group in groups for text in group.twice)})
    if unusable:
        parts += ["# Not used", "\n".join(f"- {sentence}" for sentence in unusable)]
    text = "\n\n".join(filter(None, parts))
    path = folder / "report.md"
    mhkd_runs.write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    return text


def accuracy_of(run: Mapping[str, Any]) -> str:
    of_teacher = " (the teacher's)" if run["config"]["method"] == "heads" else ""
    return f"{run['accuracy']:.2f}{of_teacher}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def classes_of(run: Mapping[str, Any]) -> int:
    """The number of classes; in records of older versions, of those that have test images."""
    return run.get("classes") or len(run["class_accuracy"])


def group_table(group: Group) -> str:
    one, rows = group.one, group.rows
    facts = [f"Different from the recipe: {', '.join(shown(group.common)) or 'nothing'}"]
    facts += [f"data {one['data_sha256'][:8]}, {classes_of(one)} classes"]
    if "normalisation" in one:
        facts += [f"normalised by {', '.join(shown(one['normalisation']))}"]
    columns = {"": [row.name for row in rows]}
    columns["test accuracy, %"] = [mean_and_std(row.values()) for row in rows]
    columns["train accuracy, %"] = [mean_and_std(row.values("train_accuracy")) for row in rows]
    columns["n"] = [str(len(row.runs)) for row in rows]
    bases = {"minus student alone": group.alone, "minus kd of the same weights": group.kd_of}
    for title, base_of in bases.items():
        found, texts = group.differences(base_of), {}
        for row in rows:
            base, values = base_of(row), found.get(row.name)
            if values:
                views = [(r.views.get("view_seed"), base.store and r.store) for r in (row, base)]
                other = f" (minus {base.name})" * (views[0] != views[1])
                texts[row.name] = f"{estimate(values)}, n={len(values)}{other}"
        columns[title] = [texts.get(row.name, "") for row in rows]
    columns = {title: column for title, column in columns.items() if any(column)}
    lines = [*zip(*columns.values())]
    if group.teacher:
        facts += [f"teacher {one['teacher_sha256'][:8]}"]
        accuracy = f"{one['teacher_accuracy']:.2f}"
        lines.insert(0, (f"teacher {group.teacher}", accuracy, *[""] * (len(columns) - 2)))
    text = f"## {group.title}\n\n{'; '.join(facts)}.\n\n{markdown([*columns], lines)}"
    return "\n\n".join([text, *what_varies(group)])


PLACE = ("device", "hardware", "instructions", "threads", "torch", "torchvision", "timm", "loss")
PLACE += ("compile", "mhkd", "commit")
CHANGES = " with changes"  # of a commit; see mhkd_record.commit_of()


def what_varies(group: Group) -> list[str]:
    """Sentences on differences between the runs of a group that its rows do not show."""
    values: dict[str, set[str]] = {}
    initial: dict[int, set[str]] = {}
    for run in group.runs:
        found = [(n, p.get(n)) for p in run["environments"] for n in PLACE]
        found += [(f"code of {run['config']['method']}", run.get("method_code_sha256"))]
        found += [("code of the student", run.get("student_code_sha256"))]
        if group.teacher and run["config"]["teacher"]:
            found += [("accuracy of the teacher", f"{run['teacher_accuracy']:.2f} %")]
        for name, value in found:
            if value not in (None, ""):
                text = str(value).removesuffix(CHANGES)
                text = text[:8] if name == "commit" or name.startswith("code of") else text
                values.setdefault(name, set()).add(text + CHANGES * str(value).endswith(CHANGES))
        if sha256 := run.get("initial_weights") or run.get("init_sha256"):
            initial.setdefault(run["config"]["seed"], set()).add(sha256)
    varying = [f"{name} ({', '.join(sorted(v))})" for name, v in values.items() if len(v) > 1]
    for row in group.rows:  # settings that follow from others, in another way in another version
        configs = [{**run["config"], **run["config"]["options"]} for run in row.runs.values()]
        for name in sorted({*configs[0]}.intersection(*configs) - {"options", "seed"}):
            if len(found := {*sum((shown({name: c[name]}) for c in configs), [])}) > 1:
                varying.append(f"in {row.name} {' or '.join(sorted(found))}")
    texts = [f"Not the same in all runs: {'; '.join(varying)}."] if varying else []
    if all(name.endswith(CHANGES) for name in values.get("commit", [""])):
        texts.append("The code has changes that were not committed: they may differ between runs.")
    if seeds := [str(seed) for seed, found in sorted(initial.items()) if len(found) > 1]:
        texts.append(f"Not paired: with seed {', '.join(seeds)} the initial weights differ.")
    return texts


def completion(group: Group, folder: Path) -> str:
    """The commands of the student alone and of KD, if nothing of a group can be compared."""
    if not group.teacher or group.differences(group.alone) or group.differences(group.kd_of):
        return ""
    commands, last = [], group.rows[-1]
    same = last.weights, last.views
    alike = [
        row for row in group.rows
        if row.method == "ce" or last.weights[0] is None or (row.weights, row.views) == same
    ]  # fmt: skip
    there = {(row.method, seed) for row in alike for seed in row.runs}
    for seed, run in last.runs.items():
        here, c = run["environments"][-1], {**run["config"], "out": str(folder)}
        c |= {n: here.get(n) for n in ("data", "teacher_weights", "unlabelled")}
        c = {n: tuple(v) if isinstance(v, list) else v for n, v in c.items()}
        c = {n: v for n, v in c.items() if n in Config.__dataclass_fields__}
        own = {n: v for n, v in c["options"].items() if n in tables.options_of("kd")}
        without = {"teacher_units": None, "student_units": None}
        changes = {"ce": {"options": {}, "unlabelled": None, **without}}
        changes["kd"] = {"options": own, **without}
        used = {n: tuple(v) for n, v in run.get("normalisation", {}).items()}
        for method, given in changes.items():
            if (method, seed) not in there:
                # A method or a data set of a user's program; a file that is missing.
                with contextlib.suppress(UsageError, mhkd_runs.RunError):
                    config = Config(**c | given | {"method": method})
                    same = None, (*used.values(),)  # None: measured on the images
                    if method == "ce" and mhkd_data.normalisation(config) not in same:
                        config = config.replace(**used)  # the teacher's
                    command = tables.command_of(config)
                    if (processes := run["config"].get("processes", 1)) > 1:
                        launcher = f"torchrun --nproc_per_node {processes}"
                        command = command.replace("python", launcher, 1)
                    commands.append(f"    {command}")
    return "\n".join(["These commands complete the comparison:\n", *commands]) if commands else ""


def network_table(groups: Sequence[Group], runs: Sequence[Mapping[str, Any]]) -> str:
    """Size, cost and accuracy of teachers and students, without empty columns."""
    by_weights = {run["student_sha256"]: run for run in runs}
    titles = ["", "parameters", "multiply-adds", "MB", "ms (batch 1)", "ms (batch 64)"]
    lines: dict[Any, list[str]] = {}  # two groups may have the same teacher or student
    which: dict[Any, str] = {}  # what distinguishes lines of the same name
    measured, folders = set(), []

    def add(key: Any, name: str, run: Any, file: Path | None, accuracy: str, of: Any) -> None:
        role = "teacher" if name.endswith(", teacher") else "student"
        hashes = {"data": of["data_sha256"][:8], "teacher": (of["teacher_sha256"] or "none")[:8]}
        which[key] = ", ".join(shown({**(recipe_of(of) if role == "student" else {}), **hashes}))
        network, size = of["config"][role], None
        with contextlib.suppress(UsageError, OSError):  # the file is missing or has changed since
            if mhkd.sibling("mhkd_custom").has_code(network, of.get(f"{role}_code_sha256")):
                size = size_of(network, classes_of(of), of["config"]["image_size"])
        parameters, multiply_adds = (f"{n / 1e6:.3g} M" for n in size) if size else ("", "")
        megabytes = f"{file.stat().st_size / 1e6:.3g}" if file and file.is_file() else ""
        speed = run["speed"] if run else {}
        times = [f"{speed['milliseconds'][n]:.3g}" if speed else "" for n in ("1", "64")]
        lines[key] = [name, parameters, multiply_adds, megabytes, *times, accuracy]
        if speed:
            here = speed["environment"]
            keys = ("hardware", "device", "threads", "torch")
            measured.add(", ".join(f"{key} {here.get(key)}" for key in keys))
        elif run and run["has_student"]:
            folders.append(str(run["folder"]))

    for group in groups:
        one = group.one
        if group.teacher:
            run, given = by_weights.get(one["teacher_sha256"]), one["environments"][-1]
            path = run["folder"] / "student.pt" if run else given.get("teacher_weights")
            accuracy = f"{one['teacher_accuracy']:.2f}"
            file = Path(path) if path else None
            key = one["teacher_sha256"], accuracy
            add(key, f"{group.teacher}, teacher", run, file, accuracy, one)
        for row in group.rows:
            run = next(iter(row.runs.values()))
            file, accuracy = run["folder"] / "student.pt", mean_and_std(row.values())
            key = frozenset(run["folder"] for run in row.runs.values())
            add(key, f"{group.student}, {row.name}", run, file, accuracy, run)
    names = collections.Counter(cells[0] for cells in lines.values())
    for key, cells in lines.items():
        cells[0] += f" ({which[key]})" * (names[cells[0]] > 1)
    columns = zip([*titles, "test accuracy, %"], *lines.values())
    table = [*zip(*(column for column in columns if any(column[1:])))]
    text = [markdown(table[0], table[1:]), "Multiply-adds and ms (milliseconds) are for one image."]
    if measured:
        text[-1] += f" Times: {'; '.join(sorted(measured))}."
    else:
        command = shlex.join(["python", "bench.py", "networks", *dict.fromkeys(folders)])
        text.append(f"This command adds the milliseconds:\n\n    {command}" if folders else "")
    return "\n\n".join(filter(None, text))


@functools.cache
def size_of(network: str, classes: int, side: int) -> tuple[int, int] | None:
    """Parameters, and multiply-adds for one image; None if the network cannot be built."""
    for device in ("meta", "cpu"):  # without memory and computation, if that works
        quiet = warnings.catch_warnings()
        with contextlib.suppress(Exception), quiet, torch.device(device), torch.no_grad():
            warnings.simplefilter("ignore")  # weights that it loads are not copied to "meta"
            model = mhkd.build_model(network, classes, "random", side).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, side, side))
            number = sum(p.numel() for p in model.parameters())
            return number, counter.get_total_flops() // 2
    return None


def row_in_paper(run: Mapping[str, Any]) -> str | None:
    """The row of a run by the paper's recipe in full on the paper's data; None for others."""
    number, one = tables.CLASSES.get(run["config"]["dataset"], (0, ""))
    if len(run["class_accuracy"]) != number or one not in run["class_accuracy"]:
        return None
    no_recipe = {"units", "teacher_weights", "teacher_seed", "view_seed", "teacher_store"}
    if {*run["differs"]} - no_recipe:
        return None
    return ":".join(map(str, [run["config"]["method"], *run["differs"].get("units", [])]))


def paper_table(table: tables.Table, runs: Iterable[Mapping[str, Any]], twice: list[str]) -> str:
    """A table as in the paper, with our accuracies beside the paper's; "" if we have none.

    twice: gets a sentence for each run whose seed its cell has already.
    """
    found: dict[tuple, dict[str, dict[int, Any]]] = {}  # of a cell: by what its runs share, by seed
    teachers: dict[str, dict[str, str]] = {}  # accuracy of the teachers of each pair, by hash
    for run in runs:
        c, row = run["config"], row_in_paper(run)
        if c["dataset"] != table.dataset or row not in table.rows:
            continue
        shared = {"teacher": (run["teacher_sha256"] or "")[:8]}
        shared |= {n: v for n, v in run["differs"].items() if n in VIEWS}
        shared["teacher's heads"] = (run.get("teacher_heads_sha256") or "")[:8]
        shared |= {"data": run["data_sha256"][:8], **(run["used"] or {})}
        which = json.dumps({n: v for n, v in shared.items() if v != ""})
        cell = found.setdefault((row, c["teacher"], c["student"]), {}).setdefault(which, {})
        if (first := cell.setdefault(c["seed"], run)) is not run:
            twice.append(repeated(run, first))
        if c["teacher"]:
            of_pair = teachers.setdefault(f"{c['teacher']}:{c['student']}", {})
            of_pair[shared["teacher"]] = f"{run['teacher_accuracy']:.2f}"

    def text_of(cell: Mapping[str, Mapping[int, Any]]) -> str:
        settings = [json.loads(which) for which in cell]
        texts = []
        for own, by_seed in zip(settings, cell.values()):
            differ = {n: v for n, v in own.items() if any(s.get(n) != v for s in settings)}
            which = f" ({', '.join(shown(differ))})" if differ else ""
            values = [run["accuracy"] for run in by_seed.values()]
            texts.append(f"{mean_and_std(values)}, n={len(values)}{which}")
        return "; ".join(texts)

    lines = []
    for row, accuracies in table.paper.items():
        lines.append([row])
        for pair, accuracy in zip(table.pairs, accuracies):
            teacher, student = pair.split(":")
            if row == "teacher":
                used = teachers.get(pair, {})
                several = len(used) > 1
                ours = "; ".join(a + f" (teacher {sha})" * several for sha, a in used.items())
            else:
                key = ("ce", None, student) if row == "ce" else (row, teacher, student)
                ours = text_of(found.get(key, {}))
            lines[-1].append(f"{ours or '–'} / {accuracy}")
    header = ["ours / the paper's", *(pair.replace(":", " → ") for pair in table.pairs)]
    return f"## {table.title}\n\n{markdown(header, lines)}" if found else ""


COLORS = {"ce": "C7", "kd": "C0", "mhkd": "C1"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "savefig.dpi": 200}
STYLE |= {"axes.titlesize": 8, "lines.linewidth": 1.2, "legend.frameon": False}
LABEL = 46  # characters in a line


def draw(folder: Path, groups: Sequence[Group]) -> Iterator[str]:
    """Draw a picture of each group with differences: curves, differences. A link to it, or ""."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        mhkd.log("note: no pictures without matplotlib: pip install matplotlib")
        yield from [""] * len(groups)
        return
    stems: list[str] = []
    for group in groups:
        base = "kd of the same weights"
        if not (differences := group.differences(group.kd_of)):
            base, differences = "student alone", group.differences(group.alone)
        if not differences:
            yield ""
            continue
        parts = (group.one["config"]["dataset"], group.teacher, group.student)
        stems.append("-".join(mhkd_runs.in_file_name(part) for part in parts))
        path = folder / f"{stems[-1]}-{stems.count(stems[-1])}.png"
        with matplotlib.rc_context(STYLE):
            lines = max(len(textwrap.wrap(name, LABEL)) for name in differences)
            size = (7, max(2.8, 1.2 + (0.12 * lines + 0.06) * len(differences)))
            figure = Figure(figsize=size, layout="constrained")
            left, right = figure.subplots(1, 2)
            draw_curves(left, group)
            draw_differences(right, group, differences)
            right.set(xlabel=f"minus {base},\npoints (95 % intervals)")
            figure.legend(loc="outside lower center", ncols=2)
            mhkd_runs.write_atomically(path, lambda f, fig=figure: fig.savefig(f, format="png"))
        yield f"![accuracy]({path.name})"


def draw_curves(axis: Any, group: Group) -> None:
    """Test accuracy over epochs, mean and range over seeds, of the best row of three methods."""
    best = sorted(best_rows(group.rows).values(), key=lambda row: row.method not in COLORS)
    for i, row in enumerate(best[:3]):
        curves = row.values("curve")
        epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        means, low, high = ([f(v) for v in values] for f in (statistics.mean, min, max))
        color = COLORS.get(row.method, f"C{i + 2}")
        marker = "o" if len(epochs) < 12 else None
        label = textwrap.fill(f"{row.name}, n={len(curves)}", 60)
        axis.plot(epochs, means, color=color, marker=marker, markersize=3, label=label)
        axis.fill_between(epochs, low, high, color=color, alpha=0.2)
        axis.vlines(epochs[-1], low[-1], high[-1], color=color)  # the area of one epoch is empty
    if group.teacher:
        accuracy = group.one["teacher_accuracy"]
        axis.axhline(accuracy, color="black", linestyle="--", label=f"teacher, {accuracy:.2f} %")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set(xlabel="epoch", ylabel="test accuracy, %", title=group.title)


def draw_differences(axis: Any, group: Group, differences: Mapping[str, list[float]]) -> None:
    rows = [row for row in group.rows if row.name in differences]
    for i, row in enumerate(rows):
        mean, _, half = interval(differences[row.name])
        color = COLORS.get(row.method, "black")
        axis.errorbar(mean, i, xerr=half, fmt="o", markersize=4, capsize=2, color=color)
    axis.axvline(0, color="black", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(rows)), [textwrap.fill(row.name, LABEL) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
