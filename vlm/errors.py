"""Every error that a user can cause, as one tree.

    VlmError
    ├── ImageError            (ValueError)   a picture cannot be used; has a short ``code``
    ├── MessageError          (ValueError)   a conversation is malformed
    ├── RecordError           (ValueError)   a data file or record is malformed
    ├── CheckpointError       (ValueError)   a model folder cannot be opened or written
    ├── ConfigError           (ValueError)   a recipe or an option is wrong
    ├── ContextLengthError    (ValueError)   prompt and pictures do not fit the context
    ├── GenerationError       (RuntimeError) the model computed something that is no answer
    ├── DivergenceError       (RuntimeError) training computed NaN or infinity
    ├── ErrorLimitError       (RuntimeError) more pictures failed than a run allows
    ├── QueueFullError        (RuntimeError) too many requests wait already; try again later
    └── MissingExtraError     (ImportError)  an optional dependency or system package is absent

Each message names the value, the reason and the way out. The command line prints
it on one line and exits with code 2; nothing else is caught there.
"""


class VlmError(Exception):
    """Base of all errors that this project raises for its users."""


class ImageError(VlmError, ValueError):
    """A picture that cannot be used.

    Args:
        message: what is wrong and the way out, on one line.
        code: a short stable word for programs, for example ``"empty_image"``.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """For other processes; Python's own way would leave the code out and fail there."""
        return type(self), (str(self), self.code)


class MessageError(VlmError, ValueError):
    """A conversation that breaks the rules of `vlm.messages`."""


class RecordError(VlmError, ValueError):
    """A data file or a record that cannot be read."""


class CheckpointError(VlmError, ValueError):
    """A model folder that cannot be opened, composed or written."""


class ConfigError(VlmError, ValueError):
    """A recipe, a key or an option that is unknown or has a wrong value."""


class ContextLengthError(VlmError, ValueError):
    """Prompt and pictures need more positions than the model has."""


class GenerationError(VlmError, RuntimeError):
    """The model's numbers are no answer, for example NaN logits."""


class DivergenceError(VlmError, RuntimeError):
    """A loss, a gradient or a trained weight is NaN or infinite; nothing of it is kept."""


class ErrorLimitError(VlmError, RuntimeError):
    """More pictures failed than a captioning or training run allows; what is done is kept."""


class QueueFullError(VlmError, RuntimeError):
    """Too many requests wait already."""


class MissingExtraError(VlmError, ImportError):
    """An optional dependency that is not installed; the message names the command."""
