"""One optimizer step: forward, backward, update, on one process or several, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune import parallel
from fastprune.capture import capture_step
from fastprune.methods import Method
from fastprune.methods.iterative import IterativeMethod

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CAPTURE = {"cuda": capture_step}  # device type -> what makes one launch of a step


@dataclass(frozen=True)
class Settings:
    """How :func:`fastprune.train.fit` computes; see there."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: bool | str | Mapping[str, Any] = False
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    cuda_graph: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """From all that ``fit`` takes."""
        return cls(**{f.name: options[f.name] for f in fields(cls)})

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"fit: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.accumulate < 1:
            raise ValueError(f"fit: accumulate must be at least 1, got {self.accumulate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"fit: clip_norm must be above 0, got {self.clip_norm}; None clips nothing")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"fit: ema must lie between 0 and 1, got {self.ema}")

    def check(self, device: torch.device, method: Method | None = None) -> None:
        """
        Raises:
            ValueError: fp16 with a method that refuses it, or ``cuda_graph`` and something that a graph cannot hold.
        """
        if self.precision == "fp16" and isinstance(method, IterativeMethod):
            raise ValueError(
                f"fit: {method.name} scores by gradients, which the GradScaler of fp16 scales; take precision='bf16'"
            )
        if not self.cuda_graph:
            return
        mode = self.compile.get("mode") if isinstance(self.compile, Mapping) else self.compile
        wrong = {
            f"a model on a CUDA device, got one on {device}": device.type not in CAPTURE,
            f"one process, got {parallel.processes()}": parallel.processes() > 1,
            f"accumulate=1, got {self.accumulate}": self.accumulate > 1,
            "another mode of compile than 'reduce-overhead', which makes graphs of its own": mode == "reduce-overhead",
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"fit: cuda_graph=True expects {what}; train without cuda_graph")

    def lay_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits in float32, or wider."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            return _widened(model(self.lay_out(x)))


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _loss_and_right(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = _widened(logits)
    return F.cross_entropy(logits, y), (logits.argmax(1) == y).sum()


class Step:
    """Call it with the batches of a step; ``model`` is trained in place.

    Attributes:
        scaler: Of the loss, with ``precision="fp16"``; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method | None,
        ema: nn.Module | None,
        settings: Settings,
    ) -> None:
        self.model, self.optimizer, self.method, self.ema, self.settings = model, optimizer, method, ema, settings
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if settings.precision == "fp16" else None
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.scaler is not None:
            self._more = {"scaler": self.scaler}
        else:
            self._more = {"ema": ema} if ema is not None and isinstance(method, IterativeMethod) else {}
        self._captured: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._wrap()

    def _wrap(self) -> None:
        """What runs the forward: the model, distributed, compiled."""
        self._graph = getattr(self.method, "graph", None)
        self._forward, self._distributed = self.model, None
        if parallel.processes() > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self._forward = self._distributed = DistributedDataParallel(self.model, device_ids=ids)
        if how := self.settings.compile:
            options = {"mode": how} if isinstance(how, str) else {} if how is True else how
            # Static shapes: a last batch of another size would bring a graph of any size, which the whole batches of
            # the next epoch then take, too, but not those of a resumed run, which has yet to meet it.
            self._forward = torch.compile(self._forward, **{"dynamic": False} | dict(options))
        if self.settings.cuda_graph and (self._captured is None or how):  # it follows a model that gets smaller
            s = self.settings
            self._captured = CAPTURE[self.device.type](
                self._forward,
                _loss_and_right,
                self.optimizer,
                self.method,
                scaler=self.scaler,
                autocast=PRECISIONS[s.precision],
                clip_norm=s.clip_norm,
                ema=self._more.get("ema"),
            )

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One step on the images of all batches together, one forward and backward each.

        Returns: Mean cross-entropy, penalty and number of right answers, (3,) float32, on the device.
        """
        if self._captured is not None:
            seen = self._replay(*batches)
            self._follow()
            return seen
        images, seen = sum(len(y) for _, y in batches), None
        self.optimizer.zero_grad()
        for i, (x, y) in enumerate(batches, 1):
            with self._gradients_stay_here(i < len(batches)):
                logits = self.settings.forward(self._forward, x)
                loss = F.cross_entropy(logits, y)
                penalty = self.method.penalty() if self.method is not None else torch.zeros_like(loss)
                total = loss + penalty
                if len(batches) > 1:
                    total = total * (len(y) / images)
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            with torch.no_grad():
                now = torch.stack([loss, penalty, (logits.argmax(1) == y).sum()])
                if len(batches) > 1:
                    now[:2] *= len(y) / images
                seen = now if seen is None else seen + now
        del logits, loss, penalty, total  # they hold what the graph saved, and a cut must not meet it
        self._update(seen)
        self._follow()
        return seen

    def _replay(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss, right = self._captured(self.settings.lay_out(x), y)
        penalty = self._captured.penalty
        return torch.stack([loss, torch.zeros_like(loss) if penalty is None else penalty, right])

    def _gradients_stay_here(self, here: bool) -> AbstractContextManager:
        return self._distributed.no_sync() if here and self._distributed is not None else nullcontext()

    def _update(self, seen: Tensor) -> None:
        if self.settings.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        if self.method is not None:
            self.method.step(self.optimizer, seen[0], **self._more)
        elif self.scaler is not None:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()

    def _follow(self) -> None:
        """A model that may have got smaller, and the average of the weights."""
        if self._graph is not getattr(self.method, "graph", None):  # the model got smaller
            if self.settings.compile:
                torch.compiler.reset()  # else each size would count towards the limit of recompilations
            self._wrap()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
