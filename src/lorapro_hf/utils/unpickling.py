"""How are pickled files of torch and the engines read without running code in them?"""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_PATHS = "PosixPath PurePosixPath WindowsPath PureWindowsPath"
_IN_METADATA = {  # names by module
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties _MEM_FORMAT_ENCODING "
    "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
# Classes of the objects that DeepSpeed and Trainer pickle beside tensors. An empty class is loaded for each.
_STOOD_FOR = {
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "numpy._core.multiarray": "_reconstruct",
    "numpy.core.multiarray": "_reconstruct",
    "numpy.dtypes": "UInt32DType",
    "numpy": "ndarray dtype",
}


class StandIn:
    """Stands for an object of another library; `given` holds the arguments that it was built from."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Any] = [
    type(name, (StandIn,), {"__module__": module}) for module, names in _STOOD_FOR.items() for name in names.split()
]


def read_tensors(file: Path | IO[bytes]) -> Any:
    """The content of a file of `torch.save`, with a `StandIn` for each object of DeepSpeed and numpy.

    Tensors stay on the disk where the format allows it.

    Raises:
        ValueError: the file is cut off, or holds objects that could run code. No code in the file has been run.
    """
    mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
    try:
        with _stood_for():
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError("it is no file of torch" if name is None else _foreign(name[1])) from error
    except (RuntimeError, EOFError, TypeError, AttributeError, LookupError) as error:
        raise ValueError((str(error).splitlines() or ["it ends too early"])[0]) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch has sought a place before the start of the file
            raise
        raise ValueError("it ends too early") from error


@contextlib.contextmanager
def _stood_for() -> Iterator[None]:
    """Make torch load stand-ins, also for classes that a script has allowed it to load."""
    before: list[Any] = torch.serialization.get_safe_globals()
    named = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}": each for each in before}
    named |= {f"{each.__module__}.{each.__qualname__}": each for each in _STAND_INS}
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(named.values()))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_metadata(file: Path) -> Any:
    """The content of the file `.metadata` of a distributed checkpoint.

    Raises:
        ValueError: the file is cut off, or holds other objects. No code in the file has been run.
    """
    try:
        metadata = _Metadata(io.BytesIO(file.read_bytes())).load()
        if not {"state_dict_metadata", "storage_data", "planner_data"} <= vars(metadata).keys():
            raise ValueError("it is no metadata of a distributed checkpoint")
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, LookupError, ImportError) as error:
        raise ValueError(str(error) or "it ends too early") from error
    return metadata


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _IN_METADATA.get(module, "").split():
            raise pickle.UnpicklingError(_foreign(f"{module}.{name}"))
        return super().find_class(module, name)


def _foreign(name: str) -> str:
    return f"it holds objects that could run code, such as {name}, which no training writes"
