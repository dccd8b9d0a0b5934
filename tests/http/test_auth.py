"""API keys, tenants, CORS, TLS."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from presage.core.salt import salt_of
from presage.serve.auth import ApiKeys
from tests.http.echo import EchoEngine
from tests.http.server import served


@pytest.fixture(scope="module")
def echo() -> EchoEngine:
    """The engine whose inside these tests look at."""
    return EchoEngine()


@pytest.fixture(scope="module")
def base(echo: EchoEngine) -> Iterator[str]:
    """A server with keys of two tenants and one without."""
    with served(echo, api_key=["k1:acme", "k2:zeta", "k3"], allowed_origins=["https://app.example"]) as url:
        yield url


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic k1", "k1", "Bearer k1:acme", "Bearer \xff"])
def test_wrong_keys(base: str, header: str | None) -> None:
    headers = {"authorization": header.encode("latin-1")} if header else {}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/load"), ("GET", "/nowhere")):
        r = httpx.request(method, base + path, headers=headers)
        assert r.status_code == 401 and r.json()["error"]["code"] == "invalid_api_key"
        assert r.headers["www-authenticate"] == "Bearer" and r.headers["x-request-id"]


def test_official_client_raises_its_own_error(base: str) -> None:
    with openai.OpenAI(base_url=base + "/v1", api_key="bad") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/openapi.json"])
def test_open_paths(base: str, path: str) -> None:
    assert httpx.get(base + path).status_code == 200


def test_keys_are_tenants_with_their_own_salt(base: str, echo: EchoEngine) -> None:
    for key in ("k1", "k2", "k3", "k1"):
        r = httpx.post(base + "/v1/completions", json={"prompt": "x SAY:a"}, headers={"authorization": f"Bearer {key}"})
        assert r.status_code == 200
    first, second, third, again = echo.seen[-4:]
    assert (first.tenant, second.tenant, again.tenant) == ("acme", "zeta", "acme")
    assert third.tenant.startswith("key-") and "k3" not in third.tenant
    assert first.salt == again.salt and len({first.salt, second.salt, third.salt}) == 3


def test_salts_do_not_collide() -> None:
    assert salt_of("", None) == b""
    salts = [salt_of(*p) for p in (("a", None), ("ab", None), ("a", "b"), ("", "ab"), ("", "a"), ("1:a", None))]
    assert len(set(salts)) == len(salts)
    assert not ApiKeys([]) and ApiKeys(["x"]) and ApiKeys([]).tenant(None) == ""


def test_cors(base: str) -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = httpx.options(base + "/v1/completions", headers=asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in httpx.options(base + "/v1/completions", headers={**asked, "origin": "https://evil.example"}).headers
    refused = httpx.get(base + "/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"


def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    try:
        subprocess.run([*made, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl command here")
    with served(EchoEngine(), ssl_keyfile=str(key), ssl_certfile=str(cert)) as url:
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(url.replace("http:", "https:") + "/health", verify=trusted).json() == {"status": "ok"}
