"""Names on the hub: what is asked of it, what is read from its cache, and what is said where there is no network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError

from distill_jax.models import hub
from distill_jax.models.classifier import load_classifier
from distill_jax.models.model import load_model
from tests.models.hub_cache import COMMIT, put_in_cache
from tests.models.small_models import GOLDENS, answers


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub, and no network, whatever the environment says."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Requests to `snapshot_download`, which gives the small Llama back."""
    requests = []

    def snapshot_download(name, **options):
        requests.append((name, options))
        return str(GOLDENS / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_a_name_is_fetched_as_numbers_and_text_alone(asked):
    model = load_model("hf://some-org/Model_1.5@refs/pr/7")
    np.testing.assert_array_equal(
        model.logits(answers("llama")["tokens"]),
        load_model(GOLDENS / "llama").logits(answers("llama")["tokens"]),
    )
    ((name, options),) = asked
    assert name == "some-org/Model_1.5" and options["revision"] == "refs/pr/7"
    files = [
        *(
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ),
        *("tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"),
    ]
    never = [
        *("pytorch_model.bin", "model.pt", "modeling_own.py", "consolidated.safetensors", "model.gguf"),
        *("original/params.json", "onnx/model.safetensors", "README.md", "training_args.bin", "x.pkl"),
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, *never],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == files


def test_nothing_is_fetched_that_was_not_named_so(asked):
    for name in ("some-org/model", "org/model@main", "hf:/org/model", "HF://org/model"):
        with pytest.raises(FileNotFoundError, match=r"no model at .* hf://ORGANISATION/NAME"):
            load_model(name)
    assert not asked


@pytest.mark.parametrize(
    "name", ["hf://", "hf://model", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://a b/c", "hf://a/b@v1@v2"]
)
def test_names_that_are_none_are_refused_before_anything_is_asked(name, asked):
    with pytest.raises(
        ValueError, match=r"is named hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"
    ):
        load_model(name)
    assert not asked


def test_without_a_network_the_cache_is_read(cache):
    snapshot = put_in_cache(cache, "some-org/small", GOLDENS / "llama")
    put_in_cache(cache, "some-org/old", GOLDENS / "qwen3", ref="v1")
    assert hub.find_in_cache("hf://some-org/small") == hub.fetch_from_hub("hf://some-org/small") == snapshot
    golden = answers("llama")
    logits = load_model("hf://some-org/small").logits(golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    assert load_model("hf://some-org/old@v1").spec.family == "qwen3"
    assert load_model(f"hf://some-org/old@{COMMIT}").spec.family == "qwen3"
    for name in ("hf://some-org/old", "hf://some-org/small@v1", "hf://some-org/none"):
        assert hub.find_in_cache(name) is None
        with pytest.raises(FileNotFoundError, match=f"'{name}' is not in the cache .* give its path instead"):
            load_model(name)
    with pytest.raises(
        FileNotFoundError, match="hf download some-org/small --revision v1 --local-dir FOLDER"
    ):
        load_classifier("hf://some-org/small@v1")


def test_a_run_with_a_network_starts_before_its_models_are_fetched(asked, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.check_hub_name("hf://some-org/small")
    assert not asked


class _Answer:
    """As much of a server's answer as an error of huggingface_hub looks at."""

    status_code, headers, text, request = 404, {}, "", None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.GatedRepoError, "is gated: accept its terms"),
        (huggingface_hub.errors.RepositoryNotFoundError, "the hub has no such model, or it is private"),
        (huggingface_hub.errors.RevisionNotFoundError, "the hub has no revision 'v9'"),
        (HfHubHTTPError, r"cannot be fetched \(HfHubHTTPError: server.*hf download a/b --revision v9"),
    ],
)
def test_what_the_hub_says_no_to(monkeypatch, error, message):
    def refuse(name, **options):
        raise error("server", response=_Answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=message):
        load_model("hf://a/b@v9")


def test_a_connection_that_breaks_and_a_disk_that_is_full_say_what_to_do(monkeypatch):
    for error in (ConnectionError("reset"), OSError(28, "No space left on device"), RuntimeError("proxy")):

        def fail(name, error=error, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(FileNotFoundError, match=f"{type(error).__name__}: .*local-dir FOLDER"):
            hub.fetch_from_hub("hf://a/b")
