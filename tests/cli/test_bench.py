"""``kr-fast bench synthesis``: what it measures and writes, and its refusals."""

import json

import pytest

from kr_fast.cli import main
from kr_fast.cli.bench import table


@pytest.mark.pipeline
def test_synthesis(tmp_path, capsys):
    options = {"model": "digits", "batch": 8, "images": 12, "steps": 2, "repeats": 1, "threads": 1, "format": "none"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["bench", "synthesis", *arguments, "--providers", "loop", "kr_fast", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "synthesis.json").read_text())
    assert result["case"]["images"] == 12
    assert result["evaluations"] == 2
    assert list(result["providers"]) == ["loop", "kr_fast"]
    for each in result["providers"].values():
        assert each["psnr"] is None or each["psnr"] >= 60  # of the fused tier's contract
        assert each["images_per_second"] >= each["images_per_second_median"] > 0
        assert each["evaluations_per_second"] == pytest.approx(2 * each["images_per_second"])
        assert each["peak_bytes"] > 2**20
        assert each["share_of_matrix_peak"] > 0
    assert (tmp_path / "synthesis.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "NFE images/s" in printed
    assert table(result) in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "huge"], "bench: model must be one of digits, unet28, unet32, got huge"),
        (
            ["--providers", "tensorrt"],
            "bench: providers must be one of documented, loop, compile, kr_fast, got tensorrt",
        ),
        (["--steps", "0"], "bench: steps must be in [1, 10000], got 0"),
        (["--device", "tpu"], "bench: device must be one of auto, cpu, cuda, got tpu"),
        (
            ["--scheduler", "FastScheduler"],
            "bench: scheduler must be the name of a diffusers scheduler, got FastScheduler",
        ),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, text):
    assert main(["bench", "synthesis", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
