"""The paper's tables and the study: what is run for them, and how it is reported."""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import mhkd
import mhkd_code
import mhkd_config
import mhkd_record
import mhkd_report
import mhkd_runs
import mhkd_tables as tables

PAPERS_FIGURES = {"table1": 5 * 9, "table2": 2 * 8, "table3": 5 * 7}  # counted on the page
PAIR = {"teacher": "wrn_40_2", "student": "wrn_16_2"}
KD = ("70.67", "72.98", "67.37", "74.45")  # the paper's, of the other pairs
CIFAR = ["aquarium_fish", *(f"class {i}" for i in range(99))]


def configured(text):
    return mhkd.Config(**mhkd_config.parse_config(shlex.split(text))[1])


COMMAND = re.compile(r"^(done|todo)  python mhkd\.py (.*)$", re.MULTILINE)


def plan(capsys, *arguments):
    """The runs that a dry run lists: state and configuration."""
    assert tables.main(["run", *map(str, arguments), "--dry-run"]) == 0
    return [(state, configured(text)) for state, text in COMMAND.findall(capsys.readouterr().out)]


def key(config):
    return json.dumps(config.recorded(), sort_keys=True)


# What is run


def test_the_tables_have_every_figure_of_the_paper():
    for name, table in tables.TABLES.items():
        assert all(len(figures) == len(table.pairs) for figures in table.paper.values())
        assert sum(map(len, table.paper.values())) == PAPERS_FIGURES[name]


def test_the_plan_of_all_tables_has_every_cell_three_times_and_every_teacher_once(capsys):
    lines = plan(capsys, "table1,table2,table3")
    keys = [key(config) for _, config in lines]
    # vgg13 is a teacher and a student
    assert len(keys) == len(set(keys)) == 9 + 3 * (5 * 8 + 2 * 3 + 5 * 6) - 1
    assert {state for state, _ in lines} == {"todo"}
    for table in tables.TABLES.values():
        for row, pair, seed in itertools.product(table.rows, table.pairs, range(3)):
            (teacher, student), (method, _, unit) = pair.split(":"), row.partition(":")
            cell = mhkd.Config(
                None if method == "ce" else teacher, student, method=method, seed=seed,
                dataset=table.dataset, options={"units": (int(unit),)} if unit else {},
            )  # fmt: skip
            assert key(cell) in keys
    needed = {(t.dataset, p.split(":")[0], 0) for t in tables.TABLES.values() for p in t.pairs}
    first = [(c.dataset, c.student, c.seed) for _, c in lines[: len(needed)]]
    assert sorted(first) == sorted(needed)


def test_the_recipe_of_each_table_is_the_papers(capsys):
    for _, config in plan(capsys, "table1,table2,table3"):
        assert set(config.differs) <= {"units"}
        beta, training = config.options.get("beta"), (config.epochs, config.batch_size)
        if config.dataset == "svhn":
            assert (*training, config.lr) == (150, 200, 0.001) and beta in (None, 5)
            assert config.lr_steps == (80, 110, 135)
        else:
            assert training == (240, 64) and beta in (None, 0.5)
            assert config.lr_steps == (150, 180, 210)


def test_the_plan_of_the_study_is_its_protocol(capsys):
    lines = plan(capsys, "small")
    (_, teacher), *students = lines
    who = (teacher.student, teacher.method, teacher.epochs, teacher.subset)
    assert who == ("wrn_16_2", "ce", 30, None)
    found = []
    for state, c in students:
        assert (state, c.dataset, c.image_size) == ("todo", "cifar100", 16)
        assert (c.subset, c.test_subset, c.epochs) == (5000, None, 60)
        assert (c.backend, c.device, c.lr_steps) == ("reference", "cpu", (38, 45, 52))
        assert c.lr == (0.05 if c.student == "resnet8" else 0.01) and c.batch_size == 64
        if c.method != "ce":
            assert c.teacher == "wrn_16_2" and "wrn_16_2-ce-seed0" in c.teacher_weights
        assert c.options.get("head_width", 64) == 64
        names = ("gamma", "kd_weight", "teacher_heads", "head_ce", "head_stride", "units")
        found.append((c.student, c.method, c.seed, *(c.options.get(name) for name in names)))
    assert len(found) == len({*found}) == 90 + 25 + 60 + 5
    weights, heads = ((None, None), (1, 1)), ("scratch", "pretrained", "logits")
    factorial = [("kd", *w, None, None, None, None) for w in weights]
    factorial += [("mhkd", *w, h, None, 2, (1, 2, 3)) for w in weights for h in heads]
    for seed in range(10):
        for method, *rest in factorial:
            assert ("resnet8", method, seed, *rest) in found
    best = ("mhkd", 1, 1, "pretrained")
    others = [(*best, None, 2, (unit,)) for unit in (1, 2, 3)]
    others += [(*best, 0, 2, (1, 2, 3)), (*best, None, 1, (1, 2, 3))]
    others += [(f"{name}+mhkd", *best[1:], None, 2, (1, 2, 3)) for name in ("crd", "fitnet")]
    for seed, (method, *rest) in itertools.product(range(5), others):
        assert ("resnet8", method, seed, *rest) in found
    assert {row[:3] for row in found[90:115]} == set(
        itertools.product(["shufflenetv2"], ["ce", "kd", "mhkd"], range(5))
    )


def test_the_plan_of_the_views_study_is_its_protocol(capsys):
    (_, teacher), *students = plan(capsys, "views")
    assert (teacher.student, teacher.method) == ("wrn_16_2", "ce")
    assert all(c.options["gamma"] == c.options["kd_weight"] == 1 for _, c in students)
    assert {c.options.get("teacher_heads", "pretrained") for _, c in students} == {"pretrained"}
    assert {(c.student, c.epochs, c.image_size) for _, c in students} == {("resnet8", 60, 16)}
    found = [
        (c.method, c.subset, c.seed, c.view_seed, c.teacher_store, c.teacher_views)
        for _, c in students
    ]
    kinds = [(None, None, None), *((0, "float32", views) for views in (None, 30, 16))]
    wanted = itertools.product(["kd", "mhkd"], [5000], range(10), kinds)
    wanted = {(*first, *kind) for *first, kind in wanted}
    wanted |= {("kd", 20000, s, *kinds[i]) for s in range(3) for i in (1, 3)}
    assert len(found) == 86 and {*found} == wanted


def test_the_store_is_used_by_the_methods_that_it_can_serve(capsys):
    narrowed = ["--pairs", "vgg13:vgg8", "--seeds", "0", "--teacher-store"]
    _, *lines = plan(capsys, "table1", *narrowed)
    stored = {c.method for _, c in lines if c.teacher_store}
    assert stored == {"kd", "cc", "rkd", "crd"}
    assert {c.method for _, c in lines} == stored | {"ce", "fitnet", "mhkd", "crd+mhkd"}
    assert {c.view_seed for _, c in lines} == {0}  # all students see the same images
    lines = plan(capsys, "table1", *narrowed, "--teacher-heads", "pretrained")
    assert {"mhkd", "crd+mhkd"} < {c.method for _, c in lines if c.teacher_store}


def test_fewer_views_are_for_all_methods_with_a_teacher(capsys):
    narrowed = ["--pairs", "vgg13:vgg8", "--seeds", "0", "--teacher-views", "16"]
    for more in ([], ["--teacher-store"]):
        _, *lines = plan(capsys, "table1", *narrowed, *more)
        assert {c.teacher_views for _, c in lines if c.teacher} == {16}
        assert {c.view_seed for _, c in lines} == {0}


def test_the_study_is_narrowed_and_shortened(capsys):
    narrowed = ["--seeds", "0,7", "--methods", "ce,mhkd", "--pairs", "wrn_16_2:resnet8"]
    _, *lines = plan(capsys, "small", *narrowed, "--epochs", "2", "--head-width", "8")
    found = [(c.method, c.seed, c.epochs, c.options.get("head_width")) for _, c in lines]
    ce, mhkd_row = ("ce", 0, 2, None), ("mhkd", 0, 2, 8)
    assert found == [ce, mhkd_row, (*ce[:1], 7, *ce[2:]), (*mhkd_row[:1], 7, *mhkd_row[2:])]


def test_a_table_is_narrowed_and_takes_options_for_the_methods_that_have_them(capsys):
    narrowed = ["--seeds", "4", "--pairs", "vgg13:vgg8", "--methods", "kd,mhkd:2,crd+mhkd"]
    lines = plan(capsys, "table1,table2", *narrowed, "--no-flip", "--negatives", "99")
    found = {(c.method, c.teacher, c.seed, c.options.get("negatives")) for _, c in lines}
    students = {("kd", "vgg13", 4, None), ("mhkd", "vgg13", 4, None), ("crd+mhkd", "vgg13", 4, 99)}
    assert len(lines) == 4 and found == students | {("ce", None, 0, None)}
    assert {c.flip for _, c in lines} == {False}
    assert [c.options["units"] for _, c in lines if c.method == "mhkd"] == [(2,)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table4"], "no table 'table4'"),
        (["table1", "--pairs", "vgg13:vgg9"], "did you mean vgg13:vgg8"),
        (["table1", "--methods", "kdd"], "no row 'kdd'"),
        (["table1", "--methods", "mhkd:1"], "no row 'mhkd:1'"),
        (["table1", "--epoch", "9"], "no option --epoch: did you mean --epochs"),
        (["small", "--seeds", "10"], "no run is left"),
        (["small", "--seeds", "a"], "--seeds"),
        (["small", "--teacher-seed", "5"], "--teacher-seed is not for a study"),
        (["table1", "--methods", "kd", "--negatives", "9"], "option of --method crd, not of kd"),
        (["table1", "--method=kd"], "takes --methods, not --method"),
        (["table1", "--teacher-weights", "t.pt"], "for one teacher"),
        (["table1", "--teacher-weights", "t.pt", "--pairs", "vgg13:vgg8"], "'t.pt'"),
        (["table1", "--jobs", "0"], "--jobs must be at least 1"),
        ([], "report DIR"),
    ],
)
def test_what_no_table_has_is_an_error_of_one_sentence(arguments, message, capsys):
    assert tables.main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_is_done_only_if_the_planned_teacher_taught_it_and_its_student_is_there(
    tmp_path, capsys
):
    narrowed = ["--pairs", "wrn_40_2:wrn_16_2", "--methods", "kd", "--seeds", "0"]

    def states(*more):
        return [line[0] for line in plan(capsys, "table1", *narrowed, "--out", tmp_path, *more)]

    assert states() == ["todo", "todo"]
    student = record(tmp_path, 75.0, **PAIR, method="kd", taught_by=b"teacher", weights=b"student")
    assert states() == ["todo", "todo"]
    record(tmp_path, 75.5, student="wrn_40_2", method="ce", weights=b"another")
    assert states() == ["done", "todo"]
    record(tmp_path, 75.5, student="wrn_40_2", method="ce", weights=b"teacher")
    assert states() == ["done", "done"]
    assert states("--weight-decay", "0.01") == ["todo", "todo"]
    weights = tmp_path / "given.pt"
    for content, state in ((b"another", "todo"), (b"teacher", "done")):
        weights.write_bytes(content)
        assert states("--teacher-weights", weights) == [state]
    (student / "student.pt").write_bytes(b"of another run")
    assert states() == ["done", "todo"]


def test_the_record_of_an_older_version_with_fewer_settings_counts_as_done(tmp_path, capsys):
    folder = record(tmp_path, 75.0, student="vgg8", method="ce")
    content = mhkd_runs.read_json(folder / "result.json")
    for name in ("optimizer", "schedule", "warmup", "view_seed", "augment", "keep"):
        del content["config"][name]
    mhkd_runs.write_json(folder / "result.json", content)
    narrowed = ["--pairs", "vgg13:vgg8", "--methods", "ce", "--seeds", "0", "--out", tmp_path]
    assert [state for state, _ in plan(capsys, "table1", *narrowed)] == ["done"]


def test_a_run_on_another_folder_of_images_is_not_taken_for_done(tmp_path, capsys):
    record(tmp_path, 75.0, student="vgg8", method="ce", dataset="folder")  # of some/photos
    narrowed = ["--pairs", "vgg13:vgg8", "--methods", "ce", "--seeds", "0", "--dataset", "folder"]
    for data, state in (("some/photos", "done"), ("other/photos", "todo")):
        lines = plan(capsys, "table1", *narrowed, "--data", data, "--out", tmp_path)
        assert [line[0] for line in lines] == [state]


# The runs are computed

STUB = """import os, pathlib, sys, time
seed = sys.argv[sys.argv.index("--seed") + 1] if "--seed" in sys.argv else "0"
print("seed", seed, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
pathlib.Path(f"{__file__}.{seed}").touch()
{body}
"""
ONE_PAIR = ["table1", "--pairs", "vgg13:vgg8", "--methods", "ce"]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Replaces mhkd.py in the runs by a script that prints its seed and executes `body`."""

    def replace(body):
        path = tmp_path / "stub.py"
        path.write_text(STUB.replace("{body}", body))
        monkeypatch.setattr(mhkd, "__file__", str(path))
        return lambda: sorted(path.suffix[1:] for path in tmp_path.glob("stub.py.*"))

    return replace


def test_a_failed_run_is_listed_with_its_last_line_and_does_not_stop_the_others(
    stub, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    started = stub("if seed == '1': sys.exit('its\\ncause')")
    options = ["--seeds", "0,1,2,3", "--jobs", "2", "--out", str(tmp_path / "runs")]
    assert tables.main(["run", *ONE_PAIR, *options]) == 1
    out, error = capsys.readouterr()
    assert started() == ["0", "1", "2", "3"]
    assert out.count("+ python mhkd.py --method ce --student vgg8") == 4 and "seed 3" in out
    first, *failed = error.splitlines()
    assert "1 of 4 runs failed:" in first and len(failed) == 1
    assert "--seed 1" in failed[0] and failed[0].endswith(": cause")
    logs = {path.name: path.read_text() for path in (tmp_path / "runs/logs").iterdir()}
    assert logs["002.log"] == "seed 1 threads 3\nits\ncause\n"  # five cores for two runs
    assert logs.keys() == {f"00{i}.log" for i in (1, 2, 3, 4)}


def test_threads_are_one_for_the_study_and_those_of_the_user_for_tables(
    stub, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stub("")
    options = ["--methods", "ce", "--seeds", "0", "--out", str(tmp_path / "runs"), "--jobs", "2"]
    assert tables.main(["run", "small", "--pairs", "wrn_16_2:resnet8", *options]) == 0
    assert "seed 0 threads 1\n" in capsys.readouterr().out
    assert tables.main(["run", *ONE_PAIR[:3], *options]) == 0
    assert "seed 0 threads 7\n" in capsys.readouterr().out


def test_teachers_are_trained_before_the_others(stub, tmp_path, capsys):
    stub("time.sleep(0.3 * ('vgg13' in sys.argv and '--teacher' not in sys.argv))")
    options = ["--seeds", "0", "--methods", "kd,mhkd", "--jobs", "3", "--out", str(tmp_path / "r")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert tables.main(["run", *ONE_PAIR[:3], *options]) == 0
    out = capsys.readouterr().out.splitlines()
    teacher = next(i for i, line in enumerate(out) if line.startswith("+ "))
    assert "--student vgg13" in out[teacher] and out[teacher + 1].startswith("seed 0")
    assert sum("--teacher vgg13" in line for line in out[teacher + 2 :]) == 2


def test_no_further_run_starts_after_one_that_was_interrupted(stub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = stub("sys.exit(130)")
    assert tables.main(["run", *ONE_PAIR, "--out", str(tmp_path / "runs")]) == 130
    assert started() == ["0"] and "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_runs_and_starts_no_further_one(number, status, tmp_path):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB.replace("{body}", "print(os.getpid(), flush=True)\ntime.sleep(100)"))
    code = "import sys, mhkd, mhkd_tables; mhkd.__file__ = sys.argv.pop(1); "
    code += "sys.exit(mhkd_tables.main())"
    command = [sys.executable, "-c", code, stub, "run", *ONE_PAIR, "--out", tmp_path / "runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output"
    with open(output, "w") as file:  # in a session of its own, as in a terminal
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not (found := re.search(r"^\d+$", output.read_text(), re.MULTILINE)):
        assert time.monotonic() < deadline and process.poll() is None, output.read_text()
        time.sleep(0.05)
    if number == signal.SIGINT:  # Ctrl-C is sent to all processes of the terminal
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(60) == status, output.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0]), 0)
    assert len(list(tmp_path.glob("stub.py.*"))) == 1


# run_all.sh


def run_all(folder, *arguments, **variables):
    """run_all.sh in a folder of its own, without the sources of the compiled loss."""
    for path in (ROOT / "run_all.sh", *ROOT.glob("mhkd*.py")):
        shutil.copy(path, folder)
    inherited = {k: v for k, v in os.environ.items() if k not in ("VENV", "OUT", "JOBS", "DATA")}
    environment = {**inherited, "PYTHON": sys.executable, **variables}
    command = [str(folder / "run_all.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_the_dry_run_of_run_all_prints_every_command_and_how_many_are_done(tmp_path):
    done = run_all(tmp_path, "all", "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = COMMAND.findall(done.stdout)
    assert len({key(configured(command)) for _, command in commands}) == 236
    assert done.stdout.splitlines()[-1] == "0 of 236 runs are done"


def test_run_all_computes_the_study_goes_on_after_failures_resumes_and_repeats_nothing(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "runs"
    shortened = {"SEEDS": "0 1", "METHODS": "ce kd", "PAIRS": "wrn_16_2:resnet8", "EPOCHS": "1"}
    shortened |= {"OPTIONS": "--dataset digits --subset 80 --batch-size 40"}
    shortened |= {"OUT": str(out), "JOBS": "2"}
    # The folder of kd, seed 1, is known once the teacher has been trained.
    assert run_all(tmp_path, "small", **{**shortened, "SEEDS": "0"}).returncode == 0
    (seed_0,) = out.glob("*-kd-seed0-*")
    broken = seed_0.with_name(seed_0.name.replace("seed0", "seed1"))
    broken.mkdir()
    (broken / "config.json").write_text("{")

    first = run_all(tmp_path, "small", **shortened)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "3 of 5 runs are done" in first.stdout and "2 runs, 2 at a time: about" in first.stdout
    failed = first.stderr.partition("1 of 2 runs failed:\n")[2]
    assert "--method kd" in failed and "is damaged" in failed and failed.count("mhkd.py --") == 1
    results = list(out.glob("*/result.json"))
    assert len(results) == 4
    assert {json.loads(r.read_text())["environments"][-1]["threads"] for r in results} == {1}

    (broken / "config.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in results}
    second = run_all(tmp_path, "small", **shortened)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "4 of 5 runs are done" in second.stdout and second.stdout.count("+ python mhkd.py") == 1
    assert {path: path.stat().st_mtime_ns for path in results} == times
    assert re.search(r"\| kd \| [\d.]+ \([\d.]+\) \| [\d.]+ \([\d.]+\) \| 2 \|", second.stdout)
    assert "5 of 5 runs are done" in run_all(tmp_path, "small", "--dry-run", **shortened).stdout

    assert run_all(tmp_path, "records", OUT=str(out)).returncode == 0
    kept = {path.name for path in (tmp_path / "results").glob("*/*")}
    assert kept == {"result.json", "log.jsonl"} and len(list((tmp_path / "results").glob("*"))) == 5


def test_a_wrong_name_ends_run_all_with_status_2_and_help_on_stderr(tmp_path):
    wrong = run_all(tmp_path, "tabel1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there is no target 'tabel1'" in wrong.stderr and "table1" in wrong.stderr
    assert run_all(tmp_path, "table1", "--dryrun").returncode == 2
    assert run_all(tmp_path).returncode == 0
    top = (ROOT / "run_all.sh").read_text().partition("\nset ")[0].splitlines()
    assert [f"# {line}".strip() for line in run_all(tmp_path).stdout.splitlines()] == top[1:]


@pytest.mark.parametrize("part", ["demo", "test", "small", "table1", "all"])
def test_a_failed_installation_ends_run_all(part, tmp_path):
    python = tmp_path / "python"  # new enough, and without any package
    python.write_text('#!/bin/sh\necho "$@" >>log\n[ "$1" = -c ] || { [ "$1 $2" = "-m venv" ] && '
                      'mkdir -p env/bin && cp "$0" env/bin/python; }\n')  # fmt: skip
    python.chmod(0o755)
    done = run_all(tmp_path, part, PYTHON=str(python), VENV="env")
    log = (tmp_path / "log").read_text()
    assert done.returncode != 0 and log.splitlines()[-1].startswith("-m pip install"), log


def with_library(folder):
    """A compiled loss that is older than its source, and an interpreter that pretends to build."""
    python = folder / "python"
    python.write_text("#!/bin/sh\n[ $1 != setup.py ] || exit $BUILD\necho loss: fused\n"
                      "sleep 0.3\necho agrees\n")  # fmt: skip
    python.chmod(0o755)
    (folder / "csrc").mkdir()
    for name in ("_mhkd_fused.so", "setup.py", "csrc/new.cpp"):
        (folder / name).touch()
    os.utime(folder / "_mhkd_fused.so", (1, 1))
    return python


def test_a_compiled_loss_that_is_newer_than_its_sources_is_not_built_again(tmp_path):
    python = with_library(tmp_path)
    os.utime(tmp_path / "_mhkd_fused.so")
    for _ in range(3):
        done = run_all(tmp_path, "setup", PYTHON=str(python), BUILD="1")
        assert (done.returncode, done.stderr) == (0, "") and "build_ext" not in done.stdout


def test_a_failed_build_of_the_loss_does_not_mark_the_old_one_as_new(tmp_path):
    python = with_library(tmp_path)
    failed = run_all(tmp_path, "setup", PYTHON=str(python), BUILD="1")
    assert failed.returncode == 0 and "could not be compiled" in failed.stderr
    assert (tmp_path / "_mhkd_fused.so").stat().st_mtime == 1
    run_all(tmp_path, "setup", PYTHON=str(python), BUILD="0")
    assert (tmp_path / "_mhkd_fused.so").stat().st_mtime > 1
    assert "build_ext" not in run_all(tmp_path, "setup", PYTHON=str(python), BUILD="1").stdout


# How it is reported


def record(
    out, accuracy, taught_by=b"t", weights=b"s", classes=CIFAR, data="d", more=(), **settings
):
    """What a run leaves, without the training; its folder. more: further keys of the record."""
    config = mhkd.Config(**settings)
    folder = out / f"{len(list(out.glob('*'))):03}"
    folder.mkdir(parents=True)
    (folder / "student.pt").write_bytes(weights)
    (folder / "teacher.pt").write_bytes(taught_by)
    content = {
        "name": folder.name, "config": {**config.recorded(), "processes": 1},
        "differs": json.loads(json.dumps(config.differs)), "data_sha256": data * 64,
        "teacher_sha256": mhkd_runs.sha256_of(folder / "teacher.pt") if config.teacher else None,
        "teacher_accuracy": 75.0 if config.teacher else None, "accuracy": accuracy,
        "class_accuracy": dict.fromkeys(classes, accuracy), "best_test_accuracy": 99.87,
        "best_test_epoch": 2, "epochs": config.epochs, "seconds": 60.0,
        "environments": [{"data": "some/photos", "teacher_weights": config.teacher_weights}],
        "student_sha256": mhkd_runs.sha256_of(folder / "student.pt"), **dict(more),
    }  # fmt: skip
    mhkd_runs.write_json(folder / "result.json", content)
    log = [
        {"epoch": i, "test_accuracy": accuracy + (i == 2), "train_accuracy": accuracy / 2 + i}
        for i in range(1, config.epochs + 1)
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in log))
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The report of what is in tmp_path, without pictures: its parts by heading."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def parts():
        text = mhkd_report.report(tmp_path)
        return dict(part.partition("\n")[::2] for part in re.split(r"^#+ ", text, flags=re.M)[1:])

    return parts


def rows_of(part):
    """The cells of a table by the first of each row."""
    lines = [line[1:-1].split("|") for line in part.splitlines() if line[:1] == "|"]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_differences_are_paired_over_common_seeds_with_errors_and_intervals(tmp_path, report):
    accuracies = {"ce": (35.70, 36.14, 35.68), "kd": (38.17, 38.55, 39.24, 50.0), "cc": (38, 39)}
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            record(tmp_path, accuracy, **PAIR, method=method, seed=seed)
    record(tmp_path, 39.0, **PAIR, method="mhkd", seed=3)
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert rows["teacher wrn_40_2"][0] == "75.00"
    # Of the last of 240 epochs; see record().
    assert rows["student alone"][:3] == ["35.84 (0.26)", "257.92 (0.13)", "3"]
    # Differences 2.47, 2.41, 3.56: mean 2.8133, deviation 0.6473, by sqrt(3) 0.3737, t 4.3027.
    assert rows["kd"][2:4] == ["4", "+2.81 ± 0.37 [+1.21, +4.42], n=3"]
    # Differences 2.30, 2.86: mean 2.58, error 0.28, t 12.7062.
    assert rows["cc"][3] == "+2.58 ± 0.28 [-0.98, +6.14], n=2"
    # One seed in common with kd, and so no interval; none with the student alone.
    assert rows["mhkd"] == ["39.00", "259.50", "1", "", "-11.00, n=1"]
    assert rows["cc"][4] == rows["kd"][4] == rows["student alone"][4] == ""
    assert (tmp_path / "report.md").read_text().startswith("# What has run")


def test_intervals_are_those_of_students_t():
    assert round(mhkd_report.students_t(0.975, 9), 4) == 2.2622
    assert round(mhkd_report.students_t(0.99375, 9), 4) == 3.1109
    assert round(mhkd_report.students_t(0.975, 1), 3) == 12.706
    for freedom in [*range(1, 40), 99, 10_000]:
        for p in (0.975, 0.99375):
            stats = pytest.importorskip("scipy.stats")
            exact = stats.t.ppf(p, freedom)
            assert mhkd_report.students_t(p, freedom) == pytest.approx(exact, rel=1e-6)
    mean, error, half = mhkd_report.interval([0.0, 1.0, 0.5], 0.9875)
    exact = stats.t.interval(0.9875, 2, 0.5, stats.sem([0, 1, 0.5]))
    assert (mean - half, mean + half) == pytest.approx(exact)


def test_differences_to_kd_are_those_to_the_kd_row_of_the_same_final_weights(tmp_path, report):
    equal = {"gamma": 1, "kd_weight": 1}
    accuracies = {
        ("kd", "{}"): 10.0, ("kd", json.dumps(equal)): 20.0, ("mhkd", "{}"): 10.5,
        ("mhkd", json.dumps(equal)): 21.0, ("mhkd", '{"gamma": 0.1, "kd_weight": 0.9}'): 10.7,
        ("mhkd", json.dumps({"tau": 2.0, **equal})): 25.0, ("mhkd", '{"alpha": 0.5}'): 25.0,
        ("crd+mhkd", "{}"): 11.0, ("crd+mhkd", json.dumps(equal)): 21.5, ("lsh", "{}"): 22.0,
        ("dhkd", "{}"): 22.5, ("fitnet", "{}"): 23.0, ("cc", '{"kd_weight": 0.5}'): 23.5,
        ("fitnet", '{"gamma": 0.1, "kd_weight": 0.9}'): 24.0, ("ce", "{}"): 5.0,
    }  # fmt: skip
    for (method, options), accuracy in accuracies.items():
        record(tmp_path, accuracy, **PAIR, method=method, options=json.loads(options))
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    assert "| minus student alone | minus kd of the same weights |" in part
    found = {name: cells[4] for name, cells in rows_of(part).items() if name != "---"}
    weights = ", gamma 1, kd_weight 1"
    assert {name: text for name, text in found.items() if text.startswith(("+", "-"))} == {
        "mhkd": "+0.50, n=1", f"mhkd{weights}": "+1.00, n=1", "crd+mhkd": "+1.00, n=1",
        "mhkd, gamma 0.1, kd_weight 0.9": "+0.70, n=1", f"crd+mhkd{weights}": "+1.50, n=1",
        "fitnet": "+3.00, n=1", "fitnet, gamma 0.1, kd_weight 0.9": "+14.00, n=1",
    }  # fmt: skip
    assert {"kd", f"kd{weights}", "lsh", "dhkd", "cc, kd_weight 0.5"} <= found.keys()


def test_options_of_a_users_own_terms_are_no_weights_of_the_final_outputs(
    tmp_path, report, monkeypatch
):
    class Own(mhkd.Method):
        options = {"tau": mhkd.Option(4.0, "of its term"), "alpha": mhkd.Option(0.9, "weight")}

        def own_terms(self, batch):
            return {"own": self.options.alpha * batch.student.logits.square().mean()}

    class Final(mhkd.Distillation):
        def final_terms(self, batch):
            return {"own": batch.student.logits.square().mean()}

    class Kept(mhkd.Distillation):
        def own_terms(self, batch):
            return {"own": batch.student.logits.square().mean()}

    class Alone(Own):
        options = {"alpha": mhkd.Option(0.3, "weight")}

    methods = {"own": Own, "final": Final, "kept": Kept, "alone": Alone}
    for method, kind in methods.items():
        monkeypatch.setitem(mhkd.METHODS, method, kind)
        more = {"final_options": mhkd_record.final_options(method)}
        record(tmp_path, 20.0, **PAIR, method=method, more=more)
    record(tmp_path, 10.0, **PAIR, method="kd")
    for method in methods:
        monkeypatch.delitem(mhkd.METHODS, method)
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    found = {name: cells[-1] for name, cells in rows_of(part).items()}
    assert found["kept"] == "+10.00, n=1"
    assert {found[name] for name in ("own", "final", "alone")} == {""}


def test_the_run_of_a_teachers_heads_is_no_row(tmp_path, report):
    record(tmp_path, 70.0, **PAIR, options={"teacher_heads": "pretrained"})
    heads = {"teacher": "wrn_40_2", "student": "wrn_40_2", "method": "heads", "epochs": 80}
    record(tmp_path, 75.0, **heads)
    parts = report()
    assert [part for part in parts if part.startswith("cifar100")] == [
        "cifar100: wrn_40_2 → wrn_16_2"
    ]
    assert [*rows_of(parts["All runs"])][2:] == ["000", "001"]


def test_rows_name_the_options_that_vary_and_the_recipe_those_in_common(tmp_path, report):
    for options in ({}, {"head_stride": 2}, {"units": (1,)}, {"units": (1, 2)}):
        record(tmp_path, 70.0, **PAIR, options={"head_width": 64, **options}, image_size=16)
    record(tmp_path, 70.0, student="wrn_16_2", method="ce", image_size=16)
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    assert "Different from the recipe: image_size 16, head_width 64; data dddddddd, 100" in part
    rows = ["student alone", "mhkd", "mhkd, head_stride 2", "mhkd, units 1", "mhkd, units 1,2"]
    assert [*rows_of(part)][3:] == rows  # below the header and the teacher


def test_what_is_of_other_data_another_teacher_or_recipe_is_not_compared(tmp_path):
    record(tmp_path, 70.0, student="wrn_16_2", method="ce")
    other_teacher = {"taught_by": b"u", "teacher_seed": 1}
    others = ({"data": "e"}, other_teacher, {"lr": 0.01})
    for settings in ({}, *others):
        record(tmp_path, 71.0, **PAIR, method="kd", **settings)
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert [[len(r.runs) for r in g.rows if r.method == "kd"] for g in groups] == [[1]] * 4
    # The network alone is in the groups of its data and recipe.
    without = [g for g in groups if not g.alone()]
    found = [(g.one["data_sha256"][0], g.common) for g in without]
    assert found == [("e", {}), ("d", {"lr": 0.01})]


def test_heads_at_other_units_are_rows_of_their_own_and_compared_with_kd(tmp_path, report):
    record(tmp_path, 70.0, **PAIR, method="kd")
    for units, accuracy in ((("a", "b", "c"), 71.0), (("d", "e", "f"), 72.0)):
        record(tmp_path, accuracy, **PAIR, method="mhkd", student_units=units, teacher_units=units)
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    found = {name: cells[-1] for name, cells in rows.items() if name.startswith("mhkd")}
    name = "mhkd, teacher_units {0}, student_units {0}".format
    assert found == {name("a,b,c"): "+1.00, n=1", name("d,e,f"): "+2.00, n=1"}


def test_runs_of_other_normalisation_are_not_compared_and_older_ones_had_the_data_sets(tmp_path):
    usual, other = ({"normalisation": {"mean": [m] * 3, "std": [1] * 3}} for m in (0.5, 0.4))
    record(tmp_path, 70.0, student="wrn_16_2", method="ce")  # of before it was recorded
    record(tmp_path, 71.0, student="wrn_16_2", method="ce", seed=1, more=usual)
    for seed, more in enumerate(({}, usual, other)):
        more = {**more, "differs": {"teacher_weights": "e3b98a4d"}}
        record(tmp_path, 72.0, **PAIR, method="kd", seed=seed, more=more)
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    rows = [{row.name: [*row.runs] for row in group.rows} for group in groups]
    assert rows == [{"student alone": [0, 1], "kd": [0, 1]}, {"kd": [2]}]


def test_runs_of_given_normalisation_are_not_the_rule_for_older_records(tmp_path):
    own, given = ({"normalisation": {"mean": [m] * 3, "std": [1] * 3}} for m in (0.5, 0.1))
    record(tmp_path, 60.0, student="wrn_16_2", method="ce")
    record(tmp_path, 62.0, **PAIR, method="kd", more=own)
    with_mean = {"mean": (0.1,) * 3, "std": (1.0,) * 3}
    record(tmp_path, 75.0, **PAIR, method="mhkd", **with_mean, more=given)
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert [[row.name for row in group.rows] for group in groups] == [["student alone", "kd"], [
        "mhkd"]]  # fmt: skip


def test_runs_from_different_initial_weights_are_not_one_row(tmp_path):
    for seed, sha256 in enumerate("xy"):
        record(tmp_path, 50.0 + seed, student="wrn_16_2", method="ce", seed=seed,
            student_init="file:init.pt", more={"student_init_sha256": sha256 * 64})  # fmt: skip
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert [len(row.runs) for group in groups for row in group.rows] == [1, 1]


def test_runs_of_changed_code_are_not_one_row_and_their_size_is_left_out(tmp_path, report):
    net, lines = tmp_path / "net.py", ["from torch.nn import Flatten, Linear, Sequential", ""]
    lines += ["def f(classes):", "    return Sequential(Flatten(), Linear(3072, classes))"]
    net.write_text("\n".join(lines))
    ours = mhkd_code.code_sha256([net])
    for seed, sha256 in enumerate(["x" * 64, ours, ours]):
        more = {"student_code_sha256": sha256}
        record(tmp_path, 50.0 + seed, student=f"{net}:f", method="ce", seed=seed, more=more)
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert [len(row.runs) for group in groups for row in group.rows] == [1, 2]
    networks = [line.split(" | ") for line in report()["Networks"].splitlines() if "net.py" in line]
    assert [line[1] for line in networks] == ["", "0.307 M"]


def test_runs_with_other_heads_of_the_teacher_or_a_changed_method_are_not_one_row(tmp_path):
    for seed, sha256 in enumerate("ab"):
        heads, code = ({f"{n}_sha256": sha256 * 64} for n in ("teacher_heads", "method_code"))
        record(tmp_path, 50.0, **PAIR, method="mhkd", seed=seed, more=heads)
        record(tmp_path, 50.0, **PAIR, method="kd", seed=seed, more=code)  # of two versions
    own = record(tmp_path, 50.0, **PAIR, method="kd", seed=2, more=code) / "result.json"
    for sha256 in "cd":  # of a user's method
        content = mhkd_runs.read_json(own)
        content["config"]["method"], content["method_code_sha256"] = "own", sha256 * 64
        (tmp_path / sha256).mkdir()
        mhkd_runs.write_json(tmp_path / sha256 / "result.json", content)
    (group,) = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    rows = {row.name: len(row.runs) for row in group.rows}
    of_heads = {"mhkd (aaaaaaaa)": 1, "mhkd (bbbbbbbb)": 1}
    assert rows == {"kd": 3, **of_heads, "own (cccccccc)": 1, "own (dddddddd)": 1}


def test_an_option_that_an_older_record_lacks_has_its_default(tmp_path, report):
    old = record(tmp_path, 60.0, **PAIR, method="mhkd")
    content = mhkd_runs.read_json(old / "result.json")
    del content["config"]["options"]["head_ce"]
    mhkd_runs.write_json(old / "result.json", content)
    record(tmp_path, 65.0, **PAIR, method="mhkd", seed=1, options={"head_ce": 0.0})
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert rows["mhkd"][0] == "60.00" and rows["mhkd, head_ce 0"][0] == "65.00"


def test_the_papers_tables_show_each_teacher_and_the_views_by_themselves(tmp_path, report):
    for seed, accuracy, teacher, views in (
        (0, 70.0, b"a", {}), (0, 74.0, b"b", {}), (1, 75.0, b"b", {}),
        (0, 71.0, b"b", {"view_seed": 5}),
    ):  # fmt: skip
        record(tmp_path, accuracy, taught_by=teacher, **PAIR, method="kd", seed=seed, **views)
    cell = rows_of(report()[tables.TABLES["table1"].title])["kd"][0]
    a, b = (hashlib.sha256(content).hexdigest()[:8] for content in (b"a", b"b"))
    assert cell == (
        f"70.00, n=1 (teacher {a}); 74.50 (0.71), n=2 (teacher {b}); "
        f"71.00, n=1 (teacher {b}, view_seed 5) / 74.92"
    )


def test_a_teachers_run_makes_no_group_and_a_network_alone_does(tmp_path, report):
    record(tmp_path, 75.0, student="wrn_40_2", method="ce", weights=b"t")
    record(tmp_path, 71.0, **PAIR, method="kd")
    for accuracy in (60.0, 61.0):  # the same seed
        record(tmp_path, accuracy, student="vgg8", method="ce")
    parts = report()
    groups = ["cifar100: wrn_40_2 → wrn_16_2", "cifar100: vgg8 alone"]
    assert [part for part in parts if part.startswith("cifar100")] == groups
    assert rows_of(parts[groups[1]])["student alone"] == ["60.00", "270.00", "1"]
    assert parts["Not used"].count("is not compared") == 1
    assert "'003' is not compared: its settings and seed are those of '002'" in parts["Not used"]


def test_the_papers_tables_have_our_figures_beside_its_own(tmp_path, report):
    record(tmp_path, 75.5, student="wrn_40_2", method="ce", weights=b"t")
    for seed, accuracy in enumerate((74.0, 75.0, 75.6)):
        record(tmp_path, accuracy, **PAIR, method="kd", seed=seed)
    for options, accuracy in (({}, 75.38), ({"units": (2,)}, 75.01), ({"units": (1, 2)}, 1.0)):
        record(tmp_path, accuracy, **PAIR, options=options)
    parts = report()
    one, two = (rows_of(parts[tables.TABLES[name].title]) for name in ("table1", "table2"))
    assert one["kd"] == ["74.87 (0.81), n=3 / 74.92", *(f"– / {x}" for x in KD)]
    assert one["mhkd"][0] == "75.38, n=1 / 75.28(0.26)"
    # The teacher of the runs, not a mean of networks alone.
    assert (one["teacher"][0], one["ce"][0]) == ("75.00 / 75.61", "– / 73.26")
    assert two["mhkd:2"][0] == "75.01, n=1 / 75.16(0.15)" and two["mhkd:1"][0][0] == "–"
    assert not any("SVHN" in heading for heading in parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2}, {"subset": 1000}, {"image_size": 16}, {"precision": "bfloat16"},
        {"options": {"tau": 2.0}}, {"dataset": "cifar10"}, {"dataset": "digits"},
        {"dataset": "folder", "classes": list("abcde")}, {"classes": list("abcde")},
        {"dataset": "folder"}, {"classes": [f"class {i}" for i in range(100)]},
    ],
    ids=str,
)  # fmt: skip
def test_other_recipes_and_other_images_are_in_no_table_of_the_paper(settings, tmp_path, report):
    record(tmp_path, 70.0, **PAIR, method="kd", **settings)
    parts = report()
    assert not any("Table" in heading or "paper" in heading for heading in parts)
    assert len(parts) == 4  # the runs themselves are there
    record(tmp_path, 70.0, **PAIR, method="kd")
    assert any("Table 1" in heading for heading in report())


def test_what_is_damaged_or_not_of_its_record_is_named_and_stops_nothing(tmp_path, report):
    damage = {
        "result.json": [b"{", b"\xff\xfe", b"[]", b'{"name": "old"}'],
        "log.jsonl": [b'{"epoch": 1', b"", b"7\n", b"\x00\xff"],
        "student.pt": [b"of another run"],
    }
    named = []
    for name, contents in damage.items():
        for seed, content in enumerate(contents):
            path = record(tmp_path, 70.0, **PAIR, method="kd", seed=seed) / name
            path.write_bytes(content)
            named.append(path)
    old = record(tmp_path, 98.0, **PAIR, method="kd") / "result.json"
    content = json.loads(old.read_text())
    del content["config"]["options"]
    mhkd_runs.write_json(old, content)  # intact, of another version
    (record(tmp_path, 70.0, **PAIR, method="kd", seed=8) / "student.pt").unlink()
    parts = report()
    assert [str(p) for p in (*named[:8], old) if str(p) not in parts["Not used"]] == []
    assert "2 of these runs are without the student.pt of the record: 008, 010" in parts["All runs"]
    assert len(rows_of(parts["All runs"])) == 2 + 4 + 2


@pytest.mark.parametrize("name, value", [
    ("environments", []), ("environments", [1]), ("accuracy", None), ("accuracy", "70"),
    ("seconds", None), ("differs", []), ("teacher_accuracy", None), ("config", 7), ("epochs", 1.5),
    ("seed", None), ("options", 7), ("method", None), ("class_accuracy", 5), ("student", None),
    ("normalisation", None), ("teacher_heads_sha256", 7), ("init_sha256", [1]), ("image_size", [1]),
    ("teacher", 1.5),
])  # fmt: skip
def test_a_record_with_an_impossible_value_is_named_and_stops_nothing(
    name, value, tmp_path, report
):
    record(tmp_path, 70.0, **PAIR, method="kd")
    path = record(tmp_path, 70.0, **PAIR, method="kd", seed=1) / "result.json"
    content = json.loads(path.read_text())
    of_config = {"seed", "options", "method", "student", "teacher", "image_size"}
    (content["config"] if name in of_config else content)[name] = value
    mhkd_runs.write_json(path, content)
    parts = report()
    assert f"'{path}' is damaged" in parts["Not used"] and name in parts["Not used"]
    assert len(rows_of(parts["All runs"])) == 2 + 1


def test_a_run_without_its_log_counts_and_that_is_said(tmp_path, report):
    (record(tmp_path, 70.0, **PAIR, method="kd") / "log.jsonl").unlink()
    parts = report()
    assert "the run counts, its curve is left out" in parts["Not used"]
    assert "70.00" in parts["cifar100: wrn_40_2 → wrn_16_2"]


def test_a_report_of_nothing_or_into_a_folder_that_cannot_be_written_is_a_sentence(
    tmp_path, capsys
):
    assert tables.main(["report", str(tmp_path)]) == 1
    assert "there is no finished run" in capsys.readouterr().err
    record(tmp_path, 70.0, **PAIR, method="kd")
    (tmp_path / "report.md").mkdir()
    assert tables.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "report.md' could not be written" in error


def test_each_group_has_a_picture_of_its_own_at_200_dpi(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    for method, seed in itertools.product(("ce", "kd", "mhkd"), (0, 1)):
        record(tmp_path, 70.0 + seed, **PAIR, method=method, seed=seed)
        record(tmp_path, 50.0 + seed, **PAIR, method=method, seed=seed, epochs=1, subset=64)
    damaged = record(tmp_path, 40.0, **PAIR, method="cc", epochs=1, subset=64)
    (damaged / "log.jsonl").write_text("{")
    record(tmp_path, 40.0, student="vgg8", method="ce")  # nothing to compare
    text = mhkd_report.report(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    pair = "cifar100-wrn_40_2-wrn_16_2"
    assert names == [f"{pair}-1.png", f"{pair}-2.png"]
    assert all(f"({name})" in text for name in names)
    assert {image.imread(tmp_path / name).shape[1] for name in names} == {1400}


def test_classes_without_test_images_count_and_missing_initial_weights_do_not_stop_the_report(
    tmp_path,
):
    torch.save(mhkd.build_model("resnet8", 10).state_dict(), tmp_path / "w.pth")
    settings = {"teacher": "resnet14", "student": "resnet8", "dataset": "digits", "method": "kd"}
    settings |= {"student_init": f"file:{tmp_path}/w.pth", "test_subset": 3, "epochs": 2}
    out = tmp_path / "runs"
    record(out, 80.0, classes=["1", "7"], more={"classes": 10}, **settings)
    (tmp_path / "w.pth").unlink()
    text = mhkd_report.report(out)
    assert "10 classes" in text and "0.078 M" in text


def test_the_report_of_one_main_job_names_the_two_commands_that_complete_it(tmp_path):
    settings = {"image_size": 16, "subset": 64, "flip": False, "lr_steps": (100, 200), "seed": 3}
    options = {"gamma": 0.5, "tau": 2.0, "head_width": 8}
    weights = {"teacher_weights": "a folder/teacher.pt"}
    used = {"normalisation": {"mean": [0.25, 0.5, 0.75], "std": [0.5, 0.5, 0.5]}}
    record(tmp_path, 70.0, **PAIR, **settings, **weights, options=options, more=used)
    text = mhkd_report.report(tmp_path)
    commands = re.findall(r"^    python mhkd\.py (.*)$", text, re.MULTILINE)
    alone, kd = map(configured, commands)
    student = {**settings, "student": "wrn_16_2", "data": "some/photos", "out": str(tmp_path)}
    normalisation = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)}  # the teacher's
    assert alone == mhkd.Config(**student, **normalisation, method="ce")
    taught = {**student, **weights, "teacher": "wrn_40_2", "method": "kd"}
    assert kd == mhkd.Config(**taught, options={"gamma": 0.5, "tau": 2.0})
    part = text.partition("## cifar100: wrn_40_2 → wrn_16_2")[2].partition("These commands")[0]
    rows = rows_of(part)  # no column is empty, and there is no picture
    assert rows[""] == ["test accuracy, %", "train accuracy, %", "n"]
    assert rows["mhkd, gamma 0.5"] == ["70.00", "275.00", "1"]
    assert "png" not in text and not list(tmp_path.glob("*.png"))
    for config in (alone, kd):
        arguments = {k: v for k, v in config.arguments().items() if k not in ("out", "data")}
        record(tmp_path, 69.0, **arguments, more=used)
    complete = mhkd_report.report(tmp_path)
    assert "python mhkd.py" not in complete
    assert rows_of(complete)["mhkd, gamma 0.5"][3:] == ["+1.00, n=1", "+1.00, n=1"]


def test_the_commands_that_complete_have_the_processes_and_leave_out_what_is_there(tmp_path):
    distributed = mhkd.Config(**PAIR, method="lsh")
    config = {"config": {**distributed.recorded(), "processes": 2}}
    record(tmp_path, 70.0, **PAIR, method="lsh", more=config)
    commands = mhkd_report.report(tmp_path).partition("These commands")[2].splitlines()[2:4]
    launcher = "    torchrun --nproc_per_node 2 mhkd.py --method "
    assert [line.startswith(launcher + m) for m, line in zip(("ce", "kd"), commands)] == [True] * 2
    kd = mhkd.Config(**PAIR, method="kd")
    record(tmp_path, 69.0, **PAIR, method="kd",
        more={"config": {**kd.recorded(), "processes": 2}})  # fmt: skip
    text = mhkd_report.report(tmp_path).partition("These commands")[2]
    assert launcher + "ce" in text and "--method kd" not in text


def test_kd_with_the_views_of_the_row_completes_the_comparison(tmp_path):
    record(tmp_path, 69.0, **PAIR, method="kd", view_seed=0)
    record(tmp_path, 70.0, **PAIR, method="mhkd", teacher_views=2)
    text = mhkd_report.report(tmp_path).partition("These commands")[2]
    assert "--method kd" in text and "--teacher-views 2" in text


def test_runs_of_other_views_are_rows_of_their_own_and_are_compared(tmp_path, report):
    shared = "kd" + tables.EQUAL + ":teacher_store=float32"
    names = ["kd" + tables.EQUAL, shared, shared + ":teacher_views=16"]
    study(tmp_path, {name: [30 + i, 30.4 + i, 30.2 + i] for i, name in enumerate(names)})
    text = "\n".join(report().values())
    rows = [line for line in text.splitlines() if line.startswith("| kd, ")]
    assert ["view_seed 0" in row for row in rows] == [False, True, True]
    assert [row.count("| 3 |") for row in rows] == [1, 1, 1]
    claims = [line for line in text.splitlines() if " above " in line and "view_seed" in line]
    assert len(claims) == 2 and all("+1.00" in claim for claim in claims)
    bases = [claim.partition(" above ")[2].partition("|")[0] for claim in claims]
    assert sorted(base.count("view_seed") for base in bases) == [0, 1]


@pytest.mark.parametrize(
    "settings, counts",
    [
        ({"teacher_store": "float32"}, True),
        ({"teacher_store": "float32", "teacher_views": 8}, False),
    ],
)
def test_runs_with_a_store_count_for_the_papers_tables_and_with_fewer_views_not(
    tmp_path, report, settings, counts
):
    record(tmp_path, 75.0, teacher="vgg13", student="vgg8", method="kd", **settings)
    assert ("75.00, n=1 / 72.98" in str(report())) is counts


def test_rows_are_compared_with_the_student_alone_on_the_same_views(tmp_path, report):
    for store, alone, taught in ((None, 50.0, 53.0), ("float32", 40.0, 44.0)):
        record(tmp_path, alone, **PAIR, method="ce", teacher_store=store)
        record(tmp_path, taught, **PAIR, method="kd", teacher_store=store)
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert (rows["kd"][3], rows["kd, view_seed 0, teacher_store float32"][3]) == (
        "+3.00, n=1",
        "+4.00, n=1",
    )


def test_the_train_accuracy_is_that_of_the_epoch_whose_student_is_kept(tmp_path):
    for more, wanted in (({}, 38.0), ({"kept_epoch": 3}, 38.0), ({"kept_epoch": 1}, 36.0)):
        record(tmp_path / str(wanted), 70.0, **PAIR, method="kd", epochs=3, more=more)
        runs, unusable = mhkd_report.read_runs(tmp_path / str(wanted))
        assert runs[0]["train_accuracy"] == wanted and not unusable


def test_the_best_test_accuracy_is_not_shown(tmp_path, report):
    record(tmp_path, 70.0, **PAIR, method="kd", epochs=3)
    record(tmp_path, 70.0, **PAIR, method="mhkd", epochs=3)
    text = str(report())
    assert "99.87" not in text and "71.0" not in text


def study(out, accuracies, pair=tables.PAIR_A, **changes):
    """Records of the study: accuracies by seed of each row."""
    for row, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            config = tables.config_of(pair, row, seed, {**tables.STUDY_STUDENT, **changes})
            record(out, accuracy, **config.arguments())


def test_the_claims_of_the_study_are_decided_by_the_intervals_of_its_protocol(tmp_path, report):
    stats = pytest.importorskip("scipy.stats")
    equal, pretrained = tables.EQUAL, tables.PRETRAINED
    kd = [33.0, 32.5, 33.5, 33.2, 32.8, 33.1, 32.9, 33.3, 33.0, 32.7]
    gain = [1.0, 1.4, 0.7, 1.2, 0.9, 1.1, 1.3, 0.8, 1.0, 1.2]
    noise = [0.5, -0.4, 0.3, -0.5, 0.4, -0.3, 0.2, -0.2, 0.6, 0.1]
    best = [a + b for a, b in zip(kd, gain)]
    study(tmp_path, {
        "ce": [24.0, 24.4, 24.1], "kd": kd, "kd" + equal: kd,
        "mhkd" + pretrained: [a - b for a, b in zip(kd, gain)], "mhkd" + pretrained + equal: best,
        "mhkd" + equal: [a + b for a, b in zip(kd, noise)],
        "mhkd:units=2" + tables.BEST: [value - 1 for value in best[:5]], "lsh": [35.0],
    })  # fmt: skip
    study(tmp_path, {"ce": [20.0, 21.0], "kd": [30.0, 31.5]}, tables.PAIR_B)
    study(tmp_path, {"kd": [1.0, 2.0], "ce": [9.0, 9.0]}, epochs=30)  # is not of the study
    rows = rows_of(report()["Claims of the second study"])
    primary = {name: cells for name, cells in rows.items() if name.startswith("primary: ")}
    verdicts = {name.removeprefix("primary: "): cells[2] for name, cells in primary.items()}
    assert verdicts == {
        "MHKD (pretrained) above KD, both 1/1": "supported",
        "MHKD (pretrained) above KD, both 0.1/0.9": "contradicted",
        "MHKD (scratch) above KD, both 1/1": "undecided",
        "MHKD pretrained above scratch, both 1/1": "supported",
    }
    n, text, _ = primary["primary: MHKD (pretrained) above KD, both 1/1"]
    low, high = stats.t.interval(1 - 0.05 / 4, 9, sum(gain) / 10, stats.sem(gain))
    assert n == "10" and text.endswith(f" [{low:+.2f}, {high:+.2f}]")
    secondary = {name: cells for name, cells in rows.items() if name.startswith(("res", "shuf"))}
    weights = "gamma 1, kd_weight 1"
    low, high = stats.t.interval(0.95, 1, 10.25, stats.sem([10.0, 10.5]))
    assert secondary["shufflenetv2: kd above student alone"] == [
        "2", f"+10.25 ± 0.25 [{low:+.2f}, {high:+.2f}]", "supported"
    ]  # fmt: skip
    assert secondary["resnet8: lsh above student alone"] == ["1", "+11.00", "undecided"]
    three = f"mhkd, {weights}, teacher_heads pretrained"
    single = [name for name in secondary if name.startswith(f"resnet8: {three} above mhkd, ")]
    assert len(single) == 1 and "units 2" in single[0] and secondary[single[0]][0] == "5"
    # The primary claims are not repeated, and lsh has no row of the same weights.
    assert not any(f"{three} above kd" in name or "lsh above kd" in name for name in secondary)
    low, high = stats.t.interval(0.95, 9, sum(gain) / 10, stats.sem(gain))
    best = secondary[f"resnet8: best mhkd ({three}) above best kd (kd, {weights})"]
    assert best[0] == "10" and best[1].endswith(f" [{low:+.2f}, {high:+.2f}]")


def test_the_best_row_is_one_of_those_with_the_most_seeds(tmp_path, report):
    equal = "kd" + tables.EQUAL
    accuracies = {equal: [33.0, 33.1, 33.2], "mhkd" + tables.BEST: [34.0, 34.2, 34.1]}
    study(tmp_path, accuracies | {"mhkd:head_ce=0" + tables.BEST: [39.0]})
    rows = rows_of(report()["Claims of the second study"])
    (best,) = [name for name in rows if "best mhkd" in name]
    assert "head_ce" not in best and rows[best][0] == "3"
    (group,) = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert {len(row.runs) for row in mhkd_report.best_rows(group.rows).values()} == {3}


def test_claims_name_the_teacher_if_there_are_several(tmp_path, report):
    for teacher, accuracy in ((b"t", 35.0), (b"u", 31.0)):
        for seed in range(10):
            for row, value in (("kd", 33.0), ("mhkd", accuracy + 0.1 * seed)):
                row += tables.EQUAL
                config = tables.config_of(tables.PAIR_A, row, seed, tables.STUDY_STUDENT)
                record(tmp_path, value, taught_by=teacher, **config.arguments())
    rows = rows_of(report()["Claims of the second study"])
    for teacher, verdict in ((b"t", "supported"), (b"u", "contradicted")):
        sha256 = hashlib.sha256(teacher).hexdigest()[:8]
        claim = f"primary: MHKD (scratch) above KD, both 1/1 (teacher {sha256}, data dddddddd)"
        assert rows[claim][2] == verdict


def test_claims_need_the_teacher_and_the_rows_of_the_protocol(tmp_path, report):
    two = {"kd" + tables.EQUAL: [33.0, 33.5], "mhkd" + tables.EQUAL: [34.0, 34.4]}
    study(tmp_path, two)
    study(tmp_path, {"mhkd:beta=3" + tables.EQUAL: [50.0, 51.0]})  # in no row of the protocol
    study(tmp_path, {"fitnet+mhkd" + tables.BEST: [38.0, 38.6]})
    part = report()["Claims of the second study"]
    assert "beta" not in part and "run is not here" in part
    verdicts = {cells[2] for name, cells in rows_of(part).items() if "fitnet+mhkd" in name}
    assert verdicts == {"exploratory"}
    record(tmp_path, 55.0, weights=b"t", **tables.STUDY_TEACHER)
    part = report()["Claims of the second study"]
    claim = "primary: MHKD (scratch) above KD, both 1/1"
    assert "Teacher" not in part and rows_of(part)[claim][0] == "2"


def test_other_teachers_make_no_claims_and_whole_numbers_are_numbers(tmp_path, report):
    for teacher in ("resnet110", "timm:resnet18"):
        settings = {**tables.STUDY_STUDENT, "options": {}, "teacher": teacher, "student": "resnet8"}
        record(tmp_path, 30.0, b"u", **settings, method="kd", teacher_weights="t.pt")
    assert "Claims of the second study" not in report()
    pair = {"teacher": "wrn_16_2", "student": "resnet8", "method": "kd", **tables.STUDY_STUDENT}
    for seed, one in enumerate((1, 1.0)):
        record(tmp_path, 31.0, **{**pair, "options": {"gamma": one, "kd_weight": one}}, seed=seed)
        record(tmp_path, 30.0, **{**pair, "options": {}}, seed=seed)
        record(
            tmp_path, 20.0, **{**pair, "teacher": None, "method": "ce", "options": {}}, seed=seed
        )
    part = report()["Claims of the second study"]
    found = [
        cells[0] for name, cells in rows_of(part).items() if "kd, gamma 1, kd_weight 1" in name
    ]
    assert found == ["2"] and "Not the same" not in report()["cifar100: wrn_16_2 → resnet8"]


def test_students_of_a_teacher_with_other_settings_do_not_count(tmp_path, report):
    study(tmp_path, {"kd" + tables.EQUAL: [33.0, 33.5], "mhkd" + tables.EQUAL: [34.0, 34.4]})
    record(tmp_path, 21.0, weights=b"t", **{**tables.STUDY_TEACHER, "subset": 5000})
    part = report()["Claims of the second study"]
    assert "its students do not count" in part and "primary" not in part.partition("Teacher")[2]


def test_claims_count_only_seeds_device_and_loss_of_the_protocol(tmp_path, report):
    where = [
        {"environments": [{"data": "d", **place}]}
        for place in (
            {"device": "cpu", "loss": "reference"},
            {"device": "cuda"},
            {"loss": "fused (CPU avx2)"},
        )
    ]
    for row, gain in (("kd", 0.0), ("mhkd", 1.0)):
        row += tables.EQUAL
        for seed, more in [(s, where[0]) for s in (*range(7), *range(100, 110))] + [
            (7, where[1]),
            (8, where[2]),
        ]:
            config = tables.config_of(tables.PAIR_A, row, seed, tables.STUDY_STUDENT)
            record(tmp_path, 33.0 + gain + seed % 2, **config.arguments(), more=more)
    rows = rows_of(report()["Claims of the second study"])
    assert rows["primary: MHKD (scratch) above KD, both 1/1"][::2] == ["7", "incomplete"]


def test_what_rows_do_not_show_is_said_below_the_table(tmp_path, report):
    places = [{"hardware": "A", "torch": "2.14.1"}, {"hardware": "B", "torch": "2.14.1"}]
    for seed, place in enumerate(places):
        for method in ("ce", "kd"):
            more = {"environments": [{"data": "d", **place}], "method_code_sha256": "1" * 64}
            more["initial_weights" if seed else "init_sha256"] = f"{seed}{method if seed else ''}"
            teacher = PAIR["teacher"] if method == "kd" else None
            who = {"teacher": teacher, "student": "wrn_16_2", "method": method, "seed": seed}
            record(tmp_path, 50.0, **who, more=more)
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    assert "Not the same in all runs: hardware (A, B).\n" in part
    assert "Not paired: with seed 1 the initial weights differ." in part


def test_versions_and_code_that_vary_are_said(tmp_path, report):
    commits = ["1" * 40, "1" * 40 + " with changes"]
    for seed, (commit, timm, compiled, tau) in enumerate(
        zip(commits, ("0.9", "1.0"), (False, True), (4.0, 3.0))
    ):
        place = {"data": "d", "commit": commit, "timm": timm, "compile": compiled}
        more = {"environments": [place], "teacher_accuracy": 75.0 - seed}
        path = record(tmp_path, 50.0, **PAIR, method="kd", seed=seed, more=more) / "result.json"
        content = json.loads(path.read_text())
        content["config"]["options"]["tau"] = tau  # its default has changed between the versions
        mhkd_runs.write_json(path, content)
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    (line,) = [line for line in part.splitlines() if line.startswith("Not the same in all runs")]
    texts = ["timm (0.9, 1.0)", "compile (False, True)", "commit (11111111, 11111111 with changes)"]
    texts += ["accuracy of the teacher (74.00 %, 75.00 %)", "in kd tau 3 or tau 4"]
    assert [text for text in texts if text not in line] == []
    assert "not committed" not in part


def test_changes_that_are_not_committed_are_said(tmp_path, report):
    place = {"data": "d", "commit": "1" * 40 + " with changes"}
    record(tmp_path, 50.0, **PAIR, method="kd", more={"environments": [place]})
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    assert "The code has changes that were not committed" in part and "Not the same" not in part


def test_a_difference_from_another_row_than_expected_names_it(tmp_path, report):
    record(tmp_path, 40.0, **PAIR, method="ce", view_seed=7)
    record(tmp_path, 45.0, **PAIR, method="kd", teacher_store="float32")
    record(tmp_path, 47.0, **PAIR, method="kd", teacher_store="float16")
    record(tmp_path, 48.0, **PAIR, method="mhkd", teacher_store="float16",
        options={"teacher_heads": "pretrained"})  # fmt: skip
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    kd = "kd, view_seed 0, teacher_store float32"
    # Rows of kd have no row of kd to compare with; float16 is compared with float16.
    assert rows[kd][3:] == ["+5.00, n=1 (minus student alone, view_seed 7)", ""]
    (mhkd_row,) = [cells for name, cells in rows.items() if name.startswith("mhkd")]
    assert mhkd_row[4] == "+1.00, n=1"


def test_settings_that_differ_little_are_rows_of_their_own(tmp_path, report):
    for seed, tau in enumerate((4.0000001, 4.0000002)):
        record(tmp_path, 50.0, **PAIR, method="kd", seed=seed, options={"tau": tau})
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert {"kd, tau 4.0000001", "kd, tau 4.0000002"} < rows.keys()


def test_the_papers_tables_average_no_runs_of_other_data_or_normalisation(tmp_path, report):
    for data, accuracy, mean in (("d", 73.0, 0.4), ("e", 60.0, 0.4), ("e", 50.0, 0.5)):
        used = {"normalisation": {"mean": [mean] * 3, "std": [0.25] * 3}}
        record(tmp_path, accuracy, **PAIR, method="kd", data=data, more=used)
    cell = rows_of(report()[tables.TABLES["table1"].title])["kd"][0]
    assert [part.partition(",")[0] for part in cell.split("; ")] == ["73.00", "60.00", "50.00"]
    assert "data dddddddd" in cell and "mean 0.5,0.5,0.5" in cell


def test_the_networks_of_two_recipes_are_two_lines_that_say_so(tmp_path, report):
    for epochs in (3, 60):
        record(tmp_path, 33.0, student="vgg8", method="ce", epochs=epochs)
    lines = [line for line in report()["Networks"].splitlines() if "vgg8" in line]
    assert ["epochs 3," in line for line in lines] == [True, False]
    assert ["epochs 60," in line for line in lines] == [False, True]


def test_claims_need_runs_of_the_study_and_count_the_seeds_so_far(tmp_path, report):
    study(tmp_path, {"ce": [24.0, 24.1]})
    assert "Claims of the second study" not in report()
    study(tmp_path, {"kd": [33.0, 33.5], "mhkd" + tables.PRETRAINED: [34.0]})
    rows = rows_of(report()["Claims of the second study"])
    assert rows["primary: MHKD (pretrained) above KD, both 0.1/0.9"] == ["1", "+1.00", "incomplete"]
    assert rows["primary: MHKD (scratch) above KD, both 1/1"] == ["0", "–", "incomplete"]
    nine = {
        "kd" + tables.EQUAL: [33.0, 33.5, 33.1] * 3,
        "mhkd" + tables.EQUAL: [35.0, 35.6, 35] * 3,
    }
    study(tmp_path, nine)  # its interval excludes 0, but the protocol decides with ten seeds
    rows = rows_of(report()["Claims of the second study"])
    assert rows["primary: MHKD (scratch) above KD, both 1/1"][::2] == ["9", "incomplete"]


def test_the_records_of_the_first_study_can_be_read(tmp_path):
    kept = ROOT / "results/first-study"
    if not kept.is_dir():
        pytest.skip("only in the repository")
    runs, unusable = mhkd_report.read_runs(kept)
    assert not unusable and len(runs) >= 82
    group = next(group for group in mhkd_report.group_runs(runs) if len(group.rows) > 5)
    differences = group.differences(group.kd_of)
    assert mhkd_report.estimate(differences["mhkd"]) == "-0.09 ± 0.12 [-0.36, +0.18]"
    assert {"fitnet", "crd", "lsh", "student alone"}.isdisjoint(differences)
    assert "crd+mhkd" in differences and mhkd_report.claims(runs) == ""


def test_unlabelled_images_are_in_the_name_of_a_row_which_is_compared_with_kd_on_the_same(
    tmp_path, report
):
    settings = {**PAIR, "dataset": "folder"}
    for method, accuracy, number in (
        ("ce", 60.0, 0), ("kd", 62.0, 0), ("kd", 65.0, 500), ("mhkd", 66.0, 500),
    ):  # fmt: skip
        folder = record(tmp_path, accuracy, **settings, method=method)
        content = mhkd_runs.read_json(folder / "result.json")
        if number:
            content |= {"unlabelled_sha256": "u" * 64}
            content["differs"]["unlabelled"] = number
            content["environments"][0]["unlabelled"] = "some/unlabelled"
        mhkd_runs.write_json(folder / "result.json", content)
    rows = rows_of(report()["folder 'photos': wrn_40_2 → wrn_16_2"])
    assert rows["kd, unlabelled 500"][3] == "+5.00, n=1"
    assert rows["mhkd, unlabelled 500"][3:] == ["+6.00, n=1", "+1.00, n=1"]
    assert rows["kd"][3:] == ["+2.00, n=1", ""]


def test_runs_with_different_unlabelled_images_are_not_one_row(tmp_path, report):
    for seed, of in enumerate("uvv"):
        folder = record(tmp_path, 60.0 + seed, **PAIR, method="kd", seed=seed)
        content = mhkd_runs.read_json(folder / "result.json") | {"unlabelled_sha256": of * 64}
        content["differs"]["unlabelled"] = 500
        mhkd_runs.write_json(folder / "result.json", content)
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert rows[f"kd, unlabelled 500 ({'u' * 8})"][0] == "60.00"
    assert rows[f"kd, unlabelled 500 ({'v' * 8})"][0] == "61.50 (0.71)"


def test_the_command_for_the_student_alone_has_the_normalisation_of_a_pretrained_teacher(tmp_path):
    settings = {"teacher": "torchvision:resnet18", "teacher_init": "pretrained"}
    used = {"normalisation": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    record(tmp_path, 70.0, **settings, student="resnet8", method="kd", more=used)
    (alone,) = re.findall(r"^    python mhkd\.py (.*)$", mhkd_report.report(tmp_path), re.MULTILINE)
    assert configured(alone).mean == (0.485, 0.456, 0.406)
    arguments = {k: v for k, v in configured(alone).arguments().items() if k not in ("out", "data")}
    record(tmp_path, 60.0, **arguments, more=used)
    (group,) = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    assert group.differences(group.alone) == {"kd": [10.0]}


def test_the_commands_that_complete_a_comparison_name_the_unlabelled_images_for_kd_alone(tmp_path):
    settings = {**PAIR, "dataset": "folder"}
    folder = record(tmp_path, 66.0, **settings, method="mhkd")
    content = mhkd_runs.read_json(folder / "result.json")
    content["environments"][0]["unlabelled"] = "some/unlabelled"
    mhkd_runs.write_json(folder / "result.json", content)
    text = mhkd_report.report(tmp_path)
    alone, kd = re.findall(r"^    (python mhkd\.py .*)$", text, re.MULTILINE)
    assert "--unlabelled" not in alone and "--unlabelled some/unlabelled" in kd
