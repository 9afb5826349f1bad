"""train(run, out) on a tiny Llama: what is learned, what is kept, and what happens when it goes wrong."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import get_scheduler

from helpers import conversations, write_jsonl
from medtune.config.enums import Scheduler
from medtune.config.schema import RunConfig
from medtune.data.prepared import prepare
from medtune.data.tokenization.dataset import tokenize
from medtune.modeling import base as model
from medtune.modeling.frozen_base import fingerprint
from medtune.modeling.lora import adapter
from medtune.modeling.lora.dropout import key_dropout
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.errors import RunFailed, UserError
from medtune.training import trainer
from medtune.training.pipeline import train
from medtune.training.trainer import begin_above_zero

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def read(out: Path, name: str) -> dict:
    return json.loads((out / name).read_text())


def steps(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in history(out) if name in row}


def test_result_folder_explains_itself(tiny_run: Compose, tmp_path: Path) -> None:
    run = tiny_run("trainer.learning_rate=5e-3", "lora.r=4", "eval.final=true")
    eval_loss = train(run, tmp_path / "run")
    out = tmp_path / "run"

    facts, metrics = read(out, "run.json"), read(out, "metrics.json")
    assert facts["status"] == "done" and facts["error"] is None and facts["seed"] == 42
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["data_fingerprint"]) == len(facts["base"]["fingerprint"]) == 64
    # q, k, v, o of two layers: r * (in + out) each
    assert facts["trainable_parameters"] == 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64))

    losses = steps(out, "eval_loss")
    assert sorted(losses) == [0, 3, 6]
    assert metrics["base"]["eval_loss"] == losses[0]
    assert metrics["best"]["eval_loss"] == eval_loss == min(losses[3], losses[6]) < losses[0]
    assert metrics["best"]["perplexity"] == pytest.approx(math.exp(eval_loss))
    tested = metrics["test"]
    assert tested["conversations"] == facts["data"]["splits"]["test"] > 0
    loss = {name: tested[name]["scores"]["loss"]["value"] for name in ("base", "tuned")}
    assert loss["tuned"] == pytest.approx(loss_of_saved(run, out, "test"), rel=1e-5)
    assert loss["tuned"] < loss["base"]
    assert tested["groups"] < 5 and tested["difference"]["loss"]["verdict"] == "not distinguishable"
    assert facts["mask"]["answers"] > facts["mask"]["checked"] == sum(facts["data"]["splits"].values())
    assert sorted(steps(out, "loss")) == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_gb"] > 0 for row in history(out) if "loss" in row)

    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 3, 3, 6, 6]
    assert samples[0]["prompt"] == "I have a fever and a sore throat. What should I do?"
    assert samples[1]["reference"] and all(row["stop"] in ("end_of_turn", "length") for row in samples)

    saved = read(out / "adapter", "adapter_config.json")
    assert saved["base_model_name_or_path"] == "medtune/tiny-test" and (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert (out / "adapter" / "chat_template.jinja").is_file()
    card = (out / "adapter" / "README.md").read_text()
    assert "base_model: medtune/tiny-test\n" in card and "rank 4, alpha 8, on k_proj, o_proj, q_proj, v_proj" in card
    for file in (out / "adapter").iterdir():
        assert run.model.path and run.model.path not in file.read_text(errors="ignore"), f"{file} names a local folder"
    assert not list(out.rglob("training_args.bin")), "a pickle with every secret of TrainingArguments"


def test_adapter_of_the_best_evaluation_is_the_one_kept(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.AdapterTrainer.training_step

    def ruinous(self: trainer.AdapterTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 4:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter += 1.0
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", ruinous)
    run = tiny_run()
    eval_loss = train(run, tmp_path / "run")
    losses = steps(tmp_path / "run", "eval_loss")
    assert eval_loss == losses[3] < losses[6]
    assert loss_of_saved(run, tmp_path / "run") == pytest.approx(losses[3], rel=1e-5)


def loss_of_saved(run: RunConfig, out: Path, split: str = "validation") -> float:
    """Loss of a saved adapter on a split, computed by transformers' own loss, one row at a time."""
    tokenizer = load_tokenizer(run.model)
    base = model.load_base(run.model, run.quantization, tokenizer, CPU)
    tuned = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    rows = getattr(tokenize(tokenizer, prepare(run.data), 256), split)
    summed, taught = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = tuned(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        count = int((labels != -100).sum())
        summed, taught = summed + loss.item() * count, taught + count
    return summed / taught


def test_eval_loss_weighs_every_taught_token_alike(tiny_run: Compose, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        run = tiny_run("trainer.max_steps=1", f"eval.batch_size={size}")
        train(run, tmp_path / str(size))
        losses.append(steps(tmp_path / str(size), "eval_loss")[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(loss_of_saved(run, tmp_path / "4"), rel=1e-5)


def test_accumulation_equals_a_larger_batch(tiny_run: Compose, tmp_path: Path) -> None:
    common = ["lora.lora_dropout=0", "trainer.max_steps=3"]
    train(
        tiny_run(*common, "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=4"),
        tmp_path / "accumulated",
    )
    train(
        tiny_run(*common, "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1"),
        tmp_path / "whole",
    )
    accumulated, whole = steps(tmp_path / "accumulated", "loss"), steps(tmp_path / "whole", "loss")
    assert list(accumulated.values()) == pytest.approx(list(whole.values()), rel=1e-5)
    norms = steps(tmp_path / "accumulated", "grad_norm"), steps(tmp_path / "whole", "grad_norm")
    assert list(norms[0].values()) == pytest.approx(list(norms[1].values()), rel=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
def test_evaluating_in_the_middle_changes_nothing(
    tiny_run: Compose, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes' evaluation kernel would cut the base's gradients off from here on."""
    monkeypatch.setattr(model, "cache_dequantized", lambda base: None)  # as where memory is short
    common = ["model.dtype=bfloat16", f"quantization={quantization}", "trainer.max_steps=6"]
    train(tiny_run(*common, "eval.every=2"), tmp_path / "evaluated")
    with monkeypatch.context() as patch:
        never = {"eval_loss": 0.0, "eval_perplexity": 1.0, "eval_token_accuracy": 1.0}
        patch.setattr(trainer.AdapterTrainer, "evaluate", lambda self, **_: self.log(dict(never)) or never)
        train(tiny_run(*common, "eval.every=2"), tmp_path / "never")
    for name in ("loss", "grad_norm"):
        assert steps(tmp_path / "evaluated", name) == steps(tmp_path / "never", name)
    assert min(steps(tmp_path / "evaluated", "grad_norm").values()) > 0
    assert steps(tmp_path / "evaluated", "eval_loss") != steps(tmp_path / "never", "eval_loss")


def test_gradients_reach_every_adapter_after_an_evaluation(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "cache_dequantized", lambda base: None)  # as where memory is short
    run = tiny_run("model.dtype=bfloat16")
    tokenizer = load_tokenizer(run.model)
    tuned = adapter.add_lora(model.load_base(run.model, run.quantization, tokenizer, CPU), run.lora, 0)
    key_dropout(tuned, 0)
    row = torch.tensor([[5, 6, 7, 8]])

    def gradients() -> list[torch.Tensor]:
        tuned.zero_grad()
        tuned.train()
        tuned(input_ids=row, labels=row).loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad and p.grad is not None]

    before = gradients()
    tuned.eval()
    with torch.no_grad():
        tuned(input_ids=row)
    after = gradients()
    assert len(before) == len(after) == 2 * 4 * 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_same_seed_same_adapter_whatever_ran_before(tiny_run: Compose, tmp_path: Path) -> None:
    run = tiny_run("trainer.max_steps=2")
    train(run, tmp_path / "first")
    train(tiny_run("trainer.max_steps=2", "seed=7"), tmp_path / "other")
    train(run, tmp_path / "again")
    first, other, again = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "other", "again")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_base_is_unchanged_by_training(tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(adapter, "add_lora", lambda *a, attach=adapter.add_lora: kept.append(attach(*a)) or kept[-1])
    train(tiny_run("trainer.learning_rate=1e-2"), tmp_path / "run")
    base = kept[0].unload()
    assert fingerprint(base) == read(tmp_path / "run", "run.json")["base"]["fingerprint"]


@pytest.mark.parametrize("lora", ["lora=all_linear", "lora.use_dora=true", "lora.use_rslora=true"])
def test_lora_variants_train_and_reload(tiny_run: Compose, tmp_path: Path, lora: str) -> None:
    train(tiny_run(lora, "trainer.max_steps=1"), tmp_path / "run")
    assert read(tmp_path / "run", "run.json")["status"] == "done"


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_other_quantizations_train(tiny_run: Compose, tmp_path: Path, quantization: str) -> None:
    train(tiny_run(f"quantization={quantization}", "model.dtype=bfloat16"), tmp_path / "run")
    assert read(tmp_path / "run", "run.json")["status"] == "done"


def test_gradient_checkpointing_changes_no_loss(tiny_run: Compose, tmp_path: Path) -> None:
    train(tiny_run("lora.lora_dropout=0"), tmp_path / "plain")
    train(tiny_run("lora.lora_dropout=0", "trainer.gradient_checkpointing=true"), tmp_path / "recomputed")
    assert steps(tmp_path / "plain", "loss") == pytest.approx(steps(tmp_path / "recomputed", "loss"), rel=1e-6)


def test_early_stopping(tiny_run: Compose, tmp_path: Path) -> None:
    train(
        tiny_run(
            "trainer.learning_rate=0.95",
            "trainer.lr_scheduler_type=constant",
            "trainer.max_steps=40",
            "eval.every=2",
            "trainer.early_stopping_patience=1",
        ),
        tmp_path / "run",
    )
    losses = list(steps(tmp_path / "run", "eval_loss").values())[1:]
    assert len(losses) < 20 and losses[-1] >= losses[-2], "it stops at the first evaluation that is no better"
    assert all(later < earlier for earlier, later in pairwise(losses[:-1]))


def test_every_token_that_passes_is_counted(tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, trainers = list[int](), list[trainer.AdapterTrainer]()
    plain = trainer.AdapterTrainer.training_step

    def training_step(self: trainer.AdapterTrainer, net: Any, inputs: dict[str, Any], *more: Any) -> torch.Tensor:
        trainers.append(self)
        passed.append(int(inputs["attention_mask"].sum()))
        return plain(self, net, inputs, *more)

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", training_step)
    run = tiny_run("trainer.gradient_accumulation_steps=3", "trainer.max_steps=null", "trainer.num_train_epochs=1")
    train(run, tmp_path / "run")
    assert len(passed) % 3, "the last step has fewer micro-batches"
    assert trainers[-1].state.num_input_tokens_seen == sum(passed)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_not_a_number_stops_the_run_and_nothing_is_saved(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    plain = trainer.AdapterTrainer.compute_loss

    def compute_loss(self: trainer.AdapterTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.state.global_step < 4:
            return loss
        if broken == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", compute_loss)
    with pytest.raises(RunFailed, match=f"{broken} is .* at step 5"):
        train(tiny_run(), tmp_path / "run")
    out = tmp_path / "run"
    assert read(out, "run.json")["status"] == "failed"
    assert max(steps(out, "loss")) == 4
    assert not (out / "adapter").exists()
    assert read(out, "metrics.json")["best"]["step"] == 3, "what was measured before stays"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_interruption_is_recorded_and_keeps_what_was_saved(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.AdapterTrainer.training_step

    def training_step(self: trainer.AdapterTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(), tmp_path / "run")
    assert read(tmp_path / "run", "run.json")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors").is_file()
    assert sorted(steps(tmp_path / "run", "eval_loss")) == [0, 3]


def test_an_evaluation_that_is_not_a_number_stops_the_run(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.AdapterTrainer.evaluate

    def poisoned(self: trainer.AdapterTrainer, *args: object, **kwargs: object) -> dict[str, float]:
        if self.state.global_step == 6:
            next(p for p in self.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.AdapterTrainer, "evaluate", poisoned)
    with pytest.raises(RunFailed, match="eval_loss is nan at step 6"):
        train(tiny_run(), tmp_path / "run")
    assert read(tmp_path / "run", "metrics.json")["best"]["step"] == 3
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_adapter_trains_in_float32_on_a_bfloat16_base(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL casts the adapter of a 4-bit base to bfloat16, in which small updates vanish."""
    plain, seen = trainer.AdapterTrainer.training_step, set()

    def training_step(self: trainer.AdapterTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        seen.update(p.dtype for p in self.model.parameters() if p.requires_grad)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", training_step)
    train(tiny_run("model.dtype=bfloat16", "trainer.max_steps=1"), tmp_path / "run")
    assert seen == {torch.float32}
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_questions_fit_where_their_conversations_fit(tiny_run: Compose, tmp_path: Path) -> None:
    rows = conversations(60)
    for i, row in enumerate(rows):
        row["messages"][0]["content"] += f" and it hurts me{i}" * 300 * (len(row["messages"]) == 2)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    train(tiny_run(f"data.path='{path}'", "eval.held_out=2", "trainer.max_steps=1"), tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(len(row["prompt"]) < 1000 for row in samples)
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert rejected and all("does not fit in trainer.max_length=256" in row["reason"] for row in rejected)


@pytest.mark.parametrize("module", ["lm_head", "mlp", "q_prog"])
def test_layers_that_cannot_be_adapted(tiny_run: Compose, tmp_path: Path, module: str) -> None:
    with pytest.raises(UserError, match=f"has no layer {module}; it has down_proj, gate_proj, k_proj"):
        train(tiny_run(f"lora.target_modules=[{module}]"), tmp_path / "run")
    assert read(tmp_path / "run", "run.json")["status"] == "refused"


def test_a_folder_that_holds_a_run_is_never_overwritten(tiny_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "done"}')
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny_run(), tmp_path)
    assert read(tmp_path, "run.json") == {"status": "done"}


def test_unwritable_output_folder(tiny_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write results to .*file/run .*hydra\.run\.dir"):
        train(tiny_run(), tmp_path / "file" / "run")


def test_a_damaged_adapter_is_not_saved_and_a_changed_one_is_noticed(tiny_run: Compose, tmp_path: Path) -> None:
    run = tiny_run()
    tokenizer = load_tokenizer(run.model)
    tuned = adapter.add_lora(model.load_base(run.model, run.quantization, tokenizer, CPU), run.lora, 0)
    adapter.to_float32(tuned)
    adapter.save(tuned, tokenizer, tmp_path / "good")
    adapter.verify(tuned, tmp_path / "good", [5, 6, 7])
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1
    with pytest.raises(adapter.Damaged, match="does not load as it was trained"):
        adapter.verify(tuned, tmp_path / "good", [5, 6, 7])
    with torch.no_grad():
        parameters[0][0, 0] = float("nan")
    with pytest.raises(adapter.Damaged, match="not finite"):
        adapter.save(tuned, tokenizer, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", [member.name for member in Scheduler])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_no_step_of_the_warm_up_has_a_learning_rate_of_0(name: str, warmup: int) -> None:
    def rates(changed: bool) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
        if changed:
            begin_above_zero(scheduler, warmup)
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    stock, ours = rates(False), rates(True)
    assert min(ours) > 0 and ours[warmup:] == stock[warmup:]
    if name != "constant":
        assert ours[:warmup] == pytest.approx([0.5 * (step + 1) / (warmup + 1) for step in range(warmup)])


def test_a_run_of_one_step_trains(tiny_run: Compose, tmp_path: Path) -> None:
    train(tiny_run("trainer.max_steps=1", "trainer.warmup_ratio=0.5"), tmp_path)
    assert steps(tmp_path, "learning_rate")[1] > 0
    assert read(tmp_path, "run.json")["adapter_changed"] is True
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_an_adapter_that_no_step_changed_is_said_to_be_so(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure=None: None)
    train(tiny_run("trainer.max_steps=1"), tmp_path)
    assert read(tmp_path, "run.json")["adapter_changed"] is False
    assert "the saved adapter is the one that training began with" in caplog.text
