"""Shards as a torch Dataset, for training loops other than `cxrdist train`."""

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
    """A sample, or what `torch.utils.data.default_collate` makes of several.

    Attributes:
        image: uint8 [1, S, S], as a `Classifier` takes it in a batch.
        target: float32 [classes]: 1 where the image has the class, 0 where it has not, -1 where
            that is not known.
        key: of the sample.
        patient: of the sample.
    """

    image: Tensor
    target: Tensor
    key: str
    patient: str


class ShardDataset(Dataset[LabelledImage]):
    """The samples of a split, in the order of samples.csv, each decoded when it is asked for.

    A process checks a shard as a whole against the index when it first needs one of its samples
    (sha256), then each sample against samples.csv, and keeps the shard open: a descriptor for 1000
    images. Workers of a DataLoader open their own, however they are started.

    Attributes:
        index: of the shards.
        classes: names in the order of the targets.
        numbers: sample numbers in the index, one for each item.
    """

    def __init__(self, index: Index, split: str) -> None:
        """Find the samples of a split; no shard is opened yet.

        Raises:
            CxrdistError: the split is invalid or empty.
        """
        if split not in SPLITS:
            raise CxrdistError(f"split is {split!r:.60}: expected {', '.join(SPLITS)}")
        self.index = index
        self.classes = list(index.classes)
        self.numbers = index.numbers(split)
        if not self.numbers:
            raise CxrdistError(f"{index.directory}: has no samples in {split}; name another split")
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
        place = int(np.searchsorted(self._ends, number, side="right"))
        pixels, _ = self._opened(place).read(number - self._shards[place].first)
        sample = self.index.samples[number]
        image = torch.from_numpy(pixels.copy()).unsqueeze(0)
        target = torch.from_numpy(self._targets[number])
        return LabelledImage(image, target, sample.key, sample.patient)

    def _opened(self, place: int) -> OpenShard:
        """Return a shard that this process has checked."""
        if self._process != os.getpid():  # a forked worker would share the positions in the files
            self._forget()
        if place not in self._open:
            self._open[place] = self._files.enter_context(open_shard(self._shards[place]))
        return self._open[place]

    def _forget(self) -> None:
        self._open, self._files, self._process = {}, ExitStack(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open shards, for workers that are spawned."""
        return {**vars(self), "_open": {}, "_files": ExitStack(), "_process": -1}


def open_shards(directory: str | Path, split: str) -> ShardDataset:
    """Open a split of packed shards as a torch Dataset.

    Args:
        directory: of the shards.
        split: train, val or test.

    Raises:
        CxrdistError: there are no shards, they disagree with their index, or the split is empty.
    """
    try:
        index = read_index(Path(directory))
    except CxrdistError as error:  # of the commands, whose option it names
        raise CxrdistError(str(error).removeprefix("--shards ")) from error
    return ShardDataset(index, split)
