"""Tables of the rows: means over seeds, paired differences with 95 % intervals, ablations."""

import json
import math
import statistics
from collections.abc import Iterable

from bench.clock import fvu_at, seconds_to
from bench.report.rows import Row, newest, of

T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Of Student's t at 97.5 %, by the number of seeds; more seeds take the last, which is too wide."""
COLUMNS = {
    "fvu": ("FVU", ".4f"),
    "fvu_all_rows": ("all rows", ".4f"),
    "l0": ("L0", ".1f"),
    "ce_loss_score": ("CE score", ".4f"),
    "ce_loss_score_every_position": ("every pos.", ".4f"),
    "never_fired": ("never fired", ".2%"),
    "decoder_match": ("match", ".3f"),
    "decoder_cosine": ("cosine", ".3f"),
    "redundant": ("redundant", ".2%"),
    "untouched": ("untouched", ".2%"),
}
AS_MEASURED = ("l0", "untouched")
"""Columns in which nobody is better."""
BASELINE = "sae-lens-tuned"
FROM_RANDOM = "fastsae-random"
"""Ours, started at random directions: what a start near rows changes where the truth is known."""
RUN = ("bench", "setting", "library", "trial", "method", "change", "seed")
"""Fields that tell one training from another."""


def report(rows: list[Row]) -> str:
    """Every table there are rows for; of a training that was repeated, the last."""
    parts = []
    for mine in by(newest(rows, RUN), "setting").values():
        s = mine[0]["setting"]
        parts.append(
            f"{s['source']}, {s['architecture']}, F = {s['d_sae']:,}, K = {s['k']}, "
            f"{s['tokens']:,} tokens"
        )
        if compared := of(mine, "quality"):
            scores = [name for name in COLUMNS if name not in AS_MEASURED]
            differing = differences(compared, BASELINE, scores)
            parts += [comparison(compared), *differing, *times(compared)]
        if tried := of(mine, "quality-search"):
            parts.append(search(tried))
        if changed := of(mine, "quality-ablation"):
            parts.append(ablation(changed))
        if recovered := of(mine, "quality-synthetic"):
            differing = differences(recovered, FROM_RANDOM, ("f1", "mcc", "decoder_cosine"))
            parts += [synthetic(recovered), *differing]
        parts.append("")
    return "\n".join(parts).rstrip()


def comparison(rows: list[Row]) -> str:
    lines = [f"{'method':22}{'seeds':>6}" + "".join(f"{h:>13}" for h, _ in COLUMNS.values())]
    for method, mine in by(rows, "method").items():
        cells = ""
        for name, (_, style) in COLUMNS.items():
            found = [r[name] for r in mine if name in r]
            cells += f"{format(statistics.mean(found), style) if found else '-':>13}"
        lines.append(f"{method:22}{len(mine):6}{cells}")
    return "\n".join(lines)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval."""
    n = len(differences)
    quantile = T_QUANTILES[min(n, max(T_QUANTILES))]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / n**0.5


def differences(rows: list[Row], baseline: str, names: Iterable[str]) -> list[str]:
    """Of our defaults and a baseline, seed by seed."""
    mine, theirs = ({r["seed"]: r for r in rows if r["method"] == m} for m in ("fastsae", baseline))
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
        return []
    lines = [f"fastsae - {baseline}, mean over {len(seeds)} seeds and 95 % interval:"]
    for name in names:
        pairs = [(mine[s][name], theirs[s][name]) for s in seeds if name in mine[s]]
        relative = name.startswith("fvu")
        found = [100 * (a - b) / (b if relative else 1) for a, b in pairs]
        if len(found) > 1:
            mean, half = interval(found)
            unit = "%" if relative else "points"
            lines.append(f"  {name}: {mean:+.2f} +- {half:.2f} {unit}")
    return lines


def times(rows: list[Row]) -> list[str]:
    """Beside the training time of SAELens's own arithmetic, taken on as many threads."""
    key = lambda r: (r["seed"], r.get("device"), r.get("threads"))
    theirs = {key(r): r for r in rows if r["method"] == f"{BASELINE}-own"}
    found = [r for r in rows if r["method"] == "fastsae" and key(r) in theirs]
    if not found:
        return []
    heads = ("fastsae, s", "its FVU", "SAELens's then", "SAELens, s", "its FVU", "ours had it, s")
    lines = ["FVU on validation rows at equal wall-clock, SAELens by its own arithmetic"]
    lines.append(f"{'seed':6}" + "".join(f"{head:>16}" for head in heads))
    for r in found:
        other = theirs[key(r)]
        last = other["curve"][-1][1]
        cells = (
            f"{r['seconds']:.0f}",
            f"{r['curve'][-1][1]:.4f}",
            f"{fvu_at(other['curve'], r['seconds']) or math.nan:.4f}",
            f"{other['seconds']:.0f}",
            f"{last:.4f}",
            f"{seconds_to(r['curve'], last) or math.nan:.0f}",
        )
        lines.append(f"{r['seed']:<6}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def search(rows: list[Row]) -> str:
    lines = ["search, on validation rows"]
    for library, mine in by(rows, "library").items():
        for r in sorted(mine, key=lambda r: r["fvu"]):
            rounded = {
                k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r["options"].items()
            }
            said = ", ".join(f"{k} {v}" for k, v in rounded.items())
            lines.append(f"  {library:10}{r['fvu']:9.4f}{r['never_fired']:8.2%}  {said}")
    return "\n".join(lines)


def ablation(rows: list[Row]) -> str:
    found, mean = by(rows, "change"), statistics.mean
    base = {r["seed"]: r["fvu"] for r in found["the defaults"]}
    head = f"{'change of the defaults, on validation rows':44}{'seeds':>6}"
    lines = [head + "".join(f"{h:>13}" for h in ("FVU", "change", "never fired", "cosine"))]
    for name, mine in found.items():
        fvu, fired, cosine = (
            mean(r[column] for r in mine) for column in ("fvu", "never_fired", "decoder_cosine")
        )
        change = mean(100 * (r["fvu"] / base[r["seed"]] - 1) for r in mine)
        cells = f"{fvu:13.4f}{change:+12.2f}%{fired:13.2%}{cosine:13.3f}"
        lines.append(f"{name:44}{len(mine):6}{cells}")
    return "\n".join(lines)


def synthetic(rows: list[Row]) -> str:
    names = ("f1", "mcc", "uniqueness", "explained_variance", "dead", "decoder_cosine")
    names += ("features_cosine",)
    lines = [f"{'recovery of true features':28}{'seeds':>6}" + "".join(f"{n:>20}" for n in names)]
    for method, mine in by(rows, "method").items():
        cells = "".join(f"{statistics.mean(r[n] for r in mine):20.4f}" for n in names)
        lines.append(f"{method:28}{len(mine):6}{cells}")
    return "\n".join(lines)


def by(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    """The rows of each value of a field, which may be a dictionary."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        value = row[name]
        found.setdefault(value if isinstance(value, str) else json.dumps(value), []).append(row)
    return found
