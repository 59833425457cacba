"""Every op as a function; the backend that runs it is chosen in :mod:`fastprune.backends`."""

from fastprune.ops.batch_norm_act import batch_norm_act

__all__ = ["batch_norm_act"]
