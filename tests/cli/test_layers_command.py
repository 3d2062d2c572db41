"""The table of the layers that can be explained."""

import re

from PIL import Image
from typer.testing import CliRunner

from tucker_cam.cli import app


def layers(*arguments, code=0, **environment):
    """Return what the command prints, without colours, and the rows of it that are marked."""
    result = CliRunner().invoke(app, ["layers", *arguments], env=environment)
    assert result.exit_code == code, result.output
    output = re.sub(r"\x1b\[\d*m", "", result.output)
    return output, *(line for line in output.splitlines() if "->" in line and " x " in line)


def test_the_layers_command_lists_the_candidates_and_marks_the_chosen_one():
    output, chosen = layers("torchvision:resnet18", "--no-pretrained")
    assert [cell.strip() for cell in chosen.split("│")[1:-1]] == ["->", "-1", "layer4", "Sequential", "512 x 7 x 7"]
    assert "layer3.1.conv2" in output
    _, chosen = layers("torchvision:resnet18", "--no-pretrained", "--layer", "layer3")
    assert "256 x 14 x 14" in chosen


def test_the_layers_command_lists_the_candidates_also_where_none_is_chosen():
    (output,) = layers("networks:queries_model")
    assert "8 x 28 x 28" in output
    assert "none was chosen" in output


def test_the_table_of_layers_loses_nothing_on_a_narrow_terminal():
    model = ("timm:swin_tiny_patch4_window7_224", "--no-pretrained")
    runs = [layers(*model, COLUMNS="60", FORCE_COLOR=force) for force in ("1", "")]
    (narrow, _), (piped, _) = runs
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, piped.splitlines()))
    for output, chosen in runs:
        assert "-1" in chosen
        assert "7 x 7 x 768" in chosen
        assert output.endswith("becomes maps by channels_last_to_maps\n")


def test_the_layers_command_compares_the_layers_on_pictures(tmp_path):
    for index in range(3):
        Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    command = ("torchvision:resnet18", str(tmp_path), "--no-pretrained", "--size", "64")
    (output,) = layers(*command, code=1, COLUMNS="80")
    assert "broken.png" in output
    assert "fewer than 10 pictures" in output
    rows = [line for line in output.splitlines() if "%" in line and "x" in line]
    marks, names = zip(*(re.match(r" *(->|!!)? *(\w+)", row).groups() for row in rows), strict=True)
    assert names == ("relu", "layer1", "layer2", "layer3", "layer4")
    assert marks.count("->") == 1
    assert max(map(len, rows)) <= 80
