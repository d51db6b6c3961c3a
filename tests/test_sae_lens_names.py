"""SAELens's public names, fields and methods: here, or said to be elsewhere, and on the page."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastsae.sae_lens as ours
from fastsae.sae_lens import flat_config
from fastsae.sae_lens.config import OTHER_NAMES, TODAY, WRITTEN_BY_SAE_LENS

theirs = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
PAGE = (Path(__file__).parent.parent / "docs/migrating_from_saelens.md").read_text()
ON_PAGE = set(re.findall(r"`(\w+)`", PAGE))
NOT_AN_API = {"logger", "pretokenize_runner", "has_transformer_bridge"}
"""Names that its package has by the way."""
INFERENCE = {
    "standard": ours.StandardSAE,
    "gated": ours.GatedSAE,
    "topk": ours.TopKSAE,
    "abstopk": ours.AbsTopKSAE,
    "jumprelu": ours.JumpReLUSAE,
    "matching_pursuit": ours.MatchingPursuitSAE,
}


def public_names():
    return [
        name
        for name in dir(theirs)
        if not name.startswith("_")
        and not isinstance(getattr(theirs, name), ModuleType)
        and name not in NOT_AN_API
    ]


@pytest.mark.parametrize("name", public_names())
def test_every_name_is_here_or_says_where_to_go(name):
    try:
        assert getattr(ours, name) is not None
    except AttributeError as error:
        assert f"has no {name!r}: " in str(error)


@pytest.mark.parametrize("architecture", INFERENCE)
def test_inference_configurations_have_their_fields_and_defaults(architecture):
    kind = INFERENCE[architecture]
    config = getattr(ours, f"{kind.__name__}Config")
    their_config = theirs.registry.get_sae_class(architecture)[1]
    shape = {"d_in": 4, "d_sae": 128}
    mine, wanted = config(**shape), their_config(**shape)
    for field in dataclasses.fields(their_config):
        if field.name not in ("metadata", "dtype"):
            assert getattr(mine, field.name) == getattr(wanted, field.name), field.name


@pytest.mark.parametrize("architecture", INFERENCE)
def test_an_sae_made_from_a_configuration_is_of_the_class_that_loads(architecture, tmp_path):
    kind = INFERENCE[architecture]
    config = getattr(ours, f"{kind.__name__}Config")
    k = {"k": 2} if "k" in {f.name for f in dataclasses.fields(config)} else {}
    sae, x = kind(config(d_in=4, d_sae=8, **k)), torch.randn(3, 4)
    sae.save_model(tmp_path)
    loaded = ours.SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, kind)
    assert torch.equal(loaded(x), sae(x))


def test_hooks_last_until_they_are_reset():
    sae = ours.StandardSAE(ours.StandardSAEConfig(d_in=4, d_sae=8))
    seen, x = [], torch.randn(2, 4)
    keep = lambda value, hook: seen.append(hook.name)
    sae.add_hook("hook_sae_acts_post", keep)
    sae(x)
    with sae.hooks([("hook_sae_recons", keep)]):
        sae(x)
    sae.reset_hooks()
    sae(x)
    assert seen == ["hook_sae_acts_post"] * 2 + ["hook_sae_recons"]
    with pytest.raises(ValueError, match="did you mean 'hook_sae_acts_post'"):
        sae.add_hook("hook_sae_act_post", keep)


def test_every_field_of_today_is_taken_and_on_the_page():
    fields = {f.name for f in dataclasses.fields(theirs.LanguageModelSAERunnerConfig)}
    assert fields <= {*TODAY, *WRITTEN_BY_SAE_LENS}
    assert fields <= ON_PAGE, fields - ON_PAGE


def test_every_flat_field_is_on_the_page():
    assert {*flat_config.KNOWN, *OTHER_NAMES} <= ON_PAGE


def test_every_method_is_on_the_page():
    from transformer_lens import HookedRootModule

    general = {name for kind in (torch.nn.Module, HookedRootModule) for name in dir(kind)}
    methods = {
        name
        for kind in (theirs.TopKTrainingSAE, theirs.StandardTrainingSAE, theirs.SAE)
        for name, _ in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name not in general
    }
    assert methods <= ON_PAGE, methods - ON_PAGE
