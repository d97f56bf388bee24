"""Folders of images, random crops of images of 64 pixels or more, TrivialAugment and
RandAugment.

Folders are decoded once into a file that is then memory-mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mhkd
import mhkd_runs
from mhkd import UsageError, explain, import_optional

if TYPE_CHECKING:
    from mhkd_config import Config

# --------------------------------------------------------------------------------------------------
# 1. Folders of classes
# --------------------------------------------------------------------------------------------------

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails of Synology; in archives made by macOS


def resized_side(image_size: int) -> int:
    """The length to which the shorter side of an image file is resized."""
    return image_size if image_size < mhkd.RESIZED_CROP_FROM else round(1.15 * image_size)


def from_folder(config: Config, side: int | None = None) -> tuple[Any, ...]:
    """The images in train/<class>/ and test/<class>/ (or val/, valid/), at any depth.

    Without train/ they are in <class>/, of which --test-fraction is held out for the test. Those in
    unlabelled/, or --unlabelled, are training images without a label, unless the method ignores
    them. All are decoded once, into a file below --out. Returns a mhkd_data.Source, with facts for
    the record: how many files and folders are left out, by reason, and the unreadable images.

    side: to which images are resized, for CIFAR, which has no unlabelled images.
    """
    root, left_out = Path(config.data), defaultdict(list)
    unlabelled = None if side else unlabelled_folder(config)
    if config.test_fraction is None:
        known = [Path(path) for path in (config.unlabelled, config.out) if path]
        top, (classes, folders, files) = root / "train", find_parts(root, left_out, known)
    else:
        out = Path(config.out)
        top, (classes, folders, files) = root, divide(root, config.test_fraction, left_out, out)
    if len(classes) < 2:
        raise UsageError(f"'{top}' has {len(classes)} class folders: a classifier needs two")
    if config.unlabelled and not Path(config.unlabelled).is_dir():
        raise UsageError(f"there is no folder '{config.unlabelled}', which --unlabelled names")
    if unlabelled:
        found = sorted(images_below(unlabelled, left_out))
        labelled = {os.path.realpath(file) for file, _ in files}
        if both := [file for file in found if os.path.realpath(file) in labelled]:
            raise UsageError(
                f"'{both[0]}' is an unlabelled image and also a labelled or a test image: "
                "keep unlabelled images in a folder of their own"
            )
        files += [(file, mhkd.UNLABELLED) for file in found]
        if not found:
            raise UsageError(f"'{unlabelled}' contains no images that can be used: remove it")
    counts, notes = {}, []
    for reason, paths in left_out.items():
        if paths:
            counts[reason] = len(paths)
            some = ", ".join(os.path.relpath(path, root) for path in sorted(paths)[:3])
            notes.append(f"{len(paths)} {reason} ({some}{', ...' if len(paths) > 3 else ''})")
    if notes:
        mhkd.log(f"note: in '{root}' these are left out: {'; '.join(notes)}")
    side, cache = side or resized_side(config.image_size), Path(config.out) / "cache"
    images, unreadable = None, set()
    if config.skip_unreadable:
        images, unreadable = decode([file for file, _ in files], side, cache, skip_unreadable=True)
        files = [(file, i) for file, i in files if file not in unreadable]
    for i in {*range(len(folders))} - {i for _, i in files}:
        raise UsageError(f"the class folder '{folders[i]}' contains no images that can be used")

    def load(chosen: list[int]) -> Tensor:
        if images is not None and len(chosen) == len(images):
            return images
        return decode([files[i][0] for i in chosen], side, cache)[0]

    facts = {"left_out": counts}
    facts["unreadable"] = sorted(Path(os.path.relpath(f, root)).as_posix() for f in unreadable)
    labels = torch.tensor([i if i == mhkd.UNLABELLED else i % len(classes) for _, i in files])
    return load, labels, sum(0 <= i < len(classes) for _, i in files), classes, facts


def unlabelled_folder(config: Config) -> Path | None:
    """The folder of the unlabelled images if it exists and the method uses them."""
    folder = Path(config.unlabelled or Path(config.data) / "unlabelled")
    return folder if folder.is_dir() and mhkd.takes_unlabelled(config.method) else None


# What the next two functions return: names of the classes; folders of the classes, those of the
# training images first, then those of the test images; and each file with the index of its folder.
Split = tuple[list[str], list[Path], list[tuple[Path, int]]]


def find_parts(root: Path, left_out: dict[str, list[Path]], known: list[Path]) -> Split:
    """The images of train/<class>/ and test/<class>/. known: other folders. Raises OSError."""
    others = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    parts, names = [root / "train", (others or [root / "test"])[0]], []
    for part in parts:
        if not part.is_dir():
            check_part_names(root, {"train", "test"})
            raise UsageError(
                f"there is no folder '{part}': --data must contain train/ and test/, or folders of "
                "classes, which --test-fraction 0.2 divides"
            )
        names.append(class_names(part, left_out))
    used = [path for path in (*parts, root / "unlabelled", *known) if path.exists()]
    entries = (e for e in root.iterdir() if e.is_dir() and e.name not in SYSTEM_FOLDERS)
    entries = (e for e in entries if not e.name.startswith("."))
    unused = [e for e in entries if not any(e.samefile(path) for path in used)]
    left_out["folders that are not used"] = unused
    classes = names[0]
    if "unlabelled" in classes:
        raise UsageError(
            f"'{parts[0] / 'unlabelled'}' would be a class: move it to '{root / 'unlabelled'}' if "
            "its images have no labels, else rename it"
        )
    if names[1] != classes:
        differ = ", ".join(sorted({*classes} ^ {*names[1]})[:10])
        raise UsageError(f"'{parts[0]}' and '{parts[1]}' differ in their classes: {differ}")
    folders = [part / name for part in parts for name in classes]
    files = [(f, i) for i, d in enumerate(folders) for f in sorted(images_below(d, left_out))]
    return classes, folders, files


def divide(root: Path, fraction: float, left_out: dict[str, list[Path]], out: Path) -> Split:
    """The images of <class>/, of which a fraction is for the test. Raises OSError.

    Which ones depends only on the names of the files, so that most images stay in their part if
    others are added. Folders of runs are no classes. out: that of this run.
    """
    out, data = out.resolve(), root.resolve()
    inside = out.relative_to(data).parts if out.is_relative_to(data) else ("",)
    if len(inside) != 1:
        raise UsageError(f"--out '{out}' must be outside of the classes of --data '{root}'")
    for name in ("train", "test", "val", "valid"):
        if (root / name).is_dir():
            what = f"--test-fraction is for folders of classes, and '{root / name}' exists"
            raise UsageError(f"{what}: leave it out")
    if root.is_dir():
        check_part_names(root, {path.name.lower() for path in root.iterdir() if path.is_dir()})
    else:
        raise UsageError(f"there is no folder '{root}', which --data names")
    classes = [name for name in class_names(root, left_out) if name != "unlabelled"]
    of_runs = [c for c in classes if c == inside[0] or any((root / c).glob("*/config.json"))]
    left_out["folders that are not used"] += [root / name for name in of_runs]
    classes = [name for name in classes if name not in of_runs]
    folders, train, test = [root / name for name in classes] * 2, [], []
    for i, folder in enumerate(folders[: len(classes)]):
        files = list(images_below(folder, left_out))
        files.sort(
            key=lambda f: hashlib.sha256(os.fsencode(f.relative_to(folder).as_posix())).digest()
        )
        if len(files) == 1:
            raise UsageError(f"'{folder}' has one image: training and test need one each")
        number = min(max(1, round(fraction * len(files))), len(files) - 1)
        test += [(file, len(classes) + i) for file in sorted(files[:number])]
        train += [(file, i) for file in sorted(files[number:])]
    return classes, folders, train + test


PART_NAMES = {"train": "train", "training": "train"}
PART_NAMES |= dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test")


def check_part_names(root: Path, folders: set[str]) -> None:
    """Raise an error if all these folders are parts, and some have other names than train, test."""
    like: dict[str, Path] = {}
    for path in sorted(root.glob("*")):
        if path.is_dir() and (name := PART_NAMES.get(path.name.lower())):
            like.setdefault(name, path)
    if like.keys() == {"train", "test"} and folders <= PART_NAMES.keys():
        others = [f"'{path}' to '{name}'" for name, path in like.items() if path.name != name]
        what = f"'{root}' seems to be divided into parts already"
        raise UsageError(f"{what}: rename {' and '.join(others)}")


def class_names(folder: Path, left_out: dict[str, list[Path]]) -> list[str]:
    entries = list(visible(folder, left_out))
    left_out["outside of class folders"] += [entry for entry in entries if not entry.is_dir()]
    return sorted(entry.name for entry in entries if entry.is_dir())


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


# --------------------------------------------------------------------------------------------------
# 2. Decoding
# --------------------------------------------------------------------------------------------------

CHUNK = 512  # images that are decoded, checked and written at a time


def decode(
    files: list[Path], side: int, cache: Path, skip_unreadable: bool = False
) -> tuple[Tensor, set[Path]]:
    """Image files as a mapped uint8 tensor [N, side, side, 3], decoded if that is not done yet.

    The file is named after the paths, sizes, inodes and times of the image files, the version of
    Pillow and the code of prepare(). It is decoded again from the first chunk on whose checksum
    differs from the index.

    Returns the images, and the files that cannot be read, which are not among the images. Without
    `skip_unreadable` such files are an error.
    """
    pil = import_optional("PIL.Image", "pillow", "a folder of images")
    code = mhkd.sibling("mhkd_code").code_sha256([decode_one, prepare])
    key = hashlib.sha256(repr((side, pil.__version__, code)).encode())
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
            cause = error.__cause__
            if isinstance(cause, MemoryError) or getattr(cause, "errno", None):
                raise  # of the machine, not of the file: it may be readable the next time
            return mhkd_runs.first_line(cause)

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
                what = f"decoding {number} images into '{folder}'"
                mhkd.log(f"{what}; older folders beside it may be deleted")
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


def decode_one(pil: Any, path: Path, side: int, hint: str = "remove it") -> bytes:
    """The pixels of one image file, uint8 [side, side, 3]: see prepare."""
    with explain(f"the image '{path}' cannot be read", hint):
        if not path.is_file():
            raise ValueError("it is not a file or is a broken link")
        with pil.open(path) as image:
            return prepare(image, side).tobytes()


def prepare(image: Any, side: int) -> Any:
    """An image of Pillow as RGB [side, side]: the center of it, its shorter side resized.

    Transparent pixels become black; 16-bit grey levels become 8-bit; EXIF rotations are applied.
    """
    from PIL import Image, ImageOps

    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of TIFF: bits of a pixel; 0 is white
        if tags.get(258, (16,)) != (16,) or tags.get(262) == 0 or "transparency" in image.info:
            raise ValueError("grey levels of more than 8 bits must be 16 bits, 0 black, opaque")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        image = image.convert("I").point(lambda grey: grey / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of mode {image.mode} is unknown")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("RGB")
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), method=Image.Resampling.BILINEAR)
    return image


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


# --------------------------------------------------------------------------------------------------
# 3. Random crops and further augmentation
# --------------------------------------------------------------------------------------------------


def draw_boxes(size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Random boxes [size, 4] for resized_crop, of an area between `scale` and 1.

    Area and aspect ratio (3/4 to 4/3) as in Szegedy et al. 2015, "Going deeper with convolutions".
    """
    area, ratio, *at = torch.rand(size, 4, generator=generator).unbind(1)
    area = scale + (1 - scale) * area
    ratio = ((2 * ratio - 1) * math.log(4 / 3)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    return torch.cat([sides / 2 + (1 - sides) * torch.stack(at, dim=1), sides], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Crops of images [B, M, M, 3], resized to [B, size, size, 3] and flipped.

    boxes: float [B, 4], centre x and y, width and height, as fractions of the image.
    """
    images = images.permute(0, 3, 1, 2).to(boxes.dtype)
    x, y, width, height = boxes.unbind(1)
    zero = torch.zeros_like(x)
    width = torch.where(flipped, -width, width)
    theta = torch.stack((width, zero, 2 * x - 1, zero, height, 2 * y - 1), dim=1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    images = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images.permute(0, 2, 3, 1)


def apply_policy(images: Tensor, policy: str, seeds: Tensor) -> Tensor:
    """TrivialAugment or RandAugment of torchvision on images [B, S, S, 3], 0 to 255.

    Each image is changed with random numbers from its own seed, whatever else is in the batch.
    """
    transforms = import_optional("torchvision.transforms.v2", "torchvision", f"--augment {policy}")
    kinds = {"trivial": transforms.TrivialAugmentWide, "rand": transforms.RandAugment}
    transform, changed = kinds[policy](), []
    images = images.permute(0, 3, 1, 2).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist()):
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed).permute(0, 2, 3, 1)
