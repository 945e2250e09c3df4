"""The benchmarks compare like with like, count work rightly, and the page says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, page, reading, records, speed
from benchmarks.loops import full_logits
from benchmarks.measure import First, Seconds, Taken
from benchmarks.shapes import SHAPES, Lengths, Shape
from benchmarks.speed import Kept, agreement, compare
from benchmarks.variants import VARIANTS
from benchmarks.work import group_work
from benchmarks.world import as_pairs, make_prompts
from scripts.gpu_wheels import ROOTS, closure
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_processor
from unidpo.model.packs import pad
from worlds import GOLDEN, group, tiny_policy

ROOT = Path(__file__).parent.parent
SEEDS = Lengths(image=(4, 30), prompt=(5, 60), response=(5, 400))


@pytest.fixture(scope="module")
def measured() -> dict:
    """One run of every variant on the tiny shape, by the command."""
    command = [sys.executable, "-m", "benchmarks.speed", "--shape", "tiny", "--runs", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_computes_the_same_log_probabilities_gradient_and_update(measured) -> None:
    assert measured["variants"].keys() == VARIANTS.keys()
    assert {found["pairs"] for found in measured["variants"].values()} == {6}
    assert max(measured["largest_difference"].values()) < 1e-5


def test_work_on_packs_is_less_than_on_rows(measured) -> None:
    work = {name: found["work_per_pair"] for name, found in measured["variants"].items()}
    for layout in ("prompt packs", "pair packs"):
        assert work[f"{layout}, features"] < work[layout]
    assert work["prompt packs"] < work["pair packs"] < work["live"] < work["selective"] < work["loop"] == work["trl"]


def test_only_what_is_stored_has_a_pass_of_its_own(measured) -> None:
    passes = {name for name, found in measured["variants"].items() if found["reference_cpu_seconds_per_pair"]}
    assert passes == {name for name, variant in VARIANTS.items() if variant.layout != "rows" and not variant.live}


def test_the_page_says_what_was_measured() -> None:
    text = page.DOCUMENT.read_text("utf-8")
    assert set(page.BLOCK.findall(text)) == {(name, " -->\n") for name in page.PARTS}
    assert page.rendered(text) == text


def test_a_page_without_measurements_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    text = page.rendered(page.DOCUMENT.read_text("utf-8"))
    assert text.count("Not measured yet") == len(page.PARTS)


def taken(**different: float) -> Taken:
    first = First(**{"loss": 0.6931472, "grad_norm": 2.0, "chosen_logps": -100.0, "rejected_logps": -80.0} | different)
    return Taken(6, first, 0.69, None, None, None, 0, peak=0)


@pytest.mark.parametrize(
    "different", [{"loss": 0.6}, {"grad_norm": 2.1}, {"chosen_logps": -100.1}, {"rejected_logps": float("nan")}]
)
def test_a_variant_that_computes_something_else_is_found_out(different) -> None:
    assert agreement(torch.float32, {"a": taken(), "b": taken()}) == (
        {"losses": pytest.approx(0, abs=0.01), "logps": 0, "gradients": 0},
        [],
    )
    _, found = agreement(torch.float32, {"a": taken(), "b": taken(**different)})
    assert found
    assert all(each.startswith("b: ") for each in found)


def test_a_benchmark_that_was_stopped_goes_on_and_a_failure_stops_nothing(monkeypatch, tmp_path) -> None:
    tried = []

    def one(name: str, setting: object) -> Taken | str:
        tried.append(name)
        return (
            "OutOfMemoryError: 90 GiB"
            if name == "trl"
            else replace(taken(), passes=Seconds(1, 1), update=Seconds(1, 1))
        )

    monkeypatch.setattr(speed, "in_own_process", lambda *_, **__: 1)
    monkeypatch.setattr(speed, "_one", one)
    tiny = SHAPES["tiny"]
    run = lambda minutes: compare(tiny, 6, 1, 1, ["loop", "trl"], Kept(tmp_path / "kept", "a"), minutes)  # noqa: E731
    assert run(0) is None
    kept = Kept(tmp_path / "kept", "a")
    kept.add("0 loop", one("loop", None))
    found = run(float("inf"))
    assert tried == ["loop", "trl"]
    assert (list(found["variants"]), found["failed"]) == (["loop"], {"trl": "OutOfMemoryError: 90 GiB"})
    assert not Kept(tmp_path / "kept", "another setting").runs


def test_the_checks_of_a_gpu_record_failures_and_are_not_done_twice(monkeypatch, tmp_path) -> None:
    goes_on = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'seen')!r}); "
    goes_on += "p.exists() or (p.touch(), sys.exit(75))"
    made = {"good": ["-c", "print(1)"], "bad": ["-c", "raise ValueError('no kernel')"], "long": ["-c", goes_on]}
    monkeypatch.setattr(gpu, "checks", lambda shape: made)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"gpu": "H200"})
    monkeypatch.setattr(gpu.page, "write", lambda: None)
    for module in (gpu, records):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    outcomes = []
    for _ in range(2):
        with pytest.raises(SystemExit, match="not everything passed"):
            gpu.main()
        outcomes.append({name: check["outcome"] for name, check in records.last_record("gpu")["checks"].items()})
    assert outcomes == [{"good": "passed", "bad": "failed: ValueError: no kernel", "long": "passed"}] * 2
    assert len(json.loads((tmp_path / "gpu.json").read_text())) == 1
    (tmp_path / "gpu-good.log").unlink()
    made["bad"] = ["-c", ""]
    gpu.main()
    assert not (tmp_path / "gpu-good.log").exists()


def test_wheels_for_a_gpu_are_all_that_torch_and_transformers_do_not_bring() -> None:
    wanted = closure(ROOTS) - closure(["torch", "transformers"])
    assert {"peft", "trl", "pytest", "pyarrow"} <= wanted
    assert not {"torch", "numpy", "sympy"} & wanted


def test_prompts_have_the_lengths_asked_for_and_their_mean(tmp_path) -> None:
    processor = load_processor(GOLDEN / "model")
    prompts = make_prompts(processor.tokenizer, SEEDS, 12, tmp_path, seed=3)
    ids = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    responses = [len(ids(response.text)) for prompt in prompts for response in prompt.responses]
    questions = [len(ids(prompt.messages[0].content[1])) for prompt in prompts]
    assert min(responses) >= 5
    assert max(responses) <= 400
    assert sum(responses) / len(responses) == pytest.approx((400 - 5) / torch.tensor(80.0).log().item(), rel=0.02)
    assert (min(questions), max(questions)) == (7, 58)
    encoder = Encoder(processor, prompt_positions(tiny_policy()[0]))
    images = [int((encoder.encode(prompt).prompt_ids == 2060).sum()) for prompt in prompts]
    assert min(images) >= 4
    assert max(images) <= 30


def test_the_first_pairs_of_a_prompt_hold_every_response_equally_often(tmp_path) -> None:
    prompts = make_prompts(load_processor(GOLDEN / "model").tokenizer, SEEDS, 3, tmp_path, seed=0)
    for count, each in ((2, 1), (4, 2), (6, 3)):
        for prompt in prompts:
            seen = Counter(i for pair in prompt.pairs[:count] for i in (pair.chosen, pair.rejected))
            assert seen == dict.fromkeys(range(4), each)
    pairs = as_pairs(prompts, 6)
    assert len({pair.pairs[0].row for pair in pairs}) == 18
    assert all(pair.score_margin(pair.pairs[0]) > 0 for pair in pairs)


def test_a_seed_gives_the_same_prompts_and_another_seed_others(tmp_path) -> None:
    tokenizer = load_processor(GOLDEN / "model").tokenizer
    first, again, other = (make_prompts(tokenizer, SEEDS, 2, tmp_path, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first[0].messages != other[0].messages


def test_the_counted_work_is_what_torch_counts() -> None:
    """Forward of one row through all logits. Torch counts whole attention matrices, a few per cent here."""
    model, _, encoder = tiny_policy()
    encoded = encoder.encode(group(side=112), [0])
    rows = pad([encoded], pad_token_id=2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        full_logits(model, rows)
    config, vision = model.config.text_config, model.config.vision_config
    shape = Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        (config.num_attention_heads, config.num_key_value_heads),
        (4, 6, 6),
        config.vocab_size,
        (vision.embed_dim, vision.depth, vision.num_heads),
    )
    image = int((encoded.prompt_ids == 2060).sum())
    sizes = {"image": image, "prompt": len(encoded.prompt_ids), "responses": [len(encoded.response_ids[0])]}
    forward = group_work(shape, replace(VARIANTS["loop"], live=True), **sizes) - group_work(
        shape, replace(VARIANTS["loop"], live=False), **sizes
    )
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_large_shapes_are_the_ones_they_say() -> None:
    with torch.device("meta"):
        from transformers import Qwen2VLForConditionalGeneration as Model

        sizes = {name: sum(p.numel() for p in Model(SHAPES[name].config).parameters()) for name in ("cpu", "gpu")}
    assert sizes["cpu"] == pytest.approx(110e6, rel=0.05)
    assert sizes["gpu"] == 2_208_985_600  # Qwen/Qwen2-VL-2B


def test_a_micro_batch_in_bytes_takes_an_eighth_and_an_item_one_open_file() -> None:
    sizes = {name: found["bytes"] for name, found in reading.images(1).items()}
    assert sizes["float32"] > 7 * sizes["bytes"]
    files = {name: found["open_files"] for name, found in reading.items().items()}
    assert files["tensors"] - files["one buffer"] > 5 * reading.ITEMS


def test_the_page_says_what_reading_costs() -> None:
    record, text = records.last_record("reading"), (ROOT / "docs" / "performance.md").read_text()
    for name in ("seconds", "bytes"):
        found = [record["images"][each][name] for each in ("float32", "bytes")]
        shown = [f"{1e3 * f:.0f}" if name == "seconds" else f"{f / 1e6:.1f}" for f in found]
        assert f" | {shown[0]} | {shown[1]} |" in text
    received, files = ([each[name] for each in record["items"].values()] for name in ("seconds", "open_files"))
    assert f"CPU ms | {1e3 * received[0]:.1f} | {1e3 * received[1]:.1f} |" in text
    assert f"64 items | {files[0]} | {files[1]} |" in text
