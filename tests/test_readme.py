"""What the README shows works as it stands there."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import mhkd

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else None
pytestmark = pytest.mark.skipif(TEXT is None, reason="there is no README.md")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT or "", re.DOTALL | re.MULTILINE)


def test_an_example_shows_a_network_of_torchvision():
    assert any("torchvision.models" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_runs_as_it_stands(block, tmp_path):
    pytest.importorskip("torchvision")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_tables_shown_are_those_of_the_records_in_results():
    runs = mhkd.finished_runs(ROOT / "results")
    assert runs
    for _, *table in mhkd.lay_out(runs):
        assert mhkd.table_markdown(*table) in TEXT
    shown = re.findall(r"^### Table .*?$", TEXT, re.MULTILINE)
    assert len(shown) == len(mhkd.lay_out(runs))


def test_the_records_say_on_what_they_were_computed_and_from_which_commit():
    for run in mhkd.finished_runs(ROOT / "results"):
        environment = run["environment"]
        assert environment["hardware"] and environment["torch"] and re.fullmatch("[0-9a-f]{40}", environment["commit"])
