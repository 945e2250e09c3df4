"""Layers compiled in place: the same numbers under the same names, and nothing compiled anew from batch to batch."""

import copy
import logging
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from test_golden import assert_follows, train
from trainers import arguments, lora, some_groups, trainer_of
from unidpo.config import recipe_from
from unidpo.errors import ModelError, RecipeError
from unidpo.model import compiling
from unidpo.model.adapters import with_adapter
from unidpo.model.attention import BACKENDS
from unidpo.model.compile_check import choose_compiled
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_policy, load_processor
from unidpo.model.pack_check import padded_rows
from unidpo.model.packs import pack
from unidpo.model.parts import freeze
from unidpo.model.policy import Policy
from unidpo.model.transfer import to_device
from unidpo.training.arguments import obstacle_to_compiling, spelled_for_transformers
from unidpo.training.callbacks import Hooks
from worlds import group, tiny_policy

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# torch hides this warning of its own where it is a warning.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@pytest.fixture
def frames(monkeypatch):
    """Counts the graphs that are compiled; they are run as they are."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    return counter


def policy_of(model, *, checkpointing=False, adapter=False):
    freeze(model, ["vision", "projector"])
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()
    if adapter:
        wrapped = with_adapter(model, lora(), own_reference=True, mixed_precision=False)
        return Policy(wrapped.train(), wrapped)
    return Policy(model.train(), model)


def packs_policy(**options):
    model, _, encoder = tiny_policy()
    policy = policy_of(model, **options)
    policy.set_attention(BACKENDS["sdpa"].attention)
    return policy, encoder


def batches(encoder, collate, count=7):
    """Of one to three prompts, with two or three responses each, none of a length met before; some without an image."""
    for number in range(count):
        groups = [
            group(
                images=(number + place) % 3 if number else 1,
                responses=[3 + number, 5, 9 + place][: 2 + number % 2],
                seed=number + place,
                side=140 + 28 * (number % 4),
            )
            for place in range(1 + number % 3)
        ]
        yield collate([encoder.encode(each) for each in groups])


def step(policy, batch):
    logps = policy.response_logps(batch)
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    return logps.detach(), torch.autograd.grad(logps.sum(), weights, allow_unused=True)


def assert_same(step, plain):
    torch.testing.assert_close(step[0], plain[0], rtol=1e-6, atol=1e-4)
    for ours, theirs in zip(step[1], plain[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


WAYS = {
    "packs": {},
    "packs, checkpointing": {"checkpointing": True},
    "packs, adapter, checkpointing": {"adapter": True, "checkpointing": True},
    "padded, checkpointing": {"padded": True, "checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_is_compiled_after_the_second_micro_batch(frames, way):
    options = dict(way)
    padded = options.pop("padded", False)
    policy, encoder = packs_policy(**options)
    if padded:
        policy.set_attention("sdpa")
    given = list(batches(encoder, padded_rows(encoder) if padded else pack))
    plain = [step(policy, batch) for batch in given]
    policy.set_compiled(True)
    seen = []
    for batch, expected in zip(given, plain, strict=True):
        assert_same(step(policy, batch), expected)
        seen.append(frames.frame_count)
    assert seen[0] >= (2 if padded else 5)
    assert seen[-1] == seen[1], seen
    policy.set_compiled(False)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(step(policy, given[0]), plain[0])
    assert not policy.compiled


def test_a_copy_of_a_compiled_model_computes_by_itself(frames):
    policy, encoder = packs_policy()
    policy.set_compiled(True)
    batch = next(batches(encoder, pack))
    with policy.measuring():
        expected = policy.response_logps(batch)
    copied = copy.deepcopy(policy.plain)
    for weight in policy.plain.parameters():
        weight.data.zero_()
    twin = Policy(copied, copied)
    with twin.measuring():
        torch.testing.assert_close(twin.response_logps(batch), expected)


@pytest.mark.parametrize(
    "way", [{"reference": "live"}, {"attention": "padded"}], ids=["packs, live reference", "padded"]
)
def test_a_compiled_training_follows_the_golden_trajectory(golden, tmp_path, frames, way):
    assert_follows(golden, "uni_dpo", train(golden, tmp_path, "uni_dpo", compile="layers", **way))
    assert frames.frame_count > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs one for C++")
def test_torchs_own_compiler_agrees(text_model):
    model = load_policy(text_model)
    encoder = Encoder(load_processor(text_model), prompt_positions(model))
    policy = Policy(model.train(), model)
    policy.set_attention(BACKENDS["sdpa"].attention)
    batch = pack([encoder.encode(group(images=0))])
    assert choose_compiled(policy, batch, compile="layers", compute_dtype=torch.float32, device=CPU)


def test_a_training_is_compiled_but_for_its_benchmark_and_leaves_the_model_as_it_came(tmp_path, frames):
    seen = {}

    def benchmark(model, processor, number):
        seen["benchmark"] = compiling.is_compiled(model)
        return {}

    trainer = trainer_of(
        tmp_path,
        some_groups(images=lambda i: 0),
        eval_dataset=some_groups(2, images=lambda i: 0),
        compile="layers",
        hooks=Hooks(benchmark=benchmark),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    names = list(trainer.model.state_dict())
    step, steps = trainer.training_step, []
    trainer.training_step = lambda *given: steps.append(trainer.policy.compiled) or step(*given)
    measure = trainer.held_out_metrics
    trainer.held_out_metrics = lambda steps: seen.update({"held out": trainer.policy.compiled}) or measure(steps)
    trainer.train()
    assert seen == {"held out": True, "benchmark": False}
    assert steps == [True, True]
    assert not trainer.policy.compiled
    assert list(trainer.model.state_dict()) == names
    assert not [module for module in trainer.model.modules() if "forward" in vars(module)]


def choose(policy, encoder, monkeypatch, *, device=CPU, **options):
    monkeypatch.setattr("unidpo.model.compile_check.to_device", lambda batch, device: to_device(batch, CPU))
    batch = pack([encoder.encode(group(images=0))])
    options = {"compile": "auto", "compute_dtype": torch.float32} | options
    return choose_compiled(policy, batch, device=device, **options)


def test_by_itself_only_a_gpu_compiles(frames, monkeypatch):
    policy, encoder = packs_policy()
    assert not choose(policy, encoder, monkeypatch, device=CPU)
    assert not choose(policy, encoder, monkeypatch, device=GPU, compile="off")
    assert frames.frame_count == 0
    assert choose(policy, encoder, monkeypatch, device=GPU)
    assert policy.compiled
    assert all(weight.grad is None for weight in policy.model.parameters())


def changed(graph, change):
    return lambda *given: [change(out) if isinstance(out, torch.Tensor) else out for out in graph(*given)]


def wrong_numbers(graph, inputs):
    return changed(graph, lambda out: 1.01 * out)


def wrong_gradients(graph, inputs):
    return changed(graph, lambda out: out + 0.01 * (out - out.detach()))


def no_gradients(graph, inputs):
    return changed(graph, torch.Tensor.detach)


def broken(graph, inputs):
    raise RuntimeError("there is no triton here")


PROBLEMS = {
    wrong_numbers: "log-probabilities differ by",
    wrong_gradients: "gradients differ by",
    no_gradients: "weights with a gradient 2 have one",
    broken: "there is no triton here",
}


@pytest.mark.parametrize("backend", PROBLEMS, ids=lambda backend: backend.__name__)
def test_what_does_not_work_is_left_off_and_said(monkeypatch, caplog, backend):
    monkeypatch.setattr(compiling, "BACKEND", backend)
    policy, encoder = packs_policy()
    with caplog.at_level(logging.WARNING, "unidpo"):
        assert not choose(policy, encoder, monkeypatch, device=GPU)
    assert PROBLEMS[backend] in caplog.text
    assert "train.compile=off" in caplog.text
    assert not policy.compiled
    with pytest.raises(ModelError, match=PROBLEMS[backend]):
        choose(policy, encoder, monkeypatch, compile="layers")


def test_a_model_that_drops_at_random_is_compared_without(frames, monkeypatch):
    policy, encoder = packs_policy()
    for layer in policy.plain.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert choose(policy, encoder, monkeypatch, compile="layers")
    assert policy.model.training


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"torch_compile": True}, "torch_compile has the whole model compiled"),
        ({"fsdp": True}, "FSDP gathers"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
    ids=["torch_compile", "fsdp", "reentrant"],
)
def test_what_stands_in_the_way_is_named(tmp_path, options, why):
    assert why in obstacle_to_compiling(arguments(tmp_path, **spelled_for_transformers(options)))


def test_an_obstacle_is_an_error_where_compiling_is_demanded(frames, monkeypatch):
    policy, encoder = packs_policy()
    with pytest.raises(ModelError, match=r"train.compile=layers: .*\(in the way\)"):
        choose(policy, encoder, monkeypatch, compile="layers", obstacle="in the way")
    assert frames.frame_count == 0


def test_off_is_a_word_in_a_recipe():
    recipe = {"output": "run", "model": {"name": "m/m"}, "data": {"path": "data.json"}}
    assert recipe_from(recipe | {"train": {"compile": False}}).train.compile == "off"
    with pytest.raises(RecipeError, match="compiles the whole model"):
        recipe_from(recipe | {"train": {"compile": "layers", "torch_compile": True}})
