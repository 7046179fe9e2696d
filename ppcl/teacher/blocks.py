"""Where a sweep gets the teacher's blocks from: a loaded transformer, or the pipeline's files, a block at a time.

Either way a transformer is there whose parts outside the block lists are ready to run. Of streamed blocks it holds
the modules without weights; these are read from the safetensors when a block's turn comes, and freed after. Two
blocks are in memory at most: the present one, and the next one, which a thread reads meanwhile.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.files import read_mapping
from ppcl.common.lazy import Lazy
from ppcl.common.pieces import Pieces
from ppcl.common.tensor_files import read_tensor_header
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ModelError, UserError, shortened
from ppcl.modules.compressed import register
from ppcl.teacher.families import ADAPTERS, Adapter, StackSpec, adapter_for
from ppcl.teacher.loading import (
    AGAIN,
    check_config,
    check_counts,
    check_model,
    component_entry,
    stored_dtype,
    stored_folder,
    weight_files,
)

Place = tuple[str, int]  # a block: its stack, and its number in it


class Blocks(ABC):
    """The blocks of a transformer, one after the other.

    Args:
        transformer: Its parts outside the blocks can run; its block lists are not to be called.
        device: Where blocks are when they are lent.

    Attributes:
        adapter: The transformer's family.
        stacks: Its block lists by name.
        order: All blocks but the fixed tails, in execution order.
    """

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.transformer, self.device = transformer, device
        self.adapter: Adapter = adapter_for(transformer)
        self.stacks: dict[str, StackSpec] = {spec.name: spec for spec in self.adapter.stacks}
        self.order: list[Place] = [
            (spec.name, index)
            for spec in self.adapter.stacks
            for index in range(len(self.adapter.blocks(transformer, spec)))
        ]

    @abstractmethod
    def walk(self, places: Sequence[Place]) -> Generator[nn.Module]:
        """Lend blocks in this order; each until the next one is asked for."""

    @contextmanager
    def block(self, stack: str, index: int) -> Iterator[nn.Module]:
        """Lend one block."""
        with closing(self.walk([(stack, index)])) as lent:
            yield next(lent)

    @abstractmethod
    def copy(self, place: Place) -> nn.Module:
        """A block with weights of its own, on the device; it can be asked for while others are lent."""

    def copies(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of a stack as :meth:`copy` makes them, each when it is asked for."""
        size = sum(name == stack for name, _ in self.order)
        return Lazy(size, lambda index: self.copy((stack, index)))

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Lend the transformer to be called as a whole, for what needs few calls."""
        yield self.transformer

    def spec(self, place: Place) -> StackSpec:
        """A block's stack, as far as it holds for this block, see :meth:`StackSpec.of`."""
        return self.stacks[place[0]].of(self.module(place))

    def module(self, place: Place) -> nn.Module:
        """A block as it is now: with its weights, if it is lent or always there; of meta tensors else."""
        blocks: nn.ModuleList = getattr(self.transformer, place[0])
        return blocks[place[1]]


def main_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's largest weight; some classes keep a few small ones in float32 whatever the rest is."""
    return max(module.parameters(), key=torch.numel).dtype


class ResidentBlocks(Blocks):
    """The blocks of a transformer that is loaded whole.

    Args:
        transformer: The teacher's.
        device: Where it runs; where its first weight is if None. Blocks that wait elsewhere come for each call.
    """

    def __init__(self, transformer: Any, device: torch.device | None = None) -> None:
        super().__init__(transformer, device or next(transformer.parameters()).device)

    def walk(self, places: Sequence[Place]) -> Generator[nn.Module]:
        """Lend blocks in this order."""
        for place in places:
            yield self.module(place)

    def copy(self, place: Place) -> nn.Module:
        """A block with weights of its own."""
        return copy.deepcopy(self.module(place))


class StreamedBlocks(Blocks):
    """Blocks that are read from a pipeline's files when their turn comes.

    Weights are those that ``from_pretrained(dtype=dtype)`` would load, bit for bit: in ``dtype``, but for the
    modules that the class keeps in float32.

    Args:
        model: ``emoji``, a pipeline folder, or a hub id whose files are in the cache.
        device: Where blocks and all other parts go.
        dtype: Of the weights; as most of them are stored if None, on a CPU too.
        variant: In the weights' file names.
        component: Which transformer.

    Raises:
        ModelError: The files are not here, quantised, damaged, or lack a weight.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        component: str = TRANSFORMER,
    ) -> None:
        check_model(model)
        folder = stored_folder(model)
        if folder is None:
            raise ModelError(f"the files of model {model!r} are not here; fetch them first: hf download {model}")
        self._files = weight_files(folder, variant, component)
        dtype = dtype or stored_dtype(model, variant, component)
        if dtype is None:
            raise ModelError(f"the transformer of {model!r} is quantised, and its blocks cannot be read one by one")
        self.dtype, self._model = dtype, model
        self._calls: _Calls | None = None
        self._pieces = Pieces()
        super().__init__(without_weights(folder, dtype, component), device)
        check_counts(model, self.transformer, self._files)
        streamed = {f"{stack}.{index}" for stack, index in self.order}
        names = [n for n in self.transformer.state_dict() if ".".join(n.split(".")[:2]) not in streamed]
        weights = self._read(names)
        self._assign(self.transformer, weights, strict=False)
        for module in self.transformer.modules():  # buffers that no file holds, of the blocks too
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def walk(self, places: Sequence[Place]) -> Generator[nn.Module]:
        """Lend blocks in this order; the next one is read while the present one is lent."""
        if not places:
            return
        with ThreadPoolExecutor(1, "blocks") as reader:
            ahead = reader.submit(self._weights, places[0])
            for number, place in enumerate(places):
                weights = ahead.result()
                block, following = self.module(place), places[number + 1 : number + 2]
                ahead = reader.submit(self._weights, following[0] if following else None)
                self._assign(block, weights)
                del weights
                try:
                    yield block
                finally:
                    self._free(block)

    def copy(self, place: Place) -> nn.Module:
        """A block with weights of its own, read anew."""
        block, weights = self.module(place), self._weights(place)
        shared = {
            id(tensor): tensor for tensor in block.state_dict(keep_vars=True).values()
        }  # or those of the lent one
        block = copy.deepcopy(block, shared)
        for name, parameter in list(block.named_parameters()):
            owner, _, last = name.rpartition(".")
            module = block.get_submodule(owner)
            module._parameters[last] = nn.Parameter(weights.pop(name), parameter.requires_grad)
        self._assign(block, weights, strict=False)
        return block

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Lend the transformer; see :meth:`attach`."""
        self.attach()
        try:
            yield self.transformer
        finally:
            self.detach()

    def attach(self) -> None:
        """Let the transformer be called as a whole, until :meth:`detach`.

        Each block is read when it is called, and freed after; the one that follows is read meanwhile, after the last
        one the first: denoising calls a transformer again and again. Blocks are not to be walked through meanwhile.
        """
        if self._calls is None:
            self._calls = _Calls(self)

    def detach(self) -> None:
        """Take the hooks off the blocks, and drop what was read ahead."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def stored(self, name: str) -> Tensor:
        """One weight by its name in the transformer, on the CPU, in the dtype that the file has it in."""
        return self._read([name], as_stored=True)[name]

    def _free(self, block: nn.Module) -> None:
        self._assign(block, {name: torch.empty_like(t, device="meta") for name, t in block.state_dict().items()})

    def _assign(self, module: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        try:
            module.load_state_dict(weights, strict, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(
                f"model {self._model!r}: the transformer's config.json and its weights disagree ({reason}); "
                "mend config.json, or fetch it again"
            ) from None

    def _weights(self, place: Place | None) -> dict[str, Tensor]:
        """The weights of a block, on the device, by their names inside it."""
        if place is None:
            return {}
        prefix = f"{place[0]}.{place[1]}."
        read = self._read([prefix + name for name in self.module(place).state_dict()])
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def _read(self, names: Sequence[str], as_stored: bool = False) -> dict[str, Tensor]:
        """Read weights into memory of their own; the files are mapped, and closed again."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise ModelError(
                    f"model {self._model!r}: the transformer's config.json and its weights disagree (the files have "
                    f"no '{name}'); mend config.json, or fetch it again"
                )
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            found |= self._read_file(file, wanted, as_stored)
        return found

    def _read_file(self, file: Path, names: Sequence[str], as_stored: bool) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        float32 = set(self.transformer._keep_in_fp32_modules or ())
        try:
            with safe_open(file, framework="pt") as opened:
                mapped = {name: opened.get_tensor(name) for name in names}
                if as_stored:
                    return {name: tensor.clone() for name, tensor in mapped.items()}
                dtypes = {name: tensor.dtype for name, tensor in mapped.items()}
                for name, tensor in mapped.items():
                    if tensor.is_floating_point():
                        dtypes[name] = torch.float32 if float32 & set(name.split(".")) else self.dtype
                # copies even where nothing changes: the file's pages are not to be waited for while a block runs
                if self.device.type == "cpu":
                    return self._pieces.copies(mapped, dtypes)
                return {name: tensor.to(self.device, dtypes[name], copy=True) for name, tensor in mapped.items()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}); fetch it again") from None


class _Calls:
    """Hooks that read a block when it is called, the one that follows meanwhile in a thread, and free it after.

    Args:
        source: Whose transformer is called.
    """

    def __init__(self, source: StreamedBlocks) -> None:
        self._source, self._reader = source, ThreadPoolExecutor(1, "blocks")
        self._following = dict(zip(source.order, (*source.order[1:], *source.order[:1]), strict=True))
        self._ahead: tuple[Place, Future[dict[str, Tensor]]] | None = None
        self._handles = []
        for place in source.order:
            # functions, not methods: a copy of a block shares them, and with them what reads its weights
            def load(block: nn.Module, _: Any, place: Place = place) -> None:
                source._assign(block, self._weights(place))
                following = self._following[place]
                if following != place:
                    self._ahead = following, self._reader.submit(source._weights, following)

            def free(block: nn.Module, *_: Any) -> None:
                source._free(block)

            block = source.module(place)
            self._handles.append(block.register_forward_pre_hook(load, prepend=True))
            self._handles.append(block.register_forward_hook(free, always_call=True))

    def _weights(self, place: Place) -> dict[str, Tensor]:
        """What was read ahead, if it is this block's; else its weights are read now, when the others are gone."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == place:
            return ahead[1].result()
        if ahead is not None and not ahead[1].cancel():
            ahead[1].exception()
        del ahead
        return self._source._weights(place)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._ahead = None
        self._reader.shutdown(cancel_futures=True)


def loaded_bytes(model: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each component's weights as they would be loaded; nothing of a model whose files are not here."""
    folder = stored_folder(model)
    if folder is None:
        return {}
    sizes: dict[str, int] = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = list(part.glob("*.safetensors"))
        plain = [file for file in files if "." not in file.stem]  # others are variants beside them
        entries = [entry for file in plain or files for entry in read_tensor_header(file).values()]
        numbers = sum(prod(entry["shape"]) for entry in entries if "F" in entry["dtype"])
        sizes[part.name] = numbers * dtype.itemsize
    return sizes


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def transformer_class(folder: Path, component: str = TRANSFORMER) -> Any:
    """The class of a pipeline folder's transformer, ppcl's own for one with smaller modules.

    Raises:
        ModelError: This diffusers has no such class.
    """
    import diffusers

    register(ADAPTERS)
    _, name = component_entry(folder, component)
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"the transformer of {folder} is a {name}, which this diffusers has not; use a newer one")
    return kind


def without_weights(folder: Path, dtype: torch.dtype, component: str = TRANSFORMER) -> Any:
    """A pipeline's transformer with all its modules, tables and buffers, but no weights; see diffusers' own loading.

    Args:
        folder: The pipeline's.
        dtype: That its weights would have, all of them.
        component: Which transformer.

    Raises:
        ModelError: It is quantised.
    """
    from accelerate import init_empty_weights

    config: Mapping[str, Any] = read_mapping(folder / component / "config.json", ModelError, AGAIN)
    check_config(config, folder / component / "config.json")
    if "quantization_config" in config:
        raise ModelError(f"the transformer of {folder} is quantised, and its blocks cannot be read one by one")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: of tables that are made when the model is built
    try:
        with init_empty_weights():
            transformer = transformer_class(folder, component).from_config(config)
    except UserError:
        raise
    except Exception as error:  # whatever a family's constructor raises for values that do not fit together
        raise ModelError(f"the config of {folder / component} builds no model ({shortened(error)}); {AGAIN}") from None
    finally:
        torch.set_default_dtype(default)
    return transformer.eval().requires_grad_(False)
