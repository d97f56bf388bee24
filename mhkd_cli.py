"""Command lines: Config as options, and errors as one sentence with an exit status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mhkd
from mhkd import METHODS, Config, Option, UsageError, loss_backend


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def add_option(group: Any, name: str, option: Option) -> None:
    flag, default, help = mhkd.flag_of(name), option.default, option.help
    if option.parse is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=name, action=action, default=None, help=help)
        return
    if default is not None:
        help = f"{help} (default: {default})"
    kinds = {
        str: "NAME",
        mhkd.words: "NAME,NAME",
        mhkd.integers: "INT,INT",
        mhkd.numbers: "FLOAT,FLOAT",
    }
    metavar = kinds.get(option.parse, option.parse.__name__.upper())
    if option.rule and option.rule[1].startswith("one of "):
        metavar = "{" + option.rule[1].removeprefix("one of ").replace(", ", "|") + "}"
    optional = {"nargs": "?", "const": "float32"} if name == "teacher_store" else {}
    group.add_argument(
        flag, type=option.parse, default=None, help=help, metavar=metavar, **optional
    )


def parse_config(
    arguments: Sequence[str], extra: Callable[[Parser], None] = lambda parser: None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse a command line, with what `extra` adds to it.

    Returns everything that was given, and the arguments of Config.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=Config.method)
    methods = mhkd.find_methods(first.parse_known_args(arguments)[0].method)
    if {"-h", "--help"} & {*arguments}:
        mhkd.sibling("mhkd_baselines", optional=True)  # registers its methods
    parser = Parser(
        prog="mhkd.py", description=mhkd.__doc__.split("\n\nThe method")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Methods: {', '.join(METHODS)}. --help --method NAME shows the options of one.",
    )  # fmt: skip
    fields = [f for f in dataclasses.fields(Config) if f.metadata]
    names = dict.fromkeys(f.metadata["group"] for f in fields)
    groups = {name: parser.add_argument_group(name) for name in names}
    for f in fields:
        add_option(groups[f.metadata["group"]], f.name, f.metadata["option"])
    declared = mhkd.method_options(methods)
    for name, option in declared.items():
        add_option(groups["method"], name, option)
    version = "show versions and compare the fused loss with plain PyTorch"
    parser.add_argument("--version", action="store_true", help=version)
    extra(parser)
    parsed, left = parser.parse_known_args(arguments)
    for word in left:
        if not word.startswith("--"):
            raise UsageError(f"the argument '{word}' belongs to no option")
        name = word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        raise UsageError(mhkd.foreign_option(name, "+".join(methods)))
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    config = {f.name: values[f.name] for f in fields if f.name in values}
    return parsed, {**config, "options": {n: values[n] for n in declared if n in values}}


def main(arguments: Sequence[str] | None = None) -> int:
    def run() -> None:
        parsed, values = parse_config(sys.argv[1:] if arguments is None else arguments)
        if parsed.version:
            print(f"mhkd {mhkd.__version__}, PyTorch {torch.__version__}, loss: {loss_backend()}")
            fused = mhkd.sibling("mhkd_fused", optional=True)
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available() if fused else []:
                problem = fused.check(device, mhkd._reference_loss)
                print(f"fused loss on {device}: {problem or 'agrees with plain PyTorch'}")
            return
        config = Config(**values)
        if not config.teacher:  # --teacher-store also sets the view seed, so it has one
            names = [n for n in values if n.startswith("teacher") and n != "teacher_store"]
            for flag in map(mhkd.flag_of, names):
                mhkd.log(f"note: {flag} has no effect with --method {config.method}")
        mhkd.keep_freed_memory()
        mhkd.train(config)

    return command_line("mhkd.py", run)


def command_line(program: str, run: Callable[[], Any]) -> int:
    """Call run(); errors end as one sentence on stderr and an exit status."""

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, terminate)
    again = "the same command continues after the last finished epoch"
    status = 1
    try:
        run()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        status, sentence = (143 if error.args else 130), f"{str(error) or 'interrupted'}; {again}"
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status, sentence = 141, f"the output was closed; {again}"
    except OSError as error:
        sentence = f"{error}; when that is fixed, {again}"
    except MemoryError as error:
        sentence = f"there is not enough memory ({error}): try a smaller batch, image or head"
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            sentence = f"{error}: try a smaller batch, image or head"
        elif getattr(error, "user_error", False):
            sentence = str(error)
        else:
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    with contextlib.suppress(OSError):
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return status
