"""``--nproc``: several processes on this machine, started and watched by torchrun's own agent."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.environment import usable_cores

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


class ProcessesFailed(KalmaGroveError):
    """One of the processes ended with an error, and the others were ended with it.

    Attributes:
        exit_code: Of the first that failed; 128 and the number of the signal that ended it.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_in_processes(words: Sequence[str], processes: int) -> None:
    """Runs ``kalmagrove`` with these words in each of several processes, and returns when all are done.

    Args:
        words: The sub-command and its flags.
        processes: How many.

    Raises:
        ProcessesFailed: One of them failed or was killed, or a signal came.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each process gets its share of the cores, unless the user has said how many.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    # A large checkpoint may take longer than the half minute that processes have otherwise to end after a signal.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"kalmagrove-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(_SIGNALS),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "kalmagrove", *words)
    except SignalException as error:
        raise ProcessesFailed(128 + int(error.sigval), f"stopped all {processes} processes") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        again = "" if code == 2 else ". The same command goes on from the last checkpoint, if there is one"
        how = f"was ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        raise ProcessesFailed(
            128 - code if code < 0 else code,
            f"process {rank} of {processes} {how}; the others were ended too{again}",
        ) from None
