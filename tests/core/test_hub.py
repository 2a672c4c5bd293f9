"""Strategies and bases on a hub: a server here stands in for its storage, huggingface_hub is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load, save
from small_codec import small, tone
from toy_strategies import Gain, Level, Shift, learned, speakers

from snac_core import SNAC, ConditionedCodec, UserError
from snac_core.plugins import Catalogue, Origin


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub without repositories, an empty cache, and no token."""
    hub = HubServer()
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    thread = Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def offered() -> Catalogue:
    catalogue = Catalogue()
    for strategy in (Shift, Gain, Level):
        catalogue.strategies.add(strategy, Origin("toys"))
    return catalogue


@pytest.fixture
def model() -> ConditionedCodec:
    return learned(Shift, Gain, config={"shift": {"taps": ("encoder_1", "latent"), "strength": 0.5}})


def outputs(model: ConditionedCodec) -> torch.Tensor:
    torch.manual_seed(1)
    with model.codec.fixed_noise(1):
        return model(tone(), speakers(2))[0]


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# -------------------------------------------------------------------- there and back


def test_strategies_and_their_base_come_back_from_the_hub(
    hub: HubServer, offered: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    small().push_to_hub("me/base", token="secret")
    model = learned(Shift, Gain, codec=SNAC.from_pretrained("me/base"))
    address = model.push_to_hub("me/adapter", token="secret")
    assert address == f"{hub.address}/me/adapter"
    files = hub.repositories["me/adapter"].commits[hub.repositories["me/adapter"].branches["main"]]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert b"base_model: me/base" in files["README.md"]
    assert model.codec.digest in files["README.md"].decode()
    loaded = ConditionedCodec.from_pretrained("me/adapter", plugins=offered)
    assert torch.equal(outputs(loaded), outputs(model))

    offline(monkeypatch)
    asked = len(hub.requests)
    cached = ConditionedCodec.from_pretrained("me/adapter", plugins=offered)
    assert torch.equal(outputs(cached), outputs(model))
    assert len(hub.requests) == asked, "offline, nothing is asked of the hub"


def test_a_path_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for find in (ConditionedCodec.from_pretrained, SNAC.from_pretrained):
        with pytest.raises(UserError, match="no folder runs/phase66; runs is a folder here"):
            find("runs/phase66")
    assert not hub.requests


def test_a_base_comes_back_with_its_card(hub: HubServer) -> None:
    codec = small()
    codec.push_to_hub("me/base", token="secret")
    loaded = SNAC.from_pretrained("me/base")
    assert (loaded.digest, loaded.name) == (codec.digest, "me/base")
    assert loaded.revision == hub.repositories["me/base"].branches["main"]
    card = hub.repositories["me/base"].commits[str(loaded.revision)]["README.md"].decode()
    assert codec.digest in card
    assert "library_name: snac-conditioning" in card


def test_a_branch_and_a_commit_are_found_by_their_name(
    hub: HubServer, model: ConditionedCodec, offered: Catalogue
) -> None:
    model.push_to_hub("me/adapter", token="secret")
    first = hub.repositories["me/adapter"].branches["main"]
    old = outputs(model)
    with torch.no_grad():
        next(model.strategies.parameters()).add_(0.1)
    model.push_to_hub("me/adapter", token="secret", revision="louder")
    for revision, expected in ((None, old), (first, old), ("louder", outputs(model))):
        loaded = ConditionedCodec.from_pretrained("me/adapter", codec=model.codec, plugins=offered, revision=revision)
        assert torch.equal(outputs(loaded), expected), revision
    with pytest.raises(UserError, match=r"cannot fetch .*me/adapter.*quieter"):
        ConditionedCodec.from_pretrained("me/adapter", codec=model.codec, plugins=offered, revision="quieter")


def test_strategies_find_the_commit_of_the_base_that_they_were_trained_on(hub: HubServer, offered: Catalogue) -> None:
    small().push_to_hub("me/base", token="secret")
    model = learned(Gain, codec=SNAC.from_pretrained("me/base"))
    model.push_to_hub("me/adapter", token="secret")
    other = small()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.push_to_hub("me/base", token="secret")
    assert SNAC.from_pretrained("me/base").digest != model.codec.digest
    assert ConditionedCodec.from_pretrained("me/adapter", plugins=offered).codec.digest == model.codec.digest


def test_a_private_repository_opens_for_its_token_alone(
    hub: HubServer, model: ConditionedCodec, offered: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_to_hub("me/adapter", token="secret", private=True)
    given: dict[str, Any] = {"codec": model.codec, "plugins": offered}
    for token in (None, "wrong"):
        with pytest.raises(UserError, match=r"cannot fetch .*me/adapter") as caught:
            ConditionedCodec.from_pretrained("me/adapter", token=token, **given)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
    ConditionedCodec.from_pretrained("me/adapter", token="secret", **given)
    monkeypatch.setenv("HF_TOKEN", "secret")
    ConditionedCodec.from_pretrained("me/adapter", **given)


def test_pushing_without_the_right_to_write_is_one_line(hub: HubServer, model: ConditionedCodec) -> None:
    with pytest.raises(UserError, match=r"cannot push to 'me/adapter': .*401") as caught:
        model.push_to_hub("me/adapter", token="wrong")
    assert "\n" not in str(caught.value)
    assert not hub.repositories


def test_offline_what_is_not_cached_is_one_line(
    hub: HubServer, model: ConditionedCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(UserError, match=r"cannot fetch 'me/nothing' from the hub: config.json: "):
        ConditionedCodec.from_pretrained("me/nothing")
    with pytest.raises(UserError, match=r"cannot fetch 'me/nothing' .*; bundled: tiny"):
        SNAC.from_pretrained("me/nothing")
    with pytest.raises(UserError, match=r"cannot push to 'me/adapter'"):
        model.push_to_hub("me/adapter")


# -------------------------------------------------------------------- damaged and foreign files


def bomb(marker: Path) -> bytes:
    """A pickle that would touch `marker`."""
    import io

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return (Path.touch, (marker,))

    whole = io.BytesIO()
    torch.save({"shift": Bomb()}, whole)
    return whole.getvalue()


def test_a_file_that_is_truncated_misshapen_or_a_pickle_is_refused(
    hub: HubServer, model: ConditionedCodec, offered: Catalogue, tmp_path: Path
) -> None:
    model.push_to_hub("me/adapter", token="secret")
    repository = hub.repositories["me/adapter"]
    whole = repository.commits[repository.branches["main"]]["model.safetensors"]
    damages = {
        "not a complete safetensors file": whole[:100],
        "has shape": save({name: tensor.unsqueeze(0) for name, tensor in load(whole).items()}),
        "is missing": save({"gain.other": torch.ones(1)}),
        "is not a complete safetensors file": bomb(tmp_path / "executed"),
    }
    for words, data in damages.items():
        hub.damage("me/adapter", "model.safetensors", data)
        with pytest.raises(UserError, match=words):
            ConditionedCodec.from_pretrained("me/adapter", codec=model.codec, plugins=offered)
    assert not (tmp_path / "executed").exists()
    hub.damage("me/adapter", "model.safetensors", whole)
    ConditionedCodec.from_pretrained("me/adapter", codec=model.codec, plugins=offered)


def test_strategies_that_are_only_there_as_a_pickle_are_not_read(
    hub: HubServer, model: ConditionedCodec, offered: Catalogue, tmp_path: Path
) -> None:
    model.push_to_hub("me/adapter", token="secret")
    files = hub.repositories["me/adapter"].commits[hub.repositories["me/adapter"].branches["main"]]
    files["pytorch_model.bin"] = bomb(tmp_path / "executed")
    del files["model.safetensors"]
    with pytest.raises(UserError, match=r"cannot fetch 'me/adapter' from the hub: model.safetensors"):
        ConditionedCodec.from_pretrained("me/adapter", codec=model.codec, plugins=offered)
    assert not (tmp_path / "executed").exists()


def test_a_base_that_is_truncated_or_a_pickled_object_is_refused(hub: HubServer, tmp_path: Path) -> None:
    codec = small()
    codec.push_to_hub("me/base", token="secret")
    hub.damage("me/base", "model.safetensors", b"\x10")
    with pytest.raises(UserError, match=r"model.safetensors"):
        SNAC.from_pretrained("me/base")
    repository = hub.repositories["me/base"]
    del repository.commits[repository.branches["main"]]["model.safetensors"]
    hub.damage("me/base", "pytorch_model.bin", bomb(tmp_path / "executed"))
    with pytest.raises(UserError, match=r"never executed"):
        SNAC.from_pretrained("me/base")
    assert not (tmp_path / "executed").exists()


def test_a_download_that_breaks_off_is_refused_and_works_when_it_comes_whole(hub: HubServer) -> None:
    codec = small()
    codec.push_to_hub("me/base", token="secret")
    hub.short_by = 10
    with pytest.raises(UserError, match=r"cannot fetch 'me/base' from the hub"):
        SNAC.from_pretrained("me/base")
    hub.short_by = 0
    assert SNAC.from_pretrained("me/base").digest == codec.digest
