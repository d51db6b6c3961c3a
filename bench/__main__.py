"""The whole comparison in one command.

    python -m bench                     # steps, ops, scaling, end to end: some 25 minutes
    python -m bench --quick             # a small step beside every library, in a minute
    python -m bench --quick --case gpt2-small-24k --providers fastsae sae-lens mine.py:step
    python -m bench --parts step ops    # only these; pipeline and quality on request
    python -m bench --parts gpu         # on a GPU: python -m bench.gpu_check
    python -m bench report              # tables and plots of the committed rows

Tables are printed as they come. Rows go to runs/bench/rows.jsonl, with --save NAME
also to bench/results/NAME.jsonl; the report of this run, with its plots, lies beside the former.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import end_to_end, ops, pipeline, report, scaling
from bench.cases import CASES, find_case, harvested_rows
from bench.providers import PEERS, PROVIDERS, find_provider
from bench.quality.__main__ import main as quality
from bench.record import append
from bench.rivals import OPS
from bench.train_step import memory, pooled, show, summary, times

OUT = Path("runs/bench")
QUICK_CASE = "smollm2-135m-4k"
STEP_CASES = ("smollm2-135m-16k", "smollm2-135m-65k")
OPS_CASE = "smollm2-135m-16k"
CURVES = {"F": ["fastsae", "sae-lens"], "B": ["fastsae"], "D": ["fastsae"], "K": ["fastsae"]}
STEP_PROVIDERS = [*PEERS, "plain-pytorch"]
LARGE_STEP_PROVIDERS = ["fastsae", "sae-lens", "sparsify"]
"""At 65k latents a step of the others takes as long as SAELens's and says what 16k said."""
Row = dict[str, Any]


def steps() -> list[Row]:
    small, large = (find_case(name) for name in STEP_CASES)
    pair = ["fastsae", "sae-lens"]
    return [
        *told(pooled(4, small, STEP_PROVIDERS, 1)),
        *told(pooled(3, large, LARGE_STEP_PROVIDERS, 1)),
        *told(pooled(2, small, pair, 1, 0.05)),
        *told(pooled(2, small, pair, 1, skewed=True)),
        *memory(small),
        *memory(large),
    ]


def told(rows: list[Row]) -> list[Row]:
    """The rows of one case, once they are printed."""
    case, dead, usage = (rows[0][name] for name in ("case", "dead", "usage"))
    print(f"\n{case}, {dead:.0%} dead, {usage} usage")
    show(rows)
    print(summary(rows), flush=True)
    return rows


def whole_jobs() -> list[Row]:
    held_out = ["--held-out", "1024"]
    one = end_to_end.main(["--tokens", "12288", *held_out])
    return one + end_to_end.main(["--tokens", "6144", *held_out, "--layers", "5", "9", "13"])


PARTS: dict[str, Callable[[], list[Row]]] = {
    "step": steps,
    "ops": lambda: ops.told(find_case(OPS_CASE), OPS, 2, leave_out=("torch.compile",)),
    "scaling": lambda: scaling.curves(CURVES, 2),
    "pipeline": lambda: pipeline.main([]),
    "end-to-end": whole_jobs,
}
COMPARISON = [name for name in PARTS if name != "pipeline"]
"""The parts that compare libraries."""


def on_a_gpu() -> None:
    # Not before it is asked for: without a GPU it turns the kernels' interpreter on.
    from bench import gpu_check

    gpu_check.main()


OWN_COMMANDS = {"quality": quality, "gpu": on_a_gpu}
"""Parts that write rows of their own, and are not part of the comparison by default."""


def asked_for(args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """The parts that time steps, at one case and of the providers that were named.

    Raises:
        FileNotFoundError, ValueError: there is no such case, provider or harvest.
    """
    case = find_case(args.case or (QUICK_CASE if args.quick else STEP_CASES[0]))
    providers = args.providers or STEP_PROVIDERS
    for name in providers:
        find_provider(name)
    if args.shards is not None:
        harvested_rows(case, args.shards)
    return {
        "quick": lambda: told(times(case, providers, 3, shards=args.shards)),
        "step": lambda: told(pooled(5, case, providers, 1, shards=args.shards)),
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        return report.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *OWN_COMMANDS])
    parser.add_argument("--quick", action="store_true", help="one small step, every library")
    of_step = parser.add_argument_group("of the part step and of --quick")
    of_step.add_argument("--case", help=f"one of {', '.join(CASES)}")
    of_step.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"FILE.py:function, {', '.join(PROVIDERS)}; all are compared with the first",
    )
    of_step.add_argument("--shards", type=Path, help="folder of a harvest to draw the rows from")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of rows and report")
    parser.add_argument("--save", help="append the rows to bench/results/SAVE.jsonl too")
    args = parser.parse_args(arguments)
    if args.quick and args.parts:
        parser.error(f"--quick must be given without --parts, got {args.parts}")
    narrowed = args.case or args.providers or args.shards
    names = ["quick"] if args.quick else args.parts or (["step"] if narrowed else COMPARISON)
    parts = PARTS
    if args.quick or narrowed:
        if not {"quick", "step"} & {*names}:
            parser.error(f"--case, --providers, --shards must be given with step, got {names}")
        try:
            parts = PARTS | asked_for(args)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
    started, found = time.perf_counter(), list[Row]()
    for name in names:
        if name in OWN_COMMANDS:
            sys.argv[1:] = []
            OWN_COMMANDS[name]()
            continue
        part = time.perf_counter()
        made = parts[name]()
        append((args.out / "rows.jsonl").absolute(), made, "cpu")
        if args.save:
            append(args.save, made, "cpu")
        found += made
        print(f"{name}: {time.perf_counter() - part:.0f} s", flush=True)
    if not args.quick and found:
        print(f"report: {report.write(args.out, [args.out / 'rows.jsonl'])}")
    print(f"{time.perf_counter() - started:.0f} s, rows in {args.out / 'rows.jsonl'}")


if __name__ == "__main__":
    main()
