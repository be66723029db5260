"""YAML files that come with cxrdist and can be given by name: recipes, label maps, hardware.

In a checkout `cxrdist/shards` and `cxrdist/hardware` are links; a wheel contains the files.
"""

from importlib.resources import files
from pathlib import Path
from typing import TypeVar

RECIPES, SHARD_RECIPES, LABEL_MAPS, HARDWARE = "recipes", "shards", "shards/labels", "hardware"

Name = TypeVar("Name", str, Path)


def path_of(folder: str, name: Name) -> Name:
    """Return the path of a file that comes with cxrdist; an existing file has precedence.

    Args:
        folder: one of the constants of this module.
        name: name of a file without ``.yaml``; any other name or path is returned unchanged.
    """
    packaged = Path(str(files("cxrdist") / folder / f"{name}.yaml"))
    is_name = Path(str(name)).name == str(name) and not Path(str(name)).is_file()
    return type(name)(packaged) if is_name and packaged.is_file() else name


def names_in(folder: str) -> list[str]:
    """Return the names that `path_of` knows, in alphabetical order."""
    return sorted(
        Path(file.name).stem
        for file in (files("cxrdist") / folder).iterdir()
        if file.name.endswith(".yaml")
    )
