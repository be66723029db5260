"""Nothing that a checkpoint names is imported or called, in any container."""

import codecs
import ctypes
import functools
import io
import operator
import os
import pickle
import runpy
import struct
import subprocess
import sys
import time
import webbrowser
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cxrdist.errors import CxrdistError
from cxrdist.model.tensorfile import LEGACY_MAGIC, read_tensor_file

WATCHED = ("os.", "subprocess.", "exec", "compile", "import", "ctypes.", "socket.", "webbrowser.")
ALLOWED = ("os.listdir", "os.scandir")
seen: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if seen is not None and (event == "pickle.find_class" or event.startswith(WATCHED)):
        seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)


class Call:
    """Pickles as a call of a function; of a call's result, where the function is a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        raise NotImplementedError


def beside_a_tensor(payload: bytes) -> bytes:
    """A pickle of {"state_dict": {"a": TENSOR}, "extra": PAYLOAD}, with the payload's opcodes."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00K\x01\x85K\x01\x85tR"
    state = b"}" + text("a") + tensor + b"s"
    return b"\x80\x02}(" + text("state_dict") + state + text("extra") + payload + b"u."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def calls(marker: Path) -> dict[str, Call]:
    """Payloads by what they call; each but those of `WITHOUT_MARKER` makes the marker."""
    touch, here = f"touch {marker}", Path(marker)
    evil = marker.with_name("evil.pt")
    with open(evil, "wb") as file:
        torch.save(Call(os.system, touch), file)
    return {
        "posix.system": Call(os.system, touch),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "builtins.open": Call(open, str(marker), "w"),
        "builtins.__import__": Call(__import__, "antigravity"),
        "getattr chain": Call(Call(getattr, here, "touch")),
        "map": Call(list, Call(map, os.system, [touch])),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "functools.partial": Call(functools.partial(os.system, touch)),
        "operator.methodcaller": Call(operator.methodcaller("touch"), here),
        "torch.load": Call(functools.partial(torch.load, str(evil), weights_only=False)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "runpy.run_path": Call(runpy.run_path, str(marker)),
        "codecs.open": Call(codecs.open, str(marker), "w"),
        "ctypes.CDLL": Call(ctypes.CDLL, None),
        "webbrowser.open": Call(webbrowser.open, "http://127.0.0.1:9"),
        "torch._utils": Call(torch._utils._import_dotted_name, "os.system"),
        "rebuild": Call(torch._tensor._rebuild_from_type_v2, os.system, str, (touch,), {}),
    }


PAYLOADS = [
    *("posix.system", "builtins.eval", "builtins.exec", "builtins.open", "builtins.__import__"),
    *("getattr chain", "map", "subprocess.Popen", "functools.partial", "operator.methodcaller"),
    *("torch.load", "pickle.loads", "runpy.run_path", "codecs.open", "ctypes.CDLL"),
    *("webbrowser.open", "torch._utils", "rebuild"),
]
WITHOUT_MARKER = (
    *("builtins.__import__", "runpy.run_path", "ctypes.CDLL", "webbrowser.open", "torch._utils"),
    *("rebuild",),
)


def opcodes(touch: str) -> dict[str, bytes]:
    """Payloads that no pickler writes."""
    command, system = text(touch), b"cos\nsystem\n"
    storage = b"(" + text("storage") + b"%s" + text("0") + text("cpu") + b"K\x01tQ"
    return {
        "os.system": system + b"(" + command + b"tR",
        "INST": b"(" + command + b"ios\nsystem\n",
        "OBJ": b"(" + system + command + b"o",
        "NEWOBJ": system + b"(" + command + b"t\x81" + command + b"b",
        "NEWOBJ_EX": system + b"(" + command + b"t}\x92" + command + b"b",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + command + b"tR",
        "EXT1": b"\x82\x01(" + command + b"tR",
        "BUILD of __setstate__": b"c__main__\nX\n)\x81}(" + text("__setstate__") + system + b"ub",
        "BUILD twice": b"c__main__\nX\n)\x81" + command + b"b",
        "BUILD of a class": b"c__main__\nX\n}(" + text("__reduce__") + system + b"ub",
        "BUILD of an allowed class": b"ccollections\nOrderedDict\n}(" + text("a") + system + b"ub",
        "persistent id, a call": storage % (system + b"(" + command + b"tR"),
        "persistent id, a function": storage % system,
        "persistent id, text": b"Pos.system\n",
        "persistent id, module": b"(" + text("module") + command + b"tQ",
    }


def zipped(file: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", struct.pack("<f", 5))


def legacy(file: Path, pickled: bytes) -> None:
    system = {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}
    before = b"".join(pickle.dumps(x, 2) for x in (LEGACY_MAGIC, 1001, system))
    file.write_bytes(before + pickled + pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 5))


def refused(file: Path, marker: Path) -> str:
    """Read a file that must be refused without running anything; the error line."""
    global seen
    seen = []
    try:
        with pytest.raises(CxrdistError) as error:
            read_tensor_file(file, "--init x")
    finally:
        watched, seen = seen, None
    assert [event for event in watched if not event.startswith(ALLOWED)] == []
    assert not marker.exists()
    return str(error.value)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Read a good file of each container first, so that nothing is left to import."""
    file = tmp_path_factory.mktemp("warm") / "w.pt"
    for new in (True, False):
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=new)
        assert read_tensor_file(file, "").tensors["a"].tolist() == [1, 1]
    for write in (zipped, legacy):
        write(file, beside_a_tensor(b"N"))
        assert read_tensor_file(file, "").tensors["a"].tolist() == [5]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_call_is_refused_and_does_not_run(tmp_path, name, new):
    """Beside good tensors, in both containers; plain pickle would have run it."""
    marker = tmp_path / "marker"
    payload = calls(marker)[name]
    content = {"state_dict": {"a": torch.ones(2)}, "extra": payload}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    assert "contains more than data (it calls " in refused(tmp_path / "w.pt", marker)
    if name not in WITHOUT_MARKER:
        result = pickle.loads(pickle.dumps(payload))
        if isinstance(result, subprocess.Popen):
            result.wait()
        assert marker.exists()


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("name", opcodes(""))
def test_opcodes_that_no_pickler_writes_are_refused(tmp_path, name, write):
    """By hand-made streams: other ways to call, to set methods, and to refer to storages."""
    marker = tmp_path / "marker"
    write(tmp_path / "w.pt", beside_a_tensor(opcodes(f"touch {marker}")[name]))
    assert "--init x: " in refused(tmp_path / "w.pt", marker)


def test_a_tensor_cannot_reach_beyond_its_numbers(tmp_path):
    """Offsets, sizes and strides that lie outside, or blow a number up, are refused."""
    for arguments in (
        (1, (2,), (1,)),
        (0, (3,), (1,)),
        (0, (2,), (9,)),
        (-1, (1,), (1,)),
        (0, (10**9,), (0,)),
        (0, (2, 2), (1,)),
        (0, (True,), (1,)),
    ):
        storage = torch.ones(2)._typed_storage()
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, *arguments, False, {})
        torch.save({"a": tensor}, tmp_path / "w.pt")
        assert "contains a tensor" in refused(tmp_path / "w.pt", tmp_path / "marker")


def test_what_checkpoints_hold_beside_tensors_is_read_past(tmp_path):
    """NumPy's numbers and arrays, sets, devices, paths of classes: none of them is refused."""
    content = {
        "state_dict": {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2).half()},
        "best_loss": np.float64(0.5),
        "curve": np.arange(3),
        "labels": {"a", "b"},
        "device": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        "relu": torch.nn.functional.relu,
        "layer": torch.nn.Linear(2, 2),
    }
    for new in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        tensors = read_tensor_file(tmp_path / "w.pt", "").tensors
        assert all(torch.equal(tensors[k], v) for k, v in content["state_dict"].items())


def test_parameters_and_views_of_pytorch_0_3_are_read(tmp_path):
    """It wrote parameters as objects of their data, and parts of a storage as views of it."""
    out = io.BytesIO()
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("7") + text("cpu") + b"K\x04"
    )
    view = b"(" + text("8") + b"K\x01K\x02ttQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + view + b"K\x00K\x02\x85K\x01\x85tR"
    parameter = b"ctorch.nn.parameter\nParameter\n" + tensor + b"\x85\x81(\x88\x89Ntb"
    pickled = b"\x80\x02}" + text("a") + parameter + b"s."
    system = {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}
    for value in (LEGACY_MAGIC, 1001, system):
        pickle.dump(value, out, 2)
    out.write(pickled)
    pickle.dump(["7"], out, 2)
    out.write(struct.pack("<q4f", 4, 10, 11, 12, 13))
    (tmp_path / "w.pth").write_bytes(out.getvalue())
    assert read_tensor_file(tmp_path / "w.pth", "").tensors["a"].tolist() == [11, 12]


def long_integer(value: int) -> bytes:
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def tensor_of(sizes: bytes, strides: bytes) -> bytes:
    """A tensor of one number with any sizes and strides."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    )
    return b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00" + sizes + strides + b"tR"


# A tuple of two times the tuple before: 60 times, it has 2^60 members and 600 bytes.
NESTED = b")" + b"2\x86" * 60
MANY = 600_000


@pytest.mark.parametrize(
    "size", [b"J\xff\xff\xff\xff", long_integer(2**40 + 1), b"\x88", b"G" + bytes(8), b"N"]
)
def test_numbers_have_a_size(tmp_path, size):
    """It is whole, from 0 to 2^40: not -1, 2^40 + 1, True, 0.0 or None."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("1") + text("cpu")
    zipped(tmp_path / "w.pt", beside_a_tensor(storage + b"K\x05tQ"))
    assert read_tensor_file(tmp_path / "w.pt", "").tensors["a"].tolist() == [5]
    zipped(tmp_path / "w.pt", beside_a_tensor(storage + size + b"tQ"))
    said = refused(tmp_path / "w.pt", tmp_path / "marker")
    assert "it refers to numbers without a size" in said


def test_only_a_parameter_stands_for_its_tensor(tmp_path):
    """An object of any other class that was made of a tensor is not one."""
    tensor, file = tensor_of(b"K\x01\x85", b"K\x01\x85"), tmp_path / "w.pt"
    state = b"\x80\x02}" + text("a") + tensor + b"s" + text("b") + b"c%s\n" + tensor + b"\x85\x81s."
    zipped(file, state % b"torch.nn.parameter\nParameter")
    assert read_tensor_file(file, "").tensors["b"].tolist() == [5]
    zipped(file, state % b"torch\nOther")
    assert "no state dict or network" in refused(file, tmp_path / "marker")


GREEDY = {
    "a nested tuple as a key": b"}" + NESTED + b"Ns",
    "nested tuples as keys": b"}(" + NESTED + b"N" + NESTED + b"Nu",
    "a nested tuple in DICT": b"(" + NESTED + b"Nd",
    "a nested tuple in a set": b"\x8f(" + NESTED + b"\x90",
    "a nested tuple in a frozen set": b"(" + NESTED + b"\x91",
    "a nested tuple in an ordered dictionary": b"ccollections\nOrderedDict\n](]("
    + NESTED
    + b"Nee\x85R",
    "a nested tuple as a storage's key": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + NESTED
    + text("cpu")
    + b"K\x01tQ",
    "a nested tuple as a name of an attribute": b"c__main__\nX\n)\x81}" + NESTED + b"Nsb",
    "many dimensions": tensor_of(
        b"(" + long_integer(2**62) * 100_000 + b"t", b"(" + b"K\x00" * 100_000 + b"t"
    ),
    "huge dimensions": tensor_of(long_integer(2**62) + b"\x85", b"K\x00\x85"),
    "huge numbers of elements": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + long_integer(2**62)
    + b"tQ",
    "many objects": b"](c__main__\nX\nq\x01" + b"h\x01)\x81" * MANY + b"e",
    "many classes": b"](" + b"".join(b"c__main__\nX%d\n" % i for i in range(MANY)) + b"e",
    "many operations": b"](" + b"N" * MANY + b"e",
    "a list copied many times": b"](" + b"N" * 20_000 + b"eq\x01" + b"](" + b"c__builtin__\nset\n"
    b"h\x01\x85R" * 20_000 + b"e",
    "a long name": b"c" + b"x" * 10**6 + b"\nX\n",
    "a long key": b"}" + text("x" * 10**6) + b"Ns",
    "a huge integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a huge byte array": b"\x96" + struct.pack("<Q", 2**40),
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "a huge text": b"\x8d" + struct.pack("<Q", 2**40),
    "a huge frame": b"\x95" + struct.pack("<Q", 2**40),
}


@pytest.mark.parametrize("payload", GREEDY.values(), ids=GREEDY)
def test_a_pickle_cannot_take_all_time_or_memory(tmp_path, payload):
    """Each of these ran for ever or filled the memory, with less than 20 MB of file."""
    zipped(tmp_path / "w.pt", beside_a_tensor(payload))
    begin = time.process_time()
    message = refused(tmp_path / "w.pt", tmp_path / "marker")
    assert message.startswith("--init x: ")
    assert len(message) < 400
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "keys", [NESTED, b"](" + NESTED + b"e", b"](" + text("0") * 2 + b"e", b"K\x05"]
)
def test_the_list_of_keys_of_an_old_file_is_texts(tmp_path, keys):
    """It stands behind the tensors, in a pickle of its own."""
    legacy(tmp_path / "w.pt", beside_a_tensor(b"N"))
    data = (tmp_path / "w.pt").read_bytes()
    place = data.index(pickle.dumps(["0"], 2))
    (tmp_path / "w.pt").write_bytes(data[:place] + b"\x80\x02" + keys + b".")
    assert "list of tensors" in refused(tmp_path / "w.pt", tmp_path / "marker")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_head_of_an_old_file_is_plain(tmp_path, place):
    """Its magic number, version and system are not printed or compared when they are nested."""
    head = [pickle.dumps(x, 2) for x in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    if place:
        head[place] = b"\x80\x02" + NESTED + b"."
    else:
        head[0] = b"\x80\x02" + long_integer(0) + b"."
    (tmp_path / "w.pt").write_bytes(b"".join(head) + pickle.dumps({}, 2) + pickle.dumps([], 2))
    assert "--init x: not a readable checkpoint" in refused(tmp_path / "w.pt", tmp_path / "marker")


def test_the_number_of_a_memo_costs_nothing(tmp_path):
    """It may be any; a list of that length would not fit the memory."""
    zipped(tmp_path / "w.pt", beside_a_tensor(b"Nr\xff\xff\xff\x7f"))
    assert read_tensor_file(tmp_path / "w.pt", "").tensors["a"].tolist() == [5]


def test_a_pipe_is_not_waited_for(tmp_path):
    """A checkpoint is a regular file."""
    os.mkfifo(tmp_path / "w.pt")
    assert "not a regular file" in refused(tmp_path / "w.pt", tmp_path / "marker")


def test_a_zip_of_many_members_is_refused(tmp_path):
    """Its directory is not read: each member would take half a kilobyte of memory."""
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for number in range(100):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            member.comment = bytes(60_000)
            archive.writestr(member, b"")
    message = refused(tmp_path / "w.pt", tmp_path / "marker")
    assert "its directory has more than 4 MiB" in message


def test_numbers_that_many_tensors_share_are_counted(tmp_path):
    """Members that overlap, or a tensor that repeats its numbers, are larger than the file."""
    storage = torch.ones(1000)._typed_storage()
    tensors = {
        f"t{i}": Call(torch._utils._rebuild_tensor_v2, storage, 0, (1000,), (1,), False, {})
        for i in range(500)
    }
    torch.save(tensors, tmp_path / "w.pt")
    assert "larger than the file" in refused(tmp_path / "w.pt", tmp_path / "marker")


@pytest.mark.parametrize("kind", ["contains itself", "shares its parameters"])
def test_the_modules_of_a_network_are_counted(tmp_path, kind):
    """A network that contains itself, or one dictionary many times, ends."""
    network = torch.nn.Sequential(*[torch.nn.Sequential() for _ in range(400)])
    if kind == "contains itself":
        network._modules["0"] = network
    else:
        shared = {f"p{i}": torch.ones(1) for i in range(300)}
        for module in network.modules():
            module._parameters = shared
    torch.save(network, tmp_path / "w.pt")
    assert "its modules contain one another" in refused(tmp_path / "w.pt", tmp_path / "marker")
