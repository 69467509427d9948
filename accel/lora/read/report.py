"""What became of a LoRA's keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraReport:
    """Every key of a file, accounted for; a key that cannot be is an error before there is a report.

    Attributes:
        format: the file's format as a person knows it, such as "Kohya sd-scripts".
        kinds: "LoRA", "LoKr", "DoRA", "bias", ... -> how many layers of the file have it.
        ranks: smallest and largest rank that is applied; (0, 0) without any.
        targets: linears of the model that change.
        keys_applied: keys that are applied exactly.
        keys_approximated: keys of changes that were cut to a lower rank.
        max_error: largest relative Frobenius error of one of these changes.
        overall_error: the same over all of them together.
        text_encoder_keys: keys for CLIP and T5, which go through ComfyUI's own patcher.
        unused: what nothing can use -> how many keys that is.
    """

    format: str = "unknown"
    kinds: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[int, int] = (0, 0)
    targets: int = 0
    keys_applied: int = 0
    keys_approximated: int = 0
    max_error: float = 0.0
    overall_error: float = 0.0
    text_encoder_keys: int = 0
    unused: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for a log."""
        low, high = self.ranks
        parts = [f"{self.format}: {', '.join(f'{kind} on {count}' for kind, count in self.kinds.items())}"]
        if high:
            parts.append(f"rank {low}" if low == high else f"ranks {low} to {high}")
        parts.append(f"{self.targets} linears")
        parts.append(f"{self.keys_applied} keys applied exactly")
        if self.keys_approximated:
            parts.append(
                f"{self.keys_approximated} approximated (error {self.overall_error:.2%} overall, "
                f"{self.max_error:.2%} at most)"
            )
        if self.text_encoder_keys:
            parts.append(f"{self.text_encoder_keys} for text encoders")
        parts += [f"{count} not used: {what}" for what, count in self.unused.items()]
        return ", ".join(parts)


def together(reports: Sequence[LoraReport]) -> LoraReport:
    """One report of the parts of a LoRA, which change different layers; of the errors the largest."""
    first, ranks = reports[0], [report.ranks for report in reports if any(report.ranks)]
    kinds, unused = (
        dict(sum((Counter(getattr(report, name)) for report in reports), Counter())) for name in ("kinds", "unused")
    )
    counted = ("targets", "keys_applied", "keys_approximated", "text_encoder_keys")
    return LoraReport(
        format=first.format,
        kinds=kinds,
        ranks=(min((low for low, _ in ranks), default=0), max((high for _, high in ranks), default=0)),
        max_error=max(report.max_error for report in reports),
        overall_error=max(report.overall_error for report in reports),
        unused=unused,
        **{name: sum(getattr(report, name) for report in reports) for name in counted},
    )
