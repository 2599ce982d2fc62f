"""On-policy distillation: the student writes, the teacher judges what it wrote, the student takes one step.

    fresh    sampled from the student now                               share of steps   lambda (1 - replay)
    replay   sampled from it earlier, drawn from a ring of old rows                      lambda replay
    teacher  texts of the teacher                                                        1 - lambda

The source is drawn for each batch (generalized knowledge distillation, arXiv 2306.13649; the ring of old samples:
DistiLLM, 2402.03898). There is no gradient through sampling. Two objectives:

    sampled     the teacher's likelihood of the sampled text alone. On the student's text a policy gradient with the
                advantage L_T - L_S of each span, that of the reverse KL; on the teacher's text cross-entropy, that of
                the forward KL. Any pair of tokenizers: with one tokenizer every span is a token.
    divergence  a function of whole distributions, at every prefix of either text. One tokenizer.

Everything random comes from fold_in(state.key, step), and batches are functions of the step: a run that goes on from a
saved state ends where it would have ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.logprobs import score_completions
from distill_jax.masked import masked_mean, zero_masked
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, Params
from distill_jax.sampling import SamplingConfig, make_sampler, row_keys
from distill_jax.students.aligned_texts import AlignedTexts, take_rows
from distill_jax.students.cross_tokenizer import comparable_spans, policy_gradient, span_advantages
from distill_jax.students.cross_tokenizer_step import Metrics, student_weights
from distill_jax.students.replay import Replay, draw_rows, init_replay, push_rows
from distill_jax.students.scorers import Scorer
from distill_jax.students.step import StudentState, apply_gradient, init_student_state
from distill_jax.students.targets import Teacher
from distill_jax.students.train import batch_rows

FRESH, REPLAY, TEACHER = "fresh", "replay", "teacher"

# (module, params, sequences, teacher, *, adapter, scale, chunk) -> (sum, count), as `divergences.sequence_divergence`.
DivergenceLoss = Callable[..., tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnPolicyBatch:
    """Rows to learn from.

    Attributes:
      texts: the rows, with the teacher's scores.
      lp_behaviour: f32[B, Ts], log-probability of each of the student's tokens when it was drawn; not read for the
        teacher's texts.
    """

    texts: AlignedTexts
    lp_behaviour: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnPolicyState:
    """All that a run goes on from; any `Checkpointer` saves it.

    Attributes:
      student: step counter, weights, optimizer.
      key: key[], constant through a run.
      replay: old rows, or None.
    """

    student: StudentState
    key: jax.Array
    replay: Replay | None = None


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """How a student learns from its own samples.

    Attributes:
      prompts_per_step: Q; a batch has B = Q * num_samples rows, whatever its source.
      student_share: lambda in [0, 1], probability that a batch is the student's own text.
      replay_share: in [0, 1), probability that such a batch is drawn from the ring, once a batch is in it.
      replay_rows: rows of the ring, at least B; 0 exactly where replay_share is 0.
      weight_limit: > 0; where the weight of a span is cut: w_k = its probability under the student now / when it was
        drawn. 1 up to rounding for fresh samples at temperature 1; for another temperature and for old rows it corrects
        the span, not what stands before it.
      trainable: "params" or "adapter"; scale: factor of the adapter's product.
      logit_chunk: tokens of a row whose logits exist at one time.
      order_seed: of the order of prompts and of the teacher's texts.

    Raises:
      ValueError: a field out of range.
    """

    prompts_per_step: int = 16
    student_share: float = 1.0
    replay_share: float = 0.0
    replay_rows: int = 0
    weight_limit: float = 2.0
    trainable: str = "params"
    scale: float = 1.0
    logit_chunk: int = 64
    order_seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.logit_chunk < 1:
            raise ValueError(f"prompts_per_step and logit_chunk must be at least 1, got {self}")
        if not (0 <= self.student_share <= 1 and 0 <= self.replay_share < 1):
            raise ValueError(
                f"student_share must be in [0, 1] and replay_share in [0, 1), got {self.student_share} and "
                f"{self.replay_share}"
            )
        if (self.replay_rows > 0) != (self.replay_share > 0):
            raise ValueError(
                f"replay_share={self.replay_share} and replay_rows={self.replay_rows}: a share needs rows to draw "
                "from, and rows a share"
            )
        if not self.weight_limit > 0:
            raise ValueError(f"weight_limit must be positive, got {self.weight_limit}")
        if self.trainable not in ("params", "adapter"):
            raise ValueError(f"trainable must be 'params' or 'adapter', got {self.trainable!r}")


def on_policy_loss(
    module: Decoder,
    tree: Params,
    base: Params | None,
    batch: OnPolicyBatch,
    from_student: jax.Array,
    config: OnPolicyConfig,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(sum, count, metrics) of the sampled objective, differentiated in the student.

        student's text   sum over its tokens in comparable spans k of -w_k (L_T[k] - L_S[k]) lp_s[t]
        teacher's text   sum over all completion tokens of -lp_s[t]

    Args:
      module, tree, base: the student; see `cross_tokenizer_step.student_weights`.
      from_student: bool[], whose text the batch is; may be traced.

    Returns:
      f32[], f32[] number of tokens; metrics: log_ratio (L_S - L_T, nats a token of comparable spans: on the student's
      text an estimate of KL(student || teacher)), known (share of tokens that the teacher has judged), weight (mean w).
    """
    weights = student_weights(tree, base, config.trainable, config.scale)
    texts, mask = batch.texts, batch.texts.student.completion_mask
    lp_s = score_completions(module, sequences=texts.student, chunk=config.logit_chunk, **weights).lp
    spans = texts.spans()
    advantages, known = span_advantages(spans, texts.lp_t, lp_s)
    total_t, total_s, spans_known = comparable_spans(spans, texts.lp_t, jax.lax.stop_gradient(lp_s))
    _, total_behaviour, _ = comparable_spans(spans, texts.lp_t, batch.lp_behaviour)
    ratio = jnp.minimum(jnp.exp(total_s - total_behaviour), config.weight_limit)
    weight = zero_masked(jnp.take_along_axis(ratio, spans.id_s, axis=1), known)
    judged = known.sum().astype(jnp.float32)
    metrics = {
        "log_ratio": zero_masked(total_s - total_t, spans_known).sum() / jnp.maximum(judged, 1),
        "known": judged / jnp.maximum(mask.sum(), 1),
        "weight": masked_mean(weight, known),
    }
    advantages = jnp.where(from_student, weight * advantages, 1.0)
    total, count = policy_gradient(lp_s, advantages, jnp.where(from_student, known, mask))
    return total, count, metrics


def make_on_policy_update(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    config: OnPolicyConfig,
    divergence: DivergenceLoss | None = None,
) -> Callable[..., tuple[StudentState, Metrics]]:
    """Makes `(student, base, teacher, batch, from_student, learning_rate) -> (student, metrics)`, jitted, one trace.

    The student's state is donated. teacher: a `Teacher` with a divergence, else None. Metrics, f32[]: loss (per token
    that is judged), tokens, grad_norm, skipped_steps, and those of `on_policy_loss` without a divergence.
    """

    def loss(
        tree: Params,
        base: Params | None,
        teacher: Teacher | None,
        batch: OnPolicyBatch,
        from_student: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        if divergence is None:
            total, count, metrics = on_policy_loss(module, tree, base, batch, from_student, config)
        else:
            weights = student_weights(tree, base, config.trainable, config.scale)
            student, options = weights.pop("params"), {"chunk": config.logit_chunk, **weights}
            total, count = divergence(module, student, batch.texts.student, teacher, **options)
            metrics = {}
        return total / jnp.maximum(count, 1), {**metrics, "tokens": count}

    def update(
        state: StudentState,
        base: Params | None,
        teacher: Teacher | None,
        batch: OnPolicyBatch,
        from_student: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[StudentState, Metrics]:
        gradient_of = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradient = gradient_of(state.trainable, base, teacher, batch, from_student)
        state, applied = apply_gradient(optimizer, state, value, gradient, learning_rate)
        return state, {"loss": value, **metrics, **applied}

    return jax.jit(update, donate_argnums=0)


class OnPolicyStep:
    """One step: picks the source, samples, has the teacher judge, updates.

    Args:
      module: the student's decoder.
      optimizer: see `make_student_step`.
      sampling: how the student writes. Rows are T = max_new_tokens long.
      prompts: (i32[N, P] right-padded ids, i32[N] lengths) on the host, see `pack_prompts`.
      score: what the teacher says of rollouts; see `students.scorers`.
      config: see `OnPolicyConfig`.
      base: frozen weights below an adapter.
      teacher_texts: with student_share < 1, the teacher's own texts (host), in the layout of the student's rollouts.
      divergence: a function of whole distributions in place of the sampled objective, e.g.
        `functools.partial(sequence_divergence, config=Divergence("jsd", beta=0.5))`; needs `teacher`.
      teacher: what the divergence is towards.
      vocabulary_hash: of the student.
      update: a `make_on_policy_update` of the same module, optimizer, config and divergence, for several runs that are
        to share its program; None makes one. Of the config it does not read the seed and the shares.

    Raises:
      ValueError: parts that contradict each other, no prompts, or teacher's texts of another layout.
    """

    def __init__(
        self,
        module: Decoder,
        optimizer: optax.GradientTransformation,
        sampling: SamplingConfig,
        prompts: tuple[np.ndarray, np.ndarray],
        score: Scorer,
        config: OnPolicyConfig,
        *,
        base: Params | None = None,
        teacher_texts: AlignedTexts | None = None,
        divergence: DivergenceLoss | None = None,
        teacher: Teacher | None = None,
        vocabulary_hash: str = "",
        update: Callable[..., tuple[StudentState, Metrics]] | None = None,
    ) -> None:
        tokens, lengths = prompts
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
            raise ValueError(
                f"prompts must be ids [N, P] and lengths [N], got {tokens.shape} and {lengths.shape}"
            )
        if (config.student_share < 1) != (teacher_texts is not None):
            raise ValueError(
                f"student_share={config.student_share}: below 1 the teacher's texts are needed, at 1 never used"
            )
        if (divergence is None) != (teacher is None):
            raise ValueError(
                "a divergence is towards a teacher; give both, or neither for the sampled objective"
            )
        if (base is None) != (config.trainable == "params"):
            raise ValueError(f"trainable={config.trainable!r}: base is for adapters, and adapters need it")
        if divergence is None and sampling.temperature == 0:
            raise ValueError(
                "greedy samples are no draws from the student; the sampled objective needs temperature > 0"
            )
        layout = (tokens.shape[1] + sampling.max_new_tokens, tokens.shape[1])
        if teacher_texts is not None:
            own = teacher_texts.student
            if own.vocabulary_hash != vocabulary_hash:
                raise ValueError(
                    f"teacher_texts.student is of vocabulary {own.vocabulary_hash!r}, not {vocabulary_hash!r}; "
                    "encode the teacher's texts with the student's tokenizer"
                )
            if (own.tokens.shape[1], own.prompt_size) != layout or not len(own.tokens):
                raise ValueError(
                    f"teacher_texts have (slots, prompt slots) {(own.tokens.shape[1], own.prompt_size)}, rollouts "
                    f"{layout}; pack them with the prompt size and max_new_tokens of the sampler"
                )
        self._module, self._optimizer, self._config = module, optimizer, config
        self._prompts, self._score = prompts, score
        self._base, self._teacher, self._teacher_texts = base, teacher, teacher_texts
        self._sampler = make_sampler(module, sampling, (tokens.shape[1],))
        self._hash = vocabulary_hash
        self._update = update or make_on_policy_update(module, optimizer, config, divergence)

    @property
    def rows(self) -> int:
        """B, rows of a batch."""
        return self._config.prompts_per_step * self._sampler.config.num_samples

    def start(self, trainable: Params, key: jax.Array) -> OnPolicyState:
        """A state at step 0, also the shape of a state to restore. trainable is copied; key: key[] of the run.

        Raises:
          ValueError: a ring that is smaller than a batch.
        """
        state = OnPolicyState(init_student_state(trainable, self._optimizer), key)
        if not self._config.replay_rows:
            return state
        # What rows look like is known once the scorer has seen some.
        return dataclasses.replace(state, replay=init_replay(self.sample(state, 0), self._config.replay_rows))

    def source(self, state: OnPolicyState, step: int) -> str:
        """Where the batch of this step comes from: "fresh", "replay" or "teacher"."""
        from_student, from_replay = np.asarray(jax.random.uniform(_key(state, step, 0), (2,)))
        if from_student >= self._config.student_share:
            return TEACHER
        filled = state.replay is not None and int(state.replay.written) > 0
        return REPLAY if filled and from_replay < self._config.replay_share else FRESH

    def sample(self, state: OnPolicyState, step: int) -> OnPolicyBatch:
        """The student's samples for the prompts of this step, judged."""
        tokens, lengths = self._prompts
        chosen = batch_rows(len(tokens), self._config.prompts_per_step, self._config.order_seed, step)
        weights = student_weights(
            state.student.trainable, self._base, self._config.trainable, self._config.scale
        )
        rollouts = self._sampler(
            weights.pop("params"),
            tokens[chosen],
            lengths[chosen],
            row_keys(_key(state, step, 1), self.rows),
            vocabulary_hash=self._hash,
            **weights,
        )
        rollouts = self._place(rollouts)
        texts = self._score(np.repeat(chosen, self._sampler.config.num_samples), rollouts)
        return OnPolicyBatch(texts, rollouts.lp)

    def __call__(self, state: OnPolicyState, learning_rate: float = 1.0) -> tuple[OnPolicyState, Metrics]:
        """(state after one step, metrics); the state's student is donated. Metrics also tell "from_student"."""
        step = int(state.student.step)
        source, replay = self.source(state, step), state.replay
        if source == TEACHER:
            assert self._teacher_texts is not None
            count = len(self._teacher_texts.lp_t)
            texts = take_rows(
                self._teacher_texts, batch_rows(count, self.rows, self._config.order_seed, step)
            )
            batch = OnPolicyBatch(texts, np.zeros(texts.end_s.shape, np.float32))  # type: ignore[arg-type]
        elif source == REPLAY:
            assert replay is not None
            batch = draw_rows(replay, _key(state, step, 2), self.rows)
        else:
            batch = self.sample(state, step)
            replay = None if replay is None else push_rows(replay, batch)
        student, metrics = self._update(
            state.student,
            self._base,
            self._teacher,
            self._place(batch),
            np.bool_(source != TEACHER),
            jnp.float32(learning_rate),
        )
        metrics["from_student"] = jnp.float32(source != TEACHER)
        return OnPolicyState(student, state.key, replay), metrics

    def _place(self, tree: Any) -> Any:
        mesh = self._module.mesh
        return tree if mesh is None else place_batch(tree, mesh)


def train_on_policy(
    step: OnPolicyStep,
    state: OnPolicyState,
    steps: int,
    learning_rate: Callable[[int], float],
    on_step: Callable[[int, OnPolicyState, Metrics], None] | None = None,
) -> OnPolicyState:
    """Steps until the state's own counter is `steps`; a restored state goes on where it was saved.

    Args:
      learning_rate: step -> factor of the optimizer's update.
      on_step: called with (steps done, state, metrics) after each step: to log, and to save the state.
    """
    for done in range(int(state.student.step), steps):
        state, metrics = step(state, learning_rate(done))
        if on_step is not None:
            on_step(done + 1, state, metrics)
    return state


def _key(state: OnPolicyState, step: int, purpose: int) -> jax.Array:
    """key[]; 0: the source, 1: sampling, 2: drawing old rows."""
    return jax.random.fold_in(jax.random.fold_in(state.key, step), purpose)
