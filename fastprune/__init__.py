"""fastprune: pruning convolutional networks in PyTorch, as cheap as training them."""

from __future__ import annotations

__version__ = "0.1.0"
