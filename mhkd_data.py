"""Data sets and their loading: CIFAR, SVHN, digits, folders of images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mhkd
import mhkd_runs
from mhkd import UNLABELLED, Data, UsageError, explain, import_optional, log, sibling

if TYPE_CHECKING:
    from mhkd_config import Config

# What a data set provides: a function from a list of indices to images uint8 [n, M, M, 3]; all
# labels [N]; the number of training images, which come first; class names; facts for the record.
# Unlabelled training images come last, with the label UNLABELLED, and are not in that number.
Source = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set for --dataset. Add one by `DATASETS[name] = DataSet(...)`, see docs/methods.md.

    Args:
        load: returns a Source for a Config.
        recipe: its values of Config and of method options that differ from those of CIFAR-100.
        statistics: mean and std of each channel. Default: measured on the training images.
        mapped: whether the images are mapped from a file, and already have the final size.
    """

    load: Callable[[Config], Source]
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    mapped: bool = False


DIGIT_NAMES = [str(digit) for digit in range(10)]
TORCHVISION = {  # class, and the files that belong into --data
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz, or the folder cifar-10-batches-py from it,"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz, or the folder cifar-100-python from it,"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}
SIZES = {  # number of classes, number of images, one of the class names
    "cifar10": (10, 60_000, "airplane"),
    "cifar100": (100, 60_000, "aquarium_fish"),
    "svhn": (10, 99_289, "7"),
}


def from_torchvision(config: Config) -> Source:
    """CIFAR or SVHN from torchvision's files, downloaded if missing, or from folders of images.

    The images are sorted by label and pixels, so that both give the same runs.
    """
    root = Path(config.data)
    if (root / "train").is_dir():
        found = sibling("mhkd_images").from_folder(config, side=32)
        decoded, labels, count, classes, *facts = found
        *size, known = SIZES[config.dataset]
        if size != [len(classes), len(labels)] or known not in classes:
            names = ", ".join(classes[:3])
            raise UsageError(
                f"'{root}' has {len(classes)} classes ({names}, ...) and {len(labels)} images, not "
                f"{size[0]} ({known}, ...) and {size[1]}, so it is not "
                f"{config.dataset}: use --dataset folder"
            )
        images = decoded(list(range(len(labels))))
    else:
        images, labels, count, classes = read_torchvision(config.dataset, root)
        facts = []
    order: list[int] = []
    for start, stop in ((0, count), (count, len(labels))):
        for label in range(len(classes)):  # the pixels of all classes at once take gigabytes
            indices = start + (labels[start:stop] == label).nonzero()[:, 0]
            order += sorted(indices.tolist(), key=lambda i: images[i].numpy().tobytes())
    sorted_indices = torch.tensor(order)
    return lambda i: images[sorted_indices[i]], labels[sorted_indices], count, classes, *facts


def read_torchvision(dataset: str, root: Path) -> tuple[Tensor, Tensor, int, list[str]]:
    (name, files), svhn = TORCHVISION[dataset], dataset == "svhn"
    datasets = import_optional("torchvision.datasets", "torchvision", f"--dataset {dataset}")
    splits = [{"train": True}, {"train": False}]
    if svhn:
        import_optional("scipy.io", "scipy", f"--dataset {dataset}")
        splits = [{"split": "train"}, {"split": "test"}]
    what = f"{name} is not in '{root}' and could not be downloaded"
    with explain(what, f"put {files} there, or try --dataset digits, which needs no data"):
        with mhkd_runs.locked(root, "another process is reading the data"):
            # Complete files are not downloaded again.
            sets = [getattr(datasets, name)(root, **split, download=True) for split in splits]
    images = torch.cat([torch.from_numpy(part.data) for part in sets])
    labels = torch.cat([torch.as_tensor(s.labels if svhn else s.targets) for s in sets]).long()
    if svhn:  # [N, 3, 32, 32]
        return images.permute(0, 2, 3, 1).contiguous(), labels, len(sets[0]), DIGIT_NAMES
    return images, labels, len(sets[0]), list(sets[0].classes)


def from_digits(config: Config) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 for training, 360 for test."""
    datasets = import_optional("sklearn.datasets", "scikit-learn", "--dataset digits")
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = grey[..., None].repeat(1, 1, 1, 3)  # [1797, 8, 8, 3]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).roll(-360)
    labels = torch.from_numpy(digits.target).long()[order]
    return lambda indices: images[order[indices]], labels, 1437, DIGIT_NAMES


# Recipes: sections 4.1 (CIFAR-100, the base of all) and 4.2 (SVHN). Milestones are those of the
# full schedule.
# Statistics of CIFAR: the CRD benchmark's; of SVHN: the authors' code; of digits: measured.
BASE_RECIPE = {
    "epochs": 240,
    "lr_steps": (150, 180, 210),
    "batch_size": 64,
    "lr": 0.05,
    "beta": 0.5,
}
BASE_RECIPE |= {
    "crop_padding": 4,
    "flip": True,
    "image_size": 32,
    "head_width": 256,
    "head_stride": 1,
}
SVHN = {"epochs": 150, "lr_steps": (80, 110, 135), "batch_size": 200, "lr": 0.001, "beta": 5.0}
DIGITS = {"epochs": 30, "lr_steps": (19, 23, 26), "crop_padding": 2, "flip": False}
DIGITS |= {"image_size": 16, "head_width": 64, "head_stride": 2}
DATASETS: dict[str, DataSet] = {
    "cifar100": DataSet(from_torchvision, {}, ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "cifar10": DataSet(from_torchvision, {}, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "svhn": DataSet(from_torchvision, SVHN, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    "folder": DataSet(lambda config: sibling("mhkd_images").from_folder(config), mapped=True),
    "digits": DataSet(from_digits, DIGITS, ((0.305674,) * 3, (0.318702,) * 3)),
}


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that the data depend on."""
    names = ["dataset", "image_size", "subset", "test_subset", "val_fraction", "test_fraction"]
    settings = {name: getattr(config, name) for name in (*names, "mean", "std")}
    if config.dataset == "folder":
        unlabelled = config.unlabelled or Path(config.data) / "unlabelled"
        folders = {"data": config.data, "unlabelled": unlabelled}
        settings |= {name: str(Path(folder).resolve()) for name, folder in folders.items()}
    return settings


def labels_sha256(data: Data) -> str:
    """The hash of the labels and of the indices of the parts."""
    digest = hashlib.sha256()
    for part in (data.labels, data.train, data.val, data.test):
        digest.update(repr(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
    return digest.hexdigest()


def images_sha256(images: Tensor, labels: Tensor, facts: tuple, each: list | None = None) -> str:
    """The hash of images, labels and facts. each: gets a hash of each image."""
    digest = hashlib.sha256(repr((images.shape, *facts)).encode())
    digest.update(labels.cpu().contiguous().numpy())
    for part in images.split(1000):
        pixels = part.cpu().contiguous().numpy()
        digest.update(pixels)
        if each is not None:
            each += [hash(image.tobytes()) for image in pixels]
    return digest.hexdigest()


def on_device(data: Data, device: torch.device) -> Data:
    """The data on a device, with new hashes if the images are not those of load_data() any more."""
    images, hashed = data.images, (data.settings or {}).get("hashed")
    if hashed and getattr(images, "hashed", None) != version_of(images):
        N, end, facts = hashed
        end = end if len(images) == N else len(images)
        slices = {"sha256": slice(end), "unlabelled_sha256": slice(end, None)}
        new = {n: images_sha256(images[s], data.labels[s], facts) for n, s in slices.items()}
        new = {name: sha256 for name, sha256 in new.items() if getattr(data, name)}
        if any(getattr(data, name) != sha256 for name, sha256 in new.items()):
            log("note: images of the data were changed after loading: they are other data")
            settings = {**data.settings, "hashed": None}
            data = dataclasses.replace(data, **new, settings=settings)
    data = data.to(device)
    data.images.hashed = version_of(data.images)
    return data


def version_of(tensor: Tensor) -> tuple[int, float]:
    """Another one after changes in place that PyTorch counts, and in copies."""
    return id(tensor), math.nan if tensor.is_inference() else tensor._version


def load_data(config: Config, device: torch.device | str = "cpu") -> Data:
    """The data set of a configuration, resized, split, with its normalisation, on a device.

    Raises:
        UsageError, mhkd_runs.RunError: it is missing and cannot be downloaded, or is damaged.
    """
    dataset = DATASETS[config.dataset]
    images_at, labels, count, classes, *facts = dataset.load(config)
    with explain(f"the labels of {config.dataset} are no numbers", "give integers [N]"):
        labels = torch.as_tensor(labels)
    given, classes = classes, [str(name) for name in classes]
    if labels.dim() != 1 or labels.is_floating_point() or not 0 <= count <= len(labels):
        kind = f"{labels.dtype} labels of shape {list(labels.shape)} and {count} training images"
        raise UsageError(f"{config.dataset} has {kind}: give integers [N], and at most N images")
    labels = labels.long()
    end = len(labels) - int((labels == UNLABELLED).sum())  # of the labelled images
    if (labels[:end] == UNLABELLED).any():
        raise UsageError(f"the unlabelled images of {config.dataset} must be the last ones")
    parts = []  # the subsets: the same images for every run, in the order of the data set
    for size, most in ((count, config.subset), (end - count, config.test_subset)):
        if (most or 0) > size:
            log(f"note: a subset of {most} images is asked for, and there are {size}: all are used")
        indices = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        parts.append(indices[:most].sort().values)
    chosen = torch.cat([parts[0], count + parts[1], torch.arange(end, len(labels))]).tolist()
    count, end = len(parts[0]), len(parts[0]) + len(parts[1])
    images, labels = torch.as_tensor(images_at(chosen)), labels[chosen]
    S, N, M = config.image_size, len(chosen), (*images.shape, 0, 0)[1]
    if images.dtype != torch.uint8 or images.shape != (N, M, M, 3):
        kind = f"{images.dtype} {list(images.shape)} for {N} indices"
        raise UsageError(f"the images of {config.dataset} are {kind}, not uint8 [{N}, M, M, 3]")
    if dataset.mapped and not (M == S or M > S >= mhkd.RESIZED_CROP_FROM):
        raise UsageError(f"the images of {config.dataset} have {M} pixels: use --image-size {M}")
    if len(labels) and not UNLABELLED <= labels.min() <= labels.max() < len(classes):
        what = f"labels from {labels.min()} to {labels.max()} for {len(classes)} classes"
        raise UsageError(f"{config.dataset} has {what}: count the classes from 0")
    if M != S and not dataset.mapped:
        original, images = images, torch.empty(len(images), S, S, 3, dtype=torch.uint8)
        for old, new in zip(original.split(1000), images.split(1000)):
            old = old.permute(0, 3, 1, 2).float()
            resized = F.interpolate(old, (S, S), mode="bilinear", antialias=True)
            new.copy_(resized.round().clamp(0, 255).permute(0, 2, 3, 1))
    held_out = []  # a fraction of each class, the same images for every run
    fixed = torch.Generator().manual_seed(0)
    for label in range(len(classes)):
        of_class = (labels[:count] == label).nonzero()[:, 0]
        number = min(round(config.val_fraction * len(of_class)), max(0, len(of_class) - 1))
        held_out.append(of_class[torch.randperm(len(of_class), generator=fixed)[:number]])
    train, test = torch.arange(count), torch.arange(count, end)
    val = torch.cat(held_out).sort().values
    train = train[~torch.isin(train, val)]
    hashed, each = (given, count), []
    keep = each if dataset.mapped else None
    sha256 = images_sha256(images[:end], labels[:end], hashed, keep)
    of_unlabelled = images_sha256(images[end:], labels[end:], hashed, keep)
    if len(train) < 2 or not len(test) or config.val_fraction and not len(val):
        counts = f"{len(train)} training, {len(val)} validation and {len(test)} test images"
        raise UsageError(f"{config.dataset} has {counts}: more are needed")
    for part, indices in (("training", train), ("validation", val)):
        number = torch.bincount(labels[indices], minlength=len(classes))
        if len(indices) and (without := [c for c, n in zip(classes, number) if not n]):
            some = ", ".join(without[:5] + ["..."] * (len(without) > 5))
            log(f"note: {len(without)} classes have no {part} images: {some}")
    mean, std = normalisation(config) or measure(images, train)
    if config.teacher and config.student_init == "pretrained":
        usual = sibling("mhkd_custom").library_weights(config.student)
        if usual and usual[:2] != (mean, std):
            expects = "expects {} and {}".format(*usual)
            what = (
                f"the images have mean {mean} and std {std}, pretrained {config.student} {expects}"
            )
            log(f"note: {what}: with --mean and --std it gets the same in all runs")
    train = torch.cat([train, torch.arange(end, len(labels))])
    prefetch = sibling("mhkd_images").prefetch if dataset.mapped else None
    known = dict(facts[0]) if facts else {}
    trained = {*each[:count], *each[end:]}
    if again := sum(image in trained for image in each[count:end]):
        known["test_images_in_training"] = again
        what = f"{again} of {end - count} test images are also training or unlabelled images"
        log(f"note: {what}: the test accuracy is too high, remove them from one of the folders")
    if end < len(labels):
        known["unlabelled"] = len(labels) - end
    data = Data(
        images, labels, train, val, test, classes, S, mean, std, sha256, config.dataset,
        known, prefetch, of_unlabelled if end < len(labels) else None,
        {**settings_of(config), "hashed": (len(labels), end, hashed)},
    )  # fmt: skip
    data = dataclasses.replace(data, labels_sha256=labels_sha256(data)).to(torch.device(device))
    data.images.hashed = version_of(data.images)
    return data


def for_run(config: Config, data: Data) -> Data:
    """The data as a run uses them: without unlabelled images if its method learns from none.

    Raises:
        UsageError: they were loaded with other settings or do not fit the run.
    """
    settings = data.settings or {"dataset": data.name, "image_size": data.size}
    ours, unlabelled = settings_of(config), data.labelled_fraction < 1
    uses_them = unlabelled and mhkd.takes_unlabelled(config.method)
    for name, value in settings.items():
        if name in ours and value != ours[name] and (uses_them or name != "unlabelled"):
            raise UsageError(
                f"the data were loaded with {name} {value!r}, and the configuration has "
                f"{ours[name]!r}: load them with this configuration"
            )
    if data.labels_sha256 and (changed := labels_sha256(data)) != data.labels_sha256:
        log("note: labels or parts of the data were changed after loading: they are other data")
        for name, lowest in (("train", UNLABELLED), ("val", 0), ("test", 0)):
            labels = data.labels[getattr(data, name)]
            if len(labels) and not lowest <= labels.min() <= labels.max() < len(data.classes):
                what = f"labels from {labels.min()} to {labels.max()} in data.{name}"
                last = len(data.classes) - 1
                raise UsageError(f"there are {what}: give labels from {lowest} to {last}")
        sha256 = hashlib.sha256(f"{data.sha256} {changed}".encode()).hexdigest()
        data = dataclasses.replace(data, sha256=sha256, labels_sha256=None)
    if data.settings:
        used = normalisation(config, quiet=True)
        missing = config.dataset == "folder" and not data.unlabelled_sha256
        missing = missing and sibling("mhkd_images").unlabelled_folder(config)
        if missing or used not in (None, (data.mean, data.std)):
            what = "without unlabelled images" if missing else "with another normalisation"
            raise UsageError(f"the data were loaded {what}: load them with this configuration")
    if unlabelled and not uses_them:
        data = data.labelled()
    if (B := config.batch_size) > len(data.train):  # also of a teacher that is trained first
        number = f"{len(data.train)} training images of --method {config.method}"
        raise UsageError(f"--batch-size {B} is larger than the {number}")
    # Each process would average over its own number of labels.
    if data.labelled_fraction < 1 and mhkd.world_size() > 1:
        raise UsageError(
            "unlabelled images cannot be used with several processes: use one process, or move "
            "them out of the data"
        )
    return data


def normalisation(
    config: Config, quiet: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std: given, else of the teacher's file or pretrained weights, else of the data set.

    None if the data set has none, too: then they are measured. quiet: without a note.
    """
    known = DATASETS[config.dataset].statistics
    if config.mean:
        return tuple(config.mean), tuple(config.std)
    first = "teacher" if config.teacher else "student"
    init = getattr(config, f"{first}_init")
    path = config.teacher_weights or init.removeprefix("file:")
    if config.teacher_weights or init.startswith("file:"):
        content = mhkd_runs.load_file(Path(path))
        if isinstance(content, dict) and content.keys() >= {"model", "mean", "std"}:
            with contextlib.suppress(*[] if config.teacher_weights else [UsageError]):
                return checked_statistics(content["mean"], content["std"], f"'{path}'")
        shown = "mean {} and std {}".format(*known) if known else "that of the training images"
        if not quiet:
            text = f"'{path}' has no normalisation, {shown} is assumed"
            log(f"note: {text}; else give --mean and --std")
    if init == "pretrained":
        if of_library := sibling("mhkd_custom").library_weights(getattr(config, first)):
            return of_library[:2]
    return checked_statistics(*known, f"the data set {config.dataset}") if known else None


def checked_statistics(mean: Any, std: Any, what: str) -> tuple[tuple, tuple]:
    with explain(f"{what} has a wrong mean or std", "give --mean and --std, from 0 to 1"):
        rules = sibling("mhkd_config")
        mean, std = ([float(value) for value in values] for values in (mean, std))
        torch.tensor([mean, std]).view(2, 3)
        if not (rules.CHANNELS[0](mean) and rules.STDS[0](std)):
            raise ValueError(f"mean {mean}, std {std}")
    return tuple(mean), tuple(std)


def measure(images: Tensor, indices: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, on the 0-1 scale, exact."""
    count = torch.zeros(3, 256, dtype=torch.float64)
    for part in indices.split(100):
        for channel, pixels in enumerate(images[part].unbind(dim=3)):
            count[channel] += torch.bincount(pixels.flatten(), minlength=256)
    if (count > 0).sum() == 3:
        what = "all pixels of the training images are the same, if transparent, black"
        log(f"note: {what}: check the images, and give them an opaque background")
    value = torch.arange(256, dtype=torch.float64) / 255
    fraction = count / count.sum(dim=1, keepdim=True)
    mean = fraction @ value
    std = (fraction * (value - mean[:, None]) ** 2).sum(dim=1).sqrt().clamp(min=1 / 255)
    return tuple(tuple(round(v, 6) for v in values.tolist()) for values in (mean, std))
