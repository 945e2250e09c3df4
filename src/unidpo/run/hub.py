"""A finished model to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi

from unidpo.errors import Interrupted, RecipeError, TrainingError


def check_hub_repository(repo_id: str) -> None:
    """See, before any GPU hour is spent, that a model can be pushed to `repo_id`; makes the repository, private.

    Raises:
        RecipeError: the name is none, nobody is logged in, the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        name = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        api.auth_check(name, write=True)
    except Exception as error:  # of the hub's library, or of the one below it, which changes with its versions
        hint = "you must be logged in (`hf auth login` or HF_TOKEN) and may write there"
        raise RecipeError(f"--push-to-hub {repo_id}: {_reason(error)}; {hint}") from error


def push(model: Path, repo_id: str) -> str:
    """Upload a model's folder; returns its address.

    Raises:
        TrainingError: it could not be uploaded; says how to try again.
        Interrupted: Ctrl-C; likewise.
    """
    again = shlex.join(["hf", "upload", repo_id, str(model)])
    try:
        commit = HfApi().upload_folder(folder_path=model, repo_id=repo_id, commit_message="Trained with unidpo")
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the run is finished, push it with: {again}", exit_code=130) from None
    except Exception as error:  # the run is finished, and whatever went wrong must not hide it
        raise TrainingError(
            f"the run is finished, {model} holds the model, but it could not be pushed ({_reason(error)}); "
            f"try again with: {again}"
        ) from error
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
