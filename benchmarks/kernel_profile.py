"""Which kernels a device spends its time in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .timing import Stopwatch

KERNELS = 25
NAME_LENGTH = 110


def profile_kernels(run: Callable[[], Any], stopwatch: Stopwatch, steps: int = 1) -> dict[str, Any]:
    """Run it once under torch's profiler; on a CPU its operators stand in for kernels.

    Args:
        run: `steps` steps.
        stopwatch: of the device.
        steps: what times are divided by.

    Returns:
        "device_ms_per_step" of all kernels, and "top": "kernel", "ms_per_step", "calls" of those that took longest.
    """
    from torch.profiler import ProfilerActivity, profile

    cpu = stopwatch.device.type == "cpu"
    activity = ProfilerActivity.CPU if cpu else getattr(ProfilerActivity, stopwatch.device.type.upper())
    with profile(activities=[activity]) as found:
        run()
        stopwatch.synchronize()
    times_us = {
        event: event.self_cpu_time_total if cpu else event.self_device_time_total for event in found.key_averages()
    }
    longest = sorted(times_us, key=lambda event: -times_us[event])[:KERNELS]
    return {
        "device_ms_per_step": sum(times_us.values()) / 1e3 / steps,
        "top": [
            {"kernel": event.key[:NAME_LENGTH], "ms_per_step": times_us[event] / 1e3 / steps, "calls": event.count}
            for event in longest
        ],
    }
