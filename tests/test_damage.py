"""Damage to any file that a run leaves or reads: the undisturbed end, or one sentence. A soak.

python tests/test_damage.py 40                       # a table: kinds, tried, held
TRIALS=1000 pytest tests/test_damage.py -k damage    # examples of each state
SOAK=1000 pytest tests/test_damage.py -k soak        # epochs
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import end_of, fork, outcome, pixels, save_image, start
from hypothesis import given, settings
from hypothesis import strategies as st

import mhkd
import mhkd_runs

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

SMALL = ["--method", "kd", "--teacher", "resnet8", "--student", "resnet8", "--device", "cpu"]
SMALL += ["--batch-size", "20", "--epochs", "3", "--seed", "1", "--keep-checkpoint"]
DIGITS = [*SMALL, "--dataset", "digits", "--subset", "40"]
CLOCK = {"seconds", "environments", "sha256", "log_sha256"}
FILE = {"name", "differs", "teacher_sha256"}  # a bit that means nothing makes another file


def run(*arguments):
    """mhkd.py in this process: its exit status and what it said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = mhkd.main([*map(str, arguments)])
    return status, said.getvalue()


def ends(out):
    """What the runs below a folder have come to: weights, logs, results, without the clock."""
    found = []
    for path in sorted(out.glob("*/result.json")):
        result = mhkd_runs.read_json(path).items()
        found.append((outcome(path.parent), {k: v for k, v in result if k not in CLOCK | FILE}))
    return found


class Scene:
    """A run in some state, on digits or a folder of images, to be damaged and started again."""

    def __init__(self, root, state):
        self.root, self.out, self.options = root, root / "out", DIGITS
        if state == "images":
            for i in range(60):
                place = root / "images" / ("train", "val")[i % 3 == 2] / f"class{i % 2}"
                save_image(place / f"{i}.bmp", pixels(16, 16, 3, seed=i))
            data = ["--data", root / "images", "--image-size", "16"]
            self.options = [*SMALL, "--dataset", "folder", *data, "--epochs", "1"]
        if state == "weights":
            assert run(*DIGITS, "--out", root / "teacher") == (0, "")
            (teacher,) = (root / "teacher").glob("*resnet8-ce*")
            shutil.copy(teacher / "student.pt", root / "given.pt")
            self.options = [*DIGITS, "--teacher-weights", root / "given.pt"]
        assert run(*self.options, "--out", self.out) == (0, "")
        self.wanted = ends(self.out)
        (self.student,) = self.out.glob("*-kd-*")
        if state == "interrupted":  # in the student's third epoch
            shutil.copy(self.student / "checkpoint-before.pt", self.student / "checkpoint.pt")
            for name in ("result.json", "student.pt"):
                (self.student / name).unlink()
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        going_on = self.student if state == "interrupted" else None
        # A finished run does not read its log.
        files = [p for p in files if p.name != "log.jsonl" or p.parent == going_on]
        self.others = [path.read_bytes() for path in files]
        if state == "weights":  # a whole student.pt in its place is another teacher, not damage
            self.others = [path.read_bytes() for path in files if path.name != "student.pt"]
            files = [root / "given.pt"]
            shutil.rmtree(self.student)  # else there would be two runs: of this file, of that one
        self.kept = {path: path.read_bytes() for path in files}
        shutil.copytree(self.out, root / "before")

    def try_damage(self, path, kind, place, bit):
        """Damage a file, start the run again: None, or what is wrong with the end."""
        content = bytearray(self.kept[path])
        if path.suffix == ".json" and path.parent.parent == self.out:
            kind = "truncated"  # a record that has been edited and can be read is not detected
        at = min(int(place * len(content)), len(content) - 1)
        if kind in ("truncated", "empty"):
            del content[at if kind == "truncated" else 0 :]
        elif kind == "flipped bit":
            content[at] ^= 1 << bit
        elif kind == "zeroed block":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        else:
            content = self.others[int(place * len(self.others)) % len(self.others)]
        shutil.rmtree(self.out)
        shutil.copytree(self.root / "before", self.out, copy_function=shutil.copy)
        path.write_bytes(content)
        try:
            status, said = run(*self.options, "--out", self.out)
        except BaseException as error:
            return f"traceback of {error!r}"
        if status:
            return None if said.count("\n") == 1 and len(said) > 20 else f"said {said!r}"
        return None if ends(self.out) == self.wanted else "another end with status 0"


STATES = ("finished", "interrupted", "images", "weights")
KINDS = ("truncated", "flipped bit", "zeroed block", "empty", "another file")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Scenes by their states, each made once."""
    made = {}

    def find(state):
        made[state] = made.get(state) or Scene(tmp_path_factory.mktemp(state), state)
        return made[state]

    return find


@pytest.mark.parametrize("state", STATES)
@settings(max_examples=int(os.environ.get("TRIALS", 15)), deadline=None)
@given(pick=st.integers(0, 99), kind=st.sampled_from(KINDS),
       place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))  # fmt: skip
def test_after_damage_to_any_file_a_run_ends_as_undisturbed_or_with_one_sentence(
    scene, state, pick, kind, place, bit
):
    it = scene(state)
    path = [*it.kept][pick % len(it.kept)]
    assert it.try_damage(path, kind, place, bit) is None, path


def test_a_scene_notices_other_weights_and_what_is_no_sentence(scene, monkeypatch):
    """The trap works: it would catch a run that believes what it finds."""
    it = scene("interrupted")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: None)
    checkpoint = it.student / "checkpoint.pt"
    found = {it.try_damage(checkpoint, "flipped bit", n / 10, 6) for n in range(2, 7)}
    assert "another end with status 0" in found


def _soak(folder, epochs):
    """A long run in this process; writes memory and handles after each epoch."""
    torch.set_num_threads(1)
    save = mhkd_runs.Run.save

    def spy(run, state):
        save(run, state)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len([*run.folder.iterdir()])
        with open(folder / "figures", "a") as file:
            figures = (pages * 4 // 1024, len(os.listdir("/proc/self/fd")), files)
            file.write(json.dumps(figures) + "\n")

    mhkd_runs.Run.save = spy
    options = ["--student", "resnet8", "--method", "ce", "--dataset", "digits", "--subset", "20"]
    options += ["--batch-size", "20", "--epochs", str(epochs), "--device", "cpu"]
    sys.exit(mhkd.main([*options, "--out", str(folder / "out")]))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_in_a_soak_with_kills_memory_handles_and_files_stay_flat(tmp_path):
    epochs, chance = int(os.environ.get("SOAK", 60)), random.Random(0)
    kills, written = max(2, epochs // 100), tmp_path / "figures"
    # All kills fall into the first third, so that one process computes the half that is compared.
    for last in sorted(chance.sample(range(2, epochs // 3), kills)):
        process = fork(_soak, tmp_path, epochs)
        while process.is_alive() and not (
            written.is_file() and len(written.read_text().splitlines()) >= last
        ):
            time.sleep(0.01)
        process.kill()
        end_of(process)
    assert end_of(fork(_soak, tmp_path, epochs), timeout=3600) == 0
    figures = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert len(figures) >= epochs - kills  # one may fall between an epoch and its figures
    memory, handles, files = zip(*figures[-epochs // 2 :])
    third = len(memory) // 3
    assert sum(memory[-third:]) / third - sum(memory[:third]) / third < 8, memory  # MiB
    assert len({*handles}) == 1 and max(files) <= 5
    (folder,) = (tmp_path / "out").iterdir()
    left = ["config.json", "log.jsonl", "result.json", "student.pt"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert len((folder / "log.jsonl").read_text().splitlines()) == epochs


def table(trials):
    """Print for each state of a run and kind of damage: tried, held; kills; what did not hold."""
    chance, wrong = random.Random(0), []
    print("| a run that is | damage | tried | held |\n|---|---|---:|---:|")
    for state in STATES:
        with tempfile.TemporaryDirectory() as root:
            it = Scene(Path(root), state)
            for kind in KINDS:
                ends_ = []
                for _ in range(trials):
                    path = chance.choice([*it.kept])
                    draw = (kind, chance.random(), chance.randrange(8))
                    ends_.append(it.try_damage(path, *draw))
                    wrong += [(state, path.name, *draw, ends_[-1])] if ends_[-1] else []
                print(f"| {state} | {kind} | {trials} | {ends_.count(None)} |", flush=True)
    with tempfile.TemporaryDirectory() as root:
        outs, held = [Path(root) / str(n) for n in range(trials + 1)], 0
        for out in outs:
            moments = [chance.uniform(0.2, 3) for _ in range(2)] if out != outs[0] else []
            for seconds in (*moments, 600):
                process = start(*DIGITS, "--out", out)
                process.join(seconds)
                process.kill()
                end_of(process)
            held += out != outs[0] and ends(out) == ends(outs[0])
    print(f"| killed at two random moments | SIGKILL | {trials} | {held} |")
    print(*wrong, sep="\n")


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
