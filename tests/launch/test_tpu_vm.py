"""The TPU VM script: its exact commands, and runs with preemptions on hosts that are local folders."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launching import LAUNCH, environment, run, stand_in
from tests.helpers.tiny import ROOT

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the checkout's history")

NAMED = ["--name", "mine", "--zone", "us-west4-a"]
TRAIN = ["--", "--config=experiments/pretrain.py:large", "--workdir=gs://bucket/a b"]
QUEUED = "gcloud compute tpus queued-resources"
WORKER = "bash aimv2_jax/launch/worker.sh"
DRY_RUN = f"""\
{QUEUED} create mine --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite NODES --zone=us-west4-a
git -C CHECKOUT archive --format=tar.gz --output=/archives/FOLDER/aimv2_jax.tar.gz COMMIT
{QUEUED} scp /archives/FOLDER/aimv2_jax.tar.gz mine:aimv2_jax.tar.gz --node=all --worker=all --zone=us-west4-a
{QUEUED} ssh mine --node=all --worker=all '--command=mkdir -p aimv2_jax && tar -xzf aimv2_jax.tar.gz -C aimv2_jax && {WORKER} install' --zone=us-west4-a
{QUEUED} ssh mine --node=all --worker=all '--command={WORKER} start v5e SLICES --config=experiments/pretrain.py:large --workdir=gs://bucket/a\\ b' --zone=us-west4-a
{QUEUED} ssh mine --node=0 --worker=0 '--command={WORKER} follow' --zone=us-west4-a
{QUEUED} ssh mine --node=0 --worker=0 '--command={WORKER} code' --zone=us-west4-a
"""  # noqa: E501


def tpu_vm(*words: object, **variables: object):
    return run(["bash", LAUNCH / "tpu_vm.sh", *words], os.environ | {k: str(v) for k, v in variables.items()})


@needs_git
@pytest.mark.parametrize(
    ("flags", "slices", "nodes"),
    [
        ([], 1, "--node-id=mine"),
        (["--slices", 2, "--spot", "--flag", "--network=a"], 2, "--node-count=2 --node-prefix=mine --spot --network=a"),
    ],
)
def test_run_when_dry_then_the_commands_are_printed_and_none_is_run(flags, slices, nodes):
    done = tpu_vm("run", *NAMED, *flags, "--dry-run", *TRAIN, TMPDIR="/archives", PATH="/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "")
    output = re.sub(r" (HEAD|[0-9a-f]{40}) ?\n", " COMMIT\n", done.stdout.replace(f"{LAUNCH}/..", "CHECKOUT"))
    output = re.sub(r" +\n", "\n", output).replace("/archives/aimv2_jax.XXXXXX", "/archives/FOLDER")
    assert output == DRY_RUN.replace("NODES", nodes).replace("SLICES", str(slices))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["delete", *NAMED], f"{QUEUED} delete mine --force --quiet --zone=us-west4-a"),
        (["stop", *NAMED], f"{QUEUED} ssh mine --node=all --worker=all '--command={WORKER} stop' --zone=us-west4-a"),
        (
            ["start", *NAMED, "--mount", "a", "--mount", "b_1", "--", "--config=a.py"],
            "\n".join(
                f"{QUEUED} ssh mine --node=all --worker=all '--command={WORKER} {order}' --zone=us-west4-a"
                for order in ("mount a b_1", "start v5e 1 --config=a.py")
            ),
        ),
        (
            ["create", *NAMED, "--type", "v6e-256", "--reserved", "--project", "p"],
            f"{QUEUED} create mine --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e --node-id=mine"
            " --reserved --zone=us-west4-a --project=p",
        ),
    ],
)
def test_command_when_dry_then_printed(words, expected):
    done = tpu_vm(*words[:1], "--dry-run", *words[1:])
    assert (done.returncode, [line.strip() for line in done.stdout.splitlines()]) == (0, expected.splitlines())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no such command"),
        (["rent"], "rent"),
        (["run", "--zone", "a", *TRAIN], "--name is missing"),
        (["run", "--name", "a", *TRAIN], "--zone is missing"),
        (["run", *NAMED], "nothing to start"),
        (["create", *NAMED, "--slices", "0"], "'0'"),
        (["create", *NAMED, "--type", "v9-8"], "v9-8"),
        (["create", *NAMED, "--chips", "8"], "--chips"),
        (["create", "--name", "--project=evil", "--zone", "a"], "'--project=evil'"),
        (["create", "--name", "Mine", "--zone", "a"], "'Mine'"),
        (["create", "--name", "a", "--zone", "a;b"], "'a;b'"),
        (["create", *NAMED, "--type", "v4-8 x"], "'v4-8 x'"),
        (["create", *NAMED, "--mount", "gs://a"], "'gs://a'"),
        (["create", *NAMED, "--mount", "a;b"], "'a;b'"),
        (["create", "--name"], "--name needs a value"),
    ],
)
def test_command_when_its_flags_are_wrong_then_one_line_and_code_2(words, expected):
    done = tpu_vm(*words, "--dry-run") if words != ["create", "--name"] else tpu_vm(*words)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


# A fake gcloud: a queued resource with two folders as its hosts and its state in a file.
GCLOUD = """
shift 3
echo "$1 ${*: -2:1}" >>"$CLOUD/calls"
hosts() { if [[ "$*" == *--worker=all* ]]; then echo "$CLOUD"/host*; else echo "$CLOUD/host0"; fi; }
case "$1" in
create) mkdir -p "$CLOUD/host0" "$CLOUD/host1"; echo ACTIVE >"$CLOUD/state" ;;
delete) rm -rf "$CLOUD"/host* "$CLOUD/state" ;;
describe) cat "$CLOUD/state" 2>/dev/null ;;
scp)
  stat -c "%a" "$2" "${2%/*}" >>"$CLOUD/modes"
  for host in $(hosts "$@"); do cp "$2" "$host/aimv2_jax.tar.gz"; done
  ;;
ssh)
  for word in "$@"; do [[ $word == --command=* ]] && order=${word#--command=}; done
  order=${order% && *install} # Skip the installation.
  if [[ $order == *code && -f "$CLOUD/unreachable" ]]; then rm "$CLOUD/unreachable"; exit 255; fi
  if [[ $order == *over && -f "$CLOUD/not_over" ]]; then exit 255; fi
  for host in $(hosts "$@"); do (cd "$host" && HOST=${host##*/host} bash -c "$order") || exit; done
  ;;
esac
"""
# A fake trainer. $ENDS has one word for each start: an exit code, or "preempted" for all hosts.
TRAINER = """
echo "$*" >>"$CLOUD/started$HOST"
echo "$AIMV2_JAX_SECRET" >>"$CLOUD/secrets$HOST"
words=($ENDS)
end=${words[$(($(wc -l <"$CLOUD/started$HOST") - 1))]}
command -p sleep 0.3
if [ "$end" = preempted ]; then
  echo SUSPENDED >"$CLOUD/state"
  kill -KILL $PPID
  exit 1
fi
exit "$end"
"""
# Reaps orphans at once, as the init of a TPU VM does: `tail --pid` follows a process until it is reaped.
INIT = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
script = subprocess.Popen(sys.argv[1:])
while True:
    pid, status = os.wait()
    if pid == script.pid:
        sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs the script on the fake cloud, where runs end as in `ends`; returns the result and gcloud's calls."""
    programs = tmp_path / "programs"
    stand_in(programs, "gcloud", GCLOUD)
    stand_in(programs, "sleep", "command -p sleep 0.05")  # What the scripts wait for comes at once.
    trainer = stand_in(programs, "trainer", TRAINER)

    def ran(command: str, ends: str, *words: object):
        variables = {"CLOUD": tmp_path, "PYTHON": trainer, "ENDS": ends, "POLL_S": 0.1, "TMPDIR": tmp_path}
        script = ["bash", LAUNCH / "tpu_vm.sh", command, *NAMED, *words]
        done = run([sys.executable, "-c", INIT, *script], environment(programs, **variables))
        return done, (tmp_path / "calls").read_text()

    return ran


def starts(folder: Path, host: int) -> list[str]:
    return (folder / f"started{host}").read_text().splitlines()


@needs_git
@pytest.mark.parametrize(
    ("ends", "code", "count"),
    [("75 2 0", 2, 2), ("1 0", 1, 1), ("137 75 134 0", 0, 4), ("137 137 137 137 137 137 0", 137, 6)],
)
def test_run_when_the_trainer_ends_then_started_again_if_that_can_help(ends, code, count, cloud, tmp_path):
    (tmp_path / "unreachable").touch()  # One query fails; the script repeats it.
    done, calls = cloud("run", ends, *TRAIN)
    assert done.returncode == code, done.stderr
    command = "-m aimv2_jax.main --config=experiments/pretrain.py:large --workdir=gs://bucket/a b"
    for host in range(2):
        assert starts(tmp_path, host) == [command] * count
    assert (calls.count("create"), calls.count("delete"), calls.count("scp")) == (1, 0, 1)
    assert (tmp_path / "modes").read_text().split()[1] == "700"  # The archive is private: it holds uncommitted changes.
    assert not list(tmp_path.glob("aimv2_jax.*"))


@needs_git
@pytest.mark.parametrize("code", [75, 137])
def test_run_when_hosts_may_still_be_at_work(code, cloud, tmp_path):
    """If a host does not confirm that its trainer has ended, no new one is started."""
    (tmp_path / "not_over").touch()
    done, _ = cloud("run", f"{code} 0", *TRAIN)
    assert done.returncode == 255 and len(starts(tmp_path, 0)) == 1


@needs_git
def test_run_recreates_preempted_tpu(cloud, tmp_path):
    """A preempted TPU is created again, and the run continues."""
    done, calls = cloud("run", "75 preempted 0", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert [len(starts(tmp_path, host)) for host in range(2)] == [3, 3]
    secrets = [(tmp_path / f"secrets{host}").read_text().split() for host in range(2)]
    # Each start has a new secret.
    assert secrets[0] == secrets[1] and [len(secret) for secret in set(secrets[0])] == [32] * 3
    assert (calls.count("create"), calls.count("delete"), calls.count("scp")) == (2, 1, 2)
    assert calls.index("delete") < calls.rindex("create") < calls.rindex("scp")


@needs_git
def test_run_again_reuses_existing_tpu(cloud, tmp_path):
    """A second call of `run` continues on the TPU that exists."""
    cloud("run", "1 0", *TRAIN)
    done, calls = cloud("run", "1 0", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert calls.count("create") == 1 and len(starts(tmp_path, 0)) == 2


@needs_git
def test_follow_when_the_tpu_is_preempted_then_code_75_and_nothing_is_rented(cloud):
    _, before = cloud("run", "1 preempted", *TRAIN)
    cloud("start", "1 preempted", *TRAIN)
    done, calls = cloud("follow", "1 preempted")
    assert done.returncode == 75 and "was preempted" in done.stderr
    assert calls.count("create") == before.count("create") == 1


@pytest.fixture
def host(tmp_path):
    """Calls worker.sh in one host's checkout, with a fake trainer that exits with 75 on SIGTERM."""
    checkout = tmp_path / "aimv2_jax/launch"
    checkout.mkdir(parents=True)
    for script in ("worker.sh", "xla_flags.sh"):
        (checkout / script).write_text((LAUNCH / script).read_text())
    body = 'echo "$* $LIBTPU_INIT_ARGS"; trap "exit 75" TERM; touch ready; while :; do sleep 0.05; done'
    variables = environment(tmp_path, PYTHON=stand_in(tmp_path, "trainer", body), OVER_S=20, LIBTPU_INIT_ARGS="--mine")
    yield lambda *words: run(["bash", checkout / "worker.sh", *words], variables)
    run(["bash", checkout / "worker.sh", "stop"], variables)


def start_one(host, folder: Path) -> None:
    assert host("start", "v6e", 2, "--config=a.py", "--workdir=a b").returncode == 0
    deadline = time.monotonic() + 20
    while not (folder / "aimv2_jax/ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_worker_stop_saves_and_records_exit_code(host, tmp_path):
    """A stopped worker lets the run save, and the exit code of the run is recorded."""
    start_one(host, tmp_path)
    assert host("code").stdout == "running\n"
    again = host("start", "v6e", 2)
    assert again.returncode == 2 and "is going on" in again.stderr
    assert host("stop").returncode == host("over").returncode == 0
    assert host("code").stdout == "75\n"
    log = (tmp_path / "aimv2_jax_run/log").read_text()
    assert log.startswith("-m aimv2_jax.main --config=a.py --workdir=a b --megascale") and log.endswith("--mine\n")
    assert "--config=a.py" in host("follow").stdout  # `follow` returns because the run is over.


def test_worker_when_its_host_crashed_then_the_run_is_lost(host, tmp_path):
    start_one(host, tmp_path)
    pid = int((tmp_path / "aimv2_jax_run/pid").read_text())
    os.killpg(pid, signal.SIGKILL)
    assert host("over").returncode == 0
    assert host("code").stdout == "lost\n"


def test_worker_mounts_buckets_once(host, tmp_path):
    """Each bucket is mounted read-only at /mnt/BUCKET, unless it is mounted already; a failed mount is an error."""
    stand_in(tmp_path, "sudo", 'echo "$@" >>sudo')
    stand_in(tmp_path, "mountpoint", 'grep -qs " $2$" mounts')
    stand_in(tmp_path, "gcsfuse", 'echo "$@" >>mounts; [[ "$*" != *broken* ]]')
    assert host("mount", "one", "two").returncode == host("mount", "one").returncode == 0
    options = "-o ro --implicit-dirs --metadata-cache-ttl-secs=-1"
    folder = tmp_path / "aimv2_jax"
    assert (folder / "mounts").read_text() == "".join(f"{options} {name} /mnt/{name}\n" for name in ("one", "two"))
    owned = f"install -d -o {os.getuid()}"
    assert (folder / "sudo").read_text() == "".join(f"{owned} /mnt/{name}\n" for name in ("one", "two"))
    assert host("mount", "broken").returncode != 0
