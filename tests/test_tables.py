"""The paper's tables: what is run for them, and how they are reported."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

import mhkd

REFERENCE = mhkd.Config()
PAPERS_FIGURES = {"table1": 5 * 9, "table2": 2 * 8, "table3": 5 * 7}  # counted on the page, with the teachers' rows


def plan(capsys, *arguments):
    """The lines of --plan: state, phase, configuration."""
    assert mhkd.main(["--plan", *map(str, arguments)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return [(state, phase, configured(text)) for state, phase, text in lines]


def configured(text):
    parsed = vars(mhkd.parse_arguments(shlex.split(text)))
    return mhkd.resolve(mhkd.Config(**{name: parsed[name] for name in vars(REFERENCE)}))


# What is run


def test_the_tables_have_every_figure_of_the_paper():
    for name, table in mhkd.TABLES.items():
        columns = len(table.columns())
        rows = [*table.rows.values(), *([table.teachers] if table.teachers else [])]
        assert all(len(row.split()) == columns for row in rows)
        assert sum(len(row.split()) for row in rows) == PAPERS_FIGURES[name]


def test_the_plan_of_all_tables_has_every_cell_three_times_and_every_teacher_once(capsys):
    lines = plan(capsys, "table1,table2,table3")
    keys = [json.dumps(config.recorded()) for _, _, config in lines]
    assert len(keys) == len(set(keys)) == 9 + 3 * (5 * 8 + 2 * 3 + 5 * 6) - 1  # vgg13 is a teacher and a student
    assert {state for state, _, _ in lines} == {"todo"}
    for table in mhkd.TABLES.values():
        for row in table.rows:
            for teacher, student in table.columns():
                for seed in range(3):
                    method, _, unit = row.partition(":")
                    cell = mhkd.Config(
                        None if method == "ce" else teacher, student, method, table.dataset, seed=seed,
                        units=(int(unit),) if unit else (1, 2, 3),
                    )  # fmt: skip
                    assert json.dumps(mhkd.resolve(cell).recorded()) in keys
    teachers = [(c.dataset, c.student) for _, phase, c in lines if phase == "teacher"]
    needed = {(table.dataset, teacher) for table in mhkd.TABLES.values() for teacher, _ in table.columns()}
    assert sorted(teachers) == sorted(needed)
    phases = [phase for _, phase, _ in lines]
    assert phases == sorted(phases, reverse=True)  # teachers first


def test_the_recipe_of_each_table_is_the_papers(capsys):
    for _, _, config in plan(capsys, "table3"):
        assert (config.epochs, config.batch_size, config.lr) == (150, 200, 0.001)
        assert config.lr_steps == (80, 110, 135) and (config.method != "mhkd" or config.beta == 5)
    for _, _, config in plan(capsys, "table1,table2"):
        assert (config.epochs, config.batch_size, config.lr_steps) == (240, 64, (150, 180, 210))


def test_a_plan_is_narrowed_to_seeds_pairs_and_methods_and_takes_options_and_further_methods(capsys):
    narrowed = [
        "--seeds",
        "4",
        "--pairs",
        "vgg13:vgg8",
        "--methods",
        "kd,mhkd:2,lsh",
        "--epochs",
        "7",
        "--subset",
        "99",
    ]
    lines = plan(capsys, "table1,table2", *narrowed)
    found = sorted((phase, c.method, c.teacher, c.student, c.units, c.seed) for _, phase, c in lines)
    assert found == [
        ("student", "kd", "vgg13", "vgg8", (1, 2, 3), 4),
        ("student", "lsh", "vgg13", "vgg8", (1, 2, 3), 4),
        ("student", "mhkd", "vgg13", "vgg8", (2,), 4),
        ("teacher", "ce", None, "vgg13", (1, 2, 3), 0),
    ]
    assert all((c.epochs, c.subset) == (7, 99) for _, _, c in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table4"], "no table 'table4'"),
        (["table1", "--pairs", "vgg13:vgg9"], "did you mean vgg13:vgg8"),
        (["table1", "--methods", "kdd"], "no method 'kdd'"),
        (["table3", "--dataset", "digits"], "--dataset svhn only"),
        (["table2", "--methods", "mhkd:a"], "no row 'mhkd:a'"),
        (["table2", "--methods", "kd:1"], "no row 'kd:1'"),
        (["table1", "--methods", "mhkd:1"], "in table2 only"),
        (["table1", "--teacher-weights", "t.pt"], "for one teacher"),
        (["table1", "--teacher-weights", "t.pt", "--pairs", "vgg13:vgg8"], "no checkpoint 't.pt'"),
    ],
)
def test_what_no_table_has_is_refused(arguments, message, capsys):
    assert mhkd.main(["--plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_order_in_which_a_planned_method_is_joined_means_nothing(capsys):
    lines = plan(capsys, "table1", "--pairs", "vgg13:vgg8", "--methods", "mhkd+crd", "--seeds", "0")
    assert [c.method for _, _, c in lines] == ["ce", "crd+mhkd"]


def test_a_run_is_done_only_if_the_planned_teacher_taught_it(tmp_path, capsys):
    def states(*more):
        pair = ["--pairs", "wrn_40_2:wrn_16_2", "--methods", "kd", "--seeds", "0", "--out", tmp_path]
        return [state for state, _, _ in plan(capsys, "table1", *pair, *more)]

    assert states() == ["todo", "todo"]
    record(tmp_path, 75.0, **PAIR, method="kd", sha256="s")  # "t" taught it
    for folder in tmp_path.glob("*/"):
        (folder / "student.pt").touch()
    assert states() == ["todo", "todo"]
    record(tmp_path, 75.5, student="wrn_40_2", method="ce", sha256="t")
    (tmp_path / "1" / "student.pt").touch()
    assert states() == ["done", "done"]
    weights = tmp_path / "given.pt"
    weights.touch()
    assert states("--teacher-weights", weights) == ["todo"]


def test_the_dry_run_of_run_all_prints_every_command_and_how_many_are_done(tmp_path):
    done = run_all(tmp_path, "all", "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^todo  python mhkd\.py (.*)$", done.stdout, re.MULTILINE)
    assert len({json.dumps(configured(command).recorded()) for command in commands}) == 236
    assert "0 of 236 runs are done" in done.stdout


def run_all(folder, *arguments, **variables):
    """run_all.sh in a folder of its own, with mhkd.py but without the sources of the kernel."""
    for name in ("run_all.sh", "mhkd.py"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "OUT")}
    environment |= {"PYTHON": sys.executable, **variables}
    command = [str(folder / "run_all.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_run_all_computes_a_table_goes_on_after_failures_resumes_and_repeats_nothing(tmp_path):
    pytest.importorskip("sklearn")
    shortened = {
        "SEEDS": "0 1", "EPOCHS": "1", "PAIRS": "wrn_40_2:wrn_16_2", "METHODS": "ce kd", "OUT": str(tmp_path / "runs"),
        "JOBS": "2", "OPTIONS": shlex.join([*TINY, "--subset", "80"]),
    }  # fmt: skip
    shortened["OPTIONS"] = shortened["OPTIONS"].replace("--epochs 2 ", "")
    broken = tmp_path / "runs" / "digits-wrn_40_2-wrn_16_2-kd-seed0-epochs=1-batch_size=40-subset=80"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")

    first = run_all(tmp_path, "table1", **shortened)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "0 of 5 runs are done" in first.stdout
    failed = first.stderr.partition("failed:\n")[2]
    assert "--method kd" in failed and "is damaged" in failed and failed.count("python mhkd.py") == 1
    results = list((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 4

    unknown = run_all(tmp_path, "table1", "--dryrun", **shortened)
    assert unknown.returncode == 1 and "there is --dry-run" in unknown.stderr

    (broken / "config.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in results}
    second = run_all(tmp_path, "table1", **shortened)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "4 of 5 runs are done" in second.stdout and second.stdout.count("+ python mhkd.py --teacher") == 1
    assert {path: path.stat().st_mtime_ns for path in results} == times
    assert "5 of 5 runs are done" in run_all(tmp_path, "table1", "--dry-run", **shortened).stdout
    assert "| **KD** | " in second.stdout and "n=2" in second.stdout


# How it is reported


def record(out, accuracy, sha256="t", teacher_sha256="t", **settings):
    """A result.json as a run leaves it."""
    config = mhkd.resolve(mhkd.Config(**settings))
    name = f"{len(list(out.glob('*')))}"
    (out / name).mkdir(parents=True)
    content = {
        "name": name, "accuracy": accuracy, "best_accuracy": accuracy, "best_epoch": 1, "epochs": config.epochs,
        "teacher_accuracy": 75.0 if config.teacher else None, "student_sha256": sha256,
        "teacher_sha256": teacher_sha256 if config.teacher else None, "data_sha256": "d" * 64,
        "environment": {"data": "data"},
        "config": {**config.recorded(), "processes": 1},
    }  # fmt: skip
    (out / name / "result.json").write_text(json.dumps(content))
    (out / name / "log.jsonl").write_text(
        "".join(json.dumps({"test_accuracy": accuracy - i}) + "\n" for i in (2, 1, 0))
    )


PAIR = {"teacher": "wrn_40_2", "student": "wrn_16_2"}


@pytest.fixture
def out(tmp_path):
    """Three full KD runs, one of MHKD, the teacher, and shortened runs."""
    record(tmp_path, 75.5, student="wrn_40_2", method="ce")
    for seed, accuracy in enumerate((74.0, 75.0, 75.6)):
        record(tmp_path, accuracy, sha256="s", **PAIR, method="kd", seed=seed)
    record(tmp_path, 75.38, sha256="s", **PAIR, method="mhkd", units=(1, 2, 3))
    record(tmp_path, 75.01, sha256="s", **PAIR, method="mhkd", units=(2,))
    for accuracy, seed, shortened in ((9.99, 0, {"epochs": 2}), (8.88, 1, {"epochs": 2, "subset": 1000})):
        record(tmp_path, 1.0, student="wrn_40_2", method="ce", sha256=str(shortened), **shortened)
        settings = {**PAIR, "method": "kd", "seed": seed, **shortened}
        record(tmp_path, accuracy, sha256="s", teacher_sha256=str(shortened), **settings)
    return tmp_path


def rows_of(text, title):
    """The cells of a table's first column of figures, by the row's title."""
    part = text.partition(title)[2].partition("\n### ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    found, last = {}, None
    for first, *cells in lines:
        last = last if first.startswith("·") else first.strip("*")
        found[f"{last} {first}" if first.startswith("·") else last] = cells
    return found


def test_a_table_has_mean_deviation_seeds_the_papers_figure_and_the_difference(out):
    rows = rows_of(mhkd.report(out, pictures=False), "### Table 1")
    assert rows["KD"][0] == "74.87 (0.81), n=3"  # the deviation of a sample
    assert (rows["KD · paper"][0], rows["KD · difference"][0]) == ("74.92", "-0.05")
    assert rows["MHKD"][0] == "75.38, n=1"
    assert (rows["MHKD · paper"][0], rows["MHKD · difference"][0]) == ("75.28 (0.26)", "+0.10")
    assert (rows["Teacher baseline"][0], rows["Teacher baseline · paper"][0]) == ("75.50, n=1", "75.61")
    assert rows["Compression, counted, %"] == ["68.81", "83.97", "58.10", "91.41", "81.77"]


def test_missing_cells_are_visibly_missing(out):
    rows = rows_of(mhkd.report(out, pictures=False), "### Table 1")
    assert rows["CRD"] == ["missing"] * 5 and rows["KD"][1:] == ["missing"] * 4


def test_single_heads_are_in_table_2_and_not_mixed_with_all_three(out):
    rows = rows_of(mhkd.report(out, pictures=False), "### Table 2")
    assert (rows["Head-2"][0], rows["Head-1+2+3"][0], rows["Head-1"][0]) == ("75.01, n=1", "75.38, n=1", "missing")


def test_shortened_runs_are_in_tables_of_their_own_that_say_so(out):
    text = mhkd.report(out, pictures=False)
    parts = [part for part in text.split("\n### ") if "Table 1" in part]
    headings = [part.splitlines()[2] if "Not the paper" in part else "" for part in parts]
    assert headings[0] == "" and ["9.99" in p for p in parts] == [False, True, False]
    assert "epochs 2. Not to be compared" in headings[1]
    assert "epochs 2, subset 1000" in headings[2] and "8.88, n=1" in parts[2] and "8.88" not in parts[0] + parts[1]


def test_a_teacher_from_outside_and_further_differences_set_runs_apart(tmp_path):
    record(tmp_path, 70.0, sha256="another", **PAIR, method="kd")
    assert "teacher checkpoint t. Not" in mhkd.report(tmp_path, pictures=False)
    record(tmp_path, 71.0, student="wrn_40_2", method="ce")
    assert "teacher checkpoint" not in mhkd.report(tmp_path, pictures=False)
    record(tmp_path, 72.0, sha256="s", **PAIR, method="mhkd", head_width=32)
    assert "head_width 32. Not" in mhkd.report(tmp_path, pictures=False)


def test_a_teacher_of_another_recipe_sets_a_run_apart_and_replaces_no_other(tmp_path):
    record(tmp_path, 75.5, student="wrn_40_2", method="ce", sha256="t")
    record(tmp_path, 73.0, sha256="s", **PAIR, method="kd")
    record(tmp_path, 9.0, student="wrn_40_2", method="ce", sha256="short", epochs=3)
    record(tmp_path, 60.0, sha256="s", **PAIR, method="kd", teacher_sha256="short")
    full, *others = [part for part in mhkd.report(tmp_path, pictures=False).split("\n### ") if "Table 1" in part]
    assert "| **KD** | 73.00, n=1" in full and "60.00" not in full
    assert any("teacher checkpoint short" in part and "60.00, n=1" in part for part in others)


def test_a_run_of_an_unknown_method_is_listed_and_stops_no_report(out):
    path = out / "0" / "result.json"
    result = json.loads(path.read_text())
    result["config"]["method"], result["name"] = "nobodys", "theirs"
    path.write_text(json.dumps(result))
    pytest.importorskip("matplotlib")
    assert "| theirs |" in mhkd.report(out)


def test_further_methods_get_rows_of_their_own(out):
    record(out, 75.9, sha256="s", **PAIR, method="lsh")
    record(out, 75.8, sha256="s", **PAIR, method="crd+dhkd")
    rows = rows_of(mhkd.report(out, pictures=False), "### Table 1")
    assert rows["LSH"][0] == "75.90, n=1" and rows["crd+dhkd"][0] == "75.80, n=1"


def test_the_report_is_written_as_markdown_csv_and_pictures(out):
    pytest.importorskip("matplotlib")
    text = mhkd.report(out)
    assert (out / "report.md").read_text() == text + "\n"
    with open(out / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    full = [line for line in lines if not line["apart from the recipe"]]
    assert len(full) == PAPERS_FIGURES["table1"] + PAPERS_FIGURES["table2"]
    (kd,) = [x for x in full if (x["table"], x["row"], x["student"]) == ("table1", "kd", "wrn_16_2")]
    assert (kd["seeds"], kd["n"], kd["paper_mean"]) == ("0 1 2", "3", "74.92")
    assert float(kd["mean"]) == pytest.approx(74.8667, abs=1e-4) and float(kd["difference"]) == pytest.approx(-0.0533)
    assert [x["n"] for x in full if x["row"] == "crd"] == ["0"] * 5
    for name in ("curves.png", "table1.png", "table2.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(out.glob("*.png"))) == 1 + 6  # two tables for each of three recipes


def test_networks_alone_make_a_table_only_by_the_papers_recipe(tmp_path):
    record(tmp_path, 98.0, student="resnet20", method="ce", dataset="digits")
    assert "Table" not in mhkd.report(tmp_path, pictures=False)
    record(tmp_path, 69.0, student="resnet20", method="ce")
    assert "| 69.00, n=1 |" in mhkd.report(tmp_path, pictures=False)


def test_svhn_runs_belong_to_table_3_alone(tmp_path):
    record(tmp_path, 95.0, **PAIR, method="kd", dataset="svhn", sha256="t")
    text = mhkd.report(tmp_path, pictures=False)
    assert "Table 3" in text and "Table 1" not in text
