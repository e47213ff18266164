"""Two things that make the tests and the notebooks take less time, and change no result.

Each of pytest's parallel workers has cores of its own: two workers that share two cores spend a
seventh of their time on waiting for each other's threads. And what one process has compiled,
the others (workers, notebooks' kernels, processes that tests start) take from a folder that lives
as long as this run: nothing is left over from an earlier one.
"""

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # before anything imports JAX, which reads these
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def pytest_configure():
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    if worker and hasattr(os, "sched_setaffinity"):
        number, workers = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)
