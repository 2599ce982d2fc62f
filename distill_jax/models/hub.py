"""Models by their name on the Hugging Face hub: "hf://ORGANISATION/NAME", or "hf://ORGANISATION/NAME@REVISION".

The prefix is what asks for a download: a folder that was misspelled is never looked for on a network. Only files that
hold numbers or text are fetched, from the top folder of the repository: a pickle or a Python file is not even stored.
The cache, the token of gated models and HF_HUB_OFFLINE are those of huggingface_hub; without a network, or with
HF_HUB_OFFLINE=1, what is in the cache is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PREFIX = "hf://"
# Weights; settings, index and tokenizer; chat templates and vocabularies.
FETCHED = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
# Conversions for other programs in folders of their own, and the second copy of the weights that Mistral publishes.
LEFT_OUT = ("*/*", "consolidated*")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_name(source: object) -> bool:
    """Whether a source is written as a name on the hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def split_name(source: str) -> tuple[str, str | None]:
    """(ORGANISATION/NAME, revision or None) of a name on the hub.

    Raises:
      ValueError: it is not of that form.
    """
    found = _NAME.fullmatch(source.removeprefix(PREFIX)) if is_hub_name(source) else None
    if found is None:
        raise ValueError(
            f"a model on the hub is named {PREFIX}ORGANISATION/NAME or {PREFIX}ORGANISATION/NAME@REVISION, "
            f"got {source!r}"
        )
    return found[1], found[2]


def fetch_from_hub(source: str) -> Path:
    """The folder of a model on the hub, fetched unless it is in the cache.

    Args:
      source: "hf://ORGANISATION/NAME[@REVISION]"; a branch, tag or commit, by default "main".

    Raises:
      ValueError: a name of another form.
      FileNotFoundError: there is no such model or revision, it is gated, or there is no network and it is not in the
        cache; says what to do.
    """
    return _snapshot(source, cached=False)


def find_in_cache(source: str) -> Path | None:
    """The folder of a model on the hub that was fetched before, None where it was not. Never looks on a network.

    Raises:
      ValueError: a name of another form.
    """
    try:
        return _snapshot(source, cached=True)
    except FileNotFoundError:
        return None


def check_hub_name(source: str) -> None:
    """What can be said about a name before anything is fetched.

    Raises:
      ValueError: a name of another form.
      FileNotFoundError: HF_HUB_OFFLINE is set, and the model is not in the cache.
    """
    split_name(source)
    if constants.HF_HUB_OFFLINE:
        _snapshot(source, cached=True)


def _snapshot(source: str, cached: bool) -> Path:
    name, revision = split_name(source)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FETCHED),
            ignore_patterns=list(LEFT_OUT),
            local_files_only=cached,
        )
    except HFValidationError as error:
        raise ValueError(f"{source!r} is no name on the hub: {error}") from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{source!r} is gated: accept its terms on its page, then log in here (hf auth login) or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"revision {revision!r}" if isinstance(error, RevisionNotFoundError) else "such model"
        raise FileNotFoundError(
            f"{source!r}: the hub has no {what}, or it is private; look at its page, and for a private one log in "
            "(hf auth login) or set HF_TOKEN"
        ) from error
    except (
        Exception
    ) as error:  # of a transport, a proxy, a disk: many libraries' classes, and one thing to do
        revised = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{source!r} is not in the cache of this machine and cannot be fetched "
            f"({type(error).__name__}: {str(error).partition('. ')[0].strip()}); where there is a network, run: "
            f"hf download {name}{revised} --local-dir FOLDER, copy that folder here, and give its path instead"
        ) from error
    return Path(folder)
