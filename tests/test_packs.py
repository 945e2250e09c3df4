"""Packs against separate passes: log-probabilities, gradients, and how much work is done."""

from dataclasses import fields, replace

import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl

from unidpo.data.pairs import Pair
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.logps import response_logps
from unidpo.model.packs import index_pairs, pack, pad
from worlds import group, tiny_policy

CASES = {
    "two responses": [group()],
    "five responses": [group(responses=(3, 6, 2, 9, 5))],
    "no image": [group(images=0)],
    "three images": [group(images=3, responses=(4, 5, 6))],
    "mixed groups": [
        group(seed=1),
        group(images=0, responses=(3, 8, 4), seed=2),
        group(images=3, responses=(2, 5), seed=3),
        group(images=2, responses=(6, 1, 4, 7), seed=4, side=84),
    ],
    "one-word responses": [group(responses=(1, 1, 1), seed=5)],
}


@pytest.fixture
def policy(monkeypatch):
    """The random Qwen2-VL with float64 all the way down.

    transformers computes this model's norms and the rotation in its vision tower in float32 whatever its dtype, which
    rounds the gradients of any two ways of summing to 1e-7.
    """
    model, processor, encoder = tiny_policy(torch.float64)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, modeling_qwen2_vl.Qwen2VLRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)

    def rotate(q, k, cos, sin):
        cos, sin = cos[..., None, :].double(), sin[..., None, :].double()
        half = modeling_qwen2_vl.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", rotate)
    return model, processor, encoder


def separate_logps(model, encoder, processor, groups):
    """Each response by itself: one unpadded row, full logits, everything from the model's own forward pass."""
    logps = []
    for one in groups:
        encoded = encoder.encode(one)
        for response in encoded.response_ids:
            ids = torch.cat([encoded.prompt_ids, response])[None]
            extra = dict(encoded.vision)
            if extra:
                types = torch.cat([encoded.mm_token_type_ids, torch.zeros_like(response)])[None]
                extra["mm_token_type_ids"] = types
            logits = model(input_ids=ids, **extra).logits[0, len(encoded.prompt_ids) - 1 : -1]
            logps.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), response].sum())
    return torch.stack(logps)


def gradients(model, logps):
    model.zero_grad()
    # A different weight for each response, so that a swap would show.
    (logps * torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_packs_equal_separate_passes_to_1e_9(policy, groups):
    model, processor, encoder = policy
    expected = separate_logps(model, encoder, processor, groups)
    expected_gradients = gradients(model, expected)
    own = model.config.get_text_config()._attn_implementation
    set_text_attention(model, PACK_ATTENTION)
    try:
        found = response_logps(model, pack([encoder.encode(one) for one in groups]))
        found_gradients = gradients(model, found)
    finally:
        model.set_attn_implementation({"text_config": own})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_padded_rows_equal_separate_passes_to_1e_9(policy, groups):
    model, processor, encoder = policy
    rows = pad([encoder.encode(one) for one in groups], pad_token_id=0)
    expected = separate_logps(model, encoder, processor, groups)
    torch.testing.assert_close(response_logps(model, rows), expected, rtol=0, atol=1e-9)


def test_padded_rows_bring_the_positions_that_the_model_would_look_for(policy, monkeypatch):
    model, _, encoder = policy
    rows = pad([encoder.encode(one) for one in CASES["mixed groups"]], pad_token_id=0)
    own, _ = model.model.get_rope_index(
        rows.input_ids,
        mm_token_type_ids=rows.mm_token_type_ids,
        image_grid_thw=rows.vision["image_grid_thw"],
        attention_mask=rows.attention_mask,
    )
    inside = rows.attention_mask.bool()
    assert torch.equal(rows.position_ids[:, inside], own[:, inside])
    monkeypatch.setattr(type(model.model), "get_rope_index", None)
    response_logps(model, rows)


def test_a_one_token_response():
    model, _, encoder = tiny_policy(torch.float64)
    encoded = encoder.encode(group())
    cut = replace(encoded, response_ids=tuple(ids[:1] for ids in encoded.response_ids))
    padded = response_logps(model, pad([cut], pad_token_id=0))
    set_text_attention(model, PACK_ATTENTION)
    torch.testing.assert_close(response_logps(model, pack([cut])), padded, rtol=0, atol=1e-9)


def test_each_image_and_each_token_once_and_no_logits_at_prompt_positions():
    """The work of a pack: vision tower, language model and head see what they must, and nothing twice."""
    model, _, encoder = tiny_policy()
    set_text_attention(model, PACK_ATTENTION)
    groups = [group(images=2, responses=(3, 5, 4), seed=1), group(images=1, responses=(2, 6), seed=2)]
    encoded = [encoder.encode(one) for one in groups]
    patches, tokens, logits = [], [], []
    model.model.visual.register_forward_pre_hook(lambda m, args, kw: patches.append(_rows(args, kw)), with_kwargs=True)
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda m, args, kw: tokens.append(args[0].shape[1]), with_kwargs=True)
    model.lm_head.register_forward_hook(lambda m, args, out: logits.append(out.shape[0]))

    response_logps(model, pack(encoded)).sum().backward()

    assert patches == [sum(len(one.vision["pixel_values"]) for one in encoded)]
    prompts = sum(len(one.prompt_ids) for one in encoded)
    responses = sum(len(ids) for one in encoded for ids in one.response_ids)
    assert tokens == [prompts + responses]
    assert logits == [responses]


def _rows(args, kwargs):
    states = args[0] if args else next(v for k, v in kwargs.items() if "hidden" in k or "pixel" in k)
    return len(states)


def test_segments_lie_one_after_another_and_fill_the_pack():
    _, _, encoder = tiny_policy()
    packed = pack([encoder.encode(group(seed=number)) for number in range(3)])
    ends = [segment.stop for segment in packed.segments]
    assert [segment.start for segment in packed.segments] == [0, *ends[:-1]]
    assert ends[-1] == len(packed.input_ids)


def test_positions_of_every_response_go_on_from_its_prompt():
    _, _, encoder = tiny_policy()
    encoded = encoder.encode(group(images=1, responses=(2, 3)))
    packed = pack([encoded, encoded])
    start = len(encoded.prompt_ids)
    for length in map(len, encoded.response_ids):
        positions = packed.position_ids[:, start : start + length]
        assert positions.tolist() == [list(range(encoded.next_position, encoded.next_position + length))] * 3
        start += length
    # An image takes fewer positions than tokens in M-RoPE.
    assert encoded.next_position < len(encoded.prompt_ids)


def test_pairs_index_the_responses_they_use():
    first, second = group(responses=(2, 2, 2), seed=1, row=7), group(responses=(3, 3), seed=2, row=9)
    index = index_pairs([(first, [Pair(0, 2, 7)]), (second, second.pairs)])
    assert index.chosen.tolist() == [0, 2]
    assert index.rejected.tolist() == [1, 3]  # response 1 of the first group takes no part
    assert index.source_rejected == (2, 1)
    assert index.rows == (7, 9)
    assert index.rejected_scores.tolist() == [3.0, 4.0]


def test_no_pairs_have_an_index_too():
    """For a pass in which a process has nothing to learn from."""
    none, some = index_pairs([]), index_pairs([(group(), group().pairs)])
    names = [field.name for field in fields(some) if isinstance(getattr(some, field.name), torch.Tensor)]
    assert len(names) == 4
    for name in names:
        assert getattr(none, name).shape == (0,)
        assert getattr(none, name).dtype == getattr(some, name).dtype
    assert none.files == none.rows == none.source_chosen == none.source_rejected == ()
