"""What vision towers derive from the sizes of images, made on the host: the same log-probabilities and gradients."""

import sys
from dataclasses import replace

import pytest
import torch

from families import FAMILIES, Float64, load_family, pack_attention, prompts, save_family
from trainers import some_groups, trainer_of
from unidpo.model.features import image_features
from unidpo.model.logps import response_logps
from unidpo.model.pack_check import padded_rows, usable_tower
from unidpo.model.packs import images_of, pack
from unidpo.model.policy import Policy
from unidpo.model.tower import TOWER_INPUTS, tower_of
from worlds import group, tiny_policy

CPU = torch.device("cpu")
QWEN = [name for name in FAMILIES if name.startswith("Qwen") and name.endswith("-VL")]


@pytest.fixture(params=QWEN)
def world(request, tmp_path):
    return load_family(save_family(FAMILIES[request.param], tmp_path / "model"))


@pytest.fixture
def encoded(world):
    return [world.encoder.encode(one) for one in prompts(images=True)]


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["packs", "padded"])
def test_log_probabilities_and_gradients_are_the_tower_s_own(world, encoded, layout):
    tower = tower_of(world.model)
    found = []
    with Float64(), pack_attention(world.model):
        if layout == "packs":
            batches = [pack(encoded, tower=each) for each in (None, tower)]
        else:
            world.model.set_attn_implementation("sdpa")
            batches = [padded_rows(world.encoder, each)(encoded) for each in (None, tower)]
        for batch in batches:
            logps = response_logps(world.model, batch)
            found.append((logps, gradients(world.model, logps)))
    (expected, expected_gradients), (logps, found_gradients) = found
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)
    assert any("visual" in name for name in found_gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-9, msg=name)


def test_a_tower_is_asked_nothing_that_was_not_made_before(world, encoded, monkeypatch):
    """Its helpers hand out what they are given; what they make themselves they make of the grid."""
    tower = tower_of(world.model)
    images = images_of(pack(encoded, tower=tower))
    assert images["image_grid_thw"].device == CPU
    assert {name for name in images if name in TOWER_INPUTS} == images.keys() - {"pixel_values", "image_grid_thw"}
    module = sys.modules[type(world.model.get_encoder(modality="image")).__module__]
    for name, helper in tower.helpers.items():
        # Without a grid to make anything of.
        monkeypatch.setattr(module, name, lambda grid, *args, helper=helper, **kw: helper(None, *args, **kw))
    image_features(world.model, images)


def test_sequence_starts_stay_on_the_host_but_for_flash_attention(encoded, world):
    tower = tower_of(world.model)
    plain, flash = (pack(encoded, tower=replace(tower, flash=each)) for each in (False, True))
    starts = plain.vision_on_host["image_cu_seqlens"]
    assert "image_cu_seqlens" not in plain.vision
    assert torch.equal(flash.vision["image_cu_seqlens"], starts)
    assert flash.vision_on_host["image_max_seqlen"] == starts.diff().max()


def test_features_on_disk_leave_the_tower_alone(world, encoded):
    images = [image_features(world.model, one.vision) if one.vision else None for one in encoded]
    without = [
        replace(one, features=features, vision={n: t for n, t in one.vision.items() if n == "image_grid_thw"})
        for one, features in zip(encoded, images, strict=True)
    ]
    batch = pack(without, tower=tower_of(world.model))
    assert batch.vision_on_host.keys() == {"image_grid_thw"}
    with pack_attention(world.model):
        expected = response_logps(world.model, pack(encoded))
        torch.testing.assert_close(response_logps(world.model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "SmolVLM2", "Qwen3", "Gemma-3"])
def test_towers_of_other_kinds_are_left_to_themselves(name, tmp_path):
    assert tower_of(load_family(save_family(FAMILIES[name], tmp_path / "model")).model) is None


def test_a_tower_that_makes_something_else_of_it_is_left_to_itself():
    model, _, encoder = tiny_policy()
    encoded = encoder.encode(group())
    assert usable_tower(Policy(model, model), encoded, CPU) is not None
    forward = type(model.model.visual).forward

    def shuffled(*args, position_ids=None, **kwargs):
        given = {} if position_ids is None else {"position_ids": position_ids.flip(0)}
        return forward(model.model.visual, *args, **given, **kwargs)

    model.model.visual.forward = shuffled
    assert usable_tower(Policy(model, model), encoded, CPU) is None
    model.model.visual.forward = lambda hidden_states, grid_thw: forward(model.model.visual, hidden_states, grid_thw)
    assert usable_tower(Policy(model, model), encoded, CPU) is None


def test_training_hands_the_tower_what_it_needs(tmp_path):
    trainer = trainer_of(tmp_path, some_groups(), max_steps=1)
    trainer.train()
    batch = trainer.setup.train.batches.collate([trainer.encoder.encode(some_groups()[0])])
    assert "image_cu_seqlens" in batch.vision_on_host
