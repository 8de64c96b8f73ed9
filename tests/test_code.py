import hashlib
import pickle
from pathlib import Path

import pytest

from kdcli import BadInput, cli, code


def written(folder: Path, text: str, name: str = "own.py") -> str:
    path = folder / name
    path.write_text(text)
    return f"{path}:make"


def test_a_function_is_called_with_its_arguments(tmp_path: Path) -> None:
    reference = written(tmp_path, "def make(a, b=2):\n    return a + b\n")
    assert code.call(reference, a=1) == 3
    assert code.call(reference, a=1, b=5) == 6


def test_a_file_is_told_apart_by_its_content_and_run_once_for_each(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    text = f"open({str(runs)!r}, 'a').write('x')\nclass Own: pass\ndef make(): return Own()\n"
    reference = written(tmp_path, text)
    assert code.digest(reference) == hashlib.sha256(text.encode()).hexdigest()
    one, other = code.call(reference), code.call(reference)
    assert type(one) is type(other)
    assert runs.read_text() == "x"
    assert type(pickle.loads(pickle.dumps(one))) is type(one)  # its module can be found again
    written(tmp_path, "def make(): return 3\n")
    assert code.call(reference) == 3


def test_a_file_knows_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("7")
    reference = written(
        tmp_path, "from pathlib import Path\ndef make(): return Path(__file__).with_name('data.txt').read_text()\n"
    )
    assert code.call(reference) == "7"


@pytest.mark.parametrize("where", ["in the function", "in the file"])
def test_what_is_printed_is_no_part_of_kds_document(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = where == "in the function"
    text = "def make():\n    print('hello')\n    return 1\n" if inside else "print('hello')\ndef make(): return 1\n"
    assert code.call(written(tmp_path, text)) == 1
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        ("import json\ndef make():\n    x = 1\n    return json.loads('[')\n", ":4: JSONDecodeError: Expecting value"),
        ("def make():\n    assert False\n", ":2: AssertionError"),
        ("import absent_module\ndef make(): pass\n", ":1: ModuleNotFoundError: No module named 'absent_module'"),
        ("x = 1\ndef make(:\n", ":2: SyntaxError: invalid syntax"),
        ("x = 1\n1 / 0\ndef make(): pass\n", ":2: ZeroDivisionError: division by zero"),
        ("def make():\n    raise ValueError('two\\nlines')\n", ":2: ValueError: two lines"),
        ("def mkae(): pass\n", ": has no function make"),
        ("make = 3\n", ": has no function make"),
        ("def make(wanted): pass\n", ": make() missing 1 required positional argument: 'wanted'"),
        ("def make():\n    raise SystemExit(0)\n", ":2: SystemExit"),
        ("\x00", ": SyntaxError: "),
    ],
)
def test_code_that_fails_is_told_in_one_line_with_its_own(text: str, message: str, tmp_path: Path) -> None:
    reference = written(tmp_path, text)
    with pytest.raises(BadInput) as error:
        code.call(reference)
    (line,) = error.value.lines
    assert line.startswith(str(tmp_path / "own.py"))
    assert message in line
    assert "\n" not in line


def test_an_unexpected_argument_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"own.py.*unexpected keyword argument 'widht'"):
        code.call(written(tmp_path, "def make(width=3): pass\n"), widht=4)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"own.py: cannot be read: No such file or directory"):
        code.call(f"{tmp_path / 'own.py'}:make")


def test_errors_of_others_and_of_kd_itself_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), code.blaming(str(tmp_path / "own.py")):
        _ = 1 / 0
    with pytest.raises(BadInput, match=r"^as it is$"), code.blaming(__file__):
        raise BadInput("as it is")


def test_a_signal_in_somebodys_code_ends_the_command(tmp_path: Path) -> None:
    """It is no failure of that file."""
    path = written(tmp_path, "def make(stop): stop()\n")
    with pytest.raises(cli.Terminated), code.blaming(path.partition(":")[0], "own.py"):
        code.call(path, stop=cli._terminate)
