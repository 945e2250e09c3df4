"""What compiled layers would ask of a GPU: the graphs that torch gives its compiler, their elementwise work fused.

A graph's matrix products are kernels of their own. All else that hangs together between two of them is taken for one
kernel: it reads what comes in once, and writes once what is used outside of it. A sum over tokens is one kernel more,
which reads the same. Inductor fuses about so, and may do less. Attention is in no graph: it is counted as it runs.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import AttentionInterface, Qwen2VLForConditionalGeneration

from benchmarks.pretended_counts import FREE, Counts
from benchmarks.pretended_gpu import GPU
from benchmarks.pretended_torch import pretended_gpu
from benchmarks.pretended_training import Case, as_trained, batch_of, counted
from benchmarks.shapes import Shape
from unidpo.model import compiling
from unidpo.model.attention import BACKENDS, SegmentTable
from unidpo.model.encode import plain_positions, prompt_positions
from unidpo.model.policy import Policy
from unidpo.model.tower import tower_of
from unidpo.model.transfer import to_device

MATRIX = {"mm", "addmm", "bmm", "baddbmm"}
# A small pack whose numbers of tokens and of patches divide no width of the model, so that they are seen in a shape.
SMALL = Case("", 1, 2, backend="sdpa", grid=(2, 106), text=98, length=30)
TOKENS, PATCHES = 211, 212


@dataclass(frozen=True, slots=True)
class Asked:
    """Kernels, and the bytes of those that are no matrix products."""

    kernels: float = 0
    other_bytes: float = 0

    def __add__(self, other: Asked) -> Asked:
        return Asked(self.kernels + other.kernels, self.other_bytes + other.other_bytes)

    def times(self, count: float) -> Asked:
        return Asked(count * self.kernels, count * self.other_bytes)

    @classmethod
    def of(cls, counts: Counts) -> Asked:
        return cls(sum(counts.kernels.values()), sum(counts.other_bytes.values()))


def with_compiled_layers(shape: Shape, case: Case, found: dict[str, Any]) -> Asked:
    """What `counted` found of a case, with the layers of language model and vision tower compiled."""
    graphs = layer_graphs(shape)
    forward, backward = attention(shape, case)
    again = 2 if case.checkpointing else 1
    fused = Asked()
    for kind, graph in graphs["language"]:
        fused += asked(graph, found["tokens"] / TOKENS).times(1 if kind == "backward" else again)
    compiled = forward.times(again) + backward + fused
    saved = (one_layer(shape, case) + compiled.times(-1)).times(shape.layers)
    if not case.features:
        patches = case.prompts * case.grid[0] * case.grid[1]
        fused = sum((asked(graph, patches / PATCHES) for _, graph in graphs["vision"]), Asked())
        saved += (one_block(shape, case) + fused.times(-1)).times(shape.vision[1])
    return Asked(found["kernels"], found["other_bytes"]) + saved.times(-1)


def one_layer(shape: Shape, case: Case) -> Asked:
    """A layer of the language model as it runs uncompiled, forward and backward."""
    both = [counted(replace(shape, layers=n), replace(case, features=True)) for n in (1, 2)]
    return Asked(*(both[1][name] - both[0][name] for name in ("kernels", "other_bytes")))


def one_block(shape: Shape, case: Case) -> Asked:
    """A frozen block of the vision tower as it runs uncompiled, without its attention."""
    width, _, heads = shape.vision
    small = replace(shape, layers=1, vision=(width, 1, heads))
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(small.config).to(torch.bfloat16)
    with pretended_gpu(numbers=False) as gpu:
        gpu.put(model)
        block = model.model.visual.blocks[0]
        patches = case.prompts * case.grid[0] * case.grid[1]
        hidden = torch.empty(patches, width, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            gpu.reset()
            hidden = hidden + block.norm1(hidden).to(hidden.dtype)
            hidden + block.mlp(block.norm2(hidden))
        return Asked.of(gpu.counts)


def attention(shape: Shape, case: Case) -> tuple[Asked, Asked]:
    """A pack's attention in one layer, forward and backward."""
    packed = batch_of(shape, replace(case, features=True), plain_positions, None).responses
    tokens, width = len(packed.input_ids), shape.hidden // shape.heads[0]
    attend: Callable[..., Any] = AttentionInterface()[BACKENDS[case.backend].attention]
    with pretended_gpu(numbers=False) as gpu:
        table = SegmentTable(packed.segments, GPU, to_device(packed, GPU).kernel)
        inputs = [
            torch.empty(1, tokens, heads, width, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
            for heads, dtype in zip((*shape.heads, shape.heads[1]), (torch.float32,) * 2 + (shape.dtype,), strict=True)
        ]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            gpu.reset()
            seen, _ = attend(None, *inputs, None, scaling=width**-0.5, segments=table)
        forward = Asked.of(gpu.counts)
        gpu.reset()
        torch.autograd.grad(seen, inputs, torch.empty_like(seen))
        return forward, Asked.of(gpu.counts)


def layer_graphs(shape: Shape) -> dict[str, list[tuple[str, fx.GraphModule]]]:
    """The graphs of a decoder layer and of a vision block, as "forward", "backward" or, without gradient, "inference".

    Of small weights for words and a short pack, which do not change a layer's graphs.
    """
    width, _, heads = shape.vision
    torch.compiler.reset()
    torch.manual_seed(0)
    config = replace(shape, layers=1, vision=(width, 1, heads), vocabulary=2080).config
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    as_trained(model)
    found: list[tuple[str, fx.GraphModule]] = []

    def keep(kind: str) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, _: Any) -> Any:
            found.append((kind, graph))
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        inference_compiler=keep("inference"),
        partition_fn=min_cut_rematerialization_partition,
    )
    policy = Policy(model, model, partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    policy.set_attention(BACKENDS[SMALL.backend].attention)
    with mock.patch.object(compiling, "BACKEND", backend):
        policy.set_compiled(True)
        batch = batch_of(replace(shape, dtype=torch.float32), SMALL, prompt_positions(model), tower_of(model))
        policy.response_logps(batch.responses).sum().backward()
    torch.compiler.reset()
    vision = [each for each in found if each[0] == "inference"]
    return {"vision": vision, "language": [each for each in found if each not in vision]}


def asked(graph: fx.GraphModule, growth: float) -> Asked:
    """What a graph asks for when its elementwise work is fused.

    Args:
        growth: how many times as many tokens go through it as when it was made.
    """
    region = _regions(graph.graph)
    size = partial(_bytes, growth=growth)
    kernels, moved = 0, 0.0
    for nodes in region.values():
        sums = [node for node in nodes if _sums_over_tokens(node)]
        rest = [node for node in nodes if node not in sums]
        read = {each for node in nodes for each in _inputs(node) if each not in nodes}
        written = {node for node in rest if any(user not in nodes for user in _users(node))}
        for outputs in ([written] if written else []) + [{node} for node in sums]:
            kernels += 1
            moved += sum(map(size, read)) + sum(map(size, outputs))
    kernels += sum(_name(node) in MATRIX for node in graph.graph.nodes)
    return Asked(kernels, moved)


def _regions(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Elementwise nodes that hang together with no matrix product between them, by one of them."""
    depth = _depths(graph)
    leader = {node: node for node in depth if _name(node) not in MATRIX}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in leader:
        for each in _inputs(node):
            if each in leader and depth[each] == depth[node]:
                leader[find(each)] = find(node)
    regions: dict[fx.Node, set[fx.Node]] = collections.defaultdict(set)
    for node in leader:
        regions[find(node)].add(node)
    return regions


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many matrix products come before each node; a node that can wait does, for what uses it first."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _is_view(node) and _holds_tensor(node):
            before = max((depth.get(each, 0) for each in _inputs(node)), default=0)
            depth[node] = before + (_name(node) in MATRIX)
    for node in reversed(list(depth)):
        if _name(node) not in MATRIX:
            users = [depth[user] - (_name(user) in MATRIX) for user in _users(node) if user in depth]
            depth[node] = min(users, default=depth[node])
    return depth


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", "")


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and (_name(node) in FREE or _name(node) == "getitem")


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, tuple) and isinstance(value[0], Tensor))


def _inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose memory a node reads: those that its views are of."""
    for each in node.all_input_nodes:
        if _is_view(each):
            yield from _inputs(each)
        elif _holds_tensor(each):
            yield each


def _users(node: fx.Node) -> Iterator[fx.Node]:
    for each in node.users:
        if _is_view(each):
            yield from _users(each)
        else:
            yield each


def _tensor(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, tuple) else value


def _sizes(node: fx.Node) -> list[int]:
    return [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in _tensor(node).shape]


def _is_per_token(size: int) -> bool:
    return size % TOKENS == 0 or size % PATCHES == 0


def _sums_over_tokens(node: fx.Node) -> bool:
    inputs = [each for each in _inputs(node) if any(map(_is_per_token, _sizes(each)))]
    return bool(inputs) and not any(map(_is_per_token, _sizes(node)))


def _bytes(node: fx.Node, *, growth: float) -> float:
    total = float(_tensor(node).element_size())
    for size in _sizes(node):
        total *= size * growth if _is_per_token(size) else size
    return total
