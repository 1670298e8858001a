"""Status of a run as text of at most 46 columns, for a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ds_gpt2.common.formatting import clock, done_share, duration, signed, size, truncated
from ds_gpt2.monitoring.pace import RECENT_LABEL
from ds_gpt2.monitoring.reference_curves import REFERENCE
from ds_gpt2.tools.resources.disk_forecast import DiskSpace
from ds_gpt2.tools.resources.history import History
from ds_gpt2.tools.resources.run_hosts import RunHost, names_of
from ds_gpt2.tools.status.problems import Problem
from ds_gpt2.tools.status.progress import Loss
from ds_gpt2.tools.status.status import Status

WIDTH = 46
_LABEL = 12  # columns of a label

_RED, _GREEN, _PLAIN = "\033[31m", "\033[32m", "\033[0m"


def screen(status: Status, colored: bool = False) -> str:
    """Return the complete status, about twenty lines."""
    lines = [_header(status, colored), *(truncated(line, WIDTH) for line in _lines(status))]
    problems = [line for problem in status.problems for line in _problem(problem)]
    return "\n".join([*lines, *(_painted(line, _RED, colored) for line in problems)])


def line(status: Status, colored: bool = False) -> str:
    """Return the status in one line, for a list of runs."""
    progress = status.progress
    mark = _painted(" " if status.healthy else "!", _RED, colored and not status.healthy)
    done = done_share(progress.step, progress.steps, 0) if progress.steps else ""
    left = "" if progress.left_seconds is None or status.state == "finished" else duration(progress.left_seconds)
    cells = f"{truncated(status.run, 12):<12} {status.state:<10} {done:>4} {_short(status.loss):>6} {left:>7}"
    return f"{mark} {cells}".rstrip()


def _short(loss: Loss) -> str:
    """Return the training loss in at most six columns."""
    if loss.train_not_finite_step is not None:
        return "NaN"
    return "" if loss.train is None else f"{loss.train:.3f}"


def _header(status: Status, colored: bool) -> str:
    now, state = clock(status.time), status.state
    name = truncated(status.run, WIDTH - len(now) - len(state) - 4)
    text = f"{name}: {_painted(state, _GREEN if status.healthy else _RED, colored)}"
    return f"{text}{now:>{WIDTH - len(name) - len(state) - 2}}"


def _lines(status: Status) -> Iterator[str]:
    if status.state in ("stopped", "finished"):  # for other states a problem has the text
        yield from _wrapped("state", status.state_text or "")
    yield from _progress_of(status)
    yield from _hosts(status.hosts)
    yield from _losses(status)
    yield from _checkpoint(status)
    yield from _history(status.history, status.time)
    for disk in status.disks:
        where = Path(disk.directories[0]).parent.name  # runs, checkpoints
        yield _labeled("disk" if len(status.disks) == 1 else truncated(where, _LABEL - 1), _free_space(disk))
    if status.gpus is not None:
        throttled = f", {status.gpus.throttled} throttled" if status.gpus.throttled else ""
        yield _labeled("GPU", f"{status.gpus.temperature_c:.0f} °C{throttled}")


def _progress_of(status: Status) -> Iterator[str]:
    progress = status.progress
    of = "" if progress.steps is None else f" of {progress.steps:,}"
    done = f", {done_share(progress.step, progress.steps)}" if progress.steps else ""
    yield _labeled("step", f"{progress.step:,}{of}{done}")
    yield from _wrapped("forked from", "" if status.forked_from is None else str(status.forked_from))
    if status.beat_age_seconds is not None:
        yield _labeled("alive", f"{duration(status.beat_age_seconds)} ago")
    if status.next_start_time is not None:
        is_waiting = any(problem.kind == "few_hosts" for problem in status.problems)
        yield _labeled(
            "next try" if is_waiting else "next start", f"in {duration(status.next_start_time - status.time)}"
        )
    step_seconds = progress.step_seconds or progress.seconds_per_step
    if progress.tokens_per_second is not None and step_seconds is not None:
        yield _labeled("speed", f"{progress.tokens_per_second:,.0f} tokens/s, {step_seconds:.3g} s/step")
    if progress.left_seconds:
        low, high = duration(progress.left_seconds_low or 0.0), duration(progress.left_seconds_high or 0.0)
        between = "" if low == high else f" ({low} to {high})"
        yield _labeled("left", f"{duration(progress.left_seconds)}{between}")
    if status.finish_time is not None and progress.left_seconds:
        yield _labeled("done by", clock(status.finish_time))


def _hosts(hosts: Sequence[RunHost]) -> Iterator[str]:
    away = [host for host in hosts if host.away_since is not None]
    idle = [host.name for host in hosts if host.away_since is None and not host.ranks]
    yield from _wrapped("hosts", names_of(hosts) if hosts else "")
    yield from _wrapped("  idle", ", ".join(idle))
    yield from _wrapped("  away", ", ".join(f"{host.name} since {clock(host.away_since or 0.0)}" for host in away))


def _wrapped(label: str, text: str) -> Iterator[str]:
    """Yield ``text`` on at most three lines; none if it is empty."""
    for part in textwrap.wrap(text, WIDTH - _LABEL, max_lines=3, placeholder=" ...", break_on_hyphens=False):
        yield _labeled(label, part)
        label = ""


def _losses(status: Status) -> Iterator[str]:
    loss = status.loss
    if loss.train_not_finite_step is not None:
        yield _labeled("loss", f"not finite at step {loss.train_not_finite_step:,}")
        if loss.train is not None:
            yield _labeled("  finite", f"{loss.train:.4f} ({RECENT_LABEL})")
    elif loss.train is not None:
        yield _labeled("loss", f"{loss.train:.4f} ({RECENT_LABEL})")
    if loss.train_day_before is not None:
        yield _labeled("  a day ago", f"{loss.train_day_before:.4f}")
    if loss.val_not_finite_step is not None:
        yield _labeled("validation", f"not finite at step {loss.val_not_finite_step:,}")
    if loss.val is not None and loss.val_step is not None:
        label = "validation" if loss.val_not_finite_step is None else "  finite"
        yield _labeled(label, f"{loss.val:.4f} at step {loss.val_step:,}")
        if loss.best_val is not None and loss.best_val_step is not None and loss.best_val_step != loss.val_step:
            yield _labeled("  best", f"{loss.best_val:.4f} at step {loss.best_val_step:,}")
        if loss.reference is not None:
            difference = signed(loss.val - loss.reference)
            yield _labeled(REFERENCE.split("-")[0], f"{loss.reference:.4f} at that step: {difference}")


def _checkpoint(status: Status) -> Iterator[str]:
    newest, history = status.checkpoint, status.history
    if newest is None:
        yield _labeled("checkpoint", "none yet")
        return
    age = "" if newest.age_seconds is None else f", {duration(newest.age_seconds)} ago"
    yield _labeled("checkpoint", f"{newest.tag}{age}")
    if newest.damage is None:
        yield _labeled("", "hashed when written, sizes match")
    if history.read_back_step is not None and history.read_back_time is not None:
        ago = duration(status.time - history.read_back_time)
        yield _labeled("", f"step {history.read_back_step:,} verified {ago} ago")


def _history(history: History, now: float) -> Iterator[str]:
    if history.last_start_time is not None:
        yield _labeled("restarts", f"{history.restarts} by the supervisor, {history.resumes} by hand")
        yield _labeled("last start", f"{duration(now - history.last_start_time)} ago")
    if history.kept_share is not None:
        yield _labeled("lost", _lost(history.lost_seconds, history.kept_share))
    if history.kept_share_24h is not None and history.kept_share_24h != history.kept_share:
        yield _labeled("  in 24 h", _lost(history.lost_seconds_24h, history.kept_share_24h))
    if history.goodput is not None:
        day = "" if history.goodput_24h is None else f", in 24 h {100 * history.goodput_24h:.1f}%"
        yield _labeled("goodput", f"{100 * history.goodput:.1f}%{day}")
    in_24h = ", ".join(f"{count} {kind}" for kind, count in history.incidents_24h.items()) or "none"
    if history.last_incident is not None:
        yield _labeled("incidents", f"{history.incidents}, in 24 h {in_24h}")
        last = f"{duration(now - history.last_incident.time)} ago: {history.last_incident.text}"
        for part in textwrap.wrap(last, WIDTH - _LABEL, max_lines=2, placeholder="..."):
            yield _labeled("", part)
    else:
        yield _labeled("incidents", "none")


def _lost(seconds: float, kept_share: float) -> str:
    return f"{duration(seconds)}, {100 * (1 - kept_share):.1f}% of the time"


def _free_space(disk: DiskSpace) -> str:
    free = f"{size(disk.free_bytes)} free"
    if disk.needed_bytes is None:
        return free
    if disk.days_left is None:
        return f"enough to the end, {free}"
    return f"{disk.days_left:.1f} days left, {free}"


def _labeled(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _problem(problem: Problem) -> list[str]:
    return textwrap.wrap(
        problem.text, WIDTH, initial_indent="! ", subsequent_indent="  ", max_lines=4, placeholder="..."
    )


def _painted(text: str, color: str, colored: bool) -> str:
    return f"{color}{text}{_PLAIN}" if colored else text
