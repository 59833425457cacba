"""How well gradients pass through a network: the singular values of its Jacobian.

When all are 1 (dynamical isometry, Saxe et al., arXiv:1312.6120), a step of the first layer is as large as the loss
asks for.  Removing channels makes them small, and training on is slow until they have recovered.  Source of what is
reported: Wang and Fu, "Trainability Preserving Neural Pruning", ICLR 2023, arXiv:2207.12534.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.graph import undisturbed


def jacobian_singular_values(model: nn.Module, inputs: Tensor, chunk: int = 64) -> Tensor:
    """Singular values of d output / d input, sample by sample, in eval mode.

    The samples of a chunk go through the network together; as none depends on another there, one backward per output
    makes that row of all their Jacobians.  Hooks and gate gradient buffers of the model see these backwards.

    Args:
        model: Takes ``inputs`` and returns one tensor, (N, ...), of ``out`` numbers per sample.  It is left as it was,
            gradients included.
        inputs: (N, ...), floating, at least one sample, of ``in`` numbers each; on the model's device.
        chunk: Samples at a time.  Their Jacobians take ``chunk * out * in`` numbers.

    Returns: (N, min(in, out)), descending; float64 for a float64 output, else float32.

    Raises:
        ValueError: ``inputs`` or what the model returns does not fit, or a batch norm without running statistics makes
            samples depend on each other.
    """
    if chunk < 1:
        raise ValueError(f"jacobian_singular_values: chunk must be at least 1, got {chunk}")
    if not inputs.is_floating_point() or inputs.dim() < 2 or not len(inputs):
        got = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise ValueError(f"jacobian_singular_values: expected floating inputs of shape (N, ...), N >= 1, got {got}")
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            raise ValueError(
                f"jacobian_singular_values: {name or 'the model'} has no running statistics, so samples depend on each "
                "other; make it with track_running_stats=True"
            )
    with undisturbed(model), torch.enable_grad():
        model.eval()
        return torch.cat([torch.linalg.svdvals(_jacobians(model, x)) for x in inputs.detach().split(chunk)])


def _jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """(n, out, in), float32 or float64."""
    x = x.clone().requires_grad_()
    y = model(x)
    if not isinstance(y, Tensor) or len(y) != len(x) or not y.requires_grad:
        got = f"{tuple(y.shape)}, requires_grad={y.requires_grad}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"jacobian_singular_values: the model must return one tensor, ({len(x)}, ...), with grad, got {got}"
        )
    outputs = y.flatten(1).sum(0)  # each sample's own: the sum's gradient at a sample is that sample's
    rows = [torch.autograd.grad(out, x, retain_graph=True, materialize_grads=True)[0].flatten(1) for out in outputs]
    return torch.stack(rows, 1).to(torch.float64 if y.dtype == torch.float64 else torch.float32)


def trainability(model: nn.Module, inputs: Tensor, chunk: int = 64) -> dict[str, float]:
    """Summary of :func:`jacobian_singular_values`.

    Returns: ``mean``, ``std`` (population), ``max`` and ``min`` over all samples and values, and ``condition_number``,
        the mean over samples of largest over smallest value, ``inf`` where a smallest value is 0.
    """
    values = jacobian_singular_values(model, inputs, chunk).double()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "max": values.max().item(),
        "min": values.min().item(),
        "condition_number": (values[:, 0] / values[:, -1]).mean().item(),
    }


@torch.no_grad()
def orthogonalise(model: nn.Module) -> nn.Module:
    """Replace the weight of each linear layer and convolution, in place, by the nearest orthogonal matrix.

    A convolution's kernel is taken as one row per output channel.  Nearest in the Frobenius norm: with singular value
    decomposition W = U S V', it is U V', whose rows are orthonormal, or its columns where there are fewer.  A linear
    network in which no layer is wider than the one before, or none narrower, gets singular values of 1 throughout: what
    methods that preserve trainability are measured against (OrthP in arXiv:2207.12534).

    Returns: ``model``.
    """
    for m in model.modules():
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            u, _, vh = torch.linalg.svd(m.weight.flatten(1).double(), full_matrices=False)
            m.weight.copy_((u @ vh).view_as(m.weight))
    return model
