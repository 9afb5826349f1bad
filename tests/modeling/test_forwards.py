"""Replaced forwards go through one place, are remembered in their order, and can be taken back."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import medtune
from medtune.config.schema import RunConfig
from medtune.modeling import base as base_model
from medtune.modeling import kernels
from medtune.modeling.forwards import describe_forwards, forward_replaced, replace_forward, replaced_forwards
from medtune.modeling.frozen_base import share_weights
from medtune.modeling.fused_layers import use_fused_layers
from medtune.modeling.lora import adapter
from medtune.modeling.loss import add_target_loss, unwrap_peft
from medtune.modeling.multi_lora.backbone import Backbone, proxy_base
from medtune.modeling.multi_lora.sequential import with_product
from medtune.modeling.tokenizer import load_tokenizer

Compose = Callable[..., RunConfig]


def test_the_last_one_runs_and_all_are_remembered() -> None:
    layer = nn.Linear(2, 2)
    own = layer.forward
    replace_forward(layer, lambda x: own(x) + 1, "plus one")
    replace_forward(layer, lambda x: own(x) + 2, "plus two")
    x = torch.ones(1, 2)
    assert torch.equal(layer(x), own(x) + 2) and replaced_forwards(layer) == ("plus one", "plus two")


def test_a_forward_that_is_replaced_for_a_while_is_taken_back() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    before, stock = layer(x), dict(vars(layer))
    with forward_replaced(layer, lambda x: x * 0, "zero"):
        assert not layer(x).any() and replaced_forwards(layer) == ("zero",)
    assert torch.equal(layer(x), before) and vars(layer) == stock
    replace_forward(layer, lambda x: x * 2, "twice")
    with forward_replaced(layer, lambda x: x * 0, "zero"):
        assert replaced_forwards(layer) == ("twice", "zero")
    assert torch.equal(layer(x), x * 2) and replaced_forwards(layer) == ("twice",)


def test_every_kind_of_layer_says_which_forward_it_runs(tiny_run: Compose) -> None:
    run = tiny_run("model.dtype=bfloat16")
    base = base_model.load_base(run.model, run.quantization, load_tokenizer(run.model), torch.device("cpu"))
    model = adapter.add_lora(share_weights(base), run.lora, 0)
    add_target_loss(unwrap_peft(model))
    lines = [line.split(maxsplit=2) for line in describe_forwards(model).splitlines()]
    kinds = {kind: (int(count), forwards) for kind, count, forwards in lines}
    # Two layers of seven products; the adapter wraps q, k, v and o of each.
    assert kinds["bitsandbytes.Linear4bit"] == (14, "its own -> cached dequantized weight")
    assert kinds["peft.Linear4bit"] == (8, "its own -> fused LoRA")
    assert kinds["transformers.LlamaForCausalLM"] == (1, "its own -> loss on target tokens")
    assert kinds["transformers.LlamaRMSNorm"] == (5, "its own")
    assert replaced_forwards(base) == (), "a view remembers its own"


def test_a_shared_pass_says_what_it_replaced(tiny_run: Compose) -> None:
    run = tiny_run()
    base = base_model.load_base(run.model, run.quantization, load_tokenizer(run.model), torch.device("cpu"))
    backbone = Backbone(base, False, "eager", 64)
    assert "adapters of all members" in describe_forwards(backbone.model)
    assert "hidden states from the shared pass" in describe_forwards(proxy_base(base, lambda batch: None))  # type: ignore


def test_fused_layers_say_what_they_replaced(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    base = base_model.load_base(run.model, run.quantization, load_tokenizer(run.model), torch.device("cpu"))
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))  # nothing is run there
    monkeypatch.setattr(kernels, "kernels_available", lambda: True)
    use_fused_layers(base)
    lines = [line.split(maxsplit=2) for line in describe_forwards(base).splitlines()]
    kinds = {kind: (int(count), forwards) for kind, count, forwards in lines}
    assert kinds["transformers.LlamaRMSNorm"] == (5, "its own -> fused RMSNorm")
    assert kinds["transformers.LlamaMLP"] == (2, "its own -> fused SwiGLU")
    assert kinds["transformers.LlamaAttention"] == (2, "its own -> fused rotary positions")


def test_a_known_product_stands_in_for_the_base_layer_for_one_call() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(2, 2)

        def get_base_layer(self) -> nn.Linear:
            return self.base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert "its own -> known product" in describe_forwards(self)
            return self.base(x)

    layer, known = Layer(), torch.randn(1, 2)
    assert with_product(layer, torch.ones(1, 2), known) is known
    assert replaced_forwards(layer.base) == ()


def test_no_other_module_replaces_a_forward() -> None:
    package = Path(medtune.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if assigns_forward(node):
                found.append(path.relative_to(package).as_posix())
    assert found == ["modeling/forwards.py"]


@pytest.mark.parametrize(
    "line",
    ["m.forward = f", "m.forward: int = f", "a, m.forward = f", "vars(m)['forward'] = f", "setattr(m, 'forward', f)"],
)
def test_every_way_to_replace_a_forward_is_found(line: str) -> None:
    assert any(assigns_forward(node) for node in ast.walk(ast.parse(line)))


def assigns_forward(node: ast.AST) -> bool:
    """Whether a node of a syntax tree stores something as `forward` of an object."""
    if isinstance(node, ast.Attribute):
        return node.attr == "forward" and isinstance(node.ctx, ast.Store)
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.slice) == "'forward'" and isinstance(node.ctx, ast.Store)
    is_setattr = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr")
    return is_setattr and any(ast.unparse(argument) == "'forward'" for argument in node.args)
