"""Offline, without the user's cache, on machines of any speed."""

import gc
import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# How long an example takes says more about the machine than about the code.
settings.register_profile("unidpo", deadline=None)
settings.load_profile("unidpo")


def pytest_collection_finish() -> None:
    # Each `Trainer.train` collects garbage; walking all that transformers imported takes it half a second.
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path / "unidpo-cache"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A folder with a random text-only model."""
    from worlds import save_text_model

    return save_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory) -> Path:
    """A folder with a random model whose attention packs cannot take."""
    from worlds import save_gemma2

    return save_gemma2(tmp_path_factory.mktemp("models") / "gemma2")


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """`unidpo train` takes the package's log to its console; other tests read it where pytest catches it."""
    log = logging.getLogger("unidpo")
    # Before the test, not after it: a fixture of a whole module may have run the command.
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def recipe_command(monkeypatch, capfd):
    """`unidpo recipe` with some words: its exit code, and what it wrote to both outputs."""
    from unidpo import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["unidpo", "recipe", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return done.value.code or 0, out, err

    return run
