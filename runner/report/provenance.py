"""Where the numbers come from: settings that differ, runs that failed, versions, hardware, digests, commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.report.results import Study
from runner.report.tables import Column, Row, Table, text_cell


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with printable values; an arm's own settings without the prefix of their place."""
    found: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}".removeprefix("arm.").removeprefix("settings.")
        if isinstance(item, Mapping) and item:
            found |= flattened(item, f"{name}.")
        else:
            found[name] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, sort_keys=True)
    return found


def settings_table(study: Study) -> Table | None:
    """Every setting in which arms differ; what differs between the seeds of one arm (the seed itself) is left out."""
    by_arm: dict[str, dict[str, str]] = {}
    for arm, runs in study.arms.items():
        settings: list[dict[str, str]] = []
        for run in runs:
            if run.result is not None:
                lists = {"strategies": ", ".join(run.result.strategies), "objectives": ", ".join(run.result.objectives)}
                settings.append(flattened(run.result.config) | lists)
        if settings:
            same = {k: v for k, v in settings[0].items() if all(other.get(k) == v for other in settings)}
            by_arm[arm] = {k: v for k, v in same.items() if v != arm or k == "strategies"}
    keys = sorted({k for s in by_arm.values() for k in s} - {"seed", "name", "hash"})
    differing = [k for k in keys if len({s.get(k) for s in by_arm.values()}) > 1]
    if not differing:
        return None
    columns = [Column("Setting", numeric=False), *(Column(arm, numeric=False) for arm in by_arm)]
    rows = [Row([text_cell(k), *(text_cell(by_arm[arm].get(k, "—")) for arm in by_arm)]) for k in differing]
    return Table("settings", "Settings that differ between arms", columns, rows)


def failures_table(study: Study) -> Table | None:
    rows = []
    for runs in [*study.arms.values(), *((run,) for run in study.controls.values())]:
        for run in runs:
            if not run.ok:
                seed = "—" if run.seed is None else str(run.seed)
                told = run.error or "no reason given"
                rows.append(
                    Row([text_cell(run.arm), text_cell(seed), text_cell(run.status), text_cell(told)], "failed")
                )
    columns = [Column(name, numeric=False) for name in ("Arm", "Seed", "Status", "Error")]
    return Table("failures", "Runs that did not succeed", columns, rows) if rows else None


def origin_table(study: Study) -> Table:
    """Versions, hardware, digests and commands; where runs differ, every value is listed."""
    collected: dict[str, dict[str, None]] = {}

    def note(key: str, value: object) -> None:
        if value not in (None, "", {}, []):
            collected.setdefault(key, {})[str(value)] = None

    for r in study.results():
        note("command", r.command)
        note("split", r.split)
        note("pairs", f"{r.pairs.n or len(r.utterances)} conversions, digest {r.pairs.digest[:16] or 'not recorded'}")
        note("teacher", r.teacher and f"{r.teacher.name} (family {r.teacher.family}, {r.teacher.digest[:16]})")
        for judge in r.judges:
            note("judge", f"{judge.name} (family {judge.family}, {judge.digest[:16]})")
        versions = {k: v for k, v in r.versions.items() if k != "plugins"}
        for key, value in flattened(versions).items():
            note(f"version: {key}", value)
        plugins = r.versions.get("plugins")
        for name, plugin in plugins.items() if isinstance(plugins, dict) else []:
            stated = f"{plugin.get('distribution')} {plugin.get('version')}" if isinstance(plugin, dict) else plugin
            note(f"plugin: {name}", stated)
        for key, value in flattened(r.hardware).items():
            note(f"hardware: {key}", value)
        for key, value in flattened(r.digests).items():
            note(f"digest: {key}", value)
        commit = r.git.get("commit")
        note("git", commit and f"{commit}{', with uncommitted changes' if r.git.get('dirty') else ''}")
        note(f"settings: {r.arm}", r.config_hash if r.kind == "arm" else None)
    started = sorted(r.started for r in study.results() if r.started)
    ended = sorted(r.ended for r in study.results() if r.ended)
    rows = [Row([text_cell(key), text_cell("; ".join(values))]) for key, values in collected.items()]
    if started and ended:
        rows.append(Row([text_cell("measured"), text_cell(f"{started[0]} to {ended[-1]}")]))
    rows.append(Row([text_cell("this page"), text_cell(f"runner report {study.folder.resolve().name}")]))
    return Table("provenance", "Provenance", [Column("What", numeric=False), Column("Value", numeric=False)], rows)
