"""The frozen experts' product in Triton, for where torch's grouped product makes the host wait: in
fp32, and on GPUs that it has no kernel for.

One program per tile of one expert's rows and block of columns, in one order of additions: a row's
bits are its own.

Suffixes: R rows by expert, I tiles (of 4 columns: see `RoutePlan`), E experts, D in, F out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from populace.kernels.route import TALL

BLOCK, STEP = 64, 32
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit  # type: ignore[untyped-decorator]
def experts_kernel(  # type: ignore[no-untyped-def]
    x, w, y, tiles,
    x_stride, y_stride, w_stride_e, w_stride_f, w_stride_k, num_k, num_f,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y[row + i, f] = Σ_k x[row + i, k] · w[expert, f, k]."""
    tile = tiles + tl.program_id(0) * 4
    count = tl.load(tile + 1)
    if count > 0:
        row = tl.load(tile).to(tl.int64)
        own = w + tl.load(tile + 3).to(tl.int64) * w_stride_e
        i = tl.arange(0, HEIGHT)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_rows, in_f = (i < count)[:, None], (f < num_f)[None, :]
        total = tl.zeros((HEIGHT, BLOCK), tl.float32)
        for start in range(0, num_k, STEP):
            k = start + tl.arange(0, STEP)
            x_ik = tl.load(
                x + row * x_stride + i[:, None] * x_stride + k[None, :],
                mask=in_rows & (k < num_k)[None, :],
                other=0.0,
            )
            w_kf = tl.load(
                own + f[None, :] * w_stride_f + k[:, None] * w_stride_k,
                mask=(k < num_k)[:, None] & in_f,
                other=0.0,
            )
            total = tl.dot(x_ik, w_kf, total, input_precision="ieee")
        places = y + row * y_stride + i[:, None] * y_stride + f[None, :]
        tl.store(places, total.to(y.dtype.element_ty), mask=in_rows & in_f)


def experts_product(x_RD: Tensor, w_EFD: Tensor, tile_I4: Tensor) -> Tensor:
    """[R, F]: each row times its expert's matrix, which may be a transposed view. Every row must be
    in a tile."""
    num_f = w_EFD.shape[1]
    y_RF = x_RD.new_empty(len(x_RD), num_f)
    experts_kernel[(len(tile_I4), triton.cdiv(num_f, BLOCK))](
        x_RD, w_EFD, y_RF, tile_I4,
        x_RD.stride(0), y_RF.stride(0), *w_EFD.stride(), x_RD.shape[1], num_f,
        HEIGHT=TALL, BLOCK=BLOCK, STEP=STEP, **OPTIONS,
    )  # fmt: skip
    return y_RF
