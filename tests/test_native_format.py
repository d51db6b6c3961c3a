"""SAELens 6's folder: what is read, what is refused, and what a kill leaves behind."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import SAE, StandardConfig, StandardSAE, TopKConfig, TopKSAE

D, F = 6, 20


@pytest.fixture
def folder(tmp_path):
    """A TopK SAE on disk."""
    torch.manual_seed(0)
    cfg = TopKConfig(d_in=D, d_sae=F, k=3, metadata={"hook_name": "blocks.3.hook_resid_post"})
    TopKSAE(cfg).save_model(tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(folder, **changes):
    """Change fields of cfg.json; None removes one."""
    values = json.loads((folder / "cfg.json").read_text()) | changes
    stated = {k: v for k, v in values.items() if v is not None}
    (folder / "cfg.json").write_text(json.dumps(stated))


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_both_paths_are_returned_and_tensors_are_row_major(folder):
    sae = SAE.load_from_disk(folder)
    weights, config = sae.save_model(folder.parent / "again")
    assert (weights.name, config.name) == ("sae_weights.safetensors", "cfg.json")
    stored = load_file(weights)
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    assert shapes == {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    assert torch.equal(stored["W_enc"], sae.W_enc) and stored["W_enc"].is_contiguous()


def test_metadata_and_the_format_version_are_written(folder):
    values = json.loads((folder / "cfg.json").read_text())
    assert values["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert int(values["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert values["architecture"] == "topk" and values["device"] == "cpu"


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a folder with cfg.json and sae_w"):
        SAE.load_from_disk(tmp_path / "absent")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="path must be a folder with cfg.json and sae_w"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize(
    "share",
    [
        *(0.0, 0.1, 0.5, 0.99),
        *(pytest.param(i / 200, marks=pytest.mark.slow) for i in range(1, 200)),
    ],
)
def test_truncated_weights_are_refused(folder, share):
    truncate(folder / "sae_weights.safetensors", share)
    with pytest.raises(ValueError, match="sae_weights.safetensors is truncated or damaged"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize("content", [b"", b'{"d_in": 6', b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_refused(folder, content):
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(ValueError, match="cfg.json must be JSON, got"):
        SAE.load_from_disk(folder)


def test_a_config_that_is_a_list_is_refused(folder):
    (folder / "cfg.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="cfg.json must be a JSON object, got list"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize("architecture", ["hierarchical", None])
def test_an_unknown_architecture_is_refused(folder, architecture):
    rewrite(folder, architecture=architecture)
    with pytest.raises(ValueError, match=r"architecture must be one of .*'standard'.*, got"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"d_in": None}, "d_in"),
        ({"k": 21}, r"k must be in \[1, d_sae\]"),
        ({"k": "three"}, ""),
        ({"normalize_activations": "l2"}, "normalize_activations"),
        ({"dtype": "float33"}, "dtype"),
    ],
    ids=["missing-d_in", "k-above-d_sae", "k-a-word", "unknown-normalisation", "unknown-dtype"],
)
def test_a_config_that_describes_no_sae_is_refused(folder, changes, named):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=f"(?s)must describe a topk SAE: .*{named}"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize("changes", [{"d_sae": F + 1}, {"d_in": D - 1}], ids=str)
def test_shapes_that_do_not_fit_the_config_are_refused(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=r"must hold the tensors .* got .*'b_dec': \[6\]"):
        SAE.load_from_disk(folder)


def test_a_missing_tensor_is_refused(folder):
    weights = load_file(folder / "sae_weights.safetensors")
    del weights["b_enc"]
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"must hold .*'b_enc': \[20\].* for its cfg.json, got"):
        SAE.load_from_disk(folder)


def test_loading_as_another_class_is_refused(folder):
    with pytest.raises(TypeError, match="path must hold a StandardSAE, got TopKSAE in"):
        StandardSAE.load_from_disk(folder)
    assert isinstance(TopKSAE.load_from_disk(folder), TopKSAE)


def test_a_topk_file_without_rescale_means_false(folder):
    assert TopKSAE.load_from_disk(folder).cfg.rescale_acts_by_decoder_norm
    rewrite(folder, rescale_acts_by_decoder_norm=None)
    assert not TopKSAE.load_from_disk(folder).cfg.rescale_acts_by_decoder_norm


def test_unknown_and_null_fields_are_ignored(folder):
    expected = SAE.load_from_disk(folder).cfg
    rewrite(folder, use_sparse_activations=False, a_field_of_tomorrow=[1])
    values = json.loads((folder / "cfg.json").read_text()) | {"decoder_init_norm": None}
    (folder / "cfg.json").write_text(json.dumps(values))
    assert SAE.load_from_disk(folder).cfg == expected


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    sae = StandardSAE(StandardConfig(d_in=D, d_sae=F))
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "sae"):
        with pytest.raises(OSError, match="path must be in a folder that can be written to, got"):
            sae.save_model(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_metadata_that_is_not_json_leaves_the_old_sae(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    cfg = TopKConfig(d_in=D + 1, d_sae=F, k=3, metadata={"hook_name": {1, 2}})
    with pytest.raises(TypeError, match="not JSON serializable"):
        TopKSAE(cfg).save_model(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def constant_sae(k):
    """An SAE whose weights are all k, as is its k."""
    sae = TopKSAE(TopKConfig(d_in=D, d_sae=F, k=k))
    for parameter in sae.parameters():
        torch.nn.init.constant_(parameter, k)
    return sae


def constant_in(folder):
    sae = TopKSAE.load_from_disk(folder)
    (weight,) = torch.cat([p.detach().flatten() for p in sae.parameters()]).unique().tolist()
    assert weight == sae.cfg.k, "weights of one save under the configuration of another"
    return sae.cfg.k


def save_and_die(folder, moves):
    """Save over another SAE; killed instead of making a move after so many."""
    replace, left = os.replace, moves

    def counted(*names):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(*names)

    os.replace = counted
    constant_sae(2).save_model(folder)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("moves, found", [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_save_over_another_sae_killed_before_any_move_leaves_one_of_the_two(
    moves, found, tmp_path
):
    constant_sae(1).save_model(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "fastsae", "pytest"])
    process = context.Process(target=save_and_die, args=(tmp_path, moves))
    process.start()
    process.join()
    assert process.exitcode == (0 if moves == 3 else -signal.SIGKILL)
    assert constant_in(tmp_path) == found
    weights, config = constant_sae(3).save_model(tmp_path)
    assert constant_in(tmp_path) == 3
    assert json.loads(config.read_text())["k"] == load_file(weights)["b_dec"][0] == 3
    assert not (tmp_path / ".saved").exists()


def save_for_ever(folder):
    sae = TopKSAE(TopKConfig(d_in=64, d_sae=4096, k=4))
    with torch.no_grad():
        for count in itertools.count():
            for parameter in sae.parameters():
                parameter.fill_(count)
            sae.save_model(folder)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_one_whole_sae(kills, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "fastsae", "pytest"])
    moment = random.Random(0)
    for _ in range(kills):
        process = context.Process(target=save_for_ever, args=(tmp_path,))
        (tmp_path / "cfg.json").unlink(missing_ok=True)
        process.start()
        while not (tmp_path / "cfg.json").exists():
            time.sleep(0.01)
        time.sleep(moment.uniform(0.02, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -9
        sae = SAE.load_from_disk(tmp_path)
        values = torch.cat([p.detach().flatten() for p in sae.parameters()]).unique()
        assert values.numel() == 1, "weights of two saves in one file"


@pytest.mark.parametrize(
    "version, extra, said",
    [
        ("7.0.0", {}, "got sae_lens_version '7.0.0'"),
        ("6.99.0", {"curvature": 3}, "got 'curvature' in one of sae_lens_version '6.99.0'"),
        ("6.99.0", {}, None),
        ("6.1.0", {"curvature": 3}, None),
    ],
)
def test_a_configuration_of_the_future_is_refused(version, extra, said, tmp_path):
    sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["sae_lens_version"] = version
    (tmp_path / "cfg.json").write_text(json.dumps(config | extra))
    if said is None:
        assert SAE.load_from_disk(tmp_path).cfg.k == 2
        return
    with pytest.raises(
        ValueError, match=r"cfg.json must be of SAELens 6\.54\.12 or before"
    ) as error:
        SAE.load_from_disk(tmp_path)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
