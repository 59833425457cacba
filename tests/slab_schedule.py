"""Programs of one launch at the same time, in Triton's interpreter, which by itself runs them one after the other.

Each program is a thread; exactly one runs at a time, and may lose its turn at an atomic, before or after it.  Who goes
on is drawn from a seed.  A program that polls (adds 0) and finds nothing new sleeps until another one writes an atomic;
if all sleep, the launch is a deadlock and fails.  Launches without ``launch_cooperative_grid=True`` run as ever, and
fail at their first atomic: on a GPU their programs need not be there at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading

from triton.runtime import interpreter

builder = interpreter.interpreter_builder


class Deadlock(Exception):
    pass


class _Stop(BaseException):
    """Ends the threads of a launch that failed; not an Exception, so that the interpreter does not wrap it."""


class Launch:
    """Runs ``program()`` once for each of ``grid``, in an order drawn from ``rng``."""

    def __init__(self, program, grid: tuple[int, int, int], rng: random.Random):
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self.rng, self.program, self.error = rng, program, None
        self.ready, self.asleep = list(places), []
        self.polled, self.writes = {}, 0  # where each program last looked, and at which state
        self.turns = {place: threading.Semaphore(0) for place in places}
        self.over = threading.Semaphore(0)
        self.threads = [threading.Thread(target=self._run, args=(place,), daemon=True) for place in places]

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        self._next()
        self.over.acquire()
        for turn in self.turns.values():
            turn.release()  # those that still wait for their turn see that it is over
        for thread in self.threads:
            thread.join()
        if self.error:
            raise self.error

    def _run(self, place) -> None:
        self._sleep_until_called(place)
        try:
            self.program()
        except _Stop:
            return
        except BaseException as error:
            self.error = self.error or error
            self.over.release()
            return
        self.ready.remove(place)
        self._next()

    def _sleep_until_called(self, place) -> None:
        self.turns[place].acquire()
        if self.error:
            raise _Stop
        builder.grid_idx = place

    def _next(self) -> None:
        """Gives the turn away; ends the launch when nobody can take it."""
        if self.ready:
            self.turns[self.rng.choice(self.ready)].release()
            return
        if self.asleep:
            self.error = Deadlock(f"{len(self.asleep)} of {len(self.turns)} programs wait, and nobody else is left")
        self.over.release()

    def _switch(self) -> None:
        place = builder.grid_idx
        self._next()
        self._sleep_until_called(place)

    def atomic(self, address: int, is_poll: bool, do):
        """An atomic operation of the program that has the turn."""
        place = builder.grid_idx
        if is_poll and self.polled.get(place) == (address, self.writes):  # nothing has changed since it last looked
            self.ready.remove(place)
            self.asleep.append(place)
        self._switch()
        result = do()
        if is_poll:
            self.polled[place] = (address, self.writes)
        else:
            self.writes += 1
            self.ready += self.asleep
            self.asleep.clear()
            self._switch()
        return result


@contextlib.contextmanager
def scheduled(seed: int):
    """Cooperative launches inside run as scheduled by ``seed``; yields the list of their grids."""
    rng, grids, running = random.Random(seed), [], []
    plain, rmw = interpreter.GridExecutor.__call__, builder.create_atomic_rmw

    def call(self, *args_dev, **kwargs):
        if not kwargs.get("launch_cooperative_grid"):
            return plain(self, *args_dev, **kwargs)
        # as GridExecutor.__call__, but for the order of the programs
        kwargs = {k: v for k, v in kwargs.items() if k in inspect.getfullargspec(self.fn).args}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        scope = interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in args.items()}
            grid = (*self.grid, 1, 1)[:3]
            builder.set_grid_dim(*grid)
            grids.append(grid)
            running.append(Launch(lambda: self.fn(**args), grid, rng))
            try:
                running[-1].run()
            finally:
                running.pop()
        finally:
            scope.restore()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    def atomic(op, ptr, val, mask, sem, scope):
        assert running, "an atomic in a launch that is not cooperative: its programs may not be there to wait for"
        do = functools.partial(rmw, op, ptr, val, mask, sem, scope)
        return running[-1].atomic(int(ptr.data.item()), not val.data.any(), do)

    interpreter.GridExecutor.__call__, builder.create_atomic_rmw = call, atomic
    try:
        yield grids
    finally:
        interpreter.GridExecutor.__call__ = plain
        del builder.create_atomic_rmw
