"""The Helm values: keys that the chart knows, one image everywhere, an identity for every pod and no password."""

import json
import re
from typing import Any

import pytest
import yaml

from aoai_usage_pipeline_tests.conftest import ROOT

VALUES = yaml.safe_load((ROOT / "infra/kubernetes/values.yaml").read_text())
POD = "affinity annotations env envConfigMaps envSecrets image labels nodeSelector podSecurityContext resources schedulerName securityContext tolerations"
# what the chart reads at 1.13, by the path of the mapping, as far as the values go into it; below the others anything is Kubernetes' own
CHART = {
    "": "additionalInstanceConfig busybox computeLogManager dagster-user-deployments dagsterDaemon dagsterWebserver extraManifests flower"
    " generateCeleryConfigSecret generatePostgresqlPasswordSecret global imagePullSecrets ingress migrate pipelineRun postgresql pythonLogs rabbitmq"
    " rbacEnabled redis retention runLauncher scheduler serviceAccount telemetry",
    "global": "celeryConfigSecretName dagsterHome dagsterInstanceConfigMap fullnameOverride nameOverride postgresqlAuthWifEnabled"
    " postgresqlSecretName serviceAccountName",
    "serviceAccount": "annotations create name",
    "postgresql": "authProvider enabled image postgresqlDatabase postgresqlHost postgresqlParams postgresqlPassword postgresqlScheme"
    " postgresqlUsername service",
    "postgresql.authProvider": "awsRegion azureScope type",
    "dagsterWebserver": f"{POD} dbPoolMaxOverflow dbPoolRecycle dbStatementTimeout deploymentLabels enableReadOnly initContainerResources"
    " livenessProbe logLevel nameOverride pathPrefix readinessProbe replicaCount service startupProbe volumeMounts volumes workspace",
    "dagsterWebserver.service": "annotations port type",
    "dagsterDaemon": f"{POD} deploymentLabels enabled heartbeatTolerance initContainerResources livenessProbe readinessProbe runCoordinator"
    " runMonitoring runRetries schedules sensors startupProbe volumeMounts volumes",
    "dagsterDaemon.runCoordinator": "config enabled type",
    "dagsterDaemon.runCoordinator.config": "customRunCoordinator queuedRunCoordinator",
    "dagsterDaemon.runCoordinator.config.queuedRunCoordinator": "dequeueIntervalSeconds dequeueNumWorkers dequeueUseThreads maxConcurrentRuns"
    " tagConcurrencyLimits",
    "dagsterDaemon.runMonitoring": "cancelTimeoutSeconds enabled freeSlotsAfterRunEndSeconds maxResumeRunAttempts maxRuntimeSeconds"
    " pollIntervalSeconds startTimeoutSeconds",
    "dagsterDaemon.sensors": "numSubmitWorkers numWorkers useThreads",
    "dagsterDaemon.schedules": "numSubmitWorkers numWorkers useThreads",
    "dagster-user-deployments": "deployments enableSubchart enabled imagePullSecrets",
    "dagster-user-deployments.deployments": f"{POD} codeServerArgs dagsterApiGrpcArgs deploymentNamespace includeConfigInLaunchedRuns"
    " initContainers livenessProbe name port readinessProbe sidecarContainers startupProbe volumeMounts volumes",
    "runLauncher": "config type",
    "runLauncher.config": "celeryK8sRunLauncher customRunLauncher k8sRunLauncher",
    "runLauncher.config.k8sRunLauncher": "envConfigMaps envSecrets envVars failPodOnRunFailure image imagePullPolicy jobNamespace kubeconfigFile"
    " labels loadInclusterConfig resources runK8sConfig schedulerName securityContext volumeMounts volumes",
    "runLauncher.config.k8sRunLauncher.runK8sConfig": "containerConfig jobMetadata jobSpecConfig podSpecConfig podTemplateSpecMetadata",
    "computeLogManager": "config type",
    "retention": "autoMaterialize enabled schedule sensor",
    "retention.sensor": "purgeAfterDays",
    "retention.schedule": "purgeAfterDays",
    "telemetry": "enabled",
}


def test_the_chart_knows_every_key():
    visited: set[str] = set()

    def visit(values: Any, path: str) -> None:
        for one in values if isinstance(values, list) else [values]:
            if path not in CHART or not isinstance(one, dict):
                return
            visited.add(path)
            assert not set(one) - set(CHART[path].split()), f"{path}: unknown to the chart"
            for key, value in one.items():
                visit(value, f"{path}.{key}".lstrip("."))

    visit(VALUES, "")
    assert visited == set(CHART)


def _pods() -> list[dict[str, Any]]:
    return [VALUES["dagsterWebserver"], VALUES["dagsterDaemon"], *VALUES["dagster-user-deployments"]["deployments"]]


def test_every_pod_has_the_image_the_identity_and_no_root():
    assert len({json.dumps(pod["image"]) for pod in _pods()}) == 1
    launcher = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    runs = {"labels": launcher["runK8sConfig"]["podTemplateSpecMetadata"]["labels"]} | {
        "podSecurityContext": launcher["runK8sConfig"]["podSpecConfig"]["securityContext"],
        "securityContext": launcher["securityContext"],
    }
    for pod in (*_pods(), runs):
        assert pod["labels"] == {"azure.workload.identity/use": "true"}
        assert pod["podSecurityContext"]["runAsNonRoot"] and pod["podSecurityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["allowPrivilegeEscalation"] is False
    assert VALUES["global"]["postgresqlAuthWifEnabled"] and not VALUES["generatePostgresqlPasswordSecret"]
    assert "postgresqlPassword" not in VALUES["postgresql"]


def test_it_is_the_same_instance_as_on_container_apps():
    instance = yaml.safe_load((ROOT / "infra/dagster/dagster.yaml").read_text())
    database = instance["storage"]["postgres"]
    assert database["auth_provider"].keys() == {VALUES["postgresql"]["authProvider"]["type"]}
    assert database["postgres_db"]["scheme"] == VALUES["postgresql"]["postgresqlScheme"]
    assert instance["compute_logs"]["class"] == VALUES["computeLogManager"]["type"]
    assert instance["retention"]["sensor"]["purge_after_days"] == VALUES["retention"]["sensor"]["purgeAfterDays"]
    assert VALUES["global"]["dagsterHome"] in re.findall(r"DAGSTER_HOME=(\S+)", (ROOT / "Dockerfile").read_text())


def test_the_environment_consists_of_documented_settings():
    documented = (ROOT / "docs/settings.md").read_text()
    for name in VALUES["dagster-user-deployments"]["deployments"][0]["env"]:
        assert f"`{name}`" in documented, name


@pytest.mark.slow
def test_the_launcher_that_the_chart_configures_can_be_made(tmp_path):
    """The chart hands these on in snake case; what they hold is checked against Kubernetes' own models."""
    from dagster._serdes import ConfigurableClassData
    from dagster_k8s import K8sRunLauncher

    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    kubeconfig = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig | {"current-context": "c"}))
    launcher = VALUES["runLauncher"]["config"]["k8sRunLauncher"]

    def snake(text: str) -> str:
        return re.sub("([A-Z])", r"_\1", text).lower()

    config = {snake(key): value for key, value in launcher.items() if key != "runK8sConfig"}
    config |= {"load_incluster_config": False, "kubeconfig_file": str(tmp_path / "kubeconfig"), "dagster_home": VALUES["global"]["dagsterHome"]}
    config |= {"run_k8s_config": {snake(key): value for key, value in launcher["runK8sConfig"].items()}, "instance_config_map": "dagster-instance"}
    config |= {"service_account_name": VALUES["global"]["serviceAccountName"], "job_namespace": "default"}
    made = ConfigurableClassData("dagster_k8s", "K8sRunLauncher", yaml.safe_dump(config)).rehydrate(as_type=K8sRunLauncher)
    assert made.run_k8s_config["pod_template_spec_metadata"]["labels"] == {"azure.workload.identity/use": "true"}
