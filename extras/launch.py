"""Several processes on one machine, as torchrun starts them, but each mistake is one line."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STOPPED = 75  # EX_TEMPFAIL, as that of a single process


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `etrm ...` in so many processes through torch's launcher; the exit code of all.

    One that fails or is killed ends the others. SIGTERM and SIGINT reach all, which then save."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's own, in this process alone
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to finish and save
    # Not with -m, which searches the working folder first: a random.py there would break the run.
    code = "import sys; sys.path[:] = filter(None, sys.path); from etrm_arc.cli import main; main()"
    local: dict[str, Any] = {"run_id": "etrm", "local_addr": "127.0.0.1", "max_restarts": 0}
    local |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    with tempfile.TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder, redirects={r: Std.ALL for r in range(1, processes)})
        config = LaunchConfig(1, 1, processes, logs, **local)
        try:
            elastic_launch(config, sys.executable)("-c", code, *arguments)
        except SignalException:
            return STOPPED
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            if failure.exitcode < 0:
                words = f"etrm: process {rank} was killed by signal {-failure.exitcode}"
                print(f"{words}; the others were stopped", file=sys.stderr)
            elif rank:  # process 0 writes to the console itself
                [log] = Path(folder).glob(f"*/attempt_0/{rank}/stderr.log")
                print(log.read_text(errors="replace").strip().rpartition("\n")[2], file=sys.stderr)
            return max(1, failure.exitcode)
    return 0
