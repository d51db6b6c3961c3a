"""SAEs trained on a centred residual stream, evaluated on a model whose stream is not."""

from typing import Any

import datasets
import pytest
import torch
import transformers

from fastsae import StandardConfig, StandardSAE
from fastsae.data import LanguageModel, harvest, resolve_hook
from fastsae.evaluation.evaluate import evaluate, report_table
from fastsae.sae_lens import ActivationsStore, get_eval_everything_config, run_evals
from fastsae.saes.centred import expects_centred_rows, has_layer_norm
from tiny_models import tiny_llama

D, F, HOOK = 16, 32, "blocks.0.hook_resid_post"
TOKENS = torch.randint(50, (12, 10), generator=torch.Generator().manual_seed(0))
CENTRED = {"hook_name": HOOK, "model_from_pretrained_kwargs": {"center_writing_weights": True}}


def gpt2() -> LanguageModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=D,
        n_layer=2,
        n_head=2,
        n_inner=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "ln" not in name:
            value.data.normal_(mean=0.5, std=0.3)
    no_tokenizer: Any = None
    return LanguageModel("tiny", model, no_tokenizer)


def exact_on_centred_rows(metadata) -> StandardSAE:
    """Gives back every row whose mean is 0, and takes the mean off any other."""
    sae = StandardSAE(StandardConfig(d_in=D, d_sae=F, metadata=metadata))
    off_mean = torch.eye(D) - 1 / D
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([off_mean, -off_mean], 1))
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    return sae


def test_the_report_has_the_cross_entropy_before_and_after_centring():
    lm, sae = gpt2(), exact_on_centred_rows(CENTRED)
    with torch.no_grad():
        # The rows' mean leaks into the acts, as it does into those of an SAE that never saw one.
        sae.W_enc[:, :5].add_(0.2)
        sae.W_enc[:, D : D + 5].sub_(0.2)
    hook = resolve_hook(lm, HOOK)
    report = evaluate(sae, lm, hook, harvest(lm, hook, TOKENS))
    ce = report["cross_entropy"]
    after, before = ce["trained_rows"], ce["rows_not_centred"]
    assert after["ce_spliced"] == pytest.approx(after["ce_clean"], abs=1e-4)
    assert report["rows"]["fvu"] < 1e-6
    assert before["ce_clean"] == after["ce_clean"]
    assert abs(before["ce_spliced"] - after["ce_clean"]) > 1e-3
    assert f"CE {before['ce_spliced']:.4f} on rows as they are" in report_table(report)


def test_an_sae_that_says_nothing_gets_its_rows_as_they_are():
    lm, sae = gpt2(), exact_on_centred_rows({"hook_name": HOOK})
    hook = resolve_hook(lm, HOOK)
    report = evaluate(sae, lm, hook, harvest(lm, hook, TOKENS))
    assert report["cross_entropy"]["rows_not_centred"] is None
    assert report["rows"]["fvu"] > 1e-3


def test_where_rows_are_centred():
    assert expects_centred_rows(CENTRED) and has_layer_norm(gpt2().model)
    assert not expects_centred_rows({**CENTRED, "hook_name": "blocks.0.attn.hook_z"})
    assert not expects_centred_rows({"hook_name": HOOK})
    assert not has_layer_norm(tiny_llama().model), "RMS norm does not take the mean off"


def store_of(lm: LanguageModel, **options: Any) -> ActivationsStore:
    from types import SimpleNamespace

    tokenizer: Any = SimpleNamespace(all_special_ids=[], bos_token_id=0, eos_token_id=0)
    lm = LanguageModel("tiny", lm.model, tokenizer)
    dataset = datasets.Dataset.from_dict({"tokens": TOKENS.tolist() * 4})
    shared = {"context_size": 10, "store_batch_size_prompts": 4, "train_batch_size_tokens": 16}
    return ActivationsStore(lm, dataset, hook_name=HOOK, prepend_bos=False, **shared, **options)


def test_a_store_takes_the_means_off_where_the_model_was_to_be_centred():
    lm = gpt2()
    centred = store_of(lm, model_from_pretrained_kwargs={"center_writing_weights": True})
    plain = store_of(lm)
    rows, as_they_are = centred.get_activations(TOKENS), plain.get_activations(TOKENS)
    assert float(rows.mean(-1).abs().max()) < 1e-5 < float(as_they_are.mean(-1).abs().max())
    assert torch.allclose(rows, as_they_are - as_they_are.mean(-1, keepdim=True))
    assert float(centred.next_batch().mean(-1).abs().max()) < 1e-5


def test_sae_lens_evaluations_centre_rows_and_put_the_means_back():
    lm, sae = gpt2(), exact_on_centred_rows(CENTRED)
    store = store_of(lm, model_from_pretrained_kwargs={"center_writing_weights": True})
    metrics, _ = run_evals(
        sae, store, eval_config=get_eval_everything_config(n_eval_reconstruction_batches=2)
    )
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-4)
    ce = metrics["model_performance_preservation"]
    assert ce["ce_loss_with_sae"] == pytest.approx(ce["ce_loss_without_sae"], abs=1e-4)
