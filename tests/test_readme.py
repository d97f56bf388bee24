"""What the README and docs/methods.md show works as it stands there."""

import json
import os
import re
import shutil
import statistics
import types

import pytest
import torch
from conftest import ALONE, ROOT, folder_of, python, run

import mhkd
import mhkd_report

TEXTS = [
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs/methods.md")
]
BLOCKS = re.findall(r"^```python\n(.*?)^```", "\n".join(TEXTS), re.DOTALL | re.MULTILINE)
OF_ONNX = [block for block in BLOCKS if "onnx" in block]
OF_TOKENS = [block for block in BLOCKS if "tokens" in block]
RUN = ("mhkd.METHODS", "mhkd.DATASETS", "MultiHead")
WHOLE = [block for block in BLOCKS if any(name in block for name in RUN)]


@pytest.mark.parametrize("block", WHOLE, ids=range(len(WHOLE)))
def test_an_example_runs_as_it_stands(block, tmp_path):
    pytest.importorskip("torchvision")
    done = python("-c", block, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_the_student_is_used_and_exported_as_the_readme_shows(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert run(tmp_path, *ALONE, "--epochs", "1") == 0
    path = folder_of(tmp_path) / "student.pt"
    monkeypatch.chdir(tmp_path)
    (block,) = OF_ONNX
    names: dict = {}
    exec(block.replace("runs/…/student.pt", str(path)), names)
    assert len(names["names"]) == 4 and {*names["names"]} <= {str(digit) for digit in range(10)}
    images = torch.rand(5, 3, 16, 16)
    (logits,) = runtime.InferenceSession("student.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits), names["student"](images).detach(), rtol=1e-4, atol=1e-4
    )


def test_a_language_model_is_distilled_as_the_readme_shows():
    def model(tokens):
        return types.SimpleNamespace(logits=torch.randn(*tokens.shape, 50, dtype=torch.bfloat16))

    names = {"tokens": torch.randint(50, (2, 7)), "student": model, "teacher": model}
    names |= {"torch": torch, "F": torch.nn.functional, "mhkd_loss": mhkd.mhkd_loss}
    (block,) = OF_TOKENS
    exec(block.partition("\n# csrc/ alone")[0], names)
    assert names["loss"].isfinite() and (names["labels"] == -100).sum() == 2


def test_every_file_that_the_readme_links_to_is_there():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", "\n".join(TEXTS)):
        assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


def test_every_network_of_ours_is_named_in_the_readme():
    for name in mhkd.MODELS:
        family = re.sub(r"\d+$", "", name)
        assert f"`{name}`" in TEXTS[0] or (family in TEXTS[0] and name[len(family) :] in TEXTS[0])


def test_the_table_of_the_study_with_few_labels_is_that_of_its_records(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "few.png"
    done = python(ROOT / "examples/few_labels.py", ROOT / "results/few-labels", picture)
    assert done.returncode == 0 and picture.stat().st_size > 10_000, done.stderr
    rows = done.stdout.strip().splitlines()
    assert len(rows) == 8, done.stdout
    text = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
    assert [row for row in rows if f"{row}\n" not in text] == []


def test_a_table_of_runs_with_two_teachers_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "results/few-labels", tmp_path / "runs")
    path = next((tmp_path / "runs").glob("*-kd-seed2-*")) / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"teacher_sha256": "0" * 64}))
    done = python(ROOT / "examples/few_labels.py", tmp_path / "runs", tmp_path / "few.png")
    assert done.returncode == 1 and "or the teacher" in done.stderr


@pytest.mark.parametrize("student, count", [("resnet8", 22), ("shufflenetv2", 5)])
def test_the_tables_of_the_second_study_are_those_of_its_records(student, count, tmp_path):
    for path in (ROOT / "results").glob("*/result.json"):
        (tmp_path / path.parent.name).symlink_to(path.parent)
    groups = mhkd_report.group_runs(mhkd_report.read_runs(tmp_path)[0])
    text = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
    lines = text.partition("### Results of pair A")[2].partition("\n## ")[0].splitlines()
    (group,) = [g for g in groups if (g.teacher, g.student) == ("wrn_16_2", student)]
    rows = [row for row in group.rows if len(row.runs) in (5, 10)]
    assert len(rows) == len(group.rows) == count
    for row in rows:
        cells = [mhkd_report.mean_and_std(row.values())]
        cells.append(f"{statistics.mean(row.values('train_accuracy')):.1f}")
        for base in filter(None, (group.alone(row), group.kd_of(row))):
            if values := row.minus(base):
                mean, _, half = mhkd_report.interval(values)
                difference = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
                cells.append(f"{difference}, n = {len(values)}".replace("-", "−"))
        found = [line for line in (*lines, *TEXTS[0].splitlines()) if cells[0] in line]
        assert [line for line in found if all(f"| {cell} |" in line for cell in cells)], cells


def test_no_record_names_a_folder_of_the_machine_that_wrote_it():
    named = [p for p in (ROOT / "results").rglob("*.json*") if '": "/' in p.read_text("utf-8")]
    assert named == []
