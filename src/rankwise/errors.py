"""The error tree. Every error names the place, what was expected, what was found and what to do.

RankwiseError
├── SpecError               a LoRA(...) field is out of range, or its parts do not go together
├── TargetError             target, exclude or pattern names that fit no module, or only in part
├── AttachError             the model is not in the state the call needs (name taken, unknown, absent)
│   ├── SiteNeverFired      an adapted layer's forward was bypassed
│   └── RoutingError        rows of a batch cannot be given to adapters
├── EvidenceError           an initialisation did not get what it must have seen
│   ├── NoGradient          a layer got no gradient
│   ├── NonFiniteGradient   a gradient or the loss was NaN or infinite
│   └── NonFiniteActivation a layer's input was NaN or infinite
├── CheckpointError         an adapter directory cannot be trusted or does not fit
│   ├── MissingTensor · UnexpectedTensor · ShapeMismatch · NonFiniteTensor
│   ├── BrokenFile          truncated, not safetensors, not JSON
│   ├── UnsupportedAdapter  well-formed, but of a kind that is not read here
│   ├── UnsafeFile          a pickle, code, or a link out of the directory: refused, never opened
│   ├── BaseMismatch        written for another base model
│   ├── AdapterTooLarge     takes more memory than is set aside for adapters
│   └── SpecMismatch        a run's state that was saved with another spec
├── MergeError              folding would lose or corrupt something
├── PretrainedError         no pretrained model can be loaded under that name
├── DataError               training data that cannot be used
│   └── NoTrainableTokens   every label is masked
├── WriteError              a file could not be written: a full disk, missing rights
├── HubError                a model hub refused, or cannot be reached
├── RecipeError             a recipe key or value that is not known
├── ServingError            a request that gets no answer
│   ├── RequestError        malformed, beyond a limit, or asks for what is not done here
│   ├── UnknownModel        nothing is served under that name
│   ├── Unauthorized        no API key, or a wrong one
│   ├── Overloaded          too many requests wait, or all adapters in memory are in use
│   ├── ServerStopping      no new requests are taken
│   └── AnswerFailed        the model could not go on
└── TrainingError           a run that cannot go on
    ├── Diverged            a loss, gradient or weight that is not finite any more
    ├── OutOfMemory         a step did not fit into memory
    ├── RunLocked           another process writes to the run's directory
    └── RunStopped          asked to stop (SIGTERM, Ctrl-C): saved, and to be resumed
"""


class RankwiseError(Exception):
    """Root of all errors raised on purpose by rankwise."""


class SpecError(RankwiseError, ValueError):
    """A field of ``LoRA(...)`` is out of range, or parts that do not go together."""


class TargetError(RankwiseError, ValueError):
    """``target_modules``, ``exclude_modules`` or a pattern fits no module, or only in part."""


class AttachError(RankwiseError, RuntimeError):
    """The model is not in the state that the call needs."""


class SiteNeverFired(AttachError):
    """An adapted layer's forward was bypassed, so its adapter would train on nothing."""


class RoutingError(AttachError):
    """The rows of a batch cannot be given to adapters: their number, or a layer that does not tell them apart."""


class EvidenceError(RankwiseError, RuntimeError):
    """An initialisation did not get what it must have seen."""


class NoGradient(EvidenceError):
    """A layer got no gradient from the given batches."""


class NonFiniteGradient(EvidenceError):
    """A gradient, or the loss it comes from, was NaN or infinite."""


class NonFiniteActivation(EvidenceError):
    """A layer's input was NaN or infinite."""


class CheckpointError(RankwiseError):
    """An adapter directory cannot be trusted or does not fit."""


class MissingTensor(CheckpointError):
    """A tensor that the configuration promises is not in the file."""


class UnexpectedTensor(CheckpointError):
    """The file holds a tensor that no site of the adapter accounts for."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape does not follow from the configuration and the model."""


class NonFiniteTensor(CheckpointError):
    """A tensor holds NaN or infinity."""


class BrokenFile(CheckpointError):
    """A file is absent, truncated, or not what its name says."""


class UnsupportedAdapter(CheckpointError):
    """A well-formed adapter of a kind that is not read here."""


class UnsafeFile(CheckpointError):
    """A pickle, code of its own, or a link out of the directory: refused, never opened."""


class BaseMismatch(CheckpointError):
    """The adapter was written for another base model."""


class AdapterTooLarge(CheckpointError):
    """The adapter takes more memory than is set aside for adapters."""


class SpecMismatch(CheckpointError):
    """A run's state was saved with another spec than the one it is to go on with."""


class MergeError(RankwiseError, RuntimeError):
    """Folding would lose or corrupt something."""


class PretrainedError(RankwiseError):
    """No pretrained model can be loaded under that name."""


class DataError(RankwiseError, ValueError):
    """Training data that cannot be used."""


class NoTrainableTokens(DataError):
    """Every label is masked: the loss would be zero over nothing."""


class WriteError(RankwiseError, OSError):
    """A file could not be written: a full disk, missing rights. What was there is as it was."""


class HubError(RankwiseError, OSError):
    """A model hub refused, or cannot be reached."""


class RecipeError(RankwiseError, ValueError):
    """A recipe key or value that is not known."""


class ServingError(RankwiseError):
    """A request to ``rankwise serve`` that gets no answer."""


class RequestError(ServingError, ValueError):
    """A request that is malformed, goes beyond a limit, or asks for what is not done here."""


class UnknownModel(ServingError, LookupError):
    """Nothing is served under that name."""


class Unauthorized(ServingError):
    """A request without the API key, or with a wrong one."""


class Overloaded(ServingError):
    """Too many requests wait, or all adapters in memory are in use: ask again later."""


class ServerStopping(ServingError):
    """The server finishes what it has, and takes no new requests."""


class AnswerFailed(ServingError, RuntimeError):
    """The model could not go on with an answer."""


class TrainingError(RankwiseError, RuntimeError):
    """A run that cannot go on."""


class Diverged(TrainingError):
    """A loss, a gradient or a weight is NaN or infinite: a lower learning rate may do."""


class OutOfMemory(TrainingError):
    """A step did not fit into memory."""


class RunLocked(TrainingError):
    """Another process writes to the run's directory."""


class RunStopped(TrainingError):
    """The run was asked to stop; it is saved, and can be resumed.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
