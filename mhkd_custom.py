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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    if name.partition(":")[2] in INCEPTIONS:
        state = {key: t for key, t in state.items() if key.partition(".")[0] not in AUXILIARY}
    mhkd_runs.load_state(model, state, what, num_classes)
    return model


INCEPTIONS = ("googlenet", "inception_v3")  # of torchvision
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # their own auxiliary classifiers, which are not used


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
    if rest not in INCEPTIONS:
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
        if rest in INCEPTIONS:  # with these weights torchvision changes the input to this range
            return (0.5,) * 3, (0.5,) * 3, where
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


def note_changed_code(name: str, path: str | Path) -> None:
    """Print a note if the code of FILE.py:FUNCTION is not that of a student.pt."""
    content = mhkd_runs.load_file(Path(path))
    saved = content.get("code_sha256") if isinstance(content, dict) else None
    if saved and not has_code(name, saved):
        file = name.rpartition(":")[0]
        mhkd.log(f"note: '{file}' or what it imports has changed since '{path}' was trained")


def has_code(name: str, sha256: str | None) -> bool:
    """Whether the code of FILE.py:FUNCTION has this hash; True for other networks."""
    files = source_files(name)
    return not files or mhkd.sibling("mhkd_code").code_sha256(files) == sha256


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

    They are detected as in `detect_units`. The result for common networks: docs/units.md.
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
    try:
        _, seen = mhkd.run_once(model, images)
    except UsageError as error:
        what = f"{role} {network}: {str(error).partition(': give ')[0]}"
        hint = "give another --image-size, or wrap it in a function of a FILE.py"
        raise UsageError(f"{what}: {hint}") from error
    prefix = [n for n in [getattr(model, "num_prefix_tokens", None)] if isinstance(n, int)]  # timm
    runs = Counter(name for name, _, _ in seen if name not in opaque)
    for name in names or ():
        if name in modules and not runs[name]:
            hint = f"choose others with --{role}-units"
            raise UsageError(f"the submodule '{name}' of the {role} does not run: {hint}")
    if names:
        return tuple(names), find_layouts(seen, images, names, prefix)
    layout, shapes = common_layout(seen, images), {}
    for name, _, out in seen:  # (H, W, C) of the features of submodules that run once
        with contextlib.suppress(UsageError):
            if runs[name] == 1 and is_feature(out) and len(out) == len(images):
                C, *size = mhkd.as_map(out, layout_of(out, images, name, layout, prefix)).shape[1:]
                if size[0] == size[1]:
                    shapes[name] = (*size, C)
    found = detect_units(model, {*runs}, shapes, images.shape[-1])
    if len(found) < 3:
        why = f"found: {', '.join(found)}" if found else "no submodule returns a feature map"
        why += "; a part of it is traced or compiled" if opaque else ""
        hint = f"name them with --{role}-units, or use a method without heads, --method kd"
        raise UsageError(f"the units of the {role} were not detected ({why}): {hint}")
    mhkd.log(f"{role} {network}: heads after {', '.join(found)}")
    return tuple(found), find_layouts(seen, images, found, prefix)


def detect_units(
    model: nn.Module, runs: set[str], shapes: dict[str, tuple[int, int, int]], side: int
) -> list[str]:
    """Names of the first three units; fewer if they are not found.

    A unit is a block, or a container of blocks that all end at its own size. Blocks are submodules
    of a class that occurs several times, each with several layers. In a network without blocks
    every submodule is a unit, but not inside one that changes the size. Of each size of the map, in
    the order of the network, the last unit is taken; with five sizes or more without the first one,
    which belongs to the stem; of these the first three (paper, section 3.2). If there are fewer
    sizes, as in a transformer: blocks at quarters of the depth. For timm's feature_info see
    docs/units.md.

    Args:
        runs: names of the submodules that run.
        shapes: (H, W, C) of the square feature maps of those that run once, in their order.
        side: of the image.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    layers = layers_in(modules)
    classes = Counter(type(m) for n, m in modules.items() if n in runs and layers[n] > 1)
    repeated = {kind for kind, number in classes.items() if number > 1} - {*GENERIC}
    blocks = [n for n, m in modules.items() if n in runs and layers[n] > 1 and type(m) in repeated]
    # The last layer inside a block that returns no map, for example a tuple, is not its end. Chains
    # of blocks inside it can be units: the branches of an HRNet.
    closed = [name for name in blocks if name not in shapes]
    ends = [
        name for name in blocks if name in shapes
        and (type(modules.get(parent_of(name))) in GENERIC or not is_inside(name, closed))
    ]  # fmt: skip
    sizes = {name: round(math.log2(side / H)) for name, (H, _, _) in shapes.items()}
    units: list[str] = []
    for name in modules:
        if name not in shapes or is_inside(name, units):
            continue
        if blocks:
            within = [end for end in ends if end.startswith(f"{name}.")]
            outer = {sizes[end] for end in within if not is_inside(end, within)}
            is_unit = name in ends or outer == {sizes[name]}
        else:
            is_unit = len({size for n, size in sizes.items() if n.startswith(f"{name}.")}) < 3
        units += [name] * is_unit

    info = getattr(model, "feature_info", None) or []
    known = [f["module"] for f in info if isinstance(f, dict) and f.get("module") in shapes][-4:-1]
    composite = all(layers[name] > 1 and not is_inside(name, units) for name in known)
    if composite and len({sizes[name] for name in known}) > 2:
        return known
    last: dict[int, str] = {}
    for name, (H, _, _) in shapes.items():
        if name not in units or sizes[name] < max(last, default=0):
            continue
        if H > 1:
            last[sizes[name]] = name
        elif blocks and sizes[name] - 1 in last:  # not a class token after larger maps
            last.setdefault(sizes[name], name)
    found = list(last.values())[1 if len(last) > 4 else 0 :][:3]
    if len(found) < 3:
        alike: dict[tuple, list[str]] = {}
        for name, shape in shapes.items():
            if shape[0] > 1 and (name in ends or not blocks):
                place = "" if blocks else parent_of(name)
                alike.setdefault((place, type(modules[name]), shape), []).append(name)
        most = max(alike.values(), key=lambda names: (len(names), -names[0].count(".")), default=[])
        found = [most[len(most) * i // 4 - 1] for i in (1, 2, 3)] if len(most) > 3 else found
    return found


GENERIC = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # containers of anything


def layers_in(modules: Mapping[str, nn.Module]) -> Counter[str]:
    """The number of layers with weights inside each submodule."""
    layers: Counter[str] = Counter()
    for name, module in modules.items():
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            parts = name.split(".")
            layers.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return layers


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def is_inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def find_layouts(
    seen: list[tuple], image: Tensor, names: Sequence[str], prefix: Sequence[int] = ()
) -> dict[str, str]:
    """The layout of the features of submodules, as MultiHead takes it.

    seen: what mhkd.run_once returns for the network and an image batch. prefix: see layout_of.
    """
    common, found = common_layout(seen, image), {}
    for name, _, out in seen:
        if name in names and is_feature(out):
            found[name] = layout_of(out, image, name, common, prefix)
    return found


def is_feature(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() in (3, 4)


def layout_of(
    feature: Tensor, image: Any, name: str, layout: str | None, prefix: Sequence[int] = ()
) -> str:
    """The layout of a feature: "channels_first", "channels_last", or "tokens+n".

    n is the number of class tokens before the H * W tokens of a square map; prefix are numbers to
    be tried first. The image's aspect ratio distinguishes [B, C, H, W] from [B, H, W, C].
    """
    shape = tuple(feature.shape)
    if len(shape) == 3:
        square = image.dim() == 4 and image.shape[-1] == image.shape[-2]
        for n in (*prefix, 0, 1, 2, 4, 5) if square else ():
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
