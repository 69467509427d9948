"""Errors that a user can act on: what failed, the value, what was expected, what to do."""

from __future__ import annotations

import torch


class AccelError(Exception):
    """Base of every error that a wrong file, setting or machine causes."""


class FileError(AccelError):
    """A file is missing, damaged, or not what its name says."""


class CheckpointError(AccelError):
    """A checkpoint is not one that this pack can run."""


class LoraError(AccelError):
    """A LoRA file or stack does not fit the model."""


class SettingsError(AccelError):
    """A setting is unknown, or cannot run on this machine."""


class EngineStateError(AccelError):
    """The engine was asked for something out of order, such as a forward before its weights are loaded."""


class DeviceMemoryError(AccelError, torch.OutOfMemoryError):
    """A device had no room for what was asked of it; ComfyUI takes it for any other out-of-memory."""


class LibraryError(AccelError):
    """A library that the pack builds on is missing or does not load."""


def first_line(exc: BaseException) -> str:
    """An exception's message, short: libraries' messages go on for pages."""
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), "no message")
