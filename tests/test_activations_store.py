"""Contexts and activations are SAELens's; batches are a function of dataset and seed."""

import warnings
from typing import Any

import datasets
import pytest
import torch

from fastsae.data import LanguageModel, capture, load_language_model, resolve_hook
from fastsae.sae_lens.activations_store import ActivationsStore
from fastsae.sae_lens.mixing_buffer import MixingBuffer
from tiny_models import tiny_llama

HOOK = "blocks.1.hook_resid_post"
D, L = 16, 8
TEXTS = ["The tide came in over the flats.", "", "Herons stood in it.", "A boat. " * 12, "Rain"]


def tokenized(n=40, length=L, seed=0):
    tokens = torch.randint(50, (n, length), generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_dict({"tokens": tokens.tolist()})


def texts(column="text"):
    return datasets.Dataset.from_dict({column: [text for text in TEXTS if text]})


@pytest.fixture(scope="module")
def tokenizer():
    return load_language_model().tokenizer


def store(lm=None, dataset=None, **options):
    given: dict[str, Any] = {"hook_name": HOOK, "context_size": L, "store_batch_size_prompts": 4}
    given |= {"train_batch_size_tokens": 16, "n_batches_in_buffer": 8} | options
    lm = tiny_llama() if lm is None else lm
    return ActivationsStore(lm, tokenized() if dataset is None else dataset, **given)


def with_tokenizer(tokenizer):
    lm = tiny_llama(vocab_size=len(tokenizer))
    return LanguageModel("tiny", lm.model, tokenizer)


def test_activations_are_the_models():
    made = store()
    tokens = made.get_batch_tokens()
    assert tokens.tolist() == tokenized()["tokens"][:4]
    x = made.get_activations(tokens)
    assert x.shape == (4, L, D) and x.dtype == torch.float32
    hidden = made.lm.model(tokens, output_hidden_states=True).hidden_states
    layer_0 = store(hook_name="blocks.0.hook_resid_post").get_activations(tokens)
    assert torch.equal(layer_0, hidden[1])
    assert torch.equal(x, capture(made.lm, resolve_hook(made.lm, HOOK), tokens))


def test_a_batch_holds_rows_of_the_dataset_each_once():
    made = store()
    rows = made.get_activations(torch.tensor(tokenized()["tokens"])).flatten(0, 1)
    kinds, kind = rows.round(decimals=4).unique(dim=0, return_inverse=True)
    seen = torch.cat([made.next_batch() for _ in range(10)])
    assert seen.shape == (160, D)
    distances, at = torch.cdist(seen, kinds).min(1)
    assert distances.max() < 1e-3
    # The first tokens of contexts repeat: a row comes as often as the dataset has it, at most.
    assert (at.bincount(minlength=len(kinds)) <= kind.bincount()).all()
    assert not torch.equal(at, at.sort().values)


def test_order_is_a_function_of_the_seed():
    first, same, other = (store(seed=seed).next_batch() for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(next(iter(store(seed=1))), first)


def test_no_mixing_keeps_the_order():
    made = store(activations_mixing_fraction=0.0)
    rows = made.get_activations(torch.tensor(tokenized()["tokens"])).flatten(0, 1)
    seen = torch.cat([made.next_batch() for _ in range(5)])
    assert torch.allclose(seen, rows[:80], atol=1e-5)


def test_an_epoch_ends_and_begins_again():
    made = store(dataset=tokenized(6))
    made.get_batch_tokens(6)
    with pytest.raises(StopIteration):
        made.get_batch_tokens(1, raise_at_epoch_end=True)
    assert made.get_batch_tokens(1).tolist() == tokenized(6)["tokens"][:1]
    made.reset_input_dataset()
    assert made.get_batch_tokens(8).tolist() == [
        *tokenized(6)["tokens"],
        *tokenized(6)["tokens"][:2],
    ]
    made.shuffle_input_dataset(seed=1)
    shuffled = made.get_batch_tokens(6).tolist()
    assert shuffled != tokenized(6)["tokens"] and sorted(shuffled) == sorted(tokenized(6)["tokens"])


def test_positions_and_special_tokens_are_left_out(tokenizer):
    lm = with_tokenizer(tokenizer)
    made = store(lm, texts(), exclude_special_tokens=True, activations_mixing_fraction=0.0)
    tokens = made.get_batch_tokens()
    kept = made.keep(tokens)
    assert (~kept[:, 0]).all() and kept[:, 1:].any()
    made.reset_input_dataset()
    x = made.get_activations(tokens)[kept]
    assert torch.allclose(made.next_batch(), x[:16], atol=1e-5)
    sliced = store(seqpos_slice=(2, 6, 2))
    whole, part = (s.get_activations(tokens % 50) for s in (store(), sliced))
    assert torch.equal(part, whole[:, [2, 4]])
    assert sliced.next_batch().shape == (16, D)
    chosen = store(lm, texts(), exclude_special_tokens=[int(tokens[0, 1])])
    assert chosen.keep(tokens).tolist() == (tokens != tokens[0, 1]).tolist()


def test_one_head_or_all_of_them():
    tokens = torch.tensor(tokenized()["tokens"][:2])
    whole = store(hook_name="blocks.0.attn.hook_z").get_activations(tokens)
    second = store(hook_name="blocks.0.attn.hook_z", hook_head_index=1, d_in=8)
    assert torch.equal(second.get_activations(tokens), whole[..., 8:])


@pytest.mark.parametrize("separator", ["bos", "eos", None, 7])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("concatenate", [True, False])
def test_contexts_of_text_are_sae_lenss(tokenizer, separator, prepend_bos, concatenate):
    batching = pytest.importorskip("sae_lens.tokenization_and_batching")
    ids = [torch.tensor(tokenizer(t, add_special_tokens=False).input_ids) for t in TEXTS if t]
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    wanted = batching.concat_and_batch_sequences(
        iter(ids),
        context_size=L,
        begin_batch_token_id=tokenizer.bos_token_id if prepend_bos else None,
        sequence_separator_token_id=named.get(separator, separator),
        disable_concat_sequences=not concatenate,
    )
    made = store(
        with_tokenizer(tokenizer),
        texts(),
        prepend_bos=prepend_bos,
        sequence_separator_token=separator,
        disable_concat_sequences=not concatenate,
    )
    assert list(made._contexts) == [context.tolist() for context in wanted]


def test_chats_are_formatted_by_the_tokenizer(tokenizer):
    turns = [{"role": "user", "content": "How high is the tide?"}]
    rows = datasets.Dataset.from_dict({"messages": [turns] * 3})
    made = store(with_tokenizer(tokenizer), rows, use_chat_formatting=True, prepend_bos=False)
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert made.get_batch_tokens(1)[0].tolist() == ids[:L]


def test_activations_are_sae_lenss_on_its_own_model():
    pytest.importorskip("sae_lens")
    from sae_lens import ActivationsStore as Theirs
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens's own deprecations
        torch.manual_seed(1)
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=2, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu"
            )
        )
        for hook in (HOOK, "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"):
            theirs = Theirs(
                model,
                tokenized(),
                streaming=False,
                hook_name=hook,
                hook_head_index=None,
                context_size=L,
                d_in=D,
                n_batches_in_buffer=8,
                total_training_tokens=320,
                store_batch_size_prompts=4,
                train_batch_size_tokens=16,
                prepend_bos=True,
                normalize_activations="none",
                device=torch.device("cpu"),
                dtype="float32",
            )
            ours = store(model, hook_name=hook)
            tokens = theirs.get_batch_tokens()
            assert torch.equal(ours.get_batch_tokens(), tokens)
            want = theirs.get_activations(tokens).reshape(4, L, D)
            assert torch.equal(ours.get_activations(tokens), want), hook


def test_the_store_an_sae_was_trained_on():
    import fastsae

    metadata = {"hook_name": HOOK, "context_size": L, "seqpos_slice": (1, None)}
    sae = fastsae.TopKSAE(fastsae.TopKConfig(d_in=D, d_sae=32, k=2, metadata=metadata))
    made = ActivationsStore.from_sae(tiny_llama(), sae, tokenized(), train_batch_size_tokens=8)
    assert made.get_activations(made.get_batch_tokens(3)).shape == (3, L - 1, D)
    nameless = fastsae.TopKSAE(fastsae.TopKConfig(d_in=D, d_sae=32, k=2))
    with pytest.raises(ValueError, match="sae must name its hook .*got None"):
        ActivationsStore.from_sae(tiny_llama(), nameless, tokenized())
    with pytest.raises(TypeError, match="from_sae takes no argument 'batch'"):
        ActivationsStore.from_sae(tiny_llama(), sae, tokenized(), batch=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_in": 17}, "d_in must be the width of .* 16, got 17"),
        ({"seqpos_slice": (9, None)}, r"seqpos_slice must leave a position of 8, got \(9, None\)"),
        ({"hook_name": "blocks.7.hook_resid_post"}, "7"),
        ({"activations_mixing_fraction": 1.0}, r"activations_mixing_fraction must be in \[0, 1\)"),
        ({"sequence_separator_token": "newline"}, "sequence_separator_token must be .*'newline'"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        store(**options)


def test_a_wrong_dataset_is_named(tokenizer):
    with pytest.raises(ValueError, match="at least context_size = 8 tokens, got 5"):
        store(dataset=tokenized(length=5)).get_batch_tokens()
    with pytest.raises(ValueError, match="tokens for a model without a tokenizer, got text"):
        store(dataset=texts()).get_batch_tokens()
    with pytest.raises(ValueError, match=r"one of the columns .*got \['words'\]"):
        store(with_tokenizer(tokenizer), texts("words")).get_batch_tokens()
    with pytest.raises((RuntimeError, OSError), match="nobody/nothing"):
        store(dataset="nobody/nothing")


def test_local_files_are_read(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    texts().to_json(str(file))
    from_file, from_rows = (
        store(with_tokenizer(tokenizer), dataset) for dataset in (str(file), texts())
    )
    assert torch.equal(from_file.get_batch_tokens(), from_rows.get_batch_tokens())
    tokenized().save_to_disk(str(tmp_path / "saved"))
    saved = store(dataset=str(tmp_path / "saved"))
    assert saved.get_batch_tokens().tolist() == tokenized()["tokens"][:4]


@pytest.mark.parametrize("tokens", [False, True])
def test_a_folder_of_files_is_streamed(tmp_path, tokenizer, monkeypatch, tokens):
    monkeypatch.setattr("fastsae.data.text.HELD_BYTES", 0)
    rows = tokenized(200) if tokens else datasets.concatenate_datasets([texts()] * 50)
    rows.to_parquet(str(tmp_path / "0.parquet"))
    (tmp_path / "1.parquet").write_bytes(b"not reached")
    found, wanted = (store(with_tokenizer(tokenizer), dataset) for dataset in (str(tmp_path), rows))
    assert torch.equal(found.get_batch_tokens(), wanted.get_batch_tokens())


class TestMixingBuffer:
    def rows(self, sizes):
        made = 0
        for size in sizes:
            yield torch.arange(made, made + size).float().unsqueeze(1)
            made += size

    def test_every_row_comes_once_and_the_rest_stays(self):
        buffer = MixingBuffer(self.rows([7] * 100), capacity=40, batch_size=10)
        seen = torch.cat([next(buffer) for _ in range(60)]).squeeze(1)
        assert len(seen.unique()) == 600
        missing = 700 - 600
        assert sorted(set(range(700)) - set(seen.int().tolist()))[0] > 0 and missing <= 100

    def test_rows_wait_for_others(self):
        buffer = MixingBuffer(self.rows([50] * 40), capacity=200, batch_size=20)
        delays = [abs(float(next(buffer).mean()) - 20 * n) for n in range(80)]
        assert max(delays[5:]) > 20

    def test_a_buffer_smaller_than_a_batch_grows(self):
        buffer = MixingBuffer(self.rows([7] * 100), capacity=8, batch_size=20)
        assert next(buffer).shape == (20, 1) and buffer.capacity == 24
