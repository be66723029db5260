"""A gallery: a directory of images from shards, KEY.png each, as the network sees them."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cxrdist.data.cache import Images
from cxrdist.data.images import encode_png
from cxrdist.data.index import Index
from cxrdist.files import atomic_file, remove_made, sweep

_MADE = re.compile(r"[\w-]*[0-9a-f]{8}\.png")  # a key ends in digits of a hash


def write_gallery(directory: Path, index: Index, images: Images, numbers: Iterable[int]) -> None:
    """Write the images of some sample numbers, and remove those of an earlier gallery.

    ``images`` are all samples of the index, uint8 [samples, S, S]. Files with other names stay.
    """
    wanted = {f"{index.samples[number].key}.png": number for number in numbers}
    sweep(directory)
    remove_made(directory, _MADE, wanted)
    for name, number in wanted.items():
        with atomic_file(directory / name) as partial:
            partial.write_bytes(encode_png(np.asarray(images[number])))
