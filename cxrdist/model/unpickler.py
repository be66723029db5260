"""An unpickler that imports nothing and runs nothing: names become stubs, tensors stay data.

`torch.save` writes pickles, and a pickle can call any Python function by name. Here each name
becomes a stub class, and calling a stub is allowed only if `MAKERS` has a harmless replacement for
it. A pickled network is thus read as tensors and attributes by name, without its classes.
torch.load(weights_only=True) cannot read pickled networks in the format before PyTorch 1.6, in
which the paper's CheXNet was published.

A pickle is a program, and one of a kilobyte can run forever: nesting pairs of the same tuple 60
times gives 2^60 members to hash. So operations and the members that they copy are counted, and keys
must be plain values.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Storage classes by name, as in torch.FloatStorage and torch.cuda.FloatStorage.
DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


# A pickled DenseNet264 with the state of its optimiser has 229,000 operations in 0.6 MB.
MOST_OPERATIONS = 500_000
MOST_PICKLE_BYTES = 16 << 20
MOST_CLASSES = 1000  # named in a pickle; a network has 50
MOST_NAME_CHARACTERS = 1000
MOST_KEY_CHARACTERS = 4096
MOST_DIMENSIONS = 8  # of a tensor; a convolution has 4
MOST_ELEMENTS = 1 << 40  # of a tensor


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for more than data."""


class StorageRef(NamedTuple):
    """A reference to numbers stored elsewhere in the file under a key.

    The offset is the start of a view of them, in elements.
    """

    dtype: torch.dtype
    key: str
    num_elements: int
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        """Return the size of the numbers in bytes."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRef:
    """A tensor that is not yet read: the position and the order of its numbers."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that the tensor lies within its storage."""
        sized = isinstance(self.size, tuple) and isinstance(self.stride, tuple)
        if not (isinstance(self.storage, StorageRef) and sized):
            raise RefusedError("it contains a tensor without numbers")
        numbers = (self.offset, *self.size, *self.stride)
        bounded = len(self.size) == len(self.stride) <= MOST_DIMENSIONS
        if not bounded or not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in numbers):
            raise RefusedError("it contains a tensor with an invalid shape")
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)
        )
        elements = self.num_elements
        if elements and (last >= self.storage.num_elements or elements > self.storage.num_elements):
            raise RefusedError("it contains a tensor that is larger than its numbers")

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes that old versions of PyTorch store with a tensor."""

    @property
    def num_elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.size)

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return self.num_elements * self.storage.dtype.itemsize

    def read(self, numbers: bytearray) -> Tensor:
        """Copy the tensor out of the bytes of its storage."""
        dtype = self.storage.dtype
        if not self.num_elements:
            return torch.empty(self.size, dtype=dtype)
        flat = torch.frombuffer(numbers, dtype=dtype)
        return flat.as_strided(self.size, self.stride, self.storage.offset + self.offset).clone()


class Mapping(dict[Any, Any]):
    """A dictionary of the file, without attributes."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes, such as a state dict's `_metadata`."""


class _Name(type):
    """The metaclass of stubs; it intercepts calls of a class or function named in the file."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        """Call the harmless replacement in `MAKERS`; raise RefusedError if there is none."""
        maker = MAKERS.get(cls.__name__)
        if maker is None or named:
            raise RefusedError(f"it calls {cls.__name__}")
        return maker(*arguments)


class Stub(metaclass=_Name):
    """An object of the file, with its attributes but without its class."""

    __slots__ = ("attributes",)
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """Create an object without calling anything; for a parameter, return its tensor."""
        if cls.__name__ in PARAMETERS and arguments and isinstance(arguments[0], TensorRef):
            return arguments[0]
        stub = super().__new__(cls)
        stub.attributes = {}
        return stub

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes; ignore tuples, which are states of NumPy or of slots."""
        if isinstance(state, tuple):
            return
        if not isinstance(state, dict):
            raise RefusedError("it sets the state of an object to something other than attributes")
        if special := [name for name in state if str(name).startswith("__")]:
            raise RefusedError(f"it sets {special[0]}")
        self.attributes = state


def _refuse_keys(keys: Iterable[Any]) -> None:
    """Raise RefusedError if a key is nested or long: it could take forever to hash or compare."""
    for key in keys:
        plain = key if isinstance(key, tuple) and len(key) <= MOST_DIMENSIONS else (key,)
        for value in plain:
            if isinstance(value, str | bytes) and len(value) > MOST_KEY_CHARACTERS:
                raise RefusedError("it contains a key that is too long")
            if not isinstance(value, str | bytes | int | float | Stub | _Name | None):
                raise RefusedError("it contains a key that is not a plain value")


def _mapping(pairs: Any = ()) -> Mapping:
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RefusedError("it contains a damaged dictionary")
    _refuse_keys(key for key, _ in pairs)
    return Mapping(pairs)


def _sequence(members: Any = ()) -> Any:
    if not isinstance(members, list | tuple):
        raise RefusedError("it contains a damaged list")
    return members


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    return TensorRef(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise RefusedError("it contains a parameter without numbers")
    return data


def _nothing(*_: Any) -> None:
    """Replace a value that is not a tensor and not needed."""


def _object(*_: Any) -> Stub:
    """Replace an object that is not a tensor and whose state may follow."""
    stub: Stub = Stub.__new__(Stub)
    return stub


PARAMETERS = ("torch.nn.parameter.Parameter", "torch.autograd.variable.Variable")
# Harmless replacements for the functions that checkpoints of torch 0.3 to 2 and NumPy call.
MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **dict.fromkeys(PARAMETERS, _parameter),
    "torch.Size": _sequence,
    "torch.device": _nothing,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: Mapping(),
    # Not sets, because hashing nested members could take forever.
    "builtins.set": _sequence,
    "__builtin__.set": _sequence,
    "_codecs.encode": _nothing,
    "numpy.dtype": _object,
    "numpy.core.multiarray.scalar": _object,
    "numpy._core.multiarray.scalar": _object,
    "numpy.core.multiarray._reconstruct": _object,
    "numpy._core.multiarray._reconstruct": _object,
}


class Pickles(io.BytesIO):
    """The bytes of pickles; reading beyond their end is an error."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read exactly the given number of bytes, or raise EOFError."""
        data = super().read(size)
        if len(data) < (size or 0):
            raise EOFError("truncated")
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a complete line, or raise EOFError."""
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError("truncated")
        return line


class Unpickler(pickle._Unpickler):
    """Reads one pickle of `torch.save`.

    It extends the unpickler in Python, not the one in C, so that operations can be counted and
    unneeded ones rejected.
    """

    stack: list[Any]

    def __init__(self, file: Pickles) -> None:
        # Python 2 text may have any encoding; latin1 decodes every byte, and names are ASCII.
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, StorageRef] = {}
        self._classes: dict[tuple[str, str], type[Stub]] = {}
        self._operations_left = MOST_OPERATIONS

    def count(self, operations: int = 1) -> None:
        """Count operations, or copied members; raise RefusedError if there are too many."""
        self._operations_left -= operations
        if self._operations_left < 0:
            raise RefusedError(f"it takes more than {MOST_OPERATIONS} operations")

    def find_class(self, module: str, name: str) -> type[Stub]:
        """Return a stub, importing nothing; raise RefusedError for long or too many names."""
        if len(module) + len(name) > MOST_NAME_CHARACTERS or len(self._classes) >= MOST_CLASSES:
            raise RefusedError("it names more classes than a network has")
        if (module, name) not in self._classes:
            stub = _Name(f"{module}.{name}", (Stub,), {"__slots__": ()})
            self._classes[module, name] = stub  # type: ignore[assignment]
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return a reference to a storage; in old files also a class stored with its source."""
        kind = pid[0] if isinstance(pid, tuple) and pid else None
        if kind == "module" and len(pid) > 1 and isinstance(pid[1], _Name):
            return pid[1]
        if kind != "storage" or len(pid) not in (5, 6) or not isinstance(pid[1], _Name):
            raise RefusedError("it refers to something that is not a tensor")
        _, kind_of_storage, key, _, num_elements, *view = pid
        module, _, name = kind_of_storage.__name__.rpartition(".")
        dtype = DTYPES.get(name.removesuffix("Storage"))
        if module not in ("torch", "torch.cuda") or not name.endswith("Storage") or dtype is None:
            raise RefusedError(f"it contains numbers of an unknown kind, {module}.{name}")
        if not isinstance(key, str) or len(key) > MOST_NAME_CHARACTERS:
            raise RefusedError("it refers to numbers without a name")
        if type(num_elements) is not int or not 0 <= num_elements <= MOST_ELEMENTS:
            raise RefusedError("it refers to numbers without a size")
        whole = StorageRef(dtype, key, num_elements)
        if self.storages.setdefault(key, whole) != whole:
            raise RefusedError("it reads the same numbers in two ways")
        return whole if not view or view[0] is None else _view(whole, view[0])

    def load_reduce(self) -> None:
        """Call a stub, which calls its harmless replacement."""
        stub, arguments = self._call()
        self.stack[-1] = stub(*arguments)

    def load_newobj(self) -> None:
        """Create an object of a stub class."""
        stub, arguments = self._call()
        self.stack[-1] = stub.__new__(stub, *arguments)

    def _call(self) -> tuple[type[Stub], tuple[Any, ...]]:
        """Pop the arguments of a call; the callee stays on the stack, to be replaced."""
        arguments = self.stack.pop()
        if not isinstance(self.stack[-1], _Name) or not isinstance(arguments, tuple):
            raise RefusedError("it calls something that has no name")
        self.count(sum(len(a) for a in (arguments, *arguments) if isinstance(a, tuple | list)))
        return self.stack[-1], arguments  # type: ignore[return-value]

    def load_build(self) -> None:
        """Set the attributes of an object."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Stub | Mapping | TensorRef):
            raise RefusedError("it sets the state of an object to something other than attributes")
        if isinstance(state, dict):
            self.count(len(state))
        self.stack[-1].__setstate__(state)


def _refuse(_: Any) -> None:
    """Reject an operation that runs code or reserves memory that data does not need."""
    raise RefusedError("it uses an operation that no checkpoint needs")


_Operation = Callable[[Any], None]
_KEYS: dict[bytes, Callable[[list[Any]], list[Any]]] = {
    pickle.SETITEM: lambda stack: stack[-2:-1],
    pickle.SETITEMS: lambda stack: stack[::2],
    pickle.DICT: lambda stack: stack[::2],
    pickle.ADDITEMS: lambda stack: stack,
    pickle.FROZENSET: lambda stack: stack,
}


def _counted(code: bytes, operation: _Operation) -> _Operation:
    """Return an operation that first counts itself and checks its keys."""
    keys = _KEYS.get(code)

    def run(unpickler: Unpickler) -> None:
        unpickler.count()
        if keys:
            _refuse_keys(keys(unpickler.stack))
        operation(unpickler)

    return run


Unpickler.dispatch = {
    **{code: _counted(bytes([code]), run) for code, run in pickle._Unpickler.dispatch.items()},
    pickle.REDUCE[0]: _counted(pickle.REDUCE, Unpickler.load_reduce),
    pickle.NEWOBJ[0]: _counted(pickle.NEWOBJ, Unpickler.load_newobj),
    pickle.BUILD[0]: _counted(pickle.BUILD, Unpickler.load_build),
    **dict.fromkeys(
        (
            *(pickle.INST[0], pickle.OBJ[0], pickle.NEWOBJ_EX[0], pickle.LONG4[0]),
            *(pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0], pickle.BYTEARRAY8[0]),
            *(pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0]),
        ),
        _refuse,
    ),
}


def _view(whole: StorageRef, view: Any) -> StorageRef:
    """Return a view of a storage, which files before PyTorch 0.4 describe by key, offset, size."""
    _, offset, size = view
    if not all(type(n) is int and n >= 0 for n in (offset, size)):
        raise RefusedError("it contains a view with an invalid shape")
    if offset + size > whole.num_elements:
        raise RefusedError("it contains a view that is larger than its numbers")
    return StorageRef(whole.dtype, whole.key, size, offset)


def unpickle(file: Pickles) -> tuple[Any, dict[str, StorageRef]]:
    """Read one pickle, and leave the file at its end.

    Returns:
        The content: numbers, texts, lists, tuples and dictionaries, with a `TensorRef` for each
        tensor and a `Stub` for each object; and the storages that it refers to, by key.

    Raises:
        RefusedError: the pickle contains more than data.
        pickle.UnpicklingError: the pickle is damaged.
    """
    unpickler = Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except pickle.UnpicklingError:
        raise
    # A pickle is a program for a stack machine: a damaged one can raise any exception.
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error!s:.200}") from error
