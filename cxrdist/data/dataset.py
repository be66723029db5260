"""Dataset: packed shards as a torch Dataset, for training loops other than `cxrdist train`."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cxrdist.data.index import Index, read_index
from cxrdist.data.records import SPLITS
from cxrdist.data.shards import OpenShard, open_shard
from cxrdist.errors import CxrdistError


class LabelledImage(NamedTuple):
    """A sample, or a batch of several made by `torch.utils.data.default_collate`."""

    image: Tensor
    """uint8 [1, S, S], as a `Classifier` takes it in a batch."""
    target: Tensor
    """float32 [classes]: 1 if the image has the class, 0 if not, -1 if not known."""
    key: str
    patient: str


class ShardDataset(Dataset[LabelledImage]):
    """The samples of a split, in the order of samples.csv, each decoded on access.

    On the first access to a shard, a process compares its sha256 with the index; it then compares
    each sample with samples.csv. Shards stay open: one file descriptor per shard (1000 images by
    default). Workers of a DataLoader open their own files, with any start method.

    Attributes:
        index: of the shards.
        classes: names in the order of the targets.
        numbers: sample numbers in the index, one per item.
    """

    def __init__(self, index: Index, split: str) -> None:
        """Select the samples of a split; no shard is opened yet.

        Raises:
            CxrdistError: the split is invalid or empty.
        """
        if split not in SPLITS:
            raise CxrdistError(f"split is {split!r:.60}: expected {', '.join(SPLITS)}")
        self.index = index
        self.classes = list(index.classes)
        self.numbers = index.numbers(split)
        if not self.numbers:
            raise CxrdistError(f"{index.directory}: has no samples in {split}; give another split")
        # Uncertain labels are -1 and missing ones -2: neither is known.
        self._targets = np.maximum(index.targets(), -1).astype(np.float32)
        self._shards = index.packed()
        self._ends = np.cumsum([shard.entry.samples for shard in self._shards])
        self._open: dict[int, OpenShard] = {}
        self._files = ExitStack()
        self._process = os.getpid()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.numbers)

    def __getitem__(self, item: int) -> LabelledImage:
        """Decode a sample.

        Raises:
            CxrdistError: its shard differs from the index.
            IndexError: there is no such sample.
        """
        number = self.numbers[item]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        pixels, _ = self._opened(shard).read(number - self._shards[shard].first)
        sample = self.index.samples[number]
        # An array of a Pillow image is read-only, which torch warns about.
        image = torch.from_numpy(pixels.copy()).unsqueeze(0)
        target = torch.tensor(self._targets[number])  # a copy: the caller may smooth it in place
        return LabelledImage(image, target, sample.key, sample.patient)

    def _opened(self, shard: int) -> OpenShard:
        """Return an open shard by its number, checked by this process."""
        if self._process != os.getpid():  # forked workers would share the read position of a file
            self._open, self._files, self._process = {}, ExitStack(), os.getpid()
        if shard not in self._open:
            self._open[shard] = self._files.enter_context(open_shard(self._shards[shard]))
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open shards, which spawned workers cannot inherit."""
        return {**vars(self), "_open": {}, "_files": ExitStack(), "_process": -1}


def open_shards(directory: str | Path, split: str) -> ShardDataset:
    """Open the split train, val or test of packed shards as a torch Dataset.

    Raises:
        CxrdistError: there are no shards, they disagree with their index, or the split is empty.
    """
    try:
        index = read_index(Path(directory))
    except CxrdistError as error:  # its text names an option of the commands
        raise CxrdistError(str(error).removeprefix("--shards ")) from error
    return ShardDataset(index, split)
