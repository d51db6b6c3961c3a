"""Tables and plots of result rows.

python -m bench report                     # docs/benchmarks.md, docs/images, tables of other pages
python -m bench report --rows runs/bench/rows.jsonl --out runs/bench    # of another file
"""

import argparse
from pathlib import Path

from bench.pages import between_markers
from bench.report.ops import op_figures
from bench.report.page import page
from bench.report.readme import readme_lines
from bench.report.rows import PREFIX, committed, read

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"


def write(out: Path, files: list[Path]) -> Path:
    """report.md and its pictures in `out`, of the rows in `files`."""
    rows = read(*files)
    from bench.report import plots  # it needs matplotlib, which benchmarks do not

    gpu = [row for row in rows if row.get("cuda") or row["bench"].startswith("gpu")]
    cpu = [row for row in rows if row not in gpu]
    drawn = plots.draw(out / "images", cpu, gpu)
    show = lambda name: _shown(name) if name in drawn else []
    path = out / "report.md"
    path.write_text(page(cpu, gpu, [], show))
    return path


def benchmarks_page() -> str:
    """docs/benchmarks.md as the committed rows have it."""
    drawn = {path.stem.removeprefix(PREFIX) for path in IMAGES.glob(f"{PREFIX}*.png")}
    show = lambda name: _shown(name) if name in drawn else []
    return page(committed("cpu"), committed("gpu"), committed("quality"), show)


def _shown(name: str) -> list[str]:
    return ["", f"![{name}](images/{PREFIX}{name}.png)"]


def with_numbers(readme: str) -> str:
    """The README with the table between its markers."""
    lines = readme_lines(committed("cpu"), committed("gpu"), committed("quality"))
    return between_markers(readme, "numbers", "\n".join(lines))


def with_figures(kernels: str) -> str:
    """docs/kernels.md with the figures of the ops between its markers."""
    lines = op_figures(committed("cpu"), committed("gpu"))
    return between_markers(kernels, "figures", "\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, nargs="+", help="files of rows; none: the committed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="with --rows")
    args = parser.parse_args(arguments)
    if args.rows:
        if absent := [str(path) for path in args.rows if not path.exists()]:
            parser.error(f"--rows must be files that are there, got {', '.join(absent)}")
        print(write(args.out, args.rows))
        return
    from bench.report import plots

    plots.draw(IMAGES, committed("cpu"), committed("gpu"))
    (ROOT / "docs" / "benchmarks.md").write_text(benchmarks_page())
    filled = {"README.md": with_numbers, "docs/kernels.md": with_figures}
    for name, fill in filled.items():
        (ROOT / name).write_text(fill((ROOT / name).read_text()))
    print(", ".join(["docs/benchmarks.md", str(IMAGES.relative_to(ROOT)), *filled]))
