"""Pack: raw images -> WebDataset shards with an index and an audit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cxrdist.config import PackConfig, deciding, deciding_squares
from cxrdist.data.anonymise import (
    Name,
    anonymise,
    make_private,
    names_file,
    salt_of,
    shared_key,
    write_names,
)
from cxrdist.data.assemble import Layout, assemble
from cxrdist.data.decoding import (
    decode_missing,
    read_squares,
    refuse_late_dicom,
    scaled_by_one_depth,
    with_tags,
)
from cxrdist.data.found import is_within
from cxrdist.data.index import read_index
from cxrdist.data.masked import lungs_alone
from cxrdist.data.pack_plan import (
    content_of,
    decoding_of,
    known_salt,
    refuse_bad_findings,
    refuse_bad_splits,
    refuse_bad_tasks,
    refuse_empty_cover,
    refuse_large_index,
    refuse_unknown_classes,
    with_boxes,
)
from cxrdist.data.records import Source
from cxrdist.data.sources import read_source
from cxrdist.data.splits import parse_split
from cxrdist.data.squares import Part, make_squares, plan_parts
from cxrdist.data.summary import describe
from cxrdist.errors import CxrdistError
from cxrdist.files import (
    locked,
    publish,
    read_document,
    remove,
    scratch_directory,
    write_json,
)
from cxrdist.terminal import counted

CHANGED = {
    "images_sha256": "the list of images or of their text boxes or masks has changed",
    "records_sha256": "the images or what is known of them have changed",
}
"""What a different hash in a pack.json means."""


def pack(config: PackConfig) -> None:
    """Pack a source into a new directory of shards and print a summary.

    The bytes depend on the source, the options and the seed, not on the number of workers or tasks.
    Until the directory appears, the work is kept in a hidden one next to it. After a kill the same
    command resumes from there, even with other options, unless they change the decoded squares.

    Raises:
        CxrdistError: bad options or source, an unreadable image without ``skip_bad``, or a source
            that was changed since the pack was begun.
        RunFailedError: the disk is full.
    """
    _refuse_bad_options(config)
    work = config.out.with_name(f".{config.out.name}.partial")
    source = _read_source(config, work)
    private = source.dicom if config.anonymise is None else config.anonymise
    options = deciding(config) | {"anonymise": private}
    content = content_of(options, source, known_salt(config.out, work) if private else None)
    if _is_packed(config.out, work, content, source):
        return
    _refuse_bad_source(config, source)
    with _held(work, shared=config.task is not None):
        key, names = shared_key(work), list[Name]()
        if private:
            # A new pack has its salt only here: its key is made under the lock.
            content = content_of(options, source, salt_of(key))
            source, names = anonymise(source, key)
        # After the renaming, which sorts the records anew: their order decides the parts.
        _begin(work, decoding_of(deciding_squares(config) | {"anonymise": private}, source))
        parts, directory = plan_parts(source.records), work / "squares"

        def make(parts: Sequence[Part], depth: int | None) -> Iterator[int]:
            return make_squares(
                parts, directory, config.size, config.fit, config.workers, config.cover, depth
            )

        if not config.merge:
            mine = parts[config.task or 0 :: config.num_tasks or 1]
            total = decode_missing(mine, directory, make, config.depth)
        if config.task is not None:
            print(f"task {config.task} of {config.num_tasks}: {total} images are decoded")
            return
        read = partial(
            read_squares, parts, work, source.views, skip_bad=config.skip_bad, named=not private
        )
        squares = with_tags(scaled_by_one_depth(parts, read, make, config.depth), private=private)
        if config.anonymise is None and not private:
            refuse_late_dicom(squares, work)
        with _on_this_machine(work) as here:
            layout = _layout(config)
            shards = assemble(source, squares, here, content, layout)
            describe(source, shards, here, layout, config.expect, config.source)
            if (here / "shards" / "rejected.csv").is_file():
                print(f"{config.out / 'rejected.csv'}: the files left out, with the reason of each")
            # Before the shards appear: after a kill the same command sees them, stops early and
            # removes the key, and this table could never be made.
            if names:
                write_names(names_file(config.out), key, names)
            publish(here / "shards", config.out)
        remove(work)
        print(f"packed {counted(len(shards.squares), 'image')} into {config.out}")
        if names:
            print(f"{names_file(config.out)}: the original of each name; keep it private")


def _refuse_bad_options(config: PackConfig) -> None:
    refuse_bad_tasks(config.task, config.num_tasks, merge=config.merge)
    if not config.text_boxes and (config.cover, config.cover_split) != ("black", "all"):
        raise CxrdistError("--cover, --cover-split: need --text-boxes, see cxrdist find-text")
    parse_split(config.split)
    if not config.out.name:
        raise CxrdistError(f"--out {config.out}: expected the name of a directory to make")
    if config.input.exists() and is_within(config.input, config.out):
        raise CxrdistError(f"--out {config.out}: holds --input {config.input}; name another one")


def _read_source(config: PackConfig, work: Path) -> Source:
    """Read the records, with the boxes and masks that --text-boxes and --lungs-only ask for."""
    # Without training images one class is enough: its sensitivity can be measured.
    least_classes = 2 if parse_split(config.split)[0] else 1
    source = read_source(config, (config.out, work), least_classes)
    if config.text_boxes:
        source = with_boxes(source, config.text_boxes)
    return lungs_alone(source) if config.lungs_only else source


def _refuse_bad_source(config: PackConfig, source: Source) -> None:
    """Check the options against the list of records, before any image is decoded."""
    refuse_large_index(source, config.input, config.size, config.shard_size)
    refuse_bad_findings(source)
    refuse_unknown_classes(source, config.expect, config.label_map)
    if config.text_boxes:
        refuse_empty_cover(source, config.split, config.cover_split)
    drops_copies = config.duplicates == "drop"
    refuse_bad_splits(source, config.split, config.seed, drops_copies=drops_copies)


def _layout(config: PackConfig) -> Layout:
    return Layout(
        size_px=config.size,
        fit=config.fit,
        split=config.split,
        seed=config.seed,
        shard_size=config.shard_size,
        duplicates=config.duplicates,
        cover=config.cover if config.text_boxes else None,
        cover_split=config.cover_split,
    )


def _is_packed(out: Path, work: Path, content: dict[str, object], source: Source) -> bool:
    """Return whether the same shards already exist; remove a work directory left by a kill.

    It is an error if something else exists there, or a link to a directory to be made.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if isinstance(out, Path) and out.is_symlink():  # a directory cannot take its place
            raise CxrdistError(f"--out {out}: is a link; name the directory that it points to")
        return False
    index, options = out / "index.json", out / "pack.json"
    if not index.is_file() and not isinstance(out, Path) and work.exists():
        return False  # an object store: killed while the shards were copied to it
    mend = "remove it or choose another name"
    if not index.is_file() or not options.is_file():
        raise CxrdistError(f"--out {out}: already exists; {mend}")
    before = read_document(options, dict[str, object], mend)
    if before != content:
        packed = counted(len(read_index(out).samples), "image")
        what = f"{_difference(before, content)}; the source has {len(source.records)}"
        raise CxrdistError(f"--out {out}: already exists, with {packed} ({what}); {mend}")
    remove(work)
    print(f"{out}: is packed already, from images of the same names with the same options")
    if newer := _written_after(source, index):
        print(
            f"newer than these shards: {counted(len(newer), 'image')}, such as {newer[0]}; if its "
            f"content has changed, remove {out} and run the same command again"
        )
    return True


def _written_after(source: Source, index: Path) -> list[Path]:
    """Return the images that were written after the index; object stores are not asked."""
    if not isinstance(index, Path):
        return []
    packed = index.stat().st_mtime
    files = (record.file for record in source.records if isinstance(record.file, Path))
    return [file for file in files if file.stat().st_mtime > packed]


def _difference(before: dict[str, object], options: dict[str, object]) -> str:
    """Return what differs between the pack.json of a pack and what is to be packed now."""
    for name in sorted({*before, *options} - {*CHANGED}):
        if before.get(name) != options.get(name):
            both = before.get(name), options.get(name)
            shown = ("not given" if value is None else value for value in both)
            return "--{} was {}, is {}".format(name.replace("_", "-"), *shown)
    return next(what for name, what in CHANGED.items() if name in options)


def _held(work: Path, *, shared: bool) -> Any:
    """Lock the work directory; object stores have no locks.

    It is an error if it holds other files, which the pack would remove at its end.
    """
    if not isinstance(work, Path):
        return nullcontext()
    # Hidden ones are its own: .lock and .key are made before pack.json.
    others = [path.name for path in work.glob("[!.]*")]
    if work.is_symlink() or (others and "pack.json" not in others):
        raise CxrdistError(f"{work}: expected an unfinished pack, found other files; move it away")
    make_private(work)
    return locked(work, shared=shared)


def _begin(work: Path, decoding: dict[str, object]) -> None:
    """Start a pack, or check that an unfinished one has squares of the same images and options."""
    path = work / "pack.json"
    if not path.is_file():
        write_json(path, decoding)
        return
    before = read_document(path, dict[str, object], f"remove {work} to start over")
    if before != decoding:
        raise CxrdistError(
            f"{work}: holds an unfinished pack with other options ({_difference(before, decoding)}"
            "); use the earlier ones, or remove it to start over"
        )


@contextmanager
def _on_this_machine(work: Path) -> Iterator[Path]:
    """Yield the work directory, or a local copy of a remote one."""
    if isinstance(work, Path):
        yield work
        return
    with scratch_directory() as here:
        work.fs.get(f"{work.path}/squares", f"{here}/squares", recursive=True)
        yield here
