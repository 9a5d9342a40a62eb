"""A Kubernetes API server on an empty etcd, without nodes: it stores what it is given after admission and validation, and runs nothing.

Both listen on free ports of 127.0.0.1, with certificates made here. Ready after some seconds; 300 MB.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import signal
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.ports import free_ports
from tests.chart.rendering import NAMESPACE
from tests.chart.tools import Tools
from tests.helpers import wait_until

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
KUBECTL_TIMEOUT_S = 120
RESTRICTED = {"pod-security.kubernetes.io/warn": "restricted", "pod-security.kubernetes.io/enforce": "restricted"}


@dataclass(frozen=True)
class ApiServer:
    """Answers kubectl as an administrator."""

    kubectl_path: Path
    config: Path

    def kubectl(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(self.kubectl_path), f"--kubeconfig={self.config}", f"--namespace={NAMESPACE}", *arguments]
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=KUBECTL_TIMEOUT_S, check=False)

    def try_apply(self, text: str) -> subprocess.CompletedProcess[str]:
        """What the server would say to these manifests; it keeps none. A warning, of a pod that isn't restricted for one, is an error."""
        options = ("--dry-run=server", "--validate=strict", "--warnings-as-errors")
        return self.kubectl("apply", *options, "-f", "-", text=text)


@contextlib.contextmanager
def serve(tools: Tools, folder: Path) -> Iterator[ApiServer]:
    """With the operator's kinds and a namespace that takes restricted pods only."""
    make_certificates(folder)
    etcd_port, peer_port, port = free_ports(3)
    etcd = [str(tools.etcd), f"--data-dir={folder / 'etcd'}", f"--listen-client-urls=http://127.0.0.1:{etcd_port}"]
    etcd += [f"--advertise-client-urls=http://127.0.0.1:{etcd_port}", f"--listen-peer-urls=http://127.0.0.1:{peer_port}"]
    # Nothing here outlives the test.
    etcd += ["--unsafe-no-fsync", "--log-level=warn"]
    with running(etcd, folder / "etcd.log"), running(_command(tools, folder, etcd_port, port), folder / "apiserver.log") as api:
        found = ApiServer(tools.kubectl, folder / "config")
        found.config.write_text(_kubeconfig(folder, port))
        _wait(folder, port, api)
        for path in tools.definitions:
            _checked(found.kubectl("create", "-f", str(path)))
        _checked(found.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"))
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": RESTRICTED}}
        _checked(found.kubectl("create", "-f", "-", text=yaml.safe_dump(namespace)))
        yield found


def _command(tools: Tools, folder: Path, etcd_port: int, port: int) -> list[str]:
    return [
        str(tools.apiserver),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        *("--bind-address=127.0.0.1", f"--secure-port={port}", "--endpoint-reconciler-type=none"),
        *(f"--tls-cert-file={folder / 'server.crt'}", f"--tls-private-key-file={folder / 'server.key'}"),
        *(f"--client-ca-file={folder / 'ca.crt'}", f"--cert-dir={folder}"),
        *(f"--service-account-key-file={folder / 'account.key'}", f"--service-account-signing-key-file={folder / 'account.key'}"),
        *("--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/16"),
        *("--authorization-mode=RBAC", "--profiling=false", "--v=0"),
    ]


@contextlib.contextmanager
def running(argv: list[str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, however the block ends."""
    with log_path.open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(folder: Path, port: int, api: subprocess.Popen[bytes]) -> None:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.load_cert_chain(folder / "admin.crt", folder / "admin.key")

    def ready() -> bool:
        if api.poll() is not None:
            raise RuntimeError(f"the API server has ended: {(folder / 'apiserver.log').read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/readyz", timeout=5, context=context):
                return True
        except OSError:
            return False

    wait_until(ready, READY_TIMEOUT_S, "the API server is ready")


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def _kubeconfig(folder: Path, port: int) -> str:
    user = {"client-certificate": str(folder / "admin.crt"), "client-key": str(folder / "admin.key")}
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(folder / "ca.crt")}
    context = {"cluster": "here", "user": "admin"}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "here", "context": context}],
            "current-context": "here",
        }
    )


def make_certificates(folder: Path) -> None:
    """ca, server and admin (of the group system:masters), and the key that accounts' tokens are signed with. Valid for a day."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fraudgate test CA")])
    ca = _builder(ca_name, ca_name, ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = ca.sign(ca_key, hashes.SHA256())
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for name, groups, usage in (
        ("server", [], ExtendedKeyUsageOID.SERVER_AUTH),
        ("admin", ["system:masters"], ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = _builder(subject, ca_name, key).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        signed = made.add_extension(loopback, critical=False).sign(ca_key, hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(_pem(key))
    (folder / "account.key").write_bytes(_pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
