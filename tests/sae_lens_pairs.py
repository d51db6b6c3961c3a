"""Every variant twice, ours and SAELens 6.54's in its training form, with the same weights."""

import torch

from fastsae import SAES
from parity import relative_error

D, F, B = 16, 96, 64
RUN_TIME = ("constant_norm_rescale", "layer_norm")
TERMS = {
    "mse_loss": "mse",
    "l1_loss": "l1",
    "l0_loss": "l0",
    "pre_act_loss": "pre_act",
    "inner_mse_loss_16": "inner_mse_16",
    "inner_mse_loss_40": "inner_mse_40",
}
"""Their names of loss terms -> ours."""
JUMP = {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.5, "l0_coefficient": 0.7}
NESTED = {"k": 6.5, "matryoshka_widths": [16, 40, F]}
CASES = {
    "standard": ("standard", {"l1_coefficient": 0.3}),
    "standard-p2": ("standard", {"l1_coefficient": 0.3, "lp_norm": 2.0}),
    "standard-p0.7": ("standard", {"l1_coefficient": 0.3, "lp_norm": 0.7}),
    "gated": ("gated", {"l1_coefficient": 0.3}),
    "topk": ("topk", {"k": 6}),
    "abstopk": ("abstopk", {"k": 6}),
    "abstopk-unscaled": ("abstopk", {"k": 6, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("batchtopk", {"k": 6.5}),
    "batchtopk-unscaled": ("batchtopk", {"k": 6.5, "rescale_acts_by_decoder_norm": False}),
    "matryoshka": ("matryoshka_batchtopk", NESTED),
    "matryoshka-levels": ("matryoshka_batchtopk", {**NESTED, "use_matryoshka_aux_loss": True}),
    "jumprelu-step": ("jumprelu", JUMP),
    "jumprelu-tanh": ("jumprelu", {**JUMP, "jumprelu_sparsity_loss_mode": "tanh"}),
    "jumprelu-quadratic": (
        "jumprelu",
        {**JUMP, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 9.0},
    ),
    "jumprelu-input": ("jumprelu", {**JUMP, "jumprelu_ste_to_input": True}),
    "jumprelu-pre-act": ("jumprelu", {**JUMP, "pre_act_loss_coefficient": 0.2}),
    "matching-pursuit": ("matching_pursuit", {"max_iterations": 5}),
}
AUXILIARY = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk"}
TRANSCODERS = {
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
}


def randomised(state):
    """Weights that training could have left."""
    drawn = {}
    for name, value in state.items():
        if value.ndim == 0:
            drawn[name] = value
        elif name == "threshold":
            drawn[name] = torch.rand(value.shape) * 0.5
        elif name == "W_dec":
            rows = torch.randn(value.shape)
            drawn[name] = rows / rows.norm(dim=1, keepdim=True) * (torch.rand(len(rows), 1) + 0.5)
        else:
            drawn[name] = torch.randn(value.shape) * 0.3
    return drawn


def pair(peer, case, **changes):
    """One SAE twice, ours and theirs in its training form, with the same weights."""
    architecture, fields = CASES[case]
    fields = {"d_in": D, "d_sae": F, **fields, **changes}
    ours_class = SAES[architecture]
    ours = ours_class(ours_class.config_class(**fields))
    their_class, their_config = peer.registry.get_sae_training_class(architecture)
    theirs = their_class(their_config(**fields))
    state = randomised(theirs.state_dict())
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return ours, theirs


def rows(n=B):
    return torch.randn(n, 5) @ torch.randn(5, D) + 0.3 * torch.randn(n, D) + 0.5


def coefficients(cfg):
    return {"l1": getattr(cfg, "l1_coefficient", 0), "l0": getattr(cfg, "l0_coefficient", 0)}


def their_loss(peer, theirs, x, dead):
    step = peer.saes.sae.TrainStepInput(
        sae_in=x,
        coefficients=coefficients(theirs.cfg),
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )
    return theirs.training_forward_pass(step)


def assert_close(got, want, name, tolerance):
    error = relative_error(got.detach(), want.detach())
    assert error <= tolerance, f"{name}: {error:.1e}"
