"""Where the teacher comes from: its weights, its pretrained heads, its stored outputs.

It also registers the method `heads`, which trains the heads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhkd
import mhkd_code
import mhkd_record
import mhkd_runs
from mhkd import (
    HEAD_OPTIONS,
    UNLABELLED,
    AuxHeads,
    Batch,
    Data,
    Distiller,
    FeatureExtractor,
    Method,
    UsageError,
    build_model,
    epoch_batches,
    evaluate,
)

if TYPE_CHECKING:
    from mhkd_config import Config


def find_teacher(config: Config, data: Data) -> tuple[nn.Module | None, Any, dict[str, Any]]:
    """The teacher, the file that it is loaded from, and its entries in the record.

    Without `teacher_weights` a run of its own trains it first.
    """
    if not config.teacher:
        return None, None, {"teacher_sha256": None, "teacher_accuracy": None}
    model = build_model(config.teacher, len(data.classes), "random", config.image_size)
    if not (path := config.teacher_weights):
        Distiller(config, data, model)  # reports errors before the teacher is trained
        what = f"its own run in '{config.out}' comes first"
        mhkd.log(f"teacher {config.teacher}: no --teacher-weights, so {what}")
        path = student_of(config.of_teacher(), data)
    check_teacher(config.teacher, path, mhkd_runs.load_file(Path(path)), data)
    if ".py:" in config.teacher:
        mhkd.sibling("mhkd_custom").note_changed_code(config.teacher, path)
    mhkd_runs.load_weights(model, path).to(data.device)
    if config.teacher_weights:
        accuracy = evaluate(model, data)["accuracy"]
    else:
        accuracy = mhkd_runs.read_json(Path(path).with_name("result.json"), "accuracy")["accuracy"]
    mhkd.log(f"teacher {config.teacher}: {accuracy:.2f} % on the test images")
    chance = 100 / len(data.classes)
    largest = 100 * data.labels[data.test].bincount().max().item() / len(data.test)
    if accuracy < min(2 * chance, chance + 10) or accuracy <= largest < 100:
        what = f"near chance, or not above the {largest:.2f} % of the largest class"
        mhkd.log(f"note: this is {what}: check the order of the classes, --mean and --std")
    beside: dict[str, Any] = {}
    with contextlib.suppress(mhkd_runs.RunError, OSError):
        beside = mhkd_runs.read_json(Path(path).with_name("result.json"), "config", "data_sha256")
    sha256 = mhkd_runs.sha256_of(path)
    if beside and beside.get("student_sha256") == sha256:
        held_out, other = beside["config"].get("val_fraction") or 0, beside["data_sha256"]
        if held_out < config.val_fraction or config.val_fraction and other != data.sha256:
            what = f"the teacher was trained with --val-fraction {held_out:g}"
            what += " on another selection of images" * (other != data.sha256)
            mhkd.log(f"note: {what}, so it may have seen validation images of its student")
    without = dict.fromkeys(("teacher", "teacher_weights", "unlabelled"))
    alone = config.replace(method="ce", options={}, **without)
    result = (
        Path(config.out) / mhkd_record.name_of(alone, alone.differs, data.sha256) / "result.json"
    )
    result = mhkd_runs.read_json(result, "accuracy") or {"accuracy": 0}
    if result["accuracy"] > accuracy:
        mhkd.log(
            f"note: the student alone reached {result['accuracy']:.2f} %, more than the teacher"
        )
    return model, path, {"teacher_sha256": sha256, "teacher_accuracy": accuracy}


def check_teacher(teacher: str, path: str | Path, content: Any, data: Data) -> None:
    """Refuse the student.pt of other classes or of another image size; note another network."""
    if not isinstance(content, dict) or "classes" not in content:
        return
    name = str(content.get("name", teacher))
    if name.rpartition("/")[2] != teacher.rpartition("/")[2]:  # files may have moved
        mhkd.log(f"note: '{path}' is of {name}, and its weights are loaded into {teacher}")
    theirs, size = content["classes"], content.get("image_size", data.size)
    theirs = [str(c) for c in theirs] if isinstance(theirs, (list, tuple)) else data.classes
    if theirs != data.classes:
        differ = sorted({*theirs} ^ {*data.classes})[:6]
        what = f"has other classes ({', '.join(differ)})" if differ else "has another class order"
        raise UsageError(f"the teacher '{path}' {what} than the data: train it on these data")
    if size != data.size:
        raise UsageError(
            f"the teacher '{path}' was trained with {size} pixels: use --image-size {size}"
        )


def check_init(config: Config, data: Data) -> None:
    """Refuse initial weights for another order of the classes; note what else does not agree."""
    if not config.student_init.startswith("file:"):
        return
    path = config.student_init[5:]
    content = mhkd_runs.load_file(Path(path))
    content = content if isinstance(content, dict) else {}
    theirs = content.get("classes")
    if isinstance(theirs, (list, tuple)) and (theirs := [str(c) for c in theirs]) != data.classes:
        if sorted(theirs) == sorted(data.classes):
            what = f"the initial weights '{path}' have another class order than the data"
            raise UsageError(f"{what}: use weights that were trained with this order")
        if len(theirs) == len(data.classes):
            mhkd.log(f"note: the classifier of the initial weights '{path}' is of other classes")
    used = {"mean": [*data.mean], "std": [*data.std]}
    given = {n: [*map(float, content[n])] for n in used if "model" in content and n in content}
    if differ := [name for name in given if given[name] != used[name]]:
        what = "; ".join(f"{name} {given[name]}, here {used[name]}" for name in differ)
        mhkd.log(
            f"note: the initial weights '{path}' are of images of another normalisation: {what}"
        )


def find_heads(config: Config, data: Data, teacher: Any) -> tuple[dict | None, str | None]:
    """The teacher's pretrained heads, from a run of their own, and the SHA-256 of their file.

    teacher: the file with its weights.
    """
    if config.options.get("teacher_heads") != "pretrained":
        return None, None
    path = student_of(config.of_heads(teacher), data)
    return mhkd_runs.load_file(path)["heads"], mhkd_runs.sha256_of(path)


def open_store(config: Config, data: Data, distiller: Distiller, record: Mapping) -> Any:
    """The store of the teacher's outputs. Folders are named after all that the outputs depend on.

    Methods share the outputs that they have in common.
    """

    def digest(key: Any) -> str:
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    names = ["image_size", "crop_padding", "crop_scale", "flip", "augment", "precision"]
    names += ["val_fraction", "view_seed", "teacher_store"]
    key = {name: getattr(config, name) for name in names}
    hashes = ("data", "teacher", "teacher_code")
    key |= {name: record.get(f"{name}_sha256") for name in hashes} | {"name": config.teacher}
    key |= {"normalisation": record["normalisation"], "device": data.device.type}
    key["code"] = mhkd_code.code_sha256([FeatureExtractor, AuxHeads, Data, epoch_batches])
    here = mhkd_record.environment(config, data.device)
    key["libraries"] = [here.get(name) for name in ("torch", "timm", "torchvision")]
    folder, K = Path(config.out) / "cache" / f"teacher-{digest(key)}", len(data.classes)
    outputs = {"logits": (folder / "logits", K)}
    if distiller.teacher.uses_penultimate:
        outputs["penultimate"] = folder / "penultimate", distiller.teacher.width
    if config.options.get("teacher_heads") == "pretrained":
        # 2: --method lsh stored rows of heads in training mode before.
        of_heads = record.get("teacher_heads_sha256"), config.teacher_units, 2
        heads = folder / f"heads-{digest(of_heads)}"
        for i in range(1, 1 + len(config.options["units"])):
            outputs[f"head_{i}"] = heads / str(i), K
    N, dtype = len(data.train), getattr(torch, config.teacher_store)
    labelled = (data.train_labels != UNLABELLED).long().cumprod(0).sum().item()
    store = mhkd.sibling("mhkd_store").Store(
        outputs, N, config.views, dtype, data.device, mhkd.log,
        labelled, data.unlabelled_sha256 or "",
    )  # fmt: skip
    mhkd.log(
        f"'{folder}': {store.nbytes / 1e6:,.0f} MB for the teacher's outputs for {config.views} "
        f"views of {N} images, of which {store.stored} views are stored already"
    )
    return store


def student_of(config: Config, data: Data) -> Path:
    """The student.pt of a run, which is trained if it is not finished."""
    return Path(config.out) / mhkd.train(config, data)["name"] / "student.pt"


class TeacherHeads(Method):
    """Auxiliary heads on the frozen teacher, by cross-entropy: `--teacher-heads pretrained`.

    The student.pt of such a run contains the heads besides the unchanged teacher.
    """

    priority = -1  # sorts first; find_methods() refuses to join it, as it has no own terms
    on_teacher = True
    final_options = HEAD_OPTIONS

    def __init__(self, config: Config, student: FeatureExtractor, teacher: Any, data: Data):
        super().__init__(config, student, teacher, data)
        o = self.options
        self.heads = AuxHeads(student, o.units, o.head_width, o.head_stride)

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        return config.options["units"]

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        with mhkd.autocast(self.config, batch.labels.device):
            _, *logits = self.heads(batch.student)
        terms = {}
        for unit, z in zip(self.options.units, logits):
            terms[f"ce_{unit}"] = F.cross_entropy(z.float(), batch.labels)
            hits = z.detach().argmax(dim=1) == batch.labels
            batch.metrics[f"train_accuracy_{unit}"] = 100 * hits.float().sum()
        return terms

    def saved(self) -> dict[str, Any]:
        return {"heads": self.heads.state_dict()}


mhkd.METHODS["heads"] = TeacherHeads
