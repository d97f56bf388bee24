"""The compiled loss of csrc/: loads the library, compares it with plain PyTorch, selects it.

mhkd.mhkd_loss calls select() if this file lies beside mhkd.py. The library `_mhkd_fused` registers
operators in torch.ops.mhkd; it is built by `python setup.py build_ext --inplace` or installed by
`pip install`. This module imports only PyTorch and the standard library.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

MAX_HEADS = 16  # kMaxHeads in csrc/mhkd_loss.h
INTERFACE = 6  # kInterface in csrc/mhkd_loss.cpp
TO_BE_CHECKED = ("cuda",)  # devices on which "auto" compares before it uses the library

operator: Any = None  # torch.ops.mhkd.loss.default; finding it takes longer than a small batch
_loaded: bool | None = None  # None: not tried yet
_problems: dict[torch.device, str] = {}  # what check() has found, "" if nothing


class KernelCrash(RuntimeError):
    """The library failed on CUDA; this process cannot use the GPU any more."""

    user_error = True  # mhkd_config.command_line() prints the message without a traceback


def load() -> bool:
    """Whether the library is installed. The first call loads it."""
    global _loaded, operator
    if _loaded is not None:
        return _loaded
    problem, operators = "", torch.ops.mhkd
    spec = importlib.util.find_spec("_mhkd_fused")  # a library, no Python module: never imported
    if not hasattr(operators, "loss") and spec is not None and spec.origin is not None:
        try:
            torch.ops.load_library(spec.origin)
        except OSError as error:  # built for another version of PyTorch
            problem = f"cannot be loaded ({error})"
    if hasattr(operators, "loss"):  # also if another copy of this file has loaded it
        found = operators.interface() if hasattr(operators, "interface") else 1
        if found == INTERFACE:
            operator = operators.loss.default
        else:
            problem = f"has interface {found}, mhkd needs {INTERFACE}: install both again"
    if problem:
        warnings.warn(f"the fused loss {problem}: plain PyTorch is used", stacklevel=2)
    _loaded = operator is not None
    return _loaded


def describe() -> str:
    """What backend="auto" uses, for example "fused (CPU avx2, CUDA sm_90)"."""
    if not load():
        return "reference (fused loss not installed)"
    parts = [torch.ops.mhkd.cpu_capability()]
    if hasattr(torch.ops.mhkd, "cuda_architectures"):
        parts.append(torch.ops.mhkd.cuda_architectures())
    parts += [f"not on {device}: {problem}" for device, problem in _problems.items() if problem]
    return f"fused ({', '.join(parts)})"


def missing(device_type: str) -> str:
    """Why the library cannot compute on a kind of device; "" if it can."""
    if not load():
        return "the fused loss is not installed"
    if device_type not in ("cpu", "cuda", "meta"):
        return f"there is no fused loss for {device_type} tensors"
    if device_type == "cuda" and not hasattr(torch.ops.mhkd, "cuda_architectures"):
        return "the fused loss was built without CUDA"
    return ""


def select(backend: str, device: torch.device, heads: int, reference: Callable) -> bool:
    """Whether `operator` computes this call, for the backend auto or fused.

    reference: the loss in plain PyTorch with the arguments of the operator.

    Raises:
        RuntimeError: backend "fused", and the library cannot be used.
    """
    if backend == "auto" and heads > MAX_HEADS:
        return False
    reason = missing(device.type)
    if backend == "auto":
        return not reason and (device.type not in TO_BE_CHECKED or trusted(device, reference))
    if reason:
        raise RuntimeError(f'mhkd_loss: {reason}: use backend="auto" or backend="reference"')
    return True


def trusted(device: torch.device, reference: Callable) -> bool:
    """Whether the library agrees with plain PyTorch on a device. The first call compares."""
    if device not in _problems:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a CUDA graph cannot record a comparison: plain PyTorch for this call
        _problems[device] = check(device, reference)
        if _problems[device]:
            warnings.warn(f"mhkd_loss: {_problems[device]}: plain PyTorch is used", stacklevel=5)
    return not _problems[device]


def check(device: torch.device | str, reference: Callable) -> str:
    """Compare the library with plain PyTorch; returns what differs, "" if nothing.

    Compares loss, terms and gradients for small random logits of each dtype, in some milliseconds.

    Raises:
        KernelCrash: after a CUDA error.
    """
    device = torch.device(device)
    if reason := missing(device.type):
        return reason

    def outputs(loss_of, z, *settings):
        leaves = [leaf.detach().requires_grad_() for leaf in z]
        loss, terms, *_ = loss_of(leaves[:2], leaves[2:], *settings)
        gradients = torch.autograd.grad(loss, leaves[:2] + leaves[3:])
        return [x.detach().double().cpu() for x in (loss, terms, *gradients)]

    generator = torch.Generator().manual_seed(0)
    cases = [(torch.float32, 40, 4.0), (torch.bfloat16, 40, 4.0), (torch.float16, 2050, 4.0)]
    cases += [(torch.float32, 2051, 2.5), (torch.bfloat16, 9000, 1.0), (torch.float64, 1100, 4.0)]
    autocast, inference = torch.autocast(device.type, enabled=False), torch.inference_mode(False)
    with autocast, inference, torch.enable_grad():
        for dtype, K, tau in cases:
            # An odd stride; a row that is ignored and NaN, one unlabelled; masked classes.
            z = 3 * torch.randn(4, 6, K + 1, generator=generator, device="cpu")
            z[:, 0], z[:, 1, 1], z[:, 2, :33] = math.nan, -math.inf, -1e30
            z = z.to(device, dtype)[..., :K]
            labels = torch.tensor([-100, 0, K - 1, 2, -1, K // 2], device=device)
            settings = labels, [tau, 0.9, 0.45, 0.1, 0.05], [], [False, True], -100
            try:
                found = outputs(operator, z, *settings)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                if "CUDA error" not in reason or "no kernel image" in reason:  # still usable
                    return reason
                raise KernelCrash(
                    f"the fused loss failed on {device} ({reason}), and this process cannot use "
                    "the GPU any more: run again with --backend reference"
                ) from error
            allowed = 2 * torch.finfo(dtype).eps + 1e-5  # relative to the largest number
            for x, y in zip(found, outputs(reference, z.double(), *settings)):
                if not (x - y).abs().max() <= allowed * y.abs().max():
                    return f"the fused loss differs from plain PyTorch for {dtype} [6, {K}]"
    return ""
