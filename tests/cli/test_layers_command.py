"""The table of the layers that can be explained."""

import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from tucker_cam.cli import app
from tucker_cam.models import NoLayerError, load_model


def test_the_layers_command_lists_the_candidates_and_marks_the_chosen_one():
    result = CliRunner().invoke(app, ["layers", "torchvision:resnet18", "--no-pretrained"])
    assert result.exit_code == 0, result.output
    (chosen,) = [line for line in result.output.splitlines() if "->" in line]
    assert [cell.strip() for cell in chosen.split("│")[1:-1]] == ["->", "-1", "layer4", "Sequential", "512 x 7 x 7"]
    assert "layer3.1.conv2" in result.output
    other = CliRunner().invoke(app, ["layers", "torchvision:resnet18", "--no-pretrained", "--layer", "layer3"])
    (chosen,) = [line for line in other.output.splitlines() if "->" in line]
    assert "256 x 14 x 14" in chosen


def test_the_layers_command_lists_the_candidates_also_where_none_is_chosen():
    result = CliRunner().invoke(app, ["layers", "networks:queries_model"])
    assert result.exit_code == 0, result.output
    assert "8 x 28 x 28" in result.output
    assert "->" not in result.output
    assert "none was chosen" in result.output
    with pytest.raises(NoLayerError, match="1 can be named, up to `0` 8x28x28"):
        load_model("networks:queries_model")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_layers_command_prints_any_name_as_it_is(terminal):
    result = CliRunner().invoke(app, ["layers", "networks:marked_up_model"], env={"FORCE_COLOR": "1" * terminal})
    assert result.exit_code == 0, result.output
    assert "parts.[/x]" in result.output
    assert "parts.\\x1b[2J" in result.output
    assert "\x1b[2J" not in result.output


def test_the_table_of_layers_loses_nothing_on_a_narrow_terminal():
    arguments = ["layers", "timm:swin_tiny_patch4_window7_224", "--no-pretrained"]
    runs = [CliRunner().invoke(app, arguments, env={"COLUMNS": "60", "FORCE_COLOR": force}) for force in ("1", "")]
    narrow, piped = (re.sub(r"\x1b\[\d*m", "", run.output) for run in runs)
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, piped.splitlines()))
    for output in (narrow, piped):
        (chosen,) = [line for line in output.splitlines() if "->" in line]
        assert "-1" in chosen
        assert "7 x 7 x 768" in chosen
        assert output.endswith("becomes maps by channels_last_to_maps\n")


def test_the_layers_command_compares_the_layers_on_pictures(tmp_path):
    for index in range(3):
        Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    command = ["layers", "torchvision:resnet18", str(tmp_path), "--no-pretrained", "--size", "64"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert result.exit_code == 1  # of one that cannot be read
    assert "broken.png" in result.output
    assert "fewer than 10 pictures" in result.output
    rows = [line.split() for line in result.output.splitlines() if "%" in line and "x" in line]
    assert [row[row[0] in ("->", "!!")] for row in rows] == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert sum("->" in line and "x" in line for line in result.output.splitlines()) == 1
    assert all(len(line) <= 80 for line in result.output.splitlines() if "%" in line and "x" in line)
