"""The JobSet: valid API fields and values, restarts only for some exit codes, and the trainer's command."""

from __future__ import annotations

import math
import re
import subprocess

import pytest
import yaml

from tests.helpers.launching import LAUNCH, environment, run, stand_in
from tests.helpers.tiny import ROOT

WORDS = {"$IMAGE": "image", "$CONFIG": "experiments/pretrain.py:large", "$WORKDIR": "gs://bucket/run"}
# Fields in use of jobset.x-k8s.io/v1alpha2 (api/jobset/v1alpha2/jobset_types.go) and of batch/v1.
FIELDS = {
    "spec": {"replicatedJobs", "network", "successPolicy", "failurePolicy", "suspend", "ttlSecondsAfterFinished"},
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rule": {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs"},
    "replicatedJob": {"name", "groupName", "template", "replicas", "dependsOn"},
    "job": {"completionMode", "parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"},
}
JOBSET_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
JOB_FAILURE_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}
POD_ACTIONS = {"FailJob", "Ignore", "Count", "FailIndex"}


# Message of a Job that failed by its podFailurePolicy (pkg/controller/job/pod_failure_policy.go of Kubernetes).
FAILED = (
    "Container train for pod default/aimv2-slice-0-5-x7 failed with exit code {code} matching FailJob rule at index 1"
)


def filled(words: dict[str, str], sed: str = "") -> dict:
    """Returns the JobSet after `sed` and `envsubst`, which inserts values verbatim."""
    text = run(["sed", sed, LAUNCH / "gke_jobset.yaml"]).stdout
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for word, value in words.items():
        assert body.count(word) == 1
        text = text.replace(word, value)
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def jobset() -> dict:
    return filled(WORDS)


@pytest.fixture(scope="module")
def job(jobset) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.fixture(scope="module")
def container(job) -> dict:
    [container] = job["template"]["spec"]["containers"]
    return container


def test_jobset_when_read_then_its_fields_and_values_are_those_of_the_api(jobset, job, container):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    [replicated] = spec["replicatedJobs"]
    parts = {"spec": spec, "network": spec["network"], "failurePolicy": spec["failurePolicy"]}
    parts |= {"replicatedJob": replicated, "job": job}
    for name, part in parts.items():
        assert set(part) <= FIELDS[name], name
    for rule in spec["failurePolicy"]["rules"]:
        assert set(rule) <= FIELDS["rule"] and rule["action"] in JOBSET_ACTIONS
        assert set(rule["onJobFailureReasons"]) <= JOB_FAILURE_REASONS
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in POD_ACTIONS
        codes = rule.get("onExitCodes", {"containerName": container["name"], "operator": "In", "values": [1]})
        assert codes["containerName"] == container["name"] and codes["operator"] in {"In", "NotIn"}
    # Required by Kubernetes for a Job with a podFailurePolicy, and by GKE for one on TPUs.
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["completionMode"] == "Indexed"


def test_jobset_when_read_then_a_slice_has_a_pod_for_each_of_its_hosts(job, container):
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]


def outcome(jobset: dict, job: dict, code: int, disrupted: bool) -> str:
    """Returns the JobSet's action when one pod ends this way, by the rules in their order."""
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            matches = disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        else:
            inside = code in rule["onExitCodes"]["values"]
            matches = inside == (rule["onExitCodes"]["operator"] == "In")
        if matches:
            reason = "PodFailurePolicy" if rule["action"] == "FailJob" else reason
            break
    assert job["backoffLimit"] == 0  # One counted pod fails its Job.
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, FAILED.format(code=code)) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "expected"),
    [
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # Its host was preempted before it could save.
        (137, False, "RestartJobSet"),  # Out of memory: counted, at most ten restarts.
        (134, False, "RestartJobSet"),
        (139, False, "RestartJobSet"),
        (4, False, "FailJobSet"),
        (13, False, "FailJobSet"),
        (1, False, "FailJobSet"),
        (2, False, "FailJobSet"),
        (3, False, "FailJobSet"),
    ],
)
def test_jobset_when_a_pod_ends_then_started_again_if_that_can_help(code, disrupted, expected, jobset, job):
    assert outcome(jobset, job, code, disrupted) == expected
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10


def test_jobset_takes_any_character_in_its_words():
    words = {"$IMAGE": "r/image:1", "$CONFIG": "my: config's.py", "$WORKDIR": 'gs://b/run #1 "x" {y}'}
    container = filled(words)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "r/image:1"
    assert container["args"] == ["--config=my: config's.py", '--workdir=gs://b/run #1 "x" {y}']


def pod_template(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_jobset_mounts_bucket_where_asked(jobset, container):
    """The documented sed command mounts a bucket by GKE's driver, read-only; without it the pods mount nothing."""
    [sed] = re.findall(r"sed '(.*)' launch/gke_jobset.yaml", (LAUNCH / "gke_jobset.yaml").read_text())
    plain, mounted = pod_template(jobset), pod_template(filled(WORDS, sed.replace("BUCKET/BUCKET", "BUCKET/mine")))
    assert "volumes" not in plain["spec"] and "volumeMounts" not in container
    assert mounted.pop("metadata") == {"annotations": {"gke-gcsfuse/volumes": "true"}}  # A string, as the API wants.
    [volume] = mounted["spec"].pop("volumes")
    [mount] = mounted["spec"]["containers"][0].pop("volumeMounts")
    assert mounted == plain  # Nothing else changes.
    attributes = volume["csi"].pop("volumeAttributes")
    assert volume == {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True}}
    assert attributes["bucketName"] == "mine" and "implicit-dirs" in attributes["mountOptions"].split(",")
    assert mount == {"name": volume["name"], "mountPath": "/mnt/mine", "readOnly": True}


def test_pods_run_as_readmes_service_account(jobset):
    """The pods' service account is the one that the README creates and gives its roles."""
    account = pod_template(jobset)["spec"]["serviceAccountName"]
    readme = (ROOT / "README.md").read_text()
    assert f"kubectl create serviceaccount {account}\n" in readme and f"/subject/ns/default/sa/{account}" in readme


def test_container_has_no_privileges_beyond_locking_memory(container):
    context = container["securityContext"]
    assert "privileged" not in context and context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["SYS_RESOURCE"]}


def test_image_holds_what_git_tracks_of_the_package_only():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"  # Everything is excluded except the patterns that follow.
    included = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert {"aimv2_jax", "launch", "setup.py", "README.md", "LICENSE"} <= set(included)
    assert all((ROOT / name).exists() for name in included) and not {".git", ".venv", "runs", "tests"} & set(included)
    assert "USER aimv2" in (LAUNCH / "Dockerfile").read_text()


@pytest.mark.parametrize("slices", [1, 2])
def test_container_when_started_then_it_becomes_the_trainer_with_the_flags_of_its_generation(
    slices, container, tmp_path
):
    stand_in(tmp_path, "python", 'echo $$; echo "$@"; echo "$LIBTPU_INIT_ARGS"')
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    if slices > 1:
        variables["MEGASCALE_NUM_SLICES"] = slices  # GKE sets it in pods of several slices.
    command = [*container["command"], *container["args"]]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path, **variables), stdout=subprocess.PIPE, text=True
    ) as process:
        pid, arguments, flags = process.stdout.read().splitlines()
    assert int(pid) == process.pid  # SIGTERM reaches the trainer.
    assert arguments == f"-m aimv2_jax.main --config={WORDS['$CONFIG']} --workdir={WORDS['$WORKDIR']}"
    assert ("megascale" in flags) == (slices > 1)
