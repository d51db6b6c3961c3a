"""`upload_saes_to_huggingface`: trained SAEs as a repository that SAELens and fastsae load."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastsae.extras import require
from fastsae.sae_lens.training_saes import TrainingSAE
from fastsae.saes import SAE

NEEDED = ("cfg.json", "sae_weights.safetensors")
FILES = (*NEEDED, "sparsity.safetensors", "runner_cfg.json")
CARD = "README.md"


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, SAE | Path | str],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
) -> None:
    """Upload SAEs, each into a folder of its id, with a model card tagged `saelens`.

    Afterwards `SAE.from_pretrained(hf_repo_id, id)` loads them, here and in SAELens. The repository
    is made where it is absent; a model card that is there stays.

    Args:
        saes_dict: by id, an SAE or the folder of one that is saved.
        hf_repo_id: `user/repository`.
        hf_revision: the branch.

    Raises:
        ValueError: there is no SAE, or an id leads outside the repository.
        FileNotFoundError: a folder lacks a file of SAELens's format; nothing has been uploaded.
    """
    if not saes_dict:
        raise ValueError("saes_dict must hold an SAE, got none")
    for sae_id, sae in saes_dict.items():
        _check(sae_id, sae)
    api = require("huggingface_hub", extra="train").HfApi()
    bars = require("tqdm.auto", extra="train").tqdm
    api.create_repo(hf_repo_id, exist_ok=True)
    for sae_id, sae in bars(saes_dict.items(), desc="upload", disable=not show_progress):
        with TemporaryDirectory() as made:
            api.upload_folder(
                repo_id=hf_repo_id,
                folder_path=_saved(sae, Path(made)),
                path_in_repo=sae_id,
                revision=hf_revision,
                commit_message=f"Upload SAE {sae_id}",
                allow_patterns=list(FILES),
            )
    if add_default_readme and not api.file_exists(hf_repo_id, CARD, revision=hf_revision):
        api.upload_file(
            repo_id=hf_repo_id,
            path_or_fileobj=model_card(hf_repo_id, saes_dict).encode(),
            path_in_repo=CARD,
            revision=hf_revision,
            commit_message="Add a model card",
        )


def model_card(repository: str, sae_ids: Iterable[str]) -> str:
    """The card of a repository of SAEs, as the hub reads it."""
    listed = "\n".join(f"- `{sae_id}`" for sae_id in sae_ids)
    return f"""---
library_name: saelens
tags:
- saelens
- sparse-autoencoder
---

# Sparse autoencoders

{listed}

```python
from fastsae.sae_lens import SAE  # or: from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "<one of the ids above>")
```
"""


def _check(sae_id: str, sae: Any) -> None:
    if not sae_id or sae_id.startswith("/") or ".." in sae_id.split("/"):
        raise ValueError(
            f"saes_dict must have folders inside the repository as ids, got {sae_id!r}"
        )
    if isinstance(sae, SAE):
        return
    for name in NEEDED:
        if not (Path(sae) / name).is_file():
            raise FileNotFoundError(
                f"saes_dict[{sae_id!r}] must be an SAE or a folder with {' and '.join(NEEDED)}, "
                f"got {sae} without {name}"
            )


def _saved(sae: SAE | Path | str, folder: Path) -> Path:
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(folder)
    elif isinstance(sae, SAE):
        sae.save_model(folder)
    else:
        return Path(sae)
    return folder
