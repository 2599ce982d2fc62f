"""`generate`: text in, text out, on a tiny byte model."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from distill_jax.generation import generate
from distill_jax.logprobs import token_logprobs
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.text.token_ids import TokenIds
from distill_jax.text.tokenizers import Tokenizer

PROMPTS = ["ab", "What is 1+1?", "é"]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = Tokenizer.bytes_tokenizer()
    spec = ModelSpec(
        "llama",
        vocab_size=tokenizer.vocab_size,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        d_ff=32,
        max_context=64,
    )
    module = Decoder(spec)
    return Model(spec, init_params(module, jax.random.key(1)), tokenizer, module)


def test_rollouts_hold_what_was_sampled(model: Model) -> None:
    assert model.tokenizer is not None
    eos = (*range(100, 120), 258)
    rollouts = generate(model, PROMPTS, 4, 12, 1.0, key=KEY, eos_ids=eos, buckets=(16,))
    assert len(rollouts.texts) == len(rollouts.completion_ids) == len(rollouts.lengths) == 12
    assert rollouts.num_samples == 4 and rollouts.vocabulary_hash == model.tokenizer.vocabulary_hash
    assert rollouts.lp.shape == rollouts.lp_model.shape == (12, 12)
    assert 0 < rollouts.ended.sum() < 12
    for row, ids in enumerate(rollouts.completion_ids):
        assert rollouts.prompt_ids[row] == model.tokenizer.encode_prompt(PROMPTS[row // 4])
        assert ids.vocabulary_hash == model.tokenizer.vocabulary_hash
        assert len(ids) == rollouts.lengths[row]
        assert rollouts.ended[row] == (ids[-1] in eos)
        assert rollouts.texts[row] == model.tokenizer.decode(ids)
        both = np.array([*rollouts.prompt_ids[row], *ids])[None, :]
        scored = token_logprobs(model, both, [both.shape[1]])[0, -len(ids) :]
        np.testing.assert_allclose(scored, rollouts.lp[row, : len(ids)], atol=1e-5)


def test_batches_and_ids_give_the_same_rollouts_as_one_batch_of_texts(model: Model) -> None:
    assert model.tokenizer is not None
    whole = generate(model, PROMPTS, 2, 5, key=KEY, top_p=0.9)
    ids = [model.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    batched = generate(model, ids, 2, 5, key=KEY, top_p=0.9, batch_size=2)
    assert batched.texts == whole.texts
    assert batched.completion_ids == whole.completion_ids
    assert batched.prompt_ids == whole.prompt_ids
    np.testing.assert_allclose(batched.lp, whole.lp, atol=1e-5)


def test_nothing_is_stale(model: Model) -> None:
    """Rollouts come from the parameters that the model holds, before and after they change."""
    before = generate(model, PROMPTS, 1, 6, key=KEY)
    changed = dataclasses.replace(model, params=init_params(model.module, jax.random.key(2)))
    assert generate(changed, PROMPTS, 1, 6, key=KEY).texts != before.texts
    assert generate(model, PROMPTS, 1, 6, key=KEY).texts == before.texts


def test_the_dial_turns_the_adapter(model: Model) -> None:
    config = AdapterConfig(rank=2, alpha=8.0)
    adapter = jax.tree.map(lambda x: x + 0.2, init_adapter(model.module, config, KEY))
    plain = generate(model, PROMPTS, 1, 6, key=KEY)
    off = generate(model, PROMPTS, 1, 6, key=KEY, adapter=adapter, scale=0.0, adapter_config=config)
    half = generate(model, PROMPTS, 1, 6, key=KEY, adapter=adapter, scale=0.5, adapter_config=config)
    product = generate(model, PROMPTS, 1, 6, key=KEY, adapter=adapter, scale=2.0)
    assert off.texts == plain.texts != half.texts
    assert half.texts == product.texts  # 0.5 * 8 / 2


def test_greedy_needs_no_key_and_sampling_does(model: Model) -> None:
    greedy = generate(model, PROMPTS, 2, 4, temperature=0.0)
    assert greedy.texts[0::2] == greedy.texts[1::2]
    with pytest.raises(ValueError, match="sampling needs key="):
        generate(model, PROMPTS, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.01}, "top_p must be in"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"buckets": (4, 8)}, "longest prompt has 12 tokens, the largest bucket 8"),
        ({"max_new_tokens": 60}, "make 72 tokens, but the model's context is 64"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", ""]}, "prompt 1 has no tokens"),
        ({"prompts": [TokenIds([1, 2], "another")]}, "belong to the vocabulary another"),
        ({"prompts": [[300]]}, "token id 300 at position 0 is outside"),
    ],
)
def test_bad_input_is_refused(model: Model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": PROMPTS, "key": KEY, "max_new_tokens": 4, **arguments})


def test_one_text_is_not_a_list_of_prompts(model: Model) -> None:
    with pytest.raises(TypeError, match="prompts must be a list"):
        generate(model, "ab", key=KEY)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        generate(dataclasses.replace(model, tokenizer=None), PROMPTS, key=KEY)
