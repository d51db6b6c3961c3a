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
    "inference_saes": [
        "AbsTopKSAE",
        "AbsTopKSAEConfig",
        "GatedSAE",
        "GatedSAEConfig",
        "JumpReLUSAE",
        "JumpReLUSAEConfig",
        "JumpReLUSkipTranscoder",
        "JumpReLUSkipTranscoderConfig",
        "JumpReLUTranscoder",
        "JumpReLUTranscoderConfig",
        "MatchingPursuitSAE",
        "MatchingPursuitSAEConfig",
        "SkipTranscoder",
        "SkipTranscoderConfig",
        "StandardSAE",
        "StandardSAEConfig",
        "TemporalSAE",
        "TemporalSAEConfig",
        "TopKSAE",
        "TopKSAEConfig",
        "Transcoder",
        "TranscoderConfig",
    ],
    "neuronpedia": ["get_neuronpedia_quick_list", "neuronpedia_url"],
    "plain_model": ["SAEHuggingFaceModel"],
    "runner": ["LanguageModelSAETrainingRunner", "SAETrainingRunner"],
    "saes": ["SAE", "SAEConfig", "TrainingSAEConfig"],
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

_ELSEWHERE = {
    "CacheActivationsRunner": "`fastsae harvest` writes activations to a folder",
    "CacheActivationsRunnerConfig": "`fastsae harvest` writes activations to a folder",
    "MultiSAEEvaluator": "fastsae.evaluation.evaluate.evaluate_several takes several SAEs",
    "MultiSAETrainingRunner": "fastsae.TrainerGroup trains several SAEs side by side",
    "MultiSAETrainingRunnerConfig": "fastsae.TrainerGroup trains several SAEs side by side",
    "PretokenizeRunner": "fastsae.data.tokenize cuts text into contexts",
    "PretokenizeRunnerConfig": "fastsae.data.tokenize cuts text into contexts",
    "PretrainedSaeDiskLoader": "SAE.load_from_disk(path, converter=...) takes a loader of your own",
    "PretrainedSaeHuggingfaceLoader": "SAE.from_pretrained(..., converter=...) takes a loader",
    "SAETrainer": "fastsae.Trainer trains on batches of rows",
    "register_sae_class": "add a class to fastsae.SAES, see docs/adding_a_variant.md",
    "register_sae_training_class": "add a class to fastsae.SAES, see docs/adding_a_variant.md",
}
"""Names of SAELens that are not here, and today's way."""

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no {name!r}: {_ELSEWHERE[name]}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)
