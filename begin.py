"""How a worker of the grid begins. Imports nothing of weight, lest what libraries print when loaded comes before it.

Used by workers.py.
"""

import os
import signal
import time
from threading import Thread


def begin(parent: int) -> None:
    """Leave console and Ctrl-C to the grid, and end when the grid has died, whose next start does the run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # in a run they lead to its log
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
