"""The command line: what it prints where, its exit statuses, and that its reference is true."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore

click = pytest.importorskip("click")

from click.testing import CliRunner, Result  # noqa: E402

from trajstore.cli import COMMANDS, _report, main  # noqa: E402
from trajstore.errors import LockedError, StorageError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GROUP = click.Context(main, info_name="trajstore")


def cli(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def shell(*words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trajstore.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run.zarr"
    with trajstore.create(
        path, target=12, unique="seed", config={"env": "coinrun", "net": {"hidden": 64}}, handle_signals=False
    ) as writer:
        for seed in range(10):
            steps = 3 + seed % 4
            rows = {"obs": np.full((steps, 3, 8, 8), seed, np.uint8), "actions": np.arange(steps)}
            columns = {"return": seed / 4, "success": seed % 2 == 0, "ep_len": steps}
            writer.append(rows, seed=seed, **columns)
        writer.mark_attempted(range(10, 14))
    return path


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_says_all_that_the_users_command_said(store: Path) -> None:
    result = cli("info", store)
    assert result.exit_code == 0 and result.stderr == ""
    for words in ("10 of 12, 2 to go", "current seed 14", "14 attempted", "3 to 6 a trajectory", "env", "coinrun"):
        assert words in result.stdout
    for words in ("obs", "uint8", "3×8×8", "last commit", "rate", "writer        none", "return"):
        assert words in result.stdout
    assert cli("info", "--ckpt_dir", store).stdout.splitlines()[:4] == result.stdout.splitlines()[:4]


def test_info_as_json_has_the_names_of_the_attributes(store: Path) -> None:
    from trajstore.operations.info import info

    found = json.loads(cli("info", store, "--json").stdout)
    described = info(store)
    for name in ("trajectories", "steps", "target", "remaining", "current_seed", "length_mean", "bytes_raw", "ratio"):
        assert found[name] == getattr(described, name)
    assert found["fields"][0]["name"] == "obs" and found["fields"][0]["shape"] == [3, 8, 8]
    assert found["config"] == {"env": "coinrun", "net": {"hidden": 64}}
    assert found["parts"][0]["commit"] == trajstore.open(store).snapshots[0].manifest.commit.number


def test_info_knows_whether_a_writer_lives(tmp_path: Path) -> None:
    path = tmp_path / "live"
    with trajstore.create(path, handle_signals=False):
        assert f"alive: process {os.getpid()} on " in cli("info", path).stdout
        assert json.loads(cli("info", path, "--json").stdout)["writing"] is True
    assert json.loads(cli("info", path, "--json").stdout)["writing"] is False


def test_info_shows_parts_and_forced_changes(tmp_path: Path) -> None:
    for rank in (2, 10):
        with trajstore.create(tmp_path, part=f"rank{rank}", config={"lr": 1}, handle_signals=False) as writer:
            writer.append({"x": np.zeros(rank)})
    with trajstore.create(
        tmp_path, part="rank2", resume=True, force=True, config={"lr": 2}, handle_signals=False
    ) as writer:
        writer.append({"x": np.zeros(1)})
    out = cli("info", tmp_path).stdout
    assert out.index("rank2") < out.index("rank10")
    assert "config changed by force" in out and "different configurations" in out
    found = json.loads(cli("info", tmp_path, "--json").stdout)
    assert (found["trajectories"], len(found["parts"]), found["config_differs"]) == (3, 2, True)
    assert found["forced"][0]["differences"] == {"lr": [1, 2]}


def test_info_without_a_store_fails_with_1(tmp_path: Path) -> None:
    result = cli("info", tmp_path / "nothing")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no store at ")


def test_data_of_another_format_is_shown_the_way_in(tmp_path: Path) -> None:
    (tmp_path / "old/shards").mkdir(parents=True)
    (tmp_path / "old/manifest.json").write_text("{}")
    for command in ("info", "ls", "verify"):
        result = cli(command, tmp_path / "old")
        assert result.exit_code == 1 and f"trajstore import {tmp_path / 'old'} new.zarr" in result.stderr


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_ls_filters_sorts_and_limits(store: Path) -> None:
    words = ("ls", store, "--where", "success & (length > 3)", "--sort", "return", "--reverse", "--limit", 2)
    lines = cli(*words, "--columns", "seed,return,length").stdout.splitlines()
    assert lines[0].split() == ["index", "seed", "return", "length"]
    assert [line.split() for line in lines[1:]] == [["6", "6", "1.5", "5"], ["2", "2", "0.5", "5"]]
    found = json.loads(cli(*words, "--json").stdout)
    assert [row["index"] for row in found] == [6, 2]
    assert found[0] == {
        "index": 6, "id": 6, "seed": 6, "return": 1.5, "success": True, "ep_len": 5, "length": 5,
    }  # fmt: skip
    assert len(cli("ls", store).stdout.splitlines()) == 11


def test_ls_shows_texts_as_the_columns_that_they_are(tmp_path: Path) -> None:
    parts = ["maze", None, "two\nlines \x1b[31m"], ["half \ud800", "", "ärger"]
    for rank, texts in enumerate(parts):
        with trajstore.create(tmp_path, part=f"rank{rank}", handle_signals=False) as writer:
            for seed, text in enumerate(texts):
                writer.append({"x": np.zeros(2)}, seed=seed, level=text)
    assert list(trajstore.open(tmp_path).table["level"]) == [*parts[0], *parts[1]]
    lines = cli("ls", tmp_path, "--columns", "level").stdout.splitlines()
    assert [line.split(maxsplit=1)[1:] for line in lines] == [
        ["level"], ["maze"], ["-"], [r"two\nlines \x1b[31m"], [r"half \ud800"], [], ["ärger"],
    ]  # fmt: skip
    assert "level" in cli("ls", tmp_path).stdout.splitlines()[0]
    found = json.loads(cli("ls", tmp_path, "--sort", "level", "--where", "level != 'maze'", "--json").stdout)
    assert [row["index"] for row in found] == [4, 3, 2, 5, 1]
    assert found[2]["level"] == "two\nlines \x1b[31m" and found[1]["level"] == "half \ud800"


@pytest.mark.parametrize(
    "words", [["--where", "sucess"], ["--where", "1 +"], ["--sort", "nothing"], ["--columns", "seed,nothing"]]
)
def test_ls_refuses_what_it_does_not_know_as_wrong_usage(store: Path, words: list[str]) -> None:
    result = cli("ls", store, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in (lines[0], lines[-1])] == ["error", "hint"]


# -- import and export -------------------------------------------------------------------------------------------------


def test_export_and_import_under_the_users_flags(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "routes.npz"
    result = cli("export", "--ckpt_dir", store, "--out_npz", out, "--max_routes", 4, "--no_compress", "--no_progress")
    assert result.exit_code == 0 and result.stdout.startswith("4 trajectories -> ")
    with np.load(out, allow_pickle=True) as file:
        assert file["routes_seed"].tolist() == [0, 1, 2, 3]
        assert file["routes_obs"][3].tolist() == np.full((6, 3, 8, 8), 3).tolist()
    result = cli("import", out, tmp_path / "back", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["routes"] == 4
    assert trajstore.open(tmp_path / "back").column("seed").tolist() == [0, 1, 2, 3]
    assert cli("import", out, out, tmp_path / "twice", "--dedupe", "seed").exit_code == 0
    assert len(trajstore.open(tmp_path / "twice")) == 4


def test_export_chooses_trajectories_and_never_writes_over(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.npz"
    done = cli("export", store, out, "--where", "seed >= 7", "--mode", "pkd", "--tmp_dir", tmp_path, "--json")
    assert json.loads(done.stdout) == {
        "trajectories": 3, "path": str(out), "bytes": out.stat().st_size, "format": "routes",
        "warnings": [],
    }  # fmt: skip
    before = out.read_bytes()
    refused = cli("export", store, out)
    assert refused.exit_code == 1 and out.read_bytes() == before
    assert refused.stderr.splitlines()[1] == "hint: give another name, or --overwrite"
    assert cli("export", store, out, "--overwrite", "--no-atomic").exit_code == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    "words",
    [
        ["export", "STORE"],
        ["export", "STORE", "out.unknown"],
        ["export", "STORE", "out.npz", "--out_npz", "other.npz"],
        ["export", "STORE", "out.npz", "--where", "nothing > 1"],
        ["export", "STORE", "out.npz", "-o", "colour=3"],
        ["export", "STORE", "out.npz", "-o", "colour"],
        ["import", "nothing-here.npz"],
        ["import", "nothing-here", "new"],
        ["import", "--from", "nothing", "x", "y"],
        ["info"],
        ["info", "STORE", "--ckpt_dir", "STORE"],
        ["inof", "STORE"],
        ["info", "STORE", "--colour"],
    ],
)
def test_wrong_usage_is_2_with_a_hint(store: Path, words: list[str]) -> None:
    result = cli(*[str(store) if word == "STORE" else word for word in words])
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: trajstore") and hint.endswith("--help")


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_names_what_is_damaged_and_exits_with_3(store: Path, tmp_path: Path) -> None:
    assert cli("verify", store, "--deep").exit_code == 0
    path = Path(shutil.copytree(store, tmp_path / "run.zarr"))
    (path / "steps/obs/c.0.0.0.0").unlink()
    result = cli("verify", path)
    assert result.exit_code == 3
    assert "trajectory 7, field obs, rows 0..6, file steps/obs/c.0.0.0.0: the file is missing" in result.stdout
    assert "0 of 10 trajectories are whole" in result.stdout
    found = json.loads(cli("verify", path, "--json").stdout)
    assert found["ok"] is False and found["stores"][0]["damages"][0]["trajectories"] == list(range(10))


def test_verify_cuts_long_lists_unless_asked(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        for _ in range(30):
            writer.append({"x": np.arange(3)})
    (tmp_path / "s/steps/x/c.0").unlink()
    assert "and 10 more trajectories" in cli("verify", tmp_path / "s").stdout
    assert "trajectory 29, " in cli("verify", tmp_path / "s", "--all").stdout


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(store: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trajstore.cli", "verify", str(store)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True, timeout=60)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "verify" in drawn and "100%" in drawn
    assert "100%" not in done.stdout and shell("verify", store).stderr == ""


# -- errors, exit statuses, streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LockedError("somebody writes", hint="wait"), 4),
        (StorageError("the disk is full"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (ValueError("a defect"), 1),
        (FileNotFoundError("no file"), 1),
    ],
)
def test_every_error_has_a_line_and_a_status(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(error, False) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err


def test_a_traceback_comes_when_asked_for_and_only_then(tmp_path: Path) -> None:
    for words in (("--traceback", "info"), ("info", "--traceback")):
        assert "Traceback (most recent call last)" in cli(*words, tmp_path / "no").stderr
    assert "Traceback" not in cli("info", tmp_path / "no").stderr


def test_results_and_errors_come_from_a_real_process(store: Path, tmp_path: Path) -> None:
    done = shell("info", store)
    assert (done.returncode, done.stderr) == (0, "") and "10 of 12" in done.stdout
    failed = shell("info", tmp_path / "no")
    assert (failed.returncode, failed.stdout) == (1, "") and failed.stderr.startswith("error: ")


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        for _ in range(3000):
            writer.append({"x": np.arange(3)})
    command = f"{sys.executable} -m trajstore.cli ls {tmp_path / 's'} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["index", "id", "length"] and done.stderr == ""


# -- help, completion, reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_gives_an_example(name: str) -> None:
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    trajstore {name}" in result.stdout
    command = main.get_command(GROUP, name)
    assert command is not None and command.name == name
    assert (command.help or "").splitlines()[0] == COMMANDS[name][1]
    inside = command.commands if isinstance(command, click.Group) else {}
    assert inside or "--json" in result.stdout
    for part in inside:
        example = cli(name, part, "--help").stdout.partition("Example:\n")[2]
        assert f"trajstore {name} {part}" in example


@pytest.mark.parametrize("name", COMMANDS)
def test_options_with_dashes_are_known_with_underscores_too(name: str) -> None:
    command = main.get_command(GROUP, name)
    assert command is not None
    inside = list(command.commands.values()) if isinstance(command, click.Group) else []
    for parameter in [parameter for each in [command, *inside] for parameter in each.params]:
        for flag in parameter.opts:
            if flag.startswith("--") and "-" in flag[2:]:
                assert "--" + flag[2:].replace("-", "_") in parameter.opts


def test_help_imports_no_command_and_nothing_heavy() -> None:
    code = (
        "import sys; from trajstore.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'zarr', 'dask', 'h5py', 'gymnasium', 'rich', 'pandas'} & set(sys.modules)\n"
        "print(*heavy, *(name for name in sys.modules if name.startswith('trajstore.cli.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "" and "verify" in done.stdout


def test_completion_for_the_shell() -> None:
    environment = {
        **os.environ,
        "_TRAJSTORE_COMPLETE": "bash_complete",
        "COMP_WORDS": "trajstore ve",
        "COMP_CWORD": "1",
    }
    assert shell(env=environment).stdout.split() == ["plain,verify"]


def test_the_reference_is_what_the_commands_say() -> None:
    from trajstore.cli.reference import markdown

    if tuple(map(int, _version("click").split(".")[:2])) < (8, 2):
        pytest.skip("an older click words its help differently")
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == markdown(), "run: python -m trajstore.cli.reference > docs/cli.md"
    for name in COMMANDS:
        assert f"## trajstore {name}\n" in page


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


# -- demo --------------------------------------------------------------------------------------------------------------


def test_the_demo_kills_a_real_collection_and_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    words = ("--env", "CartPole-v1", "--episodes", 300, "--kills", 2, "--rerun", 5, "--seed", 1)
    done = shell("demo", tmp_path / "demo", *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["compared"] == 5 and len(found["kills"]) == 2
    assert all(kill["lost"] == 0 and kill["found"] >= kill["acknowledged"] for kill in found["kills"])
    dataset = trajstore.open(found["store"])
    assert sorted(dataset.column("seed").tolist()) == list(range(300))
    assert (tmp_path / "demo" / "routes.npz").is_file()
    for env, word in (("NoSuchEnvironment-v0", "no environment"), ("Pendulum-v1", "no discrete actions")):
        refused = shell("demo", tmp_path / "no", "--env", env)
        assert refused.returncode == 1 and word in refused.stderr and not (tmp_path / "no").exists()
    again = shell("demo", tmp_path / "demo")
    assert again.returncode == 1 and "is not empty" in again.stderr


def test_an_interrupted_command_exits_with_130(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    command = [sys.executable, "-m", "trajstore.cli", "demo", str(tmp_path / "d"), "--env", "CartPole-v1", "--json"]
    with subprocess.Popen([*command, "--episodes", "100000"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        while not (tmp_path / "d/run.zarr/zarr.json").exists():
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err.splitlines()[-1] == "error: interrupted"
