"""Every op as a function; the backend that runs it is chosen in :mod:`fastprune.backends`."""

from fastprune.ops.batch_norm_act import batch_norm_act
from fastprune.ops.scale_penalty import scale_penalty

__all__ = ["batch_norm_act", "scale_penalty"]
