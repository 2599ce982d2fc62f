"""The small models that a text is to be easy or hard for: one proxy, or several with tokenizers of their own.

Each proxy reads the same texts in its own prompt style and its own tokens. What it says is put together with what the
others say by `calibration.proxy_weights`; one proxy is the ensemble of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from distill_jax.models.model import Model
from distill_jax.rft.answer_utility import AnswerScores, answer_lp_per_byte, with_gold_answer
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.micro_batches import count_pieces
from distill_jax.rft.texts import (
    EncodedTexts,
    encode_completions,
    encode_prompts,
    end_of_text_id,
    plain_scores,
    put,
    require_tokenizer,
)
from distill_jax.tasks.base import Problem
from distill_jax.text.token_ids import TokenIds


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A small model by name; prompt_style: see `texts.encode_prompts`."""

    name: str
    model: Model
    prompt_style: str = "auto"

    def with_params(self, params: object) -> Proxy:
        """The same proxy with other weights of the same shapes and places."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, params=params))


@dataclasses.dataclass(frozen=True)
class ProxyScores:
    """What one proxy says about B completions.

    Attributes:
      name: of the proxy.
      lp: f32[B, Tc], plain log-probs of its own tokens.
      encoded: these tokens.
      answer: of the gold answer after each trace; None unless asked for.
    """

    name: str
    lp: jax.Array
    encoded: EncodedTexts
    answer: AnswerScores | None = None


def as_proxies(proxy: Model | Sequence[Proxy], config: CalibrationConfig) -> tuple[Proxy, ...]:
    """A model alone becomes the proxy "proxy" in the config's prompt style.

    Raises:
      ValueError: no proxy or two of one name, several without `config.ensemble` or one with it, or one without a
        tokenizer.
    """
    proxies = (
        (Proxy("proxy", proxy, config.proxy_prompt_style),) if isinstance(proxy, Model) else tuple(proxy)
    )
    names = [own.name for own in proxies]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected proxies of different names, at least one; got {names}")
    if (len(proxies) > 1) != (config.ensemble is not None):
        raise ValueError(
            f"got {len(proxies)} proxies {names} with ensemble={config.ensemble!r}; an ensemble ('mean', 'min' or "
            "'max') says how several proxies count together, and one proxy has none"
        )
    for own in proxies:
        require_tokenizer(own.model, f"the proxy {own.name!r}")
    return proxies


def score_by_proxies(
    proxies: Sequence[Proxy],
    problems: Sequence[Problem],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    config: CalibrationConfig,
    answer_mark: str | None = None,
) -> tuple[ProxyScores, ...]:
    """Encodes and scores completions with every proxy; returns while the device is still at work.

    Args:
      problems: Q of them; row b belongs to problem b // (B / Q).
      texts, ended: B completions.
      answer_mark: score the gold answer after each trace too, see `answer_utility`.
    """
    found = []
    for proxy in proxies:
        prompts = encode_prompts(
            require_tokenizer(proxy.model, "the proxy"),
            [problem.prompt for problem in problems],
            proxy.prompt_style,
            config.system,
        )
        prompts = [prompt for prompt in prompts for _ in range(len(texts) // len(problems))]
        encoded = _encode(proxy, prompts, texts, ended, config)
        lp = score_encoded(proxy, encoded, config)
        answer = None
        if answer_mark is not None:
            of_rows = [problem for problem in problems for _ in range(len(texts) // len(problems))]
            answered = with_gold_answer(of_rows, texts, answer_mark)
            own = _encode(proxy, prompts, answered.texts, [False] * len(texts), config)
            value = answer_lp_per_byte(
                score_encoded(proxy, own, config), own.byte_ends, answered.first_byte, answered.bytes
            )
            answer = AnswerScores(value, answered.known & own.usable)
        found.append(ProxyScores(proxy.name, lp, encoded, answer))
    return tuple(found)


def score_encoded(proxy: Proxy, encoded: EncodedTexts, config: CalibrationConfig) -> jax.Array:
    """f32[B, Tc]: plain log-probs of texts in the proxy's tokens, as many rows at a time as an update takes."""
    model, rft = proxy.model, config.rft
    micro_rows = config.prompts_per_step * rft.num_samples // rft.micro_batches
    pieces = count_pieces(encoded.sequences.tokens.shape[0], micro_rows, model.mesh)
    sequences = put(encoded.sequences, model)
    return plain_scores(model.module, model.params, sequences, chunk=rft.logit_chunk, pieces=pieces)


def _encode(
    proxy: Proxy,
    prompts: list[TokenIds],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    config: CalibrationConfig,
) -> EncodedTexts:
    tokenizer = require_tokenizer(proxy.model, "the proxy")
    return encode_completions(
        tokenizer,
        prompts,
        texts,
        ended,
        end_id=end_of_text_id(tokenizer, proxy.prompt_style),
        prompt_sizes=config.proxy_prompt_sizes,
        completion_sizes=config.proxy_completion_sizes,
    )
