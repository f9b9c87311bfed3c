"""What the Hub's client raises, in words: who refused what, and what to do next. No server's text is quoted.

Reading and writing meet the same refusals; ``writing`` says which of the two was tried, where the advice differs.
"""

from __future__ import annotations

from collections.abc import Iterator

from unet_surgery.errors import HubError

__all__ = ["refusal", "refused", "unreachable"]

LOGIN = "hf auth login"
MAX_CAUSES = 20


def refusal(error: BaseException | None) -> Exception | None:
    """Return the client's exception for an answer of the Hub that was no, if ``error`` is one or was caused by one."""
    from huggingface_hub.errors import HfHubHTTPError

    found = (cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError))
    return next((cause for cause in found if getattr(cause, "response", None) is not None), None)


def refused(repository: str, revision: str | None, error: Exception, *, writing: bool = False) -> HubError:
    """Return the error for what the client raised when the Hub answered with a refusal."""
    status, name = _status(error), type(error).__name__
    what, hint = _named(name, repository, writing=writing) or _numbered(status, _seconds(error), writing=writing)
    return HubError(
        what,
        where=f"{repository}@{revision}" if revision else repository,
        found=name if status is None else f"HTTP {status}",
        hint=hint,
    )


def unreachable(repository: str, error: Exception, *, writing: bool = False) -> HubError:
    """Return the error for a Hub that does not answer, or that may not be asked."""
    offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _causes(error))
    if not writing:
        return HubError(
            "the Hugging Face Hub cannot be reached, and the model is not in its cache",
            where=repository,
            found="offline mode (HF_HUB_OFFLINE)" if offline else type(error).__name__,
            hint="give a local folder, or a built-in teacher such as sd-v1-random",
        )
    return HubError(
        "the Hugging Face Hub cannot be reached",
        where=repository,
        found="offline mode" if offline else type(error).__name__,
        hint="unset HF_HUB_OFFLINE, then run again" if offline else "run again with a network",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(MAX_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__


def _named(name: str, repository: str, *, writing: bool) -> tuple[str, str] | None:
    """Return what happened and what to do, for the refusals that have an exception of their own."""
    match name:
        case "GatedRepoError":
            return "the model is gated", f"accept its licence at huggingface.co/{repository}, then: {LOGIN}"
        case "RevisionNotFoundError":
            left_out = "--revision" if writing else "@revision"
            return "the model has no such revision", f"leave {left_out} out for the main branch"
        case "RepositoryNotFoundError":
            what = "the Hub has no such model, or it is private"
            return what, f"check the spelling; for a private model: {LOGIN}"
    return None


def _numbered(status: int | None, seconds: int | None, *, writing: bool) -> tuple[str, str | None]:
    """Return what happened and what to do, for the others."""
    match status:
        case 401:
            return "the Hub does not accept the token", f"it is wrong or has expired: {LOGIN}, or set HF_TOKEN anew"
        case 403 if writing:
            return "the token may not write there", f"check the name, or log in with a token that may write: {LOGIN}"
        case 403:
            return "the token may not read it", f"log in with a token that may: {LOGIN}"
        case 404:
            return "the Hub knows nothing of this name", "check the spelling"
        case 409 | 412 if writing:
            return "somebody else is changing the model", "run again"
        case 429:
            pause = "a while" if seconds is None else f"{seconds} s"
            return "the Hub takes no more requests for now", f"wait {pause}, then run again"
        case int() if status >= 500:
            return "the Hub has a fault of its own", "run again later"
    return "the Hub refused the request", None


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _seconds(error: Exception) -> int | None:
    """Return for how long the Hub asks to be left alone, where it says so in seconds."""
    said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return int(said) if said.isascii() and said.isdigit() and len(said) < 6 else None
