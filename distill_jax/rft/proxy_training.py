"""A learning proxy: now and then it is distilled on what the teacher writes, as an attacker would do.

A proxy that never saw the teacher's texts finds the unfamiliar surprising, and what is merely unfamiliar is learned in
a few hundred steps. The gap that is left after a proxy has had such steps is that of text that stays hard. Weights and
optimizer of the learning proxy, and the rollouts it learns from, are part of the run's state: they are checkpointed,
and a run that was killed goes on with the same proxy, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.logprobs import score_completions
from distill_jax.models.decoder import Decoder, Params, param_axes
from distill_jax.optimizer import make_optimizer
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.proxies import Proxy
from distill_jax.rft.rollout import Rollouts, Scored
from distill_jax.rft.step import RftState, init_rft_state, make_update
from distill_jax.rft.texts import put, require_tokenizer
from distill_jax.sequences import Sequences

_DRAW = 4  # purpose of the random numbers that choose rows
ProxyStep = Callable[[RftState, Sequences], tuple[RftState, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBuffer:
    """A ring of the newest rollouts in a proxy's tokens, on the host.

    rows: C slots of one layout, numpy leaves; written: i32[1], rows so far, so that row n lies in slot n % C.
    """

    rows: Sequences
    written: np.ndarray

    @classmethod
    def empty(
        cls, capacity: int, prompt_size: int, completion_size: int, vocabulary_hash: str
    ) -> RolloutBuffer:
        """C empty slots for prompts and completions of these sizes."""
        tokens: Any = np.zeros((capacity, prompt_size + completion_size), np.int32)
        ones: Any = np.ones(capacity, np.int32)
        rows = Sequences(tokens, ones, 0 * ones, prompt_size, vocabulary_hash)
        return cls(rows, np.zeros(1, np.int32))

    @property
    def filled(self) -> int:
        return min(int(self.written[0]), len(self.rows.tokens))

    def add(self, sequences: Sequences, keep: np.ndarray) -> RolloutBuffer:
        """A buffer with the rows of `sequences` that are marked in `keep`, bool[B], in place of the oldest.

        The sequences may have fewer slots than the buffer, not more. This buffer stays as it is, because a checkpoint
        of it may be on its way to the disk.
        """
        tokens, prompt_length, completion_length = (
            np.asarray(leaf)[keep]
            for leaf in (sequences.tokens, sequences.prompt_length, sequences.completion_length)
        )
        capacity, slots = self.rows.tokens.shape
        size, own = self.rows.prompt_size, sequences.prompt_size
        laid_out = np.zeros((len(tokens), slots), np.int32)
        laid_out[:, :own] = tokens[:, :own]
        laid_out[:, size : size + sequences.completion_size] = tokens[:, own:]
        place = (int(self.written[0]) + np.arange(len(tokens))) % capacity
        newest = slice(-capacity, None)  # of a batch larger than the ring

        def replaced(old: jax.Array, new: np.ndarray) -> Any:
            leaf = np.array(old)
            leaf[place[newest]] = new[newest]
            return leaf

        rows = dataclasses.replace(
            self.rows,
            tokens=replaced(self.rows.tokens, laid_out),
            prompt_length=replaced(self.rows.prompt_length, prompt_length),
            completion_length=replaced(self.rows.completion_length, completion_length),
        )
        return RolloutBuffer(rows, (self.written + len(tokens)).astype(np.int32))

    def draw(self, count: int, rng: np.random.Generator) -> Sequences:
        """`count` rows, each at most once where there are as many.

        Raises:
          ValueError: the buffer is empty.
        """
        if not self.filled:
            raise ValueError("no rollout has been added to the buffer; there is nothing to draw from")
        chosen = rng.choice(self.filled, size=count, replace=count > self.filled)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], self.rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProxyState:
    """A learning proxy at one moment: its weights and optimizer, and what it learns from."""

    training: RftState
    buffer: RolloutBuffer


def make_proxy_step(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    chunk: int = 64,
    axes: Params | None = None,
) -> ProxyStep:
    """Makes the jitted supervised step `(state, rows) -> (state, metrics)`; the state is donated.

        loss = sum of -log p(completion token) / number of completion tokens, in nats a token

    Args:
      module: the proxy's decoder.
      optimizer: see `optimizer.make_optimizer`.
      chunk: tokens of a row whose logits exist at one time.
      axes: logical axes of the weights (`param_axes`), needed on a mesh of more than one device.

    Returns:
      The step. Metrics, f32[]: loss (before the update), grad_norm. An update that is not finite is left out.

    Raises:
      ValueError: what `make_update` raises.
    """
    update = make_update(module, optimizer, axes)

    def loss_of(params: Params, rows: Sequences) -> jax.Array:
        lp = score_completions(module, params, rows, chunk=chunk).lp
        return -lp.sum() / jnp.maximum(jnp.asarray(rows.completion_length).sum(), 1).astype(jnp.float32)

    def step(state: RftState, rows: Sequences) -> tuple[RftState, dict[str, jax.Array]]:
        loss, gradient = jax.value_and_grad(loss_of)(state.trainable, rows)
        new, norm = update(state, gradient, loss)
        return new, {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Learner:
    """How one proxy learns; see `make`. Nothing here changes during a run."""

    proxy: Proxy
    config: CalibrationConfig
    optimizer: optax.GradientTransformation
    step: ProxyStep

    @classmethod
    def make(cls, proxy: Proxy, config: CalibrationConfig) -> Learner:
        """A learner that starts from the proxy's own weights, which are not changed.

        The schedule of the optimizer spans one training where each starts anew, else all trainings of the run.

        Raises:
          ValueError: weights that are no floating-point numbers (8 bits): they cannot be trained.
        """
        module = proxy.model.module
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(proxy.model.params)}
        if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            raise ValueError(
                f"the proxy {proxy.name!r} has weights of {sorted(kinds)}, and only floating-point weights can learn; "
                "load it in full, or leave proxy='static'"
            )
        trainings = 1 if config.proxy_restart else 1 + config.steps // config.proxy_every
        optimizer = make_optimizer(config.proxy_optimizer, trainings * config.proxy_steps)
        axes = param_axes(module) if module.mesh is not None else None
        step = make_proxy_step(module, optimizer, chunk=config.rft.logit_chunk, axes=axes)
        return cls(proxy, config, optimizer, step)

    def begin(self) -> ProxyState:
        """The given weights and an empty buffer."""
        config = self.config
        hashed = require_tokenizer(self.proxy.model, "the proxy").vocabulary_hash
        sizes = max(config.proxy_prompt_sizes), max(config.proxy_completion_sizes)
        buffer = RolloutBuffer.empty(config.proxy_buffer, *sizes, hashed)
        return ProxyState(init_rft_state(self.proxy.model.params, self.optimizer), buffer)

    def current(self, state: ProxyState) -> Proxy:
        """The proxy with the weights of `state`."""
        return self.proxy.with_params(state.training.trainable)

    def observe(self, state: ProxyState, sequences: Sequences, keep: np.ndarray) -> ProxyState:
        """Adds rollouts, see `RolloutBuffer.add`; empty completions are left out."""
        keep = keep & (np.asarray(sequences.completion_length) > 0)
        return ProxyState(state.training, state.buffer.add(sequences, keep))

    def train(self, state: ProxyState, seed: int, done: int) -> tuple[ProxyState, dict[str, float]]:
        """`config.proxy_steps` updates on rows of the buffer, a function of (seed, done, state).

        Returns:
          The new state (the old one's weights may be donated) and the loss of the first and of the last batch, before
          its update, in nats a token: "loss_before", "loss_after". An empty buffer changes nothing and has no losses.
        """
        if not state.buffer.filled:
            return state, {}
        training = state.training
        if self.config.proxy_restart:
            training = init_rft_state(self.proxy.model.params, self.optimizer)
        rng = np.random.default_rng((seed, done, _DRAW))
        losses = []
        for _ in range(self.config.proxy_steps):
            rows = state.buffer.draw(self.config.proxy_batch, rng)
            training, metrics = self.step(training, put(rows, self.proxy.model))
            losses.append(metrics["loss"])
        first, last = jax.device_get((losses[0], losses[-1]))
        return ProxyState(training, state.buffer), {"loss_before": float(first), "loss_after": float(last)}


@dataclasses.dataclass(frozen=True)
class Learners:
    """The learners of all proxies of a run, in their order; none where the proxies are static.

    A run's states are a tuple with one `ProxyState` a learner.
    """

    learners: tuple[Learner, ...]

    @classmethod
    def make(cls, proxies: Sequence[Proxy], config: CalibrationConfig) -> Learners:
        """A learner for each proxy if `config.proxy` is "learning"."""
        learning = config.proxy == "learning"
        return cls(tuple(Learner.make(proxy, config) for proxy in proxies) if learning else ())

    def begin(self) -> tuple[ProxyState, ...]:
        return tuple(learner.begin() for learner in self.learners)

    def now(self, states: Sequence[ProxyState]) -> tuple[Proxy, ...]:
        """The proxies as they have learned so far."""
        pairs = zip(self.learners, states, strict=True)
        return tuple(learner.current(state) for learner, state in pairs)

    def observe(
        self, states: Sequence[ProxyState], rollouts: Rollouts, scored: Scored
    ) -> tuple[ProxyState, ...]:
        """Puts a batch of rollouts before every learner: all of its rows, or the correct ones."""
        seen = []
        for learner, state, scores in zip(self.learners, states, scored.proxies, strict=True):
            keep = rollouts.faithful
            if learner.config.proxy_rollouts == "correct":
                keep = keep & scored.task.correct
            seen.append(learner.observe(state, scores.encoded.sequences, keep))
        return tuple(seen)

    def train(
        self, states: Sequence[ProxyState], seed: int, done: int
    ) -> tuple[tuple[ProxyState, ...], dict[str, float]]:
        """One training of each, and its losses as metrics: proxy_loss_before, proxy_loss_after (of several: _name)."""
        trained: list[ProxyState] = []
        metrics: dict[str, float] = {}
        for learner, state in zip(self.learners, states, strict=True):
            new, losses = learner.train(state, seed, done)
            trained.append(new)
            suffix = f"_{learner.proxy.name}" if len(self.learners) > 1 else ""
            metrics |= {f"proxy_{name}{suffix}": value for name, value in losses.items()}
        return tuple(trained), metrics

    def step(
        self, states: tuple[ProxyState, ...], rollouts: Rollouts, scored: Scored, seed: int, done: int
    ) -> tuple[tuple[ProxyState, ...], dict[str, float]]:
        """What update number `done` of the teacher means: rollouts to remember, and when it is time a training."""
        if not states:
            return states, {}
        states = self.observe(states, rollouts, scored)
        due = done % self.learners[0].config.proxy_every == 0
        return self.train(states, seed, done) if due else (states, {})
