"""The script for bash completes commands, flags and values in a real shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kalmagrove.cli import main
from kalmagrove.commands.completion import SHELLS
from kalmagrove.commands.names import COMMANDS

DRIVER = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_kalmagrove kalmagrove "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "kalmagrove"
    words = [sys.executable, "-m", "kalmagrove", "completion", "bash"]
    path.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words behind the command's name."""
    done = subprocess.run(
        ["bash", "-c", DRIVER, "driver", str(script), "kalmagrove", *words], capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["comp"], {"compare", "compress", "completion"}),
        (["scale", "s"], {"sweep"}),
        (["scale", "sweep", "--work"], {"--workers"}),
        (["train", "--tok"], {"--tokens"}),
        (["train", "--optim.name", ""], {"kalma", "adamw", "muon", "soap"}),
        (["report", "scaling", "--o"], {"--out"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str], script: Path) -> None:
    assert set(completed(script, *words)) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_command_is_offered(script: Path) -> None:
    assert set(completed(script, "")) >= set(COMMANDS)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "reproduce" in capsys.readouterr().out


def test_an_unknown_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "no completion for 'fish'; shells: bash, zsh, tcsh" in capsys.readouterr().err
