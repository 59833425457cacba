"""batch_norm_act in training, with statistics over all processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.batch_norm_act import batch_norm_act


# A collective inside an autograd function is not traceable: torch.compile breaks the graph here.  Not the public
# torch.compiler.disable, which would import the compiler, seconds, with this module.
@torch._disable_dynamo
def sync_batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    bound: str | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    gate_grad: Tensor | None = None,
    gate_abs: Tensor | None = None,
    out_grad: Tensor | None = None,
    out_abs: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`fastprune.ops.batch_norm_act` with ``training=True`` over the batches of all processes of ``group``.

    One all_gather forward and one all_reduce backward, of 2 C + 1 and 2 C numbers.  Every process of the group must
    call it, and run backward if one does.  Local batches may differ in N, H and W, or be empty; if all of them are,
    the running statistics stay.  As in ``nn.SyncBatchNorm``, gradients of ``weight`` and ``bias`` are those of the
    local loss: DistributedDataParallel averages them.  Differentiable once.

    Args: As ``batch_norm_act``; the gate buffers have one row per local sample.

    Source: pairwise combination of variances, Chan, Golub and LeVeque, 1979, STAN-CS-79-773.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        mean, var, count = _moments(x, group)  # float64
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None:
            rate = 1 / num_batches_tracked.double() if momentum is None else momentum
            rate = rate * count.clamp(max=1)
            running_mean.copy_(torch.lerp(running_mean.double(), mean, rate))
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_var.copy_(torch.lerp(running_var.double(), unbiased, rate))
        mean, rstd, var = mean.to(acc), (var + eps).rsqrt().to(acc), var.to(acc)
        scale = torch.ones_like(mean) if weight is None else weight
        shift = torch.zeros_like(mean) if bias is None else bias
    scale, shift = scale.to(acc), shift.to(acc)
    if bound is not None:
        scale = scale.sigmoid()
    # The op in eval mode is right but for one thing: it holds mean and variance for constants.  Its gradients of scale
    # and shift are the very sums that are missing, so they go on to x through _Statistics.
    scale, shift = _Statistics.apply(x, scale, shift, mean, var, rstd, count, eps, group)
    return batch_norm_act(
        x,
        scale,
        shift,
        mean,
        var,
        residual=residual,
        act=act,
        training=False,
        eps=eps,
        gate_grad=gate_grad,
        gate_abs=gate_abs,
        out_grad=out_grad,
        out_abs=out_abs,
        backend=backend,
    )


def _moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, (C,), and the count, (), over all processes; float64."""
    C = x.shape[1]
    packet = torch.zeros(2 * C + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        # float32 moments of half types: CUDA computes them so, the CPU would round them to x's dtype
        wide = x if x.is_cuda or x.dtype in (torch.float32, torch.float64) else x.float()
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
        packet[:C], packet[C:-1] = mean, var
        packet[-1] = x.numel() // C
    rows = packet.new_empty(dist.get_world_size(group) * (2 * C + 1))
    dist.all_gather_into_tensor(rows, packet, group=group)
    rows = rows.view(-1, 2 * C + 1)
    means, variances, counts = rows[:, :C], rows[:, C:-1], rows[:, -1:]
    share = counts / counts.sum().clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), counts.sum()


class _Statistics(torch.autograd.Function):
    """(scale, shift) unchanged; backward adds to x what its gradient owes to the mean and the variance."""

    @staticmethod
    def forward(ctx, x, scale, shift, mean, var, rstd, count, eps, group):
        ctx.save_for_backward(x, scale, mean, var, rstd, count)
        ctx.eps, ctx.group = eps, group
        return scale.clone(), shift.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dscale, dshift):
        x, scale, mean, var, rstd, count = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            total = torch.stack([dscale, dshift])
            dist.all_reduce(total, group=ctx.group)
            a, b = -scale * rstd * total / count.clamp(min=1).to(scale.dtype)
            dx = batch_norm_act(x, a, b, mean, var, training=False, eps=ctx.eps)  # a * xhat + b
        return dx, dscale, dshift, *(None,) * 6
