"""A reader of pickles that imports nothing and runs nothing: names become stubs, tensors stay data.

`torch.save` writes pickles, and a pickle may name any function of Python and have it called. Here
each name becomes a stub class, whatever it says; a stub can be called only if `MAKERS` has an
inert stand-in for it. So a pickled network is read as what it is, tensors and attributes by name,
without the classes that it was made of.
"""

import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

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


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for more than data."""


class StorageRef(NamedTuple):
    """Names numbers that stand elsewhere in the file.

    Attributes:
        dtype: of the numbers.
        key: their name in the file.
        num_elements: how many there are.
        offset: where a view of them begins, in elements.
    """

    dtype: torch.dtype
    key: str
    num_elements: int
    offset: int = 0


@dataclass(frozen=True)
class TensorRef:
    """A tensor that is not read yet: where its numbers are, and in which order."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Make sure that it lies within its storage."""
        sized = isinstance(self.size, tuple) and isinstance(self.stride, tuple)
        if not (isinstance(self.storage, StorageRef) and sized):
            raise RefusedError("it holds a tensor without numbers")
        numbers = (self.offset, *self.size, *self.stride)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(self.size) != len(
            self.stride
        ):
            raise RefusedError("it holds a tensor with a shape that is none")
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)
        )
        elements = self.num_elements
        if elements and (last >= self.storage.num_elements or elements > self.storage.num_elements):
            raise RefusedError("it holds a tensor that is larger than its numbers")

    def __setstate__(self, state: Any) -> None:
        """Ignore what old versions of PyTorch keep beside the numbers."""

    @property
    def num_elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.size)

    @property
    def num_bytes(self) -> int:
        """How much memory it needs."""
        return self.num_elements * self.storage.dtype.itemsize

    def read(self, numbers: bytearray) -> Tensor:
        """Copy the tensor out of the bytes of its storage."""
        dtype = self.storage.dtype
        if not self.num_elements:
            return torch.empty(self.size, dtype=dtype)
        flat = torch.frombuffer(numbers, dtype=dtype)
        return flat.as_strided(self.size, self.stride, self.storage.offset + self.offset).clone()


class Mapping(dict[Any, Any]):
    """A dictionary of the file, without the attributes that it may have had."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes, such as a state dict's `_metadata`."""


class _Name(type):
    """The kind of every stub class: calling it is calling something by name."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        """Give the inert stand-in.

        Raises:
            RefusedError: there is none.
        """
        maker = MAKERS.get(cls.__name__)
        if maker is None or named:
            raise RefusedError(f"it calls {cls.__name__}")
        return maker(*arguments)


class Stub(metaclass=_Name):
    """An object of the file: its attributes, without its class."""

    __slots__ = ("attributes",)
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """Make an object without calling anything; a parameter is its tensor."""
        if cls.__name__ in PARAMETERS and arguments and isinstance(arguments[0], TensorRef):
            return arguments[0]
        stub = super().__new__(cls)
        stub.attributes = {}
        return stub

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes; NumPy's states and those of slots, tuples, are not read.

        Raises:
            RefusedError: it is something else, or names a method of Python's own.
        """
        if isinstance(state, tuple):
            return
        if not isinstance(state, dict):
            raise RefusedError("it hands an object something to run on")
        if special := [name for name in state if str(name).startswith("__")]:
            raise RefusedError(f"it sets {special[0]}")
        self.attributes = state


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    return TensorRef(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise RefusedError("it holds a parameter without numbers")
    return data


def _nothing(*_: Any) -> None:
    """Stand for a value that is no tensor and that nothing here needs."""


def _object(*_: Any) -> Stub:
    """Stand for an object that is no tensor and whose state may follow."""
    stub: Stub = Stub.__new__(Stub)
    return stub


PARAMETERS = ("torch.nn.parameter.Parameter", "torch.autograd.variable.Variable")
# What checkpoints call to hold data, as torch 0.3 to 2 and NumPy write them.
MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **dict.fromkeys(PARAMETERS, _parameter),
    "torch.Size": lambda size=(): tuple(size),
    "torch.device": _nothing,
    "collections.OrderedDict": lambda pairs=(): Mapping(pairs),
    "collections.defaultdict": lambda *_: Mapping(),
    "builtins.set": lambda members=(): list(members),
    "__builtin__.set": lambda members=(): list(members),
    "_codecs.encode": _nothing,
    "numpy.dtype": _object,
    "numpy.core.multiarray.scalar": _object,
    "numpy._core.multiarray.scalar": _object,
    "numpy.core.multiarray._reconstruct": _object,
    "numpy._core.multiarray._reconstruct": _object,
}


class Unpickler(pickle.Unpickler):
    """Reads one pickle of `torch.save`."""

    def __init__(self, file: BinaryIO) -> None:
        # Text of Python 2 may be anything; latin1 takes every byte, and names are ASCII.
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> type[Stub]:
        """Give a stub of that name; nothing is imported."""
        return _Name(f"{module}.{name}", (Stub,), {"__slots__": ()})  # type: ignore[return-value]

    def persistent_load(self, pid: Any) -> Any:
        """Name a storage, or in old files give the class that stands beside its source.

        Raises:
            RefusedError: it is neither.
        """
        kind = pid[0] if isinstance(pid, tuple) and pid else None
        if kind == "module" and len(pid) > 1 and isinstance(pid[1], _Name):
            return pid[1]
        if kind != "storage" or len(pid) not in (5, 6) or not isinstance(pid[1], _Name):
            raise RefusedError("it refers to something that is no tensor")
        _, kind_of_storage, key, _, num_elements, *view = pid
        module, _, name = kind_of_storage.__name__.rpartition(".")
        dtype = DTYPES.get(name.removesuffix("Storage"))
        if module not in ("torch", "torch.cuda") or not name.endswith("Storage") or dtype is None:
            raise RefusedError(f"it holds numbers of an unknown kind, {module}.{name}")
        if not isinstance(key, str) or type(num_elements) is not int or num_elements < 0:
            raise RefusedError("it refers to numbers without a name")
        whole = StorageRef(dtype, key, num_elements)
        if self.storages.setdefault(key, whole) != whole:
            raise RefusedError("it reads the same numbers in two ways")
        return whole if not view or view[0] is None else _view(whole, view[0])


def _view(whole: StorageRef, view: Any) -> StorageRef:
    """Part of a storage, as files before PyTorch 0.4 have it: key, offset, elements."""
    _, offset, size = view
    if not all(type(n) is int and n >= 0 for n in (offset, size)):
        raise RefusedError("it holds a view with a shape that is none")
    if offset + size > whole.num_elements:
        raise RefusedError("it holds a view that is larger than its numbers")
    return StorageRef(whole.dtype, whole.key, size, offset)


def unpickle(file: BinaryIO) -> tuple[Any, dict[str, StorageRef]]:
    """Read one pickle; the file then stands behind it.

    Returns:
        Numbers, texts, lists, tuples and dictionaries; `TensorRef` for each tensor, `Stub` for each
        object. And the storages that they refer to, by key.

    Raises:
        RefusedError: it asks for more than data.
        pickle.UnpicklingError: it is damaged.
    """
    begin = file.tell()
    _refuse_large_memo(file)
    file.seek(begin)
    unpickler = Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except pickle.UnpicklingError:
        raise
    except RecursionError:
        raise RefusedError("it is nested too deep") from None
    # A pickle is a program for a stack machine: a damaged one can fail in any way of Python's.
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _refuse_large_memo(file: BinaryIO) -> None:
    """Make sure that the pickle cannot fill the memory: its memo is a list as long as it says."""
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
                raise RefusedError("it wants more memory than it can fill")
    except (ValueError, AttributeError, UnicodeError) as error:
        raise pickle.UnpicklingError(str(error)) from error
