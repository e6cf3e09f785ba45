"""What the command line does with bad input."""

from kr_fast.cli import main


def refused(capsys, *arguments, aside=None):
    """The one line that a refused command prints, beside what was said of the data and lines that hold ``aside``."""
    code = main([*map(str, arguments)])
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.out == ""
    lines = [line for line in shown.err.strip().splitlines() if aside is None or aside not in line]
    *said, line = lines
    assert all(each.startswith("kr-fast: data: ") for each in said), shown.err
    assert "Traceback" not in line
    return line
