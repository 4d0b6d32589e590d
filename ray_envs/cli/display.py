"""Shows a batch: its progress while it runs, then the table of its results and its failures.

Progress goes to stderr: a live display on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_envs.batch_models import BatchSpec, ItemResult
from ray_envs.cli.printing import KEY_SHOWN

if TYPE_CHECKING:
    from ray_envs.client.runner import Progress

_NODE_SHOWN = 8
_TEXT_SHOWN = 20
#: The width of tables if stdout is not a terminal, so that nothing is cut off.
_FILE_WIDTH = 200
#: How many lines of an error are shown; the results file has all of them.
_ERROR_LINES = 12


def rendered(table: Table) -> str:
    """Return `table` as text for stdout."""
    is_terminal = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        width=shutil.get_terminal_size().columns if is_terminal else _FILE_WIDTH,
        force_terminal=is_terminal,
    )
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


class _PatientConsole(Console):
    """A console that becomes silent when its reader ends, so that the batch goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class RunDisplay:
    """Shows a batch on stderr while it runs; a context manager."""

    def __init__(self, batch: BatchSpec) -> None:
        self._batch = batch
        self._console = _PatientConsole(stderr=True)
        self._live: Live | None = None
        self._phases: dict[str, str] = {}
        self._progress: Progress | None = None
        self._said: dict[str, str] = {}
        #: The variants and nodes whose failure is shown.
        self._missing: set[tuple[str, str]] = set()
        self._began = time.monotonic()

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=8,
                transient=True, redirect_stdout=False,
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(Text(text), soft_wrap=True)

    def variant(self, variant_id: str, phase: str, detail: str = "") -> None:
        """Show the phase of a variant's environment."""
        self._phases[variant_id] = f"{phase}  {detail}".rstrip()
        if self._live is None and self._said.get(variant_id) != phase:
            self._said[variant_id] = phase
            self.say(f"[{self._elapsed()}] {variant_id}: {phase} {detail}".rstrip())

    def statuses(self, statuses: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the statuses that `prepare` reports."""
        for name, status in statuses.items():
            variant_id = name.removeprefix(f"{self._batch.name}/")
            states = list(status["nodes"].values())
            busy = [s for s in states if s["phase"] not in ("ready", "failed")]
            state = busy[0] if busy else states[0] if states else {"phase": "waiting"}
            phase = str(state["phase"])
            if len(states) > 1:
                ready = sum(s["phase"] == "ready" for s in states)
                phase += f" ({ready} of {len(states)} nodes ready)"
                self._tell_failures(variant_id, states)
            self.variant(variant_id, phase, str(state.get("progress", "")))

    def _tell_failures(self, variant_id: str, states: Iterable[Mapping[str, Any]]) -> None:
        """Print each node where a variant failed, once. The phase shows only the other nodes."""
        for state in states:
            if state["phase"] == "failed":
                where, error = state.get("address", ""), state.get("error") or {}
                if (variant_id, where) not in self._missing:
                    self._missing.add((variant_id, where))
                    self.say(f"note: {variant_id} is not on {where}: {error.get('message', '')}")

    def item(self, result: ItemResult, progress: Progress, *, is_earlier: bool = False) -> None:
        """Show an item that has ended now, or in an earlier run."""
        self._progress = progress
        if self._live is None:
            how = "ok" if result.ok else f"FAILED {result.error.type if result.error else ''}"
            over = progress.completed + progress.failed
            self.say(
                f"[{self._elapsed()}] {over}/{progress.total} {result.variant_id} × "
                f"{result.case_id}: {how} ({result.duration_s:.2f} s"
                f"{', in an earlier run' if is_earlier else ''})"
            )

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began:6.1f} s"

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for variant_id, phase in self._phases.items():
            mark = "✓" if phase.startswith("ready") else "✗" if phase.startswith("failed") else "…"
            table.add_row(mark, variant_id, Text(phase, overflow="ellipsis", no_wrap=True))
        lines: list[Any] = [table]
        if self._progress is not None:
            p = self._progress
            eta = "" if p.eta_s is None else f"   about {p.eta_s:.0f} s left"
            lines.append(
                Text(
                    f"{p.completed} done, {p.failed} failed, {p.in_progress} running, "
                    f"{p.total} in all   {p.elapsed_s:.0f} s{eta}"
                )
            )
        return Group(*lines)


def metric_of(result: ItemResult, name: str | None) -> float | None:
    """Return the number in the value of a result: that under `name`, or else the first one."""
    value = result.value
    if isinstance(value, Mapping):
        candidates = [value.get(name)] if name else list(value.values())
    else:
        candidates = [value]
    numbers = [v for v in candidates if isinstance(v, int | float) and not isinstance(v, bool)]
    return float(numbers[0]) if numbers else None


def results_table(batch: BatchSpec, results: Iterable[ItemResult]) -> Table:
    """Return a table of variants × cases with metric, seconds, key and node; `*` marks the best."""
    by_item = {(r.variant_id, r.case_id): r for r in results}
    best = {case.id: _best(batch, by_item, case.id) for case in batch.cases}
    stars = " (* best)" if any(each is not None for each in best.values()) else ""
    table = Table(
        title=f"{batch.name}: {batch.metric or 'value'}{stars}, seconds", title_justify="left"
    )
    table.add_column("variant")
    for case in batch.cases:
        table.add_column(case.id, justify="right")
    table.add_column("environment")
    table.add_column("node")
    for variant in batch.variants:
        row = [by_item.get((variant.id, case.id)) for case in batch.cases]
        cells = [_cell(r, batch.metric, best[c.id]) for r, c in zip(row, batch.cases, strict=True)]
        there = [r for r in row if r is not None]
        table.add_row(
            variant.id,
            *cells,
            _joined((r.key for r in there), KEY_SHOWN),
            _joined((r.node_id for r in there), _NODE_SHOWN),
        )
    return table


def _best(
    batch: BatchSpec, by_item: Mapping[tuple[str, str], ItemResult], case_id: str
) -> float | None:
    """Return the highest number of a case; None if all are equal."""
    row = [by_item.get((variant.id, case_id)) for variant in batch.variants]
    numbers = [metric_of(r, batch.metric) for r in row if r is not None and r.ok]
    known = {number for number in numbers if number is not None}
    return max(known) if len(known) > 1 else None


def _cell(result: ItemResult | None, metric: str | None, best: float | None) -> Text:
    if result is None:
        return Text("not run", style="dim")
    if not result.ok:
        return Text(result.error.type if result.error else "failed", style="red")
    number = metric_of(result, metric)
    shown = _text(result, metric) if number is None else f"{number:.4g}"
    is_best = number is not None and number == best
    return Text(
        f"{shown}{'*' if is_best else ' '} {result.duration_s:6.2f} s",
        style="bold green" if is_best else "",
    )


def _text(result: ItemResult, metric: str | None) -> str:
    """Return what a cell shows if there is no number: a text, or that the metric is missing."""
    value = result.value.get(metric) if isinstance(result.value, Mapping) else result.value
    if isinstance(value, str):
        return value[:_TEXT_SHOWN]
    return f"no {metric}" if metric and value is None else "ok"


def _joined(values: Iterable[str | None], length: int) -> str:
    return ", ".join(sorted({value[:length] for value in values if value})) or "-"


def failures(results: Sequence[ItemResult]) -> list[str]:
    """Return a paragraph for each different failure: its items and the first lines of the error."""
    groups: dict[tuple[str, str, str], list[ItemResult]] = {}
    for result in results:
        if result.error is not None:
            same = (result.variant_id, result.error.type, result.error.message)
            groups.setdefault(same, []).append(result)
    paragraphs = []
    for (variant_id, kind, message), items in groups.items():
        lines = message.splitlines() or [""]
        shown = "\n  ".join(lines[:_ERROR_LINES] + (["…"] if len(lines) > _ERROR_LINES else []))
        cases = ", ".join(item.case_id for item in items)
        frames = re.findall(r'File "(.*)", line (\d+), in', items[0].error.traceback)  # type: ignore[union-attr]
        where = f" ({os.path.basename(frames[-1][0])}:{frames[-1][1]})" if frames else ""
        paragraphs.append(f"{variant_id} × {cases}: {kind}: {shown}{where}")
    return paragraphs
