"""The command line as a shell sees it: output, exit codes, one line per failure."""

import json
import os
import subprocess
import sys

import pytest

import pilon_compress

COMMANDS = ["convert", "eval", "bench", "inspect", "generate", "export", "recipes"]


@pytest.fixture
def failing(tmp_path):
    """Runs `pilon-compress boom`, a command that executes the given statement, through the real main()."""

    def failing(statement: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "boom.py"
        script.write_text(
            "import errno, os, signal, sys\n"
            "from pilon_compress.cli.main import app, main\n"
            "from pilon_compress.errors import BadInput\n"
            "@app.command()\n"
            f"def boom():\n    {statement}\n"
            "main()\n"
        )
        kept = {name: value for name, value in os.environ.items() if name != "PILON_DEBUG"}
        surroundings = kept | {"PYTHONPATH": str(tmp_path), "COLUMNS": "120"} | environment
        return subprocess.run([sys.executable, "-m", "boom", "boom"], capture_output=True, text=True, env=surroundings)

    return failing


def test_help_lists_every_command(cli):
    done = cli("--help")
    assert all(f" {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli, command):
    done = cli(command, "--help")
    assert "Usage:" in done.stdout


def test_help_and_recipes_do_not_wait_for_torch():
    probe = (
        "import sys\n"
        "from pilon_compress.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'sklearn', 'datasets') if m in sys.modules])\n"
    )
    for arguments in (["--help"], ["convert", "--help"], ["recipes", "list"]):
        done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", (arguments, done)


def test_version(cli):
    done = cli("--version")
    assert done.stdout == f"pilon-compress {pilon_compress.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compres"], "no such command: compres; did you mean compare?"),
        (["recipes", "shwo"], "no such command: shwo; did you mean show?"),
        (["recipes", "list", "--nope"], "no such option: --nope"),
        (["recipes", "show"], "missing argument 'RECIPE'"),
        (["convert", "m", "--ffn-ration", "0.5"], "no such option: --ffn-ration; did you mean --ffn-ratio?"),
        (["convert", "m", "--rank", "many"], "--rank: must be an integer (got 'many')"),
        (["inspect", "m", "n"], "got unexpected extra argument(s) (n)"),
        (["convert", "m", "-o"], "option '-o' requires an argument"),
        (["train", "--recipe"], "option '--recipe' requires an argument"),
        (
            ["convert", "m", "-o", "o", "--method", "svdd"],
            "--method: must be 'pilon', 'whitened-svd' or 'svd' ",
        ),
    ],
)
def test_usage_errors_are_one_line_like_all_others(cli, arguments, told):
    done = cli(*arguments, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and told in done.stderr


@pytest.mark.parametrize("arguments", [[], ["recipes"]])
def test_a_group_without_a_command_shows_its_help(cli, arguments):
    done = cli(*arguments, code=2)
    assert "Commands:" in done.stdout and done.stderr == ""


# --- recipes


def test_recipes_list(cli):
    done = cli("recipes", "list")
    assert all(name in done.stdout for name in ("quickstart", "gpt2-half", "llama-half", "bert-half"))
    listed = json.loads(cli("recipes", "list", "--json").stdout)["recipes"]
    assert "quickstart" in {entry["name"] for entry in listed}
    assert all(entry["description"] for entry in listed)


def test_recipes_show_is_a_start_for_ones_own(cli, tmp_path):
    shown = cli("recipes", "show", "quickstart")
    assert shown.stdout.startswith("# ")
    mine = tmp_path / "mine.yaml"
    mine.write_text(shown.stdout)
    checked = cli("recipes", "check", str(mine), "--set", "budget.ffn_ratio=0.25", "--set", "seed=7")
    assert "seed: 7\n" in checked.stdout and "ffn_ratio: 0.25\n" in checked.stdout
    assert checked.stdout.endswith(f"{mine}: ok\n") and not checked.stderr


def test_recipes_check_names_file_line_and_the_likely_field(cli, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: gpt2\nbudget:\n  ffn_ratoi: 0.5\n")
    done = cli("recipes", "check", str(mine), code=2)
    assert done.stdout == ""
    assert done.stderr == f"error: {mine}:3: budget.ffn_ratoi: unknown field; did you mean 'ffn_ratio'?\n"


def test_recipes_check_knows_the_number_formats(cli):
    done = cli("recipes", "check", "quickstart", "--set", "form.bank_dtype=int5", code=2)
    assert done.stderr == "error: form.bank_dtype 'int5' is none of auto, int8, int4, int3, int2\n" and not done.stdout
    assert cli("recipes", "check", "quickstart", "--set", "form.bank_dtype=int4").stdout.endswith("ok\n")


def test_recipes_check_blames_the_override(cli):
    done = cli("recipes", "check", "quickstart", "--set", "budget.rank=many", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: --set budget.rank: ") and done.stderr.count("\n") == 1


def test_recipes_show_unknown_name(cli):
    done = cli("recipes", "show", "quickstrat", code=2)
    assert done.stderr == "error: no recipe or file 'quickstrat'; did you mean 'quickstart'?\n"


# --- every failure is one line with its exit code


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("raise BadInput('give\\nless')", 2, "error: give less"),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'out/x')", 2, "error: no space left on the disk: "),
        ("raise RuntimeError('I/O error: ' + os.strerror(errno.ENOSPC))", 2, "error: no space left on the disk: "),
        ("raise PermissionError(errno.EACCES, 'Permission denied', 'x')", 1, "failed: PermissionError: "),
        ("raise ValueError('a\\n\\nb')", 1, "failed: ValueError: a b (PILON_DEBUG=1 shows the traceback)"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "terminated"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(failing, statement, code, line):
    done = failing(statement)
    assert done.returncode == code
    lines = [text for text in done.stderr.splitlines() if text.strip()]
    assert len(lines) == 1 and lines[0].startswith(line), done.stderr
    assert done.stdout == ""


def test_termination_leaves_no_half_written_folder(failing, tmp_path):
    place = f"__import__('pathlib').Path({str(tmp_path / 'new' / 'out')!r})"
    writing = f"from pilon_compress.io.folders import fresh_folder\n    with fresh_folder({place}) as work:\n"
    done = failing(writing + "        (work / 'a').write_text('1')\n        os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == 143 and [p.name for p in tmp_path.iterdir()] == ["boom.py"], done.stderr


def test_debug_shows_the_traceback(failing):
    done = failing("raise ValueError('a')", PILON_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in boom" in done.stderr


def test_success_and_chosen_exit_codes_pass_through(failing):
    assert failing("pass").returncode == 0
    assert failing("sys.exit(3)").returncode == 3


def test_a_text_source_is_printed_as_it_was_given(capsys):
    from pilon_compress.cli.output import print_table

    print_table("hub:a/b::train:text", ["x", "y"], [["hub:a/b::train:text", "1"]])
    assert capsys.readouterr().out.count("hub:a/b::train:text") == 2
