"""The fused LoRA layer against PEFT's own: output, gradients and dropout, on every kind of base model."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from medtune.config.schema import RunConfig
from medtune.modeling import base as model
from medtune.modeling.lora import adapter
from medtune.modeling.lora.dropout import apply_mask, key_dropout
from medtune.modeling.lora.linear import FusedLora, lora_linear
from medtune.modeling.quantized import FrozenLinear
from medtune.modeling.tokenizer import load_tokenizer

Compose = Callable[..., RunConfig]
ROWS = torch.randint(5, 500, (3, 7), generator=torch.Generator().manual_seed(1))


def tuned(run: RunConfig) -> PeftModel:
    """Returns a base with an adapter that adds something: a new adapter's B is zero."""
    tokenizer = load_tokenizer(run.model)
    result = adapter.add_lora(model.load_base(run.model, run.quantization, tokenizer, torch.device("cpu")), run.lora, 1)
    for layer in lora_layers(result):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    key_dropout(result, seed=3)
    return result.train()


def lora_layers(net: PeftModel) -> list[LoraLayer]:
    return [layer for layer in net.modules() if isinstance(layer, LoraLayer)]


def stock(net: PeftModel) -> None:
    """Makes PEFT compute every layer."""
    for layer in lora_layers(net):
        assert isinstance(layer.lora_variant.pop("default"), FusedLora)
        layer.cast_input_dtype_enabled = True


def outcome(net: PeftModel) -> dict[str, torch.Tensor]:
    """Returns the logits, and the gradient of every weight that trains."""
    net.zero_grad()
    logits = net(input_ids=ROWS, use_cache=False).logits
    logits.float().square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Returns the largest relative difference: norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (["quantization=none", "model.dtype=float32"], 1e-5),
        (["quantization=nf4", "model.dtype=float32"], 1e-5),
        (["quantization=nf4", "model.dtype=float32", "lora=all_linear", "lora.use_rslora=true"], 1e-5),
        # PEFT adds in float32 what the frozen product rounds to 8 bits; so does no GPU under autocast.
        (["quantization=nf4", "model.dtype=bfloat16"], 4e-2),
        (["quantization=none", "model.dtype=bfloat16", "lora.lora_dropout=0"], 3e-2),
        (["quantization=int8", "model.dtype=bfloat16"], 3e-2),
    ],
)
def test_numbers_are_those_of_the_stock_layer(tiny_run: Compose, words: list[str], tolerance: float) -> None:
    net = tuned(tiny_run("lora.lora_dropout=0.3", *words))
    ours = outcome(net)
    stock(net)
    theirs = outcome(net)
    assert largest(ours, theirs) < tolerance
    assert all(tensor.dtype == theirs[name].dtype for name, tensor in ours.items())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_small_adapter_is_trained_as_it_is_evaluated(tiny_run: Compose, quantization: str) -> None:
    """Its part is smaller than the rounding of the frozen product: sums must be rounded as often in both."""
    net = tuned(tiny_run(f"quantization={quantization}", "model.dtype=bfloat16", "lora.lora_dropout=0"))
    for layer in lora_layers(net):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    trained = net(input_ids=ROWS, use_cache=False).logits
    with torch.no_grad():
        evaluated = net.eval()(input_ids=ROWS, use_cache=False).logits
    assert torch.equal(trained, evaluated)


def test_dropout_drops_its_share_and_only_in_training(tiny_run: Compose) -> None:
    net = tuned(tiny_run("model.dtype=float32", "lora.lora_dropout=0.3"))
    dropout = lora_layers(net)[0].lora_dropout["default"]
    kept = apply_mask(torch.ones(1, 4 * 16, 64), dropout.mask(torch.ones(4, 16, 64)))
    assert kept.unique().tolist() == [0, 1] and abs(float((kept == 0).float().mean()) - 0.3) < 0.03
    in_training = outcome(net)["logits"]
    evaluated = outcome(net.eval())["logits"]
    dropout.step.optimizer_step += 1
    assert torch.equal(evaluated, outcome(net)["logits"])
    assert not torch.equal(in_training, outcome(net.train())["logits"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_autocast_changes_no_type(training: bool, weight: bool) -> None:
    """As on a GPU, where autocast would run some products in 16 bits, others in the type of x."""
    layer = torch.nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
    product = FrozenLinear(lambda x: layer(x.bfloat16()).to(x.dtype), (lambda: layer.weight) if weight else None, None)
    x = torch.randn(3, 7, 6, requires_grad=True)
    a, b = torch.randn(1, 2, 6, requires_grad=True), torch.randn(1, 5, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        found = lora_linear(product, x, a, b, 2.0, None)
    expected = x @ (layer.weight.float() + 2 * b[0] @ a[0]).T
    assert (found.float() - expected).norm() < 2e-2 * expected.norm()
    if training:
        assert all(part.dtype is torch.float32 for part in torch.autograd.grad(found.float().sum(), (x, a, b)))


def test_a_disabled_adapter_adds_nothing(tiny_run: Compose) -> None:
    net = tuned(tiny_run("model.dtype=float32"))
    with net.disable_adapter(), torch.no_grad():
        disabled = net(input_ids=ROWS).logits
    assert torch.equal(disabled, net.unload()(input_ids=ROWS).logits)


def test_dora_stays_with_its_own_layer(tiny_run: Compose) -> None:
    net = tuned(tiny_run("model.dtype=float32", "lora.use_dora=true"))
    assert not any(isinstance(layer.lora_variant["default"], FusedLora) for layer in lora_layers(net))
