"""Model configuration -> tokenizer with its chat template."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medtune.config.schema import Model
from medtune.modeling.weights import resolve_weights, with_hub_errors
from medtune.runtime.errors import UserError


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Loads the tokenizer with `model.pad_token` as padding, on the left: answers are generated at the right end.

    Raises `UserError` when it cannot be loaded, has no chat template, or lacks a token that the configuration names.
    """
    source = resolve_weights(model)
    tokenizer = with_hub_errors(
        model, lambda: AutoTokenizer.from_pretrained(source, revision=model.revision, trust_remote_code=False)
    )
    vocabulary = tokenizer.get_vocab()
    for name, tokens in (("pad_token", [model.pad_token]), ("stop_tokens", model.stop_tokens)):
        for token in tokens:
            if token not in vocabulary:
                raise UserError(f"model.{name}: {token} is not in the vocabulary of {model.hub_id}")
    if not tokenizer.chat_template:
        raise UserError(f"{model.hub_id} has no chat template: choose an instruct model")
    tokenizer.pad_token = model.pad_token
    tokenizer.padding_side = "left"
    return tokenizer
