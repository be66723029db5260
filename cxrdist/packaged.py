"""YAML files that come with cxrdist and can be given by name: recipes, label maps, hardware.

In a checkout `cxrdist/shards` and `cxrdist/hardware` are links; a wheel contains the files.
"""

from importlib.resources import files
from pathlib import Path
from typing import TypeVar

RECIPES, SHARD_RECIPES, LABEL_MAPS, HARDWARE = "recipes", "shards", "shards/labels", "hardware"

Name = TypeVar("Name", str, Path)


def files_in(folder: str) -> dict[str, Path]:
    """Return the YAML files of a folder of the package by name (without ``.yaml``), sorted."""
    paths = Path(str(files("cxrdist") / folder)).glob("*.yaml")
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def path_of(folder: str, name: Name) -> Name:
    """Return the packaged file of a name; an existing file of that name or path has precedence.

    An unknown name or path is returned unchanged.
    """
    packaged = files_in(folder).get(str(name))
    # is_file, since a folder may have the name of a recipe, such as the `demo` of `cxrdist demo`.
    return name if packaged is None or Path(name).is_file() else type(name)(packaged)
