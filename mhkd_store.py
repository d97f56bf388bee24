"""Stored outputs of a frozen teacher, which several epochs and runs share.

A view is one augmentation of every training image. The teacher's outputs for a view, one row of
numbers for each image, are computed when they are first needed and written after the epoch. Later
epochs and runs read them and do not run the teacher.

A folder belongs to one teacher, data set and kind of augmentation. Its files view-0003-1a2b3c4d.pt
hold "indices" [n] of training images and their "rows" [n, R]. A file gets its name when it is
complete and on the disk: a kill loses the rows of one epoch at most, and runs and processes that
write at the same time neither wait for nor damage each other. Files are memory-mapped, and their
checksums are compared when they are opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Store:
    """The rows of one folder, for `count` training images and a number of views.

    sizes: the length of each output of an image; a row is their concatenation, R numbers.
    dtype: float32 is exact, float16 takes half of the space. device: where outputs are needed.
    nbytes: size of all rows. stored: number of views that have rows already.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], count: int, views: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        log: Callable[[str], None] = print,
    ):  # fmt: skip
        self.folder, self.sizes, self.count, self.dtype = folder, dict(sizes), count, dtype
        self.device, self.log, self.disabled = device, log, False
        self.nbytes = views * count * sum(sizes.values()) * dtype.itemsize
        self.stored = len({path.name[:9] for path in folder.glob("view-*.pt")})

    def open(self, view: int) -> None:
        """Select the view of the following steps."""
        self.view, parts = view, []
        self.position = torch.full((self.count,), -1)  # of an image's row in self.rows
        start = 0
        for path in sorted(self.folder.glob(f"view-{view:04}-*.pt")):
            if part := self._load(path):
                indices, rows = part
                self.position[indices] = torch.arange(start, start + len(rows))
                start += len(rows)
                parts.append(rows)
        if parts:  # a single file stays mapped
            self.rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.device)
        self.position = self.position.to(self.device)
        self.complete = bool((self.position >= 0).all())
        self.new: Tensor | None = None  # [count, R], rows that are not on the disk
        self.is_new = torch.zeros(self.count, dtype=torch.bool, device=self.device)

    def outputs(
        self, indices: Tensor, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The teacher's outputs for the training images `indices` [B], float32 [B, size] each.

        compute() runs the teacher on the batch. It is called if a row is not stored.
        """
        at = self.position[indices]
        if self.complete or bool((at >= 0).all()):
            rows = self.rows[at]  # [B, R]
        else:
            found = compute()
            rows = torch.cat([found[name].to(self.dtype) for name in self.sizes], dim=1)
            if not self.disabled:
                if self.new is None:
                    self.new = rows.new_empty(self.count, rows.shape[1])
                self.new[indices] = rows
                self.is_new[indices] = at < 0
        parts = rows.float().split([*self.sizes.values()], dim=1)
        return {name: part.contiguous() for name, part in zip(self.sizes, parts)}

    def save(self) -> None:
        """Write the new rows of the view. Without space for them the run continues unstored."""
        if self.new is None:
            return
        indices = self.is_new.nonzero()[:, 0]
        rows = self.new if len(indices) == self.count else self.new[indices]
        content = {"indices": indices.cpu(), "rows": rows.cpu()}
        digest = hashlib.sha256(content["indices"].numpy()).hexdigest()[:8]
        path = self.folder / f"view-{self.view:04}-{digest}.pt"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            self.disabled, reason = True, str(error).splitlines()[0]
            self.log(
                f"note: the teacher's outputs cannot be written to '{self.folder}' ({reason}): "
                "the run continues without storing them"
            )
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        self.new = None

    def _load(self, path: Path) -> tuple[Tensor, Tensor] | None:
        """Indices and rows of a file; None, and it is removed, if it is damaged."""
        try:
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of its part {bad} is wrong")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            indices, rows = content["indices"], content["rows"]
            if rows.dtype != self.dtype or rows.shape != (len(indices), sum(self.sizes.values())):
                raise ValueError("it holds other rows")
            torch.zeros(self.count)[indices]  # an IndexError for other images
            return indices, rows
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.log(f"note: '{path}' is damaged ({reason}): its rows are computed again")
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
