import imagehash
import numpy as np
from PIL import Image

from cxrdist.data.fingerprint import fingerprint


def test_the_hash_is_the_perceptual_hash_of_imagehash():
    """Of the square scaled to 64 px by a box filter, 256 bits."""
    random = np.random.default_rng(0)
    for _ in range(20):
        rough = Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8))
        image = rough.resize((224, 224), Image.Resampling.BICUBIC)
        small = image.resize((64, 64), Image.Resampling.BOX)
        expected = np.packbits(imagehash.phash(small, 16).hash).tobytes()
        assert fingerprint(np.asarray(image)).phash == expected
