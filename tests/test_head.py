"""Hidden states and head → log-probabilities: equal to a log-softmax over all logits, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unidpo.model import head as heads
from unidpo.model.head import linear_logps, token_logps
from unidpo.model.logps import response_logps
from unidpo.model.packs import pack, pad
from worlds import group, tiny_policy

TARGETS, HIDDEN, VOCABULARY = 23, 8, 50


def states(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (TARGETS,))


def expected(hidden, weight, targets):
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_values_and_gradients_are_those_of_a_log_softmax(monkeypatch, chunk, rows):
    monkeypatch.setattr(heads, "_CPU_STEP_BYTES", rows * 4 * VOCABULARY)
    hidden, weight, targets = states()
    assert torch.autograd.gradcheck(lambda h, w: linear_logps(h, w, targets, chunk), (hidden, weight))
    whole = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(linear_logps(hidden, weight, targets, chunk), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_only_what_learns_gets_a_gradient(learns):
    hidden, weight, targets = states()
    (hidden if learns == "weight" else weight).requires_grad_(False)
    linear_logps(hidden, weight, targets, 5).sum().backward()
    assert (hidden.grad is None, weight.grad is None) == (learns == "weight", learns == "hidden")


def test_a_second_backward_pass_through_the_same_graph_gives_the_same():
    hidden, weight, targets = states()
    logps = linear_logps(hidden, weight, targets, 5).sum()
    first = torch.autograd.grad(logps, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps, (hidden, weight))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_products_are_narrow_and_the_softmax_is_not(autocast):
    hidden, weight, targets = states(torch.float32 if autocast else torch.bfloat16)
    found, wanted = [], []
    for function, into in ((lambda *a: linear_logps(*a, 5), found), (expected, wanted)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = function(hidden, weight, targets)
        assert logps.dtype == torch.float32
        into += [logps, *torch.autograd.grad(logps.sum(), (hidden, weight))]
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-2, atol=2e-2)


def test_the_weights_gradient_is_summed_over_chunks_in_float32():
    """Summed in bfloat16 over 52 chunks it is off by 1 % of its largest number: each addition rounds the whole sum."""
    torch.manual_seed(0)
    weight, chunks = torch.randn(VOCABULARY, HIDDEN, requires_grad=True), 52
    hidden, targets = torch.randn(1, HIDDEN).repeat(4 * chunks, 1), torch.randint(0, VOCABULARY, (4,)).repeat(chunks)
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logps(hidden, weight, targets, 4)
        once = linear_logps(hidden[:4], weight, targets[:4], 4)
    (found,), (of_one,) = (torch.autograd.grad(each.sum(), weight) for each in (logps, once))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, chunks * of_one, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Which calls make tensors of at least so many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.made = elements, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        dense = isinstance(result, torch.Tensor) and result.layout == torch.strided
        given = {
            a.data_ptr()
            for a in (*arguments, *(options or {}).values())
            if isinstance(a, torch.Tensor) and a.layout == torch.strided
        }
        if dense and result.numel() >= self.elements and result.data_ptr() not in given:
            self.made.append(function)
        return result


def test_one_chunk_of_logits_and_one_gradient_of_the_weight_are_all_that_is_made():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True)
    logps = []
    with Largest(5000 * 4) as forward:
        logps.append(linear_logps(hidden, weight, torch.arange(40), 10))
    with Largest(5000 * 4) as backward:
        logps[0].sum().backward()
    # Steps over a few rows at a time are small beside a chunk on real vocabularies, not on this one.
    large = [call for call in forward.made + backward.made if "mm" in str(call) or "empty" in str(call)]
    assert len(large) == 2, large


@pytest.fixture
def world():
    model, _, encoder = tiny_policy(torch.float64)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    groups = [group(responses=(4, 7, 3)), group(responses=(2, 5), images=0, seed=1)]
    return model, [encoder.encode(each) for each in groups]


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.arange(1.0, len(logps) + 1)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


LAYOUTS = {"packs": pack, "padded": lambda groups: pad(groups, pad_token_id=2048)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learns", ["everything", "all but the table", "nothing but the table"])
def test_a_table_that_is_the_head_too_gets_both_gradients(monkeypatch, world, layout, learns):
    model, encoded = world
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns == "everything" or ("embed_tokens" in name) == (learns[:7] == "nothing"))
    batch = LAYOUTS[layout](encoded)
    found = response_logps(model, batch)
    of_found = gradients(model, found)
    monkeypatch.setattr(heads, "_is_matrix", lambda head: False)  # the head is called, and all is left to autograd
    called = response_logps(model, batch)
    of_called = gradients(model, called)
    torch.testing.assert_close(found, called, rtol=0, atol=1e-9)
    assert of_found.keys() == of_called.keys()
    for name, gradient in of_called.items():
        torch.testing.assert_close(of_found[name], gradient, rtol=0, atol=1e-9, msg=name)


def test_gradients_of_several_passes_add_up(world):
    model, encoded = world
    apart = [gradients(model, response_logps(model, pack([each]))) for each in encoded]
    model.zero_grad()
    for each in encoded:
        logps = response_logps(model, pack([each]))
        (logps * torch.arange(1.0, len(logps) + 1)).sum().backward()
    table = model.get_input_embeddings().weight.grad
    assert table.layout == torch.strided
    name = next(name for name in apart[0] if "embed_tokens" in name)
    torch.testing.assert_close(table, apart[0][name] + apart[1][name], rtol=0, atol=1e-9)


def test_a_table_that_is_the_head_too_gets_one_gradient_of_its_size(world):
    model, encoded = world
    table = model.get_input_embeddings().weight
    logps = response_logps(model, pack(encoded)).sum()
    with Largest(table.numel()) as backward:
        logps.backward()
    assert len(backward.made) == 1, backward.made


def test_the_table_is_as_it_was_afterwards(world):
    model, encoded = world
    response_logps(model, pack(encoded))
    table = model.get_input_embeddings()
    assert not table._forward_hooks
    table(torch.tensor([3])).sum().backward()
    assert table.weight.grad.layout == torch.strided


def test_padding_is_looked_up_without_a_gradient(world, monkeypatch):
    model, encoded = world
    table, token = model.get_input_embeddings(), int(encoded[0].prompt_ids[0])
    before = gradients(model, response_logps(model, pack(encoded)))
    table.padding_idx = token
    found = gradients(model, response_logps(model, pack(encoded)))
    monkeypatch.setattr(heads, "_is_matrix", lambda head: False)
    wanted = gradients(model, response_logps(model, pack(encoded)))
    name = next(name for name in found if "embed_tokens" in name)
    torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-9)
    assert (before[name] - found[name])[token].abs().max() > 1e-3


def test_a_hook_of_others_on_the_table_still_counts(world):
    model, encoded = world
    before = response_logps(model, pack(encoded))
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    assert (response_logps(model, pack(encoded)) - before).abs().min() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.register_forward_hook(lambda module, args, out: None),
        lambda head: setattr(head, "bias", torch.nn.Parameter(head.weight.new_zeros(len(head.weight)))),
        lambda head: setattr(head, "__class__", type("Quantized", (torch.nn.Linear,), {})),
        lambda head: setattr(head.weight, "ds_shape", head.weight.shape),
    ],
    ids=["hook", "bias", "subclass", "ZeRO-3"],
)
def test_a_head_that_does_more_than_multiply_is_called(world, change):
    model, encoded = world
    change(model.lm_head)
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    response_logps(model, pack(encoded))
    assert calls == [len(pack(encoded).targets)]


def test_a_called_head_in_chunks_equals_the_head_at_once(monkeypatch):
    hidden, _, targets = states()
    head = torch.nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)
    whole = token_logps(hidden, head, targets)
    (wanted,) = torch.autograd.grad(whole.sum(), hidden)
    sizes = []
    head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    monkeypatch.setattr(heads, "LOGITS_CHUNK_BYTES", 4 * VOCABULARY * 5)
    chunked = token_logps(hidden, head, targets)
    assert sizes == [5, 5, 5, 5, 3]
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), hidden)[0], wanted, rtol=0, atol=1e-12)
