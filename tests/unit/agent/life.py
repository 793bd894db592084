"""An agent that is killed at a chosen step, so that a successor can be seen to go on from there."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from csi_vduse.agent.store import Store
from csi_vduse.agent.workers import Worker
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers


class Killed(BaseException):
    """The process is gone: nothing catches this, and whatever it tries to do afterwards fails with it."""


@dataclass
class Life:
    """Counts the steps by which an agent acts on the world; dies at one of them once `doom` was called."""

    steps: list[str] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    _fatal_step: int | None = None
    _after_the_act: bool = False
    _dead: bool = False

    def doom(self, step: int | None, *, after_the_act: bool = False) -> None:
        """Begin a life that ends before, or just after, its step of this number; None: one that is counted only."""
        self.steps.clear()
        self._fatal_step, self._after_the_act, self._dead = step, after_the_act, False

    def bury(self) -> None:
        """What the kernel does at the end of a process: its connections and pidfds are closed."""
        for worker in self.workers:
            worker.close()
        self.workers.clear()
        self._fatal_step, self._dead = None, False

    def _before(self, name: str) -> bool:
        if self._dead:
            raise Killed(name)
        self.steps.append(name)
        fatal = len(self.steps) - 1 == self._fatal_step
        if fatal and not self._after_the_act:
            self._dead = True
            raise Killed(name)
        return fatal

    def _after(self, name: str, *, fatal: bool) -> None:
        if fatal:
            self._dead = True
            raise Killed(name)

    def _counted(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            fatal = self._before(name)
            result = act(*args, **named)
            if fatal and name == "open":
                os.close(result)  # nobody else will
            self._after(name, fatal=fatal)
            return result

        return counted

    def _counted_async(self, name: str, act: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def counted(*args: Any, **named: Any) -> Any:
            fatal = self._before(name)
            result = await act(*args, **named)
            self._after(name, fatal=fatal)
            return result

        return counted

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Make everything by which an agent acts count its steps here."""
        for kind, name in ((FakeKernel, "open"), (FakeKernel, "set_attribute"), (Store, "save")):
            patch.setattr(kind, name, self._counted(name, getattr(kind, name)))
        for kind, name in ((Store, "forget"), (Worker, "listen_at")):
            patch.setattr(kind, name, self._counted(name, getattr(kind, name)))
        for name in ("create", "destroy", "attach", "detach"):
            patch.setattr(FakeKernel, name, self._counted_async(name, getattr(FakeKernel, name)))
        call, spawn = Worker.call, FakeWorkers.spawn

        async def counted_call(worker: Worker, message: dict[str, Any], *args: Any, **named: Any) -> Any:
            counted = self._counted_async(str(message["op"]), call)
            return await counted(worker, message, *args, **named)

        async def remembered(source: FakeWorkers, *args: Any) -> Worker:
            worker: Worker = await spawn(source, *args)
            self.workers.append(worker)
            return worker

        patch.setattr(Worker, "call", counted_call)
        patch.setattr(Worker, "kill", self._counted_async("kill", Worker.kill))
        patch.setattr(FakeWorkers, "spawn", self._counted_async("spawn", remembered))
