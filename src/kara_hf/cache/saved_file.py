"""The file of a saved cache: safetensors, with everything that is no tensor as JSON in its header.

The header's metadata has three entries: `format`; `cache`, the JSON, in which a tensor is named where it belongs; and
`sha256`, of the whole file with this digest as zeros. Nothing in it is code, and nothing of it is run.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..storage import Saved

FORMAT = "1"
DEVICE = torch.device("meta")  # stands for the device of the layer that something is loaded for
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_MARK, _UNKNOWN = b'"sha256":"', "0" * 64


def write_saved(path: Path, saved: Saved) -> None:
    """Writes to `path`; what was there stays whole until all is written.

    Raises:
        TypeError: something in `saved` is neither a tensor nor plain.
        OSError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = json.dumps(_packed(saved, "cache", tensors), allow_nan=False)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    os.close(descriptor)
    fresh = Path(name)
    try:
        save_file(tensors, fresh, {"format": FORMAT, "cache": content, "sha256": _UNKNOWN})
        with fresh.open("r+b") as file:
            place, _, digest = _digest(file)
            file.seek(place)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o666 & ~umask)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_saved(path: Path) -> Saved:
    """What `write_saved` wrote, with tensors that are mapped to the file and must not be written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no saved cache, is of another format, was truncated or was changed.
    """
    with path.open("rb") as file:
        try:
            about = json.loads(_header(file))["__metadata__"]
            found, content = about["format"], about["cache"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no cache that was saved by kara_hf, or it is truncated") from None
        if found != FORMAT:
            raise ValueError(
                f"{path} has format {found!r}, and this version of kara_hf reads {FORMAT!r}; use the version that "
                "saved it, or let the model read the tokens anew"
            )
        _, written, digest = _digest(file)
        if written != digest:
            raise ValueError(f"{path} is damaged: it is truncated, or was changed since it was saved")
    try:
        with safe_open(path, "pt") as tensors:
            return _unpacked(json.loads(content), tensors.get_tensor)
    except (KeyError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _header(file: Any) -> bytes:
    """The JSON in front of the tensors; less than all of it where the file is too short."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    return file.read(min(size, os.fstat(file.fileno()).st_size))


def _digest(file: Any) -> tuple[int, str, str]:
    """Where the file names its digest, the one that it names, and that which it has. Raises ValueError."""
    header = _header(file)
    place = header.find(_MARK) + len(_MARK)
    if place < len(_MARK) or len(header) < place + len(_UNKNOWN):
        raise ValueError(f"{file.name} is damaged: it names no digest")
    stop = place + len(_UNKNOWN)
    total = hashlib.sha256(len(header).to_bytes(8, "little"))
    total.update(header[:place] + _UNKNOWN.encode() + header[stop:])
    while part := file.read(1 << 24):
        total.update(part)
    return 8 + place, header[place:stop].decode(errors="replace"), total.hexdigest()


def _packed(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON has it; the tensors in it are put into `tensors`, in the order of their memory."""
    if isinstance(value, torch.Tensor):
        steps = value.stride() if not value.is_contiguous() else ()
        order = sorted(range(value.ndim), key=lambda dim: -steps[dim] if steps else dim)
        tensors[name] = value.detach().permute(order).cpu().contiguous()
        return {"tensor": name, "order": order}
    if isinstance(value, np.ndarray):
        return _packed(torch.from_numpy(np.ascontiguousarray(value)), name, tensors)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # that of the layer, wherever it is loaded
    if isinstance(value, dict):
        return {"items": [[key, _packed(part, f"{name}.{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _unpacked(packed: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """What `_packed` was given, with lists for tuples, tensors for arrays, and `DEVICE` for every device."""
    if isinstance(packed, list):
        return [_unpacked(part, tensor) for part in packed]
    if not isinstance(packed, dict):
        return packed
    if "items" in packed:
        return {key: _unpacked(part, tensor) for key, part in packed["items"]}
    if "dtype" in packed:
        return _DTYPES[packed["dtype"]]
    if "device" in packed:
        return DEVICE
    return tensor(packed["tensor"]).permute(np.argsort(packed["order"]).tolist())
