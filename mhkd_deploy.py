"""The saved student in use: a student.pt as a network for raw images.

    student = mhkd.load_student("runs/.../student.pt")
    student.predict(["a.jpg", "b.jpg"])                      # [("cat", 0.98), ("dog", 0.71)]

The network includes the normalisation, so that it can be exported to ONNX: see the README.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhkd
import mhkd_images
import mhkd_runs
from mhkd import UsageError, explain, import_optional


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
        self.resize = content.get("resize") or mhkd_images.resized_side(self.image_size)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(content[name]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], floats in 0 to 1 or uint8, to logits [B, K]."""
        S = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, S, S):
            raise UsageError(f"the student takes images [B, 3, {S}, {S}], not {list(images.shape)}")
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise UsageError(f"the student takes floats in 0 to 1 or uint8, not {images.dtype}")
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
            content = mhkd_images.decode_one(pil, Path(image), M, "give an image file")
        elif isinstance(image, pil.Image):
            with explain("the image cannot be used", "convert it to RGB"):
                content = mhkd_images.prepare(image, M).tobytes()
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
    its place is also looked for beside the student.pt. A network
    exported with an example input (torch.export, torch.jit.trace) takes images of the example's
    dtype only, floats in 0 to 1 or uint8, and does not check their range.

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
        if ".py:" in name:
            mhkd.sibling("mhkd_custom").note_changed_code(name, path)
        model = mhkd.build_model(name, len(content["classes"]), "random", content["image_size"])
    elif not isinstance(model, nn.Module):
        raise UsageError(f"model= is {type(model).__name__}, not a network: {hint}")
    return Deployed(mhkd_runs.load_weights(model, path), content).eval()
