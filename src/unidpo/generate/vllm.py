"""Answers from vLLM: a server that speaks OpenAI's protocol, or the engine in this process."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL.Image import Image

from unidpo.errors import ModelError
from unidpo.generate.prompts import Prompt, Prompter, stop_ids
from unidpo.generate.questions import Answer, Generation, GenerationFailed, LoadOptions, Question
from unidpo.generate.server import ChatServer, as_they_come
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
    """What both have in common: the model's processor, which lies here, writes the prompts."""

    def __init__(self, name: str, options: LoadOptions) -> None:
        if (Path(name) / "adapter_config.json").is_file():
            raise ModelError(f"{name}: vLLM is given whole models here; merge the adapter, or use --backend hf")
        self.name = name
        processor = load_processor(name, trust_remote_code=options.trust_remote_code)
        self.prompter = Prompter(processor, options.prompt_style)
        self.stops = stop_ids(processor)

    def identity(self) -> dict[str, Any]:
        return {"model": files_fingerprint(self.name), **self.prompter.identity(self.stops), "backend": "vllm"}


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
    """A server at an address, which answers. Its weights are taken to be those of `name`.

    Args:
        name: folder or hub id of the model; the server calls it so too, or serves one model only.
        options: `server` is the address, see `ChatServer`; `batch_size` is how many questions are asked at once.

    Raises:
        ModelError: the server cannot be reached, or serves other models.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        super().__init__(name, options)
        self.server = ChatServer(options.server or "", option="--server")
        self.at_once = options.batch_size or REQUESTS_AT_ONCE
        served = self.server.models()
        if name not in served and len(served) != 1:
            raise ModelError(f"{self.server.address}: the server has {', '.join(served) or 'no model'}, not {name}")
        self.served = name if name in served else served[0]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "served": self.served}

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        with ThreadPoolExecutor(self.at_once) as pool:
            for question, answer in as_they_come(pool, lambda each: self._ask(each, generation), questions):
                yield {question.index: answer}

    def _ask(self, question: Question, generation: Generation) -> Answer:
        prompt = self.prompter.prompt(question, generation)
        if isinstance(prompt, Answer):
            return prompt
        images = iter(prompt.images)
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else _image(next(images)) for part in question.parts
        ]
        more: dict[str, Any] = {"stop_token_ids": self.stops}
        if self.prompter.style == "plain":
            template = _PLAIN.replace("IMAGE", self.prompter.image_mark)
            more |= {"chat_template": template, "add_generation_prompt": False}
        elif self.prompter.template is not None:
            more["chat_template"] = self.prompter.template
        if limits := self.prompter.pixel_limits(generation):
            more["mm_processor_kwargs"] = limits
        try:
            return self.server.complete(
                [{"role": "user", "content": content}],
                model=self.served,
                temperature=0,
                max_tokens=generation.max_new_tokens,
                extra_body=more,
            )
        except GenerationFailed as error:
            if "chat_template" in more and "chat_template" in str(error):
                hint = "start the server with --trust-request-chat-template, or use --prompt-style chat"
                raise GenerationFailed(f"{error}; {hint}") from error
            raise


def _image(image: Image) -> dict[str, Any]:
    """As PNG, so that the server sees the pixels we see."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


class Engine(_Vllm):
    """vLLM's engine, on all GPUs it is given.

    Raises:
        ModelError: vLLM is not installed.
    """

    def __init__(self, name: str, options: LoadOptions) -> None:
        try:
            self.vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            remedy = "a server of it: --server http://localhost:8000"
            raise ModelError(f"--backend vllm needs vLLM in this environment, or {remedy} ({error})") from error
        super().__init__(name, options)
        self.dtype = options.dtype
        self.engine: Any = self.vllm.LLM(
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
            batch = questions[start : start + PROMPTS_AT_ONCE]
            prompts = {question.index: self.prompter.prompt(question, generation) for question in batch}
            answers = {index: answer for index, answer in prompts.items() if isinstance(answer, Answer)}
            asked = {index: prompt for index, prompt in prompts.items() if isinstance(prompt, Prompt)}
            inputs = [self._input(prompt, generation) for prompt in asked.values()]
            for index, output in zip(asked, self.engine.generate(inputs, settings, use_tqdm=False), strict=True):
                said = output.outputs[0]
                answers[index] = Answer(said.text, len(said.token_ids), truncated=said.finish_reason == "length")
            yield answers

    def _input(self, prompt: Prompt, generation: Generation) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt": prompt.text}
        if prompt.images:
            given["multi_modal_data"] = {"image": prompt.images}
            if limits := self.prompter.pixel_limits(generation):
                given["mm_processor_kwargs"] = limits
        return given
