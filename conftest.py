"""Give each of pytest's parallel workers cores of its own (for tests/ and for the notebooks).

Two workers that share two cores spend a seventh of their time on waiting for each other's threads.
"""

import os


def pytest_configure():
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    if worker and hasattr(os, "sched_setaffinity"):
        number, workers = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)
