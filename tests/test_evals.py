"""`run_evals` gives SAELens's figures on SAELens's own model and store."""

import math
import warnings
from typing import Any

import datasets
import pytest
import torch

import fastsae
from fastsae.data import load_language_model, resolve_hook
from fastsae.evaluation.evaluate import evaluate_on_text
from fastsae.sae_lens import ActivationsStore, get_eval_everything_config, run_evals
from fastsae.sae_lens.evals import EvalConfig
from tiny_models import save_tiny_llama, tiny_llama

HOOK = "blocks.1.hook_resid_post"
D, F, L, N = 16, 48, 12, 4


def dataset():
    tokens = torch.randint(50, (40, L), generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict({"tokens": tokens.tolist()})


def make(architecture, **fields):
    torch.manual_seed(0)
    config = fastsae.SAES[architecture].config_class
    sae = fastsae.SAES[architecture](
        config(d_sae=F, metadata={"hook_name": HOOK, "model_name": "tiny"}, **{"d_in": D, **fields})
    )
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            shape = value.shape
            value.copy_(torch.rand(shape) if name == "threshold" else 0.3 * torch.randn(shape))
    return sae


@pytest.fixture(scope="module")
def hooked_transformer():
    pytest.importorskip("sae_lens")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens's own deprecations
        torch.manual_seed(1)
        return HookedTransformer(
            HookedTransformerConfig(
                n_layers=3, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu"
            )
        )


def stores(model, **changes):
    from sae_lens import ActivationsStore as Theirs

    shared: dict[str, Any] = {
        "hook_name": HOOK,
        "hook_head_index": None,
        "context_size": L,
        "d_in": D,
        "n_batches_in_buffer": 8,
        "store_batch_size_prompts": N,
        "train_batch_size_tokens": 16,
        "prepend_bos": True,
        "streaming": False,
        "dtype": "float32",
        **changes,
    }
    cpu = torch.device("cpu")
    theirs = Theirs(
        model,
        dataset(),
        total_training_tokens=480,
        normalize_activations="none",
        device=cpu,
        **shared,
    )
    return ActivationsStore(model, dataset(), device=cpu, **shared), theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ignored", [(), (3, 7)], ids=["all tokens", "without special ones"])
@pytest.mark.parametrize(
    "architecture, fields", [("topk", {"k": 5}), ("standard", {}), ("jumprelu", {})]
)
def test_every_figure_is_sae_lenss(architecture, fields, ignored, hooked_transformer, tmp_path):
    import sae_lens
    from sae_lens.evals import get_eval_everything_config as everything
    from sae_lens.evals import run_evals as their_run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = make(architecture, **fields)
    sae.save_model(tmp_path)
    ours, theirs = stores(hooked_transformer)
    wanted, wanted_per_latent = their_run_evals(
        sae_lens.SAE.load_from_disk(tmp_path),
        theirs,
        hooked_transformer,
        ActivationScaler(),
        everything(N, 3, 3),
        exclude_special_tokens=list(ignored) or False,
    )
    found, per_latent = run_evals(
        sae,
        ours,
        eval_config=get_eval_everything_config(N, 3, 3),
        exclude_special_tokens=list(ignored) or False,
    )
    assert found.keys() == wanted.keys()
    for group, values in wanted.items():
        assert found[group] == pytest.approx(values, rel=1e-4), group
    assert per_latent.keys() == wanted_per_latent.keys()
    for name, values in wanted_per_latent.items():
        got, want = torch.tensor(per_latent[name]), torch.tensor(values)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6, equal_nan=True), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [None, 1])
def test_heads_are_sae_lenss(head, hooked_transformer, tmp_path):
    import sae_lens
    from sae_lens.evals import get_eval_everything_config as everything
    from sae_lens.evals import run_evals as their_run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    hook = "blocks.1.attn.hook_z"
    width, reshape = (D, "hook_z") if head is None else (D // 2, "none")
    sae = make("topk", k=5, d_in=width, reshape_activations=reshape)
    sae.cfg.metadata.update(hook_name=hook, hook_head_index=head)
    sae.save_model(tmp_path)
    ours, theirs = stores(hooked_transformer, hook_name=hook, hook_head_index=head, d_in=width)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    wanted, _ = their_run_evals(
        loaded, theirs, hooked_transformer, ActivationScaler(), everything(N, 2, 2), {}, False
    )
    config = get_eval_everything_config(N, 2, 2)
    found, _ = run_evals(sae, ours, eval_config=config, exclude_special_tokens=False)
    for group, values in wanted.items():  # a score of a small effect: rounding of the losses counts
        assert found[group] == pytest.approx(values, rel=1e-3), group


@pytest.mark.filterwarnings("ignore")
def test_evaluate_agrees_with_sae_lens_on_the_same_batch(tmp_path, monkeypatch):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.evals import get_eval_everything_config as everything
    from sae_lens.evals import run_evals as their_run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(save_tiny_llama(tmp_path / "model", initializer_range=0.5))
    lm, bridged = (load_language_model(folder) for _ in "ab")  # a bridge takes its model apart
    bridge: Any = TransformerBridge.boot_transformers(
        folder, hf_model=bridged.model, tokenizer=bridged.tokenizer
    )
    where = "blocks.0.hook_resid_post"
    sae = make("topk", k=5)
    sae.cfg.metadata.update(hook_name=where, model_name=folder)
    sae.save_model(tmp_path / "sae")
    _, store = stores(bridge, hook_name=where)
    batches: list[torch.Tensor] = []
    get_batch = store.get_batch_tokens
    monkeypatch.setattr(
        store, "get_batch_tokens", lambda n: batches.append(get_batch(n)) or batches[-1]
    )
    wanted, wanted_per_latent = their_run_evals(
        sae_lens.SAE.load_from_disk(tmp_path / "sae"),
        store,
        bridge,
        ActivationScaler(),
        everything(N, 1, 1),
        exclude_special_tokens=False,
    )
    everything_kept = {"skip_first": 0, "drop_special": False, "massive_multiple": math.inf}
    hook = resolve_hook(lm, where)
    # Theirs draws one batch for the losses and another for the rows.
    of_loss, of_rows = (
        evaluate_on_text({"": sae}, lm, hook, tokens, **everything_kept)[""] for tokens in batches
    )
    rows, loss = of_rows["rows"], of_loss["cross_entropy"]["trained_rows"]
    quality, kept = wanted["reconstruction_quality"], wanted["model_performance_preservation"]
    for ours, theirs in (
        (rows["l0"], wanted["sparsity"]["l0"]),
        (rows["ev_saelens"], quality["explained_variance"]),
        (rows["ev_saelens_legacy"], quality["explained_variance_legacy"]),
        (rows["mse"], quality["mse"]),
        (rows["cosine_similarity"], quality["cossim"]),
        (rows["l2_ratio"], wanted["shrinkage"]["l2_ratio"]),
        (
            rows["relative_reconstruction_bias"],
            wanted["shrinkage"]["relative_reconstruction_bias"],
        ),
        (rows["density_max"], max(wanted_per_latent["feature_density"])),
        (loss["ce_clean"], kept["ce_loss_without_sae"]),
        (loss["ce_spliced"], kept["ce_loss_with_sae"]),
        (loss["ce_zero_ablated"], kept["ce_loss_with_ablation"]),
        (loss["ce_loss_score"], kept["ce_loss_score"]),
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


def tiny_store():
    return ActivationsStore(
        tiny_llama(), dataset(), hook_name=HOOK, context_size=L, store_batch_size_prompts=N
    )


def test_a_perfect_sae_costs_nothing():
    sae = fastsae.StandardSAE(
        fastsae.StandardConfig(d_in=D, d_sae=2 * D, metadata={"hook_name": HOOK})
    )
    with torch.no_grad():
        eye = torch.eye(D)
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_dec.zero_()
    found, _ = run_evals(
        sae,
        tiny_store(),
        eval_config=get_eval_everything_config(N, 2, 2),
        exclude_special_tokens=(),
    )
    assert found["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert found["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert found["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(0, abs=1e-5)
    assert found["sparsity"]["l0"] == pytest.approx(D)
    assert found["shrinkage"]["l2_ratio"] == pytest.approx(1, abs=1e-5)


def test_groups_that_are_not_asked_for_are_absent():
    config = EvalConfig(compute_sparsity_metrics=True)
    found, per_latent = run_evals(
        make("topk", k=5), tiny_store(), eval_config=config, exclude_special_tokens=()
    )
    assert found.keys() == {"sparsity", "token_stats"} and per_latent == {}


def test_what_it_cannot_do_says_so():
    sae = make("topk", k=5)
    scaler = type("Scaler", (), {"scaling_factor": 2.0})()
    with pytest.raises(ValueError, match="activation_scaler must be None: fold"):
        run_evals(sae, tiny_store(), activation_scaler=scaler)
