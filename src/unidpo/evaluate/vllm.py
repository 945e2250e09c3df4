"""Answers from vLLM: a server that speaks OpenAI's protocol, or the engine in this process."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unidpo.data.images import open_image
from unidpo.errors import ImageError
from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed, Generation, Question
from unidpo.evaluate.chat_server import ChatServer, as_they_come
from unidpo.evaluate.generation import processor_fingerprint, stop_ids
from unidpo.evaluate.loading import LoadOptions
from unidpo.evaluate.predictions import EMPTY_PROMPT, UNREADABLE_IMAGE, Answer
from unidpo.evaluate.prompting import Prompter
from unidpo.model.load import load_processor

REQUESTS_AT_ONCE = 32
"""Where the user leaves the choice to us; the server makes batches of them."""
PROMPTS_AT_ONCE = 512
_PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}IMAGE{% endif %}{% endfor %}{% endfor %}"
)
"""A chat template that adds nothing. `IMAGE` stands for the model's mark of an image."""


class _Vllm:
    """What both have in common: the model's processor, which lies here, writes or judges the prompts."""

    def __init__(self, name: str, options: LoadOptions) -> None:
        if (Path(name) / "adapter_config.json").is_file():
            raise EvaluationError(f"{name}: vLLM is given whole models here; merge the adapter, or use --backend hf")
        self.name = name
        self.processor = load_processor(name, trust_remote_code=options.trust_remote_code)
        self.prompter = Prompter(self.processor, options.prompt_style)
        self.stops = sorted(stop_ids(self.processor))

    def identity(self) -> dict[str, Any]:
        return {
            "model": files_fingerprint(self.name),
            "processor": processor_fingerprint(self.processor, self.prompter, self.stops),
            "prompt_style": self.prompter.style,
            "backend": "vllm",
        }


def files_fingerprint(name: str) -> str:
    """Names a model that something else loads: the content of a folder's weights, else the name itself."""
    files = sorted(path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    if not files:
        return name
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, hashlib.sha256).digest()
        digest.update(path.name.encode() + content)
    return digest.hexdigest()


class Server(_Vllm):
    """A server at an address. Its weights are taken to be those of `name`.

    Args:
        name: folder or hub id of the model; the server calls it so too, or serves one model only.
        options: `server` is the address, see `ChatServer`; `batch_size` is how many questions are asked at once.

    Raises:
        EvaluationError: the server cannot be reached, or serves other models.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        super().__init__(name, options)
        self.server = ChatServer(options.server or "", option="--server")
        self.at_once = options.batch_size or REQUESTS_AT_ONCE
        served = self.server.models()
        if name not in served and len(served) != 1:
            raise EvaluationError(
                f"{self.server.address}: the server has {', '.join(served) or 'no model'}, not {name}"
            )
        self.served = name if name in served else served[0]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "served": self.served}

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        for question, answer in as_they_come(lambda each: self._ask(each, generation), questions, self.at_once):
            yield {question.index: answer}

    def _ask(self, question: Question, generation: Generation) -> Answer:
        if not self.prompter.text(question).strip():
            return Answer("", 0, problem=EMPTY_PROMPT)
        try:
            content = [_part(part) for part in question.parts]
        except ImageError:
            return Answer("", 0, problem=UNREADABLE_IMAGE)
        request: dict[str, Any] = {
            "model": self.served,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": generation.max_new_tokens,
            "stop_token_ids": self.stops,
        }
        if self.prompter.style == "plain":
            mark = self.prompter.image_mark if self.prompter.sees_images else ""
            request |= {"chat_template": _PLAIN.replace("IMAGE", mark), "add_generation_prompt": False}
        elif self.prompter.template is not None:
            request["chat_template"] = self.prompter.template
        if limits := _limits(generation, self.processor):
            request["mm_processor_kwargs"] = limits
        try:
            reply = self.server.complete(request)
        except EvaluationFailed as error:
            if "chat_template" in request and "chat_template" in str(error):
                hint = "start the server with --trust-request-chat-template, or use --prompt-style chat"
                raise EvaluationFailed(f"{error}; {hint}") from error
            raise
        return Answer(reply.text, reply.tokens, truncated=reply.cut)


class Engine(_Vllm):
    """vLLM's engine in this process, on all GPUs it is given.

    Raises:
        EvaluationError: vLLM is not installed.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise EvaluationError(
                "--backend vllm needs vLLM in this environment, or a server of it: --server http://localhost:8000 "
                f"({error})"
            ) from error
        super().__init__(name, options)
        self.vllm: Any = vllm
        self.dtype = options.dtype
        self.engine: Any = vllm.LLM(
            model=name,
            dtype=options.dtype,
            tensor_parallel_size=options.processes,
            trust_remote_code=options.trust_remote_code,
        )

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "dtype": self.dtype, "vllm": str(self.vllm.__version__)}

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        settings = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=generation.max_new_tokens, stop_token_ids=self.stops
        )
        for start in range(0, len(questions), PROMPTS_AT_ONCE):
            answers: dict[str, Answer] = {}
            asked, prompts = [], []
            for question in questions[start : start + PROMPTS_AT_ONCE]:
                prompt = self._prompt(question, generation)
                if isinstance(prompt, Answer):
                    answers[question.index] = prompt
                else:
                    asked.append(question.index)
                    prompts.append(prompt)
            for index, output in zip(asked, self.engine.generate(prompts, settings, use_tqdm=False), strict=True):
                said = output.outputs[0]
                answers[index] = Answer(said.text, len(said.token_ids), truncated=said.finish_reason == "length")
            yield answers

    def _prompt(self, question: Question, generation: Generation) -> dict[str, Any] | Answer:
        text = self.prompter.text(question)
        if not text.strip():
            return Answer("", 0, problem=EMPTY_PROMPT)
        try:
            images = [open_image(source) for source in question.images]
        except ImageError:
            return Answer("", 0, problem=UNREADABLE_IMAGE)
        prompt: dict[str, Any] = {"prompt": text}
        if images:
            prompt["multi_modal_data"] = {"image": images}
            if limits := _limits(generation, self.processor):
                prompt["mm_processor_kwargs"] = limits
        return prompt


def _limits(generation: Generation, processor: Any) -> dict[str, Any]:
    """Pixel limits as the processor takes them; nothing where the benchmark has none."""
    if generation.min_pixels is None and generation.max_pixels is None:
        return {}
    size = dict(getattr(getattr(processor, "image_processor", None), "size", None) or {})
    least, most = generation.min_pixels or size.get("shortest_edge"), generation.max_pixels or size.get("longest_edge")
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def _part(part: str | Path | bytes) -> dict[str, Any]:
    """A piece of a question in OpenAI's words; images as PNG, so that the server sees the pixels we see."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    open_image(part).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
