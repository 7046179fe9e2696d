"""A written transformer in the shapes of its stock class: what any program that knows the class can load.

Smaller modules are *multiplied out*, each to one that computes the same:

* a low-rank layer is up @ down;
* neurons and heads that were cut come back as zeros: a unit that nothing reads adds nothing;
* an affine map W x + b in the place of a network is two neurons a feature, since act(x) - act(-x) = x for GELU (both
  forms) and SiLU: hidden [x, -x], output [W, -W]. In a gated network the other factor is 1, by its biases.

Nothing but the depth is saved then. Weights are read when they are written.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.files import read_json
from ppcl.common.tensor_files import StoredTensors, Unread, read_tensor_header
from ppcl.config.names import PREFIX
from ppcl.errors import ArtifactError, ModelError
from ppcl.modules.parts import SLICED, cuts_of, join
from ppcl.modules.slicing import kept_features, neurons_of
from ppcl.teacher.blocks import without_weights
from ppcl.teacher.loading import check_folder, weight_files

Tensors = dict[str, Unread]
_PLAIN = {"F64", "F32", "F16", "BF16"}
_FITS = (
    "compress with --set 'fit.width=[modulation]' or --set fit.width=[] (depth alone), or keep --format diffusers' own"
)


@dataclass(frozen=True)
class StockTransformer:
    """A transformer of a stock class whose weights lie in files.

    Attributes:
        model: Without weights; its dtypes are those to write.
        tensors: Its weights, by diffusers' names.
        multiplied_out: Paths of the modules that were smaller.
        provenance: What ``config.json`` says of the compression; empty if it was none of ours.
    """

    model: Any
    tensors: Tensors
    multiplied_out: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its class."""
        return type(self.model).__name__


def stock_class_name(folder: Path) -> str:
    """Name of the stock class of a pipeline's transformer.

    Raises:
        ModelError: The folder is no pipeline, or its transformer is quantised.
    """
    check_folder(folder)
    config = read_json(folder / "transformer" / "config.json")
    if "quantization_config" in config:
        raise ModelError(f"the transformer of {folder} is quantised; export the pipeline that it was quantised from")
    return str(config.get("_class_name", "")).removeprefix(PREFIX)


def open_stock(folder: Path) -> StockTransformer:
    """Open the transformer of a pipeline folder as one of its stock class.

    Args:
        folder: A diffusers pipeline, compressed by ppcl or not.

    Raises:
        ModelError: It is no pipeline, or has modules that no stock one computes.
        ArtifactError: Weights are missing, of other shapes than the config says, or quantised.
    """
    from accelerate import init_empty_weights

    name = stock_class_name(folder)
    written = without_weights(folder, torch.float32)
    stored = _stored(folder, written)
    config = dict(written.config)
    pruning: Mapping[str, Mapping[str, Any]] = config.pop("pruning", None) or {}
    kind = next((base for base in type(written).__mro__ if base.__name__ == name), None)
    if kind is None:
        raise ModelError(f"{folder} is of class {type(written).__name__}, and its config says {name}; export it again")
    provenance = config.pop("_ppcl", None) or {}
    with init_empty_weights():
        model: Any = kind.from_config(config)  # type: ignore[attr-defined]
    if provenance:
        model.register_to_config(_ppcl=provenance)
    tensors: Tensors = {}
    for path, part in pruning.items():
        tensors |= _multiplied_out(path, part, model.get_submodule(path), stored)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors = {key: tensors.get(key) or stored.unread(key) for key in shapes}
    wrong = [key for key, tensor in tensors.items() if tuple(tensor.shape) != shapes[key]]
    if wrong:
        raise ArtifactError(
            f"{wrong[0]} of {folder} is {tuple(tensors[wrong[0]].shape)} multiplied out, and {name} has "
            f"{shapes[wrong[0]]}; please report this"
        )
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if key in tensors:
            tensor.data = tensor.data.to(tensors[key].dtype)
    return StockTransformer(model.eval().requires_grad_(False), tensors, tuple(pruning), provenance)


def _stored(folder: Path, written: Any) -> StoredTensors:
    """The weights of a transformer, when they are those that its config asks for."""
    files = weight_files(folder)
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(set(files.values())):
        entries |= {name: entry for name, entry in read_tensor_header(path).items() if files.get(name) == path}
    strange = next((name for name, entry in entries.items() if entry["dtype"] not in _PLAIN), None)
    if strange is not None:
        raise ArtifactError(
            f"{strange} of {folder} is stored as {entries[strange]['dtype']}, and quantised weights cannot be taken "
            "along; export the pipeline that it was quantised from"
        )
    expected = {name: list(tensor.shape) for name, tensor in written.state_dict().items()}
    missing = [name for name in expected if name not in entries]
    if missing:
        raise ArtifactError(
            f"{folder}/transformer lacks {missing[0]} ({len(missing)} of the {len(expected)} weights that its "
            "config.json asks for); export or fetch it again"
        )
    wrong = [name for name, entry in entries.items() if entry["shape"] != expected.get(name)]
    if wrong:
        raise ArtifactError(
            f"{folder}/transformer holds {wrong[0]} of shape {entries[wrong[0]]['shape']}, expected "
            f"{expected.get(wrong[0], 'no such weight')} by its config.json; export or fetch it again"
        )
    return StoredTensors(*sorted(set(files.values())))


def _multiplied_out(path: str, part: Mapping[str, Any], module: nn.Module, stored: StoredTensors) -> Tensors:
    """The weights of a stock module that computes what a smaller one does, by name in the transformer.

    Raises:
        ModelError: There are none.
    """
    if part["kind"] == "low_rank":
        layers: Tensors | None = _of_low_rank(path, module, stored)
    elif part["kind"] in SLICED:
        layers = _of_sliced(path, part, module, stored)
    elif part["kind"] == "linear":
        layers = _of_linear(path, module, stored)
    else:  # a text stream's maps read states that the stock block normalises
        layers = None
    if layers is None:
        raise ModelError(
            f"{path} ('{part['kind']}') is no {type(module).__name__} of any weights, so that no file of stock shapes "
            f"can hold it; {_FITS}"
        )
    return layers


def _with_bias(layer: nn.Linear, path: str, bias: Unread) -> Tensors | None:
    """A layer's bias; empty where it has none and needs none, None where it has none and needs one."""
    if layer.bias is not None:
        return {f"{path}.bias": bias}
    return None if bool(bias.read().any()) else {}


def _of_low_rank(path: str, module: nn.Module, stored: StoredTensors) -> Tensors | None:
    up, down = stored.unread(f"{path}.up.weight"), stored.unread(f"{path}.down.weight")

    def product() -> Tensor:
        return up.read().float() @ down.read().float()

    assert isinstance(module, nn.Linear)
    bias = _with_bias(module, path, stored.unread(f"{path}.up.bias"))
    return None if bias is None else {f"{path}.weight": Unread(module.weight.shape, up.dtype, product), **bias}


def _of_sliced(path: str, part: Mapping[str, Any], module: nn.Module, stored: StoredTensors) -> Tensors:
    tensors = {}
    between = {name for cut in cuts_of(part) for name in cut.get("between", ())}
    sides = [((*cut["rows"], *cut.get("between", ())), cut["columns"]) for cut in cuts_of(part)]
    for side, names in ((side, names) for pair in sides for side, names in enumerate(pair)):
        for name in names:
            index = kept_features(part, module.get_submodule(name).get_parameter("weight").shape[side], name)
            for kind, parameter in module.get_submodule(name).named_parameters():
                key, shape = join(path, name, kind), tuple(parameter.shape)
                small, read = stored.unread(key), stored.unread(key).read
                if side < parameter.ndim:
                    # a norm over all heads finds zeros among what it takes the mean of
                    is_norm = name in between and kind == "weight" and parameter.ndim == 1
                    factor = (len(index) / len(parameter)) ** 0.5 if is_norm else 1.0
                    read = partial(_spread, small.read, index, shape, side, factor)
                tensors[key] = Unread(parameter.shape, small.dtype, read)
    return tensors


def _spread(
    read: Callable[[], Tensor], index: Tensor, shape: tuple[int, ...], side: int, factor: float = 1.0
) -> Tensor:
    """A tensor with zeros between its rows (side 0) or columns (side 1)."""
    small = read()
    return small.new_zeros(shape).index_copy_(side, index, small * factor)


def _of_linear(path: str, module: nn.Module, stored: StoredTensors) -> Tensors | None:
    weight, bias = stored.unread(f"{path}.weight"), stored.unread(f"{path}.bias")
    key = repr(module)
    if key not in _FORMS:
        _FORMS[key] = next((form for form in _forms(module) if _computes(module, form)), None)
    form, units = _FORMS[key], neurons_of(module)
    if form is None or units is None:
        return None
    tensors = {}
    for name, parameter in module.named_parameters():
        read = partial(_network_tensor, form, name, tuple(parameter.shape), weight.read, bias.read)
        tensors[f"{path}.{name}"] = Unread(parameter.shape, weight.dtype, read)
    return tensors


# Of each layer that makes neurons, what every h of its features are: "pair" (x and -x) or "one"
_Form = Mapping[str, tuple[str, ...]]
_FORMS: dict[str, _Form | None] = {}  # of networks that are printed alike


def _forms(module: nn.Module) -> Iterator[_Form]:
    """Ways in which a network could be an affine map; empty if it cannot be one."""
    units = neurons_of(module)
    if units is None:
        return
    rows = {name: module.get_submodule(name) for name in units.rows}
    columns = module.get_submodule(units.columns[0])
    inputs = next(iter(rows.values())).get_parameter("weight").shape[1]
    if units.count < 2 * inputs or getattr(columns, "bias", None) is None:
        return
    slabs = [(name, i) for name, m in rows.items() for i in range(m.get_parameter("weight").shape[0] // units.count)]
    for pair in slabs:
        form = {name: tuple("pair" if (n, i) == pair else "one" for n, i in slabs if n == name) for name in rows}
        if all("one" not in parts or getattr(rows[name], "bias", None) is not None for name, parts in form.items()):
            yield form


def _network_tensor(
    form: _Form, name: str, shape: tuple[int, ...], weight: Callable[[], Tensor], bias: Callable[[], Tensor]
) -> Tensor:
    """A weight or bias of a network that computes W x + b."""
    layer, _, kind = name.rpartition(".")
    if layer not in form:
        if kind == "bias":
            return bias()
        w = weight()
        return torch.cat([w, -w, w.new_zeros(len(w), shape[1] - 2 * w.shape[1])], 1)
    hidden = shape[0] // len(form[layer])
    if kind == "bias":
        return torch.cat([torch.full((hidden,), float(part == "one")) for part in form[layer]])
    eye = torch.eye(shape[1])
    pair = torch.cat([eye, -eye, eye.new_zeros(hidden - 2 * shape[1], shape[1])])
    return torch.cat([pair if part == "pair" else torch.zeros_like(pair) for part in form[layer]])


@torch.no_grad()
def _computes(module: nn.Module, form: _Form) -> bool:
    """Whether a network that is filled in a way is the affine map that it should be."""
    generator = torch.Generator().manual_seed(0)
    network = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    inputs = network.get_submodule(next(iter(form))).get_parameter("weight").shape[1]
    outputs = next(
        p.shape[0] for n, p in network.named_parameters() if n.rpartition(".")[0] not in form and p.ndim == 2
    )
    weight, bias = (torch.randn(*s, generator=generator) for s in ((outputs, inputs), (outputs,)))
    x = 3 * torch.randn(4, inputs, generator=generator)
    parameters = {
        n: _network_tensor(form, n, tuple(p.shape), lambda: weight, lambda: bias) for n, p in network.named_parameters()
    }
    network.load_state_dict(parameters, strict=False)
    try:
        result = network(x)
    except (TypeError, RuntimeError):  # it wants more than x, or other shapes
        return False
    return isinstance(result, Tensor) and torch.allclose(
        result, x @ weight.T + bias, rtol=1e-3, atol=1e-3 * inputs**0.5
    )
