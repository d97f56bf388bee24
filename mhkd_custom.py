"""Custom networks and images for mhkd.py: torchvision, timm, FILE.py:FUNCTION, image folders.

mhkd.py imports this file when a network name contains `:`, for `--dataset folder`, and for CIFAR
in folders of images.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import hashlib
import importlib.util
import math
import mmap
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhkd
import mhkd_runs
from mhkd import Config, UsageError, check_name, explain, import_optional

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


# --------------------------------------------------------------------------------------------------
# 3. Folders of images, decoded once into a file that is then mapped
# --------------------------------------------------------------------------------------------------

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails of Synology; in archives made by macOS


def resized_side(image_size: int) -> int:
    """The length to which the shorter side of an image file is resized."""
    return image_size if image_size < mhkd.RESIZED_CROP_FROM else round(1.15 * image_size)


def from_folder(config: Config, side: int | None = None) -> tuple[Any, ...]:
    """The images in train/<class>/ and test/<class>/ (or val/, valid/), at any depth.

    They are decoded once, into a file below --out. Returns a mhkd.Source and facts for the record:
    how many files and folders are left out, by reason, and the unreadable images.
    """
    root, left_out = Path(config.data), defaultdict(list)
    others = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    parts, names = [root / "train", (others or [root / "test"])[0]], []
    left_out["folders that are not used"] = others[1:]
    for part in parts:
        if not part.is_dir():
            raise UsageError(f"there is no folder '{part}': --data must contain train/ and test/")
        entries = list(visible(part, left_out))
        names.append(sorted(entry.name for entry in entries if entry.is_dir()))
        left_out["outside of class folders"] += [e for e in entries if not e.is_dir()]
    classes = names[0]
    if names[1] != classes:
        differ = ", ".join(sorted({*classes} ^ {*names[1]})[:10])
        raise UsageError(f"'{parts[0]}' and '{parts[1]}' differ in their classes: {differ}")
    if len(classes) < 2:
        raise UsageError(f"'{parts[0]}' has {len(classes)} class folders: a classifier needs two")
    folders = [part / name for part in parts for name in classes]
    files = [(f, i) for i, d in enumerate(folders) for f in sorted(images_below(d, left_out))]
    counts, notes = {}, []
    for reason, paths in left_out.items():
        if paths:
            counts[reason] = len(paths)
            some = ", ".join(str(path.relative_to(root)) for path in sorted(paths)[:3])
            notes.append(f"{len(paths)} {reason} ({some}{', ...' if len(paths) > 3 else ''})")
    if notes:
        mhkd.log(f"note: in '{root}' these are left out: {'; '.join(notes)}")
    side, cache = side or resized_side(config.image_size), Path(config.out) / "cache"
    images, unreadable = None, set()
    if getattr(config, "skip_unreadable", False):
        images, unreadable = decode([file for file, _ in files], side, cache, skip_unreadable=True)
        files = [(file, i) for file, i in files if file not in unreadable]
    for i in {*range(len(folders))} - {i for _, i in files}:
        raise UsageError(f"the class folder '{folders[i]}' contains no images that can be used")

    def load(chosen: list[int]) -> Tensor:
        if images is not None and len(chosen) == len(images):
            return images
        return decode([files[i][0] for i in chosen], side, cache)[0]

    facts = {"left_out": counts}
    facts["unreadable"] = sorted(file.relative_to(root).as_posix() for file in unreadable)
    labels = torch.tensor([i % len(classes) for _, i in files])
    return load, labels, sum(i < len(classes) for _, i in files), classes, facts


def visible(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """The entries of a folder without hidden ones and those of system software. Raises OSError."""
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
            left_out["hidden"].append(entry)
        else:
            yield entry


def images_below(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """The image files at any depth. Links to folders are not followed. Raises OSError."""
    for entry in visible(folder, left_out):
        kind = entry.suffix.lower()
        if not entry.is_dir():
            if kind in IMAGE_FILES:
                yield entry
            else:
                left_out[kind or "without suffix"].append(entry)
        elif entry.is_symlink():
            left_out["linked folders"].append(entry)
        elif kind in IMAGE_FILES:
            left_out["folders named like images"].append(entry)
        else:
            yield from images_below(entry, left_out)


def prefetch(images: Tensor, indices: Tensor) -> None:
    """Tell the operating system which mapped images are read next."""
    for i in indices.tolist():
        advise(images[i], "WILLNEED")


def advise(images: Tensor, advice: str) -> None:
    """Tell the system how a mapping is read. By default it reads megabytes around each image."""
    start = images.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = images.data_ptr() + images.nbytes - start
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not on Windows
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, f"MADV_{advice}"))


CHUNK = 512  # images that are decoded, checked and written at a time


def decode(
    files: list[Path], side: int, cache: Path, skip_unreadable: bool = False
) -> tuple[Tensor, set[Path]]:
    """Image files as a mapped uint8 tensor [N, side, side, 3], decoded if that is not done yet.

    The file is named after the paths, sizes, inodes and times of the image files and the version of
    Pillow. It is decoded again from the first chunk on whose checksum differs from the index.

    Returns the images, and the files that cannot be read, which are not among the images. Without
    `skip_unreadable` such files are an error.
    """
    pil = import_optional("PIL.Image", "pillow", "a folder of images")
    key = hashlib.sha256(repr((side, pil.__version__)).encode())
    for file in files:
        s = file.stat() if file.is_file() else None
        facts = (str(file), s and (s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns))
        key.update(repr(facts).encode())
    folder = cache / key.hexdigest()[:16]
    images, index, size = folder / "images.u8", folder / "index.json", side * side * 3
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    done: list[tuple[str, list[int]]] = []  # of each chunk the checksum and the unreadable images
    reason = ""

    def pixels_or_reason(file: Path) -> bytes | str:
        try:
            return decode_one(pil, file, side)
        except UsageError as error:
            return mhkd_runs.first_line(error.__cause__)

    with mhkd_runs.locked(folder, "another process decodes images"), mhkd_runs.writing(images):
        images.touch()
        existing: list[tuple[str, list[int]]] = []
        with contextlib.suppress(mhkd_runs.RunError):  # a damaged index is ignored
            existing = (mhkd_runs.read_json(index, "decoded") or {"decoded": []})["decoded"]
        with open(images, "r+b") as store, ThreadPoolExecutor() as pool:
            for chunk, (checksum, bad) in zip(chunks, existing):
                start = store.tell()
                content = store.read((len(chunk) - len(bad)) * size)
                if hashlib.sha256(content).hexdigest() != checksum or (bad and not skip_unreadable):
                    store.seek(start)
                    break
                done.append((checksum, bad))
            todo = chunks[len(done) :]
            number = sum(map(len, todo))
            if todo:
                mhkd.log(f"decoding {number} images into '{folder}'; older folders may be deleted")
            bar = mhkd.progress_bar(len(files), "decoding", len(files) - number)
            for chunk in todo:
                decoded = dict(enumerate(pool.map(pixels_or_reason, chunk)))
                bad = [i for i, image in decoded.items() if isinstance(image, str)]
                for i in bad:
                    reason = reason or f" ({decoded[i]})"
                    del decoded[i]
                content = b"".join(decoded.values())
                store.write(content)
                store.flush()
                os.fsync(store.fileno())
                done.append((hashlib.sha256(content).hexdigest(), bad))
                mhkd_runs.write_json(index, {"decoded": done})
                bar.update(len(chunk))
    unreadable = [chunk[i] for chunk, (_, bad) in zip(chunks, done) for i in bad]
    if unreadable:
        some = ", ".join(f"'{f}'" for f in unreadable[:10]) + ", ..." * (len(unreadable) > 10)
        what = f"{len(unreadable)} of {len(files)} images cannot be read{reason}: "
        if not skip_unreadable:
            it = "it" if len(unreadable) == 1 else "them"
            hint = f"remove {it}, or leave {it} out with --skip-unreadable: "
            raise UsageError(what + hint + some)
        mhkd.log(f"note: {what}left out are {some}")
    count = len(files) - len(unreadable)
    mapped = torch.from_file(str(images), shared=False, size=count * size, dtype=torch.uint8)
    advise(mapped, "RANDOM")
    return mapped.view(count, side, side, 3), {*unreadable}


def decode_one(pil: Any, path: Path, side: int) -> bytes:
    """The pixels of one image file, uint8 [side, side, 3]: see prepare."""
    with explain(f"the image '{path}' cannot be read", "remove it"):
        if not path.is_file():
            raise ValueError("it is not a file or is a broken link")
        with pil.open(path) as image:
            return prepare(image, side).tobytes()


def prepare(image: Any, side: int) -> Any:
    """An image of Pillow as RGB [side, side]: the center of it, its shorter side resized.

    Transparent pixels become black; 16-bit grey levels become 8-bit; EXIF rotations are applied.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        image = image.convert("I").point(lambda grey: grey / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of mode {image.mode} is unknown")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("RGB")
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), method=Image.Resampling.BILINEAR)
    return image


def draw_boxes(size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Random boxes [size, 4] for resized_crop, of an area between `scale` and 1.

    Area and aspect ratio (3/4 to 4/3) as in Szegedy et al. 2015, "Going deeper with convolutions".
    """
    area, ratio, *at = torch.rand(4, size, generator=generator)
    area = scale + (1 - scale) * area
    ratio = ((2 * ratio - 1) * math.log(4 / 3)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    return torch.cat([sides / 2 + (1 - sides) * torch.stack(at, dim=1), sides], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Crops of normalised images [B, 3, M, M], resized to [B, 3, size, size] and flipped.

    boxes: [B, 4], centre x and y, width and height, as fractions of the image.
    """
    x, y, width, height = boxes.unbind(1)
    zero = torch.zeros_like(x)
    width = torch.where(flipped, -width, width)
    theta = torch.stack((width, zero, 2 * x - 1, zero, height, 2 * y - 1), dim=1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --------------------------------------------------------------------------------------------------
# 4. The saved student
# --------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """A saved student in use, which normalises its input. Args: see load_student.

    Attributes:
        classes: names of the classes, in the order of the logits.
        image_size: S, the side of the images that the network takes.
        resize: the length to which the shorter side of an image is resized before the center crop.
        mean, std: of each channel on the 0-1 scale, [1, 3, 1, 1].
    """

    def __init__(self, model: nn.Module, content: dict[str, Any]):
        super().__init__()
        self.model = model
        self.classes, self.image_size = content["classes"], content["image_size"]
        self.resize = content.get("resize") or resized_side(self.image_size)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(content[name]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], floats in 0 to 1 or uint8, to logits [B, K]."""
        S = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, S, S):
            raise UsageError(f"the student takes images [B, 3, {S}, {S}], not {list(images.shape)}")
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not images.is_floating_point():
            images = images.float() / 255
        elif not exporting and len(images):
            low, high = (value.item() for value in images.aminmax())
            if low < -0.5 or high > 1.5:
                what = f"the student takes floats in 0 to 1, not {low:.4g} to {high:.4g}: divide "
                what += "pixels of 0 to 255 by 255, or pass them as uint8, in both cases "
                raise UsageError(f"{what}without normalising them")
        dtype = self.mean.dtype  # that of the network
        images = images.to(torch.promote_types(dtype, torch.float32))
        return self.model(((images - self.mean) / self.std).to(dtype))

    def preprocess(self, image: Any) -> Tensor:
        """An image file, or an image of Pillow, as floats [3, S, S] in 0 to 1.

        It is prepared as the test images of a run with --dataset folder.
        """
        pil = import_optional("PIL.Image", "pillow", "preprocess")
        S, M = self.image_size, self.resize
        if isinstance(image, (str, os.PathLike)):
            content = decode_one(pil, Path(image), M)
        elif isinstance(image, pil.Image):
            with explain("the image cannot be used", "convert it to RGB"):
                content = prepare(image, M).tobytes()
        else:
            raise UsageError(
                f"preprocess takes a path or an image of Pillow, not {type(image).__name__}: use "
                "PIL.Image.fromarray for an RGB array"
            )
        pixels, at = torch.frombuffer(bytearray(content), dtype=torch.uint8), (M - S) // 2
        pixels = pixels.view(M, M, 3)[at : at + S, at : at + S]
        return pixels.permute(2, 0, 1).contiguous() / 255

    @torch.no_grad()
    def predict(self, images: Any, batch_size: int = 64) -> list[tuple[str, float]]:
        """The most likely class and its probability, of a list of images or of one image.

        Images are files or images of Pillow. The student is put into eval mode.
        """
        single = isinstance(images, str) or not isinstance(images, Iterable)
        images, found = [images] if single else list(images), []
        self.eval()
        for i in range(0, len(images), batch_size):
            batch = torch.stack([self.preprocess(image) for image in images[i : i + batch_size]])
            best = self(batch.to(self.mean.device)).float().softmax(dim=1).max(dim=1)
            found += zip((self.classes[k] for k in best.indices.tolist()), best.values.tolist())
        return found


def load_student(path: str | Path, model: nn.Module | None = None) -> Deployed:
    """A student.pt as a network in eval mode for raw images [B, 3, S, S], which it normalises.

    Networks of torchvision, timm or a file need that library or file. A file that is no longer at
    its place is also looked for beside the student.pt.

    Args:
        model: the network itself, into which the weights are loaded, instead of its name.

    Raises:
        UsageError, mhkd_runs.RunError: the file is missing, damaged, or no student.pt.
    """
    content, keys = mhkd_runs.load_file(Path(path)), {"model", "name", "classes", "mean", "std"}
    if not isinstance(content, dict) or not content.keys() >= keys | {"image_size"}:
        raise UsageError(f"'{path}' is not the student.pt of a finished run")
    name, hint = content["name"], "pass the network itself, load_student(path, model=network)"
    if model is None:
        file, _, function = name.rpartition(":")
        if ".py:" in name and not Path(file).is_file():
            name = f"{Path(path).absolute().parent / Path(file).name}:{function}"
            if not Path(name.rpartition(":")[0]).is_file():
                what = f"the network of '{path}' is built by '{content['name']}', which is missing"
                raise UsageError(f"{what}: put the file beside '{path}', or {hint}")
        model = mhkd.build_model(name, len(content["classes"]), "random", content["image_size"])
    elif not isinstance(model, nn.Module):
        raise UsageError(f"model= is {type(model).__name__}, not a network: {hint}")
    return Deployed(mhkd_runs.load_weights(model, path), content).eval()
