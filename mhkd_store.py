"""Stored outputs of a frozen teacher, which several epochs and runs share.

A view is one augmentation of every training image. The teacher's outputs for a view, one row of
numbers for each image, are computed when first needed and written after the epoch. Later epochs and
runs read them and do not run the teacher.

Each output has a folder, which belongs to one teacher, data set and kind of augmentation. Its files
view-0003-1a2b3c4d.pt hold "indices" [n] of training images and their "rows" [n, size]. A file gets
its name when it is complete and on the disk: a kill loses the rows of one epoch at most, and runs
and processes that write at the same time neither wait for nor damage each other. Files are
memory-mapped, and their checksums are compared when they are opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Store:
    """The outputs for `count` training images and a number of views.

    outputs: the folder of each output and its size, e.g. {"logits": (folder, 100)}.
    dtype: float32 is exact, float16 takes half of the space. device: where outputs are needed.
    labelled, unlabelled: how many of the images are labelled (default: all; they come first), and a
    hash of the others. Runs with other unlabelled images share the rows of the labelled ones.
    nbytes: size of all rows. stored: number of views that have rows already.
    """

    def __init__(
        self, outputs: Mapping[str, tuple[Path, int]], count: int, views: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        log: Callable[[str], None] = print, labelled: int | None = None, unlabelled: str = "",
    ):  # fmt: skip
        self.places, self.count, self.dtype, self.device = dict(outputs), count, dtype, device
        self.labelled, self.unlabelled = count if labelled is None else labelled, unlabelled
        self.log, self.disabled = log, False
        self.nbytes = views * count * sum(size for _, size in self.places.values()) * dtype.itemsize
        folders, names = [folder for folder, _ in self.places.values()], range(views)
        self.stored = sum(all(any(d.glob(f"view-{v:04}-*.pt")) for d in folders) for v in names)

    def open(self, view: int) -> None:
        """Select the view of the following steps."""
        self.view, self.rows, self.position, self.new = view, {}, {}, {}  # position in rows, or -1
        for name, (folder, size) in self.places.items():
            position, parts, start = torch.full((self.count,), -1), [], 0
            for path in sorted(folder.glob(f"view-{view:04}-*.pt")):
                if found := self._load(path, size):
                    rows, indices, ours = found
                    position[indices[ours]] = start + ours
                    start += len(rows)
                    parts.append(rows)
            if parts:  # a single file stays mapped
                self.rows[name] = (torch.cat(parts) if parts[1:] else parts[0]).to(self.device)
            self.position[name] = position.to(self.device)
        self.complete = all(bool((at >= 0).all()) for at in self.position.values())
        self.seen = torch.zeros(self.count, dtype=torch.bool, device=self.device)

    def outputs(self, indices: Tensor, compute: Callable[[], Mapping]) -> dict[str, Tensor]:
        """The teacher's outputs for the training images `indices` [B], float32 [B, size] each.

        compute() runs the teacher on the batch. It is called if a row is not stored.
        """
        at = {name: position[indices] for name, position in self.position.items()}
        if self.complete or all(bool((rows >= 0).all()) for rows in at.values()):
            return {name: self.rows[name][rows].float() for name, rows in at.items()}
        computed = compute()
        found = {name: computed[name].to(self.dtype) for name in self.places}
        if not self.disabled:
            self.seen[indices] = True
            for name, rows in found.items():
                if name not in self.new:
                    self.new[name] = rows.new_empty(self.count, rows.shape[1])
                self.new[name][indices] = rows
        return {name: rows.float() for name, rows in found.items()}

    def save(self) -> None:
        """Write the new rows of the view. Without space for them the run continues unstored."""
        for name, new in self.new.items():
            indices = (self.seen & (self.position[name] < 0)).nonzero()[:, 0]
            if len(indices) and not self.disabled:
                self._write(self.places[name][0], indices.cpu(), new[indices].cpu())
        self.new = {}

    def _write(self, folder: Path, indices: Tensor, rows: Tensor) -> None:
        digest = hashlib.sha256(indices.numpy().tobytes() + self.unlabelled.encode()).hexdigest()
        path = folder / f"view-{self.view:04}-{digest[:8]}.pt"
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save({"indices": indices, "rows": rows, "unlabelled": self.unlabelled}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            self.disabled, reason = True, str(error).splitlines()[0]
            what = f"teacher outputs cannot be written to '{folder}' ({reason})"
            self.log(f"note: {what}: the run continues without storing them")
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _load(self, path: Path, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows and indices of a file, and which of them hold for these images; None on an error."""
        try:
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of its part {bad} is wrong")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            indices, rows = content["indices"], content["rows"]
            if rows.dtype != self.dtype or rows.shape != (len(indices), size):
                raise ValueError("it holds other rows")
            ours = self.count if content["unlabelled"] == self.unlabelled else self.labelled
            return rows, indices, (indices < ours).nonzero()[:, 0]
        except Exception as error:
            intact = isinstance(error, (OSError, MemoryError))  # as far as is known
            what = "cannot be read" if intact else "is damaged"
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.log(f"note: '{path}' {what} ({reason}): its rows are computed again")
            with contextlib.suppress(OSError):
                intact or path.unlink(missing_ok=True)
            return None
