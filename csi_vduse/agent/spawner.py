"""The first process: forks workers, keeps the agent running, reaps both.

Kept true:
- One thread, no gRPC, no asyncio in this process, ever: it is forked again and again, and a fork copies only
  the calling thread, with the locks of the others held for good.
- A worker inherits its control socket and the standard streams, nothing else; above all no other worker's
  socket and no VDUSE device.
- The death of the agent is not the death of a worker: the agent is started again (with a growing pause), the
  workers go on serving. SIGTERM ends the agent and this process and leaves the workers serving, for the next
  start to adopt.
- An agent that ends before it has reported itself ready has a problem that a restart cannot mend: its exit
  code becomes ours, unless workers of ours live, which may end with us: then it is tried again.
- An agent that leaves to another one is not started again while there is one. This process ends with its last worker,
  unless it is to stay: in Kubernetes it would be started anew, and would take everything back in a pod that is about to
  be deleted. If nobody has had our place for VACANT_S our agent is started again: workers are not left without one.
- SIGHUP executes the program anew in this process, which keeps its number and its children: so an upgrade in place
  reaches what later workers are forked from.

Between spawner and agent: channel.py packets over a socket pair. Requests: {"op": "spawn", "listen_path": P}
→ {"ok": true, "pid": N} with two descriptors, control socket and pidfd; {"op": "ready"} and {"op": "leaving"}, without
answer.
Unasked, to the agent: {"op": "exited", "pid": N, "code": C}.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from csi_vduse import log
from csi_vduse.dataplane import channel
from csi_vduse.errors import InvalidArgument, VduseError

AgentMain = Callable[[socket.socket], int]
WorkerMain = Callable[[socket.socket, str], int]

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
# Longer than another spawner pauses before it starts its agent again, and than that takes to begin.
VACANT_S = 30.0
LOOK_S = 5.0
_STABLE_S = 60.0  # an agent that ran for so long is restarted without delay
_AGENT_STOP_S = 30.0
_SEND_TIMEOUT_S = 5.0
_EXIT_CRASHED = 70  # EX_SOFTWARE, sysexits.h
_FIRST_PRIVATE_FD = 3
_WORKERS_VARIABLE = "CSI_VDUSE_SPAWNED_WORKERS"


@dataclass(frozen=True)
class SpawnedWorker:
    """A new worker: its process, and what its owner holds of it."""

    pid: int
    pidfd: int
    control: socket.socket


def fork_worker(worker_main: WorkerMain, listen_path: str) -> SpawnedWorker:
    """Fork a worker; the caller owns the descriptors and reaps the process.

    Only from a process with a single thread.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = os.fork()
        if pid == 0:
            _become(lambda: worker_main(theirs, listen_path), keep=theirs.fileno(), new_session=True)
    # Safe from reuse of the number: only we can reap it, and have not.
    return SpawnedWorker(pid, os.pidfd_open(pid), ours)


def run_spawner(
    agent_main: AgentMain, worker_main: WorkerMain, *, vacant: Callable[[], bool], stay: bool = False
) -> int:
    """Run until SIGTERM or SIGINT, or until the agent fails to start; return the exit code.

    agent_main: runs in a child, given its end of the channel; may import anything.
    worker_main: runs in a child per worker, given its control socket and the path it listens on.
    vacant: whether no agent has our agent's place now; must not wait.
    stay: do not end when another agent has taken over all our workers.
    """
    return _Spawner(agent_main, worker_main, vacant=vacant, stay=stay).run()


class _Spawner:
    def __init__(
        self, agent_main: AgentMain, worker_main: WorkerMain, *, vacant: Callable[[], bool], stay: bool
    ) -> None:
        self._agent_main = agent_main
        self._worker_main = worker_main
        self._vacant = vacant
        self._stay = stay
        self._selector = selectors.DefaultSelector()
        self._agent_pid = 0
        self._agent_socket: socket.socket | None = None
        self._agent_ready = False
        self._agent_started = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._restart_at = 0.0
        # Those of the program that was here before SIGHUP are children of ours too.
        self._workers = {int(pid) for pid in os.environ.pop(_WORKERS_VARIABLE, "").split()}
        self._leaving = False
        self._last_taken = 0.0  # when another agent was last seen in our agent's place
        self._look_at = 0.0
        self._reload = False
        self._stop_deadline: float | None = None
        self._exit_code: int | None = None
        self._log = log.get()

    def run(self) -> int:
        wake, waker = socket.socketpair()
        for end in (wake, waker):
            end.setblocking(False)  # noqa: FBT003 - the standard library's signature
        signal.set_wakeup_fd(waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, self._on_reload)
        self._selector.register(wake, selectors.EVENT_READ)
        gc.freeze()  # what exists now stays in pages shared with every child
        self._keep_agent()
        while self._exit_code is None:
            for key, _ in self._selector.select(self._pause()):
                if key.fileobj is wake:
                    with contextlib.suppress(BlockingIOError):
                        wake.recv(4096)
                else:
                    self._serve_agent()
            self._reap()
            self._keep_agent()
        return self._exit_code

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + _AGENT_STOP_S
            if self._agent_pid:
                os.kill(self._agent_pid, signal.SIGTERM)

    def _on_reload(self, _number: int, _frame: FrameType | None) -> None:
        self._reload = True
        if self._agent_pid:
            os.kill(self._agent_pid, signal.SIGTERM)

    def _execute_anew(self) -> None:
        self._log.info("executing the program anew", workers=len(self._workers))
        os.environ[_WORKERS_VARIABLE] = " ".join(str(pid) for pid in sorted(self._workers))
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line
        except OSError as error:
            # Our end could be the workers': better the old program than none.
            self._log.error("the program cannot be executed; the old one goes on", error=str(error))
            del os.environ[_WORKERS_VARIABLE]
            self._reload = False

    def _pause(self) -> float | None:
        now = time.monotonic()
        if self._stop_deadline is not None:
            return max(0.0, self._stop_deadline - now)
        if not self._agent_pid:
            return max(0.0, (self._look_at if self._leaving else self._restart_at) - now)
        return None

    def _keep_agent(self) -> None:
        now = time.monotonic()
        if self._exit_code is not None:
            return
        if self._stop_deadline is not None:
            if not self._agent_pid:
                self._exit_code = 0
            elif now >= self._stop_deadline:
                os.kill(self._agent_pid, signal.SIGKILL)
                self._stop_deadline = now + _AGENT_STOP_S
        elif self._agent_pid:
            return
        elif self._leaving:
            self._while_replaced(now)
        elif self._reload:
            self._execute_anew()
        elif now >= self._restart_at:
            self._start_agent()

    def _while_replaced(self, now: float) -> None:
        """Another agent has our agent's place: end when nobody needs us, or go back if it is gone."""
        if not self._workers and not self._stay:
            self._exit_code = 0
        elif now >= self._look_at:
            self._look_at = now + LOOK_S
            if not self._vacant():
                self._last_taken = now
            elif now - self._last_taken >= VACANT_S:
                self._log.warning("the other agent is gone; ours starts again", workers=len(self._workers))
                self._leaving, self._restart_at = False, now

    def _start_agent(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_SEND_TIMEOUT_S)
        pid = os.fork()
        if pid == 0:
            _become(lambda: self._agent_main(theirs), keep=theirs.fileno(), new_session=False)
        theirs.close()
        self._agent_pid, self._agent_socket, self._agent_ready = pid, ours, False
        self._agent_started = time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ)
        self._log.info("agent started", pid=pid)

    def _serve_agent(self) -> None:
        agent = self._agent_socket
        if agent is None:
            return
        try:
            request, fds = channel.receive(agent)
        except (VduseError, OSError):
            self._drop_agent_socket()
            return
        for fd in fds:
            os.close(fd)
        if request.get("op") in {"ready", "leaving"}:
            self._agent_ready = True
            self._leaving = request["op"] == "leaving"
            self._last_taken = time.monotonic()
            return
        try:
            self._spawn(agent, request)
        except (VduseError, OSError) as error:
            self._tell(channel.error_answer(error))

    def _spawn(self, agent: socket.socket, request: channel.Message) -> None:
        if request.get("op") != "spawn":
            raise InvalidArgument(f"the spawner does not know {request.get('op')!r}")
        listen_path = request.get("listen_path")
        if not isinstance(listen_path, str):
            raise InvalidArgument(f"listen_path is {listen_path!r}; it has to be a path")
        worker = fork_worker(self._worker_main, listen_path)
        self._workers.add(worker.pid)
        with worker.control:
            try:
                channel.send(agent, {"ok": True, "pid": worker.pid}, [worker.control.fileno(), worker.pidfd])
            finally:
                os.close(worker.pidfd)

    def _tell(self, message: channel.Message) -> None:
        if self._agent_socket is not None:
            with contextlib.suppress(VduseError, OSError):
                channel.send(self._agent_socket, message)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._agent_pid:
                self._agent_ended(code)
            elif pid in self._workers:
                self._workers.discard(pid)
                self._log.info("worker ended", pid=pid, code=code)
                self._tell({"op": "exited", "pid": pid, "code": code})

    def _agent_ended(self, code: int) -> None:
        self._agent_pid = 0
        while self._agent_socket is not None:
            self._serve_agent()  # its last words, up to the end of the channel
        if self._stop_deadline is not None or self._reload:
            return
        if self._leaving:
            self._log.info("the agent left to another one", workers=len(self._workers))
            return
        if not self._agent_ready and not self._workers:
            self._log.error("the agent could not start", code=code)
            self._exit_code = code if code > 0 else _EXIT_CRASHED
            return
        ran_s = time.monotonic() - self._agent_started
        self._pause_s = FIRST_PAUSE_S if ran_s > _STABLE_S else min(self._pause_s * 2, LONGEST_PAUSE_S)
        self._restart_at = time.monotonic() + self._pause_s
        self._log.error("the agent ended; workers go on", code=code, restart_in_s=self._pause_s)

    def _drop_agent_socket(self) -> None:
        if self._agent_socket is not None:
            self._selector.unregister(self._agent_socket)
            self._agent_socket.close()
            self._agent_socket = None


def _become(main: Callable[[], int], *, keep: int, new_session: bool) -> None:
    """Turn this freshly forked process into what `main` is; never returns."""
    code = _EXIT_CRASHED
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if new_session:
            os.setsid()  # a Ctrl-C at the terminal is not for workers
        os.closerange(_FIRST_PRIVATE_FD, keep)
        os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else _EXIT_CRASHED
    except BaseException:  # noqa: BLE001 - the last frame of a process: say what happened and end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
