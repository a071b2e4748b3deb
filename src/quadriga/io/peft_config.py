"""peft's ``adapter_config.json``, every key of it: read, known to be without effect (with the reason), or refused.

An option that is passed over in silence gives wrong answers that nobody notices: a PiSSA adapter on the original base,
a scale that belongs to another module. So a key this table does not know is an error too. Which modules an adapter
changes is said twice, by the configuration and by the names of its factors; the two are held to each other.

Keys and their meaning: peft 0.21.2 (LoraConfig, tuners_utils.check_target_module_exists, utils.get_pattern_key). No
torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from quadriga.errors import ConfigError
from quadriga.model.families.keys import Keys

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "lm_head"
_MAX_RANK = 4096

_OF_INIT = "settings of a way to start training; init_lora_weights says which one was taken"
HARMLESS: Mapping[str, str] = {
    "auto_mapping": "names the Python class of the base; code is never followed",
    "base_model_name_or_path": "the base's name, for people",
    "corda_config": _OF_INIT,
    "eva_config": _OF_INIT,
    "inference_mode": "whether the factors were frozen when the file was written",
    "loftq_config": _OF_INIT,
    "lora_ga_config": _OF_INIT,
    "megatron_core": "which module of Megatron to import, if megatron_config asks for it",
    "merge_weights": "peft 0.2: whether its own layers fold the factors in when they evaluate",
    "qalora_group_size": "of use_qalora, which must be off",
    "revision": "which revision of the base was fetched; the weights given here are the base",
    "runtime_config": "where peft computes, not what",
}
"""Keys without effect on the numbers, each with the reason."""

_BASE_KEPT = ("gaussian", "orthogonal", "eva", "mica")
"""Ways to start that leave the base's weights alone; with true and false all that are read."""

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "task_type": (None, "", "CAUSAL_LM"),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "enable_lora": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
"""Options of other mathematics, and the values that switch them off."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What an adapter's configuration says about its numbers."""

    rank: int
    alpha: float
    dropout: float
    rooted: bool
    """rsLoRA: the scale is alpha / sqrt(rank)."""
    dora: bool
    along_inputs: bool
    """Of fused stacks (E, out, in): A runs along the inputs, as peft writes since 0.19; before, along the outputs."""
    base: str
    ranks: tuple[tuple[re.Pattern[str], float], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    modules: tuple[str, ...] | re.Pattern[str] | None
    """Names or endings of names, a pattern, or None where the file does not say."""
    excluded: tuple[str, ...] | re.Pattern[str]
    parameters: tuple[str, ...]
    """Endings of names of parameters that are no module's weight (fused expert stacks)."""
    layers: tuple[int, ...]
    """Empty: all."""
    saved: tuple[str, ...]
    """Modules whose whole weights are in the file."""
    tokens: Mapping[str, tuple[int, ...]]
    """Embedding module -> ids whose rows are in the file."""

    def rank_of(self, module: str) -> int:
        """The rank of one module's factors."""
        return int(_of(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by in one module."""
        rank = self.rank_of(module)
        return float(_of(self.alphas, module, self.alpha)) / (rank**0.5 if self.rooted else rank)

    def adapts(self, module: str) -> bool | None:
        """Whether a module has factors; None: the file leaves it open."""
        if _matches(self.excluded, module):
            return False
        if self.modules is None:
            return None
        if isinstance(self.modules, tuple) and module in self.modules:
            return True  # named in full: layers_to_transform does not count
        if not _matches(self.modules, module):
            return False
        numbers = [int(part) for part in module.split(".") if part.isdecimal()]
        if not self.layers or (numbers and numbers[0] in self.layers):
            return True
        # Older releases took the last number of a name for the layer, which in a mixture is the expert's.
        return None if set(numbers[1:]).intersection(self.layers) else False

    def adapts_parameter(self, name: str) -> bool:
        """Whether a fused stack has factors."""
        return names_module(self.parameters, name)


def read(raw: Mapping[str, object]) -> PeftConfig:
    """Read a parsed adapter_config.json.

    Raises:
        ConfigError: an option that is not computed, a key that is not known, or a value of the wrong type.
    """
    keys = Keys(raw, FILE)
    keys.must_be("peft_type", "LORA")
    for key, allowed in _UNSUPPORTED.items():
        keys.must_be(key, *allowed)
    _check_start(keys.value("init_lora_weights"))
    rank = keys.integer("r")
    ranks = _patterns(keys, "rank_pattern")
    if wrong := [one for one in (rank, *(value for _, value in ranks)) if not 1 <= one <= _MAX_RANK]:
        raise ConfigError(f"{FILE}: r and the values of rank_pattern must be from 1 to {_MAX_RANK}, got {wrong[0]}")
    modules = keys.value("target_modules")
    config = PeftConfig(
        rank=rank,
        alpha=keys.number("lora_alpha"),
        dropout=keys.number("lora_dropout") if keys.given("lora_dropout") else 0.0,
        rooted=keys.flag("use_rslora") if keys.given("use_rslora") else False,
        dora=keys.flag("use_dora") if keys.given("use_dora") else False,
        along_inputs=_version(keys.value("peft_version")) >= (0, 19),
        base=str(keys.value("base_model_name_or_path") or ""),
        ranks=ranks,
        alphas=_patterns(keys, "alpha_pattern"),
        modules=None if modules is None else _names(keys, "target_modules"),
        excluded=_names(keys, "exclude_modules"),
        parameters=_words(keys, "target_parameters"),
        layers=_layers(keys),
        saved=_words(keys, "modules_to_save"),
        tokens=_tokens(keys),
    )
    _words(keys, "layers_pattern")  # the name of the list of layers; a family here has one list
    if keys.given("ensure_weight_tying"):
        keys.flag("ensure_weight_tying")  # a tied table is one matrix here, so its two uses cannot differ
    keys.finish(frozenset(HARMLESS))
    return config


def _check_start(start: object) -> None:
    """Refuse ways to start that changed the base: their factors fit that changed base, which is not in the file."""
    if start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _BASE_KEPT):
        return
    raise ConfigError(
        f"{FILE}: init_lora_weights must be true, false or one of {', '.join(_BASE_KEPT)}; got {str(start)[:40]!r}. "
        "That way of starting changes the base's weights, and these factors belong to the changed base: on the "
        "original one they give wrong answers. Save the adapter with peft's path_initial_model_for_weight_conversion, "
        "which makes a plain one of it, or merge it with peft and give the result."
    )


def _version(text: object) -> tuple[int, int]:
    """(0, 19) of "0.19.0" or "0.19.1.dev0@UNKNOWN"; files from before 0.18 do not say."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _layers(keys: Keys) -> tuple[int, ...]:
    value = keys.value("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is None or layers == []:
        return ()
    if not isinstance(layers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise ConfigError(f"{FILE}: layers_to_transform must be a layer or a list of layers, got {str(value)[:80]}")
    return tuple(layers)


def _tokens(keys: Keys) -> dict[str, tuple[int, ...]]:
    value = keys.value("trainable_token_indices")
    table: Mapping[str, object] = value if isinstance(value, dict) else {}
    if value is not None and not table:
        table = {"embed_tokens": value}
    found: dict[str, tuple[int, ...]] = {}
    for module, ids in table.items():
        fine = isinstance(ids, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids)
        if not isinstance(ids, list) or not fine or len(set(ids)) != len(ids):
            raise ConfigError(f"{FILE}: trainable_token_indices of {module[:80]} must be ids, each once")
        found[module] = tuple(ids)
    return found


def _words(keys: Keys, key: str) -> tuple[str, ...]:
    """A list of names, or one name."""
    value = keys.value(key)
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{FILE}: {key} must be a list of names, got {str(value)[:80]}")
    return tuple(names)


# Which modules -------------------------------------------------------------------------------------------------------


def _of(patterns: tuple[tuple[re.Pattern[str], float], ...], module: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)


def names_module(names: tuple[str, ...], module: str) -> bool:
    """Whether one of the names is a module's or the end of it, as peft takes them."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(names: tuple[str, ...] | re.Pattern[str], module: str) -> bool:
    return names_module(names, module) if isinstance(names, tuple) else names.fullmatch(module) is not None


def _names(keys: Keys, key: str) -> tuple[str, ...] | re.Pattern[str]:
    """A list of endings of names, or (as peft reads one string) a pattern for whole names."""
    value = keys.value(key)
    if not isinstance(value, str) or not value:
        return _words(keys, key)
    if value == "all-linear":  # every linear module but the head; tables are none
        return re.compile(r"(?!(.*\.)?(lm_head|output|embed_tokens|wte|tok_embeddings)$).*")
    return _compiled(key, value, value)


def _patterns(keys: Keys, key: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    table = keys.value(key) or {}
    if not isinstance(table, dict):
        raise ConfigError(f"{FILE}: {key} must map names to numbers, got {str(table)[:80]}")
    values = Keys(table, f"{FILE}: {key}")
    read_one = values.integer if key == "rank_pattern" else values.number
    return tuple((_compiled(key, name, rf"(.*\.)?({name})$"), read_one(name)) for name in table)


def _compiled(key: str, given: str, pattern: str) -> re.Pattern[str]:
    """``pattern``, made of one from the file that cannot take long on any name.

    Raises:
        ConfigError: a pattern that could, or that is none.
    """
    if not _is_quick(given):
        raise ConfigError(
            f"{FILE}: {key} has the pattern {given[:120]!r}, which is too involved to be followed safely. List the "
            "names of the modules."
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ConfigError(f"{FILE}: {key} has the pattern {given[:120]!r}, which is none: {error}") from None


def _is_quick(pattern: str) -> bool:
    """True if Python's backtracking stays polynomial and small: a few repeated characters, alternatives plain words.

    ``model.layers.[\\d]+.(mlp|self_attn).(up|down)_proj`` is; a repeated or nested group is not.
    """
    whole = pattern if "(" in pattern or "|" not in pattern else f"({pattern})"
    budget, group, last = 3, "", ""
    inside = False
    for token in re.findall(r"\\.|\[[^\]]*\]|\(\?:|.", whole[:501], re.DOTALL):
        if token in ("(", "(?:"):
            if inside:
                return False
            inside, group = True, ""
        elif token == ")":
            inside = False
            words = sorted(group.split("|"))
            budget -= any(b.startswith(a) for a, b in pairwise(words))
        elif token in ("*", "+", "{", "?"):
            if inside or last == ")":
                return False
            budget -= last not in ("*", "+", "}")  # a second mark only makes the first one lazy
        elif inside:
            if not (token.isalnum() or token in "_|-" or token == "\\."):
                return False
            group += token
        last = token
    return budget >= 0 and len(pattern) <= 500 and not inside
