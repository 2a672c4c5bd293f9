"""Codecs on disk, in the package and on the hub: what is written comes back, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from small_codec import as_upstream_stores_it, small, tone

from snac_core.codec import PRESETS, SNAC
from snac_core.errors import UserError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def same(first: SNAC, second: SNAC) -> bool:
    return first.config == second.config and first.digest == second.digest


def test_what_is_saved_comes_back_equal_and_in_eval_mode(tmp_path: Path) -> None:
    codec = small(attentive=True).train()
    codec.save_pretrained(tmp_path / "base")
    loaded = SNAC.from_pretrained(tmp_path / "base")
    assert same(codec, loaded)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["config.json", "model.safetensors"]


def test_a_frozen_codec_saves_what_it_would_have_saved_unfrozen(tmp_path: Path) -> None:
    codec = small()
    codec.save_pretrained(tmp_path / "a")
    codec.freeze().save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_upstreams_file_layout_loads(tmp_path: Path) -> None:
    codec = small()
    assert same(SNAC.from_pretrained(str(as_upstream_stores_it(codec, tmp_path / "up"))), codec)


def test_the_bundled_base_speaks_and_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    codec = SNAC.from_pretrained("tiny")
    assert (codec.name, codec.sampling_rate, codec.training) == ("tiny", 16_000, False)
    with torch.no_grad():
        audio_hat, codes = codec(tone(1, 16_000))
    assert audio_hat.shape == (1, 1, 16_000)
    assert audio_hat.abs().max() > 0.01
    assert len(codes) == codec.n_codebooks >= 3


def test_loading_moves_no_random_stream(saved: Path) -> None:
    state = torch.get_rng_state()
    SNAC.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_config_round_trips_through_json_and_presets() -> None:
    codec = small()
    again = SNAC.from_config(json.loads(json.dumps(codec.config)))
    assert again.config == codec.config
    assert codec.config["latent_dim"] == 16
    narrow = {"encoder_dim": 8, "decoder_dim": 128, "codebook_size": 8}
    for preset in PRESETS.values():
        config = SNAC(**{**preset, **narrow}).config
        assert config == {**preset, **narrow, "latent_dim": 128}
        assert SNAC.from_config(config).config == config


def test_half_precision_weights_are_loaded_as_floats(saved: Path) -> None:
    state = {key: value.half() for key, value in SNAC.from_pretrained(saved).state_dict().items()}
    save_file(state, saved / "model.safetensors")
    assert {value.dtype for value in SNAC.from_pretrained(saved).state_dict().values()} == {torch.float32}


def test_a_save_that_fails_leaves_what_stood_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = SNAC.from_pretrained(saved)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small().save_pretrained(saved)
    assert same(SNAC.from_pretrained(saved), before)
    assert len(list(saved.iterdir())) == 2, "nothing half-written is left behind"


# -------------------------------------------------------------------- the hub


def hub(folder: Path, *names: str) -> Any:
    """A stand-in for the hub with these files of `folder`."""

    def download(repo_id: str, filename: str, **options: Any) -> str:
        assert repo_id == "someone/base"
        assert options.get("revision") in ("v1", folder.name)  # the commit, once the first file is there
        if filename not in names:
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {filename}")
        return str(folder / filename)

    return download


def test_the_hub_is_asked_for_safetensors_first_and_pickled_weights_else(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "huggingface_hub.hf_hub_download"
    old = as_upstream_stores_it(small(), tmp_path / "old")
    monkeypatch.setattr(where, hub(saved, "config.json", "model.safetensors"))
    new = SNAC.from_pretrained("someone/base", revision="v1")
    assert same(new, SNAC.from_pretrained(saved))
    assert new.name == "someone/base"
    monkeypatch.setattr(where, hub(old, "config.json", "pytorch_model.bin"))
    assert same(SNAC.from_pretrained("someone/base", "v1"), SNAC.from_pretrained(old))
    monkeypatch.setattr(where, hub(old, "config.json"))
    with pytest.raises(UserError, match=r"cannot fetch 'someone/base'.*bundled: tiny"):
        SNAC.from_pretrained("someone/base", "v1")


def test_the_hubs_cache_serves_without_a_network(tmp_path: Path) -> None:
    codec = small()
    repository = tmp_path / "models--someone--base"
    commit = "0" * 40
    as_upstream_stores_it(codec, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    assert same(SNAC.from_pretrained("someone/base", cache_dir=tmp_path, local_files_only=True), codec)
    with pytest.raises(UserError, match="cannot fetch 'someone/other'"):
        SNAC.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)
