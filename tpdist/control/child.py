"""One child process: its end, however it comes, and its output, whatever it looks like.

The end is awaited on a thread and not by way of the output: a pipe that a grandchild still holds open, or a line
without an end, must not hide that the process has gone.
"""

import asyncio
import codecs
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

from tpdist import log
from tpdist.control.memory_kills import MemoryKills

NUM_LAST_LINES = 20
MAX_LINE_CHARS = 4096
MAX_UNENDED_CHARS = 1024 * 1024
CHUNK_BYTES = 64 * 1024


class Child:
    """Started on creation, in the running event loop. `exited` becomes its exit code, negative for a signal. `context`
    (rank, epoch) goes with its lines into a log of JSON."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], **context: object) -> None:
        self._context = context
        self._memory_kills = MemoryKills()
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.pid = self._process.pid
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        threading.Thread(target=self._wait, name=f"child-{self.pid}", daemon=True).start()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()

    async def relay(self) -> None:
        """Pass the output on to stderr line by line and remember the last, until all who could write have gone."""
        assert self._process.stdout is not None
        reader, transport = await _open_reader(self._process.stdout)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                *lines, rest = re.split(r"[\r\n]+", rest + decoder.decode(chunk))
                rest = rest[-MAX_UNENDED_CHARS:]
                self._take(lines)
            self._take([rest])
        finally:
            transport.close()

    def _take(self, lines: Sequence[str]) -> None:
        for line in filter(None, lines):
            self.last_lines.extend(part[:MAX_LINE_CHARS] for part in log.readable(line).splitlines())
            log.pass_on(line, **self._context)

    def describe_end(self) -> str:
        """How it ended, in words. It must have."""
        exit_code = self.exited.result()
        limit = self._memory_kills.limit_of(self.pid) if exit_code == -signal.SIGKILL else None
        return describe_exit(exit_code, out_of_memory=limit)

    def _wait(self) -> None:
        exit_code = self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self._set_exit_code, exit_code)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _set_exit_code(self, exit_code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(exit_code)


def describe_exit(exit_code: int, *, out_of_memory: str | None = None) -> str:
    """How a process ended, in words. `out_of_memory`: the limit that the kernel killed it for."""
    if out_of_memory is not None:
        return (
            f"was killed by the kernel's out-of-memory killer ({out_of_memory}); give it more memory, or use more "
            "ranks, a smaller --kv-cache-memory-bytes or --max-model-len"
        )
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (kill -9, or the kernel's out-of-memory killer: see dmesg)" if number == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


async def _open_reader(pipe: IO[bytes]) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    return reader, transport


async def output_of_module(
    *words: str, timeout_s: float, environ: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> tuple[int, bytes, str]:
    """Run `python -m WORDS` to its end: its exit code, its output, and what it said on stderr. Nothing of it is left
    after an error. `environ`: instead of this process's. `pass_fds`: descriptors that it inherits. Raises
    TimeoutError."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *words),
        env=environ,
        pass_fds=pass_fds,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode is not None
    return child.returncode, output, errors.decode(errors="replace").strip()
