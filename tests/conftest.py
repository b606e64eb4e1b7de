"""What all tests need of the process that runs them."""

from __future__ import annotations

import signal

# A shell without job control starts what it puts in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests that need it skip themselves
    pass
else:
    # A busy machine is no defect.
    settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")
