"""The failures a user can cause or meet, each with the exit code its command ends in."""


class KvqError(Exception):
    """A known failure: one sentence with what was found, what was expected and what to do."""

    exit_code = 2


class SpecError(KvqError):
    """A spec string or a spec's fields do not describe a scheme."""


class InputError(KvqError):
    """A file, text, data set, model path or option value cannot be used."""


class BundleError(KvqError):
    """A bundle or saved cache is damaged, from another version, or belongs to another model."""


class RunError(KvqError):
    """Something failed while running: non-finite activations, no memory, no disk."""

    exit_code = 3


def brief(value: object) -> str:
    """Return a value as one line of an error can show it: short, and without control characters."""
    text = str(value)
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
