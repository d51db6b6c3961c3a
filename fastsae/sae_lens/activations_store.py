"""`ActivationsStore`: batches of a language model's activations, as SAELens gives them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.checks import float_dtype
from fastsae.data import capture, d_at, resolve_hook
from fastsae.interop.transformer_lens import as_language_model
from fastsae.sae_lens.mixing_buffer import MixingBuffer
from fastsae.sae_lens.tokens import Separator, contexts_in, rows_of, special_id
from fastsae.saes.centred import mean_of, takes_centred_rows


class ActivationsStore:
    """Tokens of a dataset, activations of a model, batches of rows from a mixing buffer.

    The model runs up to the hooked layer. The order of the rows is a function of the dataset and
    the seed. A dataset that ends begins again.

    Args:
        model: a Hugging Face model, TransformerLens's HookedTransformer or TransformerBridge, or a
            `LanguageModel`.
        dataset: a `datasets` dataset, a hub name or a local path; rows with tokens, text or, with
            `use_chat_formatting`, conversations. Empty: the packaged articles.
        hook_head_index: of an activation with heads, take this one.
        n_batches_in_buffer: the buffer holds so many times `context_size` rows, and always enough
            for a batch beside those it keeps.
        seqpos_slice: positions that are trained on, as arguments of `slice`.
        exclude_special_tokens: leave out rows of special tokens: all of the tokenizer's, or ids.
        model_from_pretrained_kwargs: what TransformerLens would load the model with; with
            `center_writing_weights` rows of the residual stream lose their means.
        activations_mixing_fraction: of the buffer, what stays when it is refilled; 0: no mixing.

    Raises:
        ValueError: the dataset has no column that is known, its contexts are shorter than
            `context_size`, or the model lacks the hook.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        *,
        hook_name: str,
        d_in: int | None = None,
        hook_head_index: int | None = None,
        context_size: int = 128,
        streaming: bool = True,
        store_batch_size_prompts: int = 32,
        train_batch_size_tokens: int = 4096,
        n_batches_in_buffer: int = 20,
        prepend_bos: bool = True,
        seqpos_slice: Sequence[int | None] = (None,),
        exclude_special_tokens: bool | Sequence[int] = False,
        disable_concat_sequences: bool = False,
        sequence_separator_token: Separator = "bos",
        activations_mixing_fraction: float = 0.5,
        use_chat_formatting: bool = False,
        autocast_lm: bool = False,
        model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.lm = as_language_model(model)
        self.model = model
        self.dataset = rows_of(dataset, streaming)
        self.hook = resolve_hook(self.lm, hook_name)
        width = d_at(self.lm, self.hook)
        self.hook_name, self.hook_head_index = hook_name, hook_head_index
        loaded = {"hook_name": hook_name}
        loaded |= {"model_from_pretrained_kwargs": model_from_pretrained_kwargs}
        self.centred = takes_centred_rows(loaded, self.lm.model)
        self.d_in = width if d_in is None else d_in
        if self.d_in != width and (hook_head_index is None or width % self.d_in):
            raise ValueError(
                f"d_in must be the width of {hook_name} in {self.lm.name}, {width}, got {d_in}"
            )
        self.context_size = context_size
        self.positions = range(context_size)[slice(*seqpos_slice)]
        if not self.positions:
            raise ValueError(
                f"seqpos_slice must leave a position of {context_size}, got {tuple(seqpos_slice)}"
            )
        self.store_batch_size_prompts = store_batch_size_prompts
        self.train_batch_size_tokens = train_batch_size_tokens
        self.prepend_bos = prepend_bos
        self.disable_concat_sequences = disable_concat_sequences
        self.separator = special_id(sequence_separator_token, self.lm.tokenizer)
        self.use_chat_formatting = use_chat_formatting
        self.excluded = self._special_ids(exclude_special_tokens)
        self.autocast_lm = autocast_lm
        self.dtype = float_dtype("dtype", dtype)
        self.device = torch.device(device)
        self._contexts = self._read()
        self._batches = MixingBuffer(
            self._filtered_activations(),
            capacity=n_batches_in_buffer * len(self.positions),
            batch_size=train_batch_size_tokens,
            mixing_fraction=activations_mixing_fraction,
            seed=seed,
        )

    @classmethod
    def from_config(cls, model: Any, cfg: Any, override_dataset: Any = None) -> "ActivationsStore":
        """The store that a `LanguageModelSAERunnerConfig` describes."""
        return cls(
            model,
            cfg.dataset_path if override_dataset is None else override_dataset,
            hook_name=cfg.hook_name,
            d_in=cfg.sae.d_in,
            hook_head_index=cfg.hook_head_index,
            context_size=cfg.context_size,
            streaming=cfg.streaming,
            store_batch_size_prompts=cfg.store_batch_size_prompts,
            train_batch_size_tokens=cfg.train_batch_size_tokens,
            n_batches_in_buffer=cfg.n_batches_in_buffer,
            prepend_bos=cfg.prepend_bos,
            seqpos_slice=cfg.seqpos_slice,
            exclude_special_tokens=cfg.exclude_special_tokens,
            disable_concat_sequences=cfg.disable_concat_sequences,
            sequence_separator_token=cfg.sequence_separator_token,
            activations_mixing_fraction=cfg.activations_mixing_fraction,
            use_chat_formatting=cfg.use_chat_formatting,
            autocast_lm=cfg.autocast_lm,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            dtype=cfg.dtype,
            device=cfg.act_store_device,
            seed=cfg.seed,
        )

    @classmethod
    def from_sae(
        cls,
        model: Any,
        sae: Any,
        dataset: Any,
        *,
        context_size: int | None = None,
        store_batch_size_prompts: int = 8,
        n_batches_in_buffer: int = 8,
        train_batch_size_tokens: int = 4096,
        streaming: bool = True,
        device: torch.device | str = "cpu",
        disable_concat_sequences: bool = False,
        sequence_separator_token: Separator = "bos",
        **ignored: Any,
    ) -> "ActivationsStore":
        """The store an SAE was trained on, by its metadata.

        Raises:
            ValueError: the SAE names no hook.
        """
        known = {"total_tokens", "dataset_trust_remote_code"}
        if unknown := set(ignored) - known:
            raise TypeError(f"from_sae takes no argument {sorted(unknown)[0]!r}")
        metadata = sae.cfg.metadata
        if metadata.hook_name is None:
            raise ValueError("sae must name its hook in cfg.metadata.hook_name, got None")
        return cls(
            model,
            dataset,
            hook_name=metadata.hook_name,
            d_in=sae.cfg.d_in,
            hook_head_index=metadata.hook_head_index,
            context_size=context_size or metadata.context_size or 128,
            streaming=streaming,
            store_batch_size_prompts=store_batch_size_prompts,
            train_batch_size_tokens=train_batch_size_tokens,
            n_batches_in_buffer=n_batches_in_buffer,
            prepend_bos=metadata.prepend_bos is not False,
            seqpos_slice=metadata.seqpos_slice or (None,),
            disable_concat_sequences=disable_concat_sequences,
            sequence_separator_token=sequence_separator_token,
            model_from_pretrained_kwargs=metadata.get("model_from_pretrained_kwargs"),
            dtype=sae.cfg.dtype,
            device=device,
        )

    def __iter__(self) -> Iterator[Float[Tensor, "B D"]]:
        return self

    def __next__(self) -> Float[Tensor, "B D"]:
        return next(self._batches)

    def next_batch(self) -> Float[Tensor, "B D"]:
        """`train_batch_size_tokens` rows."""
        return next(self._batches)

    def get_batch_tokens(
        self, batch_size: int | None = None, raise_at_epoch_end: bool = False
    ) -> Int[Tensor, "n L"]:
        """The next contexts, `store_batch_size_prompts` of them by default.

        Raises:
            StopIteration: the dataset ended, and `raise_at_epoch_end`; the next call begins anew.
        """
        contexts = list[list[int]]()
        while len(contexts) < (batch_size or self.store_batch_size_prompts):
            try:
                contexts.append(next(self._contexts))
            except StopIteration:
                self._contexts = self._read()
                if raise_at_epoch_end:
                    raise
                first = next(self._contexts, None)
                if first is None:
                    raise ValueError(
                        f"dataset must fill a context of {self.context_size} tokens, got less"
                    ) from None
                contexts.append(first)
        return torch.tensor(contexts, dtype=torch.long, device=self.lm.device)

    @torch.no_grad()
    def get_activations(self, batch_tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n P D"]:
        """Activations at the hook, at the positions of `seqpos_slice`; heads are flattened."""
        kind = self.lm.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast_lm):
            x = capture(self.lm, self.hook, batch_tokens)
        x = x - mean_of(x) if self.centred else x
        if self.hook_head_index is not None:
            x = x.unflatten(-1, (-1, self.d_in))[:, :, self.hook_head_index]
        return x[:, self.positions.start : self.positions.stop : self.positions.step].to(
            self.device, self.dtype
        )

    def reset_input_dataset(self) -> None:
        """Begin the dataset again."""
        self._contexts = self._read()

    def shuffle_input_dataset(self, seed: int, buffer_size: int = 1) -> None:
        """Shuffle a `datasets` dataset and begin it again."""
        dataset: Any = self.dataset
        streamed = not hasattr(dataset, "__getitem__")
        options = {"buffer_size": buffer_size} if streamed else {}
        self.dataset = dataset.shuffle(seed=seed, **options)
        self.reset_input_dataset()

    def keep(self, tokens: Int[Tensor, "n L"]) -> Bool[Tensor, "n L"]:
        """Where a token is not one of those that are left out."""
        return ~torch.isin(tokens, self.excluded.to(tokens.device))

    def _read(self) -> Iterator[list[int]]:
        return contexts_in(
            self.dataset,
            self.lm.tokenizer,
            self.context_size,
            prepend_bos=self.prepend_bos,
            separator=self.separator,
            concatenate=not self.disable_concat_sequences,
            chat=self.use_chat_formatting,
        )

    def _filtered_activations(self) -> Iterator[Float[Tensor, "N D"]]:
        where = torch.tensor(list(self.positions))
        while True:
            tokens = self.get_batch_tokens()
            x = self.get_activations(tokens)
            if len(self.excluded):
                yield x[self.keep(tokens)[:, where.to(tokens.device)].to(x.device)]
            else:
                yield x.flatten(0, 1)

    def _special_ids(self, excluded: bool | Sequence[int]) -> Int[Tensor, " n"]:
        if excluded is True:
            excluded = self.lm.special_ids
        return torch.tensor(excluded or [], dtype=torch.long)
