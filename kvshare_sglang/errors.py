"""Every error this package raises on purpose. Bottom layer: imports nothing."""


class KVShareError(Exception):
    """Base of all errors of kvshare_sglang."""


class ConfigError(KVShareError, ValueError):
    """A setting is out of range; carries its name, the value and what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(f"{name} must be {allowed}, got {_brief(value)}")


def _brief(value: object, *, limit: int = 120) -> str:
    """``repr``, cut: what a client sends by mistake must not come back in full."""
    try:
        text = repr(value)
    except Exception:  # nested too deep, an integer of too many digits, an object of its own mind
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


class UnsupportedError(KVShareError, ValueError):
    """The server asks for something kvshare does not serve; carries what to drop."""

    def __init__(self, what: str, drop: str) -> None:
        self.what, self.drop = what, drop
        super().__init__(f"--kvshare does not serve {what} yet: drop {drop}")


class StartError(KVShareError, ValueError):
    """A server cannot start from what it was given; the message names it and what to do."""


class SeamError(KVShareError, RuntimeError):
    """A place in SGLang that kvshare must touch is not there; carries their names."""

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing
        super().__init__(
            "kvshare refuses to start: this SGLang lacks or did not apply " + ", ".join(missing)
        )


class TreeError(KVShareError, RuntimeError):
    """An operation would break the fuzzy tree, such as trimming pinned tokens."""
