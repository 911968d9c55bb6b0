"""bitsandbytes' 4-bit weights, NF4 and FP4 (bitsandbytes/nn/modules.py, autograd/_functions.py,
backends/cuda/ops.py and functional.py, 0.50)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Kernels, Recipe
from memplan.cuda.gemm_4bit import fused
from memplan.parts.leaves import Base, buffer, parameter
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach
from memplan.shadow.matmul import product
from memplan.shadow.tensor import DTYPES, DType, Shape, Tensor, empty, float32, state, uint8
from memplan.tape import Category
from memplan.weights import LoadStep, Quantised, Temporary

if TYPE_CHECKING:
    import torch
    from torch import nn

NF4_BLOCK = 64  # weights that share a scale (bitsandbytes/functional.py, quantize_4bit)
NESTED_BLOCK = 256  # scales that share a second-order scale under double quantisation


class Linear4bit(Base):
    """``bnb.nn.Linear4bit``: half a byte a weight, scales, and a dequantised copy when it runs."""

    __slots__ = ("compute_dtype", "nested", "quantized", "state_dtype", "tensors")

    quantised = True

    def __init__(
        self,
        name: str,
        shape: Shape,
        bias: DType | None,
        compute_dtype: DType,
        state_dtype: DType,
        *,
        nested: bool,
        blocks: int = NF4_BLOCK,
    ) -> None:
        self.name, self.shape, self.compute_dtype, self.nested = name, shape, compute_dtype, nested
        self.state_dtype = state_dtype  # QuantState.dtype: that of the weight it was made from
        count = prod(shape)
        scales = -(-count // blocks)
        if state.spread is None:
            self.quantized = buffer(((count + 1) // 2, 1), uint8, name + ".weight", Category.WEIGHTS)
        else:  # as numbers that can be sharded: bnb_4bit_quant_storage
            packed = (-(-count // (2 * state_dtype.itemsize)), 1)
            self.quantized = parameter(packed, state_dtype, name + ".weight", Category.WEIGHTS, False)
        self.bias = None
        if bias is not None and state.spread is not None and state.spread.shards:
            self.bias = parameter((shape[0],), bias, name + ".bias", Category.WEIGHTS, False)
        elif (
            bias is not None
        ):  # ends in the compute dtype whatever it was: Linear4bit.forward rewrites bias.data
            self.bias = buffer((shape[0],), compute_dtype, name + ".bias", Category.WEIGHTS)
        kind = Category.QUANTIZATION_STATE
        self.tensors = [buffer((scales,), uint8 if nested else float32, name + ".absmax", kind)]
        self.tensors.append(buffer((16,), float32, name + ".quant_map", kind))
        if nested:
            self.tensors += [
                buffer((), float32, name + ".offset", kind),
                buffer((-(-scales // NESTED_BLOCK),), float32, name + ".nested_absmax", kind),
                buffer((256,), float32, name + ".nested_quant_map", kind),
            ]

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, self.compute_dtype)
        return ops.to(self._matmul(x), dtype)

    def _matmul(self, x: Tensor) -> Tensor:
        """MatMul4Bit.forward -> gemm_4bit -> _dequant_linear_fallback."""
        node = Node(_matmul_4bit_backward, x) if ops.tracked(x) else None
        out = self._product(x)
        if node is not None:
            node.context, node.python = (self, x.shape), True
            attach(node, out)
        return out

    def _product(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.shape[0])
        rows = prod(x.shape[:-1])
        if fused(state.card, rows, self.shape[0], self.shape[1], x.dtype.itemsize):
            return empty(shape, x.dtype, "gemm_4bit")
        scales = self._forward_scales()
        weight = empty(self.shape, x.dtype, "gemm_4bit")
        # the fallback ends in F.linear, which autocast sees where the compute dtype is another than its own
        dtype = state.autocast or x.dtype
        operands = [*([] if self.bias is None else [self.bias.shape]), self.shape, x.shape]
        cast = [empty(of, dtype, "gemm_4bit") for of in operands if dtype is not x.dtype]
        out = product(shape, dtype, "gemm_4bit")
        del scales, weight, cast
        return out

    def _forward_scales(self) -> list[Tensor]:
        if not self.nested:
            return []
        scales = self.tensors[0].shape
        return [empty(scales, float32, "gemm_4bit") for _ in range(2)]  # dequantised, and plus the offset

    @property
    def compute(self) -> DType:
        return self.compute_dtype

    def dense(self) -> Tensor:
        return self.dequantized(None)

    def dequantized(self, dtype: DType | None) -> Tensor:
        """``F.dequantize_4bit(B, state)``, ``.to(dtype)`` if given."""
        scales = empty(self.tensors[0].shape, float32, "dequantize_blockwise") if self.nested else None
        weight = empty(self.shape, self.state_dtype, "dequantize_4bit")
        del scales
        return weight if dtype is None else ops.to(weight, dtype)


def _matmul_4bit_backward(node: Node, grad: Tensor) -> Any:
    module, shape = node.context
    weight = module.dequantized(grad.dtype)
    out = product(shape, grad.dtype, "mm" if _folds(grad) else "bmm")
    del weight
    return (out,)  # torch.matmul folds and unfolds: _unsafe_view is no view to autograd


def _folds(x: Tensor) -> bool:
    """Whether torch.matmul makes one matrix of it (LinearAlgebra.cpp ``should_fold``); else there are several
    products, which cuBLAS feeds as they lie."""
    if x.strides is None:
        return True
    return all(x.strides[axis] == x.strides[axis + 1] * x.shape[axis + 1] for axis in range(len(x.shape) - 2))


def _linear(name: str, shapes: Mapping[str, Shape], recipe: Recipe, dtype: DType) -> Linear4bit:
    kind: type[Linear4bit] = Linear4bit
    if recipe.kernels is Kernels.MEMPLAN:
        from memplan.weights._memplan_kernels import NF4Linear

        kind = NF4Linear
    compute = DTYPES[(recipe.compute_dtype or recipe.dtype).value]
    bias = None
    if "bias" in shapes:  # prepare_model_for_kbit_training upcasts all that is not in 4 bits
        bias = float32 if recipe.kbit_prep else dtype
    return kind(name, shapes["weight"], bias, compute, dtype, nested=recipe.double_quant)


def _shared(recipe: Recipe) -> list[Tensor]:
    """bitsandbytes.functional.name2qmap["dynamic"]: made on the device once; each layer copies it."""
    if not recipe.double_quant:
        return []
    return [buffer((256,), float32, "bitsandbytes", Category.QUANTIZATION_STATE)]


# -- onto the card ---------------------------------------------------------------------------------------


def _made(name: str, storages: Mapping[str, Any]) -> bool:
    return name.removesuffix(".weight") + ".absmax" in storages


def _load(
    shape: Shape, itemsize: int, storages: dict[str, list[int]], module: str, temporary: Temporary
) -> Iterator[LoadStep]:
    """``Params4bit._quantize`` of one weight on the card."""
    count = prod(shape)
    scales = -(-count // NF4_BLOCK)
    take, weight = temporary(count * itemsize)
    yield take
    nested = module + ".offset" in storages
    absmax = -1
    if nested:
        take, absmax = temporary(scales * 4)
        yield take
    else:
        yield "alloc", storages.pop(module + ".absmax")[0]
    yield "alloc", storages.pop(module + ".weight")[0]
    yield "alloc", storages.pop(module + ".quant_map")[0]
    if nested:
        yield "alloc", storages.pop(module + ".offset")[0]
        take, difference = temporary(scales * 4)
        yield take
        yield "alloc", storages.pop(module + ".nested_absmax")[0]
        yield "alloc", storages.pop(module + ".absmax")[0]
        yield "alloc", storages.pop(module + ".nested_quant_map")[0]
        yield "drop", difference
        yield "drop", absmax
    yield "drop", weight


def _stored(storages: dict[str, list[int]], module: str, temporary: Temporary) -> Iterator[LoadStep]:
    """A weight that its checkpoint has in 4 bits: its tensors are read onto the card in the order of their
    names and stay there (transformers 5.23 integrations/bitsandbytes.py, ``Bnb4bitDeserialize``), but for
    some 150 bytes of JSON, which are read back to the host and which the offset is made of (bitsandbytes
    0.50 functional.py, ``QuantState.from_dict``)."""
    for name in ("weight", "absmax", "nested_absmax", "nested_quant_map", "quant_map"):
        if f"{module}.{name}" in storages:
            yield "alloc", storages.pop(f"{module}.{name}")[0]
    take, told = temporary(1)
    yield take
    yield "drop", told
    if f"{module}.offset" in storages:
        yield "alloc", storages.pop(f"{module}.offset")[0]


# -- bitsandbytes' own objects ---------------------------------------------------------------------------


@cache
def _fake_parameter() -> type:
    """Fake tensors by the name that PEFT looks for (peft/utils/integrations.py ``get_bnb_param_type``)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type("Params4bit", (FakeTensor,), {"__module__": __name__})


def _fake(source: nn.Linear, recipe: Recipe) -> nn.Module:
    """A quantised ``Linear4bit``. ``Params4bit`` refuses fake tensors, so its weight is a fake parameter
    with the attributes that bitsandbytes and PEFT read."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    layer: nn.Module = bnb.nn.Linear4bit.__new__(bnb.nn.Linear4bit)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = source.in_features, source.out_features
    elements = source.in_features * source.out_features
    weight = nn.Parameter(torch.empty(((elements + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    weight.__class__ = _fake_parameter()
    state = _quant_state(source, recipe)
    for key, value in {
        "quant_state": state,
        "blocksize": state.blocksize,
        "compress_statistics": recipe.double_quant,
        "quant_type": recipe.quant_type.value,
        "quant_storage": torch.uint8,
        "bnb_quantized": True,
        "module": None,
    }.items():
        setattr(weight, key, value)
    layer.weight = weight
    layer.bias = source.bias
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    layer.compute_dtype = _compute_dtype(recipe)
    layer.compute_type_is_set = True
    layer.quant_state = state
    layer.quant_storage = torch.uint8
    layer.support_avx512bf16_for_cpu = False
    return layer


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, (recipe.compute_dtype or recipe.dtype).value)
    return dtype


def _quant_state(source: nn.Linear, recipe: Recipe) -> Any:
    """The state that ``quantize_4bit`` leaves (bitsandbytes 0.50 functional.py): the codes are copies of
    each layer (``code.to(A.device, copy=True)``, ``get_4bit_type``), nothing is shared."""
    import torch
    from bitsandbytes.functional import QuantState

    elements = source.in_features * source.out_features
    blocks = -(-elements // 64)
    common = {
        "shape": source.weight.shape,
        "dtype": source.weight.dtype,
        "blocksize": 64,
        "code": torch.empty(16, dtype=torch.float32),
        "quant_type": recipe.quant_type.value,
    }
    if not recipe.double_quant:
        return QuantState(absmax=torch.empty(blocks, dtype=torch.float32), **common)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // 256), dtype=torch.float32),
        code=torch.empty(256, dtype=torch.float32),
        blocksize=256,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        offset=torch.empty((), dtype=torch.float32),
        state2=nested,
        **common,
    )


def _real(source: nn.Linear, recipe: Recipe) -> nn.Module:
    """The 4-bit layer in the place of ``source``, not quantised yet."""
    import bitsandbytes as bnb
    import torch

    options = {"compress_statistics": recipe.double_quant, "quant_type": recipe.quant_type.value}
    if recipe.parallel is not None:  # as numbers that can be sharded
        options["quant_storage"] = source.weight.dtype
    layer: nn.Module = bnb.nn.Linear4bit(
        source.in_features,
        source.out_features,
        bias=False,
        compute_dtype=_compute_dtype(recipe),
        device="meta",
        **options,
    )
    weight = torch.empty(source.out_features, source.in_features, dtype=source.weight.dtype, device="meta")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    layer.bias = source.bias
    if source.bias is not None:
        source.bias.requires_grad_(False)
    return layer


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter | None:
    import bitsandbytes as bnb

    if not isinstance(parameter, bnb.nn.Params4bit):
        return None
    weight: nn.Parameter = bnb.nn.Params4bit(
        data,
        requires_grad=False,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        module=parameter.module,
    )
    return weight


def _finish(parameter: nn.Parameter, device: torch.device) -> bool:
    import bitsandbytes as bnb

    if not isinstance(parameter, bnb.nn.Params4bit) or parameter.bnb_quantized:
        return False
    parameter.to(device)  # in place
    return True


def _settle(module: nn.Module) -> None:
    """Linear4bit.forward rewrites its bias in the compute dtype once."""
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None:
        module.bias.data = module.bias.data.to(module.compute_dtype)


def _quantizer(recipe: Recipe) -> Any:
    """transformers' own, which has done nothing here but which a Trainer asks whether it may train."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type.value,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=_compute_dtype(recipe),
        )
    )


WEIGHTS = Quantised(
    linear=_linear,
    shared=_shared,
    packed=lambda count: (count + 1) // 2,
    made=_made,
    load=_load,
    stored=_stored,
    fake=_fake,
    real=_real,
    with_data=_with_data,
    finish=_finish,
    settle=_settle,
    quantizer=_quantizer,
    mark="is_loaded_in_4bit",
)
