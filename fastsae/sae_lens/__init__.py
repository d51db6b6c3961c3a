"""SAELens's names: `from fastsae.sae_lens import SAE, HookedSAETransformer, ...`.

What needs TransformerLens is imported when it is asked for.
"""

import importlib
from typing import Any

_MODULES = {
    "activations_store": ["ActivationsStore"],
    "bridge": ["SAETransformerBridge"],
    "config": ["LanguageModelSAERunnerConfig", "LoggingConfig"],
    "evals": ["EvalConfig", "get_eval_everything_config", "run_evals"],
    "hooked_sae": ["HookedSAE", "hooked"],
    "hooked_transformer": ["HookedSAETransformer"],
    "neuronpedia": ["get_neuronpedia_quick_list", "neuronpedia_url"],
    "plain_model": ["SAEHuggingFaceModel"],
    "runner": ["LanguageModelSAETrainingRunner", "SAETrainingRunner"],
    "saes": ["SAE"],
    "training_saes": [
        "AbsTopKTrainingSAE",
        "AbsTopKTrainingSAEConfig",
        "BatchTopKTrainingSAE",
        "BatchTopKTrainingSAEConfig",
        "GatedTrainingSAE",
        "GatedTrainingSAEConfig",
        "JumpReLUTrainingSAE",
        "JumpReLUTrainingSAEConfig",
        "MatchingPursuitTrainingSAE",
        "MatchingPursuitTrainingSAEConfig",
        "MatryoshkaBatchTopKTrainingSAE",
        "MatryoshkaBatchTopKTrainingSAEConfig",
        "StandardTrainingSAE",
        "StandardTrainingSAEConfig",
        "TopKTrainingSAE",
        "TopKTrainingSAEConfig",
        "TrainStepInput",
        "TrainStepOutput",
        "TrainingSAE",
    ],
    "upload": ["upload_saes_to_huggingface"],
}
_HOME = {name: f"fastsae.sae_lens.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)
