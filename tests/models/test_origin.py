"""What a folder says besides the arithmetic goes into the folder that is written from it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model, load_model, save_model
from distill_jax.models.origin import Origin, read_origin
from distill_jax.text.tokenizers import Tokenizer
from tests.models.small_models import GOLDENS


@pytest.fixture
def folder(tmp_path):
    """A model with a tokenizer, and what publishers put beside them."""
    tokenizer = Tokenizer.bytes_tokenizer()
    spec = dataclasses.replace(load_model(GOLDENS / "llama").spec, vocab_size=tokenizer.vocab_size)
    module = Decoder(spec)
    path = save_model(Model(spec, init_params(module, jax.random.key(0)), tokenizer, module), tmp_path / "in")
    edit(path / "generation_config.json", temperature=0.6, top_k=20, do_sample=True, transformers_version="4")
    edit(path / "tokenizer_config.json", model_max_length=4096, padding_side="left")
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sampling_settings_and_tokenizer_fields_are_written_again(folder, tmp_path):
    out = save_model(load_model(folder), tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    assert {key: generation[key] for key in ("temperature", "top_k", "do_sample")} == {
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": True,
    }
    assert "transformers_version" not in generation
    assert (
        generation["eos_token_id"]
        == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    )
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert (tokenizer["model_max_length"], tokenizer["padding_side"]) == (4096, "left")


def test_token_ids_of_the_source_do_not_outlive_its_tokenizer(folder, tmp_path):
    edit(folder / "generation_config.json", decoder_start_token_id=7)
    out = save_model(load_model(folder), tmp_path / "out")
    assert "decoder_start_token_id" not in json.loads((out / "generation_config.json").read_text())


def test_an_adapter_names_the_model_on_the_hub(folder, tmp_path):
    assert read_origin(folder, str(folder)).hub_name == ""
    origin = read_origin(folder, "hf://some/model@v1")
    assert (origin.hub_name, origin.revision) == ("some/model", "v1")
    model = dataclasses.replace(load_model(folder), origin=origin)
    adapter = init_adapter(model.module, AdapterConfig(rank=2, alpha=2.0), jax.random.key(0))
    out = save_model(model, tmp_path / "peft", adapter, merge=False)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/model", "v1")
    local = save_model(load_model(folder), tmp_path / "local", adapter, merge=False)
    settings = json.loads((local / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None and "revision" not in settings


def test_the_text_model_of_a_model_of_images_is_found_where_peft_looks(tmp_path):
    wrapped, plain = load_model(GOLDENS / "gemma3"), load_model(GOLDENS / "gemma3_text")
    assert wrapped.origin.is_wrapped and not plain.origin.is_wrapped and plain.origin == Origin()
    config = AdapterConfig(rank=2, alpha=2.0)
    for model, prefix in ((wrapped, "model.language_model.layers."), (plain, "model.layers.")):
        adapter = init_adapter(model.module, config, jax.random.key(0))
        path = save_model(model, tmp_path / model.spec.family / prefix, adapter, merge=False)
        names = load_file(path / "adapter_model.safetensors")
        assert all(name.startswith(f"base_model.model.{prefix}") for name in names)
    # A merged model is the text model alone, under the names that one has.
    merged = load_model(save_model(wrapped, tmp_path / "merged"))
    assert not merged.origin.is_wrapped
    jax.tree.map(np.testing.assert_array_equal, merged.params, wrapped.params)


def test_special_tokens_without_a_row_are_left_out(folder, tmp_path):
    """The tokenizer of a text model may know the image placeholder of its larger siblings."""
    rows = load_model(folder).spec.vocab_size
    placeholder = "<image_soft_token>"
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(placeholder, special=True)])
    assert backend.token_to_id(placeholder) == rows
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.vocab_size == rows
    ids = tokenizer.encode(f"a{placeholder}b")
    assert max(ids) < rows and tokenizer.decode(ids) == f"a{placeholder}b"
    again = load_model(save_model(load_model(folder), tmp_path / "out")).tokenizer
    assert again.vocabulary_hash == tokenizer.vocabulary_hash
    other = shutil.copytree(folder, tmp_path / "other")
    backend.add_tokens(["plain text"])
    backend.save(str(other / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"{rows + 2} tokens.*embedding only {rows} rows.*own tokenizer"):
        load_model(other)


def test_a_tokenizer_of_quite_another_size_is_refused(tmp_path):
    tokenizer = Tokenizer.bytes_tokenizer()
    spec = dataclasses.replace(load_model(GOLDENS / "llama").spec, vocab_size=tokenizer.vocab_size + 1025)
    module = Decoder(spec)
    model = Model(spec, init_params(module, jax.random.key(0)), tokenizer, module)
    with pytest.raises(ValueError, match=r"1284 rows, but the tokenizer only 259 tokens.*own tokenizer"):
        load_model(save_model(model, tmp_path / "m"))


def test_the_end_that_only_config_json_names(folder):
    """As transformers does, where generation_config.json and tokenizer_config.json say nothing."""
    edit(folder / "config.json", eos_token_id=[65, 66])
    (folder / "generation_config.json").unlink()
    ours = json.loads((folder / "tokenizer_config.json").read_text())
    del ours["distill_jax"]
    (folder / "tokenizer_config.json").write_text(json.dumps(ours))
    assert {65, 66} <= set(load_model(folder).tokenizer.eos_ids)
    edit(folder / "config.json", eos_token_id=70_000)
    with pytest.raises(ValueError, match=r"special token ids \[70000\].*outside its vocabulary"):
        load_model(folder)


def test_a_template_in_a_file_of_its_own_wins(folder):
    edit(folder / "tokenizer_config.json", chat_template="old")
    assert load_model(folder).tokenizer.chat_template == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert load_model(folder).tokenizer.chat_template == "new"
