"""The repository root on the path, few threads, and what several test files share."""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPT = ROOT / "mhkd.py"

# The networks here are tiny, and several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# A run of a second on the CPU: 200 digits of 16 pixels, small heads.
TINY = ["--dataset", "digits", "--subset", "200", "--epochs", "2", "--batch-size", "40"]
TINY += ["--device", "cpu"]
PAIR = ["--teacher", "resnet14", "--student", "resnet8", *TINY]
MHKD = [*PAIR, "--head-width", "8"]
ALONE = ["--student", "resnet8", "--method", "ce", *TINY]
# A run of an epoch on images in files: --data is to follow.
FOLDER = ["--student", "resnet8", "--method", "ce", "--dataset", "folder", "--epochs", "1"]
FOLDER += ["--batch-size", "4", "--image-size", "16", "--device", "cpu", "--data"]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def script(*arguments, **keywords):
    """Run mhkd.py as a user does; its output as text."""
    return python(SCRIPT, *arguments, **keywords)


def python(*arguments, **keywords):
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=300, **keywords)


def user_errors():
    """What a user's mistake raises."""
    import mhkd
    import mhkd_runs

    return mhkd.UsageError, mhkd_runs.RunError


def run(out, *arguments):
    """mhkd.py in this process; its exit status."""
    import mhkd

    return mhkd.main([*map(str, arguments), "--out", str(out)])


@pytest.fixture
def failing(capsys):
    """Runs what must fail; gives the one sentence that it says on stderr."""

    def sentence(out, *arguments):
        capsys.readouterr()
        assert run(out, *arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("mhkd.py: ") and said.endswith("\n") and said.count("\n") == 1, said
        assert len(said) < 700
        return said

    return sentence


def half(out, *arguments, error=None):
    """A run that ended when the disk was full at the checkpoint of its second epoch; its --out."""
    save = torch.save

    def full(state, file):
        if state.get("epoch") == 2:
            file.write(b"half of it")
            raise error or OSError(28, "No space left on device")
        save(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run(out, *arguments) == 1
    return out


# What runs leave


def folder_of(out, student="resnet8", method="*"):
    """The only run folder of that student and method below --out."""
    (found,) = out.glob(f"digits-*{student}-{method}-*")
    return found


def listing(folder):
    """What a folder holds: for each path below it the bytes and the time of its last change."""
    paths = sorted(folder.rglob("*"))
    return {p: p.is_file() and (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def read(path):
    return json.loads(path.read_text())


def log_of(folder):
    """The epochs of a run, without what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in entries]


def weights_of(folder):
    return torch.load(folder / "student.pt", weights_only=True)["model"]


def outcome(folder):
    """What makes two runs the same: every figure of the log, every bit of the weights."""
    bits = b"".join(tensor.numpy().tobytes() for tensor in weights_of(folder).values())
    return log_of(folder), hashlib.sha256(bits).hexdigest()


# Images


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy()


def save_image(path, array, **keywords):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **keywords)


# Processes that can be killed, at a fraction of the start of Python and PyTorch


def _child(arguments, output, die, environment):
    """mhkd.py in this process. die: (a function of os, its count), at which it kills itself."""
    import mhkd

    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if die:
        name, left = die[0], [die[1]]
        real = getattr(os, name)

        @functools.wraps(real)
        def dying(*args, **keywords):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **keywords)

        setattr(os, name, dying)
    torch.set_num_threads(1)
    sys.exit(mhkd.main(arguments))


def fork(target, *arguments):
    """A process that is forked from one that has imported PyTorch and has not used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mhkd", "sklearn.datasets", "pytest", "torch._dynamo"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def start(*arguments, output=os.devnull, die=None, environment=()):
    """mhkd.py as a forked process, its output in a file."""
    return fork(_child, [*map(str, arguments)], str(output), die, dict(environment))


def environments(processes):
    """What torchrun tells each of its processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = address | {"WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def end_of(process, timeout=120):
    """Its exit status, negative for a signal."""
    process.join(timeout)
    status = process.exitcode
    process.kill()
    process.join()
    return status
