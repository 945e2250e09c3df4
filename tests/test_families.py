"""Model families, each as a small random model: packs and padded rows against separate passes of the stock model."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, CohereConfig, FuyuConfig, GraniteConfig, TrainingArguments

from benchmarks import models as model_table
from families import (
    FAMILIES,
    LAYOUTS,
    Float64,
    difference,
    load_family,
    measure,
    pack_attention,
    pack_logps,
    padded_logps,
    prompts,
    save_family,
    separate_logps,
)
from unidpo import PreferenceTrainer, UniDPO
from unidpo.errors import ModelError
from unidpo.model.attention import PACK_ATTENTION, PackAttentionError
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.lengths import TokenCounter
from unidpo.model.load import load_policy, load_processor
from unidpo.model.logps import response_logps
from unidpo.model.packs import pack
from unidpo.model.parts import freeze, language_linear_layers, parameters_by_part
from worlds import GOLDEN, SMALL, save_text_model

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ROOT = Path(__file__).parents[1]
# What lies between vision tower and language model, by the first names within the model.
PROJECTORS = {
    "Qwen2-VL": {"visual.merger"},
    "Qwen2.5-VL": {"visual.merger"},
    "Qwen3-VL": {"visual.merger", "visual.deepstack_merger_list"},
    "LLaVA-OneVision": {"multi_modal_projector", "image_newline"},
    "InternVL3": {"multi_modal_projector"},
    "SmolVLM2": {"connector"},
    "Gemma-3": {"multi_modal_projector"},
}
# LLaVA-OneVision takes the last layer's output before this norm.
WITHOUT_GRADIENT = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a family's model, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).is_dir() else save_family(FAMILIES[name], root / name)


@pytest.mark.parametrize("tuning", ["full", "LoRA"])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_equal_separate_passes_in_log_probabilities_and_gradients(folder, name, tuning):
    world = load_family(folder(name), tuning)
    groups = prompts(images=name in PROJECTORS)
    expected = measure(world, groups, separate_logps)
    counted = [tokens.prompt for tokens in TokenCounter(world.encoder).count(groups)]
    assert counted == [len(world.encoder.encode(group).prompt_ids) for group in groups]
    for layout in LAYOUTS.values():
        if layout is pack_logps and FAMILIES[name].refuses:
            with pytest.raises(PackAttentionError, match=FAMILIES[name].refuses):
                layout(world, groups)
            continue
        found = difference(measure(world, groups, layout), expected)
        assert found.logps < 1e-9
        assert found.gradients < 1e-9
    learning = {name for name, parameter in world.model.named_parameters() if parameter.requires_grad}
    assert expected.gradients.keys() == learning - (WITHOUT_GRADIENT if name == "LLaVA-OneVision" else set())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_changes_no_gradient_of_a_pack_that_adds_image_features_to_several_layers(folder):
    world = load_family(folder("Qwen3-VL"))
    encoded = pack([world.encoder.encode(group) for group in prompts(images=True)])
    gradients = []
    with pack_attention(world.model):
        for _ in range(2):
            world.model.zero_grad()
            response_logps(world.model, encoded).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in world.model.named_parameters()})
            world.model.gradient_checkpointing_enable({"use_reentrant": False})
            world.model.train()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("name", PROJECTORS)
def test_images_show_in_the_responses_to_them_and_in_no_others(folder, name):
    """Images that took each other's place would not have passed above."""
    world = load_family(folder(name))
    groups = prompts(images=True)
    swapped = replace(groups[-1], images=groups[-1].images[::-1])
    layout = padded_logps if FAMILIES[name].refuses else pack_logps
    with Float64(), torch.no_grad():
        moved = (layout(world, [*groups[:-1], swapped]) - layout(world, groups)).abs()
    others = len(moved) - len(swapped.responses)
    assert moved[:others].max() < 1e-9
    assert moved[others:].min() > 1e-4


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "SmolVLM2"])
def test_image_tensors_of_several_prompts_are_what_the_processor_makes_of_them_together(folder, name):
    """LLaVA-OneVision cuts images into different numbers of tiles, SmolVLM prompts have different numbers of images."""
    processor = load_processor(folder(name))
    encoder = Encoder(processor, prompt_positions(load_policy(folder(name))))
    groups = prompts(images=True)[1:]
    together = processor(
        text=[encoder.prompt_text(group.messages) for group in groups],
        images=[list(group.images) for group in groups],
        padding=True,
        return_tensors="pt",
    )
    encoded = [encoder.encode(group) for group in groups]
    assert len({group.vision["pixel_values"].shape[1] for group in encoded}) > 1
    found = pack(encoded).vision
    assert found.keys() == together.keys() - {"input_ids", "attention_mask"}
    for tensor_name, tensor in found.items():
        assert torch.equal(tensor, together[tensor_name]), tensor_name


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_found_by_the_models_own_structure(folder, name):
    model = load_policy(folder(name))
    by_part = parameters_by_part(model)
    every = [name for parameters in by_part.values() for name, _ in parameters]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    modules = {name.removeprefix("model.") for name, _ in by_part["projector"]}
    assert {".".join(each.split(".")[: 2 if each.startswith("visual") else 1]) for each in modules} == PROJECTORS.get(
        name, set()
    )
    assert bool(by_part["vision"]) == (name in PROJECTORS)
    adapted = language_linear_layers(model)
    assert len(adapted) == 2 * 7
    assert {f"{layer}.weight" for layer in adapted} <= {name for name, _ in by_part["language"]}


@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen2.5", "Gemma-3"])
def test_a_tied_head_freezes_and_learns_with_the_embeddings(folder, name):
    model = load_policy(folder(name))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embeddings.weight
    freeze(model, ("vision", "projector"))
    assert head.weight.requires_grad
    if name in PROJECTORS:
        freeze(model, ("language",))
        assert not head.weight.requires_grad
        assert all(parameter.requires_grad for _, parameter in parameters_by_part(model)["vision"])


def test_a_model_of_unknown_structure_says_what_was_not_found():
    config = FuyuConfig(text_config={"model_type": "persimmon", **SMALL, "num_key_value_heads": 4}, patch_size=4)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ModelError, match=r"FuyuForCausalLM is its vision tower.*vision_embed_tokens.*freeze=none"):
        freeze(model, ("vision", "projector"))
    freeze(model, ())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [GraniteConfig(**SMALL, logits_scaling=4.0), CohereConfig(**SMALL, logit_scale=0.3)])
def test_a_model_that_scales_its_logits_computes_them_itself(tmp_path, config):
    world = load_family(save_text_model(tmp_path / "model", config))
    groups = prompts(images=False)
    found = difference(measure(world, groups, padded_logps), measure(world, groups, separate_logps))
    assert found.logps < 1e-9
    assert found.gradients < 1e-9


@pytest.mark.parametrize(("name", "packs"), [("SmolVLM2", True), ("Gemma-3", False)])
def test_a_family_trains_from_its_folder_on_the_layout_it_can_take(folder, tmp_path, name, packs, caplog):
    rated = [
        replace(group, responses=tuple(replace(r, score=float(-i)) for i, r in enumerate(group.responses)))
        for group in prompts(images=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        num_train_epochs=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PreferenceTrainer(folder(name), loss=UniDPO(), args=arguments, train_dataset=rated)
    trainer.train()
    losses = [entry["preference/loss"] for entry in trainer.state.log_history if "preference/loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5
    assert (trainer.setup.attention == PACK_ATTENTION) == packs
    assert ("sliding_attention" in caplog.text) != packs


def test_padded_rows_meet_the_vocabulary_at_response_positions_only(folder):
    world = load_family(folder("Gemma-3"))
    seen = []
    padded_logps(world, prompts(images=False)[:1])  # the head was tried before
    world.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    groups = prompts(images=True)
    padded_logps(world, groups)
    responses = [len(ids) for group in groups for ids in world.encoder.encode(group).response_ids]
    assert seen == [sum(responses)]


def test_processors_keep_their_settings_on_the_way_through_a_folder(folder, tmp_path):
    processor = load_processor(folder("LLaVA-OneVision"))
    processor.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder("LLaVA-OneVision") / "config.json").read_bytes())
    again = load_processor(tmp_path)
    assert (again.num_image_tokens, again.vision_feature_select_strategy) == (4, "full")
    assert again.to_dict() == processor.to_dict()


def test_the_template_of_a_base_model_renders_role_messages_to_nothing(tmp_path):
    """Qwen2-VL's base models take a list of parts where their Instruct models take messages."""
    path = tmp_path / "base.jinja"
    path.write_text(
        "{% if messages is string %}{{ messages }}{% else %}{% for content in messages %}"
        "{% if content is string %}{{ content }}"
        "{% elif content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    processor = load_processor(GOLDEN / "model")
    processor.chat_template = path.read_text()
    positions = prompt_positions(load_policy(GOLDEN / "model"))
    for group in prompts(images=True):
        with pytest.raises(ModelError, match=r"nothing; set data\.template=chatml"):
            Encoder(processor, positions).encode(group)
        assert len(Encoder(processor, positions, template="chatml").encode(group).prompt_ids) > 10


def test_a_template_with_another_models_image_marks(folder):
    processor = load_processor(folder("SmolVLM2"))
    encoder = Encoder(processor, prompt_positions(load_policy(folder("SmolVLM2"))), template="chatml")
    text, image = prompts(images=True)[:2]
    assert "<|im_start|>user" in encoder.prompt_text(text.messages)
    with pytest.raises(ModelError, match=r"0 of this model's image marks \(<image>\) for 1 images.*data\.template"):
        encoder.encode(image)


# --- the table


def test_no_cell_of_the_table_is_untested():
    cells = json.loads((ROOT / "benchmarks" / "results" / "model_table.json").read_text())[-1]["cells"]
    measured = [(cell["family"], cell["layout"], cell["tuning"]) for cell in cells]
    assert sorted(measured) == sorted(itertools.product(FAMILIES, LAYOUTS, model_table.TUNINGS))
    for cell in cells:
        if "refused" in cell:
            assert cell["layout"] == "packs"
            assert FAMILIES[cell["family"]].refuses in cell["refused"]
        else:
            assert max(cell["logps"], cell["gradients"]) < 1e-9


def test_the_table_in_the_docs_is_the_last_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "model_table.json").read_text())[-1]
    assert model_table.TABLE.search(model_table.DOCUMENT.read_text("utf-8"))[0] == model_table.table(record) + "\n"
