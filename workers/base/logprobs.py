"""Log-probabilities of target tokens, without the logits of a whole pass in memory.

Suffixes: T rows, D hidden, N targets, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from populace.workers.base.forward import ForwardPass
from populace.workers.base.model import BaseModel
from populace.workers.base.rows import PackedRows
from populace.workers.memory import HEAD_ROWS


class _TokenLogprobs(torch.autograd.Function):
    """log-softmax of the head at the target tokens, in row chunks: the [N, V] logits never exist at
    once.

    d logprob / d hidden = head[token] - softmax · head does not depend on the loss: forward
    computes it while the chunk's logits are there, and backward only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, rows: PackedRows, row_multiple: int
    ) -> Tensor:
        num_targets, wants_grad = len(rows.target_row_N), ctx.needs_input_grad[0]
        # Dividing the hidden state is dividing the logits by the temperature.
        inverse_N1 = (1 / rows.temperature_N)[:, None].to(hidden_TD.dtype)
        logprob_N = hidden_TD.new_empty(num_targets, dtype=torch.float32)
        slope_ND = hidden_TD.new_empty(num_targets if wants_grad else 0, hidden_TD.shape[1])
        logits_CV = head_VD.new_empty(HEAD_ROWS, len(head_VD))
        logsoft_CV = torch.empty_like(logits_CV, dtype=torch.float32)
        for start in range(0, num_targets, HEAD_ROWS):
            part = slice(start, min(start + HEAD_ROWS, num_targets))
            size = part.stop - start
            padded = -(-size // row_multiple) * row_multiple
            hidden_CD = hidden_TD.new_zeros(padded, hidden_TD.shape[1])
            hidden_CD[:size] = hidden_TD.index_select(0, rows.target_row_N[part]).mul_(
                inverse_N1[part]
            )
            logits, logsoft = logits_CV[:padded], logsoft_CV[:padded]
            torch.mm(hidden_CD, head_VD.T, out=logits)
            torch.log_softmax(logits, 1, dtype=torch.float32, out=logsoft)
            logprob_N[part] = logsoft[:size].gather(1, rows.target_token_N[part, None]).squeeze(1)
            if wants_grad:
                mean_CD = logsoft.exp_().to(head_VD.dtype) @ head_VD
                slope = head_VD.index_select(0, rows.target_token_N[part]).sub_(mean_CD[:size])
                torch.mul(slope, inverse_N1[part], out=slope_ND[part])
        ctx.save_for_backward(slope_ND)
        ctx.num_rows, ctx.rows = len(hidden_TD), rows
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        grad_ND = (slope_ND * grads[0].unsqueeze(1)).to(slope_ND.dtype)
        # A prompt's last row predicts the first token of every branch. A CPU adds them in order, by
        # sums of fp32; a CUDA device would in any order, so there each row gets one at a time.
        grad_TD = slope_ND.new_zeros(ctx.num_rows, slope_ND.shape[1])
        if not grad_ND.is_cuda:
            return grad_TD.index_add_(0, ctx.rows.target_row_N, grad_ND), None, None, None
        for row_M, target_M in ctx.rows.target_rounds:
            grad_TD.index_add_(0, row_M, grad_ND.index_select(0, target_M))
        return grad_TD, None, None, None


def token_logprobs(base: BaseModel, hidden_TD: Tensor, forward_pass: ForwardPass) -> Tensor:
    """Log-probability of every target token of the pass's rows, [N] fp32; differentiable."""
    logprob_N: Tensor = _TokenLogprobs.apply(
        hidden_TD, base.head_VD, forward_pass.rows, forward_pass.kernels.row_multiple
    )  # type: ignore[no-untyped-call]
    return logprob_N
