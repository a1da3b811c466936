"""
A real control plane: etcd, API server, controller manager and scheduler as plain processes on loopback.

TLS and Node + RBAC authorisation are on, as in a cluster; nodes there are none. Up in about five seconds.
Each process dies with the one that started it, and is stopped by its own pid, those that depend on others
first. All state lies below one directory; the logs stay there.
"""

import base64
import contextlib
import http.client
import json
import random
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.binaries import binary

PATIENCE = 120
"""Seconds that anything is waited for: a busy machine is no failure."""

_STOPPING = 15
_TAIL = 25
_TRIES = 3
_PORTS = range(20_000, 32_000)  # below those that the kernel hands out to whoever connects
_TOKENS = {
    "admin": ("admin", "system:masters"),
    "kcm": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "node1": ("system:node:node1", "system:nodes"),
}


class PlaneFailed(Exception):
    """A part of the control plane did not come up; the message ends with what it logged last."""


class _PortTaken(PlaneFailed):
    """Somebody was faster."""


@dataclass(frozen=True)
class Done:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


class ControlPlane:
    """One that runs. `kubectl` and `helm` act as its administrator."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.url = f"https://127.0.0.1:{port}"
        self.kubeconfig = self._pki("admin.kubeconfig")
        self.authority = self._pki("ca.crt")

    def _pki(self, name: str) -> Path:
        return self.directory / "pki" / name

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> Done:
        """Run kubectl. `given` is its standard input; with `check`, a failure is an AssertionError."""
        return self._run("kubectl", *arguments, given=given, check=check)

    def helm(self, *arguments: str, check: bool = True) -> Done:
        """Run helm, with a home of its own."""
        return self._run("helm", *arguments, given=None, check=check)

    def _run(self, program: str, *arguments: str, given: str | None, check: bool) -> Done:
        home = self.directory / "home"
        home.mkdir(exist_ok=True)
        ran = subprocess.run(
            [binary(program), *arguments],
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={"KUBECONFIG": str(self.kubeconfig), "HOME": str(home), "PATH": "/usr/bin:/bin"},
        )
        done = Done(ran.returncode, ran.stdout, ran.stderr)
        assert not check or done.code == 0, f"{program} {' '.join(arguments)} exits {done.code}:\n{done.said}"
        return done

    def get(self, *arguments: str) -> dict:
        """What `kubectl get ... -o json` answers."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json").out)

    def ask(
        self,
        path: str,
        given: object = None,
        *,
        method: str = "GET",
        token: str = "admin-token",
        patience: float = PATIENCE,
    ) -> tuple[int, str]:
        """Status and body of an answer of the API. `given` is sent as JSON. Status 0: nobody answers."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if given is None else json.dumps(given).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": kind},
        )
        return _answer(request, self.authority, patience)


def wait_until(true: Callable[[], object], what: str, *, patience: float = PATIENCE) -> None:
    """Poll until `true()`; an AssertionError names `what` was waited for."""
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, f"waited {patience:.0f} s for {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def control_plane(directory: Path, *, audited: Sequence[str] = ()) -> Iterator[ControlPlane]:
    """One below `directory`, for as long as the context lasts. Every request of the users `audited` is noted
    in its audit.log. Raises PlaneFailed."""
    with contextlib.ExitStack() as running:
        for attempt in range(1, _TRIES + 1):
            at = directory / f"try-{attempt}" if attempt > 1 else directory
            try:
                plane = running.enter_context(_started(at, audited))
                break
            except _PortTaken:
                if attempt == _TRIES:
                    raise
        yield plane


@contextlib.contextmanager
def _started(directory: Path, audited: Sequence[str]) -> Iterator[ControlPlane]:
    port, etcd, peer, kcm, scheduler = _free_ports(5)
    plane = ControlPlane(directory, port)
    pki = directory / "pki"
    _write_pki(pki, plane.url)
    with contextlib.ExitStack() as processes:

        def start(name: str, *flags: str) -> "_Process":
            return processes.enter_context(_running(directory, name, flags))

        client, other = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        store = start(
            "etcd", f"--data-dir={directory}/etcd", "--unsafe-no-fsync",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={other}", f"--initial-advertise-peer-urls={other}",
            f"--initial-cluster=default={other}",
        )  # fmt: skip
        server = start(
            "kube-apiserver", f"--etcd-servers={client}", "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1", f"--secure-port={port}",
            f"--tls-cert-file={pki}/api.crt", f"--tls-private-key-file={pki}/api.key",
            f"--token-auth-file={pki}/tokens.csv", "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            "--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
            f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--kubelet-client-certificate={pki}/kubelet-client.crt",
            f"--kubelet-client-key={pki}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP", *_audit(directory, audited),
        )  # fmt: skip
        # It takes connections long before it answers them: no look may last, or a death goes unseen.
        _wait(lambda: plane.ask("/readyz", patience=2) == (200, "ok"), server, [store, server])
        manager = start(
            "kube-controller-manager", *_identity(pki, "kcm"), "--bind-address=127.0.0.1",
            f"--secure-port={kcm}", f"--root-ca-file={pki}/ca.crt",
            f"--service-account-private-key-file={pki}/sa.key", "--use-service-account-credentials=true",
            "--leader-elect=false", "--controllers=*",
            f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key",
        )  # fmt: skip
        chooser = start(
            "kube-scheduler", *_identity(pki, "scheduler"), "--bind-address=127.0.0.1",
            f"--secure-port={scheduler}", "--leader-elect=false",
        )  # fmt: skip
        # Without it no pod is taken; it is the last thing to appear.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        _wait(lambda: plane.ask(account, patience=5)[0] == 200, manager, [store, server, manager, chooser])
        yield plane


def _identity(pki: Path, user: str) -> list[str]:
    return [
        f"--{what}kubeconfig={pki}/{user}.kubeconfig" for what in ("", "authentication-", "authorization-")
    ]


def _audit(directory: Path, users: Sequence[str]) -> list[str]:
    if not users:
        return []
    policy = {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": [*users]}, {"level": "None"}],
    }
    (directory / "audit.yaml").write_text(json.dumps(policy))
    return [f"--audit-policy-file={directory}/audit.yaml", f"--audit-log-path={directory}/audit.log"]


# ---- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    name: str
    process: subprocess.Popen
    log: Path

    def failure(self, what: str) -> PlaneFailed:
        lines = self.log.read_text(errors="replace").splitlines()
        kind = _PortTaken if any("address already in use" in line for line in lines) else PlaneFailed
        tail = "\n".join(f"  {line[:400]}" for line in lines[-_TAIL:])
        return kind(f"{self.name} {what}; the end of {self.log}:\n{tail}")


@contextlib.contextmanager
def _running(directory: Path, name: str, flags: tuple[str, ...]) -> Iterator[_Process]:
    log = directory / f"{name}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            # Killed with whoever started it: a test run that is killed leaves nothing.
            ["setpriv", "--pdeathsig", "KILL", binary(name), *flags],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
        )
    try:
        yield _Process(name, process, log)
    finally:
        process.terminate()
        try:
            process.wait(_STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(ready: Callable[[], bool], waited: _Process, running: list[_Process]) -> None:
    """Until `ready()`. When several of `running` have ended, the first is to blame: others depend on it."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        for each in running:
            if (code := each.process.poll()) is not None:
                raise each.failure(f"has ended (exit {code})")
        if time.monotonic() > deadline:
            raise waited.failure(f"is not ready after {PATIENCE} s")
        time.sleep(0.1)


def _answer(request: urllib.request.Request, authority: Path, patience: float) -> tuple[int, str]:
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with urllib.request.urlopen(request, context=context, timeout=patience) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.choice(_PORTS)
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


# ---- certificates and users ----------------------------------------------------------------------


def _write_pki(pki: Path, url: str) -> None:
    pki.mkdir(parents=True, mode=0o700)
    # The authority signs itself; SA keys sign the tokens of ServiceAccounts.
    _certificate(pki, "ca", "/CN=datacache-test-ca")
    hosts = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
    names = ",".join(("IP:127.0.0.1", "IP:10.0.0.1", *(f"DNS:{host}" for host in hosts)))
    _certificate(pki, "api", "/CN=kube-apiserver", "-addext", f"subjectAltName={names}", by="ca")
    _certificate(pki, "kubelet-client", "/O=system:masters/CN=apiserver-kubelet-client", by="ca")
    _openssl(pki, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", "sa.key")
    _openssl(pki, "pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    authority = base64.b64encode((pki / "ca.crt").read_bytes()).decode()
    rows = []
    for short, (user, group) in _TOKENS.items():
        token = f"{short}-token"
        rows.append(f'{token},{user},{short},"{group}"' if group else f"{token},{user},{short}")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority-data": authority}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "d", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
            "current-context": "d",
        }
        (pki / f"{short}.kubeconfig").write_text(json.dumps(config))
        (pki / f"{short}.kubeconfig").chmod(0o600)
    (pki / "tokens.csv").write_text("\n".join(rows) + "\n")


def _certificate(pki: Path, name: str, subject: str, *more: str, by: str = "") -> None:
    signed = ["-CA", f"{by}.crt", "-CAkey", f"{by}.key"] if by else []
    _openssl(
        pki, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "30", "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.crt", *signed, *more,
    )  # fmt: skip


def _openssl(pki: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments],
        cwd=pki,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise PlaneFailed(f"openssl {arguments[0]} exits {done.returncode}: {done.stderr.strip()[-500:]}")
