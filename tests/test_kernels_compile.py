"""Every kernel compiles for an A100 and an H100, without either; dequantising fuses no multiplication with an
addition.

In a process of its own, because here Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

COMPILE = r"""
import json, re
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memplan.kernels import lora_dropout, nf4_dequantize, nf4_product, nf4_quantize

nf4 = dict(
    packed="*u8", absmax="*u8", code="*fp32", nested_absmax="*fp32", nested_code="*fp32", offset="*fp32")
block = dict(BLOCK=64, NESTED=True, NESTED_BLOCK=256)
lora = dict(length="i32", width="i32", rank="i32", threshold="i64", factor="fp32")
skinny = [dict(DTYPE=tl.bfloat16, **lora_dropout.tiles(torch.bfloat16, rank)) for rank in (16, 512)]
skinny_fp32 = dict(DTYPE=tl.float32, **lora_dropout.tiles(torch.float32, 512))
strip = dict(out="*bf16", wide="i32", stride="i32", first="i32")
product = dict(x="*bf16", bias="*bf16", out="*bf16", **dict.fromkeys(
    ("length", "rows", "columns", "x_stride", "out_stride"), "i32"))
def variants(kernel, types, *constants):
    return [(kernel, types, chosen) for chosen in constants]

kernels = [
    *variants(nf4_dequantize._dequantize_blocks, {**nf4, **strip, "blocks": "i32"},
        {**block, "SELECT": False, "TILE": 64}, {**block, "SELECT": True, "TILE": 64}),
    *variants(nf4_dequantize._dequantize_values, {**nf4, **strip, "count": "i32"},
        {**block, "SELECT": False, "TILE": 4096}),
    *variants(nf4_quantize._quantize, dict(values="*bf16", bounds="*fp32", packed="*u8", absmax="*fp32",
        count="i32", blocks="i32"), dict(BLOCK=64, TILE=64)),
    *variants(lora_dropout._down, dict(x="*bf16", down="*fp32", seed="*i64", out="*bf16", **lora), *skinny),
    *variants(lora_dropout._down,
        dict(x="*fp32", down="*fp32", seed="*i64", out="*fp32", **lora), skinny_fp32),
    *variants(lora_dropout._down_gradient,
        dict(x="*bf16", grad="*bf16", seed="*i64", out="*fp32", **lora), *skinny),
    *variants(lora_dropout._down_gradient,
        dict(x="*fp32", grad="*fp32", seed="*i64", out="*fp32", **lora), skinny_fp32),
    *variants(lora_dropout._add_input_gradient, dict(grad="*bf16", down="*fp32", seed="*i64", out="*bf16",
        **lora, first="i32", columns="i32", out_stride="i32"), *skinny),
    *variants(lora_dropout._add_input_gradient, dict(grad="*fp32", down="*fp32", seed="*i64", out="*fp32",
        **lora, first="i32", columns="i32", out_stride="i32"), skinny_fp32),
    *variants(nf4_product._product, {**nf4, **product}, *(
        dict(**block, BIAS=True, TRANSPOSED=transposed, DTYPE=tl.bfloat16, **nf4_product.TILES)
        for transposed in (False, True))),
]
found = []
for kernel, types, constants in kernels:
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    names = list(kernel.arg_names)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items()
               if kind.startswith(("*", "i32")) and name not in ("offset", "first")}
    for capability in (80, 90):
        source = ASTSource(kernel, types, constants, aligned)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        ptx = compiled.asm["ptx"]
        found.append(dict(kernel=kernel.__name__, capability=capability, shared=compiled.metadata.shared,
            fp32=constants.get("DTYPE") is tl.float32,
            fused="fma.rn.f32" in ptx, wide="st.global.v4" in ptx, mma="mma" in ptx,
            registers=bool(re.search(r"wgmma.mma[^;]*[}], *[{]", ptx)), rcp="rcp.approx.ftz.f32" in ptx))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_all_kernels_compile_for_ampere_and_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout)
    assert len(found) == 30
    for one in found:
        # what a block may use on a consumer card (8.6, 8.9); an A100 has 166,912
        assert one["shared"] <= 101_376, one
        if "quantize" in one["kernel"]:
            assert not one["fused"], one
        if one["kernel"] == "_dequantize_blocks":
            assert one["wide"], one
        if one["kernel"] == "_quantize":
            assert one["rcp"], one  # as bitsandbytes' CUDA code
        if (
            one["kernel"] in ("_product", "_down", "_down_gradient", "_add_input_gradient")
            and not one["fp32"]
        ):
            assert one["mma"], one
        if one["kernel"] == "_product" and one["capability"] == 90:
            assert one["registers"], one  # the weight, decoded, goes to the tensor cores from registers
