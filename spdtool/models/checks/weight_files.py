"""The files that hold the weights of a checkpoint, and what their headers say: names, types and shapes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from spdtool.errors import ModelError
from spdtool.models.config import reading_hint

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
FLOATS = {"F64", "F32", "F16", "BF16"}
# Wrappers of torch that put their name into the names of weights, wherever they were applied.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARALLEL_PREFIX = "module."  # of DataParallel and DistributedDataParallel


class Header(NamedTuple):
    """What a file says about a weight before its content: where it lies, its type and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_weight_files(source: str | Path) -> tuple[Path, ...]:
    """Find the safetensors files of a folder, or of a hub name that was downloaded.

    Raises:
        ModelError: a folder has none, or lacks a file of its index.
    """
    folder = Path(source)
    if not folder.is_dir():
        cached = _find_cached(str(source), WEIGHTS_FILE)
        cached_index = _find_cached(str(source), INDEX_FILE)
        if cached is not None or cached_index is None:
            return (cached,) if cached else ()
        names = sorted(set(_read_index(cached_index).values()))
        shards = [_find_cached(str(source), name) for name in names]
        return tuple(shard for shard in shards if shard) if all(shards) else ()
    if (folder / WEIGHTS_FILE).is_file():
        return (folder / WEIGHTS_FILE,)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"cannot load the model {str(source)!r}: it has no {WEIGHTS_FILE}", reading_hint(source))
    names = sorted(set(_read_index(index).values()))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{index} names {name}, which is not there", "copy the folder again, with every file")
    return tuple(folder / name for name in names)


def _read_index(index: Path) -> dict[str, str]:
    """Map each weight to the name of its file.

    Raises:
        ModelError: the file is no index.
    """
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is no index of weights", "copy the folder again") from None


def refuse_contradicting_index(headers: Mapping[str, Header]) -> None:
    """Raise ModelError where an index says another file of a weight than that in which it lies, or none."""
    files = {header.file for header in headers.values()}
    index = next(iter(files)).with_name(INDEX_FILE) if files else Path(INDEX_FILE)
    if any(file.name == WEIGHTS_FILE for file in files) or not index.is_file():
        return
    weight_map = _read_index(index)
    for key, header in headers.items():
        name = weight_map.get(key)
        if name != header.file.name:
            problem = f"says that it is in {name}" if name else "does not name it"
            raise ModelError(f"{key} is in {header.file}, and {index.name} {problem}", "copy the folder again, whole")


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Read the name, type and shape of every weight; no content.

    Raises:
        ModelError: a file is only a pointer of git-lfs, or cannot be read; a weight is in two files.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with open(file, "rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{file} is only a pointer of git-lfs", f"in {file.parent}, type: git lfs pull")
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118  # it is no dict
                    if key in headers:  # which of the two a reader takes is left to chance
                        raise ModelError(
                            f"{key} is in {headers[key].file} and in {file}", "copy the folder again, into an empty one"
                        )
                    part = weights.get_slice(key)
                    headers[key] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ModelError(f"the weights in {file} cannot be read: {error}", "copy them again") from None
    return headers


def strip_wrappers(keys: Iterable[str], file: Path) -> dict[str, str]:
    """Map the names of weights that torch's wrappers have changed to the names before.

    `_orig_mod.` (torch.compile), those of FSDP and of checkpointed layers go wherever they stand;
    `module.` goes where every name begins with it.

    Args:
        file: for messages.

    Raises:
        ModelError: two names become one.
    """
    plain = {}
    for key in keys:
        plain[key] = ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)
    while plain and all(name.startswith(PARALLEL_PREFIX) for name in plain.values()):
        plain = {key: name.removeprefix(PARALLEL_PREFIX) for key, name in plain.items()}
    name, count = Counter(plain.values()).most_common(1)[0] if plain else ("", 0)
    if count > 1:
        both = [key for key in plain if plain[key] == name]
        raise ModelError(
            f"{file}: {both[0]} and {both[1]} are both the weight {name}", "save the model once, without a wrapper"
        )
    return {key: name for key, name in plain.items() if key != name}


def read_weight_files(files: Iterable[Path], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Read every weight; `renamed` maps a name in the files to another one."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  # it is no dict
                tensors[renamed.get(key, key)] = weights.get_tensor(key)
    return tensors


def refuse_not_finite(headers: Mapping[str, Header]) -> None:
    """Read weights, and raise ModelError for the first one that holds NaN or infinity."""
    by_file: dict[Path, list[str]] = {}
    for key, header in headers.items():
        if header.dtype in FLOATS:
            by_file.setdefault(header.file, []).append(key)
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as weights:
            for key in keys:
                weight = weights.get_tensor(key)
                finite = torch.isfinite(weight)
                if finite.all():
                    continue
                count = int((~finite).sum())
                first = float(weight[~finite][0])
                raise ModelError(
                    f"{file}: {count:,} of the {weight.numel():,} values of {key} are NaN or infinite, such as {first}",
                    "its training diverged, or half precision overflowed: give an earlier checkpoint",
                )


def _find_cached(source: str, name: str) -> Path | None:
    """Find a file of a hub name that was downloaded; never ask the hub."""
    try:
        path = cached_file(source, name, local_files_only=True)
    except OSError:
        return None
    return Path(path) if path else None
