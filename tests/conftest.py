"""What all tests need of the process that runs them."""

from __future__ import annotations

import os
import signal

import pytest

# A shell without job control starts what it puts in the background with SIGINT ignored, nohup with SIGHUP, and children
# inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Several tests run at once: torch's threads would wait for each other at the cost of a core each. Before its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: The files whose single tests take longest. They begin first, so that in the end no worker has one of them left.
LONGEST = """
    zombies faults crash_images hostile live_readers kill_campaign checkpoint_dcp state_machine verify torch_datasets
    checkpoint_crash merge_crash docs
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests that need it skip themselves
    pass
else:
    # A busy machine is no defect.
    settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")
