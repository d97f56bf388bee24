"""Damage to any file that a run leaves or reads, and kills: the undisturbed end, or one sentence.

    pytest tests/test_damage.py            # shortened
    python tests/test_damage.py [TRIALS]   # a table of kinds, tried and held; by default 40 of each
    SOAK=1000 pytest tests/test_damage.py -k soak     # epochs
"""

import collections
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import end_of, fork, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mhkd

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

SMALL = ["--method", "kd", "--teacher", "resnet8", "--student", "resnet8", "--device", "cpu"]
SMALL += ["--batch-size", "20", "--epochs", "3", "--seed", "1", "--keep-checkpoint"]
DIGITS = [*SMALL, "--dataset", "digits", "--subset", "40"]
CLOCK = ("seconds", "images_per_second", "environments", "sha256")


def run(*arguments):
    """mhkd.py in this process: its exit status and what it said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = mhkd.main([*map(str, arguments)])
    return status, said.getvalue()


def ends(out):
    """What the runs below a folder have come to: weights, logs, results, without the clock."""
    found = {}
    for path in sorted(out.glob("*/result.json")):
        result = mhkd.read_json(path)
        state = mhkd.load_file(path.with_name("student.pt"))["model"]
        weights = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
        kept = {name: value for name, value in result.items() if name not in CLOCK}
        name = kept.pop("name").replace(kept["teacher_sha256"] or "-", "")
        found[name.split("-teacher_weights")[0]] = weights, kept
    return found


class Scene:
    """A run in some state, on digits or a folder of images, to be damaged and started again."""

    def __init__(self, root, state):
        self.root, self.state, self.rest = Path(root) / state, state, ()
        out, self.options = self.root / "out", DIGITS
        if state == "images":
            for i in range(60):
                part = ("train", "val")[i % 3 == 2]
                path = self.root / "images" / part / f"class{i % 2}" / f"{i}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
            data = ["--data", "images", "--image-size", "16"]
            self.options = [*SMALL, "--dataset", "folder", *data, "--epochs", "1"]
        with contextlib.chdir(self.root) if self.root.mkdir(exist_ok=True) is None else None:
            if state == "weights":
                assert run(*DIGITS, "--out", "teacher") == (0, "")
                (teacher,) = Path("teacher").glob("*resnet8-ce*")
                shutil.copy(teacher / "student.pt", "given.pt")
                shutil.rmtree("teacher")
                self.options = [*DIGITS, "--teacher-weights", "given.pt"]
            assert run(*self.options, "--out", "wanted") == (0, "")
            shutil.copytree("wanted", "out")
            self.student = max(out.glob("*-kd-*"), key=lambda path: len(path.name))
            if state == "interrupted":  # in the student's third epoch
                shutil.move(self.student / "checkpoint-before.pt", self.student / "checkpoint.pt")
                for name in ("result.json", "student.pt"):
                    (self.student / name).unlink()
            self.wanted = ends(self.root / "wanted")
        self.files = sorted(p.relative_to(self.root) for p in out.rglob("*") if p.is_file())
        if state == "weights":
            self.files = [Path("given.pt")]
        self.kept = {path: (self.root / path).read_bytes() for path in self.files}
        shutil.copytree(out, self.root / "before", symlinks=True)

    def try_damage(self, path, kind, place, bit):
        """Damage a file, start the run again: None, or what is wrong with the end."""
        content, others = bytearray(self.kept[path]), self.files
        at = int(place * len(content))
        if kind == "truncated":
            content = content[:at]
        elif kind == "flipped bit":
            content[min(at, len(content) - 1)] ^= 1 << bit
        elif kind == "zeroed block":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        elif kind == "empty":
            content = b""
        elif kind == "another file":
            content = self.kept[others[(others.index(path) + 1 + int(place * 7)) % len(others)]]
        shutil.rmtree(self.root / "out")
        shutil.copytree(self.root / "before", self.root / "out", copy_function=shutil.copy)
        (self.root / path).write_bytes(content)
        with contextlib.chdir(self.root):
            try:
                status, said = run(*self.options, "--out", "out")
                if status:
                    wrong = None if said.count("\n") == 1 and len(said) > 20 else f"said {said!r}"
                else:
                    found = ends(self.root / "out")
                    wrong = None if found == self.wanted else "another end with status 0"
            except BaseException as error:
                wrong = f"traceback of {error!r}"
            finally:
                if path.parts[0] != "out":
                    (self.root / path).write_bytes(self.kept[path])
        return wrong


KINDS = ("truncated", "flipped bit", "zeroed block", "empty", "another file")
STATES = ("finished", "interrupted", "images", "weights")


@functools.lru_cache
def scene(state):
    root = Path(tempfile.mkdtemp(prefix="mhkd-damage-"))
    SCENES.append(root)
    return Scene(root, state)


SCENES: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def remove_scenes():
    yield
    for root in SCENES:
        shutil.rmtree(root)


@pytest.mark.parametrize("state", STATES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pick=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(KINDS),
    place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7),
)  # fmt: skip
def test_after_damage_to_any_file_a_run_ends_as_undisturbed_or_with_one_sentence(
    state, pick, kind, place, bit
):
    files = scene(state).files
    path = files[int(pick * len(files))]
    assert scene(state).try_damage(path, kind, place, bit) is None, path


def test_a_scene_notices_other_weights_and_what_is_no_sentence(monkeypatch):
    """The trap works: it would catch a run that believes what it finds."""
    it = scene("interrupted")
    path = it.student.relative_to(it.root) / "checkpoint.pt"
    monkeypatch.setattr(mhkd.zipfile.ZipFile, "testzip", lambda self: None)
    found = {it.try_damage(path, "flipped bit", place, 6) for place in (0.2, 0.3, 0.4, 0.5, 0.6)}
    assert "another end with status 0" in found


# Kills


def kills(trials, seed):
    """Runs killed at random moments, each up to three times: how many ended as the undisturbed."""
    moments, held = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root, options = Path(folder), [*DIGITS[:-2], "--subset", "60"]
        began = time.monotonic()
        assert end_of(start(*options, "--out", root / "wanted")) == 0
        whole, killed = time.monotonic() - began, 0
        for i in range(trials):
            out = root / str(i)
            for _ in range(3):
                process = start(*options, "--out", out)
                process.join(moments.uniform(0.3, 1) * whole)
                process.kill()
                killed += end_of(process) == -signal.SIGKILL
            assert end_of(start(*options, "--out", out)) == 0
            held += ends(out) == ends(root / "wanted")
            assert not [*out.rglob("*.part")], "half a file stayed"
    return held, killed


def test_runs_killed_at_random_moments_end_bit_for_bit_as_the_undisturbed_one():
    seed = random.randrange(10**6)
    held, killed = kills(3, seed)
    assert held == 3 and killed > 0, seed


# A soak


def _soak(folder, epochs):
    """A long run in this process; writes memory and handles after each epoch."""
    torch.set_num_threads(1)
    figures, save = [], mhkd.save

    def spy(*arguments):
        save(*arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len([*arguments[0].iterdir()])
        figures.append((pages * 4 // 1024, len(os.listdir("/proc/self/fd")), files))
        with open(Path(folder) / "figures", "a") as file:
            file.write(json.dumps(figures[-1]) + "\n")

    mhkd.save = spy
    options = ["--student", "resnet8", "--method", "ce", "--dataset", "digits", "--subset", "20"]
    options += ["--batch-size", "20", "--epochs", str(epochs), "--device", "cpu"]
    sys.exit(mhkd.main([*options, "--out", str(Path(folder) / "out")]))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_in_a_soak_with_kills_memory_handles_and_files_stay_flat(tmp_path):
    epochs, moments, killed = int(os.environ.get("SOAK", 60)), random.Random(0), 0
    for _ in range(max(2, epochs // 100)):
        process = fork(_soak, str(tmp_path), epochs)
        process.join(moments.uniform(1.5, 3))
        process.kill()
        killed += end_of(process) == -signal.SIGKILL
    assert end_of(fork(_soak, str(tmp_path), epochs), timeout=3600) == 0
    figures = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert len(figures) >= epochs
    memory, handles, files = zip(*figures[-epochs // 2 :])
    third = len(memory) // 3
    assert sum(memory[-third:]) / third - sum(memory[:third]) / third < 8, memory  # MiB
    assert len({*handles}) == 1 and max(files) <= 5
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "log.jsonl", "result.json", "student.pt",
    ]  # fmt: skip
    assert len((folder / "log.jsonl").read_text().splitlines()) == epochs


def table(trials):
    """Print kinds, tried, held, for each state of a run; those that did not hold in full."""
    chance, rows, wrong = random.Random(0), collections.Counter(), []
    for state in STATES:
        for kind in KINDS:
            for _ in range(trials):
                it = scene(state)
                draw = (kind, chance.random(), chance.randrange(8))
                path = chance.choice(it.files)
                end = it.try_damage(path, *draw)
                rows[state, kind, "tried"] += 1
                rows[state, kind, "held"] += end is None
                wrong += [(state, str(path), *draw, end)] if end else []
    print(f"| {'a run that is':13} | {'damage':12} | tried | held |\n|---|---|---|---|")
    for state in STATES:
        for kind in KINDS:
            tried, held = (rows[state, kind, word] for word in ("tried", "held"))
            print(f"| {state:13} | {kind:12} | {tried:5} | {held:4} |")
    held, killed = kills(trials, 0)
    print(f"| {f'killed ({killed} kills)':13} | {'SIGKILL':12} | {trials:5} | {held:4} |")
    for line in wrong:
        print(*line)


if __name__ == "__main__":
    try:
        table(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
    finally:
        for root in SCENES:
            shutil.rmtree(root)
