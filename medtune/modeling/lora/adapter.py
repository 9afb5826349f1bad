"""conf/lora -> the base model with a LoRA adapter; saving it, and the proof that it loads again."""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from medtune.config.schema import Lora
from medtune.modeling.frozen_base import hash_tensor
from medtune.modeling.lora.files import weights_of
from medtune.modeling.lora.linear import use_fused_lora
from medtune.runtime.errors import UserError

COMPARED = 64  # tokens


def add_lora(base: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Attaches a new adapter in float32, the only part that trains.

    The seed is set right before: a member of a sweep starts from the weights of the same run alone. Raises `UserError`
    when one of `lora.target_modules` is no linear layer of the base model.
    """
    # The head is left out: SFTTrainer takes the loss from its plain weights.
    linear = {n.rsplit(".", 1)[-1] for n, m in base.base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    missing = [name for name in lora.target_modules if name not in linear]
    if missing:
        known = ", ".join(sorted(linear))
        raise UserError(f"lora.target_modules: {base.name_or_path} has no layer {', '.join(missing)}; it has {known}")
    config = LoraConfig(task_type="CAUSAL_LM", **asdict(lora))
    set_seed(seed)
    model = get_peft_model(base, config)
    use_fused_lora(model)
    return model


def to_float32(model: PeftModel) -> None:
    """Casts the adapter to float32: TRL casts that of a 4-bit base to bfloat16, where small updates are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fingerprint(model: PeftModel) -> str:
    """Returns a sha256 over the weights that train: equal means equal to the bit."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            hash_tensor(digest, parameter.float())
    return digest.hexdigest()


def trainable_parameters(model: PeftModel) -> tuple[int, int]:
    """Returns how many parameters train, and how many there are; a quantized weight counts as dequantized."""
    return model.get_nb_trainable_parameters()


class Damaged(Exception):
    """An adapter that must not be used."""


def require_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, hub_id: str) -> None:
    """Raises `UserError` when an adapter was trained with another vocabulary than its base model has here."""
    try:
        trained = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the libraries that read it raise different ones
        first = " ".join(str(error).split())[:100]
        raise UserError(f"{folder}: its tokenizer cannot be read ({first}): copy the folder again") from None
    if trained.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{folder} was trained with a vocabulary of {len(trained):,} tokens that is not the one of {hub_id} "
            f"({len(tokenizer):,}): choose its base with model=…"
        )


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Attaches a saved adapter, in float32 as it was trained.

    Raises `UserError` when it does not fit the base, lacks a weight, or holds one that is not finite.
    """
    try:
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder} does not fit {base.name_or_path}: {str(error).splitlines()[0]}") from None
    with safe_open(weights_of(folder), "pt") as tensors:
        # save_embedding_layers: the default asks the hub whether the vocabulary was resized.
        lacking = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(tensors.keys()))
    if lacking:
        raise UserError(f"{folder} lacks {len(lacking)} of its weights, {lacking[0]} the first: copy it again")
    for name, parameter in model.named_parameters():
        if "lora_" in name and not torch.isfinite(parameter).all():
            raise UserError(f"{folder}: {name} is not finite: the adapter answers nothing; train again")
    use_fused_lora(model)
    return model


def save_verified(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, input_ids: list[int]) -> None:
    """Saves the adapter under a temporary name, and renames it once it is proved to load as it was trained.

    `input_ids`: the tokens of a row to compare logits on. Raises `Damaged`.
    """
    unfinished = folder.with_name(f".{folder.name}")
    save(model, tokenizer, unfinished)
    verify(model, unfinished, input_ids)
    shutil.rmtree(folder, ignore_errors=True)  # of the same run, interrupted later
    unfinished.rename(folder)


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes adapter, tokenizer with its chat template, and a card that names the base model by its hub id.

    Raises `Damaged` if a weight is not finite: such an adapter cannot answer.
    """
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(cast(LoraConfig, model.peft_config[model.active_adapter])), encoding="utf-8")


def save_weights(model: PeftModel, folder: Path) -> None:
    """Writes the weights and the configuration of the adapter alone, all that a checkpoint needs of it.

    Raises `Damaged` if a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Damaged(f"{name} is not finite; nothing was saved")
    # save_embedding_layers: the default asks the hub whether the vocabulary was resized.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty form of a card


def card(config: LoraConfig) -> str:
    """Returns the model card of an adapter (https://huggingface.co/docs/hub/model-cards); PEFT's is an empty form."""
    base, modules = config.base_model_name_or_path, ", ".join(sorted(config.target_modules or []))
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora, medtune]
---

# LoRA adapter of {base} for patient-doctor conversations

Trained with medtune: rank {config.r}, alpha {config.lora_alpha:g}, on {modules}.

For research. It is no medical device, no clinician has reviewed its answers, and they are not medical advice.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def verify(model: PeftModel, folder: Path, input_ids: list[int]) -> None:
    """Loads the saved adapter beside the trained one, and compares their logits to the bit.

    `input_ids`: the tokens of one row, of which the first `COMPARED` are looked at: each has logits of its own for the
    whole vocabulary. Raises `Damaged` when the logits differ.
    """
    row = torch.tensor([input_ids[:COMPARED]], device=model.device)
    trained = model.active_adapter
    mode = model.training
    model.eval()
    with torch.no_grad():
        in_memory = model(input_ids=row, use_cache=False).logits
        model.load_adapter(str(folder), adapter_name="reloaded", autocast_adapter_dtype=True)
        use_fused_lora(model)
        model.set_adapter("reloaded")
        reloaded = model(input_ids=row, use_cache=False).logits
    model.set_adapter(trained)
    model.delete_adapter("reloaded")
    model.train(mode)
    if not torch.equal(in_memory, reloaded):
        difference = (in_memory - reloaded).abs().max().item()
        raise Damaged(f"{folder} does not load as it was trained: logits differ by up to {difference:.3g}")
