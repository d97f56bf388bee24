"""The repository root on the path, few threads, and what several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPT = ROOT / "mhkd.py"

# The networks here are tiny, and several processes share the cores: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# A run of a few seconds on the CPU: 200 digits of 16 pixels, small heads.
TINY = ["--dataset", "digits", "--subset", "200", "--epochs", "2", "--batch-size", "40", "--head-width", "8"]
TINY += ["--device", "cpu"]
PAIR = ["--teacher", "resnet14", "--student", "resnet8"]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def script(*arguments, **keywords):
    """Run mhkd.py as a user does; its output as text."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **keywords)


def listing(folder):
    """What a folder holds: for each path below it the bytes and the time of its last change."""
    paths = sorted(Path(folder).rglob("*"))
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for p in paths
    }
