"""The runs that several processes make together and one process makes alone."""

from typing import Any

import torch

import fastsae
from training_runs import D, F, config, sparse_rows

B, STEPS = 64, 20
MESHES = {2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4)]}
SHAPE: dict[str, Any] = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
OUT: dict[str, Any] = {"d_in": D, "d_sae": F, "d_out": 12}

SAES = {
    "topk": fastsae.TopKConfig(**SHAPE, k=5),
    # More than a shard of 4 holds, and F that no shard count divides.
    "topk-large-k": fastsae.TopKConfig(**{**SHAPE, "d_sae": 90}, k=40),
    "topk-without-norms": fastsae.TopKConfig(**SHAPE, k=5, rescale_acts_by_decoder_norm=False),
    "abstopk": fastsae.AbsTopKConfig(**SHAPE, k=5),
    "batchtopk": fastsae.BatchTopKConfig(**SHAPE, k=4.5),
    "matryoshka": fastsae.MatryoshkaBatchTopKConfig(**SHAPE, k=5),
    "matryoshka-aux": fastsae.MatryoshkaBatchTopKConfig(
        **SHAPE, k=5, matryoshka_widths=(10, 50), use_matryoshka_aux_loss=True
    ),
    "standard": fastsae.StandardConfig(**SHAPE, l1_coefficient=0.5),
    "legacy-standard": fastsae.LegacyStandardConfig(**SHAPE, mse_loss_normalization="dense_batch"),
    "standard-p": fastsae.StandardConfig(**SHAPE, l1_coefficient=0.5, lp_norm=1.5),
    "standard-p-half": fastsae.StandardConfig(**SHAPE, l1_coefficient=0.01, lp_norm=0.5),
    "standard-p-sparse": fastsae.StandardConfig(**SHAPE, l1_coefficient=20.0, lp_norm=2.0),
    "standard-ghosts": fastsae.StandardConfig(**SHAPE, l1_coefficient=3.0, use_ghost_grads=True),
    "jumprelu": fastsae.JumpReLUConfig(**SHAPE, l0_coefficient=0.1),
    "jumprelu-sparse": fastsae.JumpReLUConfig(
        **SHAPE,
        l0_coefficient=0.1,
        jumprelu_init_threshold=0.25,
        jumprelu_bandwidth=0.1,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=5.0,
    ),
    "jumprelu-tanh": fastsae.JumpReLUConfig(
        **SHAPE,
        l0_coefficient=0.1,
        jumprelu_sparsity_loss_mode="tanh",
        pre_act_loss_coefficient=0.1,
        frequency_coefficient=0.1,
    ),
    "gated": fastsae.GatedConfig(**SHAPE, l1_coefficient=0.2),
    "transcoder": fastsae.TranscoderConfig(**OUT, l1_coefficient=0.5),
    "skip_transcoder": fastsae.SkipTranscoderConfig(**OUT, l1_coefficient=0.5),
}
TRAFFIC = fastsae.TopKConfig(**SHAPE, k=5, aux_loss_coefficient=0.0)
CASES: dict[str, dict[str, Any]] = {name: {"sae": sae} for name, sae in SAES.items()} | {
    "topk/rows": {"sae": SAES["topk"], "exchange": "rows"},
    "topk/pairs": {"sae": SAES["topk"], "exchange": "pairs"},
    "topk/micro": {"sae": SAES["topk"], "data": {"micro_batch_size": 8}, "exchange": "pairs"},
    "topk/micro-rows": {"sae": SAES["topk"], "data": {"micro_batch_size": 8}, "exchange": "rows"},
    "topk/adam": {"sae": SAES["topk"], "kind": "adam"},
    "topk/unit": {"sae": SAES["topk"], "optimizer": {"unit_norm_decoder": True}},
    "topk/8bit-rows": {
        "sae": SAES["topk"],
        "exchange": "rows",
        "optimizer": {"moments": "8bit"},
    },
    "topk/bf16": {"sae": SAES["topk"], "data": {"compute_dtype": "bfloat16"}, "exchange": "rows"},
    "standard/pairs": {"sae": SAES["standard"], "exchange": "pairs"},
    "jumprelu/pairs": {"sae": SAES["jumprelu-sparse"], "exchange": "pairs"},
    "traffic/rows": {"sae": TRAFFIC, "exchange": "rows", "log": {"every": STEPS}},
    "traffic/pairs": {"sae": TRAFFIC, "exchange": "pairs", "log": {"every": STEPS}},
    "traffic/micro": {
        "sae": TRAFFIC,
        "exchange": "pairs",
        "data": {"micro_batch_size": 8},
        "log": {"every": STEPS},
    },
}
TWICE = {2: ("topk", "topk/rows", "batchtopk", "jumprelu"), 4: ("topk/rows", "batchtopk")}
"""Cases that so many processes run again, to the same bits."""
CHECKPOINTED = {2: ("topk/rows", "topk/adam", "batchtopk"), 4: ("topk/rows", "batchtopk")}
OF_FOUR = (*SAES, "topk/rows", "topk/pairs", "traffic/rows", "traffic/pairs")
"""Cases that four processes run."""
ALL_STEPS = {
    2: (*TWICE[2], "matryoshka", "standard", "jumprelu-sparse", "gated", "transcoder"),
    4: TWICE[4],
}
"""Cases that so many processes run for all steps, and the others for `FEW`."""
FEW = 4


def run_config(case: str):
    values = {"steps": STEPS, "dead_window": 5 * B, "log": {"every": 1}, **CASES[case]}
    return config(schedule={"warm_up_steps": 0, "decay_steps": 0}, **values)


def batches(case: str):
    """The whole batches of a case: rows, or rows and targets."""
    rows = sparse_rows(STEPS * B, seed=1).split(B)
    if not hasattr(CASES[case]["sae"], "d_out") or CASES[case]["sae"].d_out == D:
        return [(x,) for x in rows]
    mapped = torch.randn(D, 12, generator=torch.Generator().manual_seed(2))
    return [(x, x @ mapped) for x in rows]


def steps_of(case: str, world: int) -> int:
    return STEPS if case in ALL_STEPS[world] else FEW
