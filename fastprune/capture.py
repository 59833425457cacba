"""A whole training step as one CUDA graph: forward, loss, penalty, backward, optimizer and method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import TrainingError
from fastprune.methods import Method
from fastprune.nn import MaskedConv2d
from fastprune.optim import GrowingSGD
from fastprune.parallel import processes
from fastprune.surgery import Copies

Criterion = Callable[..., Tensor | tuple[Tensor, ...]]


def capture_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    method: Method | None = None,
    *,
    warmup: int = 3,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    ema: Copies = None,
) -> CapturedStep:
    """Make a training step that is captured as a CUDA graph and then replayed: one launch in place of hundreds.

    ``step(x, *targets)`` does what these lines do, and trains alike::

        optimizer.zero_grad()
        loss = criterion(model(x), *targets)
        (loss + method.penalty()).backward()
        method.step(optimizer)

    The first ``warmup`` steps run as they are, on a side stream; then one is captured.  What the method does on the
    host (coefficients that grow, cuts) happens between the replays, in tensors that the graph reads.  After a cut that
    gives tensors other shapes, and whenever else a tensor, a mode or a number that the graph has in it is another than
    it was, the step is warmed up and captured anew.  A batch of another shape than those before runs as it is.

    Args:
        model: On a CUDA device; may be compiled by ``torch.compile`` (not with ``mode="reduce-overhead"``, which makes
            graphs of its own).
        criterion: From the model's output and the targets to the loss, a scalar; or to a tuple that begins with it, of
            tensors to hand back.  It may not look at a value.
        optimizer: :class:`fastprune.optim.GrowingSGD`, or one of PyTorch's that a graph may hold (``SGD``, or with
            ``capturable=True``).  Learning rates of the first, and of those with ``capturable`` or ``fused``, may be
            numbers and change in every step: the graph reads a copy on the device.  Other numbers are part of it.
        method: From :func:`fastprune.create`, made of the same model.
        warmup: Steps that run as they are before each capture, at least 2.
        scaler: Its ``scale``, ``step`` and ``update`` become part of the step; with ``GrowingSGD`` or fused ones.
        autocast: Compute the forward and the loss in this dtype, as ``torch.autocast`` does.
        clip_norm: Scale the gradients of all parameters down to this norm, before the method reads them.
        ema: Averaged copies of the model, which get smaller along with it, see :func:`fastprune.compact`.

    Returns: A :class:`CapturedStep`.

    Raises:
        ValueError: The model is not on a CUDA device, or several processes train together; or the optimizer, or the
            scaler with it, waits for the device in each step.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"capture_step: expected a model on a CUDA device, got one on {device}; train it without")
    settings = {"scaler": scaler, "autocast": autocast, "clip_norm": clip_norm, "ema": ema}
    return CapturedStep(_CudaGraph(device), model, criterion, optimizer, method, warmup, **settings)


class CapturedStep:
    """A training step that is replayed, see :func:`capture_step`.

    Calling it with a batch, whose tensors may be on the host, returns what the criterion does, without autograd, in
    tensors that the next call leaves alone.  Gradients are in ``.grad``, and overwritten by the next call.

    Attributes:
        penalty: What the method's penalty added to the loss in the last step, scalar; overwritten by the next.
        captures: How often the step was captured so far.
    """

    def __init__(
        self,
        graph: Any,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        method: Method | None = None,
        warmup: int = 3,
        *,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
        ema: Copies = None,
    ) -> None:
        if not isinstance(warmup, int) or warmup < 2:
            raise ValueError(f"capture_step: expected warmup of at least 2 steps, got {warmup!r}")
        if processes() > 1:
            raise ValueError(f"capture_step: expected one process, got {processes()}; train them without")
        _check(optimizer, scaler)
        self._graph, self._model, self._criterion = graph, model, criterion
        self._optimizer, self._method, self._warmup = optimizer, method, warmup
        self._scaler, self._autocast, self._clip_norm, self._ema = scaler, autocast, clip_norm, ema
        self._device = next(model.parameters()).device
        self._batch: tuple[Tensor, ...] | None = None  # what the graph reads
        self._rates: dict[int, tuple[Tensor, float]] = {}  # group number -> learning rate on the device and here
        self._baked: tuple | None = None  # of the last step
        self._warm = 0  # steps since it changed
        self._odd = 0  # batches in a row that are not like the graph's
        self._restless = 0  # times that only a number changed
        self._tensors: list[Tensor] = []  # of the model
        self._masked: list[MaskedConv2d] = []
        self._kept: list[Any] = []  # what the graph reads and others may drop
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._result: tuple[tuple[Tensor, ...], Tensor | None] | None = None
        self.penalty: Tensor | None = None
        self.captures = 0

    def __call__(self, x: Tensor, *targets: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._method is not None:
            self._method.update()
        self._write_rates()
        self._look()
        results, self.penalty = self._run((x, *targets))
        if self._method is not None:
            self._method.advance(self._optimizer, ema=self._ema)
        return results if len(results) > 1 else results[0]

    def forget(self) -> None:
        """Drop the graph and its memory; the next steps warm up and capture another."""
        self._result, self._grads, self._kept, self._warm = None, [], [], 0
        self._graph.reset()

    def _run(self, batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        odd = self._batch is None or [(t.shape, t.dtype) for t in batch] != [(t.shape, t.dtype) for t in self._batch]
        self._odd = self._odd + 1 if odd else 0
        if self._batch is None or self._odd > self._warmup:  # what batches are like from now on
            self._batch, self._odd = tuple(torch.empty_like(t, device=self._device) for t in batch), 0
            self.forget()
        if self._odd:
            batch = tuple(t.to(self._device, non_blocking=True) for t in batch)
            return self._graph.run(lambda: self._work(batch))
        for to, t in zip(self._batch, batch, strict=True):
            to.copy_(t, non_blocking=True)
        if self._result is None and self._warm < self._warmup:
            self._warm += 1
            return self._graph.run(lambda: self._work(self._batch))
        if self._result is None:
            self._capture()
        for p, grad in self._grads:  # another step may have left others; the graph writes its own
            if p.grad is not grad:
                p.grad = grad
        self._graph.replay()
        results, penalty = self._result
        return tuple(t.clone() for t in results), penalty

    def _work(self, batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the device does in a step."""
        method, optimizer, scaler = self._method, self._optimizer, self._scaler
        x, *targets = batch
        optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast):
            results = self._criterion(self._model(x), *targets)
        results = results if isinstance(results, tuple) else (results,)
        penalty = None if method is None else method.penalty()
        loss = results[0] if penalty is None else results[0] + penalty
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self._clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        with self._device_rates():
            if method is not None:
                method.launch(optimizer, results[0].detach(), scaler)
            elif scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.step()
        if scaler is not None:
            scaler.update()
        return tuple(t.detach() for t in results), None if penalty is None else penalty.detach()

    def _capture(self) -> None:
        try:
            self._result = self._graph.capture(lambda: self._work(self._batch))
        except Exception as error:
            self.forget()
            why = (str(error) or repr(error)).splitlines()[0]
            raise TrainingError(
                f"capture_step: the step cannot be captured: {why}; the model, the criterion or the optimizer waits "
                "for the device, or decides by a value"
            ) from error
        self.captures += 1
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._grads = [(p, p.grad) for p in parameters]
        owners = (self._method, self._optimizer, self._scaler, self._rates)
        self._kept = [*self._tensors, *(t for owner in owners for t in _tensors(owner, set()))]

    # What the graph has in it

    def _look(self) -> None:
        """Drop a graph that another tensor, mode or number has put out of date."""
        baked = self._structure(), self._addresses(), self._numbers()
        before, self._baked = self._baked, baked
        if before == baked:
            return
        self.forget()
        self._tensors = [*self._model.parameters(), *self._model.buffers()]
        self._masked = [m for m in self._model.modules() if isinstance(m, MaskedConv2d)]
        self._baked = self._structure(), self._addresses(), baked[2]
        if before is not None and before[:2] == baked[:2]:
            self._restless += 1
            if self._restless == 3:
                warnings.warn(
                    "capture_step: a number in the optimizer's parameter groups changes again and again, and each time "
                    "the step is captured anew; only the learning rate of GrowingSGD, or of an optimizer with "
                    "capturable=True or fused=True, can change in a captured step",
                    stacklevel=4,
                )

    def _structure(self) -> tuple:
        masks = tuple(m._stamp() for m in self._masked)  # how many channels are live is part of the launches
        return self._model.training, masks, () if self._method is None else self._method.structure()

    def _addresses(self) -> tuple:
        state = [t for entry in self._optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        scale = getattr(self._scaler, "_scale", None)
        tensors = [*self._tensors, *state, *([] if scale is None else [scale])]
        return tuple((t.data_ptr(), t.numel(), t.requires_grad) for t in tensors)

    def _numbers(self) -> tuple:
        numbers = []
        for i, group in enumerate(self._optimizer.param_groups):
            hidden = ("params", "lr") if i in self._rates else ("params",)
            items = (item for item in group.items() if item[0] not in hidden)
            numbers.append((len(group["params"]), *((k, id(v) if isinstance(v, Tensor) else v) for k, v in items)))
        return tuple(numbers)

    # Learning rates

    def _write_rates(self) -> None:
        ours = isinstance(self._optimizer, GrowingSGD)
        for i, group in enumerate(self._optimizer.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) or not (ours or group.get("capturable") or group.get("fused")):
                continue
            if i not in self._rates:  # float64, so that each parameter gets the number as its dtype rounds it
                dtype = torch.float64 if ours else torch.float32
                self._rates[i] = torch.full((), lr, dtype=dtype, device=self._device), lr
            elif self._rates[i][1] != lr:
                self._rates[i] = self._rates[i][0].fill_(lr), lr

    @contextmanager
    def _device_rates(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        try:
            for i, (rate, _) in self._rates.items():
                groups[i]["lr"] = rate
            yield
        finally:
            for i, (_, lr) in self._rates.items():
                groups[i]["lr"] = lr


class _CudaGraph:
    """Runs work on a side stream, where it may be captured, and replays it."""

    def __init__(self, device: torch.device) -> None:
        from fastprune.kernels import tables

        self._device, self._stream, self._tables = device, torch.cuda.Stream(device), tables
        self._graph: torch.cuda.CUDAGraph | None = None
        self._session: Any = None  # what its launches read
        self._bytes = 0  # of tables in the last step that ran as it is

    @contextmanager
    def _side(self) -> Iterator[None]:
        """Accumulators of gradients remember the stream they were made on: none may be made elsewhere."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def run(self, work: Callable[[], Any]) -> Any:
        with self._side(), self._tables.session() as session:
            result = work()
        self._bytes = max(self._bytes, session.bytes)
        return result

    def capture(self, work: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        arena = torch.empty(2 * self._bytes, dtype=torch.uint8, device=self._device)
        with self._side(), self._tables.session(arena) as session:
            # thread_local: a loader's thread that pins memory does not break the capture
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
            session.fill()
        self._graph, self._session = graph, session
        return result

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph = self._session = None
        self._bytes = 0


def _check(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """That a step of theirs does not wait for the device."""
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        on_device = isinstance(optimizer, GrowingSGD) or group.get("capturable") or group.get("fused")
        if not group.get("capturable", True):
            raise ValueError(f"capture_step: expected {kind} with capturable=True, got capturable=False")
        if isinstance(group["lr"], Tensor) and not on_device:
            raise ValueError(
                f"capture_step: {kind} reads a tensor as learning rate on the host; give it a number, fused=True, "
                "or take fastprune.optim.GrowingSGD"
            )
    if scaler is not None and scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"capture_step: a GradScaler asks the host in each step of {kind}; give it fused=True, or take "
            "fastprune.optim.GrowingSGD"
        )


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that an object holds, itself or through containers and objects of ours; but not its model's."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, nn.Module) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = [*thing, *thing.values()]
    elif isinstance(thing, list | tuple | set):
        parts = thing
    elif isinstance(thing, Method | torch.optim.Optimizer | torch.amp.GradScaler) or _ours(thing):
        parts = vars(thing).values() if hasattr(thing, "__dict__") else ()
    else:
        return
    for part in parts:
        yield from _tensors(part, seen)


def _ours(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "fastprune"
