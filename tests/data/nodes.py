"""Run on each rank of a test, one rank a node: open the cache in this node's directory.

usage: nodes.py SHARDS CACHE_OF_NODE_0 CACHE_OF_NODE_1 ...
"""

import hashlib
import sys
from pathlib import Path

from cxrdist.data.cache import open_cache
from cxrdist.data.index import read_index
from cxrdist.distributed import start

if __name__ == "__main__":
    accelerator = start()
    directory = Path(sys.argv[2 + accelerator.process_index])
    images = open_cache(read_index(Path(sys.argv[1])), directory, accelerator)
    print(hashlib.sha256(images.tobytes()).hexdigest())
    accelerator.end_training()
