"""The pictures of a report, PNG and SVG, each carrying the digest of the rows it was drawn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from bench.report.rows import PREFIX, Row, by_device, digest, newest, of, timed
from bench.scaling import fit, predicted

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(folder: Path, cpu: list[Row], gpu: list[Row]) -> list[str]:
    """Draw what there are rows for; the names of the pictures."""
    steps = timed(of(newest(cpu, ("bench", "case", "dead", "usage")), "train_step"))
    scaling = timed(newest(of(cpu, "scaling"), ("bench",)))
    ops = [row for row in newest(of(cpu, "ops"), ("case",)) if "roofline" in row]
    pictures: dict[str, tuple[list[Row], Callable[[list[Row]], Any]]] = {
        "steps": (steps, step_bars),
        "scaling": (scaling, scaling_curves),
        "memory": ([row for row in scaling if row["axis"] == "F" and "peak_mib" in row], memory),
        "roofline": (ops, roofline_bars),
        "gpu": (next(iter(by_device(timed(of(gpu, "gpu_step")))), []), gpu_bars),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with plt.rc_context({"svg.hashsalt": "fastsae", "font.size": 9}):
        for name, (rows, picture) in pictures.items():
            if rows:
                figure = picture(rows)
                for kind in ("png", "svg"):
                    about: dict[str, Any] = {"Description": digest(rows)}
                    about |= {"Date": None} if kind == "svg" else {}
                    path = folder / f"{PREFIX}{name}.{kind}"
                    figure.savefig(path, dpi=110, metadata=about, bbox_inches="tight")
                plt.close(figure)
                drawn.append(name)
    return drawn


def step_bars(rows: list[Row]) -> Any:
    """How many times as long as our step each other takes, a panel a case."""
    cases = list(dict.fromkeys((r["case"], r["dead"], r["usage"]) for r in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases), 3.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        mine = [r for r in rows if (r["case"], r["dead"], r["usage"]) == case]
        mine = [r for r in mine if not r["provider"].startswith(("gemm-", "fastsae-"))]
        names = [r["provider"] for r in mine]
        bars = axis.barh(names, [r["over_fastsae"] for r in mine], color=_colours(names))
        axis.bar_label(bars, [f" {r['over_fastsae']:.2f}x, {r['ms_p50']:.0f} ms" for r in mine])
        axis.set(xlabel="times fastsae's step", title=f"{case[0]}, {case[1]:.0%} dead, {case[2]}")
        axis.set_xlim(right=1.7 * axis.get_xlim()[1])
        axis.invert_yaxis()
    figure.tight_layout()
    return figure


def scaling_curves(rows: list[Row]) -> Any:
    """Milliseconds against each axis; the fitted model is the line through our points."""
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if not n.startswith("gemm-")]
    axes_names = list(dict.fromkeys(r["axis"] for r in rows))
    figure, axes = plt.subplots(1, len(axes_names), figsize=(3.6 * len(axes_names), 3.2))
    for axis, key in zip(np.atleast_1d(axes), axes_names, strict=True):
        for name, colour in zip(names, _colours(names), strict=True):
            mine = sorted(
                (r for r in rows if r["axis"] == key and r["provider"] == name),
                key=lambda r: r["value"],
            )
            at, ms = [r["value"] for r in mine], [r["ms_p50"] for r in mine]
            axis.plot(at, ms, "o" if name == "fastsae" else "o--", color=colour, label=name)
            if name == "fastsae":
                model = fit([r for r in rows if r["provider"] == name])
                axis.plot(at, [predicted(r, model) for r in mine], color=colour)
        axis.set(xscale="log", yscale="log", xlabel=key, ylabel="ms a step")
    np.atleast_1d(axes)[0].legend()
    figure.tight_layout()
    return figure


def memory(rows: list[Row]) -> Any:
    """What a step needs beyond what is held, against F, beside one dense [B, F] tensor."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for name, colour in zip(names, _colours(names), strict=True):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["value"])
        axis.plot([r["F"] for r in mine], [r["peak_mib"] for r in mine], "o-", color=colour,
                  label=name)  # fmt: skip
    shapes = sorted({(r["F"], r["B"]) for r in rows})
    axis.plot(
        [f for f, _ in shapes], [4 * b * f / 2**20 for f, b in shapes], "k:", label="one [B, F]"
    )
    axis.set(xscale="log", yscale="log", xlabel="F", ylabel="MiB beyond what is held")
    axis.legend()
    figure.tight_layout()
    return figure


def roofline_bars(rows: list[Row]) -> Any:
    """The share of the roofline that ours and the best rival of each op reach."""
    names = list(dict.fromkeys(r["op"] for r in rows))
    ours = [next(r for r in rows if r["op"] == name) for name in names]
    best = []
    for mine in ours:
        rivals = [r for r in rows if r["op"] == mine["op"] and r["provider"] != mine["provider"]]
        best.append(max((r["roofline"] for r in rivals), default=0.0))
    figure, axis = plt.subplots(figsize=(6, 0.4 * len(names) + 1))
    place = np.arange(len(names))
    axis.barh(place - 0.2, [r["roofline"] for r in ours], 0.4, label="fastsae", color="C0")
    axis.barh(place + 0.2, best, 0.4, label="the best rival", color="C7")
    axis.set_yticks(place, names)
    axis.set(xlabel="share of the roofline")
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    return figure


def gpu_bars(rows: list[Row]) -> Any:
    """Multiples of the floor, a panel a case."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases), 2.6), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        mine = [r for r in rows if r["case"] == case]
        names = [r["provider"] for r in mine]
        bars = axis.barh(names, [r["over_floor"] for r in mine], color=_colours(names))
        axis.bar_label(bars, [f" {r['over_floor']:.2f}x, {r['ms']:.1f} ms" for r in mine])
        axis.axvline(1.0, color="black", linestyle=":")
        axis.set(xlabel="times the floor", title=case)
        axis.set_xlim(right=2.1 * axis.get_xlim()[1])
        axis.invert_yaxis()
    figure.tight_layout()
    return figure


COLOURS = {
    "fastsae": "C0",
    "fastsae.Trainer": "C9",
    "gemm": "C7",
    "plain-pytorch": "C1",
    "plain PyTorch, embedding_bag": "C1",
    "sae-lens": "C2",
    "sae-lens-accelerated": "C8",
    "sparsify": "C3",
    "dictionary-learning": "C4",
}


def _colours(names: list[str]) -> list[str]:
    """The same provider has the same colour everywhere."""
    others = (f"C{i}" for i in (5, 6, 2, 3, 4, 1, 8))
    return [COLOURS.get(name) or next(others) for name in names]
