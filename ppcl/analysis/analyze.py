"""The analyze stage: one teacher pass over the states updates every sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.cka import GROUPS, combine, drawn_ckas, sample_rows
from ppcl.analysis.intervals import detect_intervals, stability
from ppcl.analysis.modulation import Conditioning, Layer, conditioning
from ppcl.analysis.moments import Moments, best_ridge
from ppcl.analysis.sums import sampled_tokens
from ppcl.capture.states import States
from ppcl.common.artifacts import save_artifact
from ppcl.common.files import write_tensors
from ppcl.common.progress import Progress
from ppcl.common.streams import step_generator
from ppcl.config import AnalyzeConfig, PlanConfig
from ppcl.errors import UserError
from ppcl.student.plan import free_blocks
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.families.masks import valid_rows, valid_tokens
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import BlockCall, run_traced

Key = tuple[str, str, int, str]  # stack, kind of signal, block, stream


class Collector:
    """Accumulates the sums of one split while the teacher runs.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        cka_tokens: Tokens a stream to keep for CKA, at most; 0 for none.
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
        self.groups: dict[tuple[str, str], list[int]] = {}  # of each kept token
        self._groups: Sequence[int] = ()  # of each state of the present batch
        self.state_index = 0
        self._signals: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
        self._text_inputs: dict[tuple[str, int], Tensor] = {}

    def run(self, arguments: dict[str, Any], groups: Sequence[int] | None = None) -> None:
        """Run the teacher on a batch of states.

        Args:
            arguments: Of the batch.
            groups: Which of ``GROUPS`` groups of prompts each state belongs to; by turns if None.
        """
        size = batch_size(arguments)
        self._groups = groups or [(self.state_index + row) % GROUPS for row in range(size)]
        handles = [handle for spec in self.adapter.stacks for handle in self._watch(spec)]
        try:
            run_traced(self.transformer, self.adapter, arguments, self._visit)
        finally:
            for handle in handles:
                handle.remove()
        self.state_index += size

    def _watch(self, spec: StackSpec) -> list[Any]:
        """Hook the FFNs and the text projections of a stack."""
        handles = []
        for index, block in enumerate(self.adapter.blocks(self.transformer, spec)):
            for stream, path in spec.ffn.items():
                handles.append(block.get_submodule(path).register_forward_hook(self._ffn_hook(spec, index, stream)))
            if spec.text_qkv:
                handles.append(
                    block.get_submodule(spec.text_qkv).register_forward_hook(self._text_hook(spec.name, index))
                )
        return handles

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
        masks = valid_tokens(call.stack, call.arguments)
        for stream, before in call.inputs.items():
            after = call.outputs[stream]
            if after is None:
                continue
            valid = masks.get(stream)
            rows = sampled_tokens(before, valid, self.state_index, self.num_states, self.rows_per_feature)
            x, y = valid_rows(before, rows), valid_rows(after, rows)
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
            self._add((stack, "ffn", index, stream), valid_rows(signal[0], valid), valid_rows(signal[1], valid))
        if stream == "text" and (now := self._text_inputs.get((stack, index))) is not None:
            earlier = self._text_inputs.pop((stack, index - 1), None)
            if earlier is not None:
                self._add((stack, "text", index, stream), valid_rows(earlier, valid), valid_rows(now, valid))

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
            if call.index == 0:
                owners = self.groups.setdefault((call.stack.name, stream), [])
                owners += [self._groups[row]] * len(chosen)
        if not picked:
            return
        rows = torch.cat(picked).to(before.device)
        levels = self.kept.setdefault((call.stack.name, stream), [])
        while len(levels) < call.index + 2:
            levels.append([])
        if call.index == 0:
            levels[0].append(before.flatten(0, 1)[rows].float().cpu())
        levels[call.index + 1].append(after.flatten(0, 1)[rows].float().cpu())

    def cka_states(self, stack: str, stream: str) -> tuple[list[Tensor], list[int]]:
        """Kept tokens of a stack, M + 1 levels of (n, d), by groups of prompts; and the tokens of each group.

        Raises:
            UserError: There are too few for CKA.
        """
        owners = torch.tensor(self.groups[stack, stream])
        if len(owners) < 4:
            raise UserError(
                f"CKA needs at least 4 held-out tokens of the {stream} stream, got {len(owners)}; "
                "raise capture.num_prompts or capture.states_per_prompt"
            )
        order = owners.argsort(stable=True)
        states = [torch.cat(parts)[order] for parts in self.kept[stack, stream]]
        return states, owners.bincount(minlength=GROUPS).tolist()


def collect(
    transformer: nn.Module, adapter: Adapter, splits: Mapping[str, States], settings: AnalyzeConfig, seed: int
) -> dict[str, Collector]:
    """Run the teacher over both splits; returns the sums of each."""
    collectors = {}
    with torch.no_grad(), Progress("analyze", total=sum(len(s) for s in splits.values())) as progress:
        for name, states in splits.items():
            tokens = settings.cka_tokens if name == "held-out" else 0
            collectors[name] = Collector(transformer, adapter, tokens, len(states), seed, settings.rows_per_feature)
            prompts = dict.fromkeys(mark.prompt for mark in states.marks.values())
            numbers = {prompt: number for number, prompt in enumerate(prompts)}
            for call in states.answered(settings.batch_size):
                groups = [numbers[states.marks[place].prompt] % GROUPS for place in call.rows]
                collectors[name].run(call.arguments, groups)
                progress.advance(len(groups))
    return collectors


def analyze(
    transformer: nn.Module,
    adapter: Adapter,
    model: ModelInfo,
    calibration: Path,
    out: Path,
    settings: AnalyzeConfig,
    seed: int,
    protected: PlanConfig | None = None,
) -> Analysis:
    """Analyze the teacher; write ``analysis.safetensors`` and then ``analysis.json`` into ``out``.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        model: Its description.
        calibration: The captured states.
        out: The run directory.
        settings: See :class:`AnalyzeConfig`.
        seed: Fixes the tokens kept for CKA, and the draws of them.
        protected: Names the protected blocks, which no interval takes; those of the default settings if None.
    """
    began = time.perf_counter()
    splits = {name: States(calibration, name) for name in ("train", "held-out")}
    collectors = collect(transformer, adapter, splits, settings, seed)
    conditions = conditioning(transformer, adapter, splits, settings.batch_size, seed)
    stacks, matrices = [], {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        if len(blocks) == 0:
            continue
        info = next(stack for stack in model.stacks if stack.name == spec.name)
        free = free_blocks(model, info, protected or PlanConfig())  # type: ignore[call-arg]
        found, maps = _analyze_stack(spec, blocks, collectors, settings, free)
        stacks.append(replace(found, modulation_residual=_modulation_residual(spec, blocks, conditions)))
        for (index, signal), (weight, bias) in maps.items():
            matrices[f"{spec.name}/{index}/{signal}/weight"] = weight.float()
            matrices[f"{spec.name}/{index}/{signal}/bias"] = bias.float()
    for (stack, index, stream), condition in conditions.items():
        matrices[f"{stack}/{index}/modulation.{stream}/mean"] = condition.fitted.mean.float()
        matrices[f"{stack}/{index}/modulation.{stream}/root"] = condition.fitted.root.float()
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


def _analyze_stack(
    spec: StackSpec,
    blocks: nn.ModuleList,
    collectors: dict[str, Collector],
    settings: AnalyzeConfig,
    free: tuple[int, int],
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
    tokens = {stream: held_out.cka_states(spec.name, stream) for stream in streams}
    chains = {stream: [probes[i, stream] for i in range(num_blocks)] for stream in streams}
    tables, drawn = drawn_ckas(tokens, chains, step_generator(held_out.seed, 0, 21))
    shares = {stream: float(train.tokens[spec.name, stream]) for stream in streams}
    cka = combine(tables, shares)
    low, high = free
    intervals = detect_intervals(cka, low, high - 1)
    again = [detect_intervals(combine(one, shares), low, high - 1) for one in drawn]

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
        intervals=tuple(intervals),
        interval_draws=len(again),
        interval_stability=stability(intervals, again) if again else (),
        probe_error={stream: tuple(values) for stream, values in errors.items()},
        ridge={stream: tuple(values) for stream, values in ridges.items()},
        influence=tuple(
            1 - held_out.cosine[spec.name, i][0] / held_out.cosine[spec.name, i][1] for i in range(num_blocks)
        ),
        ffn_linearity={stream: linearity("ffn", stream) for stream in spec.ffn},
        text_linearity=text,
    )
    return found, maps


def _modulation_residual(
    spec: StackSpec, blocks: nn.ModuleList, conditions: Mapping[Layer, Conditioning]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """For each stream and block, what each rank of the modulation layer misses where it was not fitted."""
    found = {}
    for stream, path in spec.modulation.items():
        weights = [block.get_submodule(path).get_parameter("weight") for block in blocks]
        if all((spec.name, index, stream) in conditions for index in range(len(blocks))):
            found[stream] = tuple(
                tuple(conditions[spec.name, index, stream].missed(weight).tolist())
                for index, weight in enumerate(weights)
            )
    return found
