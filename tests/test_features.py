"""Features of images, computed once: shared by policy and reference, kept on disk, and equal to the plain path."""

import functools
import platform
import shutil
from dataclasses import replace

import pytest
import torch

import unidpo.model.policy
from families import FAMILIES, Float64, difference, load_family, measure, pack_attention, prompts, save_family
from trainers import lora, some_groups, trainer_of
from unidpo import DPO
from unidpo.cache.features import FeaturePass, FeatureStore
from unidpo.cache.keys import content_keys, vision_fingerprint
from unidpo.cache.store import numbers_folder
from unidpo.cache.stored_pass import _Outcome
from unidpo.config import recipe_from
from unidpo.errors import ImageError, ModelError, RecipeError, UserError
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_policy
from unidpo.model.logps import response_logps
from unidpo.model.pack_check import features_problem, padded_rows
from unidpo.model.packs import pack
from unidpo.model.parts import freeze
from unidpo.model.policy import Policy
from worlds import GOLDEN, group, tiny_policy

SEEING = [name for name, family in FAMILIES.items() if family.processor is not None]


def features_pass(model, encoder, **options):
    return FeaturePass(Policy(model, model), encoder, torch.device("cpu"), **options)


def kept(model, encoder, groups, folder, **options):
    """The encoder that knows the features of all groups' images."""
    return features_pass(model, encoder, **options).run(groups, content_keys(groups), folder)


def in_files(groups, folder):
    """The groups with their images as files."""
    folder.mkdir(exist_ok=True)
    moved = []
    for number, one in enumerate(groups):
        paths = []
        for place, image in enumerate(one.images):
            paths.append(folder / f"{number}-{place}.png")
            image.save(paths[-1])
        moved.append(replace(one, images=tuple(paths)))
    return moved


@pytest.fixture
def groups(tmp_path):
    """Six groups, every third without an image, two of the same prompt."""
    made = some_groups(6, images=lambda i: 0 if i % 3 == 2 else 1)
    made[4] = replace(made[1], responses=made[4].responses, pairs=made[4].pairs)
    return in_files(made, tmp_path / "images")


@pytest.fixture
def towers(monkeypatch):
    """Grows by the number of images in each forward of a Qwen2-VL vision tower."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

    calls, forward = [], Tower.forward

    def counted(self, hidden_states, grid_thw, **kwargs):
        calls.append(len(grid_thw))
        return forward(self, hidden_states, grid_thw, **kwargs)

    monkeypatch.setattr(Tower, "forward", counted)
    return calls


@pytest.fixture
def blind(monkeypatch):
    """From its call on, no image can be opened."""

    def refuse(source):
        raise AssertionError(f"{source} was opened")

    openers = ("unidpo.model.encode.open_image", "unidpo.data.images.open_image")
    return lambda: [monkeypatch.setattr(opener, refuse) for opener in openers]


# --- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEING)
def test_features_from_disk_give_the_log_probabilities_and_gradients_of_pixels(name, tmp_path):
    world = load_family(save_family(FAMILIES[name], tmp_path / "model"))
    freeze(world.model, ("vision", "projector"))
    groups = prompts(images=True)
    with Float64():
        encoder = kept(world.model, world.encoder, groups, tmp_path / "features")
    assert len(encoder.store) == 3

    def packs(encoder):
        with pack_attention(world.model):
            return response_logps(world.model, pack([encoder.encode(one) for one in groups]))

    def padded(encoder):
        return response_logps(world.model, padded_rows(world.encoder)([encoder.encode(one) for one in groups]))

    for layout in [padded] if FAMILIES[name].refuses else [packs, padded]:
        ways = [functools.partial(layout, each) for each in (encoder, world.encoder)]
        found = difference(*(measure(world, groups, lambda *_, way=way: way()) for way in ways))
        assert found.logps < 1e-9
        assert found.gradients < 1e-9


def trajectory(trainer):
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, {name: weight.detach() for name, weight in trainer.policy.plain.named_parameters()}


def assert_same(ours, theirs):
    assert len(ours[0]) == len(theirs[0]) > 1
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    for name, weight in theirs[1].items():
        torch.testing.assert_close(ours[1][name], weight, rtol=0, atol=1e-6, msg=name)


def test_a_run_with_features_from_disk_is_the_plain_run_and_the_next_one_sees_nothing(groups, tmp_path, towers, blind):
    def run(name, **options):
        return trajectory(
            trainer_of(tmp_path / name, groups, max_steps=-1, num_train_epochs=2, eval_dataset=groups[:1], **options)
        )

    plain = run("plain", cache=tmp_path / "plain-cache")
    towers.clear()
    said = []
    options = {"cache_image_features": True, "cache": tmp_path / "cache"}
    assert_same(run("stored", on_progress=lambda *done: said.append(done), **options), plain)
    assert [done[1:] for done in said if done[0] == "features of images, prompts"] == [(0, 3), (3, 3)]
    # Padded rows of a prompt with and without features; the prompt with and without its tower's tables, and once more.
    tried = 2 + 2 + 2 + 1
    assert sum(towers) == tried + 3
    towers.clear()
    blind()
    assert_same(run("again", **options), plain)
    assert towers == []


@pytest.mark.parametrize("tower", ["the same", "another"])
def test_another_model_as_reference_sees_images_with_its_own_tower(groups, tmp_path, tower):
    other = load_policy(GOLDEN / "model")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
        if tower == "another":
            other.model.visual.merger.mlp[2].weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    seen = []
    options = {"max_steps": 1, "batch": (6, 1), "shuffle": False, "reference": str(tmp_path / "other")}
    trainer = trainer_of(tmp_path / "run", groups, cache_image_features=True, on_pairs=seen.append, **options)
    trainer.train()
    with torch.no_grad():
        rows = padded_rows(trainer.encoder)([trainer.encoder.encode(one) for one in groups])
        expected = (response_logps(other, rows) / rows.response_tokens).tolist()
    assert seen[0]["ref_chosen_logps"] == pytest.approx(expected[0::2], abs=1e-5)


@pytest.mark.parametrize(("adapter", "attention"), [(False, "sdpa"), (True, "padded")])
def test_a_live_reference_takes_the_policys_features(tmp_path, towers, monkeypatch, adapter, attention):
    options = {
        "batch": (2, 1),
        "max_steps": 3,
        "reference": "live",
        "attention": attention,
        "loss": DPO(beta=0.1),
        "learning_rate": 1e-3,
    }

    def run(name):
        trainer = trainer_of(tmp_path / name, peft_config=lora() if adapter else None, **options)
        trainer._apply_setup()
        towers.clear()
        return trajectory(trainer), len(towers)

    shared, calls = run("shared")
    assert calls == 3, "a forward pass per step"
    monkeypatch.setattr("unidpo.training.setup.features_problem", lambda *_: "told so")
    plain, calls = run("plain")
    assert calls == 1 + 2 * 2, "two per step from the second on, when the policy is not the reference any more"
    assert_same(shared, plain)


def test_a_vision_tower_that_learns_shares_nothing(tmp_path, towers):
    trainer = trainer_of(tmp_path, batch=(2, 1), reference="live", frozen=("projector",), learning_rate=1e-3)
    trainer._apply_setup()
    towers.clear()
    trainer.train()
    assert len(towers) == 1 + 2


# --- the store -------------------------------------------------------------------------------------------------------


def test_a_killed_pass_goes_on_where_its_parts_end(groups, tmp_path, towers, monkeypatch):
    monkeypatch.setattr(FeaturePass, "batch_tokens", 1)  # a forward per prompt
    monkeypatch.setattr("unidpo.cache.store.FLUSH_SECONDS", -1.0)
    model, _, encoder = tiny_policy()
    folder, left = tmp_path / "features", tmp_path / "left" / "features"

    def kill(done, total):
        if done == 2:  # what a kill leaves: parts, and one that was being written
            shutil.copytree(folder, left)
            (left / f".{platform.node()}-{2**22 + 1}-ab.unfinished").write_bytes(b"half a part")

    kept(model, encoder, groups, folder, on_progress=kill)
    said = []
    encoder = kept(model, encoder, groups, left, on_progress=lambda *done: said.append(done))
    assert said == [(0, 1), (1, 1)]
    assert len(encoder.store) == 3
    assert list(left.glob(".*")) == []


def test_an_interrupted_pass_keeps_what_it_had(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(FeaturePass, "batch_tokens", 1)
    model, _, encoder = tiny_policy()

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(model, encoder, groups, tmp_path / "features", on_progress=interrupt)
    assert len(FeatureStore(tmp_path / "features")) == 2


def test_only_prompts_that_are_new_are_computed(groups, tmp_path):
    model, _, encoder = tiny_policy()
    kept(model, encoder, groups[:2], tmp_path / "features")
    copies = in_files(some_groups(1), tmp_path / "elsewhere")  # the first prompt again, its image in another place
    said = []
    more = [*copies, *groups]
    store = kept(model, encoder, more, tmp_path / "features", on_progress=lambda *done: said.append(done)).store
    assert said == [(0, 1), (1, 1)]
    assert len(store) == 3


def test_a_prompt_of_text_alone_is_encoded_as_ever(tmp_path, towers):
    model, _, encoder = tiny_policy()
    text = [group(images=0)]
    ours, plain = kept(model, encoder, text, tmp_path / "features").encode(text[0]), encoder.encode(text[0])
    assert not (tmp_path / "features").exists()
    assert towers == []
    assert ours.features is None
    assert torch.equal(pack([ours]).input_ids, pack([plain]).input_ids)


def test_an_image_that_goes_bad_loses_its_rows_and_no_others(groups, tmp_path):
    model, _, encoder = tiny_policy()
    keys = content_keys(groups)
    groups[0].images[0].write_bytes(b"no image")
    lost = []
    ours = features_pass(model, encoder, on_lost=lost.extend).run(groups, keys, tmp_path / "features")
    assert [finding.row for finding in lost] == [1]
    with pytest.raises(ImageError, match="could not be read when"):
        ours.encode(groups[0])
    assert ours.encode(groups[1]).features is not None


def test_pixels_and_features_do_not_go_into_one_batch(groups, tmp_path):
    model, _, encoder = tiny_policy()
    ours = kept(model, encoder, groups, tmp_path / "features")
    with pytest.raises(ValueError, match="pixels"):
        pack([ours.encode(groups[0]), encoder.encode(groups[1])])


def test_room_is_seen_to_before_anything_is_computed(groups, tmp_path, monkeypatch, caplog):
    model, _, encoder = tiny_policy()
    with caplog.at_level("INFO", "unidpo"):
        kept(model, encoder, groups, tmp_path / "features")
    size = sum(part.stat().st_size for part in (tmp_path / "features").iterdir())
    (announced,) = [record for record in caplog.messages if "they take about" in record]
    number, unit = announced.split("about ")[1].split()[:2]
    assert size == pytest.approx(float(number) * {"kB": 1000}[unit], rel=0.3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 99, 99))
    with pytest.raises(UserError, match=r"need about .* 3 prompts, and the disk has 99 bytes free; .*UNIDPO_CACHE"):
        kept(model, encoder, groups, tmp_path / "full")
    assert not (tmp_path / "full").exists()


# --- several processes -----------------------------------------------------------------------------------------------


def test_what_stops_another_process_stops_this_one_and_what_it_had_is_kept(groups, tmp_path, monkeypatch):
    problem = UserError("the disk of another process is full")

    def gather(values):
        return [*values, _Outcome(0, [], problem=problem)] if isinstance(values[0], _Outcome) else values

    monkeypatch.setattr("unidpo.cache.stored_pass.gather", gather)
    model, _, encoder = tiny_policy()
    with pytest.raises(UserError, match="of another process"):
        kept(model, encoder, groups, tmp_path / "features")
    assert len(FeatureStore(tmp_path / "features")) == 3


def test_a_folder_that_another_process_does_not_see_is_refused_before_the_pass(groups, tmp_path, monkeypatch, towers):
    elsewhere = iter([{}, [], False])  # no part at first; then the new folder, which must be there
    monkeypatch.setattr("unidpo.cache.features.gather", lambda values: [*values, next(elsewhere)])
    model, _, encoder = tiny_policy()
    with pytest.raises(UserError, match="not every process sees this folder"):
        kept(model, encoder, groups, tmp_path / "features")
    assert sum(towers) == 2 + 2 + 2 + 1, "none but those of the trial"
    assert [*(tmp_path / "features").iterdir()] == []


def test_images_that_another_process_alone_does_not_see_are_an_error_in_all(groups, tmp_path, monkeypatch):
    def gather(values):
        return [None, ImageError("0-0.png: no such file")] if values == [None] else values

    monkeypatch.setattr("unidpo.cache.features.gather", gather)
    model, _, encoder = tiny_policy()
    with pytest.raises(ImageError, match="no such file"):
        kept(model, encoder, groups, tmp_path / "features")


def test_what_others_wrote_is_found_though_the_folder_does_not_list_it(groups, tmp_path, monkeypatch):
    model, _, encoder = tiny_policy()
    folder = tmp_path / "features"
    theirs = kept(model, encoder, groups[:1], folder).store
    monkeypatch.setattr("unidpo.cache.features.gather", lambda values: [*values, theirs.index])
    ours = FeatureStore(folder, {})
    monkeypatch.setattr(FeatureStore, "require_seen", lambda _: None)
    (key,) = theirs.index
    ours.merge()
    assert key in ours


# --- what features depend on -----------------------------------------------------------------------------------------


def test_the_folder_depends_on_tower_projector_and_encoder_and_not_on_the_language_model(tmp_path):
    model, processor, encoder = tiny_policy()
    before = vision_fingerprint(model)

    def changed(name):
        other = load_policy(GOLDEN / "model")
        with torch.no_grad():
            dict(other.named_parameters())[name].view(-1)[0] += 1e-3
        return vision_fingerprint(other)

    prints = {before, changed("model.visual.blocks.0.norm1.weight"), changed("model.visual.merger.mlp.0.weight")}
    model.config.vision_config.spatial_merge_size = 4
    prints.add(vision_fingerprint(model))
    assert len(prints) == 4
    assert changed("model.language_model.norm.weight") == before
    smaller = Encoder(processor, prompt_positions(model), max_pixels=56 * 56)
    cases = [(encoder, torch.float32), (smaller, torch.float32), (encoder, torch.bfloat16)]
    assert len({numbers_folder(tmp_path, "features", before, how, compute_dtype=kind) for how, kind in cases}) == 3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"frozen": ("vision",)}, {"frozen": ()}, {"adapter": ["qkv", "q_proj"]}])
def test_features_of_trainable_parts_are_not_kept(tmp_path, options):
    if targets := options.pop("adapter", None):
        options["peft_config"] = lora()
        options["peft_config"].target_modules = set(targets)
    with pytest.raises(RecipeError, match=r"data\.cache_image_features: .* trained.*model\.freeze"):
        trainer_of(tmp_path, cache_image_features=True, **options)


def test_a_model_whose_forward_takes_no_features_cannot_keep_them(groups, tmp_path, monkeypatch):
    model, _, encoder = tiny_policy()
    monkeypatch.setattr("unidpo.model.pack_check.takes_features", lambda model: False)
    with pytest.raises(ModelError, match=r"takes none.*data\.cache_image_features=false"):
        kept(model, encoder, groups, tmp_path / "features")


def test_a_model_that_makes_something_else_of_features_is_found_out(groups, monkeypatch):
    model, _, encoder = tiny_policy()
    batch = pack([encoder.encode(groups[0])])
    with pack_attention(model):
        assert features_problem(Policy(model, model), batch) is None
        right = unidpo.model.policy.image_features
        monkeypatch.setattr("unidpo.model.policy.image_features", lambda *given: _doubled(right(*given)))
        assert "log-probabilities differ" in features_problem(Policy(model, model), batch)


def _doubled(features):
    return replace(features, pooled=2 * features.pooled)


def test_a_recipe_that_keeps_features_of_what_learns_is_refused():
    plain = {"output": "run", "model": {"name": "m"}, "data": {"path": "pairs.json", "cache_image_features": True}}
    recipe_from(plain)
    learning = plain | {"model": {"name": "m", "freeze": ["vision"]}}
    recipe_from(learning | {"lora": {}})
    with pytest.raises(RecipeError, match=r"`data.cache_image_features`: .*set `model.freeze:"):
        recipe_from(learning)


@pytest.mark.parametrize("cached", [False, True])
def test_workers_change_no_number(groups, tmp_path, cached):
    """Of reference, features and steps; a row that is lost in a worker is named as one that is lost here."""

    def train(workers):
        seen, gone = [], tmp_path / "gone.png"
        shutil.copy(groups[0].images[0], gone)
        lost = replace(group(seed=9, row=9), images=(gone,))
        options = {"cache": tmp_path / f"cache-{workers}", "cache_image_features": cached, "on_bad_row": "skip"}
        options |= {"max_steps": 3, "max_lost_fraction": 0.5, "dataloader_num_workers": workers}
        trainer = trainer_of(tmp_path / f"run-{workers}", [*groups, lost], on_pairs=seen.append, **options)
        gone.unlink()
        trainer.train()
        return seen

    alone, beside = train(0), train(2)
    assert sorted(row for step in alone[:2] for row in step["row"]) == [1, 2, 3, 4, 5, 6]
    assert beside == alone
