"""A full memory is explained by the keys that take less of it."""

import pytest
import torch

from medtune.modeling.memory import OutOfMemory, explained_memory_errors

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB. GPU 0 has a total capacity of 11.75 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 GB"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_memory_says_what_to_change(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as explained, explained_memory_errors():
        raise error
    line = str(explained.value)
    assert "\n" not in line and "Tried to allocate" not in line and explained.value.__cause__ is None
    for key in ("per_device_train_batch_size", "max_length", "eval.batch_size", "gradient_checkpointing=true"):
        assert key in line


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explained_memory_errors():
        raise error
