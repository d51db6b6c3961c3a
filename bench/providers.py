"""Whole training steps to compare: a provider is a function from a start to a step.

Every provider starts from the same weights and returns a closure that trains on one batch and gives
back the mean squared error summed over D, so that parity can be checked before anything is timed.
"""

import importlib
import importlib.util
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Start
from fastsae import OptimizerConfig, TopKConfig, TrainConfig, Trainer
from fastsae.interop.sae_lens import accelerate
from fastsae_kernels import Impl

LR = 3e-4
Step = Callable[[Tensor], float]


def fastsae_step(
    start: Start,
    *,
    clip: bool = True,
    kind: Any = "row_adam",
    impl: Impl | str = Impl.AUTO,
) -> Step:
    case = start.case
    sae_cfg = TopKConfig(d_in=case.D, d_sae=case.F, k=case.K)
    optimizer = OptimizerConfig(kind=kind, lr=LR, clip_norm=1.0 if clip else None, warm_up_steps=0)
    trainer = Trainer(
        TrainConfig(
            sae=sae_cfg,
            total_tokens=10**6 * case.B,
            batch_size=case.B,
            optimizer=optimizer,
            dead_window=10**12,
        ),
        device="cpu",
    )
    trainer.sae.impl = impl
    with torch.no_grad():
        trainer.sae.W_enc.copy_(start.W_enc)
        trainer.sae.W_dec.copy_(start.W_dec)

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.dead.since_fired.masked_fill_(start.dead.to(trainer.device), 2 * 10**12)
        return float(trainer.step(x).terms["mse"])

    return step


def sae_lens_config(tokens: int, batch_size: int, lr: float, *, dead_window: int) -> Any:
    """SAELens's trainer configuration: constant learning rate, no log, no checkpoint."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=tokens,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch_size,
        dead_feature_window=dead_window,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=50,
    )


def sae_lens_step(start: Start, *, accelerated: bool = False) -> Step:
    with quiet():
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        case = start.case
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=case.D, d_sae=case.F, k=case.K))
        if accelerated:
            sae = accelerate(sae)
        cfg = sae_lens_config(10**6 * case.B, case.B, LR, dead_window=10**9)
        no_data: Iterator[Tensor] = iter(())
        trainer = SAETrainer(cfg, sae, no_data)
    with torch.no_grad():
        sae.W_enc.copy_(start.W_enc)
        sae.W_dec.copy_(start.W_dec)

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.n_forward_passes_since_fired.masked_fill_(start.dead, 2e9)
        with quiet():
            output = trainer.step(x)
        return float(output.losses["mse_loss"].detach())

    return step


def sparsify_step(start: Start) -> Step:
    """sparsify's SparseCoder in the order of its trainer, with the Adam it takes on a CPU."""
    with quiet():
        if not torch.cuda.is_available():
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # an installed triton is not a GPU
        from sparsify import SparseCoder, SparseCoderConfig

        case = start.case
        sae = SparseCoder(case.D, SparseCoderConfig(num_latents=case.F, k=case.K), device="cpu")
    assert sae.W_dec is not None
    with torch.no_grad():
        sae.encoder.weight.copy_(start.W_enc.t())
        sae.W_dec.copy_(start.W_dec)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    since_fired = torch.zeros(case.F, dtype=torch.long)

    def step(x: Tensor) -> float:
        with quiet():
            sae.set_decoder_norm_to_unit_norm()
            out = sae(x=x, y=x, dead_mask=start.dead)
        (out.fvu + out.auxk_loss).backward()
        did_fire = torch.zeros(case.F, dtype=torch.bool)
        did_fire[out.latent_indices.flatten()] = True
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x)).masked_fill_(did_fire, 0)
        spread = (x - x.mean(0)).square().sum()
        return float(out.fvu.detach() * spread / len(x))

    return step


def dictionary_learning_step(start: Start) -> Step:
    """dictionary_learning's TopKTrainer, from its second step on: the first sets b_dec."""
    case = start.case
    trainer = _top_k_trainers().TopKTrainer(
        steps=10**6,
        activation_dim=case.D,
        dict_size=case.F,
        k=case.K,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=0,
        device="cpu",
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(start.W_enc.t())
        trainer.ae.decoder.weight.copy_(start.W_dec.t())
    steps = itertools.count(1)

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.num_tokens_since_fired.masked_fill_(start.dead, 2 * 10**7)
        with torch.no_grad():  # for the parity check: its loss weights AuxK otherwise
            mse = (trainer.ae(x) - x).square().sum(-1).mean() if start.dead is not None else None
        loss = trainer.update(next(steps), x)
        return float(loss if mse is None else mse)

    return step


def _top_k_trainers() -> Any:
    """The module without its package's `__init__`, which imports nnsight, which patches torch."""
    name = "dictionary_learning"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"{name} is not installed: pip install --no-deps {name}==0.1.0")
        package = ModuleType(name)
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or [])
        sys.modules[name] = package
    with quiet():
        return importlib.import_module(f"{name}.trainers.top_k")


def plain_step(start: Start) -> Step:
    """The best plain PyTorch known: dense scores, `topk`, a bag for the decoder, fused Adam."""
    case = start.case
    W_enc = start.W_enc.clone().requires_grad_()
    W_dec = start.W_dec.clone().requires_grad_()
    b_enc = torch.zeros(case.F, requires_grad=True)
    b_dec = torch.zeros(case.D, requires_grad=True)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    since_fired = torch.zeros(case.F, dtype=torch.long)

    def step(x: Tensor) -> float:
        norms = W_dec.detach().norm(dim=1)
        h = torch.addmm(b_enc, x - b_dec, W_enc)
        indices = (h.detach() * norms).topk(case.K, dim=1, sorted=False).indices
        acts = h.gather(1, indices).relu()
        x_hat = F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec
        mse = (x_hat - x).square().sum(1).mean()
        optimizer.zero_grad()
        mse.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        fired = indices.flatten().bincount(minlength=case.F) > 0
        since_fired.add_(len(x)).masked_fill_(fired, 0)
        return float(mse.detach())

    return step


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PROVIDERS: dict[str, Callable[[Start], Step]] = {
    "fastsae": lambda start: fastsae_step(start),
    "fastsae-no-clip": lambda start: fastsae_step(start, clip=False),
    "fastsae-plain-adam": lambda start: fastsae_step(start, kind="adam"),
    "reference": lambda start: fastsae_step(start, kind="adam", impl=Impl.REFERENCE),
    "plain-pytorch": plain_step,
    "sae-lens": sae_lens_step,
    "sae-lens-accelerated": lambda start: sae_lens_step(start, accelerated=True),
    "sparsify": sparsify_step,
    "dictionary-learning": dictionary_learning_step,
}
PEERS = ["fastsae", "sae-lens", "sae-lens-accelerated", "sparsify", "dictionary-learning"]
"""What `--peers` compares: libraries, each as its users run it."""
