"""The subject of a setup's library, which is imported when it is asked for: each runs in a process of its own."""

from __future__ import annotations

from .subjects import Setup, Subject, Work


def make_subject(setup: Setup, work: Work) -> Subject:
    """The subject of a setup's library.

    Raises:
        Exception: the library is missing, or refuses the setup.
    """
    if setup.library == "pack":
        from .pack_subject import PackSubject

        return PackSubject(setup, work)
    if setup.library == "diffusers":
        from .diffusers_subject import DiffusersSubject

        return DiffusersSubject(setup, work)
    from .comfyui_subject import ComfySubject

    return ComfySubject(setup, work)
