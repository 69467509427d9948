"""Load a checkpoint of a published model's size into 8 bits: time, memory, and the next start from the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from accel.memory.budgets import GB

from .families.base import Config
from .families.registry import DEFAULT, config_of, of
from .flux_loras import KEY_PREFIX, diffusers_model, random_lora
from .random_checkpoint import write_checkpoint
from .report import BenchmarkError, Goal, Report, Row

MODES = ("fp8", "int8")
PEER_SCALE = 0.1
ALLOWANCE_BYTES = 1.5e9
CACHED_FACTOR = 1.5
# Pixels along one side of the picture.
PICTURE = 256


def run(quick: bool, scale: float = 1.0, family: str = DEFAULT) -> Report:
    """Measure at a share of a published model's blocks; `quick` takes a narrow one, without the comparison.

    Raises:
        BenchmarkError: no room on the disk, this system does not tell its memory, or a step failed.
    """
    if not Path("/proc/self/status").is_file():
        raise BenchmarkError("it samples /proc/self/status, which only Linux has.")
    whole = config_of(family, quick)
    config = whole if quick else scaled(whole, scale)
    with tempfile.TemporaryDirectory(prefix="flux-hotswap-load-", dir=Path.cwd()) as folder:
        values, notes = _measure(Path(folder), config)
        if not quick:
            peer_scale = min(scale, PEER_SCALE)
            values |= {"peer_scale": peer_scale, **_compare(Path(folder), scaled(whole, peer_scale))}
    values |= {"scale": None if quick else scale}
    return Report(
        title=f"Loading {values['file_bytes'] / GB:.2f} GB of bf16 weights into 8 bits",
        rows=_rows(values),
        values=values,
        goals=() if quick else _goals(values),  # fixed costs of 0.1 s are all there is to a small file
        notes=notes,
    )


def scaled(config: Config, scale: float) -> Any:
    """A model with a share of its blocks, at least one of each kind; their width stays."""
    if not 0 < scale <= 1:
        raise BenchmarkError(f"--scale is {scale}, expected more than 0 and at most 1.")
    whole: Any = config
    depths = {name: max(1, round(getattr(config, name) * scale)) for name in ("depth", "depth_single")}
    return replace(whole, **depths)


def _measure(folder: Path, config: Config) -> tuple[dict[str, Any], list[str]]:
    file, lora = folder / "random.safetensors", folder / "lora.safetensors"
    _require_space(folder, config)
    latent = PICTURE // of(config).family.pixels_per_latent
    values: dict[str, Any] = {"file_bytes": write_checkpoint(file, config), "latent": latent}
    values["model"] = {"family": of(config).family.name, "hidden": config.hidden_size}
    made = random_lora(config, "bench", seed=1)
    save_file(made.state_dict(KEY_PREFIX), lora)
    for mode in MODES:
        cache = folder / "cache"
        first = _stage("load", file, mode=mode, cache=cache, lora=lora, latent=latent)
        second = _stage("load", file, mode=mode, cache=cache, lora=lora, latent=latent)
        hot = _stage("load", file, mode=mode, cache=cache, hot=True)
        shutil.rmtree(cache)
        _check(mode, first, second)
        values |= _named(mode, first, second, hot)
    values |= {key.removeprefix("fp8_"): value for key, value in values.items() if key.startswith("fp8_")}
    file.unlink()
    return values, [
        "Every load runs in a process of its own, which has imported the libraries before the clock starts. load_s "
        "reads, quantizes and writes the cache; cached_load_s checks every byte of the cache's file and maps it.",
        "read_s is one pass over the same file through an 8 MiB buffer. Before each pass and each load the file is "
        "dropped from the page cache (posix_fadvise), so both come from the disk; the …_hot_s pair from memory.",
        "Peak is anonymous resident memory, sampled every 5 ms during the load, with Python and the libraries in it. "
        "Mapped file pages, which the system drops when it needs the memory, do not count.",
        f"The forward is eager, on a latent of {latent} × {latent} and 512 text tokens: compiling takes a minute, and "
        "says nothing of loading. Its output from the cache equals the first one's.",
    ]


def _named(mode: str, first: dict, second: dict, hot: dict) -> dict[str, Any]:
    named = {key: first[key] for key in ("engine_bytes", "peak_rss_bytes", "load_s", "read_s", "swap_ms", "forward_s")}
    named["forward_peak_rss_bytes"] = first["forward_peak_rss_bytes"]
    named |= {f"cached_{key}": second[key] for key in ("load_s", "read_s", "peak_rss_bytes")}
    named |= {f"cached_{key.removesuffix('_s')}_hot_s": hot[key] for key in ("load_s", "read_s")}
    named["cached_file_bytes"] = second["source_bytes"]
    return {f"{mode}_{key}": value for key, value in named.items()}


def _check(mode: str, first: dict, second: dict) -> None:
    if first["from_cache"] or not second["from_cache"]:
        raise BenchmarkError(f"{mode}: the cache was not written by the first load and read by the second.")
    if any("again" in text for text in second["notices"]):
        raise BenchmarkError(f"{mode}: the cache was not used: {second['notices']}")
    if not first["finite"] or first["checksum"] != second["checksum"]:
        raise BenchmarkError(f"{mode}: the output from the cache is not that of the first load.")


def _compare(folder: Path, config: Config) -> dict[str, Any]:
    """The same file through diffusers and torchao, and through us, both into int8."""
    file, directory = folder / "peer.safetensors", folder / "config"
    size = write_checkpoint(file, config)
    diffusers_model(config).save_config(directory)
    peer = _stage("peer", file, config=directory)
    ours = _stage("load", file, mode="int8")
    return {
        "peer_file_bytes": size,
        "peer_load_s": peer["load_s"],
        "peer_peak_rss_bytes": peer["peak_rss_bytes"],
        "peer_ours_load_s": ours["load_s"],
        "peer_ours_peak_rss_bytes": ours["peak_rss_bytes"],
    }


def _stage(stage: str, checkpoint: Path, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.load_stage", stage, "--checkpoint", str(checkpoint)]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BenchmarkError(f"{stage} {options.get('mode', '')} failed: {last[0]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _require_space(folder: Path, config: Config) -> None:
    weights = sum(torch.Size(shape).numel() for shape in of(config).family.layout(config).expected_shapes().values())
    needed, free = int(3.3 * weights), shutil.disk_usage(folder).free  # 2 bytes in the file, 1 in the cache
    if free < needed:
        raise BenchmarkError(
            f"it needs {needed / GB:.0f} GB of disk in {folder.parent}, {free / GB:.0f} GB are free: run it in another "
            "folder, or with a smaller --scale."
        )


def _rows(values: dict[str, Any]) -> list[Row]:
    rows = [Row("file", f"{values['file_bytes'] / GB:.2f} GB")]
    for mode in MODES:
        def of(key: str, mode: str = mode) -> float:
            return values[f"{mode}_{key}"]

        rows += [
            Row(f"{mode}: engine", f"{of('engine_bytes') / GB:.2f} GB"),
            Row(f"{mode}: peak memory of the load", f"{of('peak_rss_bytes') / GB:.2f} GB"),
            Row(f"{mode}: first load", f"{of('load_s'):.2f} s", f"reading the file: {of('read_s'):.2f} s"),
            Row(
                f"{mode}: load from the cache",
                f"{of('cached_load_s'):.2f} s",
                f"reading its file: {of('cached_read_s'):.2f} s; in memory {of('cached_load_hot_s'):.2f} and "
                f"{of('cached_read_hot_s'):.2f} s; peak {of('cached_peak_rss_bytes') / GB:.2f} GB",
            ),
            Row(f"{mode}: swap of a rank-16 LoRA", f"{of('swap_ms'):.0f} ms", "from its file's tensors"),
            Row(f"{mode}: forward, eager", f"{of('forward_s'):.1f} s"),
        ]
    if "peer_load_s" in values:
        rows += [
            Row(
                f"diffusers + torchao, int8, {values['peer_file_bytes'] / GB:.2f} GB",
                f"{values['peer_load_s']:.2f} s",
                f"peak {values['peer_peak_rss_bytes'] / GB:.2f} GB",
            ),
            Row("the same by us", f"{values['peer_ours_load_s']:.2f} s",
                f"peak {values['peer_ours_peak_rss_bytes'] / GB:.2f} GB"),
        ]
    return rows


def _goals(values: dict[str, Any]) -> list[Goal]:
    goals = []
    for mode in MODES:
        goals += [
            Goal(
                f"{mode}: peak above the engine's size, GB",
                (values[f"{mode}_peak_rss_bytes"] - values[f"{mode}_engine_bytes"]) / GB,
                ALLOWANCE_BYTES / GB,
            ),
            Goal(
                f"{mode}: load from the cache over reading its file",
                values[f"{mode}_cached_load_s"] / values[f"{mode}_cached_read_s"],
                CACHED_FACTOR,
            ),
        ]
    return goals
