"""The exceptions Quadriga raises, as one tree.

    QuadrigaError                 anything this project raises on purpose
    ├── InputError                the caller's input is wrong; commands exit with code 2
    │   ├── ConfigError           a model, run or generation configuration
    │   ├── CorpusError           text, corpora and their manifests
    │   ├── CheckpointError       weight files: unreadable, hostile, incomplete, of another model
    │   ├── TokenizerError        vocabulary files, token ids out of range
    │   ├── TemplateError         a chat template, or the messages given to it
    │   ├── RequestError          a prompt or sampling parameters
    │   │   └── GrammarError      a grammar or schema: malformed, not supported, or more work than it may be
    │   ├── CatalogueError        an unknown model name, a failed download, a wrong hash
    │   └── EvaluationError       an unknown benchmark, its data, or a question this kind of model cannot answer
    ├── HardwareError             this machine lacks what was asked for (memory, device, instruction set)
    ├── BusyError                 more requests than the engine takes; the same one may succeed later
    ├── EngineError               the engine failed while a request ran, or has stopped
    ├── AnswerError               one answer failed by a mistake of ours; the engine and the other answers go on
    ├── EndpointError             a model behind an HTTP interface refused, failed or did not answer
    └── TrainingError             a run that cannot go on: diverged, a rank lost, nowhere to save

Every message says what must be, what came, and what to do. ``assert`` is kept for our own invariants.
"""


class QuadrigaError(Exception):
    """Anything Quadriga raises on purpose. The message is written for the person who runs the command."""


class InputError(QuadrigaError):
    """The caller's input is wrong: a file, an option, a prompt. Commands print it and exit with code 2."""


class ConfigError(InputError):
    """A configuration that cannot be: unknown key, impossible sizes, unsupported option."""


class CorpusError(InputError):
    """Text that cannot be read, a prepared corpus that is damaged, or one that changed under a run."""


class CheckpointError(InputError):
    """A weight file that is unreadable, malformed, incomplete, or belongs to another model."""


class TokenizerError(InputError):
    """A vocabulary file that cannot be used, or a token id outside the vocabulary."""


class TemplateError(InputError):
    """A chat template that fails or runs out of fuel, or messages it cannot render."""


class RequestError(InputError):
    """A prompt or a sampling parameter that cannot be served."""


class GrammarError(RequestError):
    """A grammar or schema that cannot be used, or, while an answer follows it, one that takes more than it may."""


class CatalogueError(InputError):
    """A model name nobody knows, a source that does not answer, or bytes with the wrong hash."""


class EvaluationError(InputError):
    """A benchmark nobody knows, data that is missing or changed, or a question this kind of model cannot answer."""


class HardwareError(QuadrigaError):
    """This machine lacks what was asked for: memory, a device, an instruction set."""


class BusyError(QuadrigaError):
    """More requests than may wait. The same request may succeed later."""


class EngineError(QuadrigaError):
    """The engine failed while a request ran, or has stopped."""


class AnswerError(QuadrigaError):
    """One answer failed by a mistake of ours, which is its ``__cause__``; the engine and the other answers go on."""


class EndpointError(QuadrigaError):
    """A model behind an HTTP interface refused, failed, or did not answer after several tries."""


class TrainingError(QuadrigaError):
    """A training run that cannot go on: it diverged, a rank is lost, its state cannot be saved or trusted."""
