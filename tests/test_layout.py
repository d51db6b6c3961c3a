"""Who may import whom."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastsae
import fastsae_kernels

ROOT = Path(__file__).parent.parent
FASTSAE, KERNELS = (Path(str(m.__file__)).parent for m in (fastsae, fastsae_kernels))
OPS = sorted(p.parent for p in KERNELS.glob("*/api.py"))
HEAVY = (
    "triton",
    "torch.distributed.checkpoint",
    "transformers",
    "datasets",
    "matplotlib",
    "tyro",
    "sae_lens",
    "transformer_lens",
)


def imports(path):
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_package(path, package):
    return any(name.split(".")[0] == package for name in imports(path))


def test_kernels_is_a_source_root_and_no_package():
    assert (ROOT / "kernels" / "fastsae_kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_fastsae_is_light():
    script = "import json, sys, fastsae; print(json.dumps(sorted(sys.modules)))"
    path = [str(ROOT), str(ROOT / "kernels")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "fastsae" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_kernels_never_import_fastsae():
    assert [p for p in KERNELS.rglob("*.py") if imports_package(p, "fastsae")] == []


def test_fastsae_never_imports_triton():
    assert [p for p in FASTSAE.rglob("*.py") if imports_package(p, "triton")] == []


def test_there_are_ops():
    assert {"topk", "decode", "loss", "auxk", "threshold"} <= {op.name for op in OPS}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_api_chooses_between_implementations_that_know_nothing_of_each_other(op):
    package = f"fastsae_kernels.{op.name}"
    beside = {p.stem for p in op.glob("*.py")}
    found = {name: imports(op / f"{name}.py") for name in beside}
    implementations = {"reference", "eager", "kernel"} & beside
    assert {"reference", "eager"} <= implementations
    chosen_in = found["api"] | found.get("function", set()) | found.get("ops", set())
    assert {f"{package}.{name}" for name in implementations} <= chosen_in
    for name in implementations:
        others = (implementations | {"api"}) - {name}
        assert found[name].isdisjoint({f"{package}.{other}" for other in others}), name
    assert {n for n in found["__init__"] if n.startswith(package)} <= {
        n for n in found["__init__"] if n.startswith(f"{package}.api")
    }


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_reference_imports_no_other_ops_implementation(op):
    """Only codes and the shared types: the oracle depends on nothing that it judges."""
    allowed = {"fastsae_kernels.code", "fastsae_kernels._row_grads"}
    found = {n for n in imports(op / "reference.py") if n.startswith("fastsae_kernels")}
    assert {n for n in found if not n.startswith(tuple(allowed))} == set()


def test_every_variant_is_exported():
    for sae_class in fastsae.SAES.values():
        assert getattr(fastsae, sae_class.__name__) is sae_class
        config_class = sae_class.config_class
        assert getattr(fastsae, config_class.__name__) is config_class


def test_a_variant_is_listed_under_the_name_that_its_files_bear():
    named = {name: sae_class.config_class.architecture for name, sae_class in fastsae.SAES.items()}
    assert all(name == architecture for name, architecture in named.items())
