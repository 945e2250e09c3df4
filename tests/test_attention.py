"""Every attention backend against softmax over an explicit list of who sees whom."""

import functools
import inspect
import logging
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from trainers import some_groups, trainer_of
from unidpo.config.schema import Attention
from unidpo.errors import ModelError
from unidpo.model.attention import (
    BACKENDS,
    PACK_ATTENTION,
    PackAttentionError,
    Segment,
    SegmentTable,
    backend,
    missing,
    pack_attention,
    set_text_attention,
)
from unidpo.model.attention import backends as kernels
from unidpo.model.attention.backends import sdpa
from unidpo.model.logps import response_logps
from unidpo.model.packs import Pack, pack
from unidpo.model.transfer import to_device
from worlds import group, tiny_policy

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def laid_out(*groups):
    """Segments of (prompt, responses...) in tokens."""
    segments, at = [], 0
    for prompt, *responses in groups:
        segments.append(Segment(at, prompt, tuple(responses)))
        at = segments[-1].stop
    return tuple(segments)


PACKS = {
    "a pair": laid_out((5, 3, 4)),
    "one token each": laid_out((1, 1, 1), (1, 1)),
    "several prompts": laid_out((7, 2, 9, 4), (3, 6), (12, 1, 1, 1, 1, 1)),
    "a prompt alone": laid_out((6,), (4, 2)),
    "an empty response": laid_out((4, 0, 3, 0)),
    "longer than a block": laid_out((300, 140, 7), (2, 260), (90, 40, 129)),
}


def seen(segments):
    """(tokens, tokens), by the definition: of its own group, up to itself, of the prompt or of its own response."""
    places = [
        (number, part)
        for number, segment in enumerate(segments)
        for part, length in enumerate((segment.prompt, *segment.responses))
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [key <= query and own[0] == other[0] and other[1] in (0, own[1]) for key, other in enumerate(places)]
            for query, own in enumerate(places)
        ]
    )


def inputs(segments, *, heads=4, kv_heads=2, dim=8, dtype=torch.float64, device=CPU):
    """Query, key and value with the strides that a model's projections give them, and an output gradient."""
    generator = torch.Generator().manual_seed(len(segments))
    tokens = segments[-1].stop

    def drawn(count):
        return torch.randn(1, tokens, count, dim, generator=generator, dtype=torch.float64).to(device, dtype)

    query, key, value = (drawn(count).transpose(1, 2).requires_grad_() for count in (heads, kv_heads, kv_heads))
    return (query, key, value), drawn(heads)


def by_definition(query, key, value, segments, scale=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~seen(segments).to(scores.device), -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def table_for(name, segments, device=CPU):
    make = BACKENDS[name].table
    return SegmentTable(segments, device, None if make is None else to_device(make(segments), device))


def with_gradients(attend, arguments, gradient):
    output = attend(*arguments)
    return [output, *torch.autograd.grad(output, arguments, gradient)]


def assert_equals_the_definition(name, segments, *, scale=None, tolerance=1e-9, **options):
    """Output and gradients, up to a share of the largest number in each."""
    arguments, gradient = inputs(segments, **options)
    table = table_for(name, segments, arguments[0].device)
    found = with_gradients(lambda *qkv: BACKENDS[name].attend(*qkv, table, scale, 0.0), arguments, gradient)
    exact = [tensor.detach().double().requires_grad_() for tensor in arguments]
    expected = with_gradients(lambda *qkv: by_definition(*qkv, segments, scale), exact, gradient.double())
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert ours.dtype == arguments[0].dtype
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
def test_output_and_gradients_equal_the_definition_to_1e_9(segments, kv_heads):
    assert_equals_the_definition("sdpa", segments, kv_heads=kv_heads)


def test_a_scale_of_the_model_s_own():
    assert_equals_the_definition("sdpa", PACKS["several prompts"], scale=0.7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_narrower_types_differ_by_their_rounding(dtype, tolerance):
    assert_equals_the_definition("sdpa", PACKS["longer than a block"], dtype=dtype, tolerance=tolerance)


class Numbers(TorchDispatchMode):
    """How many numbers all calls made."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += sum(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor))
        return out


def test_twice_the_prompts_cost_twice_as_much():
    """The gradient of a slice is as large as what it was cut from: one for each segment costs the square."""
    made = []
    for prompts in (13, 26):
        segments = laid_out(*[(9, 3, 4)] * prompts)
        arguments, gradient = inputs(segments)
        with Numbers() as numbers:
            with_gradients(lambda *qkv, s=segments: sdpa(*qkv, SegmentTable(s, CPU), None, 0.0), arguments, gradient)
        made.append(numbers.made)
    assert made[1] <= 2.05 * made[0]


# --- the tables of kernels that run on a GPU, tried with plain functions in the kernels' place ---


def as_varlen_kernels(queries, keys, values, query_starts, key_starts, longest_queries, longest_keys, scale):
    """What a variable-length kernel computes: causal per sequence, the last query seeing the last key."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    lengths = query_starts.diff(), key_starts.diff()
    assert (int(lengths[0].max()), int(lengths[1].max())) == (longest_queries, longest_keys)
    groups = queries.shape[1] // keys.shape[1]
    outputs = []
    for query, key, value in zip(
        queries.split(lengths[0].tolist()),
        keys.repeat_interleave(groups, 1).split(lengths[1].tolist()),
        values.repeat_interleave(groups, 1).split(lengths[1].tolist()),
        strict=True,
    ):
        scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, -math.inf).softmax(-1), value))
    return torch.cat(outputs)


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """As torch's `varlen_attn`, computed by plain operators."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return as_varlen_kernels(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def test_the_plain_kernel_takes_what_torch_s_does():
    theirs = inspect.signature(varlen_attn).parameters
    for kernel in (varlen, varlen_2_11):
        ours = inspect.signature(kernel).parameters
        assert [(name, each.kind) for name, each in theirs.items() if name in ours] == [
            (name, each.kind) for name, each in ours.items()
        ]


@pytest.fixture
def plain_kernels(monkeypatch):
    """Plain functions where `varlen_attn`, `flash_attn_varlen_func` and the compiled FlexAttention are looked up."""

    def flash(*args, dropout_p, softmax_scale, causal):
        assert causal
        assert dropout_p == 0
        return as_varlen_kernels(*args, scale=softmax_scale)

    monkeypatch.setattr(kernels, "_varlen_attn", lambda: varlen)
    monkeypatch.setattr(kernels, "_compiled_flex", lambda: flex_attention)
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_prompts_and_responses_as_sequences_give_the_same_output_and_gradients(plain_kernels, name, segments, scale):
    assert_equals_the_definition(name, segments, scale=scale)


def test_grouped_heads_are_repeated_where_torch_s_kernel_knows_none(plain_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_varlen_attn", lambda: varlen_2_11)
    assert_equals_the_definition("varlen", PACKS["several prompts"])


class Calls(TorchDispatchMode):
    """The names of all calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_is_added_as_it_comes(plain_kernels):
    """A GPU's `index_add` adds in another order each time; the gradient of `index_select` is one."""
    model, _, encoder = tiny_policy()
    set_text_attention(model, BACKENDS["varlen"].attention)
    batch = pack([encoder.encode(group(responses=(3, 5, 4)))], table=BACKENDS["varlen"].table)
    with Calls() as calls:
        response_logps(model, batch).sum().backward()
    assert not [name for name in calls.names if "index_add" in name]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["several prompts", "longer than a block"])
def test_flex_attention_sees_the_same_through_its_block_mask(plain_kernels, name):
    # torch gives FlexAttention no backward pass on a CPU
    segments = PACKS[name]
    query, key, value = (tensor.detach() for tensor in inputs(segments, dim=16)[0])
    found = BACKENDS["flex"].attend(query, key, value, table_for("flex", segments), 0.3, 0.0)
    torch.testing.assert_close(found, by_definition(query, key, value, segments, 0.3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
def test_the_block_mask_lists_each_block_that_is_seen_and_knows_which_are_seen_whole(segments):
    """Compiled kernels pass over what is not listed, and do not ask for who sees whom in a block that is whole."""
    mask = table_for("flex", segments).block_mask
    expected, places = seen(segments), torch.arange(segments[-1].stop)
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None]), expected)
    rows, columns = mask.kv_num_blocks.shape[-1], mask.kv_indices.shape[-1]
    partly, whole = (
        {(row, column) for row in range(rows) for column in indices[0, 0, row, : counts[0, 0, row]].tolist()}
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    size = mask.BLOCK_SIZE[0]
    inside = {
        (row, column): expected[row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    }
    assert partly | whole == {place for place, block in inside.items() if block.any()}
    assert not partly & whole
    assert all(inside[place].all() for place in whole)
    assert whole or segments is not PACKS["longer than a block"]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kv_heads", [12, 2])
def test_backends_on_a_gpu_equal_the_definition(name, kv_heads):
    device = torch.device("cuda")
    reason = missing(name, device=device, dtype=torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    options = {"heads": 12, "kv_heads": kv_heads, "dim": 128, "device": device}
    for segments in PACKS.values():
        assert_equals_the_definition(name, segments, dtype=torch.bfloat16, tolerance=0.02, **options)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["flex", "sdpa"])
def test_backends_that_take_float32_on_a_gpu_equal_the_definition_to_1e_5(name):
    options = {"heads": 12, "dim": 64, "device": torch.device("cuda"), "dtype": torch.float32}
    for segments in PACKS.values():
        assert_equals_the_definition(name, segments, tolerance=1e-5, **options)


# --- within a model ---

packed = functools.partial(pack_attention, attend=sdpa)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_one_table_goes_to_all_layers_and_to_their_recomputation():
    """What the kernels ask for is made once per pack."""
    model, _, encoder = tiny_policy()
    tables = []

    def recording(module, *args, segments, **kwargs):
        tables.append(segments)
        return packed(module, *args, segments=segments, **kwargs)

    AttentionInterface.register("recording", recording)
    set_text_attention(model, "recording")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    response_logps(model, pack([encoder.encode(group())])).sum().backward()
    assert len(tables) == 2 * model.config.get_text_config().num_hidden_layers
    assert all(table is tables[0] for table in tables)
    assert "spans" in vars(tables[0])


def test_the_models_scale_and_dropout_reach_the_kernel():
    segments = PACKS["several prompts"]
    (query, key, value), _ = inputs(segments)
    table = SegmentTable(segments, CPU)
    found, _ = packed(torch.nn.Identity(), query, key, value, None, scaling=0.7, segments=table)
    torch.testing.assert_close(found, by_definition(query, key, value, segments, 0.7), rtol=0, atol=1e-9)
    torch.manual_seed(3)
    found, _ = packed(torch.nn.Identity(), query, key, value, None, dropout=0.5, segments=table)
    torch.manual_seed(3)
    assert torch.equal(found, sdpa(query, key, value, table, None, 0.5))


def test_autocast_reaches_the_kernel():
    """Rotary angles widen queries and keys; torch's own attention narrows them under autocast."""
    segments = PACKS["a pair"]
    (query, key, value), _ = inputs(segments, dtype=torch.float32)
    table = SegmentTable(segments, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = packed(torch.nn.Identity(), query, key, value.bfloat16(), None, segments=table)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_definition(query, key, value, segments).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention_mask": torch.ones(1)}, "a mask"),
        ({"sliding_window": 8}, "a sliding window"),
        ({"softcap": 50.0}, "a soft cap"),
        ({"segments": None}, "keyword arguments"),
    ],
)
def test_what_is_more_than_causal_is_refused(asked, message):
    (query, key, value), _ = inputs(PACKS["a pair"])
    given = {"attention_mask": None, "segments": SegmentTable(PACKS["a pair"], CPU)} | asked
    with pytest.raises(PackAttentionError, match=message):
        packed(torch.nn.Identity(), query, key, value, **given)


# --- which backend ---


def test_recipes_and_docs_know_each_backend_in_the_order_of_auto():
    assert get_args(Attention) == ("auto", *BACKENDS, "padded")
    page = (Path(__file__).parent.parent / "docs" / "attention.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*BACKENDS, "padded"]


@pytest.fixture
def toy():
    """A backend of a user's own; the packs it was given."""
    packs = []

    @backend(cuda=False, dtypes=None)
    def toy(query, key, value, segments, scale, dropout):
        packs.append(segments)
        return sdpa(query, key, value, segments, scale, dropout)

    yield packs
    del BACKENDS["toy"]


def test_a_backend_is_one_registered_function(tmp_path, toy):
    trainer = trainer_of(tmp_path, some_groups(), attention="toy", max_steps=1, eval_dataset=some_groups(2))
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert toy


def test_a_backend_that_nobody_registered_is_an_error_that_names_the_others(tmp_path):
    with pytest.raises(ModelError, match=r"model\.attention=toy: there is no such backend.*auto, varlen, .*, padded"):
        trainer_of(tmp_path, attention="toy").train()


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What `missing` asks of the machine; everything is there but what a test takes away."""
    there = {"flash_attn", "triton"}
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return there


def test_what_a_backend_misses_is_said(pretended_gpu, monkeypatch):
    ask = functools.partial(missing, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert [b for b in BACKENDS if ask(b) is None] == ["varlen", "flash", "flex", "sdpa"]
    assert [b for b in BACKENDS if ask(b, device=CPU, dtype=torch.float32) is None] == ["sdpa"]
    assert "the model is on cpu" in ask("flex", device=CPU)
    assert [b for b in BACKENDS if ask(b, dtype=torch.float32) is None] == ["flex", "sdpa"]
    assert "bfloat16 or float16, not in float64" in ask("varlen", dtype=torch.float64)
    assert [b for b in BACKENDS if ask(b, dropout=0.1) is None] == ["flash", "sdpa"]
    pretended_gpu.clear()
    assert "pip install flash-attn" in ask("flash")
    assert "triton" in ask("flex")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in ask("varlen")
    monkeypatch.setattr(kernels, "_varlen_attn", lambda: None)
    assert "has no torch.nn.attention.varlen" in ask("varlen")


def with_half_the_gradient_of_keys(query, key, value, segments, scale, dropout):
    return sdpa(query, key.detach() + (key - key.detach()) / 2, value, segments, scale, dropout)


def of_the_first_prompt_alone(query, key, value, segments, scale, dropout):
    """As though each group began where the pack does."""
    first = segments.spans[0].prompt
    mixed = key.clone()
    for span in segments.spans[1:]:
        mixed[:, :, span.prompt.start] = key[:, :, first.start]
    return sdpa(query, mixed, value, segments, scale, dropout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (with_half_the_gradient_of_keys, "gradients differ by"),
        (of_the_first_prompt_alone, "log-probabilities differ by"),
    ],
)
def test_a_backend_that_is_wrong_in_its_gradients_or_in_the_second_prompt_is_not_used(tmp_path, toy, wrong, message):
    AttentionInterface.register(BACKENDS["toy"].attention, functools.partial(pack_attention, attend=wrong))
    with pytest.raises(ModelError, match=message):
        trainer_of(tmp_path, attention="toy").train()


def test_a_backend_that_breaks_the_gpu_ends_the_run_and_says_what_to_do(tmp_path, toy, monkeypatch):
    """After an illegal access nothing runs in the process any more: the next backend would be blamed for it."""

    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    AttentionInterface.register(BACKENDS["toy"].attention, functools.partial(pack_attention, attend=broken))
    monkeypatch.setattr("unidpo.model.pack_check._wait_for", broken)
    with pytest.raises(ModelError, match=r"runs nothing any more.*illegal memory access.*another model\.attention"):
        trainer_of(tmp_path, attention="toy").train()


@pytest.mark.parametrize("name", ["varlen", "flex", "flash"])
def test_a_backend_that_is_not_there_is_an_error_that_says_what_is(tmp_path, name):
    with pytest.raises(ModelError, match=rf"model\.attention={name}: it needs a CUDA GPU.*auto, sdpa, padded"):
        trainer_of(tmp_path, attention=name).train()


def test_auto_goes_on_to_the_next_backend_where_one_fails_or_disagrees(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "unidpo.model.pack_check")
    monkeypatch.setattr("unidpo.model.pack_check.missing", lambda name, **_: "not there" if name == "flash" else None)
    monkeypatch.setattr(kernels, "_varlen_attn", lambda: 1 / 0)
    monkeypatch.setattr(kernels, "_compiled_flex", lambda: lambda query, *_, **__: query * 2)
    during = []
    trainer = trainer_of(tmp_path, max_steps=1, on_pairs=lambda _: during.append(trainer.policy.attention))
    trainer.train()
    assert during == [PACK_ATTENTION]
    assert isinstance(trainer.setup.train.batches.collate([trainer.encoder.encode(some_groups()[0])]), Pack)
    assert "packs by varlen: division by zero" in caplog.text
    assert "packs by flex: log-probabilities differ by" in caplog.text
    assert "packs, with attention by sdpa" in caplog.text
