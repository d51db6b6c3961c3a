"""`run_evals`: SAELens's report on an SAE, number by number."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from fastsae.data import capture, resolve_hook, splice
from fastsae.data.replay import Replay
from fastsae.evaluation.metrics import ReconstructionMetrics
from fastsae.interop.transformer_lens import as_language_model
from fastsae.sae_lens.activations_store import ActivationsStore
from fastsae.saes import SAE
from fastsae.saes.centred import mean_of, takes_centred_rows
from fastsae_kernels import RaggedCode, entry_rows


@dataclass(kw_only=True)
class EvalConfig:
    """Which groups of metrics are computed, and on how many batches of contexts."""

    batch_size_prompts: int | None = None
    n_eval_reconstruction_batches: int = 10
    compute_kl: bool = False
    compute_ce_loss: bool = False
    n_eval_sparsity_variance_batches: int = 1
    compute_l2_norms: bool = False
    compute_sparsity_metrics: bool = False
    compute_variance_metrics: bool = False
    compute_featurewise_density_statistics: bool = False
    compute_featurewise_weight_based_metrics: bool = False


def get_eval_everything_config(
    batch_size_prompts: int | None = None,
    n_eval_reconstruction_batches: int = 10,
    n_eval_sparsity_variance_batches: int = 1,
) -> EvalConfig:
    """Every group of metrics."""
    return EvalConfig(
        batch_size_prompts=batch_size_prompts,
        n_eval_reconstruction_batches=n_eval_reconstruction_batches,
        compute_kl=True,
        compute_ce_loss=True,
        n_eval_sparsity_variance_batches=n_eval_sparsity_variance_batches,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )


@torch.no_grad()
def run_evals(
    sae: SAE,
    activation_store: ActivationsStore,
    model: Any = None,
    activation_scaler: Any = None,
    eval_config: EvalConfig | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics in SAELens's groups, and metrics of each latent.

    The sums run over contexts of the store in float64. `model` is the store's when None. Special
    tokens, all of the tokenizer's or those given, keep their activation where the SAE is spliced
    in and are left out of every mean; zero-ablation is of all positions. The SAE takes activations
    as they are: `activation_scaler` must be folded into it (`Trainer.export` does). With a
    `hook_head_index` in its metadata it is of that head, and zeros take the head's place alone.

    Raises:
        ValueError: a scale that is not folded.
    """
    if getattr(activation_scaler, "scaling_factor", None) is not None:
        raise ValueError("activation_scaler must be None: fold its scale into the SAE first")
    cfg = eval_config or EvalConfig()
    lm = activation_store.lm if model is None else as_language_model(model)
    ids = lm.special_ids if exclude_special_tokens is True else exclude_special_tokens
    ignored = torch.tensor(sorted(ids or []), dtype=torch.long, device=lm.device)
    evaluation = _Evaluation(sae, activation_store, lm, ignored, cfg)
    metrics: dict[str, dict[str, Any]] = {}
    if cfg.compute_kl or cfg.compute_ce_loss:
        metrics |= evaluation.spliced()
    rows, per_latent = evaluation.reconstruction()
    metrics |= rows
    if cfg.compute_featurewise_weight_based_metrics:
        per_latent |= weight_metrics(sae)
    prompts = cfg.batch_size_prompts or activation_store.store_batch_size_prompts
    tokens = activation_store.context_size * prompts
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": tokens * cfg.n_eval_reconstruction_batches,
        "total_tokens_eval_sparsity_variance": tokens * cfg.n_eval_sparsity_variance_batches,
    }
    return {group: found for group, found in metrics.items() if found}, per_latent


def weight_metrics(sae: SAE) -> dict[str, list[float]]:
    """Norms and angles of the latents' directions."""
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    found = {
        "encoder_norm": W_enc.norm(dim=0).tolist(),
        "encoder_decoder_cosine_sim": F.cosine_similarity(W_enc.t(), W_dec).tolist(),
    }
    return found | ({"encoder_bias": sae.b_enc.tolist()} if hasattr(sae, "b_enc") else {})


def of_flat_rows(sae: SAE) -> SAE:
    """The same SAE on rows whose heads are flattened already."""
    if sae.cfg.reshape_activations == "none":
        return sae
    flat = copy.copy(sae)
    flat.cfg, flat._heads = replace(sae.cfg, reshape_activations="none"), None
    return flat


class _Evaluation:
    def __init__(
        self,
        sae: SAE,
        store: ActivationsStore,
        lm: Any,
        ignored: Int[Tensor, " n"],
        cfg: EvalConfig,
    ) -> None:
        self.sae, self.store, self.lm = of_flat_rows(sae), store, lm
        self.ignored, self.cfg = ignored, cfg
        self.hook = resolve_hook(lm, sae.cfg.metadata["hook_name"])
        self.head = sae.cfg.metadata.get("hook_head_index")
        self.centred = takes_centred_rows(sae.cfg.metadata, lm.model)

    def spliced(self) -> dict[str, dict[str, float]]:
        """What splicing the SAE in, or zeros, costs the model."""
        sums: dict[str, Tensor] = {}
        replay: Replay | None = None
        for _ in range(self.cfg.n_eval_reconstruction_batches):
            tokens = self.store.get_batch_tokens(self.cfg.batch_size_prompts)
            keep = self._keep(tokens)
            replay = replay or Replay(self.lm, self.hook, tokens[:1])
            with replay.recorded():
                clean = self._logits(tokens)
            reconstruct = partial(self._reconstruct, keep=keep)
            zero = lambda x: self._put(x, torch.zeros_like(self._of(x)))
            with replay.replayed(), splice(self.lm, self.hook, reconstruct):
                logits = self._logits(tokens)
            with replay.replayed(), splice(self.lm, self.hook, zero):
                zeros = self._logits(tokens)
            self._add(sums, "ce_loss_without_sae", _ce(clean, tokens), keep[:, :-1])
            self._add(sums, "ce_loss_with_sae", _ce(logits, tokens), keep[:, :-1])
            self._add(sums, "ce_loss_with_ablation", _ce(zeros, tokens), keep[:, :-1])
            if self.cfg.compute_kl:
                self._add(sums, "kl_div_with_sae", _kl(clean, logits), keep)
                self._add(sums, "kl_div_with_ablation", _kl(clean, zeros), keep)
        mean = {name: float(total[0] / total[1]) for name, total in sums.items()}
        found: dict[str, dict[str, float]] = {}
        if self.cfg.compute_kl:
            sae, zero = mean.pop("kl_div_with_sae"), mean.pop("kl_div_with_ablation")
            found["model_behavior_preservation"] = {
                "kl_div_score": (zero - sae) / zero,
                "kl_div_with_ablation": zero,
                "kl_div_with_sae": sae,
            }
        if self.cfg.compute_ce_loss:
            zero, sae = mean["ce_loss_with_ablation"], mean["ce_loss_with_sae"]
            score = (zero - sae) / (zero - mean["ce_loss_without_sae"])
            found["model_performance_preservation"] = {"ce_loss_score": score, **mean}
        return found

    def reconstruction(self) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
        """Reconstruction, shrinkage and sparsity, and the density of each latent."""
        cfg, sae = self.cfg, self.sae
        wanted = {
            "shrinkage": cfg.compute_l2_norms,
            "sparsity": cfg.compute_sparsity_metrics,
            "reconstruction_quality": cfg.compute_variance_metrics,
        }
        density = cfg.compute_featurewise_density_statistics
        if not (density or any(wanted.values())):
            return {}, {}
        metrics = ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae)
        sums: dict[str, Tensor] = {}
        fired = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64)
        bias = list[float]()
        for _ in range(cfg.n_eval_sparsity_variance_batches):
            tokens = self.store.get_batch_tokens(cfg.batch_size_prompts)
            keep = self._keep(tokens)
            x = self._of(capture(self.lm, self.hook, tokens))[keep].to(sae.device, sae.dtype)
            x = x - self._mean(x)
            code = sae.encode_sparse(x)
            x_hat = sae.decode(code).reshape(x.shape)
            metrics.update(x, x_hat, code.indices, code.acts)
            self._add(sums, "l2_norm_in", x.norm(dim=-1))
            self._add(sums, "l2_norm_out", x_hat.norm(dim=-1))
            offsets = code.row_offsets if isinstance(code, RaggedCode) else None
            active = code.acts.flatten() != 0
            rows = entry_rows(offsets, code.indices).expand_as(code.indices).flatten()[active]
            latents, acts = code.indices.flatten()[active].long(), code.acts.flatten()[active]
            self._add(sums, "l1", x.new_zeros(len(x)).index_add_(0, rows, acts.abs().to(x.dtype)))
            bias.append(float(x_hat.square().sum(-1).mean() / (x * x_hat).sum(-1).mean()))
            contexts = keep.nonzero()[:, 0].to(x.device)[rows]
            once = (contexts * sae.cfg.d_sae + latents).unique() % sae.cfg.d_sae
            for at, fires in enumerate((latents, once)):
                fired[at] += fires.bincount(minlength=sae.cfg.d_sae).cpu()
        mean = {name: float(total[0] / total[1]) for name, total in sums.items()}
        result = metrics.result()
        groups = {
            "shrinkage": {
                "l2_norm_in": mean["l2_norm_in"],
                "l2_norm_out": mean["l2_norm_out"],
                "l2_ratio": result["l2_ratio"],
                "relative_reconstruction_bias": sum(bias) / len(bias),
            },
            "sparsity": {"l0": result["l0"], "l1": mean["l1"]},
            "reconstruction_quality": {
                "explained_variance": result["ev_saelens"],
                "explained_variance_legacy": result["ev_saelens_legacy"],
                "mse": result["mse"],
                "cossim": result["cosine_similarity"],
            },
        }
        per_latent = {
            "feature_density": (fired[0] / result["n_rows"]).tolist(),
            "consistent_activation_heuristic": (fired[0] / fired[1]).tolist(),
        }
        found = {name: group for name, group in groups.items() if wanted[name]}
        return found, per_latent if density else {}

    def _keep(self, tokens: Tensor) -> Bool[Tensor, "n L"]:
        return ~torch.isin(tokens, self.ignored)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.lm.model(input_ids=tokens, use_cache=False).logits.float()

    def _reconstruct(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = self._of(x).to(self.sae.device)
        x_hat = (self.sae(rows - self._mean(rows)) + self._mean(rows)).to(x)
        return torch.where(keep.unsqueeze(-1), self._put(x, x_hat), x)

    def _mean(self, x: Tensor) -> Tensor | float:
        """What rows lose that an SAE of centred ones is given."""
        return mean_of(x) if self.centred else 0.0

    def _of(self, x: Tensor) -> Tensor:
        """What the SAE sees of an activation [n, L, D]: all of it, or one head."""
        heads = x.unflatten(-1, (-1, self.sae.cfg.d_in))
        return x if self.head is None else heads[:, :, self.head]

    def _put(self, x: Tensor, seen: Tensor) -> Tensor:
        """The activation with `seen` in the place of what the SAE sees."""
        if self.head is None:
            return seen
        heads = x.unflatten(-1, (-1, self.sae.cfg.d_in)).clone()
        heads[:, :, self.head] = seen
        return heads.flatten(2)

    def _add(
        self, sums: dict[str, Tensor], name: str, values: Tensor, keep: Tensor | None = None
    ) -> None:
        values = (values if keep is None else values[keep]).double().cpu()
        total = torch.tensor([values.sum(), values.numel()], dtype=torch.float64)
        sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + total


def _ce(logits: Tensor, tokens: Tensor) -> Tensor:
    """[n, L - 1] nats a predicted token."""
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _kl(clean: Tensor, changed: Tensor) -> Tensor:
    """[n, L] KL(clean || changed) of the predictions."""
    log_p, log_q = changed.log_softmax(-1), clean.log_softmax(-1)
    return torch.linalg.vecdot(log_q.exp(), log_q - log_p)
