"""The part of KubeRay's API (v1.7, ``ray.io/v1``) that the manifests use. A field that is not in here is an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PodTemplate = dict[str, Any]  # Kubernetes' own; validated as a Pod


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SecretKey(Strict):
    name: str
    key: str


class FromSecret(Strict):
    secretKeyRef: SecretKey  # noqa: N815 -- as it is in the manifest, here and below


class Credential(Strict):
    valueFrom: FromSecret  # noqa: N815


class FaultTolerance(Strict):
    redisAddress: str  # noqa: N815
    redisPassword: Credential  # noqa: N815


class Authentication(Strict):
    mode: Literal["disabled", "token"]


class Autoscaler(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Annotated[int, Field(ge=0)]  # noqa: N815


class HeadGroup(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: str  # noqa: N815
    replicas: int
    minReplicas: Annotated[int, Field(ge=0)]  # noqa: N815
    maxReplicas: Annotated[int, Field(ge=0)]  # noqa: N815
    rayStartParams: dict[str, str] = {}  # noqa: N815
    template: PodTemplate

    @model_validator(mode="after")
    def _within_bounds(self) -> "WorkerGroup":
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas must be between minReplicas and maxReplicas")
        return self


class ClusterSpec(Strict):
    rayVersion: str  # noqa: N815
    authOptions: Authentication  # noqa: N815
    gcsFaultToleranceOptions: FaultTolerance  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: Autoscaler  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815

    @model_validator(mode="after")
    def _restarted_by_the_autoscaler_alone(self) -> "ClusterSpec":
        for template in self.templates():
            if self.autoscalerOptions.version == "v2" and template["spec"].get("restartPolicy", "Never") != "Never":
                raise ValueError("with autoscaler v2 the restartPolicy must be Never")
        return self

    def templates(self) -> list[PodTemplate]:
        return [self.headGroupSpec.template, *(group.template for group in self.workerGroupSpecs)]


class JobSpec(Strict):
    entrypoint: str
    entrypointNumCpus: Annotated[float, Field(ge=0, strict=False)]  # noqa: N815
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]  # noqa: N815
    backoffLimit: Annotated[int, Field(ge=0)]  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]  # noqa: N815
    runtimeEnvYAML: str  # noqa: N815
    rayClusterSpec: ClusterSpec  # noqa: N815


class Named(Strict):
    name: Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayJob"]
    metadata: Named
    spec: JobSpec


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: Named
    spec: ClusterSpec
