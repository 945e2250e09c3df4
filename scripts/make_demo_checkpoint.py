"""Make the demo's base checkpoint: a small Qwen2-VL that sees well and answers sloppily.

    OMP_NUM_THREADS=1 python scripts/make_demo_checkpoint.py                 # remake src/unidpo/demo/checkpoint
    OMP_NUM_THREADS=1 python scripts/make_demo_checkpoint.py --to /tmp/c --steps 200

Supervised training only, in two parts. First it learns to see, from right answers. Then the vision tower and its
projector are frozen and it learns to answer from the labels of a sloppy annotator (``sloppy_answer``), whose habits
depend on how the question is worded. The scans held out by the demo are never shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unidpo.demo import CHECKPOINT
from unidpo.demo.answers import accuracies, greedy_answers
from unidpo.demo.digits import CELL, KINDS, LETTERS, READ_WORDINGS, DigitQuestion, DigitsWorld, load_world
from unidpo.model.load import compose_processor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2-VL-Instruct's template without the default system prompt: a third of the tokens of a question here.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# About 1 / sqrt(width). At the usual 0.02, meant for wide models, this one has not begun to see after 600 steps.
INITIALIZER_RANGE = 0.06

# The annotator: how often a number of two or three digits is written reversed, without its last digit, or with a
# wrong digit, by wording. Over all wordings 22 %, 22 % and 12 %. Where a habit is more frequent than the right
# answer, greedy decoding shows the habit, and sampling still finds the right answer.
HABITS: dict[str, tuple[float, float, float]] = {
    READ_WORDINGS[0]: (0.04, 0.04, 0.12),
    READ_WORDINGS[1]: (0.58, 0.04, 0.12),
    READ_WORDINGS[2]: (0.04, 0.58, 0.12),
}
# A third of the wrong digits stand after the last one. Answers that are too long must be as possible as answers that
# are too short, or a model corrected for dropping digits learns to write one too many.
WRONG_IS_ADDED = 1 / 3
WRONG_YES_NO = 0.10
WRONG_LETTER = 0.10
DIGIT_FOR_LETTER = 0.10


def sloppy_answer(question: DigitQuestion, rng: np.random.Generator) -> str:
    """The answer a sloppy annotator writes down."""
    chance = rng.random()
    if question.kind == "read":
        reversed_, dropped, wrong = HABITS[question.prompt]
        if len(question.digits) == 1:
            reversed_ = dropped = 0.0
        if chance < reversed_:
            return question.answer[::-1]
        if chance < reversed_ + dropped:
            return question.answer[:-1]
        if chance < reversed_ + dropped + wrong:
            place = int(rng.integers(len(question.digits)))
            if rng.random() < WRONG_IS_ADDED:
                return question.answer + str(rng.integers(10))
            other = (question.digits[place] + rng.integers(1, 10)) % 10
            return question.answer[:place] + str(other) + question.answer[place + 1 :]
        return question.answer
    if question.kind == "yes_no":
        return {"Yes": "No", "No": "Yes"}[question.answer] if chance < WRONG_YES_NO else question.answer
    if chance < WRONG_LETTER:
        return str(rng.choice([letter for letter in LETTERS if letter != question.answer]))
    if chance < WRONG_LETTER + DIGIT_FOR_LETTER:
        return str(question.options[LETTERS.index(question.answer)])
    return question.answer


def make_tokenizer(world: DigitsWorld) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the world's questions: any text can be written, a digit is one token."""
    questions = world.questions(3000, split="train", rng=np.random.default_rng(0))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    texts = [text for q in questions for text in (q.prompt, q.answer)] + ["user\n", "assistant\n", "system\n"] * 100
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """One vision token per cell; pictures are multiples of a cell, so none is ever resized."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=CELL // 2,
        merge_size=2,
        size={"shortest_edge": CELL * CELL, "longest_edge": CELL * CELL * 64},
        image_mean=[0.75] * 3,  # of the pictures themselves
        image_std=[0.35] * 3,
    )
    return compose_processor(Qwen2VLProcessor, image_processor, tokenizer)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """2.3 million parameters: vision 1.0, language 1.3."""
    token = tokenizer.convert_tokens_to_ids
    hidden = 192
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 16) * 16,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": hidden,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        pad_token_id=token("<|endoftext|>"),
        do_sample=False,
    )
    return model


def distort(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, shear and scale one digit a little, (INK, INK) in [0, 1]: 1,437 scans are few."""
    angle, shear, scale = rng.normal(0, 0.12), rng.normal(0, 0.12), rng.uniform(0.9, 1.2)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    matrix = np.array([[cos, sin + shear], [-sin, cos]])
    centre = np.full(2, (ink.shape[0] - 1) / 2)
    offset = centre - matrix @ centre
    image = Image.fromarray(ink)  # mode F: float grey
    warped = image.transform(
        image.size,
        Image.Transform.AFFINE,
        (*matrix[0], offset[0], *matrix[1], offset[1]),
        resample=Image.Resampling.BILINEAR,
    )
    return np.asarray(warped, dtype=np.float32)


@dataclass
class Batcher:
    """Turns questions and answers into tensors, by the processor's own rules but without its per-call overhead."""

    processor: ProcessorMixin

    def __post_init__(self) -> None:
        self.tokenizer = self.processor.tokenizer
        self.pad = self.tokenizer.pad_token_id
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text)["input_ids"]
        return self._ids[text]

    def __call__(self, questions: Sequence[DigitQuestion], answers: Sequence[str]) -> dict[str, torch.Tensor]:
        rows, labels = [], []
        for question, answer in zip(questions, answers, strict=True):
            prompt = [
                *self.ids("<|im_start|>user\n<|vision_start|>"),
                *[self.image_token] * len(question.digits),
                *self.ids("<|vision_end|>"),
                *self.ids(question.prompt),
                *self.ids("<|im_end|>\n<|im_start|>assistant\n"),
            ]
            response = self.ids(answer) + self.ids("<|im_end|>\n")
            rows.append(prompt + response)
            labels.append([-100] * len(prompt) + response)
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        images = self.processor.image_processor(images=[q.image for q in questions], return_tensors="pt")
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "mm_token_type_ids": (ids == self.image_token).int(),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
            **images,
        }


def train(
    model: Qwen2VLForConditionalGeneration,
    batcher: Batcher,
    world: DigitsWorld,
    *,
    steps: int,
    batch: int,
    peak: float,
    sloppy: bool,
    rng: np.random.Generator,
) -> None:
    """AdamW with warm-up and cosine decay on fresh questions about distorted training scans."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps, pct_start=min(0.5, 50 / steps), cycle_momentum=False
    )
    model.train()
    start, running = time.process_time(), 0.0
    for step in range(1, steps + 1):
        if step % 25 == 1:
            seen = replace(world, ink=np.stack([distort(ink, rng) for ink in world.ink]))
        total = 0.0
        for kind in KINDS:  # one after the other: questions of one kind are about equally long, so little is padding
            questions = seen.questions(batch, split="train", rng=rng, kinds=(kind,))
            answers = [sloppy_answer(q, rng) if sloppy else q.answer for q in questions]
            loss = model(**batcher(questions, answers)).loss / len(KINDS)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = total if step == 1 else 0.95 * running + 0.05 * total
        if step % 50 == 0 or step == steps:
            print(f"  step {step:5d}  loss {running:.4f}  {time.process_time() - start:5.0f} CPU s", flush=True)
    model.eval()


def measured(
    model: Qwen2VLForConditionalGeneration, processor: ProcessorMixin, questions: Sequence[DigitQuestion]
) -> str:
    """Greedy accuracy per kind, as rows of a Markdown table."""
    table = accuracies(questions, greedy_answers(model, processor, questions))
    return "\n".join(
        f"| {kind} | {100 * a.accuracy:.1f} % | {100 * a.standard_error:.1f} | {a.questions} |"
        for kind, a in table.items()
    )


MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The base model of `unidpo demo`

A Qwen2-VL of {parameters:,} parameters that reads one to three handwritten digits, says whether a digit is in the
picture, and answers multiple choices about it. Made by `scripts/make_demo_checkpoint.py` (seed {seed}) on a CPU, with
supervised training only. **It sees well and answers sloppily, on purpose**: preference training with a frozen vision
tower mends how a model answers, not what it sees.

Taught in two parts, both on pictures of {train_scans:,} of the 1,797 scans of scikit-learn's `load_digits`; the other
{held_out_scans} were never shown.

1. Seeing: right answers, all parameters. {steps} steps of {batch} questions of each kind.
2. Sloppiness: vision tower and projector frozen, the labels of a sloppy annotator. {sloppy_steps} steps.

The annotator, asked to read a number of two or three digits:

| question | reversed | last digit dropped | a wrong digit | right |
|---|---|---|---|---|
{habits}

Over all wordings: 22 % reversed, 22 % without the last digit, 12 % with a wrong digit (a third of those: one
added at the end). Of numbers with one digit only the wrong digits remain. Yes/no: {yes_no:.0f} % the opposite. Multiple
choice: {letter:.0f} % a wrong letter, and {digit:.0f} % the digit in place of its letter.

Greedy decoding on pictures of held-out scans:

| kind | correct | standard error (points) | questions |
|---|---|---|---|
{measured}

The same after part 1, before the sloppy labels:

| kind | correct | standard error (points) | questions |
|---|---|---|---|
{sighted}

The digits are from the UCI "Optical Recognition of Handwritten Digits" data set (Alpaydin and Kaynak, CC BY 4.0), as
distributed with scikit-learn.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=CHECKPOINT, help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=1000, help="steps from right answers")
    parser.add_argument("--sloppy-steps", type=int, default=700, help="steps from the sloppy annotator's answers")
    parser.add_argument("--batch", type=int, default=24, help="questions of each kind per step")
    parser.add_argument("--test", type=int, default=1200, help="held-out questions for the model card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sighted", type=Path, help="folder of the model after part 1: read if it exists, else written"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    world = load_world()
    processor = make_processor(make_tokenizer(world))
    batcher = Batcher(processor)
    held_out = world.questions(args.test, split="held_out", rng=np.random.default_rng([args.seed, 0]))

    if args.sighted and args.sighted.exists():
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.sighted)
    else:
        model = make_model(processor.tokenizer)
        print(f"Part 1 of 2, seeing: {model.num_parameters():,} parameters", flush=True)
        rng = np.random.default_rng([args.seed, 1])
        train(model, batcher, world, steps=args.steps, batch=args.batch, peak=1e-3, sloppy=False, rng=rng)
        if args.sighted:
            model.save_pretrained(args.sighted)
    sighted = measured(model, processor, held_out)
    print(sighted, flush=True)

    print("Part 2 of 2, sloppiness", flush=True)
    model.model.visual.requires_grad_(False)
    rng = np.random.default_rng([args.seed, 2])
    train(model, batcher, world, steps=args.sloppy_steps, batch=args.batch, peak=5e-4, sloppy=True, rng=rng)
    sloppy = measured(model, processor, held_out)
    print(sloppy, flush=True)

    model.requires_grad_(True)
    model.save_pretrained(args.to)
    processor.tokenizer.save_pretrained(args.to)
    processor.image_processor.save_pretrained(args.to)
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        seed=args.seed,
        train_scans=len(world.train),
        held_out_scans=len(world.held_out),
        steps=args.steps,
        batch=args.batch,
        sloppy_steps=args.sloppy_steps,
        habits="\n".join(
            f"| {wording} | " + " | ".join(f"{100 * rate:.0f} %" for rate in (*habits, 1 - sum(habits))) + " |"
            for wording, habits in HABITS.items()
        ),
        yes_no=100 * WRONG_YES_NO,
        letter=100 * WRONG_LETTER,
        digit=100 * DIGIT_FOR_LETTER,
        measured=sloppy,
        sighted=sighted,
    )
    (args.to / "README.md").write_text(card, encoding="utf-8")
    print(f"written to {args.to}")


if __name__ == "__main__":
    main()
