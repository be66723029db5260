"""Packing from and into an object store: a real S3 server on this machine."""

import io
import logging
import re

import pytest
from PIL import Image
from support import contents, make_images, make_masks, run_command

moto = pytest.importorskip("moto.server", reason="moto is not installed")
upath = pytest.importorskip("upath")


@pytest.fixture(scope="module")
def server():
    """An S3 server; the environment of this process points there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def store(server, tmp_path):
    """A bucket of the test's own."""
    bucket = upath.UPath(f"s3://{re.sub('[^a-z0-9]', '-', tmp_path.name)[:50]}0")
    bucket.mkdir()
    return bucket


def test_a_bucket_is_packed_into_a_bucket(store, tmp_path):
    """The bytes of a pack on this machine, also by tasks; check and training read them there."""
    source = make_images(tmp_path / "images", {"a": 70, "b": 70})
    masks = make_masks(source, source / "lungs")  # within the input: no class, and no images
    for file in source.rglob("*.png"):
        (store / file.relative_to(tmp_path).as_posix()).write_bytes(file.read_bytes())
    options = ("--size", 32, "--split", "0.5/0.25/0.25", "--shard-size", 50)
    pack = ("pack", "--source", "folder", *options)
    here = (*pack, "--input", source, "--masks", masks, "--out", tmp_path / "images.out")
    assert not run_command(*here).returncode
    there = (
        "--input",
        store / "images",
        "--masks",
        store / "images/lungs",
        "--out",
        store / "shards",
    )
    remote = (*pack, *there)
    for task in (1, 0):
        done = run_command(*remote, "--num-tasks", 2, "--task", task)
        assert done.returncode == 0, done.stderr
    assert not (store / "shards").exists()
    done = run_command(*remote, "--merge")
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in store.iterdir()) == ["images", "shards"]
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for file in (store / "shards").iterdir():
        (fetched / file.name).write_bytes(file.read_bytes())
    ours, theirs = contents(tmp_path / "images.out"), contents(fetched)
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"pack.json"}, "only the names of the input and the masks may differ"
    again = run_command(*remote, "--merge")
    assert "is packed already" in again.stdout
    assert run_command("check", store / "shards").returncode == 0
    (store / "shards" / "train-000000.tar").write_bytes(b"damage")
    done = run_command("check", store / "shards")
    assert done.returncode == 2
    assert "train-000000.tar: the shard has 6 bytes" in done.stderr


def test_an_unreadable_object_is_named(store, tmp_path):
    """A bad image in a bucket is one line with its URL."""
    picture = io.BytesIO()
    Image.new("L", (40, 40)).save(picture, "PNG")
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"):
        (store / "images" / name).write_bytes(picture.getvalue())
    (store / "images" / "a" / "3.png").write_bytes(b"no image")
    done = run_command(
        *("pack", "--source", "folder", "--input", store / "images", "--out", tmp_path / "out"),
        *("--size", 32, "--split", "0.5/0.25/0.25"),
    )
    assert done.returncode == 2
    assert f"{str(store).rstrip('/')}/images/a/3.png: is not a readable" in done.stderr


def test_the_cache_is_filled_from_a_bucket(store, tmp_path):
    """Training reads shards of a bucket once, into the decoded cache."""
    from accelerate import Accelerator
    from support import make_shards

    from cxrdist.data.cache import open_cache
    from cxrdist.data.index import read_index

    shards = make_shards(tmp_path, {"a": 12, "b": 12})
    for file in shards.iterdir():
        (store / "shards" / file.name).write_bytes(file.read_bytes())
    accelerator = Accelerator(cpu=True)
    here = open_cache(read_index(shards), tmp_path / "one", accelerator)
    there = open_cache(read_index(store / "shards"), tmp_path / "two", accelerator)
    assert (here == there).all()
