"""Does ``quantcache doctor`` say what would run here, and why?"""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from quantcache.backends import cpu, dispatch
from quantcache.cli import doctor
from quantcache.cli.main import app
from quantcache.layers.releases import TESTED, Releases


def test_the_backend_of_the_cpu_is_the_one_that_runs() -> None:
    found = {finding.device: finding for finding in doctor.examine()}
    assert found["cpu"].backend == dispatch.choose_backend(torch.device("cpu"))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert found["cpu"].backend in result.output


def test_a_host_newer_than_the_newest_tested_is_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    for tested in TESTED:
        monkeypatch.setitem(TESTED, tested, Releases("0.1", "99.0"))
    assert "untested" not in CliRunner().invoke(app, ["doctor"]).output
    monkeypatch.setitem(TESTED, "transformers", Releases("0.1", "0.2"))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"transformers {transformers.__version__} is untested" in result.output


def test_a_forced_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    assert doctor.examine()[0] == doctor.Finding("cpu", "torch", "QUANTCACHE_BACKEND asks for it")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "tpu")
    finding = doctor.examine()[0]
    assert finding.backend == "none"
    assert "must be one of torch, cpu, cuda, got 'tpu'" in finding.reason


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
def test_a_missing_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler found")
    dispatch._kernels_run.cache_clear()
    try:
        assert doctor.examine()[0] == doctor.Finding("cpu", "torch", "no C++ compiler found")
    finally:
        dispatch._kernels_run.cache_clear()


def test_json_describes_the_machine() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["versions"]["torch"] == torch.__version__
    assert told["tested"]["torch"] == TESTED["torch"]._asdict()
    assert told["threads"] == torch.get_num_threads()
    assert told["extras"].keys() == {"demo", "plot", "eval", "serve"}
    assert told["devices"][0]["device"] == "cpu"
    assert isinstance(told["processor"]["features"], list)
    assert told["compiler"]
