"""The paper's tables and the study: what is run for them, and how it is reported."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import mhkd
import mhkd_tables as tables

PAPERS_FIGURES = {"table1": 5 * 9, "table2": 2 * 8, "table3": 5 * 7}  # counted on the page
PAIR = {"teacher": "wrn_40_2", "student": "wrn_16_2"}
KD = ("70.67", "72.98", "67.37", "74.45")  # the paper's, of the other pairs
CIFAR = ["aquarium_fish", *(f"class {i}" for i in range(99))]


def configured(text):
    return mhkd.Config(**mhkd.parse_config(shlex.split(text))[1])


def plan(capsys, *arguments):
    """The lines of the plan: state, phase, configuration."""
    assert tables.main(["plan", *map(str, arguments)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return [(state, phase, configured(text)) for state, phase, text in lines]


def key(config):
    return json.dumps(config.recorded(), sort_keys=True)


# What is run


def test_the_tables_have_every_figure_of_the_paper():
    for name, table in tables.TABLES.items():
        assert all(len(figures) == len(table.pairs) for figures in table.paper.values())
        assert sum(map(len, table.paper.values())) == PAPERS_FIGURES[name]


def test_the_plan_of_all_tables_has_every_cell_three_times_and_every_teacher_once(capsys):
    lines = plan(capsys, "table1,table2,table3")
    keys = [key(config) for _, _, config in lines]
    # vgg13 is a teacher and a student
    assert len(keys) == len(set(keys)) == 9 + 3 * (5 * 8 + 2 * 3 + 5 * 6) - 1
    assert {state for state, _, _ in lines} == {"todo"}
    for table in tables.TABLES.values():
        for row, pair, seed in itertools.product(table.rows, table.pairs, range(3)):
            (teacher, student), (method, _, unit) = pair.split(":"), row.partition(":")
            cell = mhkd.Config(
                None if method == "ce" else teacher, student, method=method, seed=seed,
                dataset=table.dataset, options={"units": (int(unit),)} if unit else {},
            )  # fmt: skip
            assert key(cell) in keys
    teachers = [(c.dataset, c.student, c.seed) for _, phase, c in lines if phase == "teacher"]
    needed = {(t.dataset, p.split(":")[0], 0) for t in tables.TABLES.values() for p in t.pairs}
    assert sorted(teachers) == sorted(needed)
    assert [phase for _, phase, _ in lines[: len(needed)]] == ["teacher"] * len(needed)


def test_the_recipe_of_each_table_is_the_papers(capsys):
    for _, _, config in plan(capsys, "table1,table2,table3"):
        assert set(config.differs()) <= {"units"}
        beta, training = config.options.get("beta"), (config.epochs, config.batch_size)
        if config.dataset == "svhn":
            assert (*training, config.lr) == (150, 200, 0.001) and beta in (None, 5)
            assert config.lr_steps == (80, 110, 135)
        else:
            assert training == (240, 64) and beta in (None, 0.5)
            assert config.lr_steps == (150, 180, 210)


def test_the_plan_of_the_study_is_its_protocol(capsys):
    lines = plan(capsys, "small")
    (_, phase, teacher), *students = lines
    who = (phase, teacher.student, teacher.method, teacher.epochs, teacher.subset)
    assert who == ("teacher", "wrn_16_2", "ce", 30, None)
    found = []
    for state, phase, c in students:
        assert (state, phase, c.dataset, c.image_size) == ("todo", "student", "cifar100", 16)
        assert (c.subset, c.test_subset, c.epochs) == (5000, None, 60)
        assert (c.backend, c.device, c.lr_steps) == ("reference", "cpu", (38, 45, 52))
        assert c.lr == (0.05 if c.student == "resnet8" else 0.01) and c.batch_size == 64
        if c.method != "ce":
            assert c.teacher == "wrn_16_2" and "wrn_16_2-ce-seed0" in c.teacher_weights
        assert c.options.get("head_width", 64) == 64
        names = ("gamma", "kd_weight", "teacher_heads", "head_ce", "head_stride", "units")
        found.append((c.student, c.method, c.seed, *(c.options.get(name) for name in names)))
    assert len(found) == len({*found}) == 90 + 25 + 60
    weights, heads = ((None, None), (1, 1)), ("scratch", "pretrained", "logits")
    factorial = [("kd", *w, None, None, None, None) for w in weights]
    factorial += [("mhkd", *w, h, None, 2, (1, 2, 3)) for w in weights for h in heads]
    for seed in range(10):
        for method, *rest in factorial:
            assert ("resnet8", method, seed, *rest) in found
    best = ("mhkd", 1, 1, "pretrained")
    others = [(*best, None, 2, (unit,)) for unit in (1, 2, 3)]
    others += [(*best, 0, 2, (1, 2, 3)), (*best, None, 1, (1, 2, 3))]
    others += [("crd+mhkd", *best[1:], None, 2, (1, 2, 3))]
    for seed, (method, *rest) in itertools.product(range(5), others):
        assert ("resnet8", method, seed, *rest) in found
    assert {row[:3] for row in found[90:115]} == set(
        itertools.product(["shufflenetv2"], ["ce", "kd", "mhkd"], range(5))
    )


def test_the_study_is_narrowed_and_shortened(capsys):
    narrowed = ["--seeds", "0,7", "--methods", "ce,mhkd", "--pairs", "wrn_16_2:resnet8"]
    _, *lines = plan(capsys, "small", *narrowed, "--epochs", "2", "--head-width", "8")
    found = [(c.method, c.seed, c.epochs, c.options.get("head_width")) for *_, c in lines]
    ce, mhkd_row = ("ce", 0, 2, None), ("mhkd", 0, 2, 8)
    assert found == [ce, mhkd_row, (*ce[:1], 7, *ce[2:]), (*mhkd_row[:1], 7, *mhkd_row[2:])]


def test_a_table_is_narrowed_and_takes_options_for_the_methods_that_have_them(capsys):
    narrowed = ["--seeds", "4", "--pairs", "vgg13:vgg8", "--methods", "kd,mhkd:2,crd+mhkd"]
    lines = plan(capsys, "table1,table2", *narrowed, "--no-flip", "--negatives", "99")
    found = {(c.method, c.teacher, c.seed, c.options.get("negatives")) for _, _, c in lines}
    students = {("kd", "vgg13", 4, None), ("mhkd", "vgg13", 4, None), ("crd+mhkd", "vgg13", 4, 99)}
    assert len(lines) == 4 and found == students | {("ce", None, 0, None)}
    assert {c.flip for *_, c in lines} == {False}
    assert [c.options["units"] for *_, c in lines if c.method == "mhkd"] == [(2,)]


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
        (["table1", "--methods", "kd", "--negatives", "9"], "option of --method crd, not of kd"),
        (["table1", "--method=kd"], "takes --methods, not --method"),
        (["table1", "--teacher-weights", "t.pt"], "for one teacher"),
        (["table1", "--teacher-weights", "t.pt", "--pairs", "vgg13:vgg8"], "'t.pt'"),
        ([], "report DIR"),
    ],
)
def test_what_no_table_has_is_refused_in_a_sentence(arguments, message, capsys):
    assert tables.main(["plan", *arguments]) == 1
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
    assert states("--lr", "0.01") == ["todo", "todo"]
    weights = tmp_path / "given.pt"
    for content, state in ((b"another", "todo"), (b"teacher", "done")):
        weights.write_bytes(content)
        assert states("--teacher-weights", weights) == [state]
    (student / "student.pt").write_bytes(b"of another run")
    assert states() == ["done", "todo"]


def test_a_run_on_another_folder_of_images_is_not_taken_for_done(tmp_path, capsys):
    record(tmp_path, 75.0, student="vgg8", method="ce", dataset="folder")  # of some/photos
    narrowed = ["--pairs", "vgg13:vgg8", "--methods", "ce", "--seeds", "0", "--dataset", "folder"]
    for data, state in (("some/photos", "done"), ("other/photos", "todo")):
        lines = plan(capsys, "table1", *narrowed, "--data", data, "--out", tmp_path)
        assert [line[0] for line in lines] == [state]


# run_all.sh


def run_all(folder, *arguments, **variables):
    """run_all.sh in a folder of its own, without the sources of the kernel."""
    for name in ("run_all.sh", "mhkd.py", "mhkd_baselines.py", "mhkd_tables.py"):
        shutil.copy(ROOT / name, folder)
    inherited = {k: v for k, v in os.environ.items() if k not in ("VENV", "OUT", "JOBS", "DATA")}
    environment = {**inherited, "PYTHON": sys.executable, **variables}
    command = [str(folder / "run_all.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_the_dry_run_of_run_all_prints_every_command_and_how_many_are_done(tmp_path):
    done = run_all(tmp_path, "all", "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^todo  python mhkd\.py (.*)$", done.stdout, re.MULTILINE)
    assert len({key(configured(command)) for command in commands}) == 236
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
    failed = first.stderr.partition("failed:\n")[2]
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
    assert re.search(r"\| kd \| [\d.]+ \([\d.]+\) \| 2 \|", second.stdout)
    assert "5 of 5 runs are done" in run_all(tmp_path, "small", "--dry-run", **shortened).stdout

    assert run_all(tmp_path, "records", OUT=str(out)).returncode == 0
    kept = {path.name for path in (tmp_path / "results").glob("*/*")}
    assert kept == {"result.json", "log.jsonl"} and len(list((tmp_path / "results").glob("*"))) == 5


def test_a_wrong_name_ends_run_all_with_status_2_and_help_on_stderr(tmp_path):
    wrong = run_all(tmp_path, "tabel1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there is no 'tabel1'" in wrong.stderr and "table1" in wrong.stderr
    assert run_all(tmp_path, "table1", "--dryrun").returncode == 2
    assert run_all(tmp_path).returncode == 0


@pytest.mark.parametrize("part", ["demo", "test", "small", "table1", "all"])
def test_a_failed_installation_ends_run_all(part, tmp_path):
    python = tmp_path / "python"  # new enough, and without any package
    python.write_text('#!/bin/sh\necho "$@" >>log\n[ "$1" = -c ] || { [ "$1 $2" = "-m venv" ] && '
                      'mkdir -p env/bin && cp "$0" env/bin/python; }\n')  # fmt: skip
    python.chmod(0o755)
    done = run_all(tmp_path, part, PYTHON=str(python), VENV="env")
    log = (tmp_path / "log").read_text()
    assert done.returncode != 0 and log.splitlines()[-1].startswith("-m pip install"), log


def test_a_failed_build_of_the_kernel_does_not_mark_the_old_one_fresh(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ $1 != setup.py ] || exit $BUILD\necho loss: fused\n")
    python.chmod(0o755)
    (tmp_path / "csrc").mkdir()
    for name in ("mhkd_fused.so", "setup.py", "csrc/new.cpp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "mhkd_fused.so", (1, 1))
    failed = run_all(tmp_path, "setup", PYTHON=str(python), BUILD="1")
    assert failed.returncode == 0 and "could not be built" in failed.stderr
    assert (tmp_path / "mhkd_fused.so").stat().st_mtime == 1
    run_all(tmp_path, "setup", PYTHON=str(python), BUILD="0")
    assert (tmp_path / "mhkd_fused.so").stat().st_mtime > 1
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
        "differs": json.loads(json.dumps(config.differs())), "data_sha256": data * 64,
        "teacher_sha256": mhkd.sha256_of(folder / "teacher.pt") if config.teacher else None,
        "teacher_accuracy": 75.0 if config.teacher else None, "accuracy": accuracy,
        "class_accuracy": dict.fromkeys(classes, accuracy), "best_accuracy": accuracy + 1,
        "best_epoch": 2, "epochs": config.epochs, "seconds": 60.0,
        "environments": [{"data": "some/photos"}],
        "student_sha256": mhkd.sha256_of(folder / "student.pt"), **dict(more),
    }  # fmt: skip
    mhkd.write_json(folder / "result.json", content)
    log = [{"epoch": i, "test_accuracy": accuracy + (i == 2)} for i in range(1, config.epochs + 1)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in log))
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The report of what is in tmp_path, without pictures: its parts by heading."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def parts():
        text = tables.report(tmp_path)
        return dict(part.partition("\n")[::2] for part in re.split(r"^#+ ", text, flags=re.M)[1:])

    return parts


def rows_of(part):
    """The cells of a table by the first of each row."""
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line[:1] == "|"]
    return {first: cells for first, *cells in lines}


def test_differences_are_paired_over_common_seeds_with_errors_and_intervals(tmp_path, report):
    accuracies = {"ce": (35.70, 36.14, 35.68), "kd": (38.17, 38.55, 39.24, 50.0), "cc": (38, 39)}
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            record(tmp_path, accuracy, **PAIR, method=method, seed=seed)
    record(tmp_path, 39.0, **PAIR, method="mhkd", seed=3)
    rows = rows_of(report()["cifar100: wrn_40_2 → wrn_16_2"])
    assert rows["teacher wrn_40_2"][0] == "75.00"
    assert rows["student alone"][:2] == ["35.84 (0.26)", "3"]
    # Differences 2.47, 2.41, 3.56: mean 2.8133, deviation 0.6473, by sqrt(3) 0.3737, t 4.3027.
    assert rows["kd"][1:3] == ["4", "+2.81 ± 0.37 [+1.21, +4.42], n=3"]
    assert rows["student alone"][3] == "-2.81 ± 0.37 [-4.42, -1.21], n=3"
    # Differences -0.17, 0.45: mean 0.14, error 0.31, t 12.7062.
    assert rows["cc"][3] == "+0.14 ± 0.31 [-3.80, +4.08], n=2"
    # One seed in common with kd, and so no interval; none with the student alone.
    assert [cell.strip() for cell in rows["mhkd"]] == ["39.00", "1", "", "-11.00, n=1"]
    assert (tmp_path / "report.md").read_text().startswith("# What has run")


def test_intervals_are_those_of_students_t_or_up_to_half_a_percent_wider():
    stats = pytest.importorskip("scipy.stats")
    for n in [*range(2, 40), 100, 10_000]:
        values = [0.0, 1.0] + [0.5] * (n - 2)
        exact = stats.t.ppf(0.975, n - 1) * stats.sem(values)
        _, half, _ = tables.difference(values)
        assert exact * (1 - 1e-5) <= half <= exact * 1.005


def test_rows_say_in_which_options_they_differ_and_the_recipe_what_is_common(tmp_path, report):
    for options in ({}, {"head_stride": 2}, {"units": (1,)}, {"units": (1, 2)}):
        record(tmp_path, 70.0, **PAIR, options={"head_width": 64, **options}, image_size=16)
    record(tmp_path, 70.0, student="wrn_16_2", method="ce", image_size=16)
    part = report()["cifar100: wrn_40_2 → wrn_16_2"]
    assert "Apart from the recipe: image_size 16, head_width 64; data dddddddd, 100" in part
    rows = ["student alone", "mhkd", "mhkd, head_stride 2", "mhkd, units 1", "mhkd, units 1,2"]
    assert [*rows_of(part)][3:] == rows  # below the header and the teacher


def test_what_is_of_other_data_another_teacher_or_recipe_is_not_compared(tmp_path):
    record(tmp_path, 70.0, student="wrn_16_2", method="ce")
    other_teacher = {"taught_by": b"u", "teacher_seed": 1}
    others = ({"data": "e"}, other_teacher, {"lr": 0.01}, {"student_units": list("abc")})
    for settings in ({}, *others):
        record(tmp_path, 71.0, **PAIR, method="kd", **settings)
    groups = tables.group_runs(tables.read_runs(tmp_path)[0])
    assert [len(group.rows["kd"]) for group in groups] == [1] * 5
    # The network alone is beside those whose student it is: of its data and recipe.
    without = [g for g in groups if "student alone" not in g.rows]
    assert [(g.one["data_sha256"][0], g.apart) for g in without] == [("e", {}), ("d", {"lr": 0.01})]


def test_runs_of_other_normalisation_are_not_compared_and_older_ones_had_the_data_sets(tmp_path):
    usual, other = ({"normalisation": {"mean": [m] * 3, "std": [1] * 3}} for m in (0.5, 0.4))
    record(tmp_path, 70.0, student="wrn_16_2", method="ce")  # of before it was recorded
    record(tmp_path, 71.0, student="wrn_16_2", method="ce", seed=1, more=usual)
    for seed, more in enumerate(({}, usual, other)):
        more = {**more, "differs": {"teacher_weights": "e3b98a4d"}}
        record(tmp_path, 72.0, **PAIR, method="kd", seed=seed, more=more)
    groups = tables.group_runs(tables.read_runs(tmp_path)[0])
    rows = [{row: [*seeds] for row, seeds in group.rows.items()} for group in groups]
    assert rows == [{"student alone": [0, 1], "kd": [0, 1]}, {"kd": [2]}]


def test_a_teachers_run_makes_no_group_and_a_network_alone_does(tmp_path, report):
    record(tmp_path, 75.0, student="wrn_40_2", method="ce", weights=b"t")
    record(tmp_path, 71.0, **PAIR, method="kd")
    for accuracy in (60.0, 61.0):  # the same seed
        record(tmp_path, accuracy, student="vgg8", method="ce")
    parts = report()
    groups = ["cifar100: wrn_40_2 → wrn_16_2", "cifar100: vgg8 alone"]
    assert [part for part in parts if part.startswith("cifar100")] == groups
    assert rows_of(parts[groups[1]])["student alone"][:2] == ["60.00", "1"]
    assert "'003' is not compared: its seed is there twice" in parts["Not used"]


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
    assert (one["teacher"][0], one["ce"][0]) == ("75.50, n=1 / 75.61", "– / 73.26")
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
    assert len(parts) == 3  # the runs themselves are there
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
    changed = record(tmp_path, 99.0, **PAIR, method="kd") / "result.json"
    changed.write_text(changed.read_text().replace("99.0", "99.9"))  # not by write_json
    old = record(tmp_path, 98.0, **PAIR, method="kd") / "result.json"
    content = json.loads(old.read_text())
    del content["config"]["options"]
    mhkd.write_json(old, content)  # whole, of another version
    (record(tmp_path, 70.0, **PAIR, method="kd", seed=8) / "student.pt").unlink()
    parts = report()
    assert [str(p) for p in (*named[:8], changed, old) if str(p) not in parts["Not used"]] == []
    assert "student.pt of its record is not beside 008, 011." in parts["All runs"]
    assert len(rows_of(parts["All runs"])) == 2 + 4 + 2 and "99.9" not in parts["All runs"]


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
    damaged = record(tmp_path, 40.0, student="vgg8", method="ce")
    (damaged / "log.jsonl").write_text("{")
    text = tables.report(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    pair = "cifar100-wrn_40_2-wrn_16_2"
    assert names == ["cifar100-vgg8-1.png", f"{pair}-1.png", f"{pair}-2.png"]
    assert all(f"({name})" in text for name in names)
    assert {image.imread(tmp_path / name).shape[1] for name in names} == {1400}
