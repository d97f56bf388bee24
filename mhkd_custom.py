"""Custom networks for mhkd.py: torchvision, timm, FILE.py:FUNCTION; detection of units.

mhkd.py imports this file when a network name contains `:`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhkd
import mhkd_runs
from mhkd import UsageError, check_name, explain, import_optional

# --------------------------------------------------------------------------------------------------
# 1. Networks by name
# --------------------------------------------------------------------------------------------------


def check(name: str) -> None:
    """Raise a UsageError if there is no network of that name, without building one."""
    library, _, rest = name.partition(":")
    if library == "timm":
        timm = import_optional("timm", "timm", f"the network {name}")
        check_name("network timm:", rest.split(".")[0], timm.list_models())
        with explain(f"there is no network {name}", "leave out what follows the point"):
            timm.get_pretrained_cfg(rest)
    elif library == "torchvision":
        models = import_optional("torchvision.models", "torchvision", f"the network {name}")
        check_name("network torchvision:", rest, models.list_models(module=models))
    elif ".py:" in name:
        with loaded(name):
            pass
    else:
        check_name("network", name, mhkd.MODELS)


def build(name: str, num_classes: int, init: str, image_size: int | None) -> nn.Module:
    """See mhkd.build_model, for names with `:`."""
    library = name.partition(":")[0] in ("torchvision", "timm")
    if ".py:" in name:
        with loaded(name) as function:
            with explain(f"'{name}' does not work", "it must build a network for num_classes"):
                model = function(num_classes)
        if not isinstance(model, nn.Module):
            raise UsageError(f"'{name}' returns {type(model).__name__}, not a module")
    else:
        check(name)
        model = from_library(name, image_size, num_classes=num_classes)
    if init == "random":
        return model
    if init.startswith("file:"):
        state = mhkd_runs.read_state(init[5:], model.state_dict())
    elif library:
        *_, where = library_weights(name) or [None]
        hint = f"put {where}, or use file:PATH instead of pretrained"
        with explain(f"the pretrained weights of {name} are not available", hint):
            state = from_library(name, image_size, pretrained=True).state_dict()
    else:
        raise UsageError(f"there are no pretrained weights for {name}: use random or file:PATH")
    what = f"the weights '{init}' do not fit {name}"
    mhkd_runs.load_state(model, state, what, num_classes)
    return model


def from_library(name: str, image_size: int | None, **keywords: Any) -> nn.Module:
    """A network of torchvision or timm. keywords: num_classes, or pretrained."""
    library, _, rest = name.partition(":")
    if library == "timm":
        timm = import_optional("timm", "timm", f"the network {name}")
        try:  # only some networks take an image size
            return timm.create_model(rest, img_size=image_size, **keywords)
        except TypeError:
            return timm.create_model(rest, **keywords)
    models = import_optional("torchvision.models", "torchvision", f"the network {name}")
    if keywords.pop("pretrained", False):
        return models.get_model(rest, weights="DEFAULT")
    if rest.startswith("vit") and image_size:
        keywords["image_size"] = image_size
    if rest not in ("googlenet", "inception_v3"):
        return models.get_model(rest, weights=None, **keywords)
    model = models.get_model(rest, weights=None, init_weights=True, **keywords)
    # Without their own auxiliary classifiers.
    model.aux_logits, model.AuxLogits, model.aux1, model.aux2 = False, None, None, None
    return model


def library_weights(name: str) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Mean and std of a library's pretrained weights, and where their file belongs."""
    library, _, rest = name.partition(":")
    if library == "torchvision":
        models = import_optional("torchvision.models", "torchvision", f"the network {name}")
        weights = models.get_model_weights(rest).DEFAULT
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        facts, where = weights.transforms(), f"{Path(weights.url).name} into '{folder}'"
    elif library == "timm":
        timm = import_optional("timm", "timm", f"the network {name}")
        facts = timm.get_pretrained_cfg(rest)
        where = facts and f"the file of {facts.hf_hub_id or facts.url} anywhere, and name it"
    else:
        return None
    return facts and (tuple(facts.mean), tuple(facts.std), where)


def absolute_name(name: str) -> str:
    """The name of a network, with an absolute path if it is FILE.py:FUNCTION."""
    return os.path.abspath(name) if ".py:" in name else name


def file_of(name: str) -> Path:
    """The file of FILE.py:FUNCTION, which must exist."""
    path = Path(name.rpartition(":")[0])
    if not path.is_file():
        raise UsageError(f"there is no file '{path}': a network's name is path/to/FILE.py:FUNCTION")
    return path.resolve()


def source_files(name: str) -> list[Path]:
    """For FILE.py:FUNCTION the file and the modules that it imports from its own folder.

    Import statements are followed, also inside functions, but not importlib. Other names: [].
    """
    files = [file_of(name)] if ".py:" in name else []
    for file in files:  # which grows
        with explain(f"'{file}' cannot be loaded", "fix it"):
            tree = ast.parse(file.read_bytes(), file.name)
        for node in ast.walk(tree):
            start, modules = files[0].parent, []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = file.parents[node.level - 1] if node.level else start
                prefix = f"{node.module}." if node.module else ""
                modules = [prefix + alias.name for alias in node.names]
            for module in modules:
                place = start
                for part in module.split("."):
                    place = place / part
                    found = (place.with_name(f"{part}.py"), place / "__init__.py")
                    files += [f for f in found if f.is_file() and f not in files]
    mine = Path(__file__).resolve().parent
    return [f for f in files if not (f.parent == mine and f.stem.partition("_")[0] == "mhkd")]


# By file: the content of its source_files, and the modules of the file and its neighbours.
_loaded: dict[Path, tuple[list[bytes] | None, dict[str, Any]]] = {}


@contextlib.contextmanager
def loaded(name: str) -> Iterator[Callable[[int], nn.Module]]:
    """The function of FILE.py:FUNCTION. Meanwhile modules in the file's folder can be imported.

    The file is executed once, and again after it or a module that it imports was edited. Two files
    may import different modules of the same name, each from its folder.
    """
    path, function = file_of(name), name.rpartition(":")[2]
    key = f"mhkd_network_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    content = [file.read_bytes() for file in source_files(name)]
    known, mine = _loaded.pop(path, (None, {}))
    others = {n: m for _, modules in _loaded.values() for n, m in modules.items()}
    for n in {**others, **mine}:
        sys.modules.pop(n, None)
    before = {*sys.modules}
    if known == content:
        sys.modules.update(mine)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python compares whole seconds
    sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    try:
        if known != content:
            known, spec = None, importlib.util.spec_from_file_location(key, path)
            sys.modules[key] = importlib.util.module_from_spec(spec)  # dataclasses look there
            with explain(f"'{name}' does not work", "fix the file or install what it imports"):
                spec.loader.exec_module(sys.modules[key])
            known = content
        module = sys.modules[key]
        if not callable(getattr(module, function, None)):
            names = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
            check_name(f"network {path}:", function, names or ["no functions"])
        yield getattr(module, function)
    finally:
        sys.dont_write_bytecode = writes
        with contextlib.suppress(ValueError):  # the file may change it, too
            sys.path.remove(str(path.parent))
        new, mine = {n: sys.modules[n] for n in {*sys.modules} - before}, {}
        for n, module in new.items():
            place = getattr(module, "__file__", None) or [*getattr(module, "__path__", [])]
            if n == key or str(path.parent / n.partition(".")[0]) in str(place):
                mine[n] = module
        _loaded[path] = known, mine
        sys.modules.update({n: m for n, m in others.items() if n not in sys.modules})


# --------------------------------------------------------------------------------------------------
# 2. Units and layouts of any network
# --------------------------------------------------------------------------------------------------


def find_units(
    model: nn.Module, images: Tensor, role: str, network: str, names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the first units of a network, unless given, and the layout of each.

    images: a normalised batch [B, 3, S, S] on which a copy of the network runs.

    Detected units: the last submodule that runs at each size of the map, but not inside one that
    changes the size; with five sizes or more without the first, which is the stem's; of these the
    first three (section 3.2). If no map shrinks, as in a transformer, blocks at quarters of the
    depth. Names from timm's feature_info are preferred.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    opaque: set[str] = set()  # submodules of traced or compiled modules: their hooks may not run
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
        if compiled or isinstance(module, torch.jit.ScriptModule):
            opaque |= {f"{name}.{n}".strip(".") for n, _ in module.named_modules() if n or compiled}
    if opaque.intersection(names or modules) and (names or opaque.issuperset(modules)):
        raise UsageError(
            f"the {role} or a part of it is traced or compiled, so that its submodules cannot be "
            "observed: use the network as it was before torch.jit or torch.compile, or --method kd"
        )
    _, seen = mhkd.run_once(model, images)
    runs = Counter(name for name, _, _ in seen if name not in opaque)
    for name in names or ():
        if name in modules and not runs[name]:
            hint = f"choose others with --{role}-units"
            raise UsageError(f"the submodule '{name}' of the {role} does not run: {hint}")
    if names:
        return tuple(names), find_layouts(seen, images, names)
    layout = common_layout(seen, images)
    maps: dict[str, int] = {}  # how often the size is halved, of submodules that run once
    for name, _, out in seen:
        with contextlib.suppress(UsageError):
            if runs[name] == 1 and is_feature(out) and len(out) == len(images):
                side, other = mhkd.as_map(out, layout_of(out, images, name, layout)).shape[2:]
                if side == other > 1:
                    maps[name] = round(math.log2(images.shape[-1] / side))
    info = getattr(model, "feature_info", None) or []
    found = [f["module"] for f in info if isinstance(f, dict) and f.get("module") in maps]
    if len({maps[name] for name in found}) > 2:
        found = found[-4:-1] if len(found) > 3 else found
    else:
        sizes_in = {n: {maps[m] for m in maps if m.startswith(f"{n}.")} for n in maps}
        units = [n for n, sizes in sizes_in.items() if len(sizes) < 3]
        last: dict[int, str] = {}  # by size, in the order of the network
        for name, size in maps.items():
            inside = any(name.startswith(f"{unit}.") for unit in units)
            if not inside and size >= max(last, default=0):
                last[size] = name
        found = list(last.values())[1 if len(last) > 4 else 0 :][:3]
    if len(found) < 3:
        blocks: dict[tuple, list[str]] = {}  # those of one parent, class and size
        for name, size in maps.items():
            key = (name.rpartition(".")[0], type(modules[name]), size)
            blocks.setdefault(key, []).append(name)
        most = max(blocks.values(), key=len, default=[])
        found = [most[len(most) * i // 4 - 1] for i in (1, 2, 3)] if len(most) > 3 else found
    if len(found) < 3:
        why = f"found: {', '.join(found)}" if found else "no submodule returns a feature map"
        why += "; a part of it is traced or compiled" if opaque else ""
        hint = f"name them with --{role}-units, or use a method without heads, --method kd"
        raise UsageError(f"the units of the {role} were not detected ({why}): {hint}")
    mhkd.log(f"{role} {network}: heads after {', '.join(found)}")
    return tuple(found), find_layouts(seen, images, found)


def find_layouts(seen: list[tuple], image: Tensor, names: Sequence[str]) -> dict[str, str]:
    """The layout of the features of submodules, as MultiHead takes it.

    seen: what mhkd.run_once returns for the network and an image batch.
    """
    common, found = common_layout(seen, image), {}
    for name, _, out in seen:
        if name in names and is_feature(out):
            found[name] = layout_of(out, image, name, common)
    return found


def is_feature(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() in (3, 4)


def layout_of(feature: Tensor, image: Any, name: str, layout: str | None) -> str:
    """The layout of a feature: "channels_first", "channels_last", or "tokens+n".

    n is the number of class tokens before the H * W tokens of a square map. The image's aspect
    ratio distinguishes [B, C, H, W] from [B, H, W, C].
    """
    shape = tuple(feature.shape)
    if len(shape) == 3:
        square = image.dim() == 4 and image.shape[-1] == image.shape[-2]
        for n in (0, 1, 2, 5) if square else ():
            if shape[1] > n and math.isqrt(shape[1] - n) ** 2 == shape[1] - n:
                return f"tokens+{n}"
        where = f"the submodule '{name}' returns {shape}"
        raise UsageError(f"{where}: {shape[1]} tokens are not a square map")
    if layout:
        return layout
    height, width = image.shape[-2:] if image.dim() == 4 else (1, 1)
    near = max(height, width)  # a map may be rounded by a pixel
    last, first = (abs(h * width - w * height) < near for h, w in (shape[1:3], shape[2:4]))
    if first and last and shape[1] > 1:
        raise UsageError(
            f"the submodule '{name}' returns {shape}, whose channels could be first or last: use "
            "another --image-size or other units"
        )
    return "channels_last" if last and not first else "channels_first"


def common_layout(seen: list[tuple], image: Tensor) -> str | None:
    """ "channels_first" for a network in which no map clearly has its channels last."""
    for name, _, out in seen:
        with contextlib.suppress(UsageError):
            if is_feature(out) and layout_of(out, image, name, None) == "channels_last":
                return None
    return "channels_first"
