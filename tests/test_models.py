"""Load, freeze and save models; what is said of folders that are no model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from unidpo.errors import ModelError
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_policy, load_processor, save_model
from unidpo.model.parts import freeze, keep_trainable_in_float32, language_linear_layers, parameters_by_part
from worlds import GOLDEN, group, tiny_policy

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def frozen_names(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def recorded(golden):
    return json.loads((golden / "reference" / "uni_dpo" / "gradient_norms_step1.json").read_text())


@pytest.mark.parametrize(
    ("finished", "said"), [(True, r"its model is .*run/model$"), (False, "it has no model yet; resume the run$")]
)
def test_a_run_folder_is_not_its_model(tmp_path, finished, said):
    for name in ("config.json", "environment.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    if finished:
        (tmp_path / "run" / "model").mkdir()
    with pytest.raises(ModelError, match=f"run: this is a run folder; {said}"):
        load_policy(tmp_path / "run")


def test_the_golden_model_and_a_text_model_come_as_what_they_are(text_model):
    assert type(load_policy(GOLDEN / "model")).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(load_policy(text_model)).__name__ == "Qwen2ForCausalLM"
    assert type(load_processor(GOLDEN / "model")).__name__ == "Qwen2VLProcessor"
    assert load_processor(text_model).decode([2050]) == "<|im_end|>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_and_generates(tmp_path, dtype):
    model, processor, encoder = tiny_policy()
    save_model(model, processor, tmp_path / "model", dtype=dtype)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert again.dtype == dtype
    saved = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], tensor.to(dtype)), name
    same = Encoder(load_processor(tmp_path / "model"), prompt_positions(again))
    one = group(images=1)
    assert same.fingerprint() == encoder.fingerprint()
    encoded = same.encode(one)
    types = encoded.mm_token_type_ids[None]
    text = again.generate(
        input_ids=encoded.prompt_ids[None],
        attention_mask=torch.ones_like(types),
        mm_token_type_ids=types,
        max_new_tokens=3,
        min_new_tokens=3,
        **encoded.vision,
    )
    assert text.shape == (1, len(encoded.prompt_ids) + 3)


def test_a_saved_text_model_loads(text_model, tmp_path):
    model, tokenizer = load_policy(text_model), load_processor(text_model)
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template


def test_saving_leaves_the_model_in_its_own_dtype(tmp_path):
    model, processor, _ = tiny_policy()
    save_model(model, processor, tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_half_the_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def with_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2_vl", ')


def with_a_config_of_no_model(folder):
    (folder / "config.json").write_text('{"learning_rate": 1}')


def without_config(folder):
    (folder / "config.json").unlink()


def without_anything(folder):
    shutil.rmtree(folder)


DAMAGES = [
    without_weights,
    with_half_the_weights,
    with_broken_config,
    with_a_config_of_no_model,
    without_config,
    without_anything,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_a_folder_that_is_no_model(tmp_path, damage):
    folder = tmp_path / "my-model"
    shutil.copytree(GOLDEN / "model", folder)
    damage(folder)
    with pytest.raises(ModelError, match=str(folder)):
        load_policy(folder)


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "token"])
def test_a_model_without_its_processor(tmp_path, missing):
    folder = tmp_path / "my-model"
    shutil.copytree(GOLDEN / "model", folder)
    for path in folder.iterdir():
        if path.name.startswith(missing) or (missing == "token" and path.name in {"vocab.json", "merges.txt"}):
            path.unlink()
    with pytest.raises(ModelError, match=str(folder)):
        load_processor(folder)


def test_weights_that_lack_a_tensor_are_no_model(tmp_path):
    """transformers fills what is missing with random numbers and only logs it; training that would be a farce."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "my-model"
    shutil.copytree(GOLDEN / "model", folder)
    state = load_file(folder / "model.safetensors")
    gone = next(name for name in state if "layers.1.mlp.up_proj" in name)
    del state[gone]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_policy(folder)


def test_the_default_freezes_what_the_reference_froze(golden):
    model = load_policy(GOLDEN / "model")
    freeze(model, ("vision", "projector"))
    assert frozen_names(model) == set(recorded(golden)["frozen"])


def test_freezing_the_language_model_leaves_vision_and_projector(golden):
    model = load_policy(GOLDEN / "model")
    freeze(model, ("language",))
    assert frozen_names(model) == set(recorded(golden)["norms"])


def test_freezing_nothing_frees_what_was_frozen():
    model = load_policy(GOLDEN / "model")
    freeze(model, ("vision", "projector"))
    freeze(model, ())
    assert frozen_names(model) == set()


def test_freezing_everything_is_an_error():
    with pytest.raises(ModelError, match="language, projector, vision leaves nothing"):
        freeze(load_policy(GOLDEN / "model"), ("vision", "projector", "language"))


def test_each_parameter_is_in_exactly_one_part():
    model = load_policy(GOLDEN / "model")
    by_part = parameters_by_part(model)
    every = sorted(name for parameters in by_part.values() for name, _ in parameters)
    assert every == sorted(name for name, _ in model.named_parameters())
    assert {name.split(".")[2] for name, _ in by_part["projector"]} == {"merger"}


@pytest.mark.parametrize("make", ["text_model", "gemma2"])
def test_a_text_model_is_all_language(make, request):
    model = load_policy(request.getfixturevalue(make))
    by_part = parameters_by_part(model)
    assert (by_part["vision"], by_part["projector"]) == ([], [])
    freeze(model, ("vision", "projector"))
    assert frozen_names(model) == set()
    with pytest.raises(ModelError):
        freeze(model, ("language",))


def test_what_learns_is_kept_in_float32_and_the_rest_as_loaded():
    model = load_policy(GOLDEN / "model", dtype=torch.bfloat16)
    freeze(model, ("vision", "projector"))
    keep_trainable_in_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(tmp_path):
    model, processor, _ = tiny_policy(torch.bfloat16)
    freeze(model, ("vision", "projector"))
    keep_trainable_in_float32(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        model.lm_head.weight[5] += 1
    save_model(model, processor, tmp_path / "model", dtype=torch.float32)
    again = load_policy(tmp_path / "model")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # an adapter has none, says peft
def test_the_folder_of_an_adapter_is_its_model_with_the_adapter_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted(model, folder):
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        policy = get_peft_model(model, adapter)
        save_model(policy, load_processor(GOLDEN / "model"), folder, dtype=torch.float32)
        return policy

    ids = torch.tensor([[5, 6, 7, 8]])
    first = adapted(load_policy(GOLDEN / "model"), tmp_path / "first")
    merged = load_policy(tmp_path / "first")
    torch.testing.assert_close(merged(input_ids=ids).logits, first(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert load_processor(tmp_path / "first").tokenizer.vocab_size > 2000
    second = adapted(merged, tmp_path / "second")  # one on top of the other
    again = load_policy(tmp_path / "second")
    torch.testing.assert_close(again(input_ids=ids).logits, second(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_whose_model_is_gone(tmp_path):
    settings = {"base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="gone"):
        load_policy(tmp_path)


def test_adapters_go_to_every_linear_layer_of_the_language_model_and_nowhere_else():
    names = language_linear_layers(load_policy(GOLDEN / "model"))
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(names) == 3 * 7
    assert all("language_model" in name for name in names)
