"""The stored teacher: its numbers against full logits, batches and chunks, the file, and what a file is refused for."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, apply, init_params, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.sequences import pack_sequences
from distill_jax.students.targets import LOG_ZERO, Teacher, load_targets, make_targets, save_targets

SPEC = ModelSpec("llama", vocab_size=20, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16)
MODULE = Decoder(SPEC)
HASH = "c" * 64


@functools.cache
def teacher():
    adapter = init_adapter(MODULE, AdapterConfig(2, 4.0), jax.random.key(1))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    return Teacher(MODULE, init_params(MODULE, jax.random.key(0)), adapter, 0.5, HASH)


def make_rows(seed=0, pad_id=0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 20, n).tolist() for n in (1, 3, 2, 3, 1)]
    completions = [rng.integers(0, 20, n).tolist() for n in (4, 0, 2, 4, 3)]
    return dataclasses.replace(pack_sequences(prompts, completions, 3, 4, pad_id), vocabulary_hash=HASH)


@functools.cache
def made():
    return make_targets(teacher(), make_rows(), 3, temperature=2.0, batch_size=2, chunk=3)


def logits_of(row, place):
    """Float64 logits that predict completion token `place` of a row, from the row alone without padding."""
    rows = make_rows()
    length, start = int(rows.prompt_length[row]), rows.prompt_size
    ids = np.concatenate([rows.tokens[row, :length], rows.tokens[row, start : start + place]])[None, :]
    positions = np.arange(ids.shape[1], dtype=np.int32)[None, :]
    given = teacher()
    low_rank = {"adapter": given.adapter, "scale": given.scale}
    hidden, _ = apply(MODULE, given.params, ids, positions, np.ones(ids.shape, bool), **low_rank)
    return np.asarray(unembed(MODULE, given.params, hidden, **low_rank)[0, -1], np.float64)


def test_numbers_are_those_of_the_full_logits():
    targets = made()
    assert targets.ids.shape == targets.lp.shape == (5, 4, 3) and targets.vocab_size == 20
    for row, place in [(0, 0), (0, 3), (2, 1), (4, 2)]:
        logits = logits_of(row, place) / 2
        normaliser = np.log(np.exp(logits).sum())
        order = np.argsort(-logits)
        assert targets.ids[row, place].tolist() == order[:3].tolist()
        np.testing.assert_allclose(
            targets.lp[row, place], logits[order[:3]] - normaliser, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(targets.logsumexp[row, place], normaliser, rtol=1e-4)
        rest = np.log(np.exp(logits[order[3:]]).sum()) - normaliser
        np.testing.assert_allclose(targets.tail_lp[row, place], rest, rtol=1e-4)


def test_batches_and_chunks_change_nothing():
    whole = make_targets(teacher(), make_rows(), 3, temperature=2.0)
    mask = np.asarray(make_rows().completion_mask)
    for name in ("ids", "lp", "tail_lp", "logsumexp"):
        one, other = (np.asarray(getattr(targets, name))[mask] for targets in (whole, made()))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_whole_vocabulary_leaves_no_tail():
    targets = make_targets(teacher(), make_rows(), 20)
    assert (targets.tail_lp < LOG_ZERO + 10).all()
    mask = np.asarray(make_rows().completion_mask)
    np.testing.assert_allclose(np.exp(targets.lp[mask]).sum(-1), 1, rtol=1e-5)


def test_a_file_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "targets.safetensors"
    save_targets(path, made(), make_rows())
    loaded = load_targets(path, make_rows(pad_id=19))  # what lies in padding does not count
    assert jax.tree.structure(loaded) == jax.tree.structure(made())
    jax.tree.map(np.testing.assert_array_equal, loaded, made())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "targets.safetensors"
    save_targets(path, made(), make_rows())
    before = path.read_bytes()

    def fail(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("distill_jax.students.targets.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_targets(path, made(), make_rows())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_of_its_rows_alone(tmp_path):
    path = tmp_path / "targets.safetensors"
    save_targets(path, made(), make_rows())
    turned = jax.tree.map(lambda leaf: leaf[::-1], make_rows())
    with pytest.raises(ValueError, match="other rows, or to the same in another order"):
        load_targets(path, turned)
    with pytest.raises(ValueError, match=r"has \(5, 4\) completion tokens, the sequences \(4, 4\)"):
        load_targets(path, jax.tree.map(lambda leaf: leaf[:4], make_rows()))
    with pytest.raises(ValueError, match=r"the vocabulary dddd.* is cccc.* need the cross-tokenizer losses"):
        load_targets(path, dataclasses.replace(make_rows(), vocabulary_hash="d" * 64))
    with pytest.raises(ValueError, match=r"the vocabulary dddd"):
        save_targets(path, made(), dataclasses.replace(make_rows(), vocabulary_hash="d" * 64))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "targets.safetensors"
    with pytest.raises(FileNotFoundError, match="make them with make_targets"):
        load_targets(path, make_rows())
    save_targets(path, made(), make_rows())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_targets(path, make_rows())
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"holds \['weight'\] in format None"):
        load_targets(path, make_rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "1 <= top_k <= vocab_size <= 20 .* got top_k=0"),
        ({"top_k": 21}, "got top_k=21 and vocab_size=None"),
        ({"top_k": 2, "vocab_size": 21}, "got top_k=2 and vocab_size=21"),
        ({"top_k": 2, "batch_size": 0}, "batch_size=0"),
        ({"top_k": 2, "chunk": 0}, "chunk=0"),
        ({"top_k": 2, "temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        make_targets(teacher(), make_rows(), **options)


def test_a_teacher_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"vocabulary \(none\), the teacher's is cccc"):
        make_targets(teacher(), dataclasses.replace(make_rows(), vocabulary_hash=""), 2)
