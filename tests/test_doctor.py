"""redi doctor: a machine where all is well, wrong numbers, and packages that are missing or old."""

import importlib.metadata
import sys

import pytest
from processes import main_in_this_process, run_command

from redi import model
from redi.doctor import __main__ as doctor
from redi.doctor import checks

head, two_passes, attention = checks.weighted_logp_sum, checks.token_logps, model.packed_attention


def diagnosis(capsys) -> tuple[int, list[str], list[str]]:
    """(exit status, the lines on what is well, the lines on what is broken)"""
    status = main_in_this_process(doctor.main)
    _, *lines = capsys.readouterr().out.splitlines()
    broken = [line for line in lines if line.startswith("BROKEN")]
    return status, [line for line in lines if line not in broken], broken


def test_all_is_well_here(capsys):
    status, well, broken = diagnosis(capsys)
    assert (status, broken) == (0, [])
    for part in ("packages: torch 2.", "CPU cores; free: memory", *checks.CLAIMS.values()):
        assert any(part in line for line in well), part


def seeing_each_other(*qkv, cu_seqlens, lengths):
    return attention(*qkv, cu_seqlens, [sum(lengths)])


def failing(*_):
    raise RuntimeError("no kernel image\nis available")


@pytest.fixture
def only(monkeypatch):
    """only(check, ...): the doctor makes no others."""
    return lambda *names: monkeypatch.setattr(
        checks, "CLAIMS", {getattr(checks, name): name for name in names}
    )


@pytest.mark.parametrize(
    ("check", "place", "wrong", "named"),
    [
        (
            "check_head", "redi.doctor.checks.weighted_logp_sum",
            lambda *g: (head(*g)[0], head(*g)[1] + 0.01), ["logp is off by"],
        ),
        (
            "check_head", "redi.doctor.checks.weighted_logp_sum",
            lambda *g: (head(*g)[0] * 1.01, head(*g)[1]), ["loss is", "dH is", "dW is"],
        ),
        (
            "check_head", "redi.doctor.checks.token_logps", lambda *g: two_passes(*g) * 1.01,
            ["two_passes_loss is"],
        ),
        (
            "check_head", "redi.doctor.checks.token_logps", failing,
            ["RuntimeError: no kernel image is"],
        ),
        (
            "check_model", "redi.model.packed_attention", seeing_each_other,
            ["packed_logps is off by"],
        ),
        ("check_step", "torch.optim.AdamW.step", lambda *_: None, ["step is off by 0 from"]),
    ],
)  # fmt: skip
def test_wrong_numbers_are_named_a_line_each(check, place, wrong, named, only, monkeypatch, capsys):
    only(check)
    monkeypatch.setattr(place, wrong)
    status, _, broken = diagnosis(capsys)
    assert status == 1
    assert all(line.startswith(f"BROKEN cpu: {check}: ") for line in broken)
    assert [text for text in named if not any(text in line for line in broken)] == []


def test_missing_packages_are_named_though_redi_cannot_be_imported():
    missing = "import sys; sys.modules |= {'torch': None, 'jinja2': None}"
    status, shown, errors = run_command(
        "-c", f"{missing}; from redi.doctor.__main__ import main; main()"
    )
    assert (status, errors) == (1, "")
    broken = [line for line in shown.splitlines() if line.startswith("BROKEN")]
    assert broken == ["BROKEN torch: not installed", "BROKEN jinja2: not installed"]


def test_an_optional_package_may_be_missing(only, monkeypatch, capsys):
    only()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, well, broken = diagnosis(capsys)
    assert (status, broken) == (0, [])
    assert any("matplotlib: not installed; needed for redi curves" in line for line in well)


def test_a_package_that_is_too_old_is_broken(monkeypatch, capsys):
    version = importlib.metadata.version
    old = {"torch": "2.9.1+cpu"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or version(name))
    status, _, broken = diagnosis(capsys)
    assert (status, broken) == (1, ["BROKEN torch 2.9.1+cpu: expected 2.11 or newer"])
