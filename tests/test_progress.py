import sys

import pytest

from tucker_cam.progress import progress


def test_a_redirected_run_says_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("tucker_cam.progress._SECONDS_BETWEEN_LINES", 0)
    with progress("explaining", 30) as advance:
        advance(10)
        advance(20)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert {"explaining: 10 of 30", "explaining: 30 of 30"} <= {line.partition(",")[0] for line in lines}
    monkeypatch.undo()
    with progress("explaining", 30) as advance:
        advance(30)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_shows_a_bar_unless_it_shall_not(capsys, monkeypatch, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("explaining", 20, shown=shown) as advance:
        advance(20)
    assert ("20/20" in capsys.readouterr().err) is shown
