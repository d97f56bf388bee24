#!/usr/bin/env python3
"""Compute the paper's tables or the studies, and write a report of finished runs.

    python mhkd_tables.py run table1,table2 --jobs 2     # their runs, two at a time, and a report
    python mhkd_tables.py run table1 --dry-run           # print the commands and which are done
    python mhkd_tables.py run table1 --pairs vgg13:vgg8 --methods kd,mhkd --seeds 0 --epochs 60
    python mhkd_tables.py report runs                    # the report of the runs in a folder

`run` computes table1, table2, table3, or a study of docs/measurements.md (small, views), by
commands `python mhkd.py ...`. Their output is also written to OUT/logs. Finished runs are not
repeated. --seeds, --pairs and --methods select a part. Options of mhkd.py apply to all runs, or to
those whose method has them; --teacher-store to all that it can serve. --jobs is the number of runs
at a time (default: 1; studies: one per core). --methods takes rows of the selected tables: "mhkd:2"
(table2) is MHKD with the head of unit 2 only, "kd:gamma=1:kd_weight=1" (small) KD with these
options.

`report` writes report.md and, if matplotlib is installed, pictures: see mhkd_report.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mhkd
import mhkd_config
import mhkd_record
import mhkd_runs
from mhkd import UsageError
from mhkd_config import Config

# --------------------------------------------------------------------------------------------------
# 1. The paper's tables and the studies
# --------------------------------------------------------------------------------------------------


class Table:
    """A table of the paper: a column for each pair, a row for each method: mean(std) in percent."""

    def __init__(self, title: str, dataset: str, text: str):
        self.title, self.dataset = title, dataset
        self.pairs, *lines = [line.split() for line in text.strip().splitlines()]
        self.paper = {row: accuracies for row, *accuracies in lines}
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
# The number of classes of the paper's data sets and one of their names, to recognise other images.
CLASSES = {"cifar100": (100, "aquarium_fish"), "svhn": (10, "7")}

# The second protocol of docs/measurements.md. The teacher is trained on all images, the students on
# 5,000. For each pair: rows and number of seeds, in the order in which they are computed.
STUDY = {"dataset": "cifar100", "image_size": 16, "device": "cpu", "backend": "reference"}
STUDY_TEACHER = STUDY | {"student": "wrn_16_2", "method": "ce", "epochs": 30}
STUDY_RECIPE = {"image_size": 16, "subset": 5000, "epochs": 60}
STUDY_STUDENT = STUDY | STUDY_RECIPE | {"options": {"head_width": 64, "head_stride": 2}}
PAIR_A, PAIR_B = "wrn_16_2:resnet8", "wrn_16_2:shufflenetv2"
EQUAL = ":gamma=1:kd_weight=1"  # final cross-entropy and KL with weights 1/1; default: 0.1/0.9
PRETRAINED = ":teacher_heads=pretrained"
BEST = EQUAL + PRETRAINED
FACTORIAL = ["kd", "mhkd", "mhkd" + PRETRAINED, "mhkd:teacher_heads=logits"]
FACTORIAL = [row + weights for row in FACTORIAL for weights in ("", EQUAL)]
OTHERS = ["mhkd:units=1", "mhkd:units=2", "mhkd:units=3", "mhkd:head_ce=0", "mhkd:head_stride=1"]
OTHERS = [row + BEST for row in (*OTHERS, "crd+mhkd")]
SMALL_ROWS = [
    (PAIR_A, ["ce", *FACTORIAL], 10),
    (PAIR_B, ["ce", "kd", "kd" + EQUAL, "mhkd" + PRETRAINED, "mhkd" + PRETRAINED + EQUAL], 5),
    (PAIR_A, [*OTHERS, "fitnet", "cc", "rkd", "crd", "lsh", "dhkd"], 5),
    (PAIR_A, ["fitnet+mhkd" + BEST], 5),  # the addition to the protocol
]
# The protocol of the stored teacher outputs: a shared view seed, and fewer views of each image.
STORED = [
    ":teacher_store=float32",
    *(f":teacher_store=float32:teacher_views={R}" for R in (30, 16)),
]
VIEW_ROWS = [
    (
        PAIR_A,
        [row + stored for row in ("kd" + EQUAL, "mhkd" + BEST) for stored in ("", *STORED)],
        10,
    ),
    (PAIR_A, [f"kd{EQUAL}{stored}:subset=20000" for stored in (STORED[0], STORED[2])], 3),
]
STUDIES = {"small": SMALL_ROWS, "views": VIEW_ROWS}
MINUTES = {"small": 14, "views": 6}  # of a run, the mean of the records in results/
PRIMARY_SEEDS = 10
PRIMARY = [  # a claim about pair A, and the two rows of their order in it
    ("MHKD (pretrained) above KD, both 1/1", "mhkd" + BEST, "kd" + EQUAL),
    ("MHKD (pretrained) above KD, both 0.1/0.9", "mhkd" + PRETRAINED, "kd"),
    ("MHKD (scratch) above KD, both 1/1", "mhkd" + EQUAL, "kd" + EQUAL),
    ("MHKD pretrained above scratch, both 1/1", "mhkd" + BEST, "mhkd" + EQUAL),
]

# --------------------------------------------------------------------------------------------------
# 2. The runs that they need
# --------------------------------------------------------------------------------------------------

INSTEAD = {"--method": "methods", "--seed": "seeds", "--teacher": "pairs", "--student": "pairs"}


def cells(name: str, seeds: Sequence[int] = ()) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Pair, row, seed and settings of each run. A table may have any seeds, the study its own."""
    if name in STUDIES:
        blocks, settings = STUDIES[name], STUDY_STUDENT
    else:
        table = TABLES[mhkd.check_name("table", name, [*TABLES, *STUDIES])]
        blocks = [(pair, table.rows, 3) for pair in table.pairs]
        settings = {"dataset": table.dataset}
    for pair, rows, number in blocks:
        for seed, row in itertools.product(seeds or range(number), rows):
            if seed < number or name not in STUDIES:
                yield pair, row, seed, settings


def options_of(row: str) -> dict[str, mhkd.Option]:
    return mhkd_config.method_options(mhkd.find_methods(row.split(":")[0]))


def config_of(pair: str, row: str, seed: int, settings: Mapping, options: Mapping = {}) -> Config:
    """The run of a cell. Options in the row's name come first, then `options`, then settings."""
    declared, (method, *parts) = options_of(row), row.split(":")
    chosen = {**settings.get("options", {}), **options}
    teacher, student = pair.split(":")
    own = {"teacher": teacher, "student": student, "method": method, "seed": seed}
    for part in parts:
        name, _, value = part.rpartition("=")
        name = name or "units"
        if name in declared:
            chosen[name] = declared[name].parse(value)
        else:
            option = Config.__dataclass_fields__[name].metadata["option"]
            own[name] = option.parse(value)
    chosen = {name: value for name, value in chosen.items() if name in declared}
    return Config(**{**settings, **own, "options": chosen})


def plan(tables: Sequence[str], arguments: Sequence[str]) -> tuple[Any, list[Config], list[Config]]:
    """The parsed arguments, and the runs that tables need, each once: teachers, then the others."""
    every = [cell for name in tables for cell in cells(name)]
    pairs, rows = (dict.fromkeys(cell[i] for cell in every) for i in (0, 1))
    known = {name: option for row in rows for name, option in options_of(row).items()}

    def extra(parser: Any) -> None:
        parser.add_argument("--seeds", type=mhkd.integers, default=())
        parser.add_argument("--pairs", type=mhkd.words, default=pairs)
        parser.add_argument("--methods", type=mhkd.words, default=rows)
        parser.add_argument("--jobs", type=int)
        parser.add_argument("--dry-run", action="store_true")
        for name, option in known.items():
            mhkd_config.add_option(parser, name, option)

    for flag in {argument.partition("=")[0] for argument in arguments} & {*INSTEAD}:
        raise UsageError(f"`run` takes --{INSTEAD[flag]}, not {flag}")
    # ce has no options of its own, so those of all rows can be added.
    given, fields = mhkd_config.parse_config(["--method", "ce", *arguments], extra)
    options = {name: value for name in known if (value := getattr(given, name)) is not None}
    for what, names, existing in (("pair", given.pairs, pairs), ("row", given.methods, rows)):
        for name in names:
            mhkd.check_name(what, name, existing)
    if given.jobs is not None and given.jobs < 1:
        raise UsageError("--jobs must be at least 1")

    del fields["options"], fields["method"]
    fixed = [*fields.keys() & {"teacher_seed", "teacher_init"}]
    if fixed and {*tables} & {*STUDIES}:
        what = f"{mhkd_config.flag_of(fixed[0])} is not for a study, whose teacher is fixed"
        raise UsageError(f"{what}: use --teacher-weights")
    views = {name: fields.pop(name) for name in fields.keys() & {"teacher_views"}}
    store = {name: fields.pop(name) for name in fields.keys() & {"teacher_store"}}
    study_teacher = Config(**{**STUDY_TEACHER, **fields, "teacher_weights": None})
    name = mhkd_record.name_of(study_teacher, study_teacher.differs)
    study_weights = str(Path(study_teacher.out) / name / "student.pt")
    teachers, others = [], []
    for pair, row, seed, own in (cell for name in tables for cell in cells(name, given.seeds)):
        if pair in given.pairs and row in given.methods:
            of_study = {"teacher_weights": study_weights} if own is STUDY_STUDENT else {}
            config = config_of(pair, row, seed, {**own, **of_study, **fields}, options)
            methods = mhkd.find_methods(config.method).values()
            can_store = not any(method.needs_maps(config) for method in methods)
            if config.teacher:
                config = config.replace(**views, **(store if can_store else {}))
            if (store or views) and config.view_seed is None:  # all runs see the same images
                config = config.replace(view_seed=0)
            others.append(config)
            if config.teacher and "teacher_weights" not in fields:
                teachers.append(study_teacher if of_study else config.of_teacher())
    if not others:
        raise UsageError("no run is left with these --seeds, --pairs and --methods")
    for name in {*options}.difference(*(config.options for config in others)):
        raise UsageError(mhkd_config.foreign_option(name, others[-1].method))
    if len({config.teacher for config in others if config.teacher_weights}) > 1:
        raise UsageError("--teacher-weights is for one teacher: select its pairs with --pairs")
    if (path := fields.get("teacher_weights")) and not Path(path).is_file():
        raise UsageError(f"there is no checkpoint '{path}'")
    teachers = [c for i, c in enumerate(teachers) if c not in teachers[:i]]
    return given, teachers, [c for i, c in enumerate(others) if c not in teachers + others[:i]]


def key_of(recorded: Mapping[str, Any], data: str, teacher_sha256: str | None = None) -> str:
    """A text that is the same for a recorded run and a planned run if they are the same."""
    folder = os.path.abspath(data) if recorded["dataset"] == "folder" else None
    usual = {name: f.default for name, f in Config.__dataclass_fields__.items()}  # of older records
    values = {"processes": 1, **usual, **recorded, **recorded["options"], "options": None}
    values = {n: v for n, v in values.items() if v is not None}
    return json.dumps([values, folder, teacher_sha256], sort_keys=True)


def are_done(configs: Sequence[Config]) -> list[bool]:
    """Whether each run has finished, with the planned teacher, and its student.pt exists."""
    runs, _ = mhkd.sibling("mhkd_report").read_runs(configs[0].out)
    finished = {run["key"]: run["student_sha256"] for run in runs if run["has_student"]}
    done = []
    for config in configs:
        taught_by = None
        if config.teacher_weights:
            weights = Path(config.teacher_weights)
            taught_by = mhkd_runs.sha256_of(weights) if weights.is_file() else "not trained yet"
        elif config.teacher:
            teacher = config.of_teacher()
            taught_by = finished.get(key_of(teacher.recorded(), teacher.data))
        done.append(key_of(config.recorded(), config.data, taught_by) in finished)
    return done


def arguments_of(config: Config) -> list[str]:
    """The arguments for mhkd.py that make this configuration."""
    values = {"method": config.method, **config.arguments()}
    values |= values.pop("options")
    arguments = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(mhkd_config.flag_of(name if value else f"no_{name}"))
        else:
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            arguments += [mhkd_config.flag_of(name), text]
    return arguments


def command_of(config: Config) -> str:
    return f"python mhkd.py {shlex.join(arguments_of(config))}"


# --------------------------------------------------------------------------------------------------
# 3. Computing them
# --------------------------------------------------------------------------------------------------


def run(tables: Sequence[str], arguments: Sequence[str]) -> None:
    """Compute the runs of tables that are not done, then write and print the report."""
    given, teachers, others = plan(tables, arguments)
    study = {*tables} & {*STUDIES}
    configs, cores = teachers + others, os.cpu_count() or 1
    done, jobs = are_done(configs), given.jobs or (cores if study else 1)
    counts, left = f"{sum(done)} of {len(done)} runs are done", len(done) - sum(done)
    if study:
        each = max(MINUTES[name] for name in study)
        hours, minutes = divmod(math.ceil(left / jobs) * each, 60)
        print(f"{left} runs, {jobs} at a time: about {hours} h {minutes} min, if each takes "
              f"{each} minutes, the average of the published runs")  # fmt: skip
    if given.dry_run:
        for config, finished in zip(configs, done):
            print(f"{'done' if finished else 'todo'}  {command_of(config)}")
        print(counts)
        return
    out = Path(configs[0].out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    print(f"{counts}; the output of the others is also written to {out / 'logs'}", flush=True)
    environment = dict(os.environ)
    if study:
        environment["OMP_NUM_THREADS"] = "1"  # part of the protocol
    elif jobs > 1:  # runs that all use every core slow each other down
        environment.setdefault("OMP_NUM_THREADS", str(math.ceil(cores / jobs)))
    pool = Pool(jobs, environment)
    todo = [(out / f"logs/{i:03}.log", c) for i, c in enumerate(configs, 1) if not done[i - 1]]
    for phase in (teachers, others):  # teachers are trained before their students
        pool.run([item for item in todo if item[1] in phase])
    if any(out.glob("*/result.json")):
        print(mhkd.sibling("mhkd_report").report(out))
    if pool.failed:
        first = f"{len(pool.failed)} of {left} runs failed:"
        raise UsageError("\n  ".join([first, *pool.failed]))


class Pool:
    """Processes of mhkd.py, some at a time. A run that fails does not stop the others."""

    def __init__(self, jobs: int, environment: Mapping[str, str]):
        self.jobs, self.environment = jobs, environment
        self.failed: list[str] = []  # command and last line of the output
        self.processes: list[subprocess.Popen] = []
        self.stopped = False

    def run(self, todo: Sequence[tuple[Path, Config]]) -> None:
        """Run configurations, each with a file for its output.

        Raises:
            KeyboardInterrupt: this process or one of the runs was interrupted.
        """
        with ThreadPoolExecutor(self.jobs) as threads:
            try:
                list(threads.map(self._run_one, todo))
            except BaseException as error:
                self.stopped = True
                # Ctrl-C has reached the processes, too; other signals have not.
                ctrl_c = isinstance(error, KeyboardInterrupt) and not error.args
                for process in self.processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10 if ctrl_c else 0)
                    process.terminate()
                raise
        if self.stopped:
            raise KeyboardInterrupt

    def _run_one(self, item: tuple[Path, Config]) -> None:
        path, config = item
        if self.stopped:
            return
        print(f"+ {command_of(config)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, mhkd.__file__, *arguments_of(config)], env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self.processes.append(process)
        if self.stopped:  # meanwhile
            process.terminate()
        last = ""
        with process, open(path, "w", buffering=1) as log:
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
                last = line.strip() or last
        if process.returncode in (130, -signal.SIGINT):
            self.stopped = True
        elif process.returncode:
            self.failed.append(f"{command_of(config)}: {last}")


# --------------------------------------------------------------------------------------------------
# 4. Command line
# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> None:
        if not arguments or {"-h", "--help"} & {*arguments}:
            print(__doc__)
        elif arguments[0] == "report" and len(arguments) == 2:
            print(mhkd.sibling("mhkd_report").report(arguments[1]))
        elif arguments[0] == "run" and len(arguments) > 1 and not arguments[1].startswith("-"):
            run(mhkd.words(arguments[1]), arguments[2:])
        else:
            raise UsageError("use `report DIR` or `run table1,table2,... [options]`, see --help")

    return mhkd_config.command_line("mhkd_tables.py", command)


if __name__ == "__main__":
    sys.modules["mhkd_tables"] = sys.modules["__main__"]  # the module that mhkd_report imports
    sys.exit(main())
