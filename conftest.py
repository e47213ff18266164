"""Two things that make the tests and the notebooks take less time, and change no result.

Each of pytest's parallel workers has cores of its own: two workers that share two cores spend a
seventh of their time on waiting for each other's threads. And what one process has compiled, the
others take from a folder: workers, notebooks' kernels, processes that tests start, later runs.
"""

import os

import compiled  # of scripts/

os.environ |= compiled.environment()  # before anything imports JAX, which reads them


def pytest_configure():
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    if worker and hasattr(os, "sched_setaffinity"):
        number, workers = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)
