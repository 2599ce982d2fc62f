"""Hugging Face folders: config.json and safetensors in, merged models out.

Only safetensors are read: a pickle can run code when it is opened. A file's header is compared with the
file's size, and all names, shapes and dtypes with what the model needs, before the first weight is used. What
is written appears under its name only when it is complete.

Source: the safetensors format, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import struct
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill_jax.models.adapter import merge_adapter
from distill_jax.models.assembly import assemble_params
from distill_jax.models.decoder import Decoder, Params, abstract_params
from distill_jax.models.weights import Weight, check_stored, get_at, nest_at, weights_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_FLOATS = ("F64", "F32", "F16", "BF16")
_ITEM_BYTES = dict(F64=8, I64=8, U64=8, F32=4, I32=4, U32=4, F16=2, BF16=2, I16=2, U16=2, I8=1, U8=1, BOOL=1)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Parts of a model of images and text that the text model does not use, and a buffer that old Llama files
# carry.
_IGNORED = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; expected a Hugging Face model folder")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header. dtype: as the format spells it, "F32" for instance."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The entries of a safetensors file by name, after comparing what the header claims with the file's size.

    Raises:
      ValueError: truncated file, impossible header, or ranges that do not fit their shapes; names file and sizes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and claims "
                f"a header of {header_size}"
            )
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            }
            ranges = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged: its header is not a safetensors header ({error!r})"
            ) from None
    available = size - 8 - header_size
    claimed = max((end for _, end in ranges.values()), default=0)
    if claimed != available:
        raise ValueError(
            f"{path} is {'truncated' if claimed > available else 'damaged'}: its header describes {claimed} "
            f"bytes of weights, the file holds {available}; fetch it again"
        )
    previous_end = 0
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        tensor = tensors[name]
        needed = math.prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0)
        if begin != previous_end or (tensor.dtype in _ITEM_BYTES and end - begin != needed):
            raise ValueError(
                f"{path} is damaged: {name} of shape {tensor.shape} and dtype {tensor.dtype} needs {needed} bytes "
                f"from {previous_end} on, its range is {begin}..{end}"
            )
        previous_end = end
    return tensors


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a folder with one safetensors file, or with an index and its shards, by name.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: only pickled weights; a damaged file; an index that disagrees with its shards.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has pickled weights only ({', '.join(pickles[:3])}); a pickle can run code when "
                "it is opened. Convert them in a place you trust: AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map'")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} points outside its folder: {outside}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names shards that are not in the folder: {', '.join(missing)}")
    shards = {name: read_header(folder / name) for name in names}
    absent = [key for key, name in weight_map.items() if key not in shards[name]]
    if absent:
        raise ValueError(
            f"{index} disagrees with its shards: {absent[0]!r} is not in {weight_map[absent[0]]}"
        )
    return {key: shards[name][key] for key, name in weight_map.items()}


def text_name(name: str) -> str | None:
    """A stored name as a text-only model would have it; None for what a text model does not use."""
    if _IGNORED.search(name):
        return None
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """One tensor of a folder's weights as it is stored.

    Raises:
      FileNotFoundError, ValueError: see `stored_tensors`; no such tensor.
    """
    tensors = stored_tensors(folder)
    if name not in tensors:
        raise ValueError(f"{folder}: the weights hold no {name!r}")
    with safe_open(tensors[name].file, framework="np") as file:
        return file.get_tensor(name)


def read_hf_params(
    folder: Path, module: Decoder, beside: Collection[str] = (), weights: str = "full"
) -> Params:
    """The parameter tree of a folder's weights, in the module's `param_dtype` and, if it has a mesh, on it.

    Shard by shard, one tensor at a time: beyond what lies on the devices the host never holds more than one shard (as
    pages of the file, which the system may drop) and one layer.

    Args:
      folder: with one safetensors file, or an index and its shards.
      module: the decoder.
      beside: names that may stand in the files though the decoder has no such weight.
      weights: "full", or "int8" for the layers' kernels in 8 bits.

    Raises:
      FileNotFoundError, ValueError: see `stored_tensors`; missing, unexpected or wrongly shaped weights, or a dtype
        that holds no plain numbers (quantised weights).
    """
    tensors = stored_tensors(folder)
    original: dict[str, str] = {}
    for stored in tensors:
        name = text_name(stored)
        if name in original:
            raise ValueError(f"{folder}: {stored!r} and {original[name]!r} are the same weight, {name!r}")
        if name is not None:
            original[name] = stored
    quantised = [stored for stored in original.values() if tensors[stored].dtype not in _FLOATS]
    if quantised:
        raise ValueError(
            f"{folder}: {quantised[0]} has dtype {tensors[quantised[0]].dtype}, expected one of {_FLOATS}; "
            "quantised weights are read from GGUF files only"
        )
    tied = module.spec.tie_embeddings
    found = {name: tensors[stored].shape for name, stored in original.items()}

    def allowed(name: str) -> bool:
        return name in beside or (tied and name == _HEAD)

    check_stored(module, found, str(folder), lambda weight: weight.hf, allowed)
    if tied and _HEAD in original:
        _check_tied(folder, tensors[original[_HEAD]].file, tensors[original[_EMBEDDING]].file, original)
    return assemble_params(module, _stored_layers(module, tensors, original), weights)


def _stored_layers(
    module: Decoder, tensors: dict[str, StoredTensor], original: dict[str, str]
) -> Iterator[tuple[Weight, int, np.ndarray]]:
    """What the decoder needs, in the order of the files, one of which is open at a time."""
    in_file: dict[Path, list[tuple[str, Weight, int]]] = {}
    for weight in weights_of(module.spec):
        for index in range(module.spec.n_layers if weight.is_stacked else 1):
            name = original[weight.hf.format(index)]
            in_file.setdefault(tensors[name].file, []).append((name, weight, index))
    for file in sorted(in_file):
        with safe_open(file, framework="np") as handle:
            for name, weight, index in in_file[file]:
                yield weight, index, handle.get_tensor(name)


def _check_tied(folder: Path, head_file: Path, embedding_file: Path, original: dict[str, str]) -> None:
    """Raises ValueError when a head that is said to be the embedding differs from it; some rows at a time."""
    with safe_open(head_file, framework="np") as one, safe_open(embedding_file, framework="np") as other:
        head, embedding = one.get_slice(original[_HEAD]), other.get_slice(original[_EMBEDDING])
        size = head.get_shape()[0]
        for start in range(0, size, _COMPARED_ROWS):
            rows = slice(start, min(start + _COMPARED_ROWS, size))
            if not np.array_equal(head[rows], embedding[rows]):
                raise ValueError(
                    f"{folder}: config.json says that the head is the embedding (tie_word_embeddings), but {_HEAD} "
                    "differs from it; set tie_word_embeddings to false to use it"
                )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed otherwise.

    Raises:
      FileExistsError: `target` is there already and is not an empty folder.
      OSError: what was to be written could not be, for want of space for example.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"could not save {target}: {error}; nothing was left there") from error
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes contiguous arrays; transformers wants the "format" entry. Readable by whoever may read the folder."""
    save_file(tensors, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes its files private


def write_hf_params(
    folder: Path, module: Decoder, params: Params, adapter: Params | None, scale: float, max_shard_bytes: int
) -> None:
    """Writes merged weights as model.safetensors, or as shards of at most `max_shard_bytes` and their index.

    One stacked parameter at a time is merged (kernel + scale * A B) and brought to the host.
    """
    shapes = abstract_params(module)
    plan: list[list[tuple[Weight, int]]] = [[]]
    used = total = 0
    for weight in weights_of(module.spec):
        leaf = get_at(shapes, weight.path)
        size = (
            math.prod(weight.layer_shape(leaf.shape)) * np.dtype(get_at(params, weight.path).dtype).itemsize
        )
        for index in range(module.spec.n_layers if weight.is_stacked else 1):
            if plan[-1] and used + size > max_shard_bytes:
                plan.append([])
                used = 0
            plan[-1].append((weight, index))
            used, total = used + size, total + size
    weight_map: dict[str, str] = {}
    current: tuple[Weight | None, np.ndarray] = (None, np.empty(0))
    for number, shard in enumerate(plan, 1):
        name = WEIGHTS if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for weight, index in shard:
            if current[0] != weight:
                current = (weight, _merged(params, adapter, scale, weight))
            layer = current[1][index] if weight.is_stacked else current[1]
            tensors[weight.hf.format(index)] = weight.to_stored(layer)
        save_tensors(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(plan) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _merged(params: Params, adapter: Params | None, scale: float, weight: Weight) -> np.ndarray:
    value = get_at(params, weight.path)
    module_path = weight.path[:-1]
    low = find_adapted(adapter, module_path)
    if low is not None and weight.path[-1] == "kernel":
        merged = merge_adapter(nest_at(weight.path, value), nest_at(module_path, low), scale)
        value = get_at(merged, weight.path)
    return np.asarray(jax.device_get(value))


def find_adapted(adapter: Params | None, path: tuple[str, ...]) -> Params | None:
    """The node of an adapter tree for a module; None where the adapter leaves that module alone."""
    for name in path:
        adapter = None if adapter is None else adapter.get(name)
    return adapter
