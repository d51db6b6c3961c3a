"""No variant keeps a tensor of tokens x latents for its backward pass, sparse code or not."""

from math import prod
from typing import Any

import pytest
import torch

from fastsae import SAES
from fastsae_kernels import workspace

D, F, B = 8, 4096, 256
DEAD = torch.arange(F) % 3 == 0
JUMP = {"jumprelu_bandwidth": 0.5}
TRAINABLE: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [64, 512, F]},
    "standard": {},
    "legacy_standard": {},
    "gated": {},
    "jumprelu": JUMP,
    "matching_pursuit": {"max_iterations": 4},
    "transcoder": {"d_out": 6},
    "skip_transcoder": {"d_out": 6},
    "jumprelu_transcoder": {"d_out": 6, **JUMP},
    "jumprelu_skip_transcoder": {"d_out": 6, **JUMP},
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "ghosts": {"use_ghost_grads": True},
    "p2": {"lp_norm": 2.0},
    "levels": {"use_matryoshka_aux_loss": True},
    "tanh": {"jumprelu_sparsity_loss_mode": "tanh"},
    "to-input": {"jumprelu_ste_to_input": True},
    "pre-act": {"pre_act_loss_coefficient": 0.1},
    "frequency": {"frequency_coefficient": 0.1},
}
OF = {
    "ghosts": "standard",
    "p2": "standard",
    "levels": "matryoshka_batchtopk",
    "tanh": "jumprelu",
    "to-input": "jumprelu",
    "pre-act": "jumprelu",
    "frequency": "jumprelu",
}
CASES = {name: (name, fields) for name, fields in TRAINABLE.items()} | {
    f"{OF[name]}-{name}": (OF[name], {**TRAINABLE[OF[name]], **fields})
    for name, fields in VARIATIONS.items()
}


def test_every_variant_that_trains_is_covered():
    assert {*TRAINABLE, "temporal"} == set(SAES)


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_tokens_times_latents_is_saved(case):
    architecture, fields = CASES[case]
    kind = SAES[architecture]
    sae = kind(kind.config_class(d_in=D, d_sae=F, **fields))
    x = torch.randn(B, D)
    options: Any = {"target": torch.randn(B, 6)} if "d_out" in fields else {}
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with workspace(1 << 20):  # a sixteenth of the dense latents: chunks are really made
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sae.loss(x, DEAD, **options)
        loss.total.backward()
    assert all(p.grad is not None for name, p in sae.named_parameters() if name != "threshold")
    # Of the whole loss, chunks included; what a chunk saves is gone before the next one.
    largest = max(saved, key=prod, default=())
    assert prod(largest) < B * F / 3, f"saved {largest}"
