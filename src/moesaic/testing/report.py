"""What a check says: findings of each layout, worst first, each with the line that usually mends it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moesaic.testing.layout import Layout

REMEDIES = {
    "noisy": "Turn off what draws random numbers in the forward pass, or seed it; no comparison holds until then.",
    "initial": "Build the model with one seed on every rank before it is laid out, or broadcast rank 0's weights.",
    "lost": "Give every part of the parameter to some rank, or say with where= which parts these are.",
    "dropout": "Give the ranks of {axes} one generator for dropout: they hold the same activations.",
    "layer": "Compare this layer's parallel forward with its plain one, from its inputs on.",
    "layer own part": "Sum it over {axes}: redistribute to Replicate() or all_reduce; a bare to_local() drops Partial.",
    "bias": "Add the bias once: on one rank of {axes}, or after the sum over them.",
    "child": "Add it once: after the sum over {axes}, or divide it by their number.",
    "factor": "Divide once: by the number of all tokens; then reduce by SUM, or by mean, never one for the other.",
    "own part": "Sum it over {axes}: all_reduce the gradient, or to_local(grad_placements=[Partial()]).",
    "own mean": "Average it over {axes}: DDP, FSDP or an all_reduce of the gradient.",
    "wrong group": "Reduce the gradient over the ranks that hold copies of this parameter, and no others.",
    "term": "Count this term once: divide it by the number of ranks or micro-batches that add it.",
    "tokens": "Divide the sum over a rank's tokens by the number of all tokens, not each rank's by its own.",
    "batches": "A loss that is no sum over tokens, as a balance loss, needs its statistics summed over ranks first.",
    "replicas differ": "Give all copies the same sum: reduce over {axes} what every one of their tokens contributes.",
    "missing": "Reach the parameter from the loss on every rank; an unused one needs a gradient of zeros.",
    "unrelated": "Start with the parameter nearest to the loss: what is below inherits its error.",
    "norm": "Sum the squares over all ranks and meshes before the root, and scale all gradients by one number.",
    "buffer": "Reduce the buffer over the ranks that count different tokens, once.",
    "weights": "Look at the optimizer and at clipping: the gradients were right.",
    "input gradient": "Check the collective at the head of the model: its backward decides this gradient.",
    "loss": "Report the sum or the mean over all ranks, not one of them.",
}


@dataclass(frozen=True)
class Finding:
    """One fault: of what kind it is, where, what was seen, and what usually mends it.

    Attributes:
        kind: a key of the table of remedies.
        what: the values concerned, such as ``gradient of router.weight``.
        text: what was seen; ``{axes}`` stands for the axes.
        axes: axes that explain it, each by itself.
        times_noise: its error over that of rounding.
        names: parameters, layers or buffers.
        rank_order: where it comes in the report; the least is the cause that is to be mended first.
    """

    kind: str
    what: str
    text: str
    axes: tuple[str, ...] = ()
    times_noise: float = 0.0
    names: tuple[str, ...] = ()
    rank_order: tuple[float, ...] = (9.0,)

    @property
    def said(self) -> str:
        return f"{self.what}: {self._filled(self.text)}"

    @property
    def remedy(self) -> str:
        return self._filled(REMEDIES[self.kind])

    def _filled(self, text: str) -> str:
        return text.replace("{axes}", " or ".join(self.axes) or "the ranks")


@dataclass
class LayoutReport:
    """What one layout showed.

    Attributes:
        error: why it could not be compared.
        compared: how many values were.
        largest: the largest error among those that are equal, in units of noise.
    """

    layout: Layout
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    compared: int = 0
    largest: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error is None and not self.findings

    def __str__(self) -> str:
        head = f"{self.layout} ({self.layout.world} rank{'s' * (self.layout.world > 1)}, {self.seconds:.1f} s)"
        if self.error is not None:
            return f"{head}: CANNOT BE COMPARED\n{_indented(self.error)}"
        notes = [f"  note: {note}" for note in self.notes]
        if self.ok:
            return "\n".join(
                [f"{head}: equal, {self.compared} values, the largest error {self.largest:.1f} x noise", *notes]
            )
        lines = [f"{head}: DIFFERS"]
        for finding in self.findings:
            size = f"{finding.times_noise:.1g} x noise" if finding.times_noise else ""
            lines += [f"  {size:>15}  {finding.said}", f"{'':17}  -> {finding.remedy}"]
        return "\n".join([*lines, *notes])


@dataclass
class Report:
    """What all layouts showed; ``str(report)`` is the page to read."""

    layouts: list[LayoutReport]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every layout could be compared and was equal."""
        return all(layout.ok for layout in self.layouts)

    @property
    def ran(self) -> bool:
        """Whether every layout could be compared."""
        return all(layout.error is None for layout in self.layouts)

    @property
    def findings(self) -> list[Finding]:
        """The findings of all layouts."""
        return [finding for layout in self.layouts for finding in layout.findings]

    def __str__(self) -> str:
        parts = [*map(str, self.layouts), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*parts, f"{self.seconds:.1f} s in all"])


def merged(findings: list[Finding], of: int) -> list[Finding]:
    """Findings that say the same of several parameters, as one; the axes are those that explain all of them."""
    by_text: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_text.setdefault((finding.kind, finding.text), []).append(finding)
    result = []
    for same in by_text.values():
        common = [axis for axis in same[0].axes if all(axis in f.axes for f in same)]
        if common or not any(f.axes for f in same):
            result.append(_merged(same, tuple(common), of))
            continue
        for axes in dict.fromkeys(f.axes for f in same):
            result.append(_merged([f for f in same if f.axes == axes], axes, of))
    return result


def _merged(same: list[Finding], axes: tuple[str, ...], of: int) -> Finding:
    first = min(same, key=lambda f: f.rank_order)
    names = tuple(n for f in same for n in f.names)
    if len(same) == 1:
        return replace(first, axes=axes)
    before, _, after = first.what.partition(first.names[0])
    who = f"every parameter ({of})" if len(names) == of else f"{first.names[0]} and {len(names) - 1} more"
    worst = max(f.times_noise for f in same)
    return replace(first, what=f"{before}{who}{after}", axes=axes, times_noise=worst, names=names)


def narrowed(layouts: Sequence[LayoutReport]) -> None:
    """Drop an axis from the explanations of a fault where another layout has that axis and not that fault."""
    for report in layouts:
        findings = []
        for finding in report.findings:
            innocent = {
                axis
                for other in layouts
                if other is not report and other.error is None and not _has(other, finding)
                for axis in finding.axes
                if axis in other.layout.factors()
            }
            left = tuple(axis for axis in finding.axes if axis not in innocent)
            findings.append(replace(finding, axes=left) if left else finding)
        report.findings = findings


def _has(report: LayoutReport, finding: Finding) -> bool:
    return any(set(finding.names) & set(other.names) or not other.names for other in report.findings)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
