"""The Job for several nodes of Kubernetes: its fields, and that its parts fit each other.

The models have the fields that the file uses, as https://kubernetes.io/docs/reference/kubernetes-api/ has them; an
unknown field or another type is an error. ``kubernetes-validate --strict`` 1.37.0 accepts the file for 1.31 and 1.37.
"""

# ruff: noqa: N815  # the fields have the names of the Kubernetes API

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import yaml
from launched import PROJECT
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_gpt2.config import train_arguments

FILE = PROJECT / "deploy" / "kubernetes_multinode.yaml"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Part):
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$")  # a DNS label with space for the index


class ServiceSpec(Part):
    clusterIP: Literal["None"]
    publishNotReadyAddresses: bool
    selector: dict[str, str]


class Service(Part):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class Condition(Part):
    type: str
    status: Literal["True", "False", "Unknown"]


class Rule(Part):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onPodConditions: list[Condition]


class FailurePolicy(Part):
    rules: list[Rule]


class Variable(Part):
    name: str
    value: str


class Resources(Part):
    limits: dict[str, int | str]


class Mount(Part):
    name: str
    mountPath: str


class Container(Part):
    name: str
    image: str
    workingDir: str
    command: list[str]
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Part):
    claimName: str


class EmptyDirectory(Part):
    medium: Literal["", "Memory"]
    sizeLimit: str = Field(pattern=r"^\d+(Ki|Mi|Gi|Ti)$")


class Volume(Part):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDirectory | None = None


class PodSpec(Part):
    subdomain: str
    restartPolicy: Literal["Never", "OnFailure"]  # those that a Job allows
    terminationGracePeriodSeconds: int
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(Part):
    spec: PodSpec


class JobSpec(Part):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: int = Field(ge=1)
    parallelism: int = Field(ge=1)
    backoffLimit: int = Field(ge=0)
    podFailurePolicy: FailurePolicy
    template: PodTemplate


class Job(Part):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


def documents() -> tuple[Any, Any]:
    service, job = yaml.safe_load_all(FILE.read_text(encoding="utf-8"))
    return service, job


@pytest.fixture
def service() -> Service:
    return Service.model_validate(documents()[0])


@pytest.fixture
def job() -> Job:
    return Job.model_validate(documents()[1])


def test_a_wrong_field_is_found() -> None:
    content = documents()[1]
    content["spec"]["completion"] = content["spec"].pop("completions")
    with pytest.raises(ValidationError, match="completion"):
        Job.model_validate(content)


def test_the_pods_find_each_other_through_the_service(service: Service, job: Job) -> None:
    name, pod = job.metadata.name, job.spec.template.spec
    assert service.spec.selector == {"job-name": name}  # a label that the Job gives its pods
    assert service.spec.publishNotReadyAddresses
    assert pod.subdomain == service.metadata.name
    assert flags(job)["--rdzv_endpoint"] == f"{name}-0.{service.metadata.name}:29400"
    assert job.spec.completionMode == "Indexed"  # gives the pods their host names


def flags(job: Job) -> dict[str, str]:
    words = job.spec.template.spec.containers[0].command
    return dict(re.findall(r"^(--\w+)=(.*)$", "\n".join(words), re.MULTILINE))


def test_the_numbers_of_pods_and_of_gpus_fit_the_command(job: Job) -> None:
    (container,) = job.spec.template.spec.containers
    assert job.spec.completions == job.spec.parallelism == int(flags(job)["--nnodes"])
    assert container.resources.limits["nvidia.com/gpu"] == int(flags(job)["--nproc_per_node"])


def test_the_command_trains_a_config_that_exists(job: Job) -> None:
    (container,) = job.spec.template.spec.containers
    program, *words = container.command
    script = words.index("ds_gpt2/train.py")
    assert program == "torchrun" and (PROJECT / words[script]).is_file()
    parsed = train_arguments.parse(words[script + 1 :])
    assert parsed.resume == "auto" and (PROJECT / parsed.config).is_file()


def test_the_volumes_are_mounted_and_the_project_is_on_the_shared_one(job: Job) -> None:
    pod = job.spec.template.spec
    (container,) = pod.containers
    assert [volume.name for volume in pod.volumes] == [mount.name for mount in container.volumeMounts]
    shared, memory = container.volumeMounts
    assert pod.volumes[0].persistentVolumeClaim and container.workingDir.startswith(f"{shared.mountPath}/")
    assert pod.volumes[1].emptyDir and memory.mountPath == "/dev/shm"


def test_evicted_pods_have_time_to_save_and_do_not_count_as_failed(job: Job) -> None:
    pod = job.spec.template.spec
    variables = {variable.name: variable.value for variable in pod.containers[0].env}
    assert pod.terminationGracePeriodSeconds > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 60
    (rule,) = job.spec.podFailurePolicy.rules
    assert (rule.action, rule.onPodConditions[0].type) == ("Ignore", "DisruptionTarget")
    assert pod.restartPolicy == "Never"  # which podFailurePolicy requires
