"""What is an address of a store, and what is refused."""

from pathlib import Path

import pytest

from dtr_ray.storage.address import (
    check_address,
    divided,
    is_url,
    joined,
    scratch_folder,
    without_secrets,
)

SECRET = "pl4nted-s3cret"


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "s3://bucket/a/b?region=eu-west-1", "gs://bucket/a", "file:///mnt/runs",
     "abfs://container@account.dfs.core.windows.net/runs"],
)  # fmt: skip
def test_addresses_of_stores(url: str):
    assert is_url(url)
    check_address(url)


@pytest.mark.parametrize("text", ["runs", "/mnt/runs", "./s3:/x", "~/runs", "C:/runs"])
def test_folders_are_no_addresses(text: str):
    assert not is_url(text)


REFUSED = {
    f"s3://KEY:{SECRET}@bucket/runs": "keys do not belong",
    f"s3://{SECRET}@bucket/runs": "keys do not belong",
    f"s3://bucket/runs?secret_key={SECRET}": "keys do not belong",
    f"abfs://me:{SECRET}@account.dfs.core.windows.net/runs": "keys do not belong",
    "s4://bucket/runs": "no store that is known",
    "s3:///runs": "names no bucket",
    "file://runs": "three slashes",
    "s3://bucket/../other": "no address",
    "s3://[bucket": "no address",
}


@pytest.mark.parametrize("url", REFUSED)
def test_an_address_is_refused_in_one_line_without_its_secrets(url: str):
    with pytest.raises(ValueError) as refused:
        check_address(url)
    said = str(refused.value)
    assert REFUSED[url] in said
    assert SECRET not in said
    assert "\n" not in said


def test_names_go_before_the_question_mark():
    url = joined("s3://bucket/runs/?region=x", "tiny", "trials")
    assert url == "s3://bucket/runs/tiny/trials?region=x"
    assert divided(url) == ("s3://bucket/runs/tiny?region=x", "trials")


def test_secrets_are_taken_out_of_a_librarys_words():
    said = without_secrets(f"no s3://KEY:{SECRET}@b/x nor https://b/?session_token={SECRET}&a=1")
    assert SECRET not in said
    assert "a=1" in said


def test_scratch_is_below_its_variable_and_driver_and_workers_are_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DTR_RAY_SCRATCH", str(tmp_path))
    driver, worker = (scratch_folder("s3://b/tiny?region=x", who) for who in ("driver", "worker"))
    assert driver.name == worker.name == "tiny"
    assert driver != worker
    assert driver.is_relative_to(tmp_path)
    assert scratch_folder("s3://c/tiny", "driver") != driver
