"""The settings of the main job: a language model's activations -> SAEs."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fastsae.checks import check_choice, check_counts
from fastsae.data.model_rows import NonFinite
from fastsae.distributed.mesh import TIMEOUT_SECONDS
from fastsae.saes import SAES
from fastsae.saes.transcoder import Transcodes
from fastsae.training.centre import Centre
from fastsae.training.config import Exchanged, OptimizerConfig, ScheduleConfig, Tracking
from fastsae.training.directions import Directions
from fastsae.training.side_by_side import SET_BY_THE_RUN, runs_of

Distribution = Literal["split", "layers"]
FROM_SHARDS = (
    *("model", "revision", "dataset", "text_column", "split", "context_size", "harvest_tokens"),
    *("drop_special", "massive_multiple", "nonfinite", "stream", "buffer_rows", "mixing"),
)
"""Fields of a run that mean nothing where its rows come from a harvest."""

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with the stage, what is done, what there is to do, and figures worth showing."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun:
    """Train one SAE on the activations of a language model, evaluate and save it."""

    out: Path
    """Folder for the SAE (`sae/`), the log, checkpoints, evaluation and pictures."""
    model: str | None = None
    """Hub name, local folder or .gguf file; None: SmolLM2-135M-Instruct, offline."""
    revision: str = "main"
    """Branch, tag or commit of a model on a hub."""
    layer: int | None = None
    """Train on the residual stream after this layer; None: the middle one."""
    hook: str | None = None
    """Another place than the residual stream: `blocks.8.hook_mlp_out`, or a module's path."""
    dataset: str | None = None
    """Hub name or local text, jsonl, parquet or csv; None: Wikipedia articles, offline. What is
    large or on a hub is streamed, in its own order, as far as the tokens need."""
    text_column: str | None = None
    split: str = "train"
    """Split of a hub dataset. A tenth of any text, whole documents drawn at random, is held out."""
    context_size: int = 128
    """Tokens a context."""
    tokens: int = 1_000_000
    """Tokens of training; more than the text holds means several passes over it."""
    harvest_tokens: int | None = None
    """Tokens whose activations are held in memory and gone over; None: as many as are trained on,
    or all of the text."""
    stream: bool = False
    """Run the model beside the training, over as much text as that takes, instead of before it: no
    more than `buffer_rows` are in memory. A run that is resumed makes the earlier rows again."""
    buffer_rows: int = 65_536
    """Rows that are mixed in memory where the model runs beside the training."""
    mixing: float = 0.5
    """Fraction of them that stays when the others are replaced."""
    activations: Path | None = None
    """Folder that `fastsae harvest` wrote, to train on its rows without a language model; the text
    is then the harvest's, and `hook` or `layer` one of its places."""
    verify: bool = True
    """Compare the checksums of `activations` before a run begins; a terabyte takes a quarter of an
    hour. A run that is resumed does not."""
    variant: str = "topk"
    """Kind of SAE; `--variant NAME --help` lists its own options."""
    sae: dict[str, Any] = field(default_factory=dict)
    """The variant's configuration, field by field, where it is not the default. Without d_sae there
    are 16 times as many latents as the activations have dimensions."""
    batch_size: int | None = None
    """Tokens a step; None: by device and length of the run."""
    micro_batch_size: int | None = None
    """Tokens whose gradient is computed at once, to spare memory; None: the batch. BatchTopK SAEs
    choose among so many."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    b_dec_init: Centre = "mean"
    """Where b_dec starts, of a sample of the rows."""
    W_dec_init: Directions | None = None
    """Where the latents' directions start: `random`, or near `whitened_rows` of the sample; None:
    near rows for the TopK family, at random for others."""
    finetune_from: str | None = None
    """Folder of a trained SAE, in any format that `fastsae convert` reads, to start from."""
    drop_special: bool = True
    """Leave out the rows of the tokenizer's special tokens, wherever they stand."""
    massive_multiple: float = 10.0
    """Rows with a norm above this multiple of the median are left out, as are first positions."""
    nonfinite: NonFinite = "stop"
    """What NaN or inf in an activation means: an error, or a row left out."""
    eval_tokens: int = 16_384
    """Held-out tokens to evaluate on."""
    checkpoints: int = 4
    """Checkpoints over the run."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps are kept as well."""
    resample_every: int | None = None
    """Steps between two resamplings of dead latents; None: never, AuxK revives them."""
    log_to: tuple[Tracking, ...] = ()
    """Where the log goes besides metrics.jsonl: wandb, tensorboard, trackio."""
    project: str = "fastsae"
    """The run's project there."""
    also: tuple[dict[str, Any], ...] = ()
    """Further SAEs, trained side by side on the same batches: for each what differs, such as
    "k=16 layer=8", among variant, layer, hook, seed and the fields of the SAE, the optimizer and
    the schedule. Each has its folder."""
    dp: int | None = None
    """Parts of each batch, on as many processes; None: what `tp` leaves, a part a machine."""
    tp: int | None = None
    """Shards of the dictionary, by latent; dp * tp processes that torchrun starts. None: what `dp`
    leaves, or those of a machine, whose traffic does not grow with the dictionary."""
    exchange: Exchanged = "auto"
    """What processes that have parts of a batch send each other: `pairs`, dense `rows` of the
    gradient, or the fewer bytes."""
    distribute: Distribution = "split"
    """What several processes share: each SAE (`split`, by dp and tp), or the list of SAEs
    (`layers`): then every process trains some of those in `also` whole, and dp and tp are None."""
    model_ranks: int = 0
    """Further processes, the last of those that torchrun starts, that run the model of a `stream`
    for the others, which then do not load it: dp * tp + model_ranks processes in all."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """After which a process that does not answer ends the run."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue from the newest checkpoint in `out`, to the same bits; so does a run that torchrun's
    `--max-restarts` started again."""

    def __post_init__(self) -> None:
        if self.layer is not None and self.hook is not None:
            raise ValueError(f"layer must be None when hook is given, got {self.layer}")
        check_counts(self, "tokens", "eval_tokens", "checkpoints", "keep", "context_size")
        if self.variant not in SAES:
            raise ValueError(f"variant must be one of {sorted(SAES)}, got {self.variant!r}")
        if issubclass(SAES[self.variant], Transcodes):
            raise ValueError(
                f"variant must reconstruct its input, got {self.variant!r}: a transcoder trains "
                "with Trainer, on pairs of rows and targets"
            )
        check_choice(self, "distribute", get_args(Distribution))
        for name in ("dp", "tp"):
            value = getattr(self, name)
            if value is not None and (value < 1 or self.distribute == "layers"):
                least = "None with distribute 'layers'" if value > 0 else "at least 1 or None"
                raise ValueError(f"{name} must be {least}, got {value}")
        if self.activations is not None:
            for f in fields(LanguageModelRun):
                if f.name in FROM_SHARDS and getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name} must be left to the harvest where activations are given, got "
                        f"{getattr(self, f.name)!r}"
                    )
        if self.model_ranks and not self.stream:
            raise ValueError(f"model_ranks must be 0 without stream, got {self.model_ranks}")
        if self.model_ranks < 0 or (self.model_ranks and self.distribute == "layers"):
            raise ValueError(
                "model_ranks must be at least 0, and 0 with distribute 'layers', got "
                f"{self.model_ranks}"
            )
        if self.stream and self.harvest_tokens is not None:
            raise ValueError(
                f"harvest_tokens must be None with stream, got {self.harvest_tokens}: buffer_rows "
                "says how many rows are in memory"
            )
        known = [f.name for f in fields(SAES[self.variant].config_class)]
        for name in self.sae:
            if name not in known or name in SET_BY_THE_RUN:
                settable = [name for name in known if name not in SET_BY_THE_RUN]
                raise ValueError(
                    f"sae must hold fields of the variant {self.variant} among {settable}, "
                    f"got {name!r}"
                )
        runs_of(self)

    def mesh_shape(self, n_processes: int, of_a_machine: int) -> tuple[int, int]:
        """dp and tp of a run by so many processes; what is not given takes what is left.

        Raises:
            ValueError: dp * tp + model_ranks is another number, or more run the model than train.
        """
        training = max(1, n_processes - self.model_ranks)
        if self.tp is not None:
            tp = self.tp
        elif self.dp is not None:
            tp = max(1, training // self.dp)
        else:
            tp = min(training, of_a_machine)
        dp = max(1, training // tp) if self.dp is None else self.dp
        wanted = dp * tp + self.model_ranks
        if wanted != n_processes:
            raise ValueError(
                f"dp * tp + model_ranks must be the number of processes, got {dp} * {tp} + "
                f"{self.model_ranks} and {n_processes} processes; start with: torchrun "
                f"--nproc-per-node {wanted} -m fastsae train ..."
            )
        if self.model_ranks > dp * tp:
            raise ValueError(
                f"model_ranks must be at most dp * tp, got {self.model_ranks} for {dp} * {tp}: "
                "each serves one process that trains, or several"
            )
        return dp, tp
