"""What the Hub's client raises, in words: who refused what, and what to do next."""

from __future__ import annotations

from unet_surgery.errors import HubError

__all__ = ["refusal", "refused", "unreachable"]

HINTS = {
    401: "log in with a token that may: hf auth login",
    403: "log in with a token that may: hf auth login",
    429: "wait a while, and run again",
}


def refusal(error: BaseException | None) -> Exception | None:
    """Return the client's exception for an answer of the Hub that was no, if ``error`` is one or was caused by one."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            return error
        error = error.__cause__
    return None


def refused(repository: str, revision: str | None, error: Exception) -> HubError:
    """Return the error for what the client raised when the Hub answered with a refusal."""
    name = type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    shown = f"{repository}@{revision}" if revision else repository
    if name == "GatedRepoError":
        return HubError(
            "the model is gated",
            where=shown,
            hint=f"accept its licence at huggingface.co/{repository}, then: hf auth login",
        )
    if name == "RevisionNotFoundError":
        return HubError("the model has no such revision", where=shown, hint="leave @revision out for the main branch")
    if name == "RepositoryNotFoundError":
        return HubError(
            "the Hub has no such model, or it is private",
            where=shown,
            hint="check the spelling; for a private model: hf auth login",
        )
    return HubError(
        "the Hub refused the request",
        where=shown,
        found=f"HTTP {status}" if status else name,
        hint="run again later" if status is None or status >= 500 else HINTS.get(status),
    )


def unreachable(repository: str, error: Exception) -> HubError:
    """Return the error for a Hub that does not answer."""
    return HubError(
        "the Hugging Face Hub cannot be reached, and the model is not in its cache",
        where=repository,
        found=type(error).__name__,
        hint="give a local folder, or a built-in teacher: --teacher sd-v1-random",
    )
