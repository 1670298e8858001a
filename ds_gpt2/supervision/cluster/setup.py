"""From the settings of a run to its hosts, and to the cluster of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config.settings import Settings
from ds_gpt2.supervision.cluster.cluster import Cluster, ClusterSpec
from ds_gpt2.supervision.cluster.hostfile import Host, read_hostfile, slurm_hosts, slurm_nodes
from ds_gpt2.supervision.launcher import requested_accelerator


def hosts_of(settings: Settings, num_gpus: int | None, environment: Mapping[str, str] = os.environ) -> list[Host]:
    """Return the hosts of a run; none if it uses this machine only.

    Args:
        num_gpus: ranks on each node of a Slurm job without a hostfile; None: as many as it has GPUs there.

    Raises:
        UserError: the hostfile is invalid, the number of ranks is not known, or there is no Slurm job.
    """
    cluster = settings.cluster
    if cluster.launch == "srun":
        slurm_nodes(environment)
    if cluster.hostfile is not None:
        if num_gpus is not None:
            raise UserError(
                f"--num_gpus is for one machine: set the slots in {cluster.hostfile}, or cluster.hostfile=null"
            )
        hosts = read_hostfile(cluster.hostfile)
    elif cluster.launch == "srun":
        slots = environment.get("SLURM_GPUS_ON_NODE", "") if num_gpus is None else str(num_gpus)
        if not slots.isdecimal() or slots == "0":
            raise UserError(
                "the number of ranks on each node is not known: give --num_gpus N, or allocate GPUs to the job"
            )
        hosts = slurm_hosts(int(slots), environment)
    else:
        return []
    if cluster.min_nodes > len(hosts):
        raise UserError(f"cluster.min_nodes={cluster.min_nodes}, but the run has {counted(len(hosts), 'host')}")
    return hosts


def cluster_of(settings: Settings, hosts: Sequence[Host], arguments: Sequence[str]) -> Cluster:
    """Return the cluster of a run; nothing is connected.

    Args:
        arguments: of train.py.
    """
    return Cluster(
        ClusterSpec(
            hosts=hosts,
            launch=settings.cluster.launch,
            interface=settings.cluster.interface,
            arguments=arguments,
            accelerator=requested_accelerator(settings),
            run_dir=settings.run_dir,
            checkpoint_dir=settings.checkpoint_dir,
            stop_seconds=settings.supervisor.stop_seconds,
        )
    )
