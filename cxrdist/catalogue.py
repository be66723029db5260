"""The recipes that come with cxrdist: their purpose and their results.

A recipe's file begins with a comment. Its first sentence describes the purpose; in recipes of
`cxrdist train`, paragraphs that begin with ``Expected:`` and ``Measured:`` contain the results.
"""

import re
from itertools import takewhile
from textwrap import fill

from cxrdist.config import RecipesConfig
from cxrdist.documents import parse_yaml
from cxrdist.errors import CxrdistError, choices
from cxrdist.options import RECIPES_OF
from cxrdist.packaged import files_in

FIGURES = ("Expected:", "Measured:")


def recipes(config: RecipesConfig) -> None:
    """Print the purpose and results of all recipes, or the file of one."""
    if config.name is not None:
        files = {n: f for folder in RECIPES_OF.values() for n, f in files_in(folder).items()}
        if config.name not in files:
            known = choices(config.name, files)
            raise CxrdistError(f"recipes: no recipe {config.name!r}; {known}")
        print(files[config.name].read_text(encoding="utf-8"), end="")
        return
    for command, folder in RECIPES_OF.items():
        print(f"cxrdist {command} --config NAME:\n")
        for name, file in files_in(folder).items():
            text = file.read_text(encoding="utf-8")
            lines = [*summary(text), *_counts(text)]
            print("\n".join([f"  {name}", *map(_indented, lines)]) + "\n")
    print("`cxrdist recipes NAME` prints one; any of its fields is a flag, see README, Recipes")


def summary(text: str) -> list[str]:
    """Return the first sentence of a recipe's comment, and the paragraphs with its figures."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    paragraphs = "\n".join(line.removeprefix("#").strip() for line in head).split("\n\n")
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    # A capital must follow, so that the dot of `et al. 2016` does not end the sentence.
    purpose = re.split(r"(?<=\.) (?=[A-Z])", joined[0])[0]
    return [purpose, *(line for line in joined if line.startswith(FIGURES))]


def _counts(text: str) -> list[str]:
    """Return a line with the images per class that a recipe of `cxrdist pack` expects."""
    expected = parse_yaml(text.encode()).get("expect", {})
    counts = ", ".join(f"{name} {images:,}" for name, images in expected.items())
    return [f"Expected images per class: {counts}."] if counts else []


def _indented(line: str) -> str:
    return fill(line, 100, initial_indent="    ", subsequent_indent="      ")
