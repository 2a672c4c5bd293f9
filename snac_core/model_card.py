"""Model cards: what a hub page says of strategies, or of a base, generated from the model itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from snac_core.hub import is_hub_id

if TYPE_CHECKING:
    from snac_core.codec import SNAC


LIBRARY = "snac-conditioning"
TAGS = ["neural-audio-codec", "snac"]
TASK = "audio-to-audio"


def strategies_card(described: Mapping[str, Any], parameters: int) -> str:
    """A README.md for conditioning strategies.

    Args:
        described: what config.json holds; see `snac_core.checkpoint.describe`.
        parameters: how many are trained.
    """
    base = described["base"]
    name, encoder = base["name"] or "unnamed", described["speaker_encoder"] or {"name": "none", "digest": None}
    title = " + ".join(s["name"] for s in described["strategies"]) or "no strategy"
    evaluation = described.get("evaluation")
    settings = (
        (f"`{s['name']}`", f"`{json.dumps(s['config'], sort_keys=True)}`", f"`{s['module']}`")
        for s in described["strategies"]
    )
    belongs = [("base", f"{name}{_at(base.get('revision'))}", _code(base["digest"]))]
    belongs.append(("speaker encoder", encoder["name"], _code(encoder["digest"])))
    return f"""---
{_front_matter(title, [*TAGS, "voice-conversion"], evaluation, base_model=name if is_hub_id(name) else None)}
---
# {title} on {name}

Conditioning strategies for a frozen SNAC codec: {parameters:,} parameters. The base is not included.

{_table(("strategy", "settings", "module"), settings)}

{_table(("belongs to", "name", "sha256"), belongs)}
{_figures(evaluation)}
```python
from snac_core import ConditionedCodec

model = ConditionedCodec.from_pretrained("this folder or repository")
```
"""


def base_card(codec: SNAC) -> str:
    """A README.md for a codec."""
    frames = [codec.sampling_rate / codec.hop_length / stride for stride in codec.vq_strides]
    rates = ", ".join(f"{rate:.1f}" for rate in frames)
    parameters = sum(parameter.numel() for parameter in codec.parameters())
    title = codec.name.rsplit("/", 1)[-1] or "SNAC codec"
    return f"""---
{_front_matter(title, TAGS, None)}
---
# {title}

A SNAC codec: {codec.sampling_rate:,} Hz, {len(frames)} codebooks of {codec.codebook_size} entries at {rates} Hz,
{parameters:,} parameters. sha256 over configuration and weights: `{codec.digest}`.

```python
from snac_core import SNAC

codec = SNAC.from_pretrained("this folder or repository")
```
"""


def _front_matter(title: str, tags: list[str], evaluation: Mapping[str, Any] | None, **more: Any) -> str:
    results = [
        EvalResult(
            task_type=TASK, dataset_type="speech", dataset_name=str(evaluation["about"].get("data") or "speech"),
            metric_type=name, metric_name=name, metric_value=figure["mean"],
        )
        for name, figure in evaluation["metrics"].items()
        if figure["mean"] is not None
    ] if evaluation else None  # fmt: skip
    data = ModelCardData(
        library_name=LIBRARY, tags=tags, pipeline_tag=TASK, eval_results=results or None,
        model_name=title if results else None, **more,
    )  # fmt: skip
    return str(data.to_yaml()).strip()


def _figures(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    rows = (
        (name, _number(f["mean"]), f["unit"], _ARROWS[f["direction"]], f"{f['n_ok']}/{f['n']}")
        for name, f in evaluation["metrics"].items()
    )
    about = ", ".join(f"{key} {value}" for key, value in evaluation["about"].items())
    return f"""
## Evaluation

Of these very weights, by `runner`: {about}. One run says nothing of the spread over seeds; its study's report does.

{_table(("metric", "mean", "unit", "better", "measured"), rows)}
"""


_ARROWS = {"up": "↑", "down": "↓"}


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _code(text: str | None) -> str:
    return f"`{text}`" if text else "—"


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""
