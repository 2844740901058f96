"""A device that is pretended on the CPU: tensors on it refuse to be mixed with tensors of the CPU, as CUDA's do.

    with pretended_device() as device:
        model.to(device)
        sample(model, prompts.to(device), …)      # raises MixedDevices where a tensor stayed behind

Every tensor lives in the memory of the CPU. Whether it pretends to be on the device is an attribute of its storage, so
views, parameters and what autograd keeps know it too. Two modes keep it up to date:

- `_Calls` sees the calls of Python: it answers `tensor.device`, and turns `device=` of factories and of `to` into the
  attribute.
- `_Operations` sees what is dispatched, in the backward pass too: it raises where an operation mixes devices, and its
  results are on the device of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments
from trl.trainer import grpo_trainer
from trl.trainer.utils import shuffle_sequence_dict

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")


class MixedDevices(RuntimeError):
    """An operation was given tensors of the device and of the CPU."""


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether a tensor pretends to be on the device."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_device", False)


def _place(tensor: torch.Tensor, on_device: bool) -> None:
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().on_device = on_device


# ---------------------------------------------------------------- calls of Python


class _Copy(torch.autograd.Function):
    """Copy a tensor to the other device, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, on_device: bool) -> torch.Tensor:
        ctx.was_on_device = is_on_device(tensor)
        copy = tensor.clone()
        _place(copy, on_device)
        return copy

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        copy = gradient.clone()
        _place(copy, ctx.was_on_device)
        return copy, None


_T = torch.Tensor
# A tensor on CUDA refuses both.
_HOST_ONLY = {_T.numpy, _T.__array__}
# Results are on the CPU unless a device is given, whatever tensors stand in a list.
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


class _Calls(TorchFunctionMode):
    def __init__(self, operations: _Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _T.device.__get__:
            return DEVICE if is_on_device(args[0]) else func(*args)
        if func == _T.is_cuda.__get__:
            return is_on_device(args[0])
        if func == _T.is_cpu.__get__:
            return not is_on_device(args[0])
        if func is _T.backward:
            with self:  # it runs code of Python
                return _backward(*args, **kwargs)
        if func in _HOST_ONLY and is_on_device(args[0]):
            raise TypeError("A tensor of the device cannot be made an array of numpy: copy it to the CPU first.")
        if func is torch._C._nn._parse_to:  # only reads the arguments of Module.to
            return func(*args, **kwargs)
        to = _target(func, args, kwargs)
        args, kwargs = tuple(map(_on_cpu, args)), {name: _on_cpu(value) for name, value in kwargs.items()}
        if func is _T.cuda:
            func, args, kwargs = _T.to, (args[0], CPU), {}
        given = list(_tensors((args, kwargs)))
        with self.operations.temporaries(func not in _FROM_DATA and any(map(is_on_device, given))):
            result = func(*args, **kwargs)
        if to is None or not isinstance(result, torch.Tensor) or is_on_device(result) == to:
            return result
        with torch._C.DisableTorchFunction():
            storages = [tensor.untyped_storage() for tensor in given]
            unmoved = any(result.untyped_storage() is storage for storage in storages)
        if unmoved:
            return _Copy.apply(result, to)
        _place(result, to)
        return result


def _backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _target(func, args: tuple, kwargs: dict[str, Any]) -> bool | None:
    """Return whether the result of a call goes to the device; `None` if it is the operations' to say."""
    if func is _T.cpu:
        return False
    if func is _T.cuda:
        return True
    device = kwargs.get("device")
    if func in (_T.to, torch.Tensor.type_as) and device is None and len(args) > 1:
        device = args[1]
        if isinstance(device, torch.Tensor):
            return is_on_device(device)
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        return device.type == DEVICE.type
    if func in _FROM_DATA:
        return isinstance(args[0], torch.Tensor) and is_on_device(args[0])
    return None


def _on_cpu(argument: Any) -> Any:
    """Return an argument, with the CPU in the place of the device."""
    if isinstance(argument, str):
        return "cpu" if argument.split(":")[0] == DEVICE.type else argument
    return CPU if isinstance(argument, torch.device) and argument.type == DEVICE.type else argument


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results; `torch.utils._pytree` takes ten times as long."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# ---------------------------------------------------------------- operations

_aten = torch.ops.aten
# Between devices by their nature: the result is on the device of the first.
_COPYING = {_aten.copy_, _aten.copy}
# A number on the CPU (a tensor without dimensions) goes with tensors of the device, except in these.
_STRICT = {_aten.cat, _aten.stack, _aten.gather, _aten.index_select, _aten.scatter, _aten.scatter_}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.makes_on_device = False
        # CUDA takes an index that is on the CPU, but has to copy it. This library's own code has no reason to do so.
        self.takes_indices_of_the_cpu = False

    def taking_indices_of_the_cpu(self, function):
        """Let a function of another library select rows with an index of the CPU."""

        @wraps(function)
        def allowed(*args, **kwargs):
            with patch.object(self, "takes_indices_of_the_cpu", True):
                return function(*args, **kwargs)

        return allowed

    @contextmanager
    def temporaries(self, on_device: bool) -> Iterator[None]:
        """Let what a call makes without inputs be on the device: tensors that its own code in C++ needs."""
        before, self.makes_on_device = self.makes_on_device, on_device
        try:
            yield
        finally:
            self.makes_on_device = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func, args: tuple, kwargs: dict[str, Any]):
        packet = func.overloadpacket
        inputs = list(_tensors((args, kwargs)))
        deciding = inputs[:1] if packet in _COPYING else inputs
        on_device = any(map(is_on_device, deciding)) if inputs else self.makes_on_device
        if on_device and packet not in _COPYING:
            self._check(func, packet, args, inputs)
        if packet is _aten.histc and not args[0].is_floating_point():  # CUDA counts integers, the CPU cannot
            args = (args[0].float(), *args[1:])
        result = func(*args, **kwargs)
        if on_device:
            known = {id(tensor.untyped_storage()) for tensor in inputs}
            for tensor in _tensors(result):
                if id(tensor.untyped_storage()) not in known:
                    tensor.untyped_storage().on_device = True
        return result

    def _check(self, func, packet, args: tuple, inputs: list[torch.Tensor]) -> None:
        if packet is _aten.index and self.takes_indices_of_the_cpu:
            return
        written = {id(value) for value, entry in zip(args, func._schema.arguments, strict=False) if _is_written(entry)}
        for tensor in inputs:
            number = tensor.dim() == 0 and packet not in _STRICT and id(tensor) not in written
            if not is_on_device(tensor) and not number:
                shapes = [f"{'device' if is_on_device(each) else 'CPU'} {list(each.shape)}" for each in inputs]
                raise MixedDevices(f"{func} was given tensors of two devices: {', '.join(shapes)}.")


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


# ---------------------------------------------------------------- the device for a test


def _on_device_only(collective):
    """Let an operation over processes refuse tensors of the CPU; NCCL does where there are several."""

    @wraps(collective)
    def checked(accelerator, tensor, *args, **kwargs):
        if not all(map(is_on_device, _tensors(tensor))):
            raise MixedDevices(f"{collective.__name__} was given a tensor of the CPU.")
        return collective(accelerator, tensor, *args, **kwargs)

    return checked


def _tag(storage) -> str | None:
    return str(DEVICE) if getattr(storage, "on_device", False) else None


def _restore(storage, location: str):
    if not location.startswith(DEVICE.type):
        return None
    storage.on_device = True
    return storage


# Before torch's own entries, which would ask for CUDA. Without the modes no storage carries the attribute.
torch.serialization.register_package(-1, _tag, _restore)

_DEVICE_OF_THE_RUN = property(lambda state: DEVICE, lambda state, value: None)


def _device_of_the_arguments(args: TrainingArguments) -> torch.device:
    args._setup_devices  # noqa: B018, starts the process state
    return DEVICE


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Pretend that the machine has a device, on which Accelerate and transformers place models and batches."""
    operations = _Operations()
    with (
        patch.object(PartialState, "device", _DEVICE_OF_THE_RUN, create=True),
        patch.object(AcceleratorState, "device", _DEVICE_OF_THE_RUN, create=True),
        patch.object(TrainingArguments, "device", property(_device_of_the_arguments)),
        patch.object(
            grpo_trainer, "shuffle_sequence_dict", operations.taking_indices_of_the_cpu(shuffle_sequence_dict)
        ),
        patch.object(Accelerator, "gather", _on_device_only(Accelerator.gather)),
        patch.object(Accelerator, "reduce", _on_device_only(Accelerator.reduce)),
        patch.object(torch.cuda, "get_device_name", lambda *_: "pretended"),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        operations,
        _Calls(operations),
    ):
        yield DEVICE
