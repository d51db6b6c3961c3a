"""Every Python block of the documentation runs, and its generated pages match the rows."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

from bench.providers import PROVIDERS
from bench.report import benchmarks_page, with_figures, with_numbers
from fastsae import SAES

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/activations.md",
    "docs/adding_a_variant.md",
    "docs/analysis.md",
    "docs/architectures.md",
    "docs/benchmarking.md",
    "docs/checkpoints.md",
    "docs/evaluation.md",
    "docs/large_dictionaries.md",
    "docs/migrating_from_saelens.md",
    "docs/training.md",
]


@pytest.fixture
def lists():
    """Pages may register variants and providers; the lists are as they were afterwards."""
    registries: list[dict[str, Any]] = [SAES, PROVIDERS]
    with contextlib.suppress(ImportError):
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

        registries.append(SAE_TRAINING_CLASS_REGISTRY)
    before = [dict(names) for names in registries]
    yield
    for names, content in zip(registries, before, strict=True):
        names.clear()
        names.update(content)


@pytest.mark.filterwarnings("ignore")  # SAELens and TransformerLens warn of themselves
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, lists):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks, f"{page} must hold a python block"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_links_lead_somewhere():
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_generated_figures_match_the_committed_rows():
    assert (ROOT / "docs/benchmarks.md").read_text() == benchmarks_page()
    for name, fill in {"README.md": with_numbers, "docs/kernels.md": with_figures}.items():
        page = (ROOT / name).read_text()
        assert page == fill(page), f"{name} is older than the rows: python -m bench report"
