"""SAEs go to the hub as repositories that load."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

import fastsae
from fastsae.sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    TrainingSAE,
    upload_saes_to_huggingface,
)

REPO = "tides/herons"


class FolderApi:
    """The calls of `huggingface_hub.HfApi` that an upload makes, on a folder."""

    root: Path
    calls: list[str]

    def create_repo(self, repo_id, *, exist_ok=False):
        assert exist_ok
        self.calls.append("create_repo")
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self, *, repo_id, folder_path, path_in_repo, revision, commit_message, allow_patterns
    ):
        self.calls.append(f"upload_folder {path_in_repo} {revision}")
        target = self.root / repo_id / path_in_repo
        target.mkdir(parents=True)
        for name in allow_patterns:
            if (Path(folder_path) / name).is_file():
                shutil.copy(Path(folder_path) / name, target)

    def file_exists(self, repo_id, filename, *, revision):
        return (self.root / repo_id / filename).is_file()

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, revision, commit_message):
        self.calls.append(f"upload_file {path_in_repo}")
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    kind = type("Api", (FolderApi,), {"root": tmp_path / "hub", "calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    return kind


def topk():
    torch.manual_seed(0)
    return fastsae.TopKSAE(fastsae.TopKConfig(d_in=8, d_sae=32, k=3))


def upload(saes, **options):
    upload_saes_to_huggingface(saes, REPO, show_progress=False, **options)


def test_what_is_uploaded_loads(hub, tmp_path):
    one, trained = topk(), TrainingSAE.from_dict(BatchTopKTrainingSAEConfig(d_in=8, d_sae=32, k=3))
    trained.topk_threshold.fill_(0.3)
    topk().save_model(tmp_path / "saved")
    (tmp_path / "saved" / "secret.txt").write_text("stays here")
    upload({"layer_1": one, "a/layer_2": trained, "layer_3": tmp_path / "saved"})
    repository = hub.root / REPO
    assert hub.calls[-1] == "upload_file README.md"
    assert not (repository / "layer_3" / "secret.txt").exists()
    x = torch.randn(5, 8)
    for sae_id in ("layer_1", "layer_3"):
        assert torch.equal(SAE.from_pretrained(str(repository), sae_id)(x), one(x))
    jumprelu = SAE.from_pretrained(str(repository), "a/layer_2")
    assert jumprelu.cfg.architecture == "jumprelu"


def test_the_card_is_tagged_for_sae_lens(hub):
    upload({"layer_1": topk()})
    card = huggingface_hub.ModelCard((hub.root / REPO / "README.md").read_text())
    data = card.data.to_dict()
    assert data["library_name"] == "saelens" and "saelens" in data["tags"]
    assert "`layer_1`" in card.text and f'from_pretrained("{REPO}"' in card.text


@pytest.mark.parametrize("asked", [True, False])
def test_a_card_that_is_there_stays(hub, asked):
    (hub.root / REPO).mkdir(parents=True)
    (hub.root / REPO / "README.md").write_text("mine")
    upload({"layer_1": topk()}, add_default_readme=asked, hf_revision="dev")
    assert hub.calls == ["create_repo", "upload_folder layer_1 dev"]
    assert (hub.root / REPO / "README.md").read_text() == "mine"


def test_no_card_is_made_unasked(hub):
    upload({"layer_1": topk()}, add_default_readme=False)
    assert not (hub.root / REPO / "README.md").exists()


def test_nothing_is_uploaded_where_one_is_wrong(hub, tmp_path):
    with pytest.raises(ValueError, match="saes_dict must hold an SAE"):
        upload({})
    for sae_id in ("", "../up", "/root"):
        with pytest.raises(ValueError, match="folders inside the repository as ids, got"):
            upload({"good": topk(), sae_id: topk()})
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"saes_dict\['b'\] .* without sae_weights"):
        upload({"a": topk(), "b": tmp_path})
    assert hub.calls == []
