"""The recipes SAELens users start from, as docs/tutorials.md has them, on SmolLM2-135M."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "tutorials.md"
TITLES = (
    "Train with the flat configuration",
    "Load an SAE",
    "Latents of a text",
    "Where a latent fires most",
    "Steer",
    "Which latents speak for a token",
    "Train a TopK SAE",
)
SMALL = {
    "training_tokens": "4_096",
    "l1_warm_up_steps": "2",
    "lr_warm_up_steps": "2",
    "lr_decay_steps": "2",
    "n_eval_batches": "1",
    "context_size": "64",
    "max_new_tokens": "3",
}
"""The budget of a normal run: every recipe runs, no quality is asked for."""

pytestmark = pytest.mark.filterwarnings("ignore")  # TransformerLens warns of itself


def recipes():
    """The page's blocks by the titles above them."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = {}
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        (blocks[title],) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return blocks


def smaller(block):
    for name, value in SMALL.items():
        block = re.sub(rf"\b{name}=[\d_]+", f"{name}={value}", block)
    return block


class Recipes:
    """Runs them in the page's order in one namespace, each when it is first asked for."""

    def __init__(self, change):
        self.blocks, self.change, self.done = recipes(), change, 0
        self.names: dict[str, Any] = {"__name__": "tutorials"}

    def upto(self, title):
        torch.set_grad_enabled(True)
        wanted = TITLES.index(title) + 1
        try:
            for name in TITLES[self.done : wanted]:
                exec(compile(self.change(self.blocks[name]), name, "exec"), self.names)
                self.done += 1
        finally:
            torch.set_grad_enabled(True)
        return self.names


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipes"))
        yield Recipes(smaller)


def test_the_page_has_these_recipes():
    assert tuple(recipes()) == TITLES
    budgets = re.findall(r"training_tokens=([\d_]+)", PAGE.read_text())
    assert len(budgets) == 2 and all(int(b) >= 100_000 for b in budgets)


def test_train_with_the_flat_configuration(small):
    names = small.upto("Train with the flat configuration")
    metrics, sae = names["trainer"].metrics, names["sae"]
    assert metrics["tokens"] == 4096 and sae.cfg.d_sae == 576 * 8
    for name in ("l0", "ce_loss_score", "explained_variance", "dead_latents"):
        assert math.isfinite(metrics[name]), name
    assert 0 < metrics["l0"] < 4608 and metrics["explained_variance"] > 0.5
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(4608), atol=1e-4)


def test_load_an_sae(small):
    trained = small.upto("Train with the flat configuration")["sae"]
    names = small.upto("Load an SAE")
    sae, config, sparsity = names["sae"], names["cfg_dict"], names["sparsity"]
    assert sae is not trained and torch.equal(sae.W_dec, trained.W_dec)
    assert config["d_in"] == 576 and config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert sparsity.shape == (4608,) and -10 <= float(sparsity.min()) <= float(sparsity.max()) <= 0


def test_latents_of_a_text(small):
    names = small.upto("Latents of a text")
    sae, x, latents = names["sae"], names["activations"], names["latents"]
    assert latents.shape == (*names["tokens"].shape, 4608)
    dense = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    assert torch.allclose(latents, dense, atol=1e-2)
    assert torch.equal(names["values"], latents[0].sort(descending=True).values[:, :5])
    assert float(names["error"]) < float((x - sae.b_dec)[:, 1:].square().sum(-1).mean())


def test_where_a_latent_fires_most(small):
    names = small.upto("Where a latent fires most")
    assert names["strongest"].keys() == set(names["texts"])
    assert max(names["strongest"].values()) > 0


def test_steer(small):
    names = small.upto("Steer")
    model, sae, prompt = names["model"], names["sae"], names["prompt"]
    assert names["plain"].shape == names["steered"].shape == (1, prompt.shape[1] + 3)
    assert not torch.equal(names["plain"], names["steered"])
    from fastsae.analysis.steer import steer

    hooks = [(sae.cfg.hook_name, names["steering_hook"])]
    with torch.no_grad():
        again = model.generate(prompt, fwd_hooks=hooks, **names["options"])
        with steer(model, sae, names["latent"], 60.0):
            third = model.generate(prompt, **names["options"])
    assert torch.equal(again, names["steered"]) and torch.equal(third, again)


def test_which_latents_speak_for_a_token(small):
    names = small.upto("Which latents speak for a token")
    sae, contributions = names["sae"], names["contributions"]
    with torch.no_grad():
        decoded = names["latents"][0, -2] @ sae.W_dec
        expected = decoded @ names["model"].W_U[:, names["token"]]
    assert float(contributions.sum()) == pytest.approx(float(expected), rel=1e-3, abs=1e-2)


def test_train_a_topk_sae(small):
    names = small.upto("Train a TopK SAE")
    assert names["topk_trainer"].metrics["l0"] == 50
    assert math.isfinite(names["topk_trainer"].metrics["ce_loss_score"])
    assert names["topk_sae"].cfg.k == 50


@pytest.mark.slow
def test_the_full_budget_meets_the_usual_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = Recipes(lambda block: block).upto("Train with the flat configuration")
    metrics = names["trainer"].metrics
    assert 50 <= metrics["l0"] <= 200
    assert metrics["ce_loss_score"] >= 0.8
    assert metrics["dead_latents"] / 4608 < 0.05
    assert metrics["explained_variance"] > 0.9
