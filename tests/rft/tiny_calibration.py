"""A calibration of the smallest size: a letter teacher, a byte proxy, and a task that a coin could do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from distill_jax.models.adapter import AdapterConfig
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.step import RftConfig
from distill_jax.tasks.base import Problem
from distill_jax.text.token_ids import TokenizerSettings
from distill_jax.text.tokenizers import Tokenizer


class Letters:
    """Reward 1 for a completion that ended and has an "a" in it. Its validation prompts are longer."""

    name = "letters"
    failures = 0

    def problems(self, split, count, seed):
        rng = np.random.default_rng([seed, len(split)])
        length = {"train": 3, "validation": 4}[split]
        prompts = ["".join(rng.choice(list("abcd"), length)) for _ in range(count)]
        return [Problem(prompt, "a", "a", index) for index, prompt in enumerate(prompts)]

    def score(self, problem, completion, ended):
        return float(ended and "a" in completion)


class MarkedLetters(Letters):
    """The same with a gold answer: "db" after the mark "c". The letters "c" and "d" are one token of the teacher's."""

    answer_mark = "c"

    def problems(self, split, count, seed):
        return [dataclasses.replace(p, gold="acdb") for p in super().problems(split, count, seed)]


@functools.cache
def letter_tokenizer() -> Tokenizer:
    """a, b, c, d, ab, cd and the end of sequence: whatever a model samples is a text."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "<eos>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("c", "d")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, TokenizerSettings(eos_id=6))


@functools.cache
def make_model(role: str, mesh=None) -> Model:
    """Random weights of a teacher with letters, a proxy with bytes, or a proxy with letters ("letter_proxy")."""
    tokenizer = Tokenizer.bytes_tokenizer() if role == "proxy" else letter_tokenizer()
    width = 16 if role == "teacher" else 8
    vocab_size = 260 if role == "proxy" else 8
    spec = ModelSpec("llama", vocab_size, width, 1, 2, 2, width // 2, 2 * width)
    module = Decoder(spec, mesh)
    params = init_params(module, jax.random.key({"teacher": 0, "proxy": 1, "letter_proxy": 2}[role]))
    return Model(spec, params, tokenizer.with_vocab_size(vocab_size), module, mesh)


CONFIG = CalibrationConfig(
    steps=5,
    prompts_per_step=4,
    rft=RftConfig(num_samples=4, logit_chunk=8),
    adapter=AdapterConfig(rank=2, alpha=4.0),
    optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, final_fraction=0.5),
    prompt_style="raw",
    proxy_prompt_style="raw",
    prompt_sizes=(4,),
    completion_size=8,
    proxy_prompt_sizes=(4,),
    proxy_completion_sizes=(17,),
    unscorable_limit=0.9,  # the spare id of the embedding is no text
    train_problems=16,
    validation_problems=12,
    validation_every=2,
    validation_batch=8,
    utility_floor=1.0,
    rollouts_every=2,
    rollouts_kept=4,
    checkpoint_every=2,
)
