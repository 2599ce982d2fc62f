"""Renders a question as the text of a prompt: plainly, or through the model's chat template."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from distill_jax.text.tokenizers import Tokenizer

STYLES = ("auto", "plain", "chat")
# What a template that asks for the date is told: always the same, so that a prompt is the same tomorrow.
TODAY = datetime.datetime(2024, 7, 26)


def render_prompt(
    tokenizer: Tokenizer, user_text: str, style: str = "auto", system: str | None = None
) -> str:
    """The prompt text that asks a model one question; encode it with `Tokenizer.encode_prompt`.

    plain:  "{system}\\n\\n" (where there is one) + "Question: {user_text}\\nAnswer:"
    chat:   the tokenizer's chat template on [system, user], with add_generation_prompt=True
    auto:   chat where the tokenizer has a template, else plain

    Templates come with models and are untrusted: they run in jinja2's immutable sandbox, without a loader.

    Args:
      tokenizer: whose template, and names of special tokens, are used.
      user_text: the question.
      style: "auto", "plain" or "chat".
      system: what goes before the question, if anything.

    Raises:
      ValueError: an unknown style, "chat" without a template, or a template that fails or refuses the conversation.
    """
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}; expected one of {', '.join(STYLES)}")
    if style == "plain" or (style == "auto" and tokenizer.chat_template is None):
        head = "" if system is None else f"{system}\n\n"
        return f"{head}Question: {user_text}\nAnswer:"
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer!r} has no chat template; use the style 'plain' or 'auto'")
    return _render(tokenizer, _messages(user_text, system), add_generation_prompt=True)


def render_answered(tokenizer: Tokenizer, user_text: str, answer: str, system: str | None = None) -> str:
    """A question with its answer, as a finished conversation; encode it with `Tokenizer.encode_prompt`.

    The tokenizer's chat template on [system, user, assistant], without a generation prompt; without a template the
    plain prompt of `render_prompt`, a space and the answer.

    Raises:
      ValueError: a template that fails or refuses the conversation.
    """
    if tokenizer.chat_template is None:
        return f"{render_prompt(tokenizer, user_text, 'plain', system)} {answer}"
    messages = [*_messages(user_text, system), {"role": "assistant", "content": answer}]
    return _render(tokenizer, messages, add_generation_prompt=False)


def _messages(user_text: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": user_text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    assert tokenizer.chat_template is not None
    special_ids = {
        "bos_token": tokenizer.settings.bos_id,
        "eos_token": tokenizer.settings.eos_id,
        "pad_token": tokenizer.settings.pad_id,
    }
    names = {name: tokenizer.id_to_token(index) for name, index in special_ids.items() if index is not None}
    try:
        template = _compile(tokenizer.chat_template)
        # Without tools and documents, which templates ask about by `is none` as well as by `is defined`.
        return template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **names,
        )
    # A template is a program: it can end in any error, its own raise_exception and the sandbox's refusals among them.
    except Exception as error:
        raise ValueError(
            f"the chat template of {tokenizer!r} failed ({type(error).__name__}: {error}); mend the template, leave "
            "out what it refuses (a system text, often), or use the style 'plain'"
        ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, by which templates mark assistant text: rendered as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """Compiles a template as transformers does: trimmed blocks, loop controls, `tojson` that keeps its letters."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
