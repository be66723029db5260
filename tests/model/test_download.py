import hashlib
import io
import multiprocessing
from pathlib import Path

import pytest
import torch
from web import serving

import cxrdist.model.download
from cxrdist.errors import CxrdistError
from cxrdist.model.download import ATTEMPTS, download, place_of


def checkpoint(value: float = 1.0) -> bytes:
    """The bytes of a file of torch.save, 400 kB."""
    buffer = io.BytesIO()
    torch.save({"a": torch.full((100_000,), value)}, buffer)
    return buffer.getvalue()


DATA = checkpoint()
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """PyTorch's hub cache in a directory of the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def web():
    with serving() as running:
        yield running


def partial(url: str) -> Path:
    """Where a broken download waits."""
    file = place_of(url)
    return file.with_name(file.name + ".partial")


def test_a_file_is_fetched_once_and_noted(web, home, capsys):
    """It stands under its name with its sha256 beside it, and the host is asked once."""
    web.files["/model.pth.tar"] = DATA
    kept = download(f"{web.url}/model.pth.tar", "--init x")
    assert kept.read_bytes() == DATA
    assert kept.parent == home
    assert kept.with_name(kept.name + ".sha256").read_text().split()[0] == DIGEST
    assert "fetching model.pth.tar: 100%" in capsys.readouterr().err
    web.files.clear()
    assert download(f"{web.url}/model.pth.tar", "--init x") == kept
    assert len(web.asked) == 1


def test_two_urls_of_one_name_are_two_files(web):
    """model.pth.tar of one host is not that of another; a name with a hash is shared with torch."""
    web.files |= {"/a/model.pth.tar": DATA, "/b/model.pth.tar": checkpoint(2.0)}
    first, second = (download(f"{web.url}/{x}/model.pth.tar", "--init x") for x in "ab")
    assert first.read_bytes() != second.read_bytes()
    assert place_of("https://h/d-a639ec97.pth").name == "d-a639ec97.pth"


def test_cut_connections_are_taken_up_where_they_broke(web):
    """Each request asks for the rest only, of the same version, and the bytes are the file's."""
    web.files["/w.pt"] = DATA
    web.cuts = [100_000, 100_000, 50_000]
    assert download(f"{web.url}/w.pt", "--init x").read_bytes() == DATA
    ranges = [asked.get("Range") for asked in web.asked]
    assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=250000-"]
    assert {asked.get("If-Range") for asked in web.asked[1:]} == {'"1"'}


def test_a_half_file_waits_for_the_next_call(web, home):
    """After too many cuts the error says to run again; that fetches the rest only."""
    web.files["/w.pt"] = DATA
    web.cuts = [10_000] * ATTEMPTS
    with pytest.raises(CxrdistError, match=r"broke off after 50000 of \d+ bytes.*run the same"):
        download(f"{web.url}/w.pt", "--init x")
    assert partial(f"{web.url}/w.pt").stat().st_size == 50_000
    assert not place_of(f"{web.url}/w.pt").exists()
    assert download(f"{web.url}/w.pt", "--init x").read_bytes() == DATA
    assert web.asked[-1]["Range"] == "bytes=50000-"
    assert not list(home.glob("*.partial*"))


def test_a_file_that_changed_meanwhile_is_fetched_anew(web):
    """Halves of two versions are never put together, with a hash published or without."""
    web.files["/w.pt"] = checkpoint(2.0)
    web.cuts = [50_000] * ATTEMPTS
    with pytest.raises(CxrdistError):
        download(f"{web.url}/w.pt", "--init x")
    web.files["/w.pt"], web.tag = DATA, '"2"'
    assert download(f"{web.url}/w.pt", "--init x").read_bytes() == DATA


def test_without_a_version_or_hash_nothing_is_resumed(web):
    """A host that names no version could have changed the file: it is fetched whole."""
    web.files["/w.pt"], web.tag = DATA, None
    web.cuts = [100_000]
    assert download(f"{web.url}/w.pt", "--init x").read_bytes() == DATA
    assert [asked.get("Range") for asked in web.asked] == [None, None]


def test_a_half_file_that_is_whole_is_checked_and_kept_or_fetched_anew(web):
    """A process killed between the last byte and the name leaves nothing to ask for (416)."""
    url = f"{web.url}/w-{DIGEST[:8]}.pt"
    web.files[f"/w-{DIGEST[:8]}.pt"] = DATA
    partial(url).parent.mkdir(parents=True)
    partial(url).write_bytes(DATA)
    assert download(url, "--init x").read_bytes() == DATA


@pytest.mark.parametrize("how", ["in the name", "in the url", "in the cache", "in the note"])
def test_another_file_than_the_published_one_is_refused(web, how):
    """Its hash is named and nothing of it stays, so that the next call fetches it anew."""
    name = f"w-{DIGEST[:8]}.pt" if how in ("in the name", "in the cache") else "w.pt"
    url = f"{web.url}/{name}" + (f"#sha256={DIGEST}" if how == "in the url" else "")
    web.files[f"/{name}"] = DATA
    if how in ("in the cache", "in the note"):
        download(url, "--init x").write_bytes(checkpoint(2.0))
    else:
        web.files[f"/{name}"] = checkpoint(2.0)
    found = hashlib.sha256(checkpoint(2.0)).hexdigest()
    with pytest.raises(CxrdistError, match=f"--init x: .*sha256 {found}, expected {DIGEST[:8]}"):
        download(url, "--init x")
    web.files[f"/{name}"] = DATA
    assert download(url, "--init x").read_bytes() == DATA


def test_a_web_page_is_no_checkpoint(web, home):
    """A log-in page with status 200 is refused and not kept."""
    web.files["/w.pt"] = b"<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(CxrdistError, match="web page"):
        download(f"{web.url}/w.pt", "--init x")
    assert not list(home.glob("*w.pt*[!k]"))


def test_offline_it_says_what_to_fetch_and_where_to_put_it(web, home):
    """The message has the URL, the reason and the exact place; a file put there is taken."""
    url = f"{web.url}/lost.pt"
    with pytest.raises(CxrdistError) as error:
        download(url, "--init chexnet")
    place = place_of(url)
    assert str(error.value).startswith(f"--init chexnet: {url} could not be fetched (Not Found)")
    assert f"curl -L -o {place.name} {url}" in str(error.value)
    assert str(error.value).endswith(f"put it at {place}")
    place.write_bytes(DATA)
    assert download(url, "--init chexnet") == place


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://h/w.pt", "https://h/w.pt#sha256=x", "http://[::1"),
        *("http://h:99999/w.pt", "http://h:x/w.pt", "http:///w.pt", "http://a..b/w.pt", "http://"),
    ],
)
def test_other_urls_are_refused(url):
    """Only http and https, and a fragment that is a hash."""
    with pytest.raises(CxrdistError, match=r"expected http\(s\)"):
        download(url, "--init x")


@pytest.mark.parametrize("drips", ["body", "headers"])
def test_a_server_that_brings_next_to_nothing_ends(web, monkeypatch, drips):
    """A byte comes before each timeout, and yet there is an end: the mean rate has a limit."""
    web.files["/w.pt"], web.drips = DATA, drips
    monkeypatch.setattr(cxrdist.model.download, "SLOW_SECONDS", 0.3)
    with pytest.raises(CxrdistError, match="could not be fetched"):
        download(f"{web.url}/w.pt", "--init x")


@pytest.mark.parametrize("length", ["abc", "-1", "1e3", "9" * 30])
def test_a_length_that_is_none_is_named(web, length):
    """One line, as for any other server that cannot be understood."""
    web.files["/w.pt"], web.length = DATA, length
    with pytest.raises(CxrdistError, match=f"could not be fetched .*{length[:20]}"):
        download(f"{web.url}/w.pt", "--init x")


def test_a_name_of_any_length_is_a_file(web, home):
    """What is too long for a file system is cut; the digits of its hash, at the end, stay."""
    name = f"/{'x' * 300}-{DIGEST[:8]}.pth"
    web.files[name] = DATA
    kept = download(web.url + name, "--init x")
    assert kept.name.endswith(f"x-{DIGEST[:8]}.pth")
    web.files[name] = checkpoint(2.0)
    kept.unlink()
    with pytest.raises(CxrdistError, match=f"expected {DIGEST[:8]}"):
        download(web.url + name, "--init x")


def test_a_cache_that_cannot_be_written_names_the_variable(web, home, monkeypatch):
    """A home that does not exist: set TORCH_HOME."""
    monkeypatch.setenv("TORCH_HOME", "/proc/none")
    with pytest.raises(CxrdistError, match="set TORCH_HOME"):
        download(f"{web.url}/w.pt", "--init x")


def test_notes_and_locks_of_anybody_are_judged(web, home, tmp_path):
    """A note that is no hash is named, and a lock is no way to write elsewhere."""
    web.files["/w.pt"] = DATA
    kept = download(f"{web.url}/w.pt", "--init x")
    for note in (b"", b"\xff", b"zz"):
        kept.with_name(f"{kept.name}.sha256").write_bytes(note)
        with pytest.raises(CxrdistError, match="is not a sha256"):
            download(f"{web.url}/w.pt", "--init x")
    (tmp_path / "thesis").write_text("years")
    lock = kept.with_name(f".{kept.name}.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "thesis")
    with pytest.raises(CxrdistError, match="is a link"):
        download(f"{web.url}/w.pt", "--init x")
    assert (tmp_path / "thesis").read_text() == "years"


def test_processes_of_two_nodes_fetch_it_once(web, home):
    """One waits while the other fetches into a cache that they share."""
    web.files["/w.pt"] = DATA
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        kept = pool.starmap(download, [(f"{web.url}/w.pt", "--init x")] * 3)
    assert len(set(kept)) == 1
    assert len(web.asked) == 1
