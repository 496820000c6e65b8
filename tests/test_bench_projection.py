"""The projection of hours: its arithmetic by hand, and what a file of GPU numbers does to it."""

import json

import pytest

from bench import projection
from bench.projection import (
    Stage,
    assumed_speeds,
    draw_stages,
    hours,
    main,
    measured_speeds,
    paper_mfu,
    table,
)

SMALL = {
    "sft": Stage(tokens=72_000_000, flops_per_token=12e9, balance=0.8),
    "redi": Stage(tokens=36_000_000, flops_per_token=10e9, balance=0.5),
}
GPU = {
    "machine": {"gpu": "NVIDIA H200", "cores": 2},
    "versions": {"torch": "2.11.0"},
    "results": {"G4_tok_s": {"median": 31_650.0}, "G5_tok_s": {"median": 20_000}},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, and small stages in place of the drawn ones."""
    monkeypatch.setattr(projection, "RESULTS", tmp_path)
    monkeypatch.setattr(projection, "draw_stages", lambda: SMALL)
    return tmp_path


def printed(capsys) -> dict[str, list[str]]:
    """Name of a line of the table -> its cells."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


# ---------------------------------------------------------------- by hand


def test_hours_of_eight_gpus_and_of_one():
    """8 GPUs at 1000 tokens/s and balance 0.8 do 6400 a second: 72e6 / 6400 = 11,250 s = 3.125 h.
    One does not wait for others: 72e6 / 1000 = 72,000 s = 20 h."""
    assert hours(SMALL["sft"], 1000, gpus=8) == pytest.approx(3.125)
    assert hours(SMALL["sft"], 1000, gpus=1) == pytest.approx(20)


def test_assumed_tokens_a_second():
    """A100: 0.40 * 312e12 / 12e9 = 10,400 and / 10e9 = 12,480.
    H200: 0.45 * 790e12 / 12e9 = 29,625 and / 10e9 = 35,550."""
    a100, h200 = assumed_speeds(SMALL)
    assert (a100.gpus, h200.gpus) == (8, 1)
    assert a100.tok_s == pytest.approx({"sft": 10_400, "redi": 12_480})
    assert h200.tok_s == pytest.approx({"sft": 29_625, "redi": 35_550})


def test_an_a100_gets_the_ratio_of_the_data_sheets_peaks():
    """989 tokens/s at 989 TFLOP/s are 312 at 312 TFLOP/s; a measured A100 stays what it is."""
    a100, h200 = measured_speeds("H200", {"sft": 989.0, "redi": 1978.0})
    assert (a100.gpus, h200.gpus) == (8, 1)
    assert a100.tok_s == pytest.approx({"sft": 312, "redi": 624})
    assert h200.tok_s == {"sft": 989, "redi": 1978}
    assert measured_speeds("A100", {"sft": 500.0})[0].tok_s == {"sft": 500}


def test_mfu_of_the_papers_hours():
    """72e6 tokens in 8 GPUs * 1 h are 2500 tokens/s a GPU; times 12e9 FLOP is 30e12 of 312e12."""
    assert paper_mfu(SMALL["sft"], 1.0) == pytest.approx(30 / 312)


# ---------------------------------------------------------------- on the law of bench.plan


def test_the_balance_is_the_one_that_bench_plan_measured():
    stages = draw_stages()
    saved = json.loads((projection.RESULTS / "plan.json").read_text())["results"]
    for key, stage in stages.items():
        assert stage.balance == pytest.approx(saved[f"C12_{key}"]["mean"], rel=1e-4)


def test_the_stages_have_the_law_s_tokens_and_the_model_s_flops():
    """Matmuls: 6 * (28 * (1536 * (2 * 1536 + 2 * 256) + 3 * 1536 * 8960) + 151,936 * 1536) is
    9.261e9 FLOP a token. Attention adds 6 * 28 * 1536 * E[L^2] / E[L], and of the law that quotient
    is about 9140 tokens: 2.36e9. Tokens: 77,629 traces of about 5.7e3, 5 times."""
    sft = draw_stages()["sft"]
    assert sft.flops_per_token == pytest.approx(9.261e9 + 2.36e9, rel=0.02)
    assert sft.tokens == pytest.approx(5 * 77_629 * 5.7e3, rel=0.02)


# ---------------------------------------------------------------- the program


def test_without_a_gpu_it_says_so_and_assumes(results, capsys):
    """H200, SFT: 72e6 / 29,625 = 2430.4 s = 0.675 h."""
    main()
    out = capsys.readouterr().out
    assert out.startswith("No GPU measurement (bench/results/gpu.json)")
    content = json.loads((results / "projection.json").read_text())
    assert content["projection"] is True
    assert content["measured_on"] is None
    assert content["hours"]["1 x H200, ASSUMED 45% of 790 TFLOP/s"]["sft"] == 0.68
    assert set(content) == {
        "projection", "assumptions", "hours", "tok_s_of_one_gpu", "measured_on", "paper_hours",
    }  # fmt: skip
    assert all(f"- {line}" in out for line in content["assumptions"])
    assert [path.name for path in results.iterdir()] == ["projection.json"]


def test_every_line_that_is_not_the_papers_is_labelled():
    lines = table(SMALL, assumed_speeds(SMALL)).splitlines()
    assert lines[0].startswith("| PROJECTION, not a result")
    assert all("ASSUMED" in line for line in lines[2:-1])
    assert "the paper's own hours" in lines[-1]
    assert len({len(line) for line in lines}) == 1


def test_a_planted_measurement_changes_the_table(results, capsys):
    """H200: 72e6 / 31,650 = 2274.9 s = 0.63 h; 36e6 / 20,000 = 1800 s = 0.50 h.
    A100: 31,650 * 312 / 989 = 9984.7, so 72e6 / (8 * 9984.7 * 0.8) = 1126.7 s = 0.31 h;
    20,000 * 312 / 989 = 6309.4, so 36e6 / (8 * 6309.4 * 0.5) = 1426.4 s = 0.40 h."""
    main()
    before = printed(capsys)
    (results / "gpu.json").write_text(json.dumps(GPU))
    main()
    after = printed(capsys)
    h200, a100 = (
        "1 x H200, extrapolated from measured tokens/s",
        "8 x A100, ASSUMED the MFU of the H200",
    )
    assert after[h200] == ["0.6", "0.5", "31,650", "20,000"]
    assert after[a100] == ["0.3", "0.4", "9,985", "6,309"]
    assert not any("790" in name for name in after)
    assert h200 not in before
    content = json.loads((results / "projection.json").read_text())
    assert content["hours"] == {h200: {"sft": 0.63, "redi": 0.5}, a100: {"sft": 0.31, "redi": 0.4}}
    assert content["measured_on"] == {"machine": GPU["machine"], "versions": GPU["versions"]}
    assert content["projection"] is True


def edited(**changes) -> str:
    return json.dumps({**GPU, **changes})


def with_sft(median) -> str:
    return edited(results={**GPU["results"], "G4_tok_s": {"median": median}})


BROKEN = [  # the file, what the one line must say
    ("{", "not a file of bench.gpu"),
    ("", "not a file of bench.gpu"),
    ("[]", "not a file of bench.gpu"),
    ("\xff", "not a file of bench.gpu"),
    (edited(results=None), "not a file of bench.gpu"),
    (edited(results={"G4_tok_s": {"median": 1.0}}), "the field 'G5_tok_s' is missing"),
    (json.dumps({"results": GPU["results"]}), "the field 'machine' is missing"),
    (edited(machine={"cpu": "AMD EPYC"}), "its machine names no GPU of H200 NVL, H200, "),
    *((with_sft(wrong), "G4_tok_s is ") for wrong in (0, -1.0, "fast", None, True, 10**400)),
    (with_sft(float("nan")), "G4_tok_s is nan"),
    (with_sft(float("inf")), "G4_tok_s is inf"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_measurement_ends_in_one_line(results, capsys, text, message):
    (results / "gpu.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "gpu.json" in said
    assert message in said
    assert not (results / "projection.json").exists()
