"""The sampler against a naive loop without cache; its promises on keys, ends, replicas, shards and donation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax import sampling
from distill_jax.distribution import draw, process_logits
from distill_jax.logprobs import score_completions
from distill_jax.mesh import place, place_batch
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, Params, apply, init_params, param_axes, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.sampling import RolloutBatch, SamplingConfig, make_sampler, row_keys, sample

GLOBAL = ModelSpec(
    "llama", vocab_size=52, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32
)
WINDOW = 4
LOCAL = dataclasses.replace(
    GLOBAL, family="gemma3", sliding_window=WINDOW, layer_is_local=(True, False), rope_theta_local=500.0
)
PROMPTS = np.array([[7, 3, 9, -1, 99], [4, 4, 8, 1, 6], [2, 99, 99, 99, 99]])  # padding is no id
LENGTHS = np.array([3, 5, 1])
SAMPLES, NEW = 2, 9
PLAIN = SamplingConfig(SAMPLES, NEW)
ENDING = SamplingConfig(
    SAMPLES, NEW, temperature=1.3, top_k=30, top_p=0.9, eos_ids=(5, 11, 30, 31), pad_id=77
)
GREEDY = SamplingConfig(SAMPLES, NEW, temperature=0.0)
KEYS = row_keys(jax.random.key(42), 6)

jit_sample = jax.jit(sample, static_argnames=("module", "config", "vocabulary_hash"))


@functools.cache
def model(spec: ModelSpec = GLOBAL, seed: int = 0) -> tuple[Decoder, Params]:
    module = Decoder(spec)
    # Larger weights than usual, so that the next token depends visibly on what stands before it.
    return module, jax.tree.map(lambda x: 1.5 * x, init_params(module, jax.random.key(seed)))


def completions(batch: RolloutBatch) -> list[list[int]]:
    lengths = np.asarray(batch.sequences.completion_length)
    return [row[:n].tolist() for row, n in zip(np.asarray(batch.sequences.completion), lengths, strict=True)]


def naive_completions(spec: ModelSpec, config: SamplingConfig) -> list[list[int]]:
    """Row by row, token by token, the whole text anew for each token: no cache, no gap, no neighbours."""
    module, params = model(spec)
    size = PROMPTS.shape[1] + config.max_new_tokens

    @jax.jit
    def next_logits(ids: jax.Array, length: jax.Array) -> jax.Array:
        positions = jnp.arange(size, dtype=jnp.int32)[None, :]
        hidden, _ = apply(module, params, ids[None, :], positions, positions < length)
        return unembed(module, params, hidden[0, length - 1])

    rows = []
    for row in range(len(PROMPTS) * config.num_samples):
        prompt = row // config.num_samples
        ids = PROMPTS[prompt, : LENGTHS[prompt]].tolist()
        for step in range(config.max_new_tokens):
            logits = next_logits(np.pad(ids, (0, size - len(ids))), len(ids))
            if config.temperature == 0:
                token = int(np.argmax(logits))
            else:
                logprobs = process_logits(logits, config.temperature, config.top_k, config.top_p)
                token = int(draw(jax.random.fold_in(KEYS[row], step), logprobs))
            ids.append(token)
            if token in config.eos_ids:
                break
        rows.append(ids[LENGTHS[prompt] :])
    return rows


@pytest.mark.parametrize("config", [PLAIN, ENDING, GREEDY], ids=["plain", "ending", "greedy"])
@pytest.mark.parametrize("spec", [GLOBAL, LOCAL], ids=["global", "local"])
def test_samples_equal_a_naive_loop_without_cache(spec: ModelSpec, config: SamplingConfig) -> None:
    module, params = model(spec)
    assert LENGTHS.min() + NEW > WINDOW  # every row outgrows the window
    batch = jit_sample(module, params, PROMPTS, LENGTHS, KEYS, config)
    assert completions(batch) == naive_completions(spec, config)
    np.testing.assert_array_equal(batch.sequences.tokens[:, :5], np.repeat(PROMPTS, SAMPLES, axis=0))
    np.testing.assert_array_equal(batch.sequences.prompt_length, np.repeat(LENGTHS, SAMPLES))


def test_the_window_matters_in_the_local_model() -> None:
    """Otherwise the test above would not see a window that is ignored while decoding."""
    module, params = model(LOCAL)
    wide = Decoder(dataclasses.replace(LOCAL, sliding_window=100))
    narrow_rows, wide_rows = (
        completions(jit_sample(m, params, PROMPTS, LENGTHS, KEYS, GREEDY)) for m in (module, wide)
    )
    assert narrow_rows != wide_rows


def test_ends_padding_and_lengths() -> None:
    module, params = model()
    batch = jit_sample(module, params, PROMPTS, LENGTHS, KEYS, ENDING)
    rows, mask = completions(batch), np.asarray(batch.sequences.completion_mask)
    assert {len(row) for row in rows} > {NEW}  # some ended, some were cut off
    for row, ended in zip(rows, np.asarray(batch.ended), strict=True):
        assert ended == (row[-1] in ENDING.eos_ids)
        assert ended or len(row) == NEW
        assert not set(row[:-1]) & set(ENDING.eos_ids)
    assert (np.asarray(batch.sequences.completion)[~mask] == ENDING.pad_id).all()
    for lp in (batch.lp, batch.lp_model):
        assert (np.asarray(lp)[~mask] == 0).all() and (np.asarray(lp)[mask] < 0).all()


@pytest.mark.parametrize(
    "distribution",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", [GLOBAL, LOCAL], ids=["global", "local"])
def test_rescoring_a_rollout_has_ratio_one(spec: ModelSpec, distribution: dict) -> None:
    module = Decoder(spec)
    params = init_params(module, jax.random.key(0))
    config = SamplingConfig(32, 12, eos_ids=(5, 11), **distribution)
    batch = jit_sample(module, params, PROMPTS, LENGTHS, row_keys(jax.random.key(0), 96), config)
    if config.truncates:
        assert batch.support_size is not None
        assert ((batch.support_size > 0) == batch.sequences.completion_mask).all()
        temperature, support_size = config.temperature, batch.support_size
        scores = score_completions(
            module, params, batch.sequences, temperature=temperature, top_k=support_size, chunk=5
        )
    else:
        assert batch.support_size is None
        scores = score_completions(module, params, batch.sequences, chunk=5, **distribution)
    np.testing.assert_allclose(jnp.exp(scores.lp - batch.lp), 1.0, atol=1e-5)
    plain = score_completions(module, params, batch.sequences)
    np.testing.assert_allclose(jnp.exp(plain.lp - batch.lp_model), 1.0, atol=1e-5)
    # Without the sizes, top-p may find another support where a mass just reaches it, but rarely.
    again = score_completions(module, params, batch.sequences, **distribution)
    differs = jnp.abs(jnp.exp(again.lp - batch.lp) - 1.0) > 1e-5
    assert differs.mean() <= (0.005 if "top_p" in distribution else 0)


def test_greedy_takes_the_largest_logit_with_certainty() -> None:
    module, params = model()
    batch = jit_sample(module, params, PROMPTS, LENGTHS, KEYS, GREEDY)
    rows = completions(batch)
    assert rows[0::2] == rows[1::2]  # keys change nothing
    assert (batch.lp == 0).all()
    plain = score_completions(module, params, batch.sequences)
    np.testing.assert_allclose(plain.lp, batch.lp_model, atol=1e-5)


def test_a_row_depends_on_its_own_key_and_prompt_alone() -> None:
    module, params = model()
    rows = completions(jit_sample(module, params, PROMPTS, LENGTHS, KEYS, ENDING))
    # Prompt 1 alone, among other neighbours, in another order, in a wider bucket.
    alone = jit_sample(module, params, PROMPTS[1:2], LENGTHS[1:2], KEYS[2:4], ENDING)
    assert completions(alone) == rows[2:4]
    other_prompts, other_keys = PROMPTS.copy(), row_keys(jax.random.key(1), 6).at[2:4].set(KEYS[2:4])
    other_prompts[[0, 2], :3] = 8
    others = jit_sample(module, params, other_prompts, np.array([2, 5, 3]), other_keys, ENDING)
    assert completions(others)[2:4] == rows[2:4]
    assert completions(others)[0:2] != rows[0:2]
    wide = np.pad(PROMPTS[::-1], ((0, 0), (0, 4)))
    wider = jit_sample(module, params, wide, LENGTHS[::-1], KEYS[jnp.array([4, 5, 2, 3, 0, 1])], ENDING)
    assert completions(wider) == [rows[i] for i in (4, 5, 2, 3, 0, 1)]


def test_row_keys_do_not_depend_on_the_number_of_rows() -> None:
    few, many = row_keys(jax.random.key(3), 4), row_keys(jax.random.key(3), 9)
    assert (jax.random.key_data(few) == jax.random.key_data(many[:4])).all()
    assert len(np.unique(jax.random.key_data(many), axis=0)) == 9


@pytest.mark.parametrize("prompts", [4, 3], ids=["even", "uneven"])
def test_sharding_changes_no_sample(mesh_cube: Mesh, mesh_single: Mesh, prompts: int) -> None:
    _, params = model(LOCAL)
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (prompts, 5), 0, 52))
    lengths, keys = np.array([5, 2, 1, 4])[:prompts], row_keys(jax.random.key(6), prompts * SAMPLES)
    batches = []
    for mesh in (mesh_cube, mesh_single):
        module = Decoder(LOCAL, mesh)
        placed = place(params, param_axes(module), mesh)
        inputs = place_batch((tokens, lengths), mesh) if prompts == 4 else (tokens, lengths)
        batches.append(jit_sample(module, placed, *inputs, keys, ENDING))
    sharded, single = batches
    np.testing.assert_array_equal(sharded.sequences.tokens, single.sequences.tokens)
    np.testing.assert_array_equal(sharded.sequences.completion_length, single.sequences.completion_length)
    np.testing.assert_allclose(sharded.lp, single.lp, atol=1e-5)


def test_replicas_under_vmap_equal_single_runs() -> None:
    """Replica 0 has ended long before replica 1; the loop goes on, and nothing of replica 0 changes."""
    module, params = model()
    always_ends = jax.tree.map(lambda x: x, params)
    embedding = params["embed"]["embedding"]
    always_ends["embed"] = {"embedding": embedding.at[jnp.array(ENDING.eos_ids)].mul(40.0)}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), always_ends, params, model(seed=1)[1])
    keys = jnp.stack([KEYS, KEYS, row_keys(jax.random.key(9), 6)])
    replicas = jax.jit(jax.vmap(lambda p, k: sample(module, p, PROMPTS, LENGTHS, k, ENDING)))(stacked, keys)
    lengths = np.asarray(replicas.sequences.completion_length)
    assert lengths[0].max() < lengths[1].max() == NEW
    for replica in range(3):
        own = jax.tree.map(lambda x: x[replica], stacked)  # noqa: B023
        single = jit_sample(module, own, PROMPTS, LENGTHS, keys[replica], ENDING)
        of_replica = jax.tree.map(lambda x: x[replica], replicas)  # noqa: B023
        np.testing.assert_array_equal(of_replica.sequences.tokens, single.sequences.tokens)
        np.testing.assert_array_equal(
            of_replica.sequences.completion_length, single.sequences.completion_length
        )
        np.testing.assert_array_equal(of_replica.ended, single.ended)
        np.testing.assert_allclose(of_replica.lp, single.lp, atol=1e-5)
        np.testing.assert_allclose(of_replica.lp_model, single.lp_model, atol=1e-5)


def test_the_loop_stops_with_the_longest_row_also_under_vmap() -> None:
    module, params = model()
    config = dataclasses.replace(ENDING, max_new_tokens=40, eos_ids=tuple(range(0, 52, 3)))

    def last_step(params: Params, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = sampling.prefill(module, params, PROMPTS, LENGTHS, keys, config)
        state = sampling.decode(module, params, state, keys, config)
        return state.step, state.length.max()

    step, longest = jax.jit(last_step)(params, KEYS)
    assert step == longest < 40
    keys = jnp.stack([KEYS, row_keys(jax.random.key(8), 6)])
    steps, longest = jax.jit(jax.vmap(last_step, (None, 0)))(params, keys)
    assert (steps == longest.max()).all() and longest.min() < longest.max() < 40


def test_a_limit_cuts_rows_off_without_another_trace() -> None:
    module, params = model()
    sampler = make_sampler(module, ENDING, buckets=(8,))
    whole = completions(sampler(params, PROMPTS, LENGTHS, KEYS))
    with count_traces() as traces:
        for limit in (1, 4, NEW, 100):
            batch = sampler(params, PROMPTS, LENGTHS, KEYS, limit=limit)
            cut = [row[:limit] for row in whole]
            assert completions(batch) == cut
            assert np.asarray(batch.ended).tolist() == [row[-1] in ENDING.eos_ids for row in cut]
    assert traces == []


class count_traces:
    """Collects the prompt sizes that are traced while it is active."""

    def __enter__(self) -> list[tuple[int, ...]]:
        self.original, traces = sampling.apply, []

        def counting(
            module: Decoder, params: Params, tokens: jax.Array, *args: object, **kwargs: object
        ) -> object:
            traces.append(tokens.shape)
            return self.original(module, params, tokens, *args, **kwargs)

        sampling.apply = counting
        return traces

    def __exit__(self, *_: object) -> None:
        sampling.apply = self.original


def test_one_trace_for_each_bucket_in_use() -> None:
    module, params = model()
    config = dataclasses.replace(PLAIN, max_new_tokens=3)
    sampler = make_sampler(module, config, buckets=(32, 4, 8, 16))
    with count_traces() as traces:
        for longest in (3, 4, 2, 13, 16, 5):
            prompts = np.ones((3, max(longest, 6)), np.int32)  # wider and narrower than the bucket
            batch = sampler(params, prompts, np.array([1, longest, 2]), KEYS)
            expected = 4 if longest <= 4 else 8 if longest <= 8 else 16
            assert batch.sequences.prompt_size == expected
    prefills = [shape for shape in traces if shape[0] == 3]
    assert sorted(prefills) == [(3, 4), (3, 8), (3, 16)]
    assert all(shape == (6, 1) for shape in traces if shape[0] != 3)
    with pytest.raises(ValueError, match="longest prompt has 33 tokens, the largest bucket 32"):
        sampler(params, np.ones((3, 33), np.int32), np.array([1, 33, 2]), KEYS)


def test_the_sampler_equals_sample_and_uses_the_parameters_it_is_given() -> None:
    module, params = model()
    sampler = make_sampler(module, ENDING, buckets=(5,))
    first = sampler(params, PROMPTS, LENGTHS, KEYS, vocabulary_hash="mine")
    expected = jit_sample(module, params, PROMPTS, LENGTHS, KEYS, ENDING, vocabulary_hash="mine")
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), first, expected)
    _, other = model(seed=1)
    changed = sampler(other, PROMPTS, LENGTHS, KEYS)
    assert completions(changed) != completions(first)
    assert completions(changed) == completions(jit_sample(module, other, PROMPTS, LENGTHS, KEYS, ENDING))
    assert completions(sampler(params, PROMPTS, LENGTHS, KEYS)) == completions(first)


def test_an_adapter_and_its_scale_are_applied_everywhere() -> None:
    module, params = model()
    config = AdapterConfig(rank=2, alpha=2.0)
    adapter = jax.tree.map(lambda x: x + 0.3, init_adapter(module, config, jax.random.key(0)))
    sampler = make_sampler(module, ENDING, buckets=(5,))
    plain = sampler(params, PROMPTS, LENGTHS, KEYS)
    off = sampler(params, PROMPTS, LENGTHS, KEYS, adapter=adapter, scale=0.0)
    on = sampler(params, PROMPTS, LENGTHS, KEYS, adapter=adapter, scale=0.8)
    assert completions(off) == completions(plain) != completions(on)
    scores = score_completions(module, params, on.sequences, adapter=adapter, scale=0.8)
    np.testing.assert_allclose(scores.lp, on.lp_model, atol=1e-5)


def test_decoding_state_is_donated_and_lives_in_place() -> None:
    module, params = model()
    keys = row_keys(jax.random.key(42), 6)
    state = sampling._prefill(module, params, PROMPTS, LENGTHS, keys, PLAIN)
    compiled = sampling._decode.lower(module, params, state, keys, PLAIN).compile().memory_analysis()
    cache_bytes = state.cache.k.nbytes + state.cache.v.nbytes
    assert compiled.alias_size_in_bytes >= cache_bytes
    sampling._decode(module, params, state, keys, PLAIN)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, keys)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -2}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_configs_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**{"num_samples": 1, "max_new_tokens": 1, **arguments})


def test_shapes_that_do_not_fit_are_refused() -> None:
    module, params = model()
    sampler = make_sampler(module, PLAIN)
    with pytest.raises(ValueError, match="keys must be 6 typed keys, one for each of 3 prompts x 2 samples"):
        sample(module, params, PROMPTS, LENGTHS, KEYS[:3], PLAIN)
    with pytest.raises(ValueError, match="typed keys"):
        sample(module, params, PROMPTS, LENGTHS, jax.random.key_data(KEYS), PLAIN)
    with pytest.raises(ValueError, match=r"prompt_tokens must be \[Q, P\]"):
        sample(module, params, PROMPTS, LENGTHS[:2], KEYS, PLAIN)
    with pytest.raises(ValueError, match=r"prompt_tokens must be \[Q, P\]"):
        sampler(params, PROMPTS[0], LENGTHS, KEYS)
    with pytest.raises(ValueError, match=r"prompt_length must be in 1\.\.5, got 0\.\.3"):
        sampler(params, PROMPTS, np.array([0, 1, 3]), KEYS)
    with pytest.raises(ValueError, match="buckets must be positive"):
        make_sampler(module, PLAIN, buckets=())
