"""Model cards: the README.md of strategies, or of a codec, on the hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from snac_core.hub import is_hub_id

LIBRARY = "snac-conditioning"
TAGS = ["neural-audio-codec", "snac"]
TASK = "audio-to-audio"


def strategies_card(described: Mapping[str, Any], parameters: int) -> str:
    """A README.md for conditioning strategies.

    Args:
        described: the content of config.json; see `snac_core.checkpoint.Description`.
        parameters: number of trained parameters.
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


def base_card(name: str, config: Mapping[str, Any], digest: str, parameters: int) -> str:
    """A README.md for a codec.

    Args:
        name: of the codec; "" if it has none.
        config: SNAC's constructor arguments.
        digest: sha256 (hex) over configuration and weights.
        parameters: their number.
    """
    rate = config["sampling_rate"]
    frames = [rate / math.prod(config["encoder_rates"]) / stride for stride in config["vq_strides"]]
    rates = ", ".join(f"{rate:.1f}" for rate in frames)
    title = name.rsplit("/", 1)[-1] or "SNAC codec"
    return f"""---
{_front_matter(title, TAGS, None)}
---
# {title}

A SNAC codec: {rate:,} Hz, {len(frames)} codebooks of {config["codebook_size"]} entries at {rates} Hz,
{parameters:,} parameters. sha256 over configuration and weights: `{digest}`.

```python
from snac_core import SNAC

codec = SNAC.from_pretrained("this folder or repository")
```
"""


def _front_matter(title: str, tags: list[str], evaluation: Mapping[str, Any] | None, **more: Any) -> str:
    from huggingface_hub import EvalResult, ModelCardData

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

Measured on these weights by `runner`: {about}. These are figures of one run; the report of its study also states the
spread over seeds.

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
