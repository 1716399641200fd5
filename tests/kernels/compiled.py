"""Compiles every kernel for GPUs that need not be there, and prints its name and PTX's pitfalls."""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vecfl_kernels import Levels, Multiples
from vecfl_kernels.moves import triton as moves
from vecfl_kernels.noise import triton as noise
from vecfl_kernels.rounding import triton as rounding
from vecfl_kernels.rows import triton as rows

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.bool: "*i1"}
ROUGH = ("div.full", "div.approx", "sqrt.approx", "fma.rn.f32")  # of other bits than torch's


def compile_only(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """In place of `launch`."""
    names = [p.name for p in kernel.params]
    kinds = {p.name: kind(p, a) for p, a in zip(kernel.params, arguments, strict=False)}
    kinds |= dict.fromkeys(constants, "constexpr")
    known = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=known)
    for arch in (80, 90):
        made = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False}
        )
        assert made.asm["cubin"]
        print(kernel.__name__, arch, *(word for word in ROUGH if word in made.asm["ptx"]))


def kind(parameter: Any, argument: object) -> str:
    if isinstance(argument, Tensor):
        return TYPES[argument.dtype]
    wide = isinstance(argument, int) and argument >= 1 << 31
    return parameter.annotation_type or ("i64" if wide else "i32")


def all_operations(dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, 5001, dtype=dtype), torch.ones(3).double()
    total, one, over = torch.zeros(5001).double(), x[:, 0].contiguous(), weight > 0
    rows.row_squares(x)
    rows.scaled_rows(x, one, one, over)
    rows.weighted_sum_(total, x, weight)
    rows.scaled_weighted_sum_(total, x, weight, one, one, over)
    noise.add_noise_(total, 0.1, 2**40, (2**32 - 1, 5, 7 << 28))
    streams = torch.zeros(3, 3, dtype=torch.int64)
    rounding.round_to_levels(x, Levels(one[:, None], one[:, None], 255), 2**40, streams, 3)
    rounding.round_to_multiples(x, Multiples(one[:, None], 127), 9, streams, 1)
    for states in (1, 2):
        at = SimpleNamespace(
            w=[x], state=[[x.clone()] for _ in range(states)], steps=weight.clone()
        )
        if states == 1:
            moves.momentum_(at, [x], 0.1, 0.9, True)
        else:
            numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
            moves.adam_(at, [x], 0.1, torch._fused_adam_, **numbers)


if __name__ == "__main__":
    for module in (rows, noise, rounding, moves):
        module.launch = compile_only
    for dtype in (torch.float32, torch.float64):
        all_operations(dtype)
