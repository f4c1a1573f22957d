"""Processes of one run on one machine: start them, watch them, and bring all down when one dies or stalls."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEAT = "ETRM_BEAT"  # folder in which each process shows that it lives
STALLED = 20.0  # seconds without a sign of life
POLL = 0.1  # seconds between two looks at the processes
STOPPED = 75  # EX_TEMPFAIL, exit code of a run that was asked to stop and saved: go on with --resume


def place_of() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and our own launcher say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def beat() -> None:
    """From now on, show every second that this process lives, and stop when its launcher does not; without one, nothing."""
    folder, parent, rank = os.environ.get(BEAT), os.getppid(), place_of()[0]
    if not folder:
        return

    def show() -> None:
        while os.getppid() == parent:
            with contextlib.suppress(OSError):
                (Path(folder) / str(rank)).touch()
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # killed outright: save and end

    threading.Thread(target=show, daemon=True).start()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command in so many processes; the exit code of all.

    The first one that fails is reported with its own words and the others are killed: what is saved is whole at any
    instant. SIGTERM and SIGINT are passed on, so that the processes agree on a step, save and stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
        shared = {
            **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": threads, BEAT: folder,
        }  # fmt: skip
        words = [open(Path(folder) / f"words-{r}", "w+", encoding="utf-8") for r in range(processes)]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "etrm_arc.cli", *arguments], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=None if r == 0 else subprocess.DEVNULL, stderr=None if r == 0 else words[r],
            )
            for r in range(processes)
        ]  # fmt: skip

        def pass_on(signum: int, frame: Any) -> None:
            for p in ranks:
                p.send_signal(signal.SIGTERM)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            return watch(ranks, Path(folder), words)
        finally:
            for p in ranks:
                p.kill()
                p.wait()
            for s, handler in before.items():
                signal.signal(s, handler)
            for file in words:
                file.close()


def watch(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, words: Sequence[Any]) -> int:
    """Wait for all to end well, or for the first that does not: its exit code.

    Silence is counted in our own looks, not by the clock: a machine that slept, or is overloaded, is not taken for a stall.
    """
    last: list[float | None] = [None] * len(ranks)
    silent = [0] * len(ranks)
    while True:
        codes = [p.poll() for p in ranks]
        for r, code in enumerate(codes):
            if code not in (None, 0, STOPPED):
                words[r].seek(0)
                said = words[r].read().strip().splitlines()
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                if said or code < 0 or r:  # process 0 writes here itself
                    print(said[-1] if said else f"etrm: process {r} {how}; the others were stopped", file=sys.stderr)
                return code if code > 0 else 1
            sign = folder / str(r)
            now = sign.stat().st_mtime if code is None and sign.exists() else None
            last[r], silent[r] = now, silent[r] + 1 if now is not None and now == last[r] else 0
            if silent[r] * POLL > STALLED:
                print(f"etrm: process {r} gave no sign of life for {STALLED:.0f} s; all were stopped", file=sys.stderr)
                return 1
        if all(code is not None for code in codes):
            return STOPPED if STOPPED in codes else 0
        time.sleep(POLL)
