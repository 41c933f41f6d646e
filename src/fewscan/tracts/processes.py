"""How a process that makes scans begins; light, so that it is there before anything that starts threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")  # read by these libraries when they are loaded


def set_up(threads: int) -> None:
    """Set a process up: few threads; Ctrl-C is the parent's affair, and without a parent there is nothing to do.

    Deconvolution multiplies small matrices voxel by voxel; libraries that spread each over all cores lose time by it,
    most of all when several processes do.

    Parameters
    ----------
    threads : int
        Of torch; BLAS gets one, where it is not loaded yet.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    for name in BLAS:
        os.putenv(name, "1")
    import torch

    torch.set_num_threads(threads)


def _follow_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
