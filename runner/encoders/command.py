"""From folders of speech to a trained `ecapa_tiny` with its model card, and to a table of encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from snac_core import atomic
from snac_core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from runner.encoders.train import Settings
    from runner.encoders.trials import Embed, Trials, Verification
    from snac_core.speakers.encoder import SpeakerEncoder

Say = Callable[[str], None]
SYNTHETIC_SHARE = 0.25  # of the crops, where there is recorded speech too


def train(
    out: str | Path,
    data: Iterable[str | Path],
    settings: Settings,
    *,
    synthetic: int = 80,
    codec: str | None = "tiny",
    say: Say = print,
) -> Path:
    """Train on the train speakers of `data` and of synthetic ones; keep the checkpoint of the lowest dev EER.

    Args:
        out: folder for model.safetensors, training.jsonl and result.json; must not hold a model.
        data: folders of speech; the first one with a dev split chooses the checkpoint.
        settings: of the training.
        synthetic: espeak-ng speakers to add, held-out ones included (those are only measured on); 0: none.
        codec: name or folder of the codec whose output the encoder shall know; None: none.
        say: called with lines of progress.

    Raises:
        UserError: if `out` holds a model, there is no train speech, or no dev split to choose by.
    """
    from safetensors.torch import save

    from runner.data import open_corpus, synthesize
    from runner.encoders.train import train_speaker_encoder
    from runner.encoders.trials import trials_of
    from runner.encoders.voices import gather_voices
    from snac_core.speakers.ecapa_tiny import SAMPLE_RATE

    out = Path(out)
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a trained encoder; give another folder with --out")
    corpora = [open_corpus(path) for path in data]
    if synthetic:
        corpora.append(open_corpus(synthesize(out / "synthetic", speakers=synthetic, sentences=12)))
    if not corpora:
        raise UserError("no speech to train on; give --data DIR, or --synthetic N")
    measured = [corpus for corpus in corpora if corpus.splits.get("dev")]
    if not measured:
        raise UserError("no corpus has a dev split; the checkpoint is chosen by its equal error rate on dev")
    frozen = _codec(codec)
    begun = perf_counter()
    trials = [trials_of(measured[0], ("dev",), SAMPLE_RATE, codec=frozen)]
    shares = [1.0] * len(corpora)
    if synthetic and len(corpora) > 1:
        shares = [(1 - SYNTHETIC_SHARE) / (len(corpora) - 1)] * (len(corpora) - 1) + [SYNTHETIC_SHARE]
    voices = gather_voices(
        list(zip(corpora, shares, strict=True)),
        SAMPLE_RATE,
        codec=frozen,
        progress=lambda done, of: say(f"speech: {done} of {of} classes") if done % 100 == 0 or done == of else None,
    )
    prepared = perf_counter() - begun
    log: list[dict[str, float]] = []
    best: dict[str, Any] = {"eer": 2.0}

    def report(line: dict[str, float]) -> None:
        log.append(line)
        left = line["seconds"] / line["step"] * (settings.steps - line["step"])
        say(" ".join(f"{key} {value:.4g}" for key, value in line.items()) + f"; {left / 60:.0f} min left")

    def checkpoint(step: int, network: nn.Module) -> None:
        from torch.nn.functional import normalize

        found = measure(lambda audio, rate: normalize(network(audio[:, 0]), dim=-1), trials)
        eer = sum(v.eer for v in found.values()) / len(found)  # as recorded, and against the codec's output
        say(f"step {step}: " + "; ".join(f"{name}: {v}" for name, v in found.items()))
        if eer <= best["eer"]:
            best.update(eer=eer, step=step, trials={name: vars(v) for name, v in found.items()})
            atomic.write_bytes(out / "model.safetensors", save({k: v.clone() for k, v in network.state_dict().items()}))

    train_speaker_encoder(
        voices, settings, report=report, checkpoint=checkpoint, checkpoint_every=max(1, settings.steps // 8)
    )
    atomic.write_text(out / "training.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    result = {
        "settings": vars(settings),
        "best": best,
        "data": {corpus.name: corpus.digest for corpus in corpora},
        "classes": len(voices.names),
        "speakers": sum(len(corpus.speakers("train")) for corpus in corpora),
        "codec": None if frozen is None else {"name": codec, "digest": frozen.digest},
        "seconds": {"preparing": prepared, "training": log[-1]["seconds"] if log else None},
    }
    atomic.write_json(out / "result.json", result)
    say(f"the weights of step {best['step']} are in {out / 'model.safetensors'}")
    return out / "model.safetensors"


def measure(embed: Embed, trials: Iterable[Trials]) -> dict[str, Verification]:
    """Verification between parts of each corpus, by the corpus's name.

    Where there are parts after a codec also between those ("<name>, codec"), and between speech as recorded and the
    codec's output ("<name> x codec").
    """
    from runner.encoders.trials import embed_parts, verify

    found = {}
    for t in trials:
        recorded = embed_parts(t.parts, embed, t.sample_rate)
        found[t.name] = verify(t.parts, recorded)
        if t.coded:
            coded = embed_parts(t.coded, embed, t.sample_rate)
            found[f"{t.name}, codec"] = verify(t.parts, coded)
            found[f"{t.name} x codec"] = verify(t.parts, recorded, coded)
    return found


def compare(
    names: Iterable[str],
    data: Iterable[str | Path],
    *,
    splits: Iterable[str] = ("dev",),
    codec: str | None = "tiny",
    say: Say = print,
) -> list[dict[str, Any]]:
    """A row per encoder and kind of trial: size, speed, equal error rate, cosines; printed as a Markdown table.

    Speed is in seconds of speech per CPU second, on one thread.

    Args:
        names: of speaker encoders.
        data: folders of speech.
        splits: whose speakers are told apart.
        codec: name or folder of the codec whose output is measured too; None: none.
        say: called with lines.
    """
    from runner.data import open_corpus
    from runner.encoders.trials import trials_of
    from snac_core.speakers import load_speaker_encoder

    frozen = _codec(codec)
    sets = [trials_of(open_corpus(path), tuple(splits), 16000, codec=frozen) for path in data]
    rows = []
    say("| encoder | dimension | parameters | × real time | trials | EER % | same | different | genuine | impostor |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        encoder = load_speaker_encoder(name)
        size, speed = sum(p.numel() for p in encoder.parameters()), _speed(encoder, sets[0]) if sets else 0.0
        for which, v in measure(encoder, sets).items():
            about = {"dim": encoder.dim, "parameters": size, "speed": speed}
            rows.append({"encoder": name, "digest": encoder.digest, **about, "on": which, **vars(v)})
            genuine, impostor = v.trials
            say(
                f"| {name} | {encoder.dim} | {size:,} | {speed:.0f} | {which} | {100 * v.eer:.1f} | {v.same:.3f} | "
                f"{v.different:.3f} | {genuine} | {impostor} |"
            )
    return rows


def _speed(encoder: SpeakerEncoder, trials: Trials, *, items: int = 40) -> float:
    """Seconds of speech embedded per CPU second on one thread, each part by itself."""
    import torch

    waves = [part.audio.unsqueeze(0) for part in trials.parts[:items]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            encoder(waves[0], trials.sample_rate)
            begun = process_time()
            for wave in waves:
                encoder(wave, trials.sample_rate)
    finally:
        torch.set_num_threads(threads)
    return sum(wave.shape[-1] for wave in waves) / trials.sample_rate / (process_time() - begun)


def _codec(name: str | None) -> nn.Module | None:
    if name is None:
        return None
    from snac_core.codec import SNAC

    return SNAC.from_pretrained(name).freeze()
