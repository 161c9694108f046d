"""A database's address finds its driver and shows no password; one that does not answer is told in a line."""

import json

import pytest
from postgres import BINARIES, PASSWORD, USER
from service.shared_sweeps import sweep

from dtr_ray.search import database
from dtr_ray.search.database import check_database, database_url, public, without_password
from dtr_ray.search.state import save_config

needs_postgres = pytest.mark.skipif(BINARIES is None, reason="needs Debian's postgresql")


@needs_postgres
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_the_driver_that_is_installed_is_used(postgres, scheme, monkeypatch):
    assert database_url(postgres.url("postgres", scheme=scheme)).drivername == "postgresql+psycopg2"
    for variable in ("PGPASSWORD", database.PASSWORD):
        with monkeypatch.context() as patch:
            patch.setenv(variable, PASSWORD)
            check_database(postgres.url("postgres", None, scheme))


@pytest.mark.parametrize(
    ("backend", "mend"), [("postgresql", r"dtr_ray\[postgresql\]"), ("mysql", "pymysql")]
)
def test_a_missing_driver_is_told_in_a_line_with_how_to_get_it(backend, mend, monkeypatch):
    monkeypatch.setattr(database, "_is_installed", lambda module: False)
    with pytest.raises(
        ValueError, match=f"^{backend}://me@host/db needs a driver .*: pip install .*{mend}"
    ) as caught:
        check_database(f"{backend}://me:s3cret@host/db")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "driver"), [("psycopg2", "psycopg2"), ("psycopg", "psycopg"), ("pymysql", "pymysql")]
)
def test_whichever_driver_is_there_is_taken(module, driver, monkeypatch):
    monkeypatch.setattr(database, "_is_installed", lambda name: name == module)
    backend = "mysql" if module == "pymysql" else "postgresql"
    assert database_url(f"{backend}://me@host/db").drivername == f"{backend}+{driver}"


BAD = {
    "nobody listens": ("postgresql://me:s3cret/x@127.0.0.1:1/db", "Connection refused"),
    "no such host": ("postgresql://me:s3cret@nowhere.invalid/db", "could not translate host name"),
    "no address": ("me:s3cret@host", "no database's address"),
    "no port": ("postgresql://me:s3cret@host:port/db", "no database's address"),
    "an @ in the password": ("postgresql://me:s3@cret@host/db", "%40"),
    "no such database": ("oracel://me:s3cret@host/db", "does not answer"),
    "no folder": ("sqlite:////no/such/folder/s3cret.db", "unable to open"),
}


@pytest.mark.parametrize(("address", "reason"), BAD.values(), ids=list(BAD))
def test_a_database_that_cannot_be_had_is_told_in_a_line_without_the_password(address, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        check_database(address)
    assert "\n" not in str(caught.value)
    assert "me:" not in str(caught.value)
    assert caught.value.__cause__ is None


@needs_postgres
def test_a_sweep_with_a_wrong_password_ends_with_2_and_a_line_before_it_starts_anything(
    postgres, tmp_path, capsys
):
    from dtr_ray.sweep import main

    path = tmp_path / "space.yaml"
    config = sweep(postgres.url("postgres", "wr0ng-s3cret"), study_name=None).to_dict()
    path.write_text(json.dumps({**config, "name": "x"}))
    assert main([str(path), "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert f'password authentication failed for user "{USER}"' in said.err
    assert "s3cret" not in said.err + said.out
    assert not (tmp_path / "runs").exists()


def test_what_is_kept_and_logged_of_a_sweep_holds_no_password(tmp_path):
    config = sweep("postgresql://me:s3cret@host/db", tracking={"uri": "http://you:s3cret@mlflow:5000"})
    kept = public(config)
    assert kept["storage"]["study"] == "postgresql://me@host/db"
    assert kept["tracking"]["uri"] == "http://you@mlflow:5000"
    save_config(config, tmp_path)
    assert "s3cret" not in (tmp_path / "sweep.json").read_text()
    assert without_password("(u://a:b@c/d?password=e&f=g)") == "(u://a@c/d?password=***&f=g)"
