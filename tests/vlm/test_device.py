"""Names of devices and number formats."""

from typing import Any

import pytest
import torch

from vlm.device import DTYPES, resolve_device, resolve_dtype
from vlm.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_takes_the_best_device_that_works() -> None:
    found = resolve_device("auto")
    if torch.cuda.is_available():
        assert found.type == "cuda"
    else:
        assert found.type == ("mps" if torch.backends.mps.is_available() else "cpu")
    assert torch.ones(2, device=found).sum().item() == 2


def test_a_device_may_be_named_or_given() -> None:
    assert resolve_device("cpu") == resolve_device(CPU) == CPU


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "cpu:x", "CPU", None, 99, 1.5])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match="use auto, or cpu") as caught:
        resolve_device(device)
    assert repr(str(device)) in str(caught.value)


def test_auto_is_float32_on_the_cpu_and_the_checkpoints_own_elsewhere() -> None:
    assert resolve_dtype("auto", CPU) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is None
    assert resolve_dtype("auto", torch.device("mps")) is None


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_type_may_be_named_or_given(name: str) -> None:
    expected = getattr(torch, name)
    for device in (CPU, torch.device("cuda")):
        assert resolve_dtype(name, device) is resolve_dtype(expected, device) is expected
    assert set(DTYPES) == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", None, 32, torch.int8, torch.float64])
def test_other_types_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="known: auto, float32, bfloat16, float16"):
        resolve_dtype(dtype, CPU)
