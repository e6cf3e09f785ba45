"""What the command line does with bad input."""

from kr_fast.cli import main


def refused(capsys, *arguments, aside=None):
    """The one line that a refused command prints, beside lines that hold ``aside``."""
    code = main([*map(str, arguments)])
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.out == ""
    lines = [line for line in shown.err.strip().splitlines() if aside is None or aside not in line]
    assert len(lines) == 1, shown.err
    assert "Traceback" not in lines[0]
    return lines[0]
