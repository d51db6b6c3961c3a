"""Pictures of a run, as PNG."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from fastsae.analysis.top_tokens import Example
from fastsae.extras import require
from fastsae.files import replacing
from fastsae.training.checkpoint import TENSORS, latest_checkpoint
from fastsae.training.trainer import NEVER_FIRED_FREQUENCY

DPI = 130


def plot_run(
    path: Path,
    log: list[dict[str, Any]],
    density: Float[Tensor, " F"],
    examples: dict[int, list[Example]] | None = None,
) -> Path:
    """Draw loss, FVU, L0 and dead latents against tokens, the density histogram and top tokens.

    Args:
        path: the PNG to write.
        log: lines of `metrics.jsonl`.
        density: each latent's firing frequency.
        examples: what `top_tokens` found, or None to leave that panel out.
    """
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    if not log:
        raise ValueError("log must hold at least one line to be drawn, got none")
    figure = Figure(figsize=(16, 8 if examples else 4.2), layout="constrained")
    grid = figure.add_gridspec(2 if examples else 1, 3, height_ratios=[1, 1.1] if examples else [1])
    _curves(figure.add_subplot(grid[0, 0]), log)
    _usage(figure.add_subplot(grid[0, 1]), log)
    _histogram(figure.add_subplot(grid[0, 2]), density)
    if examples:
        _tokens(figure.add_subplot(grid[1, :]), examples)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return path


def _curves(axes: Any, log: list[dict[str, Any]]) -> None:
    tokens = [line["tokens"] for line in log]
    axes.plot(tokens, [line["loss"] for line in log], color="tab:blue", label="loss")
    axes.set(xlabel="tokens", ylabel="loss", yscale="log", title="training")
    right = axes.twinx()
    right.plot(tokens, [line["fvu"] for line in log], color="tab:orange", label="FVU")
    right.set(ylabel="FVU", ylim=(0, min(1.0, max(line["fvu"] for line in log[1:] or log) * 1.1)))
    handles = axes.get_lines() + right.get_lines()
    axes.legend(handles, [line.get_label() for line in handles], loc="upper right")


def density_of_run(run: Path) -> Float[Tensor, " F"]:
    """Each latent's firing frequency over a run: of its SAE, or of its newest checkpoint.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    saved = run / "sae" / "sparsity.safetensors"
    if saved.is_file():
        frequency = 10 ** load_file(saved)["sparsity"].double()
        return frequency.where(frequency > 2 * NEVER_FIRED_FREQUENCY, 0)
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"run must be a folder with sae/ or checkpoints/, got {run}")
    state = load_file(newest / TENSORS)
    return state["dead.fired"].double() / max(1, int(state["dead.tokens"]))


def _usage(axes: Any, log: list[dict[str, Any]]) -> None:
    tokens = [line["tokens"] for line in log]
    axes.plot(tokens, [line["l0"] for line in log], color="tab:green", label="L0")
    axes.set(xlabel="tokens", ylabel="active latents a row", title="latents")
    right = axes.twinx()
    right.plot(tokens, [line["dead"] for line in log], color="tab:red", label="dead")
    right.plot(tokens, [line["never_fired"] for line in log], color="tab:gray", label="never fired")
    right.set(ylabel="latents", ylim=(0, None))
    handles = axes.get_lines() + right.get_lines()
    axes.legend(handles, [line.get_label() for line in handles], loc="upper right")


def _histogram(axes: Any, density: Tensor) -> None:
    fired = density[density > 0].log10().cpu()
    never = len(density) - len(fired)
    axes.hist(fired.numpy(), bins=50, color="tab:green")
    axes.set(
        xlabel="log10 of the firing frequency",
        ylabel="latents",
        title=f"latent density, {never} of {len(density)} never fired",
    )


def _tokens(axes: Any, examples: dict[int, list[Example]]) -> None:
    axes.axis("off")
    axes.set_title("top activating tokens (held-out text)", loc="left")
    lines = sum(2 + len(found) for found in examples.values())
    height, y = 1 / max(lines, 1), 1.0
    for latent, found in examples.items():
        axes.text(0, y, f"latent {latent}", va="top", weight="bold", fontsize=8)
        y -= height
        for example in found:
            before, after = _one_line(example.before)[-50:], _one_line(example.after)[:50]
            line = f"{example.act:7.2f}  {before:>50}[{_one_line(example.token)}]{after}"
            # Dollar signs would be read as mathematics.
            axes.text(0, y, line.replace("$", r"\$"), va="top", fontsize=7, family="monospace")
            y -= height
        y -= height / 2


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
