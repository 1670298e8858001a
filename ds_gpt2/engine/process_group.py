"""Open and close the process group of a run: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_gpt2.common import host
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.terminal import print_error
from ds_gpt2.distributed import collectives, launch_environment, network_interface
from ds_gpt2.engine import internals
from ds_gpt2.run_dir import exit_codes

log = logging.getLogger(__name__)

_NOTICE_SECONDS = 30.0  # of waiting for other ranks, after which a warning is logged
_LEFTOVER_SECONDS = 60.0  # of waiting, after which a rank gives up if its variables are probably another job's


def open_process_group(device: torch.device) -> None:
    """Join the ranks of this run.

    Raises:
        UserError: the rendezvous port is taken, usually by another run, or other ranks do not arrive.
    """
    started_by = launch_environment.adopt()
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(host.free_port())
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce needs g++ and half a minute at its first use, and was not faster where
        # ranks share cores (benchmarks/LOG.md). Without this line DeepSpeed runs g++ to check for other operators.
        internals.check_operators()
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        if collectives.local_world_size() == collectives.world_size() and os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a single machine: its name need not resolve
    network_interface.choose()
    # torchrun's agent listens on the port itself, and the ranks are its clients.
    if collectives.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        host.check_port_free(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    # DeepSpeed's own calls raise it: one line per rank would hide everything else.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _waiting_for_ranks(started_by):
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    collectives.open_cpu_group()


@contextlib.contextmanager
def _waiting_for_ranks(started_by: launch_environment.Launcher) -> Iterator[None]:
    """Warn while other ranks do not arrive; exit early on a single machine where no known launcher started this rank.

    Raises:
        UserError: PyTorch's own time limit has passed.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    ranks = collectives.world_size()
    text = f"rank {collectives.rank()} has waited {{:.0f}} s for all {ranks} ranks to connect at {address}"
    if started_by == "environment":
        text += "; RANK and WORLD_SIZE come from the environment: unset them if they are left over from another job"
    may_be_leftover = started_by == "environment" and os.environ["MASTER_ADDR"] in launch_environment.LOOPBACK

    def give_up() -> None:  # the main thread waits in C++ and cannot be interrupted
        print_error(text.format(_LEFTOVER_SECONDS))
        os._exit(exit_codes.MISTAKE)

    timers = [threading.Timer(_NOTICE_SECONDS, lambda: log.warning(text.format(_NOTICE_SECONDS)))]
    timers += [threading.Timer(_LEFTOVER_SECONDS, give_up)] if may_be_leftover else []
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except torch.distributed.DistError as error:
        raise UserError(f"the ranks cannot connect at {address}: {one_line_reason(error, 300)}") from None
    finally:
        for timer in timers:
            timer.cancel()


def close_process_group() -> None:
    """Leave the process group; without this call NCCL prints a warning when the process ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
