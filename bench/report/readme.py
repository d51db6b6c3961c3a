"""The README's tables, from result rows."""

import statistics

from bench.report.page import RUN
from bench.report.quality import RUN as QUALITY_RUN
from bench.report.quality import by
from bench.report.rows import Row, by_device, newest, of, table, timed, where

METHODS = {
    "fastsae": "fastsae, its defaults",
    "sae-lens-tuned": "SAELens, tuned",
    "sae-lens": "SAELens, its defaults",
}
NAMES = {
    "fastsae": "fastsae",
    "gemm": "the encoder GEMM alone",
    "plain-pytorch": "plain PyTorch (dense scores, sparse decode, fused Adam)",
    "sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning",
    "sae-lens": "SAELens",
    "sae-lens-accelerated": "SAELens with fastsae inside (`accelerate`)",
}


def readme_lines(cpu: list[Row], gpu: list[Row], quality: list[Row]) -> list[str]:
    """Ratios to our whole step, a column a case; on a GPU against its floor; quality."""
    rows = timed(of(newest(cpu, RUN), "train_step"))
    rows = [row for row in rows if row["usage"] == "uniform"]
    if not rows:
        return []
    found = _trainers(by_device(rows)[0])
    on_gpu = timed(of(gpu, "train_step"))
    if on_gpu:
        found += ["", *_trainers(by_device(on_gpu)[0])]
    steps = [r for r in timed(of(gpu, "gpu_step")) if r["provider"] in GPU_NAMES]
    if steps:
        steps = by_device(steps)[0]
        columns = {"provider": "one training step, B=8192, K=64"}
        for r in steps:
            columns[r["case"]] = f"D={r['D']}, F={r['F']:,}"
        by_name: dict[str, Row] = {}
        for r in steps:
            line = by_name.setdefault(r["provider"], {"provider": GPU_NAMES[r["provider"]]})
            line[r["case"]] = f"{r['ms']:.1f} ms ({r['over_floor']:.2f} x floor)"
        found += ["", *table(by_name.values(), columns), ""]
        found += ["The floor is one cuBLAS product of the encoder's shape, the optimizer's bytes"]
        found += [f"and one gather, measured in the same run. {where(steps)}."]
    return found + quality_table(of(newest(quality, QUALITY_RUN), "quality"))


def quality_table(rows: list[Row]) -> list[str]:
    """Of the setting with the most seeds of each method: what is compared there."""
    settings = by(rows, "setting").values()
    rows = max(settings, key=lambda rows: sum(r["method"] in METHODS for r in rows), default=[])
    lines: list[Row] = []
    for method, name in METHODS.items():
        mine = [r for r in rows if r["method"] == method]
        if mine:
            mean = lambda field, mine=mine: statistics.mean(r[field] for r in mine)
            line: Row = {"method": name, "fvu": f"{mean('fvu'):.3f}"}
            line["ce"] = f"{mean('ce_loss_score'):.3f}"
            line["fired"] = f"{mean('never_fired'):.1%}"
            lines.append(line | {"seeds": len(mine)})
    if not lines:
        return []
    s = rows[0]["setting"]
    title = f"{s['source']}, {s['architecture']}, F={s['d_sae']:,}, K={s['k']}"
    columns = {"method": f"{title}, {s['tokens']:,} tokens", "fvu": "FVU", "ce": "CE loss score"}
    columns |= {"fired": "never fired", "seeds": "seeds"}
    said = "Means on test documents; tuned on validation rows by as many trials as ours had."
    return ["", *table(lines, columns), "", said]


def _trainers(rows: list[Row]) -> list[str]:
    heads = {f"{r['case']}{r['dead']}": _head(r) for r in rows}
    lines = []
    for provider, name in NAMES.items():
        line: Row = {"provider": name}
        for r in rows:
            if r["provider"] == provider:
                line[f"{r['case']}{r['dead']}"] = _ms(r)
        if len(line) > 1:
            lines.append(line)
    said = f"Times in milliseconds, and as multiples of ours. {where(rows)}."
    return [*table(lines, {"provider": "one training step", **heads}), "", said]


def _ms(r: Row) -> str:
    digits = 0 if r["ms_p50"] >= 100 else 1
    return f"{r['ms_p50']:.{digits}f} ms ({r['over_fastsae']:.2f}x)"


GPU_NAMES = {
    "fastsae": "fastsae's ops",
    "fastsae.Trainer": "fastsae's trainer (clipping, AuxK, counters)",
    "plain PyTorch, embedding_bag": "plain PyTorch (dense scores, sparse decode)",
    "dense PyTorch, torch.compile": "dense PyTorch, `torch.compile`d",
}


def _head(r: Row) -> str:
    return f"B={r['B']}, F={r['F']:,}" + (f", {r['dead']:.0%} dead" if r["dead"] else "")
