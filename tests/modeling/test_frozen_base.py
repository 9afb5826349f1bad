"""The proof that the base model did not change sees every byte, and takes little memory beside it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from medtune.modeling.frozen_base import ROW, checksums, fingerprint

ALLOWED = 0.3e9  # bytes beside the base model, outside the passes of training and evaluation


def holds(**tensors: torch.Tensor) -> Any:
    """Returns what has these tensors, as a model does."""
    return SimpleNamespace(state_dict=lambda: tensors)


def peak_bytes(work: Any) -> int:
    """Returns the most memory that PyTorch held at a time during `work`, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("proof", [checksums, fingerprint])
def test_the_largest_tensor_of_llama_3_is_proved_in_little_memory(proof: Any) -> None:
    embedding = torch.empty(128_256, 4096, dtype=torch.bfloat16)  # 1.05 GB, never touched
    peak = peak_bytes(lambda: proof(holds(embedding=embedding)))
    assert peak < ALLOWED


def test_the_measure_sees_what_a_proof_at_once_would_take() -> None:
    content = torch.zeros(50_000_000, dtype=torch.uint8)
    assert peak_bytes(lambda: content.view(-1, 4000).sum(0, dtype=torch.int64)) >= 8 * len(content)


@pytest.mark.parametrize("size", [1, ROW - 1, ROW, 3 * ROW + 5, 2048 * ROW, 2049 * ROW + 1])
def test_a_changed_byte_anywhere_is_seen(size: int) -> None:
    content = torch.arange(size).remainder(251).to(torch.uint8)
    before = checksums(holds(weight=content))
    assert all(torch.equal(a, b) for a, b in zip(before, checksums(holds(weight=content)), strict=True))
    for place in {0, size // 2, size - 1}:
        changed = content.clone()
        changed[place] += 1
        after = checksums(holds(weight=changed))
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_two_bytes_that_swap_places_are_seen() -> None:
    content = torch.arange(4 * ROW).remainder(251).to(torch.uint8)
    changed = content.clone()
    changed[[5, ROW + 9]] = content[[ROW + 9, 5]]
    pairs = zip(checksums(holds(weight=content)), checksums(holds(weight=changed)), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
