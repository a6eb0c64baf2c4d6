from pathlib import Path

import pytest

from msae_sweep.errors import ConfigError
from msae_sweep.track.uri import artifact_root, redact, resolve_uri


def test_the_file_or_option_wins_over_the_environment_and_that_over_the_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environ = {"MLFLOW_TRACKING_URI": "http://tracking:5000"}
    assert resolve_uri("https://mine", environ) == "https://mine"
    assert resolve_uri(None, environ) == "http://tracking:5000"
    assert resolve_uri(None, {}) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_sqlite_path_does_not_depend_on_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///sub/a.db?timeout=5", {}) == f"sqlite:///{tmp_path}/sub/a.db?timeout=5"
    assert resolve_uri("sqlite:////var/a.db", {}) == "sqlite:////var/a.db"


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/var/mlruns", "file:///var/mlruns"])
def test_a_folder_is_refused_with_what_to_write_instead(uri):
    with pytest.raises(ConfigError, match=r"sqlite:///mlflow\.db"):
        resolve_uri(uri, {})


@pytest.mark.parametrize(
    "uri",
    [
        "http://h:5000", "HTTPS://h", "http://[::1]:5000", "postgresql://u:p@h/db", "postgresql+psycopg2:///db",
        "mysql+pymysql://h/db", "mssql+pyodbc://h/db", "databricks", "databricks://profile", "databricks-uc", "uc:http://h",
    ],
)  # fmt: skip
def test_what_mlflow_understands_passes_unchanged(uri):
    assert resolve_uri(uri, {}) == uri


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("foo://bar", "foo://bar: MLflow does not support the scheme foo; write sqlite:///mlflow.db"),
        ("localhost:5000", "does not support the scheme localhost; .* the http:// address"),
        ("postgres://h/db", "does not support the scheme postgres"),
        ("foo://me:secret@bar", r"foo://\*\*\*@bar: "),
        ("http://", "http:// has no host"),
        ("http:///path", "has no host"),
        ("http://:5000", "has no host"),
        ("https://h:99999", "no valid port"),
        ("http://[::1", "has no host"),
        ("http://me:secret@", r"http://\*\*\*@ has no host"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:mlflow.db", "three slashes"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "in memory would be lost"),
    ],
)
def test_what_mlflow_cannot_use_is_refused_in_one_line_without_secrets(uri, says):
    with pytest.raises(ConfigError, match=says) as caught:
        resolve_uri(uri, {})
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_schemes_are_those_that_mlflow_registers():
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    for scheme in set(_tracking_store_registry._registry) - {"", "file", "sqlite"}:
        assert resolve_uri(f"{scheme}://h/db", {})


def test_a_plugins_scheme_is_known(monkeypatch):
    class Entry:
        name = "foo"

    monkeypatch.setattr("msae_sweep.track.uri.entry_points", lambda group: [Entry] * (group == "mlflow.tracking_store"))
    assert resolve_uri("foo://bar", {}) == "foo://bar"


def test_only_a_sqlite_file_gets_its_artifacts_beside_it():
    assert artifact_root("sqlite:////var/a b/mlflow.db") == Path("/var/a b/mlartifacts").as_uri()
    assert artifact_root("http://h:5000") is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("http://me:p@ss@host", "http://***@host"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ('{"yaml": "uri: http://a:b@h\\nmail: x@y"}', '{"yaml": "uri: http://***@h\\nmail: x@y"}'),
        ("http://host/path@version and me@example.org", "http://host/path@version and me@example.org"),
        ('{"a": "http://h\\nmail: x@y"}', '{"a": "http://h\\nmail: x@y"}'),
    ],
)
def test_secrets_of_uris_are_hidden_and_nothing_else(text, shown):
    assert redact(text) == shown


def test_a_server_that_is_not_there_is_said_in_a_few_words():
    from msae_sweep.track.connection import one_line

    wrapped = (
        "API request to http://me:pw@mlflow:5000/api/2.0/mlflow/runs/create failed with exception "
        "HTTPConnectionPool(host='mlflow', port=5000): Max retries exceeded (Caused by NewConnectionError())"
    )
    assert one_line(RuntimeError(wrapped)) == "no answer from http://***@mlflow:5000"
    assert one_line(RuntimeError("something\n else")) == "something else"
