"""The analyze stage: one teacher pass over the states updates every sum."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.cka import chained_cka, combine, sample_rows
from ppcl.analysis.intervals import detect_intervals
from ppcl.analysis.moments import Moments, best_ridge
from ppcl.analysis.sums import rows_of, sampled_tokens, valid_tokens
from ppcl.capture.states import States
from ppcl.common.artifacts import save_artifact
from ppcl.common.files import write_tensors
from ppcl.common.progress import Progress
from ppcl.common.streams import step_generator
from ppcl.config import AnalyzeConfig
from ppcl.errors import UserError
from ppcl.modules.replacements import Metric, residuals
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import BlockCall, run_traced

Key = tuple[str, str, int, str]  # stack, kind of signal, block, stream


class Collector:
    """Accumulates the sums of one split while the teacher runs.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        cka_tokens: Tokens a stream to keep for CKA, 0 for none.
        num_states: States of the split, over which these tokens are spread.
        seed: Fixes which tokens.
        rows_per_feature: Tokens that enter the sums, per feature of a stream; 0 takes all. A regression of d features
            knows its weights long before the last of a million tokens.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        cka_tokens: int,
        num_states: int,
        seed: int,
        rows_per_feature: int = 0,
    ) -> None:
        self.transformer, self.adapter, self.seed = transformer, adapter, seed
        self.num_states, self.rows_per_feature = num_states, rows_per_feature
        self.moments: dict[Key, Moments] = {}
        self.cosine: dict[tuple[str, int], list[float]] = {}
        self.tokens: dict[tuple[str, str], int] = {}  # stack, stream
        # Many states: one token of every stride-th; few states: several tokens of each. Bounded either way.
        self.quota = max(1, cka_tokens // max(1, num_states)) if cka_tokens else 0
        self.stride = -(-num_states // cka_tokens) if cka_tokens else 1
        self.kept: dict[tuple[str, str], list[list[Tensor]]] = {}
        self.state_index = 0
        self._signals: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
        self._text_inputs: dict[tuple[str, int], Tensor] = {}

    def run(self, arguments: dict[str, Any]) -> None:
        """Run the teacher on a batch of states."""
        handles = [handle for spec in self.adapter.stacks for handle in self._watch(spec)]
        try:
            run_traced(self.transformer, self.adapter, arguments, self._visit)
        finally:
            for handle in handles:
                handle.remove()
        self.state_index += batch_size(arguments)

    def _watch(self, spec: StackSpec) -> list[Any]:
        """Hook the FFNs and the text projections of a stack."""
        handles = []
        for index, block in enumerate(self.adapter.blocks(self.transformer, spec)):
            for stream, path in spec.ffn.items():
                handles.append(block.get_submodule(path).register_forward_hook(self._ffn_hook(spec, index, stream)))
            for stream, path in spec.modulation.items():
                handles.append(
                    block.get_submodule(path).register_forward_hook(self._modulation_hook(spec.name, index, stream))
                )
            if spec.text_qkv:
                handles.append(
                    block.get_submodule(spec.text_qkv).register_forward_hook(self._text_hook(spec.name, index))
                )
        return handles

    def _modulation_hook(self, stack: str, index: int, stream: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2)
            self._add((stack, "modulation", index, stream), x, x[:, :0])

        return hook

    def _ffn_hook(self, spec: StackSpec, index: int, stream: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            signals = (args[0], output)
            turned = args[0].ndim == 3 and spec.tokens_first
            self._signals[spec.name, index, stream] = (
                (spec.turn(signals[0]), spec.turn(signals[1])) if turned else signals
            )

        return hook

    def _text_hook(self, stack: str, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._text_inputs[stack, index] = args[0]

        return hook

    def _add(self, key: Key, x: Tensor, y: Tensor) -> None:
        if key not in self.moments:
            self.moments[key] = Moments(x.shape[-1], y.shape[-1], x.device)
        self.moments[key].update(x, y)

    def _visit(self, call: BlockCall) -> None:
        stack, index = call.stack.name, call.index
        for stream, before in call.inputs.items():
            after = call.outputs[stream]
            if after is None:
                continue
            valid = valid_tokens(call, stream)
            rows = sampled_tokens(before, valid, self.state_index, self.num_states, self.rows_per_feature)
            x, y = rows_of(before, rows), rows_of(after, rows)
            self._add((stack, "probe", index, stream), x, y - x)
            if self.quota:
                similarity = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
                total = self.cosine.setdefault((stack, index), [0.0, 0.0])
                total[0] += float(similarity.double().sum())
                total[1] += len(x)
            if index == 0:
                count = before.shape[:2].numel() if valid is None else int(valid.sum())
                self.tokens[stack, stream] = self.tokens.get((stack, stream), 0) + count
            if self.quota:
                self._keep_tokens(call, stream, before, after, valid)
            self._add_linearity(call, stream, rows)

    def _add_linearity(self, call: BlockCall, stream: str, valid: Tensor | None) -> None:
        stack, index = call.stack.name, call.index
        if (signal := self._signals.pop((stack, index, stream), None)) is not None and signal[0].ndim == 3:
            self._add((stack, "ffn", index, stream), rows_of(signal[0], valid), rows_of(signal[1], valid))
        if stream == "text" and (now := self._text_inputs.get((stack, index))) is not None:
            earlier = self._text_inputs.pop((stack, index - 1), None)
            if earlier is not None:
                self._add((stack, "text", index, stream), rows_of(earlier, valid), rows_of(now, valid))

    def _keep_tokens(self, call: BlockCall, stream: str, before: Tensor, after: Tensor, valid: Tensor | None) -> None:
        """Keep a few tokens of each state, the same ones at every block; independent of the batch size."""
        picked = []
        for row in range(len(before)):
            if (self.state_index + row) % self.stride:
                continue
            generator = step_generator(self.seed, self.state_index + row, 19)
            available = torch.arange(before.shape[1]) if valid is None else valid[row].cpu().nonzero()[:, 0]
            chosen = available[sample_rows(len(available), self.quota, generator)]
            picked.append(chosen + row * before.shape[1])
        if not picked:
            return
        rows = torch.cat(picked).to(before.device)
        levels = self.kept.setdefault((call.stack.name, stream), [])
        while len(levels) < call.index + 2:
            levels.append([])
        if call.index == 0:
            levels[0].append(before.flatten(0, 1)[rows].float().cpu())
        levels[call.index + 1].append(after.flatten(0, 1)[rows].float().cpu())

    def cka_states(self, stack: str, stream: str) -> Tensor:
        """Kept tokens of a stack, (M + 1, n, d).

        Raises:
            UserError: There are too few for CKA.
        """
        states = torch.stack([torch.cat(parts) for parts in self.kept[stack, stream]])
        if states.shape[1] < 4:
            raise UserError(
                f"CKA needs at least 4 held-out tokens of the {stream} stream, got {states.shape[1]}; "
                "raise capture.num_prompts or capture.states_per_prompt"
            )
        return states


def collect(
    transformer: nn.Module, adapter: Adapter, folder: Path, settings: AnalyzeConfig, seed: int
) -> dict[str, Collector]:
    """Run the teacher over both splits; returns the sums of each."""
    splits = {name: States(folder, name) for name in ("train", "held-out")}
    collectors = {}
    with torch.no_grad(), Progress("analyze", total=sum(len(s) for s in splits.values())) as progress:
        for name, states in splits.items():
            tokens = settings.cka_tokens if name == "held-out" else 0
            collectors[name] = Collector(transformer, adapter, tokens, len(states), seed, settings.rows_per_feature)
            for arguments in states.batches(settings.batch_size):
                collectors[name].run(arguments)
                progress.advance(batch_size(arguments))
    return collectors


def analyze(
    transformer: nn.Module,
    adapter: Adapter,
    model: ModelInfo,
    calibration: Path,
    out: Path,
    settings: AnalyzeConfig,
    seed: int,
) -> Analysis:
    """Analyze the teacher; write ``analysis.safetensors`` and then ``analysis.json`` into ``out``.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        model: Its description.
        calibration: The captured states.
        out: The run directory.
        settings: See :class:`AnalyzeConfig`.
        seed: Fixes the tokens kept for CKA.
    """
    began = time.perf_counter()
    collectors = collect(transformer, adapter, calibration, settings, seed)
    stacks, matrices = [], {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        if len(blocks) == 0:
            continue
        metrics = _metrics(spec, collectors["train"])
        found, maps = _analyze_stack(spec, blocks, collectors, settings, metrics)
        stacks.append(found)
        for (index, signal), (weight, bias) in maps.items():
            matrices[f"{spec.name}/{index}/{signal}/weight"] = weight.float()
            matrices[f"{spec.name}/{index}/{signal}/bias"] = bias.float()
        for (index, stream), metric in metrics.items():
            matrices[f"{spec.name}/{index}/modulation.{stream}/mean"] = metric.mean.float()
            matrices[f"{spec.name}/{index}/modulation.{stream}/root"] = metric.root.float()
    held_out = collectors["held-out"]
    analysis = Analysis(
        model=model,
        stacks=tuple(stacks),
        num_states=collectors["train"].state_index + held_out.state_index,
        # the same tokens pass through all stacks: those of the first one count
        num_tokens={stream: count for (_, stream), count in reversed(collectors["train"].tokens.items())},
        seconds=time.perf_counter() - began,
    )
    write_tensors(out / "analysis.safetensors", matrices)
    save_artifact(analysis, out / "analysis.json")
    return analysis


Maps = dict[tuple[int, str], tuple[Tensor, Tensor]]  # block; stream of a probe, or ffn.stream


Metrics = dict[tuple[int, str], Metric]  # block, stream


def _metrics(spec: StackSpec, train: Collector) -> Metrics:
    """The metric of the inputs of each modulation layer; layers with the same inputs share one."""
    known: list[tuple[Moments, Metric]] = []
    metrics = {}
    for (stack, kind, index, stream), moments in train.moments.items():
        if stack != spec.name or kind != "modulation":
            continue
        metric = next((m for other, m in known if torch.equal(other.xx, moments.xx)), None)
        if metric is None:
            mean = moments.sum_x / moments.count
            metric = Metric.of(mean, moments.xx / moments.count - torch.outer(mean, mean))
            known.append((moments, metric))
        metrics[index, stream] = metric
    return metrics


def _analyze_stack(
    spec: StackSpec,
    blocks: nn.ModuleList,
    collectors: dict[str, Collector],
    settings: AnalyzeConfig,
    metrics: Metrics,
) -> tuple[StackAnalysis, Maps]:
    """Solve probes, CKA, intervals and linearity of one stack from the sums."""
    train, held_out, num_blocks = collectors["train"], collectors["held-out"], len(blocks)
    probes: Maps = {}
    errors: dict[str, list[float]] = {}
    ridges: dict[str, list[float]] = {}
    streams = [s for s in spec.inputs if (spec.name, "probe", num_blocks - 1, s) in train.moments]
    for stream in streams:
        for index in range(num_blocks):
            key = (spec.name, "probe", index, stream)
            weight, bias, ridge, error = best_ridge(train.moments[key], held_out.moments[key], settings.ridges)
            probes[index, stream] = (weight, bias)
            errors.setdefault(stream, []).append(error)
            ridges.setdefault(stream, []).append(ridge)
    tables = {
        stream: chained_cka(
            held_out.cka_states(spec.name, stream).to(probes[0, stream][0].device),
            [probes[i, stream] for i in range(num_blocks)],
        )
        for stream in streams
    }
    cka = combine(tables, {stream: float(train.tokens[spec.name, stream]) for stream in streams})

    maps = dict(probes)

    def linearity(kind: str, stream: str) -> tuple[float | None, ...]:
        found: list[float | None] = []
        for index in range(num_blocks):
            key = (spec.name, kind, index, stream)
            if key not in train.moments:
                found.append(None)
                continue
            weight, bias, _, error = best_ridge(train.moments[key], held_out.moments[key], settings.ridges)
            found.append(error)
            if kind == "ffn":
                maps[index, f"ffn.{stream}"] = (weight, bias)
        return tuple(found)

    text = {"input": linearity("text", "text"), "output": tuple(errors["text"])} if spec.text_qkv else {}
    found = StackAnalysis(
        name=spec.name,
        cka=tuple(map(tuple, cka)),
        cka_by_stream={stream: tuple(map(tuple, table)) for stream, table in tables.items()},
        intervals=tuple(detect_intervals(cka, 0, num_blocks - 1)),
        probe_error={stream: tuple(values) for stream, values in errors.items()},
        ridge={stream: tuple(values) for stream, values in ridges.items()},
        influence=tuple(
            1 - held_out.cosine[spec.name, i][0] / held_out.cosine[spec.name, i][1] for i in range(num_blocks)
        ),
        ffn_linearity={stream: linearity("ffn", stream) for stream in spec.ffn},
        text_linearity=text,
        modulation_residual=_modulation_residual(spec, blocks, metrics),
    )
    return found, maps


def _modulation_residual(
    spec: StackSpec, blocks: nn.ModuleList, metrics: Metrics
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """For each stream and block, what each rank of the modulation layer misses."""
    found = {}
    for stream, path in spec.modulation.items():
        layers = [block.get_submodule(path) for block in blocks]
        if all((index, stream) in metrics for index in range(len(blocks))):
            found[stream] = tuple(
                tuple(residuals(layer.get_parameter("weight"), metrics[index, stream]).tolist())
                for index, layer in enumerate(layers)
            )
    return found
