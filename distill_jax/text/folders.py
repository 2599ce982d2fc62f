"""Hugging Face tokenizer folders: reading those of others, and writing ours so that transformers opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from distill_jax.text.sentencepiece_vocabulary import read_sentencepiece
from distill_jax.text.token_ids import TokenizerSettings

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_OUR_KEY = "distill_jax"  # what transformers has no name for
# Fields that mean nothing to this project and something to those who open the folder that it writes.
_FURTHER = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


def read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Reads `tokenizer.json` (or `tokenizer.model`) and the configs beside it.

    Raises:
      FileNotFoundError: no such folder, or no tokenizer in it.
      ValueError: a malformed file, named in the message.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer folder at {folder}")
    config = _read_json(folder / CONFIG_FILE)
    if (folder / TOKENIZER_FILE).is_file():
        backend = read_backend(folder / TOKENIZER_FILE)
        base = post_processor_settings(backend)
    elif (folder / "tokenizer.model").is_file():
        backend, base = read_sentencepiece(folder / "tokenizer.model", add_bos=True)
    else:
        present = ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "nothing"
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model, found {present}"
        )
    _add_declared_tokens(backend, config, folder / CONFIG_FILE)

    def token_id(key: str, default: int | None) -> int | None:
        content = _content(config.get(key))
        if content is None:
            return default
        index = backend.token_to_id(content)
        if index is None:
            raise ValueError(
                f"{folder / CONFIG_FILE} names the {key} {content!r}, which is not in the vocabulary"
            )
        return index

    generation = _read_json(folder / "generation_config.json")
    model = _read_json(folder / "config.json")
    declared = generation.get("eos_token_id", model.get("eos_token_id"))
    if declared is None:
        declared = model.get("text_config", {}).get("eos_token_id")
    ours = config.get(_OUR_KEY, {})
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    bos_id = token_id("bos_token", base.bos_id)
    add_bos = config.get("add_bos_token")
    settings = TokenizerSettings(
        bos_id=bos_id,
        eos_id=token_id("eos_token", base.eos_id),
        pad_id=token_id("pad_token", base.pad_id),
        eos_ids=tuple(sorted({*ends, *ours.get("eos_ids", ())})),
        add_bos=(base.add_bos if add_bos is None else bool(add_bos)) and bos_id is not None,
        chat_template=_chat_template(folder, config),
        vocab_size=ours.get("vocab_size"),
        further={key: config[key] for key in _FURTHER if key in config},
    )
    return backend, settings


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a tokenizer.json.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at {path}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is truncated, or not a tokenizer.json: {error}") from error


def post_processor_settings(backend: tokenizers.Tokenizer) -> TokenizerSettings:
    """Whether the post-processor of a tokenizer puts a token before a text, and which: that is BOS."""
    with_specials = backend.encode("a", add_special_tokens=True).ids
    plain = backend.encode("a", add_special_tokens=False).ids
    if with_specials[:1] != plain[:1]:
        return TokenizerSettings(bos_id=with_specials[0], add_bos=True)
    return TokenizerSettings()


def write_folder(folder: Path, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    The beginning-of-sequence token is written as a post-processor too, where older readers look for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(backend.to_str())
    state["post_processor"] = None
    names = {
        key: backend.id_to_token(index)
        for key, index in (
            ("bos_token", settings.bos_id),
            ("eos_token", settings.eos_id),
            ("pad_token", settings.pad_id),
        )
        if index is not None
    }
    if settings.add_bos and settings.bos_id is not None:
        bos = names["bos_token"]
        template = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, settings.bos_id)]
        )
        state["post_processor"] = json.loads(template.__getstate__())
    unknown = getattr(backend.model, "unk_token", None)
    config: dict[str, Any] = {
        **settings.further,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **({"unk_token": unknown} if unknown else {}),
        "add_bos_token": settings.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        _OUR_KEY: {"eos_ids": list(settings.eos_ids), "vocab_size": settings.vocab_size},
    }
    if settings.chat_template is not None:
        config["chat_template"] = settings.chat_template
    (folder / TOKENIZER_FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _content(token: Any) -> str | None:
    """The text of a token that a config spells as a string, or as an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Adds what `added_tokens_decoder` declares and the tokenizer file lacks (folders with a `.model` only)."""
    declared = config.get("added_tokens_decoder", {})
    for index, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is not None:
            continue
        special = bool(token.get("special", False))
        backend.add_tokens([tokenizers.AddedToken(token["content"], special=special, normalized=False)])
        if backend.token_to_id(token["content"]) != int(index):
            raise ValueError(
                f"{path} declares the added token {token['content']!r} as id {index}, but the next free id is "
                f"{backend.token_to_id(token['content'])}"
            )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default chat template: in a file of its own, which wins as it does in transformers, or of the config."""
    template = config.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"the chat_template of {folder} is a {type(template).__name__}, expected text")
    return template
