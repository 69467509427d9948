"""What `python -m benchmarks gpu` found: a table, JSON, and Markdown with a table for each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .ablation_rows import ALL, BASELINE, PUBLISHED_S
from .report import Report, Row, figure

NOT_BEGUN = "not begun"
# What stands in the tables, by stage: key -> heading. Everything is in the JSON file.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "step": {
        "none_ms": "none, ms", "none_host_ms": "host, ms", "rank16_ms": "rank 16, ms", "rank16_host_ms": "host, ms",
        "empty_over_none": "nothing bound", "rank16_over_none": "rank 16", "rank128_over_none": "rank 128",
        "stack4_over_none": "4 LoRAs", "peft_rank16_over_none": "PEFT, rank 16", "attention": "attention",
    },
    "whole": {
        "step_ms": "step, ms", "s_28_steps_extrapolated": "28 steps, s (extrapolated)", "none_step_ms": "none, ms",
        "rank16_step_ms": "rank 16, ms", "two_step_ms": "two LoRAs, ms", "rank128_step_ms": "rank 128, ms",
        "first_image_s": "first image, s", "switch_ms": "switch, ms", "hot_switch_ms": "hot, ms",
        "recompiles": "recompiles", "graphs": "graphs", "peak_gb": "peak, GB",
        "distance_from_the_first_row": "distance",
    },
    "attention": {"ms": "ms", "host_ms": "host, ms", "tflops": "TFLOPS", "deviation": "deviation"},
}  # fmt: skip
# Which published figure a row stands beside; FlashAttention 3 is in none of these.
BESIDE = {
    "diffusers, bf16, eager, PEFT": BASELINE,
    "pack, bf16, compiled": "all but fp8 and flash_3",
    "diffusers, bf16, compiled, hotswap": "all but fp8 and flash_3",
    "pack, fp8, compiled": "all but flash_3",
}
TOP_KERNELS = 8
NOTES = (
    "Random weights of FLUX.1-dev's sizes, made on the device; random text embeddings; LoRAs of rank 16 on all linears "
    "of the blocks unless it says otherwise. Each row ran in a process of its own.",
    "swap: ms until the device is done; _host_ms until the call returned. step: one double and one single block, ms "
    "between two events of the device, median of interleaved rounds; host is the time to launch it; the other columns "
    "are over none, the same blocks without LoRA layers.",
    "whole: an image is 8 steps of 1024 × 1024 without waiting between them; 28 steps are extrapolated from its steps. "
    "first image: bind, compile without any cache, draw; loading apart. switch: what a LoRA node does, the file's "
    "reading included; hot: both LoRAs on the device. graphs: what dynamo compiled in all, two where nothing was "
    "compiled again. peak: torch's own count since the weights were there. distance: relative L2 between what it and "
    "the first row made of the same noise.",
    "offload: a share of FLUX.1-dev's blocks of which a quarter stays on the device; its output equals the resident "
    "model's bit for bit, or the row failed. overlap: the step over the longer of its copies and its computation.",
    "published: huggingface/lora-fast, 28 steps, 1024 × 1024, two LoRAs in turn, on that card, not on this one.",
)


def report(records: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], quick: bool) -> Report:
    """Put the rows together.

    Args:
        records: the latest of each row.
        machine: what they were measured on.
        quick: whether the sizes were small.
    """
    stages: dict[str, dict[str, Any]] = {}
    for each in records:
        row = _row(each)
        if each["row"] in BESIDE and each["stage"] == "whole":
            row["published_s"] = published(each["row"])
        stages.setdefault(each["stage"], {})[each["row"]] = row
    failed = [each for each in records if not each["ok"]]
    values = {"device": dict(machine), "quick": quick, "stages": stages, "published_s": PUBLISHED_S}
    rows = f"{len(records) - len(failed)} of {len(records)} rows"
    title = f"{machine.get('device')}, torch {machine.get('torch')}: {rows}"
    if quick:
        title += ", small sizes: says nothing of speed"
    return Report(title, tuple(_rows(stages)), values, notes=NOTES)


def published(row: str) -> dict[str, float]:
    """Seconds of the published row that a row stands beside, by card."""
    name = BESIDE[row]
    found = {card: figures[name] for card, figures in PUBLISHED_S.items() if name in figures}
    if name == "all but flash_3":
        found["RTX 4090"] = PUBLISHED_S["RTX 4090"][ALL]  # without FlashAttention 3, see there
    return found


def sentence(record: Mapping[str, Any]) -> str:
    """One row, for whoever watches."""
    return f"{record['stage']}: {record['row']}: {_remark(record['stage'], _row(record))}"


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    row = {**record["values"], "ok": record["ok"], "seconds": record["seconds"]}
    if record["error"]:
        row["error"] = record["error"]
    return row


def _rows(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    for stage, rows in stages.items():
        for name, row in rows.items():
            yield Row(f"{stage}: {name}", f"{row['seconds']:.0f} s", _remark(stage, row))


def _remark(stage: str, row: Mapping[str, Any]) -> str:
    if row.get("error"):
        return f"FAILED: {row['error'].splitlines()[0]}"
    if "missing" in row:
        return row["missing"]
    keys = COLUMNS.get(stage) or {key: key for key in row if key not in ("seconds", "ok")}
    return ", ".join(f"{key} {_cell(row[key])}" for key in keys if isinstance(row.get(key), (int, float, str)))


def markdown(found: Report) -> str:
    """All stages for a page: what failed first."""
    stages, device = found.values["stages"], found.values["device"]
    lines = [f"# {found.title}", "", ", ".join(f"{name} {value}" for name, value in device.items()), ""]
    for stage, rows in stages.items():
        lines += [f"- FAILED {stage}: {name}: {row['error'].splitlines()[0]}" for name, row in rows.items()
                  if not row["ok"]]  # fmt: skip
    for stage, rows in stages.items():
        lines += ["", f"## {stage}", "", *_section(stage, {name: row for name, row in rows.items() if row["ok"]})]
    lines += ["", *(f"- {note}" for note in found.notes), "", found.date]
    return "\n".join(lines) + "\n"


def _section(stage: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = {
        key: heading for key, heading in COLUMNS.get(stage, {}).items() if any(key in row for row in rows.values())
    }
    if columns:
        beside = ["published, s"] if stage == "whole" else []
        yield _line(["row", *columns.values(), *beside])
        yield _line(["---"] * (1 + len(columns) + len(beside)))
    for name, row in rows.items():
        if "missing" in row:
            yield _line([name, row["missing"]]) if columns else f"- {name}: {row['missing']}"
        elif columns:
            more = [", ".join(f"{card} {value:g}" for card, value in row.get("published_s", {}).items())]
            yield _line([name, *(_cell(row.get(key)) for key in columns), *(more if stage == "whole" else [])])
        else:
            yield f"- {name}: {_remark(stage, row)}"
            yield from (f"  - {_tested(each)}" for each in row.get("rows", ()))
    for name, row in rows.items():
        for key in (key for key in row if key.endswith("profile")):
            yield from _kernels(f"{name}, {key}", row[key])


def _tested(row: Mapping[str, Any]) -> str:
    text = f"{row['name']}: {row['state']}"
    if row["why"]:
        return f"{text}: {row['why']}"
    return f"{text}, {row['deviation']:.2g} from the reference, {figure(row['ms'])} ms"


def _kernels(name: str, profile: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"{name}: {figure(profile['device_ms_per_step'])} ms of kernels a step", "")
    for kernel in profile["top"][:TOP_KERNELS]:
        yield f"- {figure(kernel['ms_per_step'])} ms, {kernel['calls']} calls: `{kernel['kernel']}`"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return figure(value) if isinstance(value, float) else str(value)
