"""Hugging Face folders in and out: transformers' logits, bit-exact saving, adapters, and every kind of damaged file."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill_jax.mesh import ShardingError
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model, load_model, save_model
from distill_jax.models.spec import RopeScaling
from distill_jax.text.token_ids import TokenIds
from distill_jax.text.tokenizers import Tokenizer
from tests.models.small_models import FAMILIES, GOLDENS, answers, edit_config, stored_weights

TOLERANCE = 1e-5


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def respec(model: Model, **changes) -> Model:
    """The same weights under another spec."""
    spec = dataclasses.replace(model.spec, **changes)
    return dataclasses.replace(model, spec=spec, module=Decoder(spec))


def random_adapter(model: Model, config: AdapterConfig):
    adapter = init_adapter(model.module, config, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten(noise)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the small Llama, to be damaged."""
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_continuation_are_those_of_transformers(name):
    model, golden = load_model(GOLDENS / name), answers(name)
    assert difference(model.logits(golden["tokens"]), golden["logits"]) < TOLERANCE
    length, steps = len(golden["prompt"]), len(golden["continuation"])
    row = np.zeros((1, length + steps), np.int32)
    row[0, :length] = golden["prompt"]
    for position in range(length, length + steps):
        row[0, position] = model.logits(row, lengths=[position])[0, position - 1].argmax()
    assert row[0, length:].tolist() == golden["continuation"].tolist()


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", {"norm_eps": 1e-2}),
        ("llama", {"rope_theta": 20000.0}),
        ("llama3", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": RopeScaling("linear", 8.0)}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 6}),
        ("qwen3", {"rope_theta": 20000.0}),
        ("gemma2", {"attn_logit_softcap": None}),
        ("gemma2", {"final_logit_softcap": None}),
        ("gemma2", {"query_scale": None}),
        ("gemma2", {"layer_is_local": (False, True, False)}),
        ("gemma2", {"embed_scale": False}),
        ("gemma2", {"activation": "silu"}),
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma3_text", {"rope_theta_local": None}),
        ("gemma3_text", {"rope_theta": 1e4}),
        ("gemma3_text", {"sliding_window": 7}),
        ("gemma3", {"rope_scaling": None}),
    ],
)
def test_the_goldens_see_every_setting(name, change):
    """A golden that a wrong setting still matches would prove nothing."""
    golden = answers(name)
    model = respec(load_model(GOLDENS / name), **change)
    assert difference(model.logits(golden["tokens"]), golden["logits"]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_weights_go_to_their_places_on_the_mesh(name, mesh_cube):
    model, golden = load_model(GOLDENS / name, mesh=mesh_cube), answers(name)
    kernel = model.params["layers"]["attn"]["q"]["kernel"]  # [L, D, N, H]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert kernel.addressable_shards[0].data.shape == (3, 16, 2, kernel.shape[-1])
    tokens = np.concatenate([golden["tokens"]] * 2)
    assert difference(model.logits(tokens)[:2], golden["logits"]) < TOLERANCE


def test_a_mesh_that_does_not_divide_is_refused_by_parameter(mesh_cube):
    with pytest.raises(ShardingError, match=r"attn.*'k'.*kv_heads"):
        load_model(GOLDENS / "gemma3_text", mesh=mesh_cube)


def test_bfloat16_weights_and_files(tmp_path):
    model, golden = load_model(GOLDENS / "llama", dtype="bfloat16"), answers("llama")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert 1e-4 < difference(model.logits(golden["tokens"]), golden["logits"]) < 0.2
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(ValueError, match=r"float32.*int8"):
        load_model(GOLDENS / "llama", dtype="int8")


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_bfloat16_logits_are_not_rounded_to_bfloat16(name):
    """Of a tied head as of one with weights of its own: near 20 that would be steps of an eighth."""
    logits = np.asarray(load_model(GOLDENS / name, dtype="bfloat16").logits(answers(name)["tokens"]))
    assert logits.dtype == np.float32
    assert np.mean(logits == logits.astype(jnp.bfloat16).astype(np.float32)) < 0.05


def test_an_embedding_with_spare_rows(tmp_path):
    """Published embeddings are padded; a model that writes an id of the padding has written no text."""
    model = load_model(GOLDENS / "llama")
    small = Tokenizer.bytes_tokenizer()
    rows = small.vocab_size + 5
    spec = dataclasses.replace(model.spec, vocab_size=rows)
    module = Decoder(spec)
    save_model(Model(spec, init_params(module, jax.random.key(0)), small, module), tmp_path / "padded")
    padded = load_model(tmp_path / "padded").tokenizer
    assert padded.vocab_size == rows and padded.vocabulary_hash == small.vocabulary_hash
    ids = TokenIds([*small.encode("ab"), rows - 1], small.vocabulary_hash)
    assert padded.decode(ids) == "ab"
    assert padded.byte_ends(ids).tolist() == [1, 2, 2]


def test_a_copy_of_the_embedding_as_head_is_accepted_and_another_head_is_not(folder):
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    golden = answers("llama")
    assert difference(load_model(folder).logits(golden["tokens"]), golden["logits"]) < TOLERANCE
    save_file(tensors | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*lm_head.weight differs"):
        load_model(folder)
    edit_config(folder, tie_word_embeddings=False)
    untied = load_model(folder)
    np.testing.assert_array_equal(untied.params["head"]["kernel"], (head + 1).T)


# ------------------------------------------------------------------------------------------------ damaged input


def test_a_truncated_file_is_refused_with_its_sizes(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
            load_model(folder)
    path.write_bytes(whole + b"\0" * 16)
    with pytest.raises(
        ValueError, match=r"damaged: its header describes \d+ bytes of weights, the file holds \d+"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": [999, 32]}, "needs 127872 bytes"),
        ({"data_offsets": [4, 16388]}, "damaged"),
        ({"data_offsets": [-4, 16380]}, "damaged"),
        ({"data_offsets": "everything"}, "not a safetensors header"),
        ({"dtype": "F16"}, "needs 8192 bytes"),
        ({"dtype": "F8_E4M3"}, "quantised weights are read from GGUF"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(folder, change, message):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert header["model.embed_tokens.weight"]["data_offsets"] == [0, 16384]
    header["model.embed_tokens.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_header_of_impossible_size_or_content_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match="claims a header of 1152921504606846976"):
        load_model(folder)
    path.write_bytes(struct.pack("<Q", 4) + b"[1]x")
    with pytest.raises(ValueError, match="not a safetensors header"):
        load_model(folder)


def test_a_header_that_nests_without_end_is_refused(folder):
    nested = b"[" * 200_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(nested)) + nested)
    with pytest.raises(ValueError, match="its header is not a safetensors header"):
        load_model(folder)
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_weights_are_listed_together(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 31), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.layers.7.extra.weight" in message
    assert "model.layers.1.mlp.up_proj.weight is (64, 31), expected (64, 32)" in message


def test_a_config_of_another_size_than_the_weights_is_refused(folder):
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"with 4 layers.*missing: model.layers.3.*and 1 more"):
        load_model(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*safe_serialization"):
        load_model(folder)


def test_a_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"
    ):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m"):
        load_model(folder / "nowhere")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda index: index.pop("weight_map"), ValueError, "no 'weight_map'"),
        (
            lambda index: index["weight_map"].update(x="../outside.safetensors"),
            ValueError,
            "outside its folder",
        ),
        (
            lambda index: index["weight_map"].update(x="gone.safetensors"),
            FileNotFoundError,
            "gone.safetensors",
        ),
        (
            lambda index: index["weight_map"].update(x="model-00001-of-00004.safetensors"),
            ValueError,
            "'x' is not in model-00001",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, change, error, message):
    folder = Path(shutil.copytree(GOLDENS / "gemma3", tmp_path / "gemma3"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        load_model(folder)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])
def test_saving_gives_back_the_very_tensors(name, tmp_path):
    model = load_model(GOLDENS / name)
    path = save_model(model, tmp_path / "saved")
    ours, theirs = stored_weights(path), stored_weights(GOLDENS / name)
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        np.testing.assert_array_equal(ours[key], value)
    assert load_model(path).spec == model.spec
    assert not list(tmp_path.glob(".*"))
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


def test_shards_are_no_larger_than_asked_and_their_index_is_complete(tmp_path):
    model = load_model(GOLDENS / "gemma3")
    path = save_model(model, tmp_path / "saved", max_shard_bytes=40_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    sizes = [sum(value.nbytes for value in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 40_000 and sum(sizes) == index["metadata"]["total_size"]
    assert sum(sizes) == 4 * model.spec.num_params
    for key, shard in index["weight_map"].items():
        assert key in load_file(path / shard)
    again = load_model(path)
    assert again.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize("name, targets", [("llama", ("attn", "mlp")), ("qwen3", ("attn", "head"))])
def test_merged_weights_compute_what_the_adapter_computes(name, targets, tmp_path):
    model, tokens = load_model(GOLDENS / name), answers(name)["tokens"]
    config = AdapterConfig(rank=4, alpha=8.0, targets=targets)
    adapter = random_adapter(model, config)
    expected = model.logits(tokens, adapter=adapter, scale=0.75, adapter_config=config)
    assert difference(expected, model.logits(tokens)) > 0.1
    # 0.75 * alpha / rank, without a config the whole multiplier.
    np.testing.assert_array_equal(expected, model.logits(tokens, adapter=adapter, scale=1.5))
    merged = load_model(save_model(model, tmp_path / "a", adapter, 0.75, adapter_config=config))
    assert difference(merged.logits(tokens), expected) < TOLERANCE
    off = load_model(save_model(model, tmp_path / "b", adapter, scale=0.0))
    jax.tree.map(np.testing.assert_array_equal, off.params, model.params)


def test_an_adapter_folder_is_what_peft_reads(tmp_path):
    model = load_model(GOLDENS / "llama")
    config = AdapterConfig(rank=4, alpha=8.0)
    adapter = random_adapter(model, config)
    path = save_model(model, tmp_path / "adapter", adapter, 0.75, merge=False, adapter_config=config)
    settings = json.loads((path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["task_type"] == "CAUSAL_LM"
    assert (settings["r"], settings["lora_alpha"]) == (4, 6.0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(settings["target_modules"]) == sorted(names)
    low = load_file(path / "adapter_model.safetensors")
    base = stored_weights(GOLDENS / "llama")
    merged = stored_weights(save_model(model, tmp_path / "merged", adapter, 0.75, adapter_config=config))
    adapted = [key for key in base if key.endswith("proj.weight")]
    assert len(adapted) == 7 * 3 and len(low) == 2 * len(adapted)
    for key in adapted:
        # PEFT: W + lora_alpha / r * B A, with B [out, r] and A [r, in].
        module = "base_model.model." + key.removesuffix(".weight")
        delta = low[f"{module}.lora_B.weight"] @ low[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(base[key] + 6.0 / 4 * delta, merged[key], atol=1e-6)


def test_a_tokenizer_travels_with_the_model(tmp_path):
    tokenizer = Tokenizer.train_bpe(["one plus two is three"] * 4, vocab_size=270)
    model = load_model(GOLDENS / "llama")
    with pytest.raises(ValueError, match=rf"{tokenizer.vocab_size} tokens.*embedding only 128"):
        dataclasses.replace(model, tokenizer=tokenizer)
    spec = dataclasses.replace(model.spec, vocab_size=300)
    params = model.params | {"embed": {"embedding": jnp.zeros((300, 32))}}
    path = save_model(Model(spec, params, tokenizer, Decoder(spec)), tmp_path / "saved")
    again = load_model(path)
    assert again.tokenizer.vocabulary_hash == tokenizer.vocabulary_hash
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == list(
        tokenizer.eos_ids
    )
    ids = again.tokenizer.encode("one plus two")
    assert again.logits([ids]).shape == (1, len(ids), 300)
    with pytest.raises(ValueError, match="vocabulary"):
        again.logits([Tokenizer.bytes_tokenizer().encode("one plus two")])


def test_an_existing_folder_is_never_written_into(tmp_path):
    model = load_model(GOLDENS / "llama")
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"full exists and is not empty"):
        save_model(model, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="no adapter was given"):
        save_model(model, tmp_path / "new", merge=False)


def test_a_save_that_fails_leaves_nothing(tmp_path):
    """A file-size limit stands in for a full disk: writing fails in the middle of the weights."""
    model = load_model(GOLDENS / "llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not save .*saved: .*nothing was left"):
            save_model(model, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
