"""The type, range and unit of every key of a run. Values live in `conf/`.

Nothing heavy is imported, so that a mistake is answered at once.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from medtune.config.enums import (
    Attention,
    Dtype,
    Format,
    Optimizer,
    QuantizationType,
    RedFlag,
    Scheduler,
    WandbMode,
    Weights,
)

BUNDLED = "bundled:"  # begins the path of a file inside the package


def key(
    doc: str,
    unit: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **default: Any,
) -> Any:
    """Returns the field of a configuration key: what it is, its unit, and the range that a value must lie in. Its
    value is in `conf/`; a `default` or `default_factory` is for configurations written before there was the key.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(**(default or {"default": MISSING}), metadata={"doc": doc, "unit": unit, "bounds": bounds})


@dataclass
class Columns:
    """Which column holds what; null: the usual names are looked for."""

    messages: str | None = key("a list of messages, or a dialogue as text", "column name")
    question: str | None = key("the patient's message", "column name")
    answer: str | None = key("the doctor's answer", "column name")
    title: str | None = key("a headline of the question, used where there is no more", "column name")
    group: str | None = key("rows that must stay in one split share it", "column name")
    source: str | None = key("where a row comes from, for stratified splits", "column name")
    system: str | None = key("the row's own system message", "column name", default=None)
    history: str | None = key("what was said before the question", "column name", default=None)
    context: str | None = key("a text that the question is about, put below it", "column name", default=None)
    split: str | None = key("train, validation or test: such rows go there", "column name", default=None)


@dataclass
class Speakers:
    """Who speaks in a dialogue under labels that medtune does not know; rows with any other label are left out."""

    patient: list[str] = key("labels of the patient, and of who speaks for them", "labels", default_factory=list)
    doctor: list[str] = key("labels of the doctor, and of who answers like one", "labels", default_factory=list)
    text: list[str] = key("no speakers: headings within what somebody says", "labels", default_factory=list)


@dataclass
class Source:
    """conf/data/NAME.yaml: one set of conversations, where it is, and what is known about it."""

    name: str = key("recorded with every conversation", "name")
    hub_id: str | None = key("Hugging Face data set", "owner/name")
    revision: str | None = key("commit of the hub repository; null: the newest", "git revision")
    path: str | None = key("JSON, JSONL, CSV, TSV or Parquet file, read instead of the hub", "path")
    license: str = key("of the text, as its publisher states it", "SPDX name or words")
    redistributable: bool = key("whether the licence lets you pass the text on")
    format: Format = key("how a row holds a conversation")
    columns: Columns = field(default_factory=Columns)
    speakers: Speakers = field(default_factory=Speakers)
    group_pattern: str | None = key("its first group, found in the question, names the group", "regular expression")
    product_names: list[str] = key("names that the answers carry as advertising, removed", "texts")
    weight: float = key("times a training row is seen per epoch", "times", above=0, at_most=10)
    max_conversations: int | None = key("most conversations taken; null: all", "conversations", at_least=1)


@dataclass
class Rules:
    """conf/data/preparation: the cleaning rules. Text rules change what is written, row rules drop a row."""

    mojibake: bool = key("repair text that was decoded wrongly")
    markup: bool = key("remove HTML and control characters, tidy white space")
    links: bool = key("remove URLs and what is left of links")
    contacts: bool = key("replace e-mail addresses, phone and record numbers by what they were")
    decimals: bool = key("join broken decimals: 0. 5 mg")
    names: bool = key("remove doctors' names and signatures")
    products: bool = key("remove the source's product names")
    greetings: bool = key("remove boilerplate greetings and sign-offs")
    recase: bool = key("give lower-cased answers their capitals")
    titles: bool = key("drop a question that is only a headline")
    min_question_words: int = key("drop a shorter question", "words", at_least=1)
    min_answer_words: int = key("drop a shorter answer", "words", at_least=1)
    max_words: int | None = key("drop a longer conversation; null: none", "words", at_least=1)
    near_duplicates: float | None = key(
        "drop a later row whose question and answer are this alike; null: only equal ones", "Jaccard similarity",
        above=0.5, at_most=1,
    )  # fmt: skip
    answers_per_question: int | None = key("most answers to one question; null: all", "answers", at_least=1)
    questions_per_answer: int | None = key("most questions with one answer; null: all", "questions", at_least=1)


@dataclass
class Data(Source):
    """conf/data and conf/data/preparation: which conversations, and how they are cleaned and split.

    A mixture has its sources in `members`, and none of its own.
    """

    members: dict[str, Source] = field(default_factory=dict)
    system_prompt: str = key("put before every conversation that brings none", "text")
    rules: Rules = field(default_factory=Rules)
    redflag: RedFlag = key("what to do with an emergency that the answer does not treat as one")
    benchmarks: list[str] = key("files of questions that must not be trained on", "paths")
    benchmark_words: int = key("this many words in a row in common with a benchmark are too many", "words", at_least=5)
    validation_size: float = key(
        "groups kept for evaluation during training: below 1 their share, from 2 on conversations",
        "share or count",
        above=0,
    )
    test_size: float = key(
        "groups kept aside until the choice is made, likewise; 1: all of the data, for medtune.evaluate alone",
        "share or count", at_least=0,
    )  # fmt: skip
    max_leakage: float = key(
        "refuse when more of the held-out questions stand in another split too", "share", at_least=0, at_most=1
    )


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
    learning_rate: float = key("peak learning rate", "step size", above=0, at_most=1)
    lr_scheduler_type: Scheduler = key("learning rate over the steps")
    warmup_ratio: float = key(
        "share of the steps that raise the learning rate, evenly, the first one above 0", "share", at_least=0, below=1
    )
    weight_decay: float = key("decoupled weight decay of AdamW", "per step", at_least=0, below=1)
    max_grad_norm: float = key("gradients are scaled down to this norm; 0: never", "L2 norm", at_least=0)
    optim: Optimizer = key("optimizer")
    gradient_checkpointing: bool | None = key(
        "recompute activations: less memory, about a third more time; null: where memory asks for it"
    )
    group_by_length: bool = key("rows of one optimizer step share a micro-batch with those of about their length")
    logging_steps: int = key("log the training loss every so many steps", "steps", at_least=1)
    early_stopping_patience: int | None = key(
        "stop after so many evaluations without a better eval_loss; null: never", "evaluations", at_least=1
    )


@dataclass
class Gate:
    """What an adapter must reach on the safety set before it may be shown to anyone; and it must not fall behind its
    base. Shares of the answers, in every category on its own."""

    min_emergency_recall: float = key("emergencies sent to emergency care", "share", at_least=0, at_most=1)
    max_over_triage: float = key("plain complaints sent there", "share", at_least=0, at_most=1)
    max_doses: float = key("answers that give a prescription dose", "share", at_least=0, at_most=1)
    max_invented: float = key("answers with an invented identity, link or number", "share", at_least=0, at_most=1)


@dataclass
class Eval:
    """conf/eval: what is evaluated during training on the validation set, and at its end on the test set."""

    every: int = key("evaluate and save every so many steps", "steps", at_least=1)
    batch_size: int = key("conversations per forward pass", "conversations", at_least=1)
    prompts: list[str] = key("patients' messages, asked at every evaluation", "texts")
    held_out: int = key("validation conversations asked too, beside the doctor's answer", "conversations", at_least=0)
    red_flags: int = key("emergencies of the safety set asked too", "prompts", at_least=0, at_most=96)
    max_new_tokens: int = key("longest answer during training", "tokens", at_least=1)
    final_max_new_tokens: int = key("longest answer to the test and the safety set", "tokens", at_least=1)
    final: bool = key("evaluate the kept adapter on the test set at the end of training")
    answers: int | None = key("test conversations that are answered; null: all", "conversations", at_least=0)
    safety: bool = key("ask the safety set, and decide the gate")
    gate: Gate = field(default_factory=Gate)
    resamples: int = key("bootstrap resamples behind an interval", "resamples", at_least=100, at_most=100_000)
    benchmarks: list[str] = key("tasks of lm-evaluation-harness, or their YAML files", "names")


@dataclass
class Wandb:
    """conf/wandb: Weights & Biases. The same events always go to history.jsonl and samples.jsonl."""

    mode: WandbMode = key("offline writes a local run; nothing is sent")
    project: str = key("W&B project", "name")
    entity: str | None = key("W&B team or user; null: your default", "name")


@dataclass
class RunConfig:
    """One training run: what `train(run, out)` takes."""

    name: str = key("results go to multirun/<name>/<time>", "name")
    seed: int = key("seeds adapter, data order and dropout", "integer", at_least=0, at_most=2**32 - 1)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    quantization: Quantization | None = field(default_factory=Quantization)
    lora: Lora = field(default_factory=Lora)
    trainer: Trainer = field(default_factory=Trainer)
    eval: Eval = field(default_factory=Eval)
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class PrepareConfig(RunConfig):
    """What `python -m medtune.prepare` takes: a run, of which it looks at the data."""

    show: int = key("conversations to print with their target tokens marked", "conversations", at_least=0)
    out: str | None = key("folder for the prepared splits as Parquet files; null: not written", "path")


@dataclass
class EvaluateConfig(RunConfig):
    """What `python -m medtune.evaluate` takes: result folders, or the run whose base model is evaluated alone."""

    run: Any = key("a result folder of a run or a sweep, or a list of them; null: the base model alone", "path")
