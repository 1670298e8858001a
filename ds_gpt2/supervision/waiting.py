"""Wait before a launch: for the backoff to pass, or for directories to become available."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.formatting import counted, duration
from ds_gpt2.config.batch_plan import fit_ranks
from ds_gpt2.supervision import host_events
from ds_gpt2.supervision.cluster.away_reasons import without_numbers
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import POLL_SECONDS, Context
from ds_gpt2.supervision.restart_policy import Restart
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.training.resume_choice import CheckpointsGoneError, choose_source

_WRITE_RETRY_SECONDS = 5.0  # between two attempts to write to a directory that cannot be written

T = TypeVar("T")


def wait_for_restart(context: Context, restart: Restart) -> bool:
    """Wait until the next launch is due; return False if a stop is requested first."""
    context.reporter.report("restart", f"restarting in {duration(restart.seconds)} {restart.text}")
    return _pause(context, restart.seconds)


def wait_for_writable_logs(context: Context) -> bool:
    """Wait until the run's logs can be written; return False if a stop is requested first."""
    directories, reported = context.directories, ""
    while not directories.run_was_relocated() and (problem := directories.write_problem()) is not None:
        if problem != reported:
            context.reporter.report("not_logged", f"{problem}: the run restarts when this is fixed")
        reported = problem
        if not _pause(context, _WRITE_RETRY_SECONDS):
            return False
    return True


def wait_for_checkpoints(context: Context, resume: str | None) -> bool:
    """Wait until the checkpoints to resume from are available; return False if a stop is requested first."""
    limits, directories, reported = context.settings.supervisor, context.directories, ""
    seconds = limits.backoff_seconds
    while (problem := _missing_checkpoints(context, resume)) is not None and not directories.run_was_relocated():
        if problem != reported:
            context.reporter.report("no_checkpoints", problem)
            reported = problem
        if not _pause(context, seconds):
            return False
        seconds = min(limits.longest_backoff_seconds, max(1.0, 2 * seconds))
    return True


def wait_for_hosts(context: Context, cluster: Cluster) -> bool:
    """Connect to hosts that do not answer; wait until enough do. Return False if a stop is requested first."""
    limits = context.settings.supervisor
    seconds, reported = max(1.0, limits.backoff_seconds), {"": ""}
    while not context.directories.run_was_relocated():
        host_events.report_lost_hosts(context.reporter, cluster, {})
        before = set(cluster.away) - set(cluster.cut_off)
        if (away := run_polled(context, cluster.reconnect)) is None:
            return not context.stop.requested
        host_events.report_reconnected_hosts(context.reporter, cluster, before, away)
        if has_enough_hosts(context, cluster):
            return True
        if (kinds := {host: without_numbers(reason) for host, reason in away.items()}) != reported:
            context.reporter.report("few_hosts", _few_hosts_text(context, cluster, away), away=away)
            reported = kinds
        if not _pause(context, seconds):
            return False
        seconds = min(limits.longest_backoff_seconds, 2 * seconds)
    return True


def has_enough_hosts(context: Context, cluster: Cluster) -> bool:
    """Return whether at least ``cluster.min_nodes`` hosts answer."""
    return len(cluster.nodes) >= context.settings.cluster.min_nodes


def on_hosts(context: Context, cluster: Cluster, run: SupervisedRun) -> SupervisedRun:
    """Return ``run`` on as many ranks of the hosts that answer as divide the token budget of a step.

    If all hosts were lost in the last moment, it is not changed, and its launch fails.
    """
    batch = context.settings.batch
    if not (slots := cluster.slots):
        return run
    return run.on_ranks(*fit_ranks(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, slots))


def run_polled(context: Context, action: Callable[[], T]) -> T | None:
    """Return the result of ``action``, which may take minutes and must not report: a thread runs it.

    Meanwhile alerts are sent and the disks are checked. None if a stop is requested first, or the run's directory is
    moved: the thread is abandoned.

    Raises:
        TakenOverError: this supervisor has been replaced by another.
        Exception: whatever ``action`` raises.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(action())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while not concurrent.futures.wait([result], POLL_SECONDS).done:
        if _is_interrupted(context):
            return None
        context.poll()
    return result.result()


def _few_hosts_text(context: Context, cluster: Cluster, away: dict[str, str]) -> str:
    reasons = "; ".join(f"{host}: {reason}" for host, reason in away.items())
    text = f"{counted(len(cluster.nodes), 'host')} of {len(cluster.spec.hosts)} answer, cluster.min_nodes is"
    return f"{text} {context.settings.cluster.min_nodes}: waiting for more ({reasons})"


def _missing_checkpoints(context: Context, resume: str | None) -> str | None:
    """Return why the checkpoints of a run that was saved are not available; None if they are, or none are needed."""
    try:
        choose_source(context.settings, resume)
    except CheckpointsGoneError as error:
        return f"{error}; waiting for the checkpoints"
    except UserError:  # the ranks report it
        return None
    except OSError as error:  # such as a stale file handle of a network file system
        directory = context.settings.checkpoint_dir
        return f"{directory} cannot be read ({reason_of(error)}); waiting for the checkpoints"
    return None


def _pause(context: Context, seconds: float) -> bool:
    """Wait for ``seconds``, or until the run's directory is moved; return False if a stop is requested."""
    context.reporter.record_waiting(seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _is_interrupted(context):
        context.poll()
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    return not context.stop.requested


def _is_interrupted(context: Context) -> bool:
    """Return whether a stop is requested, or the run's directory was moved."""
    context.stop.requested |= context.directories.take_stop_file()
    return context.stop.requested or context.directories.run_was_relocated()
